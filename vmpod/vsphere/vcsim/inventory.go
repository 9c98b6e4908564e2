package vcsim

import (
	"context"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync/atomic"

	"github.com/vmware/govmomi/object"
	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/simulator/vpx"
	"github.com/vmware/govmomi/vim25"
	"github.com/vmware/govmomi/vim25/types"
	"golang.org/x/sys/unix"
)

// Ids: what the configuration makes has ids that follow from its place in
// inventory.parts (idStride apart), so that they stay over restarts whatever is
// added; what users make has ids above firstDynamicID, and keeps them.
const (
	idStride       = 1000
	firstDynamicID = 1_000_000
	maxParts       = firstDynamicID/idStride - 2
)

// An inventory knows the objects that the configuration made.
type inventory struct {
	client *vim25.Client // in process, before the hook is there: unchecked
	dc     *simulator.Datacenter
	hosts  map[string]types.ManagedObjectReference // by name
	shown  map[types.ManagedObjectReference]Host   // those of ShowHost, as they are
	stores map[string]types.ManagedObjectReference
	parts  []string // what has been made, ever, in this order
}

// build makes the service and its objects.
func (s *Server) build() error {
	ctx, instance := simulator.NewServiceInstance(simulator.NewContext(), vpx.ServiceContent, vpx.RootFolder)
	s.svc = simulator.New(ctx, instance)
	s.vim = ctx.Map
	s.svc.ServeMux = s.mux
	// Any user but nil makes the simulator ask ValidLogin.
	s.svc.Listen = &url.URL{Scheme: s.url.Scheme, Host: s.url.Host, Path: s.url.Path, User: url.User("vcsim")}
	s.vim.SessionManager().ValidLogin = s.validLogin
	s.vim.SessionManager().ServiceHostName = s.url.Host
	client, err := vim25.NewClient(context.Background(), s.svc)
	if err != nil {
		return fmt.Errorf("vcsim: %w", err)
	}
	s.inventory = inventory{client: client, hosts: map[string]types.ManagedObjectReference{}, shown: map[types.ManagedObjectReference]Host{}, stores: map[string]types.ManagedObjectReference{}}
	if err := s.loadSelf(); err != nil {
		return err
	}
	s.identify(instance)
	if err := s.buildHosts(); err != nil {
		return fmt.Errorf("vcsim: inventory: %w", err)
	}
	s.replaceManagers(instance.Content)
	s.adoptBuilt()
	if err := s.loadTags(); err != nil {
		return err
	}
	if err := s.loadDisks(); err != nil {
		return err
	}
	if err := s.restore(); err != nil {
		return err
	}
	if err := s.buildPolicies(); err != nil {
		return err
	}
	s.buildDisks()
	if err := s.firstAdmin(); err != nil {
		return err
	}
	s.startIDs(s.lastID)
	s.vim.AddHandler(s.hub)
	s.vim.Handler = s.handle
	s.svc.RegisterSDK(s.vim, vim25.Path+"/vimService")
	s.mux.HandleFunc("GET "+vim25.Path+"/vimServiceVersions.xml", s.svc.ServiceVersions)
	s.buildREST()
	return s.store.put(map[string]any{"vcenter": s.record()})
}

// identify says who this is.
func (s *Server) identify(instance *simulator.ServiceInstance) {
	about := &instance.Content.About
	about.InstanceUuid = s.instanceUUID
	about.Name, about.FullName = "Atoll embedded vCenter", "Atoll embedded vCenter "+about.Version+" (govmomi simulator)"
	about.Vendor = "Atoll"
	about.LicenseProductName, about.LicenseProductVersion = "", ""
}

// replaceManagers puts this package's in the place of the simulator's.
func (s *Server) replaceManagers(c types.ServiceContent) {
	s.root, s.authorizationManager, s.customFieldsManager = c.RootFolder, *c.AuthorizationManager, *c.CustomFieldsManager
	pc := &collector{server: s}
	pc.Self = c.PropertyCollector
	s.vim.Put(pc)
	views := &viewManager{}
	views.Self = *c.ViewManager
	s.vim.Put(views)
	auth := &simulator.AuthorizationManager{}
	auth.Self, auth.RoleList, auth.Description = s.authorizationManager, slices.Clone(s.access.roles), types.AuthorizationDescription{}
	for _, id := range sortedKeys(s.access.privileges) {
		i := strings.LastIndex(id, ".")
		auth.PrivilegeList = append(auth.PrivilegeList, types.AuthorizationPrivilege{PrivId: id, Name: id[i+1:], PrivGroupName: id[:i], OnParent: false})
	}
	s.vim.Put(auth)
}

