package controlplane

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/vmware/govmomi"
	"github.com/vmware/govmomi/cli"
	_ "github.com/vmware/govmomi/cli/object"
	_ "github.com/vmware/govmomi/cli/vm"
	"github.com/vmware/govmomi/find"
	"github.com/vmware/govmomi/object"
	"github.com/vmware/govmomi/session"
	"github.com/vmware/govmomi/view"
	"github.com/vmware/govmomi/vim25"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/soap"
	vimtypes "github.com/vmware/govmomi/vim25/types"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/yaml"

	"github.com/openatoll/atoll/api/v1alpha1"
	"github.com/openatoll/atoll/vmpod/vsphere/vcsim"
)

// roleGovc makes this binary govmomi's own command line.
const roleGovc = "govc"

func govcMain() int { return cli.Run(os.Args[1:]) }

const mirrorPassword = "a password of the tests"

// TestPodMirrors shows pods of a real API server in the embedded vCenter, and
// looks at them as its clients do.
func TestPodMirrors(t *testing.T) {
	if testing.Short() {
		t.Skip("starts a control plane; about 15 s")
	}
	cfg := testConfig(t)
	s := startServer(t, cfg)
	m := &mirrorTest{cfg: cfg, dir: t.TempDir(), nodeConfig: restFrom(t, cfg.Kubeconfig()), admin: clientFrom(t, restFrom(t, cfg.Kubeconfig()))}
	m.nodeConfig.Impersonate = rest.ImpersonationConfig{UserName: "system:node:n1", Groups: []string{"system:nodes"}}
	m.node = clientFrom(t, m.nodeConfig)
	m.start(t)
	m.namespace(t)
	t.Run("found and described", m.found)
	t.Run("govc", m.govc)
	t.Run("powered off", m.poweredOff)
	t.Run("refused", m.refused)
	t.Run("restarted", m.restarted)
	m.stop()
	s.stop(t)
}

type mirrorTest struct {
	cfg        Config
	dir        string // of the vCenter
	memory     string // of pods
	admin      *kubernetes.Clientset
	nodeConfig *rest.Config
	node       *kubernetes.Clientset

	vcenter      *vcsim.Server
	client       *govmomi.Client
	stop         func() // the controller and the vCenter
	pool, folder string
}

// start starts the vCenter and the controller, as the supervisor does.
func (m *mirrorTest) start(t *testing.T) {
	t.Helper()
	power := &mirrorPower{}
	var err error
	m.vcenter, err = vcsim.New(vcsim.Config{
		Dir: m.dir, AdminPassword: mirrorPassword, Power: power.do, Logger: slog.New(slog.DiscardHandler),
		Clusters: []vcsim.Cluster{{Name: "atoll", Hosts: []vcsim.Host{{Name: "n1"}, {Name: "n2"}}}},
	})
	if err != nil {
		t.Fatal(err)
	}
	controller, err := m.cfg.newPodMirror(m.vcenter, power)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- controller.Run(ctx) }()
	m.stop = sync.OnceFunc(func() {
		cancel()
		if err := errors.Join(<-done, m.vcenter.Close()); err != nil {
			t.Errorf("stop: %v", err)
		}
	})
	t.Cleanup(m.stop)
	m.client = m.connect(t)
}

func (m *mirrorTest) connect(t *testing.T) *govmomi.Client {
	t.Helper()
	sc := soap.NewClient(m.vcenter.URL(), false)
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(m.vcenter.CA())
	sc.DefaultTransport().TLSClientConfig.RootCAs = roots
	vc, err := vim25.NewClient(t.Context(), sc)
	if err != nil {
		t.Fatal(err)
	}
	c := &govmomi.Client{Client: vc, SessionManager: session.NewManager(vc)}
	if err := c.Login(t.Context(), url.UserPassword("Administrator@vsphere.local", mirrorPassword)); err != nil {
		t.Fatal(err)
	}
	return c
}

