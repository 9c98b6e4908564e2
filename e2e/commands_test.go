package e2e

import (
	"bytes"
	"io"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"time"

	"github.com/creack/pty"
	"github.com/rogpeppe/go-internal/testscript"

	"github.com/openatoll/atoll/storage/treesum"
)

// pause between two looks at something that is awaited.
const pause = 300 * time.Millisecond

// cmdEventually repeats a command until it succeeds (or, negated, fails):
//
//	eventually 60s kubectl get pod web
//	! eventually 60s kubectl get pod web
func cmdEventually(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) < 2 {
		ts.Fatalf("usage: eventually TIMEOUT CMD [ARGS]")
	}
	deadline := deadlineOf(ts, args[0])
	for {
		err := ts.Exec(args[1], args[2:]...)
		if (err == nil) != neg {
			return
		}
		if time.Now().After(deadline) {
			explain(ts)
			ts.Fatalf("after thrice %s still: %s: %v", args[0], strings.Join(args[1:], " "), err)
		}
		time.Sleep(pause)
	}
}

// cmdUntil repeats a command until it succeeds and its output matches (or,
// negated, no longer matches):
//
//	until 60s Running kubectl get pod web
func cmdUntil(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) < 3 {
		ts.Fatalf("usage: until TIMEOUT REGEXP CMD [ARGS]")
	}
	deadline := deadlineOf(ts, args[0])
	re, err := regexp.Compile(`(?m)` + args[1])
	ts.Check(err)
	for {
		err := ts.Exec(args[2], args[3:]...)
		out := ts.ReadFile("stdout")
		if err == nil && re.MatchString(out) != neg {
			return
		}
		if time.Now().After(deadline) {
			explain(ts)
			ts.Fatalf("after thrice %s: %s: %v; want match of %q: %v; got:\n%s%s", args[0],
				strings.Join(args[2:], " "), err, args[1], !neg, out, ts.ReadFile("stderr"))
		}
		time.Sleep(pause)
	}
}

// cmdFinally runs a command when the script ends, passed or failed; the last
// one first. Its failure fails the script.
//
//	finally umount $WORK/small
func cmdFinally(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 1 {
		ts.Fatalf("usage: finally CMD [ARGS]")
	}
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Dir = ts.Getenv("WORK")
	cmd.Env = append(os.Environ(), "KUBECONFIG="+ts.Getenv("KUBECONFIG"), "HOME="+ts.Getenv("HOME"), "WORK="+ts.Getenv("WORK"), "PATH="+ts.Getenv("PATH"))
	ts.Defer(func() {
		out, err := cmd.CombinedOutput()
		if err != nil {
			ts.Fatalf("finally %s: %v\n%s", strings.Join(args, " "), err, out)
		}
	})
}

// patience is for machines that are slower, or busier, than one of two idle
// CPUs, for which the scripts' times are meant: only what fails waits for it.
const patience = 3

func deadlineOf(ts *testscript.TestScript, s string) time.Time {
	d, err := time.ParseDuration(s)
	ts.Check(err)
	return time.Now().Add(patience * d)
}

// explain shows the pods and events of the script's namespace in its log.
func explain(ts *testscript.TestScript) {
	for _, args := range [][]string{
		{"get", "pods", "-o", "wide"},
		{"get", "events", "--sort-by=.lastTimestamp"},
	} {
		cmd := exec.Command(ts.Getenv("ROOT")+"/bin/kubectl", args...)
		cmd.Env = append(os.Environ(), "KUBECONFIG="+ts.Getenv("KUBECONFIG"), "HOME="+ts.Getenv("HOME"))
		out, _ := cmd.CombinedOutput()
		ts.Logf("kubectl %s\n%s", strings.Join(args, " "), out)
	}
}

