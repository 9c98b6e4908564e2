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
	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/clientcmd"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/openatoll/atoll/api/v1alpha1"
	"github.com/openatoll/atoll/supervisor/volumes"
	"github.com/openatoll/atoll/vmpod/vsphere/vcsim"
)

// roleVolumes makes this binary the controller of volumes alone; with
// noVolumesEnv the control plane leaves that to it.
const (
	roleVolumes  = "volumes"
	noVolumesEnv = "ATOLL_CONTROLPLANE_TEST_NO_VOLUMES"
)

func volumesMain() int {
	cfg, err := clientcmd.BuildConfigFromFlags("", os.Getenv(keeperEnv))
	if err == nil {
		cfg.QPS = -1
		var c *volumes.Controller
		if c, err = volumes.New(volumes.Options{Config: cfg, Open: openVolumes(slog.Default()), OrphanEvery: 500 * time.Millisecond, OrphanGrace: time.Second}); err == nil {
			err = c.Run(context.Background())
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

func (v *volumesTest) start(t *testing.T) {
	t.Helper()
	v.cmd = exec.Command("/proc/self/exe")
	v.cmd.Env = append(os.Environ(), roleEnv+"="+roleVolumes, keeperEnv+"="+v.cfg.componentKubeconfig(volumeKeeper))
	v.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if os.Getenv("ATOLL_TEST_LOG") != "" {
		v.cmd.Stderr = os.Stderr
	}
	if err := v.cmd.Start(); err != nil {
		t.Fatal(err)
	}
}

func (v *volumesTest) kill(t *testing.T) {
	t.Helper()
	if err := v.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = v.cmd.Wait() // says that it was killed
}

// badDays: each is told on the claim, and over when its cause is.
func (v *volumesTest) badDays(t *testing.T) {
	faults := v.vc.Faults()
	for _, day := range []struct {
		name, told string
		fault      vcsim.Fault
	}{
		{"task-fails", "", vcsim.Fault{Method: "CnsCreateVolume", Task: true, Fault: &types.SystemError{}, Times: 1}},
		{"task-fails-late", "", vcsim.Fault{Method: "CnsCreateVolume", Task: true, Late: true, Fault: &types.SystemError{}, Times: 1}},
		{"answer-lost", "", vcsim.Fault{Method: "CnsCreateVolume", Drop: true, Late: true, Times: 1}},
		{"session-lost", "", vcsim.Fault{Method: "CnsCreateVolume", Logout: true, Times: 1}},
		{"away", "vCenter", vcsim.Fault{Method: "CnsQueryVolume", Drop: true}},
		{"slow", "", vcsim.Fault{Method: "CnsCreateVolume", Delay: 300 * time.Millisecond, Times: 1}},
		{"full", "has no room", vcsim.Fault{Method: "CnsCreateVolume", Task: true, Fault: &types.NoDiskSpace{}}},
	} {
		t.Run(day.name, func(t *testing.T) {
			remove := faults.Add(day.fault)
			defer remove()
			v.apply(t, newClaim(day.name, "silver", "1Mi"))
			if day.told != "" {
				v.tells(t, day.name, "ProvisioningFailed", day.told)
				remove() // the audit makes such calls, too: a number of them says nothing
			}
			v.once(t, day.name)
		})
	}
	t.Run("too-large", func(t *testing.T) {
		c := newClaim("too-large", "silver", "1Pi")
		v.apply(t, c)
		v.tells(t, "too-large", "ProvisioningFailed", "more than any datastore of storage policy silver has")
		v.drop(t, c)
	})
	t.Run("read-write-many", func(t *testing.T) {
		c := newClaim("many", "silver", "1Mi")
		c.Spec.AccessModes = []corev1.PersistentVolumeAccessMode{corev1.ReadWriteMany}
		v.apply(t, c)
		v.tells(t, "many", "ProvisioningFailed", "of one pod's VM at a time")
		v.drop(t, c)
	})
	t.Run("unknown policy", func(t *testing.T) {
		class := &storagev1.StorageClass{ObjectMeta: metav1.ObjectMeta{Name: "unknown"}, Provisioner: v1alpha1.CSIDriverName, Parameters: map[string]string{v1alpha1.PolicyIDParameter: "no-such"}}
		v.apply(t, class)
		c := newClaim("unknown", "unknown", "1Mi")
		c.Namespace = "default"
		v.apply(t, c)
		v.tells(t, "unknown", "ProvisioningFailed", "StorageClass unknown names storage policy no-such")
		v.drop(t, c)
		v.drop(t, class)
	})
	t.Run("permission withdrawn", v.withdrawnPermission)
}

func (v *volumesTest) drop(t *testing.T, o client.Object) {
	t.Helper()
	if err := v.admin.Delete(t.Context(), o); err != nil {
		t.Fatal(err)
	}
}

// once: the claim is bound to the one volume of its name.
func (v *volumesTest) once(t *testing.T, name string) {
	t.Helper()
	pv := v.isBound(t, name)
	if l := v.listed(t)[pv.Name]; len(l) != 1 || l[0].VolumeID.ID != pv.Spec.CSI.VolumeHandle {
		t.Errorf("volume %s is there %d times: %+v", pv.Name, len(l), l)
	}
}

// withdrawnPermission: a volume that may not be seen is not gone. What is to be
// deleted waits.
func (v *volumesTest) withdrawnPermission(t *testing.T) {
	pv := v.isBound(t, "slow")
	remove := v.vc.Faults().Add(vcsim.Fault{Method: "CnsQueryVolume", Fault: &types.NoPermission{PrivilegeId: "Cns.Searchable"}})
	v.drop(t, v.claim(t, "slow"))
	v.tells(t, pv.Name, "VolumeFailedDelete", "Cns.Searchable")
	if l := v.listed(t)[pv.Name]; len(l) != 1 {
		t.Errorf("vCenter has %+v", l)
	}
	remove()
	eventually(t, "it is deleted", func() error {
		if l := v.listed(t)[pv.Name]; len(l) != 0 {
			return fmt.Errorf("there is %+v", l)
		}
		return nil
	})
}

// during acts, kills the controller while vCenter has its call of the method in
// hand; the caller starts it again.
func (v *volumesTest) during(t *testing.T, f vcsim.Fault, act func()) {
	t.Helper()
	faults := v.vc.Faults()
	before := faults.Calls()[f.Method]
	f.User, f.Times = nsUser, 1
	remove := faults.Add(f)
	act()
	for deadline := time.Now().Add(killedTimeout); faults.Calls()[f.Method] == before; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s was not called in %s", f.Method, killedTimeout)
		}
	}
	v.kill(t)
	remove()
}

// killed: at each step the controller dies, with the call that it made not begun,
// or under way and done after its death. The next one finds the same end.
func (v *volumesTest) killed(t *testing.T) {
	for i, how := range []struct {
		name string
		late bool
	}{{"before", false}, {"after", true}} {
		fault := func(method string) (vcsim.Fault, func()) {
			if !how.late {
				return vcsim.Fault{Method: method, Delay: time.Minute}, func() {}
			}
			hold := make(chan struct{})
			return vcsim.Fault{Method: method, Hold: hold}, func() { close(hold) }
		}
		name := fmt.Sprint("killed-", i)
		t.Run(how.name, func(t *testing.T) {
			f, end := fault("CnsCreateVolume")
			v.during(t, f, func() { v.apply(t, newClaim(name, "silver", "1Mi")) })
			v.start(t)
			end()
			v.once(t, name)
			v.shown(t, v.isBound(t, name).Name, "PERSISTENT_VOLUME_CLAIM", "data/"+name+" [app="+name+"]")

			f, end = fault("CnsExtendVolume")
			v.during(t, f, func() {
				edit(t, v.namespacesTest, v.claim(t, name), func(c *corev1.PersistentVolumeClaim) { c.Spec.Resources.Requests["storage"] = *quantity("3Mi") })
			})
			v.start(t)
			end()
			v.hasSize(t, name, 3)

			f, end = fault("CnsUpdateVolumeMetadata")
			v.during(t, f, func() {
				edit(t, v.namespacesTest, v.claim(t, name), func(c *corev1.PersistentVolumeClaim) { c.Labels["app"] = "new" })
			})
			v.start(t)
			end()
			v.shown(t, v.isBound(t, name).Name, "PERSISTENT_VOLUME_CLAIM", "data/"+name+" [app=new]")

			pv := v.isBound(t, name)
			f, end = fault("CnsDeleteVolume")
			v.during(t, f, func() { v.drop(t, v.claim(t, name)) })
			v.start(t)
			end()
			eventually(t, "both sides are gone", func() error {
				err := v.admin.Get(t.Context(), client.ObjectKeyFromObject(pv), &corev1.PersistentVolume{})
				if l := v.listed(t)[pv.Name]; client.IgnoreNotFound(err) != nil || err == nil || len(l) != 0 {
					return fmt.Errorf("%v, %+v", err, l)
				}
				return nil
			})
		})
	}
}

// orphaned: a volume whose claim went while the controller was dead is deleted
// after the grace; one that may hold data, and another cluster's, is not.
func (v *volumesTest) orphaned(t *testing.T) {
	before := len(v.listed(t))
	hold := make(chan struct{})
	c := newClaim("forsaken", "silver", "1Mi")
	v.during(t, vcsim.Fault{Method: "CnsCreateVolume", Hold: hold}, func() { v.apply(t, c) })
	close(hold)
	eventually(t, "vCenter made it all the same", func() error {
		if got := len(v.listed(t)); got != before+1 {
			return fmt.Errorf("%d volumes", got)
		}
		return nil
	})
	v.drop(t, c)
	// One that was somebody's, whose PersistentVolume an administrator deleted.
	v.start(t)
	retained := v.retained(t)
	eventually(t, "what nobody had is deleted", func() error {
		if l := v.listed(t)["pvc-"+string(c.UID)]; len(l) != 0 {
			return fmt.Errorf("there is %+v", l)
		}
		return nil
	})
	v.tells(t, "default", "OrphanDeleted", "pvc-"+string(c.UID))
	v.tells(t, "default", "OrphanedVolume", retained+" (")
	if l := v.listed(t)[retained]; len(l) != 1 {
		t.Errorf("what may hold data: %+v", l)
	}
	v.govc(t, "volume.rm", v.listed(t)[retained][0].VolumeID.ID)
}

// retained makes a volume, keeps it and deletes its PersistentVolume.
func (v *volumesTest) retained(t *testing.T) string {
	t.Helper()
	v.apply(t, newClaim("retained", "silver", "1Mi"))
	pv := v.isBound(t, "retained")
	v.shown(t, pv.Name, "PERSISTENT_VOLUME_CLAIM", "data/retained [app=retained]")
	edit(t, v.namespacesTest, pv, func(pv *corev1.PersistentVolume) {
		pv.Spec.PersistentVolumeReclaimPolicy = corev1.PersistentVolumeReclaimRetain
	})
	v.drop(t, v.claim(t, "retained"))
	v.drop(t, pv)
	eventually(t, "the PersistentVolume is gone", func() error {
		if err := v.admin.Get(t.Context(), client.ObjectKeyFromObject(pv), pv); client.IgnoreNotFound(err) != nil || err == nil {
			return fmt.Errorf("it is there (%v)", err)
		}
		return nil
	})
	return pv.Name
}