// namespace makes what the namespaces' controller would have made on both sides.
func (m *mirrorTest) namespace(t *testing.T) {
	t.Helper()
	ctx := t.Context()
	finder := find.NewFinder(m.client.Client)
	root, err := finder.ResourcePool(ctx, "/Atoll/host/atoll/Resources")
	if err != nil {
		t.Fatal(err)
	}
	pool, err := root.Create(ctx, "shop", vimtypes.DefaultResourceConfigSpec())
	if err != nil {
		t.Fatal(err)
	}
	vms, err := finder.Folder(ctx, "/Atoll/vm")
	if err != nil {
		t.Fatal(err)
	}
	folder, err := vms.CreateFolder(ctx, "shop")
	if err != nil {
		t.Fatal(err)
	}
	m.pool, m.folder = pool.Reference().Value, folder.Reference().Value

	dyn, err := dynamic.NewForConfig(restFrom(t, m.cfg.Kubeconfig()))
	if err != nil {
		t.Fatal(err)
	}
	m.installCRDs(t, dyn)
	status := v1alpha1.SupervisorNamespaceStatus{Pools: []v1alpha1.PoolStatus{{Zone: "zone-a", ID: m.pool}}, Folder: &v1alpha1.FolderStatus{ID: m.folder}}
	o, err := runtime.DefaultUnstructuredConverter.ToUnstructured(&v1alpha1.SupervisorNamespace{
		TypeMeta: metav1.TypeMeta{APIVersion: v1alpha1.GroupVersion, Kind: "SupervisorNamespace"}, ObjectMeta: metav1.ObjectMeta{Name: "shop"}, Status: status,
	})
	if err != nil {
		t.Fatal(err)
	}
	namespaces := dyn.Resource(v1alpha1.SchemeGroupVersion.WithResource("supervisornamespaces"))
	eventually(t, "a SupervisorNamespace", func() error {
		_, err := namespaces.Create(ctx, &unstructured.Unstructured{Object: o}, metav1.CreateOptions{})
		if err != nil && !apierrors.IsAlreadyExists(err) {
			return err
		}
		patch, err := json.Marshal(map[string]any{"status": o["status"]})
		if err != nil {
			return err
		}
		_, err = namespaces.Patch(ctx, "shop", types.MergePatchType, patch, metav1.PatchOptions{}, "status")
		return err
	})
	_, err = m.admin.CoreV1().Namespaces().Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "shop"}}, metav1.CreateOptions{})
	if err != nil && !apierrors.IsAlreadyExists(err) {
		t.Fatal(err)
	}
	eventually(t, "the namespace's account", func() error {
		_, err := m.admin.CoreV1().ServiceAccounts("shop").Get(ctx, "default", metav1.GetOptions{})
		return err
	})
}

func (m *mirrorTest) installCRDs(t *testing.T, dyn dynamic.Interface) {
	t.Helper()
	b, err := v1alpha1.CRDs.ReadFile("crds/atoll.dev_supervisornamespaces.yaml")
	if err != nil {
		t.Fatal(err)
	}
	o := &unstructured.Unstructured{}
	if err := yaml.Unmarshal(b, &o.Object); err != nil {
		t.Fatal(err)
	}
	crds := dyn.Resource(schema.GroupVersionResource{Group: "apiextensions.k8s.io", Version: "v1", Resource: "customresourcedefinitions"})
	if _, err := crds.Apply(t.Context(), o.GetName(), o, metav1.ApplyOptions{FieldManager: "test", Force: true}); err != nil {
		t.Fatal(err)
	}
}

// pod makes one that runs, as its node would tell of it.
func (m *mirrorTest) pod(t *testing.T, name, ip string) *corev1.Pod {
	t.Helper()
	return m.podOn(t, m.node, "n1", name, ip)
}

