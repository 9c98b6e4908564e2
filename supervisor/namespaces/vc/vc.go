// Package vc keeps the vSphere side of Atoll's namespaces: for each, one
// resource pool a zone under the parent pool, one VM folder, custom attributes,
// permissions; and it tells who watches when an administrator changed one.
//
// It knows nothing of Kubernetes. A Client serves the namespaces of one
// supervisor in one vCenter. It keeps no state of its own: what is there is
// read from vCenter through one PropertyCollector watch, and what belongs to
// which namespace is written on the objects themselves (AttributeOwner).
//
// # Errors
//
// Every error wraps one class of containerd/errdefs, and its text names the
// object, the reason and the cure. It never holds credentials. Whether and when
// to retry is the caller's choice:
//
//   - ErrUnavailable: vCenter cannot be reached, refuses the login, has dropped
//     the session, has not answered in time, or the watch has not caught up.
//     What was asked may or may not have happened: nothing is known, and nothing
//     may be concluded to be gone. Retry with back-off.
//   - ErrPermissionDenied: names the privilege and the object. Retry slowly.
//   - ErrAlreadyExists: the name is taken by a pool or folder that is not this
//     namespace's. It is never touched.
//   - ErrInvalidArgument: what was asked can never be: an unknown zone, user or
//     group, a negative limit, a name that vSphere refuses.
//   - ErrFailedPrecondition: it cannot be now: a reservation that the parent has
//     no room for, a pool that still holds VMs.
//   - ErrAborted: an administrator changed the object meanwhile. Retry at once;
//     nothing is left half done that the next Ensure does not find.
//   - ErrUnknown: a task or a call failed for a reason that has no class; the
//     text is vCenter's.
//
// Where several objects of one call failed, the errors are joined, and
// errors.Is finds each class.
package vc

import (
	"context"
	"time"
)

// Custom attributes on pools and folders.
const (
	// AttributeOwner says whose the object is: "<supervisor id>/<namespace
	// uid>/<namespace name>/<the object's own id>". What lacks it is not ours,
	// nor is what it was copied onto.
	AttributeOwner = "atoll.owner"
	// AttributeDescription is Namespace.Description, for people.
	AttributeDescription = "atoll.description"
)

// DefaultParent is the name of the parent pool and of the parent folder.
const DefaultParent = "Namespaces"

// Unlimited as a limit is no limit.
const Unlimited = -1

// A Ref names one namespace.
type Ref struct {
	Name string // the Kubernetes namespace; also the name of its pools and folder
	UID  string // of the object that asks for it; what proves ownership
}

// A Namespace is what one namespace should look like in vSphere: plain data,
// never changed by this package. The zero value of a field asks for vSphere's
// default unless it says otherwise.
type Namespace struct {
	Ref
	Description string // one line for people, on the pools
	Pools       []Pool // one a zone, at least one, no zone twice
	// Access is the whole access list: other permissions set directly on the
	// namespace's pools and folder are taken away, inherited ones stay. Nil
	// leaves permissions alone.
	Access []Access
	// Attributes are further custom attributes of the pools, for people. Names
	// that start with "atoll." are refused. One that is no longer named here
	// keeps its value.
	Attributes map[string]string
	// Tags are ids or "category/name" of vSphere tags that must exist. One that
	// is no longer named here stays attached.
	Tags []string
}

// A Pool is the share of one zone's cluster that a namespace gets.
type Pool struct {
	Zone   string     // a Zone of Options
	CPU    Allocation // MHz
	Memory Allocation // MiB
}

// An Allocation is of CPU in MHz or of memory in MiB.
type Allocation struct {
	Limit       int64 // Unlimited or more than 0
	Reservation int64 // 0 or more, at most Limit
	Fixed       bool  // the reservation does not expand into the parent's; false is vSphere's expandable
	Shares      Shares
}

// SharesLevel is how a pool weighs against its siblings; empty is normal.
type SharesLevel string

// Levels of shares.
const (
	SharesLow    SharesLevel = "low"
	SharesNormal SharesLevel = "normal"
	SharesHigh   SharesLevel = "high"
	SharesCustom SharesLevel = "custom"
)

// Shares of a pool; Value counts for SharesCustom alone.
type Shares struct {
	Level SharesLevel
	Value int32
}

// A Role in a namespace.
type Role string

// Roles, and the vSphere roles they map to (Options.Roles).
const (
	RoleOwner Role = "owner" // edit, and power operations on VMs
	RoleEdit  Role = "edit"  // view, and the console of VMs
	RoleView  Role = "view"  // read only
)

// An Access lets one user or group in.
type Access struct {
	Subject string // without its domain
	Domain  string // of vSphere SSO, as "vsphere.local"; empty: a local account
	Group   bool
	Role    Role
}

// A State is what vSphere has for one namespace, as the watch last saw it.
type State struct {
	Ref
	Pools  []PoolState // those that bear the owner mark, in the order of zones
	Folder *FolderState
	// Access is what is set on the pools and the folder. Where they differ from
	// one another, AccessUneven has each list once, and Access is the first.
	Access       []Access
	AccessUneven [][]Access
}

// A PoolState is one resource pool.
type PoolState struct {
	Pool
	ID          string // managed object id, as "resgroup-42"
	Name        string
	Path        string // inventory path, for people
	ParentID    string
	InPlace     bool // it is a child of its zone's parent pool
	Description string
	Attributes  map[string]string // without those of Atoll
}

// A FolderState is the VM folder.
type FolderState struct {
	ID       string // "group-v42"
	Name     string
	Path     string
	ParentID string
	InPlace  bool // it is a child of the parent folder
}

// A Field names what can drift.
type Field string

