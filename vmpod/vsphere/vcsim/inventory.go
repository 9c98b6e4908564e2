package vcsim

import (
	"context"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"slices"

	"github.com/vmware/govmomi/object"
	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/simulator/vpx"
	"github.com/vmware/govmomi/vim25"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/types"
)

// Ids: what the configuration makes has ids that follow from its place in
// store.parts (idStride apart), so that they stay over restarts whatever is
// added; what users make has ids from firstDynamicID on, and keeps them.
const (
	idStride       = 1000
	firstDynamicID = 1_000_000
)

// An inventory knows the objects that the configuration made.
type inventory struct {
	client *vim25.Client // in process, as nobody: unchecked
	dc     *simulator.Datacenter
	hosts  map[string]types.ManagedObjectReference // by name
	stores map[string]types.ManagedObjectReference
	parts  []string // what has been made, ever, in this order
}

// build makes the service and its objects.
func (s *Server) build() error {
	ctx, instance := simulator.NewServiceInstance(simulator.NewContext(), vpx.ServiceContent, vpx.RootFolder)
	s.svc = simulator.New(ctx, instance)
	s.vim = ctx.Map
	s.svc.ServeMux = s.mux
	s.svc.RegisterSDK(s.vim, vim25.Path+"/vimService")
	// Any user but nil makes the simulator ask ValidLogin.
	s.svc.Listen = &url.URL{Scheme: s.url.Scheme, Host: s.url.Host, Path: s.url.Path, User: url.User("vcsim")}
	s.vim.SessionManager().ValidLogin = s.validLogin
	s.vim.SessionManager().ServiceHostName = s.url.Host
	s.mux.HandleFunc("GET "+vim25.Path+"/vimServiceVersions.xml", s.svc.ServiceVersions)
	client, err := vim25.NewClient(context.Background(), s.svc)
	if err != nil {
		return fmt.Errorf("vcsim: %w", err)
	}
	s.inventory = inventory{client: client, hosts: map[string]types.ManagedObjectReference{}, stores: map[string]types.ManagedObjectReference{}}
	if err := s.buildHosts(); err != nil {
		return fmt.Errorf("vcsim: inventory: %w", err)
	}
	return nil
}

// part runs make with the ids that belong to the named part.
func (s *Server) part(name string, make func() error) error {
	i := slices.Index(s.inventory.parts, name)
	if i < 0 {
		i = len(s.inventory.parts)
		s.inventory.parts = append(s.inventory.parts, name)
	}
	s.startIDs((i + 1) * idStride)
	if err := make(); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return nil
}

// startIDs makes the next id n+1. The registry has no setter; it takes the
// highest number that it finds.
func (s *Server) startIDs(n int) {
	peg := &mo.Folder{}
	peg.Self = types.ManagedObjectReference{Type: "Folder", Value: fmt.Sprintf("group-%d", n)}
	ctx := s.svc.Context
	s.vim.Put(&simulator.Folder{Folder: *peg})
	_ = s.vim.AlignCounter()
	s.vim.Remove(ctx, peg.Self)
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
	for _, c := range s.config.Clusters {
		var cluster *object.ClusterComputeResource
		err := s.part("cluster/"+c.Name, func() (err error) {
			cluster, err = folders.HostFolder.CreateCluster(ctx, c.Name, types.ClusterConfigSpecEx{})
			return err
		})
		if err != nil {
			return err
		}
		for _, h := range c.Hosts {
			if err := s.part("host/"+h.Name, func() error { return s.addHost(ctx, cluster, h) }); err != nil {
				return err
			}
		}
	}
	s.startIDs(firstDynamicID)
	return nil
}

func (s *Server) addHost(ctx context.Context, cluster *object.ClusterComputeResource, h Host) error {
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
	host := object.NewHostSystem(s.inventory.client, ref)
	system, err := host.ConfigManager().DatastoreSystem(ctx)
	if err != nil {
		return err
	}
	for _, d := range s.config.Datastores {
		dir := s.datastoreDir(d.Name)
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return err
		}
		err := s.part("datastore/"+d.Name, func() error {
			ds, err := system.CreateLocalDatastore(ctx, d.Name, dir)
			if err == nil {
				s.inventory.stores[d.Name] = ds.Reference()
			}
			return err
		})
		if err != nil {
			return err
		}
	}
	return nil
}

func (s *Server) datastoreDir(name string) string {
	if s.config.Dir == "" {
		return os.TempDir() // looked at, never written to
	}
	return filepath.Join(s.config.Dir, "datastores", name)
}
