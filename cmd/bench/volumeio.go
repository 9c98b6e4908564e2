package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/tools/remotecommand"

	"github.com/openatoll/atoll/api/v1alpha1"
	"github.com/openatoll/atoll/internal/holes"
	"github.com/openatoll/atoll/vmpod"
)

const (
	volumeMiB    = 256  // of the volume that is read and written
	volumeFile   = 64   // MiB of the file in it
	volumeBlocks = 1000 // of 4 KiB, read and written at random places
)

// volumeFigures are what one turn measures, in the order in which the guest's
// program prints them, and how many units of unit that is.
var volumeFigures = []struct {
	name, unit string
	of         float64
}{
	{"seq_read", "MiB/s", volumeFile}, {"seq_write", "MiB/s", volumeFile},
	{"rand_read", "IOPS", volumeBlocks}, {"rand_write", "IOPS", volumeBlocks},
}

// volumes measures the volumes of pods.
func (b *podBench) volumes(ctx context.Context, vm *vmBench, n int, all *results) error {
	if err := b.awaitTemplate(ctx); err != nil {
		return err
	}
	if err := b.volumeIO(ctx, vm, n, all); err != nil {
		return fmt.Errorf("reading and writing: %w", err)
	}
	if err := b.volumeReady(ctx, n, all); err != nil {
		return fmt.Errorf("ready: %w", err)
	}
	return nil
}

// volumeIO reads and writes one file, past the guest's cache, in a volume of a
// pod and in a guest that was booted by hand, turn by turn with both running:
// the same guest kernel and program, as many CPUs and as much memory, and a disk
// that is a copy of the volume with its file system and the file in it, opened
// by QEMU with the same cache and unthrottled, and which the host has cached in
// the same way. What the host has cached is written when a time has been taken,
// so that the host's disk is in none.
func (b *podBench) volumeIO(ctx context.Context, vm *vmBench, n int, all *results) (err error) {
	const name = "volume-io"
	dir, err := os.MkdirTemp(b.data, "bench-volume-") // on the file system of the datastore
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	program := filepath.Join(dir, "inguest")
	build := exec.CommandContext(ctx, "go", "build", "-buildvcs=false", "-ldflags=-s -w", "-o", program, "./cmd/bench/inguest")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if said, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("go build ./cmd/bench/inguest: %w\n%s", err, said)
	}
	if err := b.createClaim(ctx, name, volumeMiB<<20); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.removeClaim(context.WithoutCancel(ctx), name)) }()
	path, err := b.fillVolume(ctx, name, program)
	if err != nil {
		return err
	}
	disk := filepath.Join(dir, "raw")
	if said, err := exec.CommandContext(ctx, "cp", "--sparse=always", "--", path, disk).CombinedOutput(); err != nil {
		return fmt.Errorf("copy the volume: %w: %s", err, said)
	}
	size, err := b.runWithVolume(ctx, name, program)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.remove(context.WithoutCancel(ctx), name)) }()
	raw, err := vm.bootRaw(ctx, dir, disk, program, size)
	if err != nil {
		return err
	}
	defer raw.close()
	return b.volumeTurns(ctx, name, raw, [2]string{path, disk}, n, all)
}

// cacheAnew has the host read what a file holds into a cache that has nothing of
// it. The cache keeps what was written or read at once in one piece, wherever
// there was memory, and some pieces take longer to write: a copy made in larger
// writes was 15 % slower than one of cp's, and of two runs of twenty turns with
// what the first had cached the one had 0.89, the other 1.04.
func cacheAnew(file string) error {
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := f.Sync(); err != nil {
		return err
	}
	if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
		return os.NewSyscallError("fadvise", err)
	}
	st, err := f.Stat()
	if err != nil {
		return err
	}
	return holes.Data(f, st.Size(), func(start, end int64) error {
		_, err := io.Copy(io.Discard, io.NewSectionReader(f, start, end-start))
		return err
	})
}