// adoptBuilt makes the objects that are there now those of the configuration.
func (s *Server) adoptBuilt() {
	for _, e := range s.vim.All("") {
		ref := e.Reference()
		s.built[ref] = true
		s.names.rename(ref, "", e.Entity().Name)
		if p, ok := e.(*simulator.ResourcePool); ok {
			s.rootPool(p)
		}
	}
}

// rootPool gives a cluster's root pool what the cluster's hosts have.
func (s *Server) rootPool(p *simulator.ResourcePool) {
	cluster := s.vim.Get(p.Owner).(*simulator.ClusterComputeResource)
	summary := clusterSummary(s, cluster)
	fixed := func(n int64) types.ResourceAllocationInfo {
		return types.ResourceAllocationInfo{Reservation: types.NewInt64(n), Limit: types.NewInt64(n), ExpandableReservation: types.NewBool(false), Shares: &types.SharesInfo{Level: types.SharesLevelNormal, Shares: 4000}}
	}
	config := types.ResourceConfigSpec{Entity: &p.Self, ChangeVersion: "1", CpuAllocation: fixed(int64(summary.EffectiveCpu)), MemoryAllocation: fixed(summary.EffectiveMemory)}
	if root := s.shares[p.Self]; root != nil {
		root.set(allocations(config))
	} else {
		s.shares[p.Self] = &share{have: allocations(config)}
	}
	s.update(p, set("config", config), set("runtime", types.ResourcePoolRuntimeInfo{OverallStatus: types.ManagedEntityStatusGreen}), set("summary", poolSummary(p.Name, config, types.ResourcePoolRuntimeInfo{})))
	s.refreshRuntime(p)
}

// clusterSummary counts what the cluster's hosts have. The simulator counts
// one core of each.
func clusterSummary(s *Server, c *simulator.ClusterComputeResource) *types.ClusterComputeResourceSummary {
	sum := &types.ClusterComputeResourceSummary{UsageSummary: &types.ClusterUsageSummary{}, CurrentBalance: 0}
	sum.OverallStatus = types.ManagedEntityStatusGreen
	for _, ref := range c.Host {
		h := s.vim.Get(ref).(*simulator.HostSystem)
		hw := h.Summary.Hardware
		sum.NumHosts++
		sum.NumCpuCores += hw.NumCpuCores
		sum.NumCpuThreads += hw.NumCpuThreads
		sum.TotalCpu += int32(hw.NumCpuCores) * hw.CpuMhz
		sum.TotalMemory += hw.MemorySize
		if h.Runtime.ConnectionState == types.HostSystemConnectionStateConnected {
			sum.NumEffectiveHosts++
			sum.EffectiveCpu += int32(hw.NumCpuCores) * hw.CpuMhz
			sum.EffectiveMemory += hw.MemorySize / mib // MB, unlike TotalMemory
		}
	}
	s.update(c, set("summary", sum))
	return sum
}

// firstAdmin lets the administrators in, unless somebody has been already.
func (s *Server) firstAdmin() error {
	if len(s.access.permissions[s.root]) > 0 {
		return nil
	}
	s.access.permissions[s.root] = []types.Permission{{Principal: s.principal(AdminGroup + "@" + s.config.Domain), Group: true, RoleId: adminRole, Propagate: true}}
	s.update(s.vim.Get(s.root), set("permission", s.access.grants(s.root)))
	return s.save(s.root)
}

// part runs build with the ids that belong to the named part.
func (s *Server) part(name string, build func() error) error {
	i := slices.Index(s.inventory.parts, name)
	if i < 0 {
		i = len(s.inventory.parts)
		s.inventory.parts = append(s.inventory.parts, name)
	}
	if i >= maxParts {
		return fmt.Errorf("more than %d clusters, hosts and datastores", maxParts)
	}
	s.startIDs((i + 1) * idStride)
	if err := build(); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return nil
}

// startIDs makes the number in the next id n+1. The registry keeps its counter
// to itself (TestHook guards that it is there).
func (s *Server) startIDs(n int) {
	counter := reflect.ValueOf(s.vim).Elem().FieldByName("counter")
	atomic.StoreInt64((*int64)(counter.Addr().UnsafePointer()), int64(n))
}

