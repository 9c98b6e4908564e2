package cluster

import (
	"context"
	"errors"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/openatoll/atoll/cmd/atoll/internal/process"
	"github.com/openatoll/atoll/internal/version"
	"github.com/openatoll/atoll/supervisor/controlplane"
)

// Status is what `atoll status` shows.
type Status struct {
	DataDir    string      `json:"dataDir"`
	ID         string      `json:"id"`
	Isolated   bool        `json:"isolated"`
	Namespace  string      `json:"networkNamespace,omitempty"`
	Server     string      `json:"server"`
	Kubeconfig string      `json:"kubeconfig"`
	Version    string      `json:"version"`
	Processes  []Process   `json:"processes"`
	Components []Component `json:"components"`
	Nodes      []Node      `json:"nodes"`
	// Namespaces are the SupervisorNamespaces, by name.
	Namespaces []Namespace `json:"namespaces"`
	// Errors are what could not be found out.
	Errors []string `json:"errors,omitempty"`
}

// Up reports whether both processes run.
func (s Status) Up() bool {
	for _, p := range s.Processes {
		if !p.Running {
			return false
		}
	}
	return len(s.Processes) > 0
}

// A Process of the cluster.
type Process struct {
	Name    string     `json:"name"`
	Running bool       `json:"running"`
	PID     int        `json:"pid,omitempty"`
	Since   *time.Time `json:"since,omitempty"`
	Log     string     `json:"log"`
}

// A Component of the control plane.
type Component = controlplane.ComponentHealth

// A Node and how many pods, which are VMs, it runs.
type Node struct {
	Name           string `json:"name"`
	Ready          bool   `json:"ready"`
	Message        string `json:"message,omitempty"`
	Address        string `json:"address,omitempty"`
	KubeletVersion string `json:"kubeletVersion"`
	Runtime        string `json:"runtime"`
	Kernel         string `json:"kernel,omitempty"`
	// Accelerator is "kvm" or "tcg".
	Accelerator string `json:"accelerator,omitempty"`
	Pods        int    `json:"pods"`
	RunningPods int    `json:"runningPods"`
}

// acceleratorLabel is set by spherelet on its Node.
const acceleratorLabel = "atoll.dev/accelerator"

// GetStatus never fails because something of the cluster is down: that is
// what it tells. ErrNotFound if there is no cluster.
func GetStatus(ctx context.Context, l Layout) (Status, error) {
	s, err := ReadState(l)
	if err != nil {
		return Status{}, err
	}
	cfg := ControlPlaneConfig(l, s)
	st := Status{
		DataDir: l.DataDir(), ID: l.ID(), Isolated: s.Isolated, Server: cfg.Server(),
		Kubeconfig: l.Kubeconfig(), Version: version.Version,
		Nodes: []Node{}, Components: []Component{}, Namespaces: []Namespace{},
	}
	if s.Isolated {
		st.Namespace = l.NetnsName()
	}
	for _, name := range components {
		p := Process{Name: name, Log: l.Log(name)}
		if id, ok := process.Running(l.Record(name)); ok {
			p.Running, p.PID, p.Since = true, id.PID, &id.Since
		}
		st.Processes = append(st.Processes, p)
	}
	if !st.Processes[0].Running {
		return st, nil
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	st.Components = controlplane.Health(ctx, cfg)
	if st.Nodes, err = nodes(ctx, l, s); err != nil {
		st.Errors = append(st.Errors, err.Error())
	}
	if st.Namespaces, err = namespaces(ctx, l, s); err != nil {
		st.Errors = append(st.Errors, err.Error())
	}
	return st, nil
}

func nodes(ctx context.Context, l Layout, s State) ([]Node, error) {
	client, err := Client(l, s)
	if err != nil {
		return []Node{}, err
	}
	list, err := client.CoreV1().Nodes().List(ctx, metav1.ListOptions{})
	if err != nil {
		return []Node{}, err
	}
	pods, err := client.CoreV1().Pods("").List(ctx, metav1.ListOptions{})
	if err != nil {
		err = errors.Join(errors.New("pods could not be counted"), err)
		pods = &corev1.PodList{}
	}
	all := make([]Node, 0, len(list.Items))
	for i := range list.Items {
		all = append(all, describe(&list.Items[i], pods.Items))
	}
	return all, err
}

func describe(n *corev1.Node, pods []corev1.Pod) Node {
	d := Node{
		Name:           n.Name,
		KubeletVersion: n.Status.NodeInfo.KubeletVersion,
		Runtime:        n.Status.NodeInfo.ContainerRuntimeVersion,
		Kernel:         n.Status.NodeInfo.KernelVersion,
		Accelerator:    n.Labels[acceleratorLabel],
	}
	if err := nodeReady(n, time.Time{}); err != nil {
		d.Message = err.Error()
	} else {
		d.Ready = true
	}
	for _, a := range n.Status.Addresses {
		if a.Type == corev1.NodeInternalIP {
			d.Address = a.Address
		}
	}
	for i := range pods {
		if pods[i].Spec.NodeName != n.Name {
			continue
		}
		d.Pods++
		if pods[i].Status.Phase == corev1.PodRunning {
			d.RunningPods++
		}
	}
	return d
}