// volumeTurns takes the turns; the first one warms both up. In each the pod goes
// first and last, or the raw guest does. Before each the host caches the pod's
// file and the raw guest's anew, so that no turn inherits luck of another's.
func (b *podBench) volumeTurns(ctx context.Context, name string, raw *rawGuest, files [2]string, n int, all *results) error {
	var ours, theirs, ratios [4][]float64
	for i := range n + 1 {
		for _, file := range files {
			if err := cacheAnew(file); err != nil {
				return err
			}
		}
		var pod, by [4]float64
		for j := range 4 {
			turn, sum := raw.turn, &by
			if (i+(j+1)/2)%2 == 0 { // of four the first and the last, or the two between
				turn, sum = func(ctx context.Context) ([4]float64, error) { return b.volumeTurn(ctx, name) }, &pod
			}
			took, err := turn(ctx)
			if err != nil {
				return err
			}
			for f := range took {
				sum[f] += took[f] / 2
			}
		}
		if i == 0 {
			continue
		}
		for f, of := range volumeFigures {
			ours[f] = append(ours[f], of.of/pod[f]*1e6)
			theirs[f] = append(theirs[f], of.of/by[f]*1e6)
			ratios[f] = append(ratios[f], by[f]/pod[f])
		}
	}
	for f, of := range volumeFigures {
		all.add("raw_"+of.name, of.unit, theirs[f])
		all.add("vol_"+of.name+"_rate", of.unit, ours[f])
		// Of those of a turn, which had the same neighbours.
		all.add("vol_"+of.name, "x", ratios[f]).least(0.95)
	}
	return nil
}

// volumeTurn has the pod take one turn.
func (b *podBench) volumeTurn(ctx context.Context, pod string) (t [4]float64, err error) {
	out, err := b.execIn(ctx, pod, nil, "/tmp/inguest", "disk", "/data/file", fmt.Sprint(volumeBlocks))
	if err != nil {
		return t, err
	}
	return fourTimes(out)
}

func fourTimes(text string) (t [4]float64, err error) {
	if _, err := fmt.Sscan(text, &t[0], &t[1], &t[2], &t[3]); err != nil || min(t[0], t[1], t[2], t[3]) <= 0 {
		return t, fmt.Errorf("inguest disk: %q (%v)", text, err)
	}
	return t, nil
}

// fillVolume has a pod make a file in a claim's volume, and returns where that
// lies on the host, closed.
func (b *podBench) fillVolume(ctx context.Context, name, program string) (string, error) {
	if _, err := b.runWithVolume(ctx, name, program); err != nil {
		return "", err
	}
	_, err := b.execIn(ctx, name, nil, "/tmp/inguest", "diskfile", "/data/file", fmt.Sprint(volumeFile))
	if err := errors.Join(err, b.remove(ctx, name)); err != nil {
		return "", err
	}
	claim, err := b.client.CoreV1().PersistentVolumeClaims(benchNamespace).Get(ctx, name, metav1.GetOptions{})
	if err != nil {
		return "", err
	}
	pv, err := b.client.CoreV1().PersistentVolumes().Get(ctx, claim.Spec.VolumeName, metav1.GetOptions{})
	if err != nil || pv.Spec.CSI == nil {
		return "", fmt.Errorf("the volume of claim %s: %v", name, err)
	}
	_, id, _ := strings.Cut(pv.Spec.CSI.VolumeHandle, ".")
	found, err := filepath.Glob(filepath.Join(b.data, "nodes", "*", "volumes", "disks", id+"-*.raw"))
	if err != nil || len(found) != 1 {
		return "", fmt.Errorf("files of volume %s: %v (%v)", pv.Spec.CSI.VolumeHandle, found, err)
	}
	return found[0], nil
}

