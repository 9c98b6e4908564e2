package controlplane

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"syscall"
	"testing"
	"time"

	"github.com/vmware/govmomi/vim25/types"
	"k8s.io/client-go/tools/clientcmd"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/openatoll/atoll/api/v1alpha1"
	"github.com/openatoll/atoll/supervisor/namespaces"
	"github.com/openatoll/atoll/vmpod/vsphere/vcsim"
)

// roleKeeper makes this binary the controller of namespaces alone; with
// noKeeperEnv the control plane leaves that to it.
const (
	roleKeeper    = "keeper"
	keeperEnv     = "ATOLL_CONTROLPLANE_TEST_KUBECONFIG"
	noKeeperEnv   = "ATOLL_CONTROLPLANE_TEST_NO_KEEPER"
	killedTimeout = 2 * time.Minute
)

func keeperMain() int {
	cfg, err := clientcmd.BuildConfigFromFlags("", os.Getenv(keeperEnv))
	if err == nil {
		cfg.QPS = -1
		var c *namespaces.Controller
		if c, err = namespaces.New(namespaces.Options{Config: cfg, Identity: "keeper", Logger: slog.Default(), OrphanGrace: 2 * time.Second}); err == nil {
			err = c.Run(context.Background())
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// A keeper is a controller's process.
type keeper struct {
	n   *namespacesTest
	cmd *exec.Cmd
}

func (k *keeper) start(t *testing.T) {
	t.Helper()
	k.cmd = exec.Command("/proc/self/exe")
	k.cmd.Env = append(os.Environ(), roleEnv+"="+roleKeeper, keeperEnv+"="+k.n.cfg.componentKubeconfig(namespaceKeeper))
	k.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := k.cmd.Start(); err != nil {
		t.Fatal(err)
	}
}

func (k *keeper) kill(t *testing.T) {
	t.Helper()
	if err := k.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = k.cmd.Wait() // says that it was killed
}

// TestNamespacesKilled kills the controller while vCenter is at work for it, and
// starts it again: the same end, and nothing twice.
func TestNamespacesKilled(t *testing.T) {
	if testing.Short() {
		t.Skip("starts a control plane; about 40 s")
	}
	cfg := testConfig(t)
	t.Setenv(noKeeperEnv, "1")
	startServer(t, cfg)
	n := newNamespacesTest(t, cfg)
	k := &keeper{n: n}
	k.start(t)
	t.Cleanup(func() { k.kill(t) })
	n.join(t)
	for _, method := range []string{"CreateFolder", "CreateResourcePool", "SetField", "SetEntityPermissions"} {
		t.Run("create/"+method, func(t *testing.T) {
			name := "k-" + fmt.Sprint(len(n.names(t)))
			k.during(t, method, func() { n.apply(t, shop(name)) })
			n.whole(t, name, 4)
		})
	}
	t.Run("change", func(t *testing.T) {
		k.during(t, "UpdateConfig", func() {
			edit(t, n, svns("k-0"), func(ns *v1alpha1.SupervisorNamespace) { ns.Spec.CPU.Limit = quantity("6") })
		})
		n.whole(t, "k-0", 6)
		// An administrator's change while nobody looks is adopted still.
		k.kill(t)
		p, _ := n.one(t, "k-0")
		if err := n.pool(p.Self.Value).UpdateConfig(t.Context(), "", &types.ResourceConfigSpec{
			CpuAllocation: types.ResourceAllocationInfo{Limit: types.NewInt64(5 * nsMHz)},
		}); err != nil {
			t.Fatal(err)
		}
		k.start(t)
		eventually(t, "it is adopted", func() error {
			ns := svns("k-0")
			if err := n.admin.Get(t.Context(), client.ObjectKeyFromObject(ns), ns); err != nil {
				return err
			}
			if ns.Spec.CPU.Limit.Cmp(*quantity("5")) != 0 {
				return fmt.Errorf("the limit is %s", ns.Spec.CPU.Limit)
			}
			return nil
		})
		n.whole(t, "k-0", 5)
	})
	t.Run("change of each field", k.changeEach)
	t.Run("drift of each field", k.driftEach)
	t.Run("orphans", n.orphans)
	t.Run("delete", func(t *testing.T) {
		k.during(t, "Destroy_Task", func() {
			if err := n.admin.Delete(t.Context(), svns("k-1")); err != nil {
				t.Fatal(err)
			}
		})
		n.gone(t, svns("k-1"))
		if have := n.vsphere(t, "k-1"); len(have.pools)+len(have.folders) != 0 {
			t.Errorf("vSphere still has %+v", have)
		}
	})
}

// during acts, kills the controller while vCenter has its call of the method in
// hand, before it is done, and starts it again.
func (k *keeper) during(t *testing.T, method string, act func()) {
	t.Helper()
	faults := k.n.vc.Faults()
	before := faults.Calls()[method]
	remove := faults.Add(vcsim.Fault{Method: method, User: nsUser, Times: 1, Delay: time.Minute})
	act()
	for deadline := time.Now().Add(killedTimeout); faults.Calls()[method] == before; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s was not called in %s; calls %v", method, killedTimeout, faults.Calls())
		}
	}
	k.kill(t)
	remove()
	k.start(t)
}

// whole holds that both sides of a namespace are there, once.
func (n *namespacesTest) whole(t *testing.T, name string, cores int64) {
	t.Helper()
	n.synced(t, name)
	p, f := n.one(t, name)
	if *p.Config.CpuAllocation.Limit != cores*nsMHz || len(p.Permission) != 2 || len(f.Permission) != 2 {
		t.Errorf("the pool has %d MHz and %d permissions, the folder %d", *p.Config.CpuAllocation.Limit, len(p.Permission), len(f.Permission))
	}
	s, err := n.look(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	// Of names in the making, none is left.
	names := n.names(t)
	for _, p := range s.pools {
		if p.Name != "Namespaces" && !names[p.Name] {
			t.Errorf("a pool %q is left over", p.Name)
		}
	}
	for _, f := range s.folders {
		if f.Name != "vm" && f.Name != "Namespaces" && !names[f.Name] {
			t.Errorf("a folder %q is left over", f.Name)
		}
	}
}

// names of the SupervisorNamespaces.
func (n *namespacesTest) names(t *testing.T) map[string]bool {
	t.Helper()
	list := &v1alpha1.SupervisorNamespaceList{}
	if err := n.admin.List(t.Context(), list); err != nil {
		t.Fatal(err)
	}
	names := map[string]bool{}
	for _, ns := range list.Items {
		names[ns.Name] = true
	}
	return names
}