// cmdExpect runs a command on a terminal of 80x24 and plays a dialogue: the
// file has lines "< regexp" to wait for, "> text" to type, "resize COLS ROWS",
// and "exit CODE" at the end.
//
//	expect dialogue.txt kubectl exec -it web -- sh
func cmdExpect(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: expect FILE CMD [ARGS]")
	}
	path, err := exec.LookPath(args[1])
	if err != nil {
		path = ts.Getenv("ROOT") + "/bin/" + args[1]
	}
	cmd := exec.Command(path, args[2:]...)
	cmd.Dir = ts.Getenv("WORK")
	cmd.Env = append(os.Environ(), "KUBECONFIG="+ts.Getenv("KUBECONFIG"), "HOME="+ts.Getenv("HOME"), "TERM=xterm")
	tty, err := pty.StartWithSize(cmd, &pty.Winsize{Rows: 24, Cols: 80})
	ts.Check(err)
	defer tty.Close()
	t := &terminal{tty: tty, chunks: make(chan []byte, 16)}
	go t.pump()
	for _, line := range strings.Split(strings.TrimSpace(ts.ReadFile(args[0])), "\n") {
		verb, rest, _ := strings.Cut(line, " ")
		switch verb {
		case "<":
			t.await(ts, rest)
		case ">":
			_, err := io.WriteString(tty, rest+"\n")
			ts.Check(err)
		case "resize":
			t.resize(ts, rest)
		case "exit":
			t.exit(ts, cmd, rest)
			return
		default:
			ts.Fatalf("expect: line %q: want <, >, resize or exit", line)
		}
	}
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	ts.Fatalf("expect: %s has no exit line", args[0])
}

// A terminal is the near end of a pty and what was read from it so far.
type terminal struct {
	tty    *os.File
	chunks chan []byte
	seen   bytes.Buffer
}

func (t *terminal) pump() {
	defer close(t.chunks)
	for {
		b := make([]byte, 4096)
		n, err := t.tty.Read(b)
		if n > 0 {
			t.chunks <- b[:n]
		}
		if err != nil {
			return
		}
	}
}

// await reads until the pattern matches, then forgets what came before.
func (t *terminal) await(ts *testscript.TestScript, pattern string) {
	re, err := regexp.Compile(pattern)
	ts.Check(err)
	timeout := time.After(60 * time.Second)
	for {
		if loc := re.FindIndex(t.seen.Bytes()); loc != nil {
			t.seen.Next(loc[1])
			return
		}
		select {
		case b, ok := <-t.chunks:
			if !ok {
				ts.Fatalf("expect: the command ended; waited for %q, saw:\n%s", pattern, t.seen.String())
			}
			t.seen.Write(b)
		case <-timeout:
			ts.Fatalf("expect: waited 60s for %q, saw:\n%s", pattern, t.seen.String())
		}
	}
}

func (t *terminal) resize(ts *testscript.TestScript, s string) {
	cols, rows, _ := strings.Cut(s, " ")
	ts.Check(pty.Setsize(t.tty, &pty.Winsize{Cols: number(ts, cols), Rows: number(ts, rows)}))
	// kubectl reads the new size on SIGWINCH, which the kernel sends now;
	// what it tells the other side has no answer that could be awaited.
	time.Sleep(time.Second)
}

func (t *terminal) exit(ts *testscript.TestScript, cmd *exec.Cmd, want string) {
	go func() {
		for range t.chunks { //nolint:revive // drained so that the command can end
		}
	}()
	hung := time.AfterFunc(time.Minute, func() { _ = cmd.Process.Kill() })
	_ = cmd.Wait()
	if !hung.Stop() {
		ts.Fatalf("expect: the command did not end by itself within a minute")
	}
	if got := cmd.ProcessState.ExitCode(); got != int(number(ts, want)) {
		ts.Fatalf("expect: exit code %d, want %s; saw:\n%s", got, want, t.seen.String())
	}
}

func number(ts *testscript.TestScript, s string) uint16 {
	var n uint16
	for _, c := range s {
		if c < '0' || c > '9' {
			ts.Fatalf("expect: %q is not a number", s)
		}
		n = n*10 + uint16(c-'0')
	}
	return n
}

// cmdSameTree compares two lists that treesum made, but for what Kubernetes
// mounts over the image.
//
//	sametree WANT GOT
func cmdSameTree(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: sametree WANT GOT")
	}
	read := func(name string) []treesum.Entry {
		entries, err := treesum.Read(strings.NewReader(ts.ReadFile(name)))
		ts.Check(err)
		if len(entries) < 20 {
			ts.Fatalf("sametree: %s has %d entries: not a tree worth comparing", name, len(entries))
		}
		return entries
	}
	diff := treesum.Diff(read(args[0]), read(args[1]), 20, "/proc", "/sys", "/dev", "/etc/hosts", "/etc/hostname", "/etc/resolv.conf", "/var/run", "/run")
	if len(diff) > 0 {
		ts.Fatalf("the trees differ:\n%s", strings.Join(diff, "\n"))
	}
}