// runWithVolume runs a pod that has a claim's volume, and the program; it says
// how large its VM is.
func (b *podBench) runWithVolume(ctx context.Context, name, program string) (size v1alpha1.PodVMSize, err error) {
	if err := b.createWith(ctx, name, shellImage, []string{"sleep", "3600"}, name); err != nil {
		return size, err
	}
	if err := b.awaitRunning(ctx, name); err != nil {
		return size, err
	}
	f, err := os.Open(program)
	if err != nil {
		return size, err
	}
	defer f.Close()
	if _, err := b.execIn(ctx, name, f, "sh", "-c", "cat > /tmp/inguest && chmod +x /tmp/inguest"); err != nil {
		return size, err
	}
	for range 100 { // it is written to the Pod a little after its status
		p, err := b.client.CoreV1().Pods(benchNamespace).Get(ctx, name, metav1.GetOptions{})
		if err != nil {
			return size, err
		}
		if text := p.Annotations[v1alpha1.PodVMSizeAnnotation]; text != "" {
			return size, json.Unmarshal([]byte(text), &size)
		}
		if err := sleep(ctx, 100*time.Millisecond); err != nil {
			return size, err
		}
	}
	return size, fmt.Errorf("pod %s does not tell how large its VM is", name)
}

// createWith creates a pod whose /data is a claim's volume.
func (b *podBench) createWith(ctx context.Context, name, image string, command []string, claim string) error {
	none, zero := false, int64(0)
	_, err := b.client.CoreV1().Pods(benchNamespace).Create(ctx, &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec: corev1.PodSpec{
			TerminationGracePeriodSeconds: &zero, EnableServiceLinks: &none,
			Volumes: []corev1.Volume{{Name: "data", VolumeSource: corev1.VolumeSource{
				PersistentVolumeClaim: &corev1.PersistentVolumeClaimVolumeSource{ClaimName: claim},
			}}},
			Containers: []corev1.Container{{
				Name: "c", Image: image, Command: command, ImagePullPolicy: corev1.PullIfNotPresent,
				VolumeMounts: []corev1.VolumeMount{{Name: "data", MountPath: "/data"}},
			}},
		},
	}, metav1.CreateOptions{})
	return err
}

// createClaim creates a claim of the default class.
func (b *podBench) createClaim(ctx context.Context, name string, bytes int64) error {
	_, err := b.client.CoreV1().PersistentVolumeClaims(benchNamespace).Create(ctx, &corev1.PersistentVolumeClaim{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec: corev1.PersistentVolumeClaimSpec{
			AccessModes: []corev1.PersistentVolumeAccessMode{corev1.ReadWriteOnce},
			Resources:   corev1.VolumeResourceRequirements{Requests: corev1.ResourceList{corev1.ResourceStorage: *resource.NewQuantity(bytes, resource.BinarySI)}},
		},
	}, metav1.CreateOptions{})
	return err
}

// removeClaim deletes a claim and waits until its volume is gone, too.
func (b *podBench) removeClaim(ctx context.Context, name string) error {
	claims := b.client.CoreV1().PersistentVolumeClaims(benchNamespace)
	c, err := claims.Get(ctx, name, metav1.GetOptions{})
	if err == nil {
		err = claims.Delete(ctx, name, metav1.DeleteOptions{})
	}
	if err != nil {
		return err
	}
	for range 600 {
		_, gone := claims.Get(ctx, name, metav1.GetOptions{})
		if gone != nil && c.Spec.VolumeName != "" {
			_, gone = b.client.CoreV1().PersistentVolumes().Get(ctx, c.Spec.VolumeName, metav1.GetOptions{})
		}
		if gone != nil {
			return nil
		}
		time.Sleep(100 * time.Millisecond)
	}
	return fmt.Errorf("claim %s or its volume is still there a minute after its deletion", name)
}