func (s *Server) buildHosts() error {
	ctx := context.Background()
	root := object.NewRootFolder(s.inventory.client)
	var folders *object.DatacenterFolders
	err := s.part("datacenter", func() error {
		dc, err := root.CreateDatacenter(ctx, s.config.Datacenter)
		if err != nil {
			return err
		}
		s.inventory.dc = s.vim.Get(dc.Reference()).(*simulator.Datacenter)
		folders, err = dc.Folders(ctx)
		return err
	})
	if err != nil {
		return err
	}
	clusters, gone := s.clusters()
	made := map[string]*object.ClusterComputeResource{}
	for _, c := range clusters {
		err := s.part("cluster/"+c.Name, func() (err error) {
			made[c.Name], err = folders.HostFolder.CreateCluster(ctx, c.Name, types.ClusterConfigSpecEx{})
			return err
		})
		if err != nil {
			return err
		}
	}
	for _, c := range clusters {
		for _, h := range c.Hosts {
			if err := s.part("host/"+c.Name+"/"+h.Name, func() error { return s.addHost(ctx, made[c.Name], h, gone[h.Name]) }); err != nil {
				return err
			}
		}
	}
	return s.addDatastores(ctx)
}

// clusters are those of the configuration and those that there were; gone are
// hosts that are listed no more.
func (s *Server) clusters() (all []Cluster, gone map[string]bool) {
	gone = map[string]bool{}
	listed := map[string]bool{}
	for _, c := range s.config.Clusters {
		all = append(all, Cluster{Name: c.Name, Hosts: slices.Clone(c.Hosts)})
		for _, h := range c.Hosts {
			listed[h.Name] = true
		}
	}
	for _, part := range s.inventory.parts {
		kind, rest, _ := strings.Cut(part, "/")
		name, host, _ := strings.Cut(rest, "/")
		if kind != "cluster" && kind != "host" {
			continue
		}
		i := slices.IndexFunc(all, func(c Cluster) bool { return c.Name == name })
		if i < 0 {
			i, all = len(all), append(all, Cluster{Name: name})
		}
		if kind == "host" && !listed[host] {
			listed[host], gone[host] = true, true
			all[i].Hosts = append(all[i].Hosts, Host{Name: host})
		}
	}
	return all, gone
}

func (s *Server) addHost(ctx context.Context, cluster *object.ClusterComputeResource, h Host, gone bool) error {
	task, err := cluster.AddHost(ctx, types.HostConnectSpec{HostName: h.Name}, true, nil, nil)
	if err != nil {
		return err
	}
	info, err := task.WaitForResult(ctx)
	if err != nil {
		return err
	}
	ref := info.Result.(types.ManagedObjectReference)
	s.inventory.hosts[h.Name] = ref
	if gone {
		h.State = HostNotResponding
	}
	s.describeHost(ref, h)
	return nil
}

// addDatastores mounts each on all hosts.
func (s *Server) addDatastores(ctx context.Context) error {
	for _, d := range s.config.Datastores {
		dir := s.datastoreDir(d.Name)
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return err
		}
		err := s.part("datastore/"+d.Name, func() error {
			for _, host := range sortedKeys(s.inventory.hosts) {
				system, err := object.NewHostSystem(s.inventory.client, s.inventory.hosts[host]).ConfigManager().DatastoreSystem(ctx)
				if err != nil {
					return err
				}
				ds, err := system.CreateLocalDatastore(ctx, d.Name, dir)
				if err != nil {
					return err
				}
				// Of further hosts the simulator returns an id that is nobody's.
				if _, known := s.inventory.stores[d.Name]; !known {
					s.inventory.stores[d.Name] = ds.Reference()
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
		if ref, ok := s.inventory.stores[d.Name]; ok {
			s.sizeDatastore(ref, d, dir)
		}
	}
	return nil
}

func (s *Server) sizeDatastore(ref types.ManagedObjectReference, d Datastore, dir string) {
	var fs unix.Statfs_t
	if d.Capacity == 0 && unix.Statfs(dir, &fs) == nil {
		d.Capacity, d.Free = int64(fs.Blocks)*fs.Bsize, int64(fs.Bavail)*fs.Bsize
	}
	ds := s.vim.Get(ref).(*simulator.Datastore)
	s.locked(ds, func() {
		ds.Summary.Capacity, ds.Summary.FreeSpace = d.Capacity, d.Free
		// The path on this host is nobody's business.
		ds.Summary.Url = "ds:///vmfs/volumes/" + d.Name + "/"
		info := ds.Info.GetDatastoreInfo()
		info.Url, info.FreeSpace = ds.Summary.Url, d.Free
	})
}

func (s *Server) datastoreDir(name string) string {
	if s.config.Dir == "" {
		return os.TempDir() // looked at, never written to
	}
	return filepath.Join(s.config.Dir, "datastores", name)
}
