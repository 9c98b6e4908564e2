package vc

import (
	"crypto/sha256"
	"encoding/hex"
	"maps"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/vmware/govmomi/vim25/types"

	"github.com/openatoll/atoll/internal/vsphere"
)

// What is watched; the rest of the inventory stays in vCenter.
var watched = map[string][]string{
	"ResourcePool":           {"name", "parent", "owner", "config", "customValue", "permission"},
	"Folder":                 {"name", "parent", "customValue", "permission"},
	"Datacenter":             {"name", "parent", "vmFolder"},
	"ClusterComputeResource": {"name", "parent", "resourcePool", "host", "summary.totalCpu", "summary.totalMemory", "summary.numCpuCores"},
}

// Properties of an object in the cache. All values are comparable.
const (
	propName   = "name"       // string
	propParent = "parent"     // ref
	propOwner  = "owner"      // ref: a pool's cluster
	propCPU    = "cpu"        // Allocation
	propMemory = "memory"     // Allocation
	propAttr   = "attribute:" // + key of the definition: string
	propPerms  = "permission" // string, of formatPermissions
	propVMs    = "vmFolder"   // ref
	propRoot   = "root"       // ref: a cluster's root pool
	propHosts  = "hosts"      // int
	propMHz    = "mhz"        // int64
	propBytes  = "bytes"      // int64
	propCores  = "cores"      // int32
)

type ref = types.ManagedObjectReference

// echoWait is how long a value that this Client wrote stands against others
// from the watch: long enough for answers that were under way, short enough for
// an administrator's change that came right after.
const echoWait = 5 * time.Second

// A written is a value of ours that the watch has not shown yet.
type written struct {
	at   time.Time
	held any // what the watch says instead
	any  bool
}

type object struct {
	seen    bool // by the watch; else we made it and it is about to come
	props   map[string]any
	written map[string]*written // nil mostly
	// expected is what a call of ours that is under way makes true: the watch may
	// show it before vCenter has answered the call.
	expected map[string]any
}

func (o *object) str(prop string) string { s, _ := o.props[prop].(string); return s }
func (o *object) ref(prop string) ref    { r, _ := o.props[prop].(ref); return r }

// set unsets a property that is nil.
func (o *object) set(prop string, v any) {
	if v == nil {
		delete(o.props, prop)
	} else {
		o.props[prop] = v
	}
}

// A slot is a name under a parent.
type slot struct {
	parent ref
	name   string
}

// A cache is what the watch saw, with what this Client wrote since. Its methods
// want mu held, but for those of vsphere.Viewer.
type cache struct {
	mu         sync.Mutex
	supervisor string
	ownerKey   int32 // of AttributeOwner's definition; 0 before the first login
	synced     bool
	cause      error // why not
	since      time.Time
	lag        time.Duration
	permsErr   error // of the last reading of all permissions
	objects    map[ref]*object
	names      map[slot]ref
	clusters   map[ref]*object
	// lost are objects of ours that left the watch: deleted, or no longer to be
	// seen or read by our account. By namespace UID; see Client.confirmGone.
	lost map[string]map[ref]bool
	// resolved are the zones whose cluster was seen.
	resolved map[string]bool
	owned    map[string]map[ref]Ref // by namespace UID
	renames  map[ref]renaming       // under way

	notify func(Ref)
	health func()
	now    func() time.Time
}

func newCache(supervisor string) *cache {
	c := &cache{supervisor: supervisor, lost: map[string]map[ref]bool{}, resolved: map[string]bool{}, renames: map[ref]renaming{}, now: time.Now, notify: func(Ref) {}, health: func() {}}
	c.reset()
	return c
}

func (c *cache) reset() {
	c.objects = map[ref]*object{}
	c.names = map[slot]ref{}
	c.clusters = map[ref]*object{}
	c.owned = map[string]map[ref]Ref{}
}

// mark is the value of AttributeOwner on one object. It names the object, so
// that a copy of it elsewhere says nothing.
func (c *cache) mark(r Ref, id ref) string {
	return c.supervisor + "/" + r.UID + "/" + r.Name + "/" + id.Value
}

const unfinishedPrefix = "atoll."