// execIn runs a command in a pod's container and returns what it prints.
func (b *podBench) execIn(ctx context.Context, pod string, in io.Reader, command ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, bootTimeout)
	defer cancel()
	req := b.client.CoreV1().RESTClient().Post().Namespace(benchNamespace).Resource("pods").Name(pod).SubResource("exec").
		VersionedParams(&corev1.PodExecOptions{Command: command, Stdin: in != nil, Stdout: true, Stderr: true}, scheme.ParameterCodec)
	x, err := remotecommand.NewWebSocketExecutor(b.config, "GET", req.URL().String())
	if err != nil {
		return "", err
	}
	var out, said bytes.Buffer
	if err := x.StreamWithContext(ctx, remotecommand.StreamOptions{Stdin: in, Stdout: &out, Stderr: &said}); err != nil {
		return "", fmt.Errorf("%s in pod %s: %w: %s", command[0], pod, err, said.String())
	}
	return out.String(), nil
}

// volumeReady measures what a claim adds to a pod's start: turn by turn a pod
// without one, from its create call to the status that says running, and a
// claim and a pod with it, created one after the other, from the claim's create
// call to the same. In that the volume is made, bound, given to the VM, gets its
// file system and is mounted. Beside it, from the claim's creation to Bound.
func (b *podBench) volumeReady(ctx context.Context, n int, all *results) error {
	var plain, with, ready, bound []float64
	for i := range n + 1 {
		name := fmt.Sprintf("ready-%d", i)
		_, without, err := b.run(ctx, name+"-plain")
		if err == nil {
			err = b.remove(ctx, name+"-plain")
		}
		if err != nil {
			return err
		}
		until, took, err := b.runClaimed(ctx, name)
		if err = errors.Join(err, b.remove(ctx, name), b.removeClaim(ctx, name)); err != nil {
			return err
		}
		say("volume %d of %d: bound after %.0f ms, running after %.0f ms, without a claim %.0f ms", i, n, until, took, without)
		if i > 0 {
			plain, with, ready, bound = append(plain, without), append(with, took), append(ready, took-without), append(bound, until)
		}
	}
	all.add("pod_running_plain", "ms", plain)
	all.add("pod_running_claim", "ms", with)
	all.add("vol_bound", "ms", bound)
	all.add("vol_ready", "ms", ready)
	return nil
}

// runClaimed creates a claim and a pod with it, and returns after how many
// milliseconds the one was bound and the other running.
func (b *podBench) runClaimed(ctx context.Context, name string) (bound, running float64, err error) {
	watching, cancel := context.WithTimeout(ctx, 2*bootTimeout)
	defer cancel()
	w, err := b.client.CoreV1().PersistentVolumeClaims(benchNamespace).Watch(watching, metav1.ListOptions{
		FieldSelector: fields.OneTermEqualSelector("metadata.name", name).String(),
	})
	if err != nil {
		return 0, 0, err
	}
	start := time.Now()
	seen := make(chan float64, 1)
	go func() {
		defer close(seen)
		for e := range w.ResultChan() {
			if c, ok := e.Object.(*corev1.PersistentVolumeClaim); ok && c.Status.Phase == corev1.ClaimBound {
				seen <- ms(start)
				return
			}
		}
	}()
	err = b.createClaim(ctx, name, 1<<30)
	if err == nil {
		err = b.createWith(ctx, name, pauseImage, nil, name)
	}
	if err == nil {
		err = b.awaitRunning(ctx, name)
	}
	running = ms(start)
	if err != nil {
		w.Stop()
	}
	bound, ok := <-seen
	w.Stop()
	if err == nil && !ok {
		err = fmt.Errorf("claim %s was not seen bound", name)
	}
	return bound, running, err
}

// A rawGuest is a VM that was booted by hand and runs nothing but the bench's
// own program, which is told what to do on the console.
type rawGuest struct {
	cmd     *exec.Cmd
	console net.Conn
	rest    []byte // of the console, not looked at
}

