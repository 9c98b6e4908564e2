package qemu

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/openatoll/atoll/vmpod/vmpodtest"
)

// BenchmarkLaunch takes from Launch to the guest's first answer, and
// BenchmarkRawBoot the same boot by QEMU alone:
//
//	go test ./vmpod/qemu -run - -bench . -benchtime 10x
func BenchmarkLaunch(b *testing.B) {
	cfg := testConfig(b)
	d := newDriver(b, cfg)
	defer d.Close()
	var hypervisor time.Duration
	for i := range b.N {
		s := smallSpec(fmt.Sprintf("bench-%d", i))
		begin := time.Now()
		m, err := d.Launch(context.Background(), s)
		if err != nil {
			b.Fatal(err)
		}
		hypervisor += time.Since(begin)
		vmpodtest.Dial(b, m).Close()
		b.StopTimer()
		if i == b.N-1 {
			u, err := m.(*Machine).Usage(context.Background())
			if err != nil {
				b.Fatal(err)
			}
			b.ReportMetric(float64(u.Proportional>>20), "MiB-PSS")
		}
		if err := m.Remove(context.Background()); err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
	}
	b.ReportMetric(float64(hypervisor.Milliseconds())/float64(b.N), "ms-in-Launch/op")
	b.StopTimer()
	removeTestCgroups(d)
}

func BenchmarkRawBoot(b *testing.B) {
	cfg := testConfig(b)
	d := newDriver(b, cfg)
	defer d.Close()
	argv, err := d.RawCommand(smallSpec("bench-raw"), cfg.RunDir)
	if err != nil {
		b.Fatal(err)
	}
	b.ResetTimer()
	for range b.N {
		rawBoot(b, argv, cfg.RunDir)
	}
}

func rawBoot(b *testing.B, argv []string, dir string) {
	for _, s := range []string{qmpSocket, agentSocket, consoleSocket} {
		os.Remove(filepath.Join(dir, s))
	}
	cmd := exec.Command(argv[0], argv[1:]...)
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	defer cmd.Wait()
	defer cmd.Process.Kill()
	var c net.Conn
	for end := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
		var err error
		if c, err = net.Dial("unix", filepath.Join(dir, agentSocket)); err == nil {
			break
		}
		if time.Now().After(end) {
			b.Fatal(err)
		}
	}
	defer c.Close()
	c.Write([]byte("\nready\n"))
	c.SetReadDeadline(time.Now().Add(2 * time.Minute))
	for r := bufio.NewReader(c); ; {
		line, err := r.ReadString('\n')
		if err != nil {
			b.Fatal(err)
		}
		if strings.Contains(line, "ready") {
			return
		}
	}
}