// unfinished is what a pool or folder is called until it bears its mark: the
// name proves whose it is if we are killed in between. It has the namespace's
// UID and a digest of the supervisor's id, and fits into vSphere's 80 bytes.
func (c *cache) unfinished(uid string) string {
	sum := sha256.Sum256([]byte(c.supervisor))
	return unfinishedPrefix + uid + "." + hex.EncodeToString(sum[:4])
}

// owner is the namespace that the object says it belongs to.
func (c *cache) owner(id ref, o *object) (Ref, bool) {
	if mark := o.str(c.ownerProp()); mark != "" {
		supervisor, rest, _ := strings.Cut(mark, "/") // none holds a slash
		uid, rest, _ := strings.Cut(rest, "/")
		name, self, _ := strings.Cut(rest, "/")
		return Ref{Name: name, UID: uid}, supervisor == c.supervisor && self == id.Value
	}
	uid, _, _ := strings.Cut(strings.TrimPrefix(o.str(propName), unfinishedPrefix), ".")
	return Ref{UID: uid}, uid != "" && o.str(propName) == c.unfinished(uid)
}

func (c *cache) unindex(r ref, o *object) {
	delete(c.clusters, r)
	if s := (slot{o.ref(propParent), o.str(propName)}); c.names[s] == r {
		delete(c.names, s)
	}
	if owner, ok := c.owner(r, o); ok {
		delete(c.owned[owner.UID], r)
		if len(c.owned[owner.UID]) == 0 {
			delete(c.owned, owner.UID)
		}
	}
}

func (c *cache) index(r ref, o *object) {
	if r.Type == "ClusterComputeResource" {
		c.clusters[r] = o
	}
	c.names[slot{o.ref(propParent), o.str(propName)}] = r
	if owner, ok := c.owner(r, o); ok {
		if c.owned[owner.UID] == nil {
			c.owned[owner.UID] = map[ref]Ref{}
		}
		c.owned[owner.UID][r] = owner
	}
}

// touched collects whose objects changed.
func (c *cache) touched(r ref, o *object, into map[Ref]bool) {
	if owner, ok := c.owner(r, o); ok {
		into[owner] = true
	}
}

// expect notes what a call is about to make true.
func (c *cache) expect(r ref, props map[string]any) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if o := c.objects[r]; o != nil {
		o.expected = props
	}
}

// write notes what this Client just made true.
func (c *cache) write(r ref, props map[string]any) {
	c.mu.Lock()
	defer c.mu.Unlock()
	o := c.objects[r]
	if o == nil {
		o = &object{props: map[string]any{}}
		c.objects[r] = o
	} else {
		c.unindex(r, o)
	}
	if o.written == nil {
		o.written = map[string]*written{}
	}
	for k, v := range props {
		if o.seen && o.props[k] == v {
			continue // the watch was faster
		}
		o.set(k, v)
		o.written[k] = &written{at: c.now()}
	}
	o.expected = nil
	c.index(r, o)
}

// A renaming waits until the watch shows a name.
type renaming struct {
	name string
	seen chan struct{} // closed then
}

// renaming tells when the watch shows that an object has a name. Of one object
// there is one at a time; forget ends it.
func (c *cache) renaming(r ref, name string) (seen <-chan struct{}, forget func()) {
	w := renaming{name, make(chan struct{})}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.renames[r] = w
	return w.seen, func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.renames[r] == w {
			delete(c.renames, r)
		}
	}
}

// named tells who waits for an object's name. It wants mu held.
func (c *cache) named(u vsphere.Update) {
	if w, waits := c.renames[u.Object]; waits && u.Props["name"] == w.name {
		close(w.seen)
		delete(c.renames, u.Object)
	}
}

// gone notes that this Client removed an object.
func (c *cache) gone(r ref) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if o := c.objects[r]; o != nil {
		c.unindex(r, o)
		delete(c.objects, r)
	}
	for uid, lost := range c.lost {
		if delete(lost, r); len(lost) == 0 {
			delete(c.lost, uid)
		}
	}
}