// bootRaw boots the guest's kernel with a disk, and the program as PID 1.
func (b *vmBench) bootRaw(ctx context.Context, dir, disk, program string, size v1alpha1.PodVMSize) (*rawGuest, error) {
	spec := b.spec()
	spec.CPUs, spec.Memory = size.CPUs, size.Memory
	spec.Disks = []vmpod.Disk{{ID: "raw", Path: disk}}
	argv, err := b.driver.RawCommand(spec, dir)
	if err != nil {
		return nil, err
	}
	initrd := filepath.Join(dir, "initrd")
	if err := initrdWith(b.guest.Initrd, program, initrd); err != nil {
		return nil, err
	}
	for i, a := range argv {
		switch {
		case a == "-append":
			argv[i+1] += " rdinit=/inguest"
		case a == "-initrd":
			argv[i+1] = initrd
		case strings.Contains(a, "id=con,"): // it waits for its reader, so that no line is lost
			argv[i] = strings.Replace(a, "wait=off", "wait=on", 1)
		}
	}
	var said bytes.Buffer
	g := &rawGuest{cmd: exec.CommandContext(ctx, argv[0], argv[1:]...)}
	g.cmd.Stderr = &said
	if err := g.cmd.Start(); err != nil {
		return nil, err
	}
	booting, cancel := context.WithTimeout(ctx, bootTimeout)
	defer cancel()
	if g.console, err = dial(booting, filepath.Join(dir, "con")); err != nil {
		g.close()
		return nil, fmt.Errorf("%w: %s", err, said.String())
	}
	if _, err = g.await(booting, "raw guest ready"); err != nil {
		g.close()
		return nil, err
	}
	return g, nil
}

func (g *rawGuest) close() {
	if g.console != nil {
		g.console.Close()
	}
	_ = g.cmd.Process.Kill()
	_ = g.cmd.Wait()
}

// turn has the guest take one turn.
func (g *rawGuest) turn(ctx context.Context) (t [4]float64, err error) {
	ctx, cancel := context.WithTimeout(ctx, bootTimeout)
	defer cancel()
	if _, err := fmt.Fprintf(g.console, "file %d\n", volumeBlocks); err != nil {
		return t, err
	}
	if _, err := g.await(ctx, "took "); err != nil {
		return t, err
	}
	text, err := g.await(ctx, ".")
	if err != nil {
		return t, err
	}
	return fourTimes(text)
}

// await reads the console until a text, and returns what was before it.
func (g *rawGuest) await(ctx context.Context, text string) (string, error) {
	stop := context.AfterFunc(ctx, func() { g.console.Close() })
	defer stop()
	buf := make([]byte, 4096)
	for {
		if before, after, ok := bytes.Cut(g.rest, []byte(text)); ok {
			g.rest = after
			return string(before), nil
		}
		n, err := g.console.Read(buf)
		g.rest = append(g.rest, buf[:n]...)
		if err != nil {
			return "", fmt.Errorf("the raw guest's console ended (%w) before %q; it said:\n%s", err, text, g.rest)
		}
	}
}

// initrdWith writes an initramfs and behind it an archive with the program and
// a console: the kernel unpacks one after the other
// (Documentation/driver-api/early-userspace/buffer-format).
func initrdWith(initrd, program, to string) error {
	first, err := os.ReadFile(initrd)
	if err != nil {
		return err
	}
	data, err := os.ReadFile(program)
	if err != nil {
		return err
	}
	var b bytes.Buffer
	b.Write(first)
	pad := func() { b.Write(make([]byte, -b.Len()&3)) }
	pad()
	entry := func(name string, mode, major, minor int, data []byte) {
		fmt.Fprintf(&b, "070701%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X", 0, mode, 0, 0, 1, 0, len(data), 0, 0, major, minor, len(name)+1, 0)
		b.WriteString(name + "\x00")
		pad()
		b.Write(data)
		pad()
	}
	entry("dev", 0o040755, 0, 0, nil)
	entry("dev/console", 0o020600, 5, 1, nil)
	entry("inguest", 0o100755, 0, 0, data)
	entry("TRAILER!!!", 0, 0, 0, nil)
	return os.WriteFile(to, b.Bytes(), 0o600)
}
