package vcsim

import (
	"encoding/json"
	"net/url"
	"os"
	"path/filepath"
	"testing"

	"github.com/vmware/govmomi"
	"github.com/vmware/govmomi/object"
	"github.com/vmware/govmomi/pbm"
	pbmtypes "github.com/vmware/govmomi/pbm/types"
	"github.com/vmware/govmomi/vapi/rest"
	"github.com/vmware/govmomi/vapi/tags"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/types"
)

const podUUID = "11111111-2222-3333-4444-555555555555"

// populate makes one of everything that is kept.
func populate(t *testing.T, s *Server) {
	t.Helper()
	c := signIn(t, s, admin)
	parent := must[*object.ResourcePool](t)(rootPool(t, c).Create(t.Context(), "Namespaces", spec()))
	pool := must[*object.ResourcePool](t)(parent.Create(t.Context(), "team", sized(100, 2000, false)))
	folder := must[*object.Folder](t)(vmFolder(t, c).CreateFolder(t.Context(), "team"))
	gone := must[*object.ResourcePool](t)(parent.Create(t.Context(), "gone", spec()))
	if err := finish(t.Context())(gone.Destroy(t.Context())); err != nil {
		t.Fatal(err)
	}
	fields := object.NewCustomFieldsManager(c.Client)
	field := must[*types.CustomFieldDef](t)(fields.Add(t.Context(), "atoll.owner", "", nil, nil))
	if err := fields.Set(t.Context(), pool.Reference(), field.Key, "me"); err != nil {
		t.Fatal(err)
	}
	if err := s.Users().Set("ada", testPassword); err != nil {
		t.Fatal(err)
	}
	auth := object.NewAuthorizationManager(c.Client)
	role := must[int32](t)(auth.AddRole(t.Context(), "edit", []string{"Resource.EditPool"}))
	if err := auth.SetEntityPermissions(t.Context(), pool.Reference(), []types.Permission{{Principal: "ada", RoleId: role, Propagate: true}}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Mirror(t.Context(), Mirror{UUID: podUUID, Name: "web", CPUs: 2, MemoryMiB: 512, On: true, Host: "node-2", Pool: pool.Reference().Value, Folder: folder.Reference().Value, Addresses: []string{"198.19.0.7"}}); err != nil {
		t.Fatal(err)
	}
	m := tagManager(t, s, c)
	category := must[string](t)(m.CreateCategory(t.Context(), &tags.Category{Name: "cost", Cardinality: "SINGLE"}))
	tag := must[string](t)(m.CreateTag(t.Context(), &tags.Tag{Name: "high", CategoryID: category}))
	if err := m.AttachTag(t.Context(), tag, pool.Reference()); err != nil {
		t.Fatal(err)
	}
	p := must[*pbm.Client](t)(pbm.NewClient(t.Context(), c.Client))
	must[*pbmtypes.PbmProfileId](t)(p.CreateProfile(t.Context(), pbmtypes.PbmCapabilityProfileCreateSpec{
		Name: "gold", ResourceType: pbmtypes.PbmProfileResourceType{ResourceType: "STORAGE"}, Constraints: &pbmtypes.PbmCapabilitySubProfileConstraints{},
	}))
}

func tagManager(t *testing.T, s *Server, c *govmomi.Client) *tags.Manager {
	t.Helper()
	r := rest.NewClient(c.Client)
	if err := r.Login(t.Context(), url.UserPassword(admin, testPassword)); err != nil {
		t.Fatal(err)
	}
	return tags.NewManager(r)
}

// picture is everything that a client can see of it, by object.
func picture(t *testing.T, s *Server) map[string]any {
	t.Helper()
	c := signIn(t, s, admin)
	seen := map[string]any{}
	for _, e := range s.vim.All("") {
		var o []types.ObjectContent
		var props []string
		switch e.Reference().Type {
		case "ResourcePool":
			props = []string{"name", "parent", "config", "runtime", "resourcePool", "vm", "permission", "customValue"}
		case "Folder":
			props = []string{"name", "parent", "childEntity", "permission"}
		case "VirtualMachine":
			props = []string{"name", "parent", "resourcePool", "config.instanceUuid", "runtime.powerState", "runtime.host", "guest.ipAddress"}
		default:
			props = []string{"name"}
		}
		if err := object.NewCommon(c.Client, e.Reference()).Properties(t.Context(), e.Reference(), props, &o); err != nil {
			t.Fatal(err)
		}
		seen[e.Reference().String()] = o[0].PropSet
	}
	var auth mo.AuthorizationManager
	if err := object.NewCommon(c.Client, s.authorizationManager).Properties(t.Context(), s.authorizationManager, []string{"roleList"}, &auth); err != nil {
		t.Fatal(err)
	}
	seen["roles"] = auth.RoleList
	seen["fields"] = must[object.CustomFieldDefList](t)(object.NewCustomFieldsManager(c.Client).Field(t.Context()))
	m := tagManager(t, s, c)
	for _, tag := range must[[]tags.Tag](t)(m.GetTags(t.Context())) {
		seen[tag.ID] = must[[]mo.Reference](t)(m.ListAttachedObjects(t.Context(), tag.ID))
	}
	p := must[*pbm.Client](t)(pbm.NewClient(t.Context(), c.Client))
	seen["policies"] = must[[]pbmtypes.PbmProfileId](t)(p.QueryProfile(t.Context(), pbmtypes.PbmProfileResourceType{ResourceType: "STORAGE"}, ""))
	seen["about"] = c.ServiceContent.About.InstanceUuid
	return seen
}

func asJSON(t *testing.T, v any) string {
	t.Helper()
	return string(must[[]byte](t)(json.MarshalIndent(v, "", " ")))
}

// TestRestart finds everything where it was, after an orderly end and after
// none.
func TestRestart(t *testing.T) {
	for _, how := range []string{"closed", "killed", "killed while writing"} {
		t.Run(how, func(t *testing.T) {
			dir := t.TempDir()
			s := start(t, config(dir))
			populate(t, s)
			before := asJSON(t, picture(t, s))
			from := dir
			if how == "closed" {
				if err := s.Close(); err != nil {
					t.Fatal(err)
				}
			} else { // what a killed process leaves is what is in its files now
				from = t.TempDir()
				if err := os.CopyFS(from, os.DirFS(dir)); err != nil {
					t.Fatal(err)
				}
			}
			if how == "killed while writing" {
				f := must[*os.File](t)(os.OpenFile(filepath.Join(from, journalFile), os.O_WRONLY|os.O_APPEND, 0))
				if _, err := f.WriteString(`{"k":"ResourcePool/resgroup-9`); err != nil {
					t.Fatal(err)
				}
				if err := f.Close(); err != nil {
					t.Fatal(err)
				}
			}
			again := start(t, config(from))
			if after := asJSON(t, picture(t, again)); after != before {
				t.Errorf("before:\n%s\nafter:\n%s", before, after)
			}
			made := must[*object.ResourcePool](t)(rootPool(t, signIn(t, again, admin)).Create(t.Context(), "new", spec()))
			if _, taken := s.vim.Get(made.Reference()).(mo.Entity); taken {
				t.Errorf("the id %s is used again", made.Reference())
			}
		})
	}
}

// TestHosts: a host that is listed no more stays, and a new one moves nobody's
// id.
func TestHosts(t *testing.T) {
	dir := t.TempDir()
	s := start(t, config(dir))
	pool, host := *s.clusterPool(t), s.inventory.hosts["node-2"]
	store := s.inventory.stores["atoll"]
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	c := config(dir)
	c.Clusters[0].Hosts = []Host{{Name: "node-0", Memory: 1 << 30, CPUs: 1}, c.Clusters[0].Hosts[1]}
	s = start(t, c)
	if got := *s.clusterPool(t); got != pool || s.inventory.hosts["node-2"] != host || s.inventory.stores["atoll"] != store {
		t.Errorf("ids moved: %v %v %v, were %v %v %v", got, s.inventory.hosts["node-2"], s.inventory.stores["atoll"], pool, host, store)
	}
	var gone mo.HostSystem
	admin := signIn(t, s, admin)
	if err := object.NewHostSystem(admin.Client, s.inventory.hosts["node-1"]).Properties(t.Context(), s.inventory.hosts["node-1"], []string{"runtime"}, &gone); err != nil || gone.Runtime.ConnectionState != types.HostSystemConnectionStateNotResponding {
		t.Errorf("the host that is gone: %v %v", gone.Runtime.ConnectionState, err)
	}
	var root mo.ResourcePool
	if err := rootPool(t, admin).Properties(t.Context(), pool, []string{"config"}, &root); err != nil || *root.Config.MemoryAllocation.Limit != 33<<10 {
		t.Errorf("the cluster has %d MiB (%v)", *root.Config.MemoryAllocation.Limit, err)
	}
}

func (s *Server) clusterPool(t *testing.T) *types.ManagedObjectReference {
	t.Helper()
	return must[*types.ManagedObjectReference](t)(rootPoolOf(s))
}

func rootPoolOf(s *Server) (*types.ManagedObjectReference, error) {
	at, err := s.placeOf(Mirror{Host: "node-2"})
	return &at.pool, err
}

// TestDataLoss: a file that was damaged is not taken for an empty one.
func TestDataLoss(t *testing.T) {
	dir := t.TempDir()
	s := start(t, config(dir))
	populate(t, s)
	if _, err := New(config(dir)); err == nil {
		t.Fatal("two servers on one directory")
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, journalFile)
	b := must[[]byte](t)(os.ReadFile(file))
	b[3] = 0
	if err := os.WriteFile(file, b, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := New(config(dir)); err == nil {
		t.Error("a damaged inventory was accepted")
	}
}