// apply puts what the watch says into o, but for what it cannot know yet. It
// tells whether anything changed.
func (c *cache) apply(o *object, props map[string]any) bool {
	changed := false
	for k, v := range props {
		if w := o.written[k]; w != nil {
			if o.props[k] != v {
				w.held, w.any = v, true
				continue
			}
			c.lag = c.now().Sub(w.at)
			delete(o.written, k)
			continue
		}
		if o.props[k] != v {
			o.set(k, v)
			// What comes with an object that we just made is no change.
			ours, ok := o.expected[k]
			changed = changed || o.seen && !(ok && ours == v)
		}
	}
	if len(o.written) == 0 {
		o.written = nil
	}
	return changed
}

// settle gives in to the watch where it has not shown for long what we wrote.
// It tells whether an answer is still awaited.
func (c *cache) settle() (pending bool) {
	c.mu.Lock()
	touched := map[Ref]bool{}
	for r, o := range c.objects {
		if o.written == nil {
			continue
		}
		c.unindex(r, o)
		for k, w := range o.written {
			if c.now().Sub(w.at) < echoWait {
				pending = true
				continue
			}
			delete(o.written, k)
			if w.any {
				c.touched(r, o, touched)
				o.set(k, w.held)
				c.touched(r, o, touched)
			}
		}
		if len(o.written) == 0 {
			o.written = nil
			if !o.seen { // deleted before the watch could see it
				c.touched(r, o, touched)
				delete(c.objects, r)
				continue
			}
		}
		c.index(r, o)
	}
	c.mu.Unlock()
	c.tell(touched)
	return pending
}

func (c *cache) tell(touched map[Ref]bool) {
	for r := range touched {
		c.notify(r)
	}
}

// Replace is vsphere.Viewer's.
func (c *cache) Replace(all []vsphere.Update) {
	c.mu.Lock()
	old := c.objects
	c.reset()
	touched := map[Ref]bool{}
	for _, u := range all {
		if u.Gone {
			continue
		}
		o := &object{seen: true, props: map[string]any{}}
		before := old[u.Object]
		if before != nil && hidden(u, true) {
			c.lose(u.Object, before)
		}
		if before != nil && before.written != nil {
			// An answer that was under way may be older than what we wrote.
			o.written = before.written
			for k := range before.written {
				o.props[k] = before.props[k]
			}
		}
		c.apply(o, normalize(u.Props))
		c.objects[u.Object] = o
		c.index(u.Object, o)
		if before == nil || !maps.Equal(before.props, o.props) {
			c.touched(u.Object, o, touched)
			if before != nil {
				c.touched(u.Object, before, touched)
			}
		}
		delete(old, u.Object)
	}
	for r, o := range old {
		if o.written != nil && !o.seen { // made while the answer was under way
			c.objects[r] = o
			c.index(r, o)
			continue
		}
		c.touched(r, o, touched)
		c.lose(r, o)
	}
	first := !c.synced
	c.synced, c.cause = true, nil
	if first {
		c.since = c.now()
	}
	c.mu.Unlock()
	c.tell(touched)
	if first {
		c.health()
	}
}

// Apply is vsphere.Viewer's.
func (c *cache) Apply(changes []vsphere.Update) {
	c.mu.Lock()
	touched := map[Ref]bool{}
	for _, u := range changes {
		c.named(u)
		o := c.objects[u.Object]
		if u.Gone {
			if o != nil {
				c.touched(u.Object, o, touched)
				c.lose(u.Object, o)
				c.unindex(u.Object, o)
				delete(c.objects, u.Object)
			}
			continue
		}
		before := map[Ref]bool{}
		if o == nil {
			o = &object{seen: true, props: map[string]any{}}
			c.objects[u.Object] = o
		} else {
			c.touched(u.Object, o, before)
			c.unindex(u.Object, o)
		}
		if hidden(u, false) {
			c.lose(u.Object, o)
		}
		if c.apply(o, normalize(c.whole(o, u.Props))) && !c.justMade(o) {
			c.touched(u.Object, o, touched)
			maps.Copy(touched, before)
		}
		o.seen = true
		c.index(u.Object, o)
	}
	c.mu.Unlock()
	c.tell(touched)
}

