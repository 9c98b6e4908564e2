package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/client-go/tools/remotecommand"
)

// rssPods is with how many pods spherelet's memory is taken.
const rssPods = 10

const (
	benchNamespace = "default"
	pauseImage     = "atoll.local/pause"
	shellImage     = "atoll.local/busybox"
)

// A podBench measures pods through the API of a running cluster.
type podBench struct {
	data   string
	config *rest.Config
	client kubernetes.Interface
}

func newPodBench(data string) (*podBench, error) {
	c, err := clientcmd.BuildConfigFromFlags("", filepath.Join(data, "kubeconfig"))
	if err != nil {
		return nil, err
	}
	c.QPS, c.Burst = -1, -1
	client, err := kubernetes.NewForConfig(c)
	if err != nil {
		return nil, err
	}
	return &podBench{data: data, config: c, client: client}, nil
}

// daily measures what is no start.
func (b *podBench) daily(ctx context.Context, n int, all *results) error {
	if err := b.execs(ctx, max(n, 20), all); err != nil {
		return err
	}
	return b.rss(ctx, all)
}

// booted measures pods whose VMs are booted.
func (b *podBench) booted(ctx context.Context, o options, all *results) (err error) {
	end, err := b.restart(ctx, o, templates(false))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, end()) }()
	if err := b.starts(ctx, o.n, all); err != nil {
		return err
	}
	return b.pss(ctx, all)
}

// starts measures pods one after another, image present, from the create call
// to the status that says running.
func (b *podBench) starts(ctx context.Context, n int, all *results) error {
	var whole, rest []float64
	for i := range n + 1 {
		name := fmt.Sprintf("start-%d", i)
		uid, took, err := b.run(ctx, name)
		if err != nil {
			return err
		}
		if err := launchedAs(uid, false); err != nil {
			return fmt.Errorf("pod %s: %w", name, err)
		}
		vm, err := b.vmPart(uid)
		if err != nil {
			return err
		}
		say("pod %d of %d: running after %.0f ms, its VM took %.0f of them", i, n, took, vm)
		if i > 0 { // the first one pulls the image
			whole, rest = append(whole, took), append(rest, took-vm)
		}
		if err := b.remove(ctx, name); err != nil {
			return err
		}
	}
	all.add("pod_running", "ms", whole).to(*all, "raw_boot", 0)
	all.add("pod_running_rest", "ms", rest).most(700)
	return nil
}

// upLine is what the runtime logs when a pod VM's agent answers.
var upLine = regexp.MustCompile(`msg="pod VM is up".* pod_uid=(\S+).* launch=(\S+) agent=(\S+)`)

// vmPart returns the milliseconds between the start of the VM's making and its
// agent's answer, from spherelet's log.
func (b *podBench) vmPart(uid string) (float64, error) {
	f, err := os.Open(filepath.Join(b.data, "log", "spherelet.log"))
	if err != nil {
		return 0, err
	}
	defer f.Close()
	s := bufio.NewScanner(f)
	s.Buffer(nil, 1<<20)
	for s.Scan() {
		m := upLine.FindStringSubmatch(s.Text())
		if m == nil || m[1] != uid {
			continue
		}
		launch, err1 := time.ParseDuration(m[2])
		agent, err2 := time.ParseDuration(m[3])
		if err := errors.Join(err1, err2); err != nil {
			return 0, err
		}
		return float64((launch + agent).Microseconds()) / 1000, nil
	}
	return 0, fmt.Errorf("spherelet.log has no line about the VM of pod %s", uid)
}

func (b *podBench) create(ctx context.Context, name, image string, command []string) (string, error) {
	none := false
	zero := int64(0)
	p, err := b.client.CoreV1().Pods(benchNamespace).Create(ctx, &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec: corev1.PodSpec{
			TerminationGracePeriodSeconds: &zero,
			EnableServiceLinks:            &none,
			Containers: []corev1.Container{{
				Name: "c", Image: image, Command: command, ImagePullPolicy: corev1.PullIfNotPresent,
			}},
		},
	}, metav1.CreateOptions{})
	if err != nil {
		return "", err
	}
	return string(p.UID), nil
}