func (m *mirrorTest) podOn(t *testing.T, as *kubernetes.Clientset, node, name, ip string) *corev1.Pod {
	t.Helper()
	ctx := t.Context()
	pod := plainPod("", m.memory)
	pod.GenerateName, pod.Name, pod.Spec.NodeName = "", name, node
	pod, err := m.admin.CoreV1().Pods("shop").Create(ctx, pod, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	patch := fmt.Appendf(nil, `{"metadata":{"annotations":{%q:%q,%q:"{\"cpus\":2,\"memory\":805306368}",%q:"02:00:00:aa:bb:01",%q:"{\"c\":\"atoll.local/busybox\"}"}},"status":{"phase":"Running","podIP":%q,"podIPs":[{"ip":%q}]}}`,
		v1alpha1.PodVMUUIDAnnotation, pod.UID, v1alpha1.PodVMSizeAnnotation, v1alpha1.PodMACAnnotation, v1alpha1.PodImageReferencesAnnotation, ip, ip)
	if _, err := as.CoreV1().Pods("shop").Patch(ctx, name, types.StrategicMergePatchType, patch, metav1.PatchOptions{}, "status"); err != nil {
		t.Fatal(err)
	}
	return pod
}

// mirror waits for a pod's VM to be found by its UUID, and reads it.
func (m *mirrorTest) mirror(t *testing.T, pod *corev1.Pod) (vm mo.VirtualMachine) {
	t.Helper()
	ctx := t.Context()
	eventually(t, "mirror of "+pod.Name, func() error {
		instance := true
		ref, err := object.NewSearchIndex(m.client.Client).FindByUuid(ctx, nil, string(pod.UID), true, &instance)
		if err != nil || ref == nil {
			return fmt.Errorf("not found by UUID: %v", err)
		}
		return m.client.RetrieveOne(ctx, ref.Reference(), []string{"name", "config", "summary", "runtime", "guest", "parent", "resourcePool"}, &vm)
	})
	return vm
}

func (m *mirrorTest) found(t *testing.T) {
	ctx := t.Context()
	pod := m.pod(t, "web", "198.19.0.5")
	vm := m.mirror(t, pod)
	if vm.Name != "web" || vm.Config.InstanceUuid != string(pod.UID) || vm.Config.Hardware.NumCPU != 2 || vm.Config.Hardware.MemoryMB != 768 {
		t.Errorf("%s: instance UUID %s, %d CPUs, %d MB", vm.Name, vm.Config.InstanceUuid, vm.Config.Hardware.NumCPU, vm.Config.Hardware.MemoryMB)
	}
	if vm.Parent.Value != m.folder || vm.ResourcePool.Value != m.pool {
		t.Errorf("in folder %v and pool %v, want %s and %s", vm.Parent, vm.ResourcePool, m.folder, m.pool)
	}
	if vm.Runtime.PowerState != vimtypes.VirtualMachinePowerStatePoweredOn || vm.Guest.IpAddress != "198.19.0.5" {
		t.Errorf("%s with address %q", vm.Runtime.PowerState, vm.Guest.IpAddress)
	}
	var host mo.HostSystem
	if err := m.client.RetrieveOne(ctx, *vm.Runtime.Host, []string{"name"}, &host); err != nil || host.Name != "n1" {
		t.Errorf("on host %q (%v), want n1", host.Name, err)
	}
	extra := map[string]any{}
	for _, o := range vm.Config.ExtraConfig {
		extra[o.GetOptionValue().Key] = o.GetOptionValue().Value
	}
	for k, want := range map[string]string{"atoll.pod": "shop/web", v1alpha1.PodVMUUIDAnnotation: string(pod.UID), v1alpha1.PodMACAnnotation: "02:00:00:aa:bb:01"} {
		if extra[k] != want {
			t.Errorf("extra configuration %s is %v, want %s", k, extra[k], want)
		}
	}
	search := object.NewSearchIndex(m.client.Client)
	byIP, err := search.FindByIp(ctx, nil, "198.19.0.5", true)
	byPath, perr := search.FindByInventoryPath(ctx, "/Atoll/vm/shop/web")
	for how, ref := range map[string]object.Reference{"address": byIP, "path": byPath} {
		if ref == nil || ref.Reference() != vm.Self {
			t.Errorf("found by %s: %v (%v), want %v", how, ref, errors.Join(err, perr), vm.Self)
		}
	}
	want := vm.Self.Value + ":" + m.client.ServiceContent.About.InstanceUuid
	eventually(t, "the Pod names its VM", func() error {
		now, err := m.admin.CoreV1().Pods("shop").Get(ctx, "web", metav1.GetOptions{})
		if err == nil && now.Annotations[v1alpha1.PodVMMoIDAnnotation] != want {
			err = fmt.Errorf("%v, want %s", now.Annotations, want)
		}
		return err
	})
	// What ends shows as off and stays until the Pod goes.
	if _, err := m.node.CoreV1().Pods("shop").Patch(ctx, "web", types.StrategicMergePatchType, []byte(`{"status":{"phase":"Succeeded"}}`), metav1.PatchOptions{}, "status"); err != nil {
		t.Fatal(err)
	}
	eventually(t, "off", func() error {
		if vm := m.mirror(t, pod); vm.Runtime.PowerState != vimtypes.VirtualMachinePowerStatePoweredOff {
			return fmt.Errorf("it is %s", vm.Runtime.PowerState)
		}
		return nil
	})
	m.end(t, "web")
	m.shows(t)
}

// end takes a pod away as a node does when it has ended.
func (m *mirrorTest) end(t *testing.T, name string) {
	t.Helper()
	now := int64(0)
	if err := m.admin.CoreV1().Pods("shop").Delete(t.Context(), name, metav1.DeleteOptions{GracePeriodSeconds: &now}); err != nil {
		t.Fatal(err)
	}
}

// shows waits until the inventory has these VMs, each once.
func (m *mirrorTest) shows(t *testing.T, want ...string) {
	t.Helper()
	eventually(t, fmt.Sprint("shown are ", want), func() error {
		v, err := view.NewManager(m.client.Client).CreateContainerView(t.Context(), m.client.ServiceContent.RootFolder, []string{"VirtualMachine"}, true)
		if err != nil {
			return err
		}
		defer v.Destroy(context.WithoutCancel(t.Context()))
		var vms []mo.VirtualMachine
		if err := v.Retrieve(t.Context(), []string{"VirtualMachine"}, []string{"name"}, &vms); err != nil {
			return err
		}
		var names []string
		for _, vm := range vms {
			names = append(names, vm.Name)
		}
		slices.Sort(names)
		if !slices.Equal(names, want) {
			return fmt.Errorf("they are %v", names)
		}
		return nil
	})
}

// govcCommand is govmomi's own command line.
func (m *mirrorTest) govcCommand(t *testing.T, args ...string) *exec.Cmd {
	t.Helper()
	ca := filepath.Join(m.dir, "govc-ca.pem")
	if err := os.WriteFile(ca, m.vcenter.CA(), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/proc/self/exe", args...)
	cmd.Env = []string{roleEnv + "=" + roleGovc, "HOME=" + m.dir, "GOVC_URL=" + m.vcenter.URL().String(), "GOVC_USERNAME=Administrator@vsphere.local", "GOVC_PASSWORD=" + mirrorPassword, "GOVC_TLS_CA_CERTS=" + ca}
	return cmd
}

// runGovc returns what it prints.
func (m *mirrorTest) runGovc(t *testing.T, args ...string) string {
	t.Helper()
	cmd := m.govcCommand(t, args...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Errorf("govc %s: %v: %s", strings.Join(args, " "), err, stderr.String())
	}
	return string(out)
}

func (m *mirrorTest) govc(t *testing.T) {
	pod := m.pod(t, "db", "198.19.0.6")
	m.mirror(t, pod)
	if got := m.runGovc(t, "ls", "/Atoll/vm/shop"); got != "/Atoll/vm/shop/db\n" {
		t.Errorf("govc ls: %q", got)
	}
	for _, by := range [][]string{{"/Atoll/vm/shop/db"}, {"-vm.uuid", string(pod.UID)}, {"-vm.ip", "198.19.0.6"}} {
		got := strings.Join(strings.Fields(m.runGovc(t, append([]string{"vm.info", "-e", "-r"}, by...)...)), " ")
		for _, want := range []string{"Name: db ", "UUID: " + string(pod.UID), "Memory: 768MB", "CPU: 2 vCPU(s)", "Power state: poweredOn", "IP address: 198.19.0.6", "Host: n1", "atoll.pod: shop/db", "mac: 02:00:00:aa:bb:01"} {
			if !strings.Contains(got, want) {
				t.Errorf("govc vm.info %v has no %q: %s", by, want, got)
			}
		}
	}
	m.end(t, "db")
	m.shows(t)
}

// poweredOff: the pod goes, with its own grace period, and then the VM.
func (m *mirrorTest) poweredOff(t *testing.T) {
	ctx := t.Context()
	for _, how := range []string{"PowerOff", "ShutdownGuest"} {
		pod := m.pod(t, "off", "198.19.0.7")
		vm := object.NewVirtualMachine(m.client.Client, m.mirror(t, pod).Self)
		asked := make(chan error, 1)
		go func() {
			if how == "ShutdownGuest" {
				asked <- vm.ShutdownGuest(ctx)
				return
			}
			task, err := vm.PowerOff(ctx)
			if err == nil {
				err = task.Wait(ctx)
			}
			asked <- err
		}()
		eventually(t, "the pod is being deleted", func() error {
			now, err := m.admin.CoreV1().Pods("shop").Get(ctx, "off", metav1.GetOptions{})
			if err == nil && (now.DeletionTimestamp == nil || *now.DeletionGracePeriodSeconds != 30) {
				err = fmt.Errorf("deleted at %v", now.DeletionTimestamp)
			}
			return err
		})
		if how == "PowerOff" {
			if vm := m.mirror(t, pod); vm.Runtime.PowerState != vimtypes.VirtualMachinePowerStatePoweredOn {
				t.Errorf("while its containers end the VM is %s", vm.Runtime.PowerState)
			}
			select {
			case err := <-asked:
				t.Errorf("the task is done while the pod runs: %v", err)
			default:
			}
		}
		m.end(t, "off")
		if err := <-asked; err != nil {
			t.Errorf("%s: %v", how, err)
		}
		m.shows(t)
		eventually(t, "an event that names the user", func() error {
			events, err := m.admin.CoreV1().Events("shop").List(ctx, metav1.ListOptions{FieldSelector: "involvedObject.uid=" + string(pod.UID) + ",reason=PoweredOffInVSphere"})
			if err == nil && (len(events.Items) != 1 || !strings.Contains(events.Items[0].Message, "Administrator@vsphere.local")) {
				err = fmt.Errorf("%v", events.Items)
			}
			return err
		})
	}
}

func (m *mirrorTest) refused(t *testing.T) {
	ctx := t.Context()
	pod := m.pod(t, "stays", "198.19.0.8")
	vm := object.NewVirtualMachine(m.client.Client, m.mirror(t, pod).Self)
	wait := func(task *object.Task, err error) error {
		if err != nil {
			return err
		}
		return task.Wait(ctx)
	}
	for name, ask := range map[string]func() error{
		"PowerOn":     func() error { return wait(vm.PowerOn(ctx)) },
		"Reset":       func() error { return wait(vm.Reset(ctx)) },
		"Suspend":     func() error { return wait(vm.Suspend(ctx)) },
		"RebootGuest": func() error { return vm.RebootGuest(ctx) },
		"Destroy":     func() error { return wait(vm.Destroy(ctx)) },
		"Rename":      func() error { return wait(vm.Rename(ctx, "other")) },
		"Reconfigure": func() error { return wait(vm.Reconfigure(ctx, vimtypes.VirtualMachineConfigSpec{NumCPUs: 8})) },
	} {
		if err := ask(); err == nil || !strings.Contains(err.Error()+faultText(err), "pod") {
			t.Errorf("%s: %v %s, want a refusal that says why", name, err, faultText(err))
		}
	}
	cmd := m.govcCommand(t, "vm.power", "-suspend", "/Atoll/vm/shop/stays")
	if out, err := cmd.CombinedOutput(); err == nil || !strings.Contains(string(out), "kubectl scale") {
		t.Errorf("govc vm.power -suspend: %v, %s", err, out)
	}
	if got := m.mirror(t, pod); got.Name != "stays" || got.Runtime.PowerState != vimtypes.VirtualMachinePowerStatePoweredOn || got.Config.Hardware.NumCPU != 2 {
		t.Errorf("afterwards %s, %s, %d CPUs", got.Name, got.Runtime.PowerState, got.Config.Hardware.NumCPU)
	}
}

// faultText is what a vSphere client shows beside a fault's name.
func faultText(err error) string {
	var text strings.Builder
	if soap.IsSoapFault(err) {
		f := soap.ToSoapFault(err)
		fmt.Fprint(&text, f.String)
		if r, ok := f.VimFault().(vimtypes.BaseMethodFault); ok {
			for _, msg := range r.GetMethodFault().FaultMessage {
				text.WriteString(msg.Message)
			}
		}
	}
	return text.String()
}

// restarted: what is there after a stop, in which pods came and went, is what
// pods are there, each once.
func (m *mirrorTest) restarted(t *testing.T) {
	gone := m.pod(t, "gone", "198.19.0.9")
	m.mirror(t, gone)
	m.stop()
	m.end(t, "gone")
	m.pod(t, "came", "198.19.0.10")
	m.start(t)
	m.shows(t, "came", "stays")
}