// justMade tells whether an object that the watch shows for the first time is
// one that a call of ours is about to finish.
func (c *cache) justMade(o *object) bool {
	uid, ours := strings.CutPrefix(o.str(propName), unfinishedPrefix)
	return ours && len(o.props) > 0 && o.str(c.ownerProp()) == "" && uid != ""
}

// hidden tells whether an object may no longer be read; its place in the
// inventory may still be seen. all says that u has all properties there are.
func hidden(u vsphere.Update, all bool) bool {
	config, said := u.Props["config"]
	return u.Hidden || u.Object.Type == "ResourcePool" && config == nil && (said || all)
}

// lose remembers an object of ours that left the watch.
func (c *cache) lose(r ref, o *object) {
	if owner, ok := c.owner(r, o); ok {
		if c.lost[owner.UID] == nil {
			c.lost[owner.UID] = map[ref]bool{}
		}
		c.lost[owner.UID][r] = true
	}
}

// whole adds what an update of custom values leaves unsaid: those that it does
// not list are unset.
func (c *cache) whole(o *object, props map[string]types.AnyType) map[string]types.AnyType {
	if _, ok := props["customValue"]; !ok {
		return props
	}
	props = maps.Clone(props)
	for k := range o.props {
		if strings.HasPrefix(k, propAttr) {
			props[k] = nil
		}
	}
	return props
}

// Lost is vsphere.Viewer's.
func (c *cache) Lost(err error) {
	c.mu.Lock()
	was := c.synced
	c.synced, c.cause, c.since = false, err, time.Time{}
	c.mu.Unlock()
	if was {
		c.health()
	}
}

// normalize turns what vCenter says into comparable values.
func normalize(props map[string]types.AnyType) map[string]any {
	n := make(map[string]any, len(props)+2)
	for k := range props {
		if strings.HasPrefix(k, propAttr) {
			n[k] = nil
		}
	}
	for k, v := range props {
		switch k {
		case "name":
			n[propName] = v
		case "parent", "owner", "vmFolder":
			n[k] = v
		case "resourcePool":
			n[propRoot] = v
		case "host":
			hosts, _ := v.(types.ArrayOfManagedObjectReference)
			n[propHosts] = len(hosts.ManagedObjectReference)
		case "summary.totalCpu":
			mhz, _ := v.(int32)
			n[propMHz] = int64(mhz)
		case "summary.totalMemory":
			n[propBytes] = v
		case "summary.numCpuCores":
			cores, _ := v.(int16)
			n[propCores] = int32(cores)
		case "config":
			config, _ := v.(types.ResourceConfigSpec)
			n[propCPU] = allocation(config.CpuAllocation)
			n[propMemory] = allocation(config.MemoryAllocation)
		case "permission":
			perms, _ := v.(types.ArrayOfPermission)
			n[propPerms] = formatPermissions(perms.Permission)
		case "customValue":
			values, _ := v.(types.ArrayOfCustomFieldValue)
			for _, field := range values.CustomFieldValue {
				if s, ok := field.(*types.CustomFieldStringValue); ok && s.Value != "" {
					n[propAttr+strconv.Itoa(int(s.Key))] = s.Value
				}
			}
		}
	}
	return n
}

func allocation(a types.ResourceAllocationInfo) Allocation {
	out := Allocation{Limit: Unlimited, Shares: Shares{Level: SharesNormal}}
	if a.Limit != nil {
		out.Limit = *a.Limit
	}
	if a.Reservation != nil {
		out.Reservation = *a.Reservation
	}
	out.Fixed = a.ExpandableReservation != nil && !*a.ExpandableReservation
	if a.Shares != nil {
		out.Shares = Shares{Level: SharesLevel(a.Shares.Level)}
		if out.Shares.Level == SharesCustom {
			out.Shares.Value = a.Shares.Shares
		}
	}
	return out
}

// permissions takes in all permissions there are.
func (c *cache) permissions(all map[ref][]types.Permission) {
	c.mu.Lock()
	touched := map[Ref]bool{}
	for id, o := range c.objects {
		if _, ours := c.owner(id, o); !ours {
			continue
		}
		if c.apply(o, map[string]any{propPerms: formatPermissions(all[id])}) {
			c.touched(id, o, touched)
		}
	}
	c.mu.Unlock()
	c.tell(touched)
}