// Fields that drift: limits are an administrator's to change, by default; the
// rest is structure.
const (
	FieldCPU         Field = "cpu"
	FieldMemory      Field = "memory"
	FieldName        Field = "name"
	FieldParent      Field = "parent"
	FieldMissing     Field = "missing" // deleted, or its owner mark was taken away
	FieldExtra       Field = "extra"   // a pool in a zone that is not asked for
	FieldAccess      Field = "access"
	FieldDescription Field = "description"
	FieldAttribute   Field = "attribute"
	FieldTag         Field = "tag" // of errors alone: tags are not watched
)

// A PartError tells what an error of Ensure's is about, for callers that name
// the reason to people: a user or group that vCenter does not know is
// ErrInvalidArgument of FieldAccess, a reservation that the parent has no room
// for is ErrFailedPrecondition of FieldCPU or FieldMemory, an unknown tag is
// ErrInvalidArgument of FieldTag. Errors about the whole have none.
type PartError struct {
	Field Field
	Err   error // with a class; its text is the PartError's
}

func (e *PartError) Error() string { return e.Err.Error() }
func (e *PartError) Unwrap() error { return e.Err }

// A Drift is one difference between what should be and what is. Object and
// Message are for people; Pool holds what is there for FieldCPU and FieldMemory.
type Drift struct {
	Field   Field
	Zone    string // empty for the folder
	Object  string // as `resource pool "Namespaces/team-a"`
	Want    string
	Have    string
	Message string
	Pool    *Pool
}

// Limits tells whether the drift is one of limits, reservations or shares.
func (d Drift) Limits() bool { return d.Field == FieldCPU || d.Field == FieldMemory }

// A Policy is a storage policy of vCenter (PBM).
type Policy struct {
	ID          string // UUID
	Name        string
	Description string
	Datastores  []Datastore // compatible ones, by name
	Capacity    int64       // bytes, of Datastores together
	Free        int64       // bytes
}

// A Datastore that a policy may place on.
type Datastore struct {
	ID       string // "datastore-42"
	Name     string
	Capacity int64 // bytes
	Free     int64 // bytes
}

// A Zone is one vSphere cluster of the supervisor.
type Zone struct {
	Name    string // "" is a supervisor's only zone
	Cluster string // inventory path, name or managed object id of the cluster
}

// A ZoneState is what the watch knows of a zone's cluster.
type ZoneState struct {
	Zone
	ID         string // "domain-c42"
	Path       string
	Datacenter string // name
	CPU        int64  // MHz, of all hosts
	Memory     int64  // MiB
	Cores      int32
	Hosts      int
	MHzPerCore int64  // to convert cores; 0 where there are no hosts
	ParentPool string // managed object id; empty until the first namespace is made
}

// Health of the connection.
type Health struct {
	Connected  bool      // logged in, and the watch has seen everything once
	Since      time.Time // of Connected
	Err        error     // why not connected; classed
	Address    string    // of vCenter, without credentials
	Version    string    // product, version and build
	InstanceID string    // of vCenter
	LastUpdate time.Time // the watch last heard from vCenter
	// Lag is how long the last change that this Client made took to come back
	// through the watch.
	Lag time.Duration
	// PermissionsErr is why the permissions could not be read when they last
	// were: not every vCenter tells the watch of them, so that drift of access
	// may go unseen.
	PermissionsErr error
}

// An Event is what administrators read among a pool's events.
type Event struct {
	Severity EventSeverity
	Message  string // one sentence; never a secret
}

// EventSeverity of an Event.
type EventSeverity string

// Severities.
const (
	EventInfo    EventSeverity = "info"
	EventWarning EventSeverity = "warning"
	EventError   EventSeverity = "error"
)

// Credentials of a vCenter user. String and GoString hide both the password
// and its length.
type Credentials struct {
	User     string
	Password string
}

func (Credentials) String() string   { return "credentials" }
func (Credentials) GoString() string { return "vc.Credentials{}" }

// Options of a Client.
type Options struct {
	Address string // host, host:port, or https URL (its path is /sdk if empty)
	// Credentials is called at each login, so that a changed Secret counts at
	// the next. What it returns is not kept.
	Credentials func(context.Context) (Credentials, error)
	CA          []byte // PEM; nil: the system's
	Thumbprint  string // SHA-256 or SHA-1 of the server's certificate, in place of CA
	Supervisor  string // id of this supervisor, unchanged over restarts; no '/'
	Zones       []Zone // at least one; all in one datacenter
	// ParentPool and ParentFolder are names, DefaultParent if empty, of a child
	// of the cluster's root pool and of the datacenter's VM folder. They are
	// made if missing, used as they are if there, never changed nor deleted.
	ParentPool   string
	ParentFolder string
	// Roles names vSphere roles. One that is empty is Atoll's: "ReadOnly" for
	// view, and "Atoll namespace edit" and "Atoll namespace owner", which are
	// made when first needed.
	Roles map[Role]string
	// PolicyInterval is how often storage policies are read, since PBM has no
	// watch: 5 minutes if zero, at least 10 seconds.
	PolicyInterval time.Duration
	// Notify functions are called from the watch and must not block. Each may be
	// nil.
	Notify Notify
	// Observe is told of every call that was made to vCenter, waits included:
	// its method ("CreateResourcePool"), how long it took, and its error, which
	// has a class. Optional; it must not block.
	Observe func(method string, took time.Duration, err error)
}

// Notify says who wants to hear of changes: of others', not of what this Client
// made itself. After a dropped session or a resync, every namespace that differs
// from what was known before is named.
type Notify struct {
	// Namespace is called with a namespace whose vSphere side changed: one that
	// bears, or until now bore, this supervisor's mark.
	Namespace func(Ref)
	Policies  func() // a policy came, went, was renamed, or fits other datastores
	Health    func() // Health().Connected changed
}
