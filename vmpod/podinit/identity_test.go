package podinit

import (
	"bytes"
	"encoding/binary"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/openatoll/atoll/vmpod/agentapi"
)

// The host's bytes go into the pool, with credit for each bit, and then the
// generator is seeded anew: one without the other leaves clones alike.
func TestEntropy(t *testing.T) {
	seed := bytes.Repeat([]byte{7, 9}, minEntropy/2)
	var did []uint
	err := credit(seed, func(request uint, arg []byte) error {
		did = append(did, request)
		if request == unix.RNDADDENTROPY && (binary.NativeEndian.Uint32(arg) != minEntropy*8 || binary.NativeEndian.Uint32(arg[4:]) != minEntropy || !bytes.Equal(arg[8:], seed)) {
			t.Errorf("added %x", arg)
		}
		return nil
	})
	if err != nil || len(did) != 2 || did[0] != unix.RNDADDENTROPY || did[1] != unix.RNDRESEEDCRNG {
		t.Errorf("did %x, %v", did, err)
	}
	for i := range 2 {
		calls := 0
		err := credit(seed, func(uint, []byte) error {
			if calls++; calls == i+1 {
				return unix.EPERM
			}
			return nil
		})
		if !errors.Is(err, unix.EPERM) || calls != i+1 {
			t.Errorf("the kernel refuses the %d. step: %v after %d", i+1, err, calls)
		}
	}
}

// A new agent lacks everything, and says so.
func TestLacks(t *testing.T) {
	a := newAgent(layoutAt(t.TempDir()))
	err := a.requireSandbox()
	if !errdefs.IsFailedPrecondition(err) {
		t.Fatal(err)
	}
	at := -1
	for _, item := range []string{"clock", "entropy", "boot id", "hostname", "machine id", "VM UUID", "interfaces", "ephemeral disk"} {
		i := strings.Index(err.Error(), item)
		if i <= at {
			t.Errorf("%s is not in its place in: %v", item, err)
		}
		at = i
	}
}

func TestKeepClock(t *testing.T) {
	var by []time.Duration
	ahead, sees := time.Duration(0), false
	c := &hostClock{
		host:   func() (time.Duration, bool) { return ahead, sees },
		adjust: func(d time.Duration) error { by = append(by, d); return nil },
	}
	told := func(host, guest int64) *agentapi.ClockReading {
		return &agentapi.ClockReading{HostNs: host, GuestNs: guest}
	}
	step := func(r *agentapi.ClockReading, want ...time.Duration) {
		t.Helper()
		by = nil
		if err := c.keep(r); err != nil || len(by) != len(want) || len(by) > 0 && by[0] != want[0] {
			t.Errorf("corrected by %v, %v, want %v", by, err, want)
		}
	}
	// Where the guest sees the host's clock, what the host says does not matter.
	ahead, sees = time.Second, true
	step(told(100, 1), time.Second)
	ahead = ptpNoise / 2
	step(told(200, 1))
	// Where it does not, each of the host's readings counts once, also after
	// the host's clock went back.
	sees = false
	step(told(300, 1), 299)
	step(told(300, 1))
	step(told(20, 50), -30)
	step(nil)
}