// run creates a pod that does nothing and returns after how many milliseconds
// it was running.
func (b *podBench) run(ctx context.Context, name string) (uid string, took float64, err error) {
	start := time.Now()
	if uid, err = b.create(ctx, name, pauseImage, nil); err != nil {
		return "", 0, err
	}
	err = b.awaitRunning(ctx, name)
	return uid, ms(start), err
}

func (b *podBench) awaitRunning(ctx context.Context, name string) error {
	ctx, cancel := context.WithTimeout(ctx, 2*bootTimeout)
	defer cancel()
	w, err := b.client.CoreV1().Pods(benchNamespace).Watch(ctx, metav1.ListOptions{
		FieldSelector: fields.OneTermEqualSelector("metadata.name", name).String(),
	})
	if err != nil {
		return err
	}
	defer w.Stop()
	var last corev1.PodStatus
	for e := range w.ResultChan() {
		p, ok := e.Object.(*corev1.Pod)
		if !ok {
			return fmt.Errorf("watching pod %s: %v", name, e.Object)
		}
		last = p.Status
		if s := p.Status.ContainerStatuses; len(s) == 1 && s[0].State.Running != nil {
			return nil
		}
	}
	return fmt.Errorf("pod %s is not running: %+v", name, last)
}

// remove deletes a pod and waits until it is gone, so that the next
// measurement has the machine for itself.
func (b *podBench) remove(ctx context.Context, name string) error {
	pods := b.client.CoreV1().Pods(benchNamespace)
	if err := pods.Delete(ctx, name, metav1.DeleteOptions{}); err != nil {
		return err
	}
	for range 600 {
		if _, err := pods.Get(ctx, name, metav1.GetOptions{}); err != nil {
			return nil
		}
		time.Sleep(100 * time.Millisecond)
	}
	return fmt.Errorf("pod %s is still there a minute after its deletion", name)
}

// execs measures one command in a running pod, through API server and
// kubelet, as kubectl exec does.
func (b *podBench) execs(ctx context.Context, n int, all *results) error {
	if _, err := b.create(ctx, "exec", shellImage, []string{"sleep", "3600"}); err != nil {
		return err
	}
	if err := b.awaitRunning(ctx, "exec"); err != nil {
		return err
	}
	var samples []float64
	for i := range n + 1 {
		took, err := b.exec(ctx)
		if err != nil {
			return err
		}
		if i > 0 {
			samples = append(samples, took)
		}
	}
	all.add("exec", "ms", samples)
	return b.remove(ctx, "exec")
}

func (b *podBench) exec(ctx context.Context) (float64, error) {
	start := time.Now()
	req := b.client.CoreV1().RESTClient().Post().Namespace(benchNamespace).Resource("pods").Name("exec").SubResource("exec").
		VersionedParams(&corev1.PodExecOptions{Command: []string{"echo", "pong"}, Stdout: true}, scheme.ParameterCodec)
	x, err := remotecommand.NewWebSocketExecutor(b.config, "GET", req.URL().String())
	if err != nil {
		return 0, err
	}
	var out bytes.Buffer
	if err := x.StreamWithContext(ctx, remotecommand.StreamOptions{Stdout: &out}); err != nil {
		return 0, err
	}
	if out.String() != "pong\n" {
		return 0, fmt.Errorf("exec answered %q", out.String())
	}
	return ms(start), nil
}

// tenPods runs ten pods that do nothing, and calls look with their UIDs.
func (b *podBench) tenPods(ctx context.Context, look func(uids []string) error) error {
	var names, uids []string
	for i := range rssPods {
		names = append(names, fmt.Sprintf("mem-%d", i))
	}
	_, byName, err := b.createAll(ctx, names)
	if err != nil {
		return err
	}
	for _, uid := range byName {
		uids = append(uids, uid)
	}
	if err := look(uids); err != nil {
		return err
	}
	return b.removeAll(ctx, "mem-")
}

// pss takes the memory of VMs with a pause container.
func (b *podBench) pss(ctx context.Context, all *results) error {
	return b.tenPods(ctx, func(uids []string) error {
		var pss []float64
		for _, uid := range uids {
			v, err := vmPSS(uid)
			if err != nil {
				return err
			}
			pss = append(pss, v)
		}
		all.add("pss", "MiB", pss)
		return nil
	})
}

// rss takes the daemons' memory.
func (b *podBench) rss(ctx context.Context, all *results) error {
	return b.tenPods(ctx, func([]string) error {
		pids, err := b.daemons(ctx)
		if err != nil {
			return err
		}
		var spherelet, control []float64
		for range 10 { // the heap breathes
			s, err1 := procMB(pids["spherelet"], "status", "VmRSS:")
			c, err2 := procMB(pids["supervisor"], "status", "VmRSS:")
			if err := errors.Join(err1, err2); err != nil {
				return err
			}
			spherelet, control = append(spherelet, s), append(control, c)
			time.Sleep(time.Second)
		}
		all.add("rss_spherelet", "MB", spherelet).most(150)
		all.add("rss_control_plane", "MB", control)
		return nil
	})
}

// daemons returns the process ids of the cluster's processes by name.
func (b *podBench) daemons(ctx context.Context) (map[string]int, error) {
	out, err := exec.CommandContext(ctx, "bin/atoll", "--data-dir", b.data, "status", "-o", "json").Output()
	if err != nil {
		return nil, fmt.Errorf("atoll status: %w", err)
	}
	var s struct {
		Processes []struct {
			Name string `json:"name"`
			PID  int    `json:"pid"`
		} `json:"processes"`
	}
	if err := json.Unmarshal(out, &s); err != nil {
		return nil, fmt.Errorf("atoll status: %w", err)
	}
	pids := map[string]int{}
	for _, p := range s.Processes {
		pids[p.Name] = p.PID
	}
	return pids, nil
}

// vmPSS is the PSS in MiB of a pod's QEMU.
func vmPSS(uid string) (float64, error) {
	pid, err := vmProcess(uid)
	if err != nil {
		return 0, err
	}
	mb, err := procMB(pid, "smaps_rollup", "Pss:")
	return mb * 1e6 / (1 << 20), err
}

// runTime is the CPU time in ms of a process, all threads.
func runTime(pid int) (float64, error) {
	threads, err := filepath.Glob(filepath.Join("/proc", strconv.Itoa(pid), "task", "*", "schedstat"))
	if err != nil {
		return 0, err
	}
	if len(threads) == 0 {
		return 0, fmt.Errorf("process %d has no threads", pid)
	}
	var sum float64
	for _, file := range threads {
		b, err := os.ReadFile(file)
		if err != nil {
			continue // it has ended
		}
		word, _, _ := strings.Cut(string(b), " ")
		ns, err := strconv.ParseFloat(word, 64)
		if err != nil {
			return 0, fmt.Errorf("%s: %w", file, err)
		}
		sum += ns / 1e6
	}
	return sum, nil
}

// vmProcess finds the QEMU whose name carries the pod's UID.
func vmProcess(uid string) (int, error) {
	procs, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		return 0, err
	}
	for _, p := range procs {
		b, err := os.ReadFile(p)
		if err != nil || !bytes.Contains(b, []byte("\x00atoll-"+uid)) {
			continue
		}
		return strconv.Atoi(filepath.Base(filepath.Dir(p)))
	}
	return 0, fmt.Errorf("no VM runs for pod %s", uid)
}

// procMB reads a field in kB from a file of /proc/<pid>, in megabytes.
func procMB(pid int, file, field string) (float64, error) {
	b, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), file))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		if len(f) >= 2 && f[0] == field {
			kb, err := strconv.ParseFloat(f[1], 64)
			return kb * 1024 / 1e6, err
		}
	}
	return 0, fmt.Errorf("/proc/%d/%s has no %s", pid, file, field)
}

// guestDir reads from the node's configuration which guest it boots.
func guestDir(data string) (string, error) {
	files, err := filepath.Glob(filepath.Join(data, "nodes", "*", "spherelet.yaml"))
	if err != nil || len(files) == 0 {
		return "", fmt.Errorf("no spherelet.yaml below %s", data)
	}
	b, err := os.ReadFile(files[0])
	if err != nil {
		return "", err
	}
	m := regexp.MustCompile(`(?m)^\s+guest: (\S+)$`).FindSubmatch(b)
	if m == nil {
		return "", fmt.Errorf("%s names no guest directory", files[0])
	}
	return string(m[1]), nil
}
