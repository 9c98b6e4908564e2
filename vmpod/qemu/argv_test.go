package qemu

import (
	"net"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/openatoll/atoll/vmpod"
)

func fullSpec() vmpod.Spec {
	return vmpod.Spec{
		ID:     vmpod.ID{PodUID: "2f1c9a52-55c3-4d6e-8a4e-0a6f0f0b7a01", Attempt: 3},
		Owner:  vmpod.Owner{PodUID: "2f1c9a52", Namespace: "evil,ns", Name: "-device evil"},
		CPUs:   2,
		Memory: 300<<20 + 1,
		Pool:   "besteffort",
		Disks: []vmpod.Disk{
			{ID: "eph", Path: "/var/lib/a,b/eph.raw"},
			{ID: "img-0", Path: "/var/lib/img.vmdk", Format: "vmdk", ReadOnly: true},
		},
		NICs: []vmpod.NIC{{ID: "eth0", Tap: "atl00000000001", MAC: net.HardwareAddr{2, 0, 0, 0, 0, 1}, MTU: 1450}},
	}
}

// fakeFDs names resources as a launch does, without opening anything.
type fakeFDs struct{ n int }

func (f *fakeFDs) next() string                    { f.n++; return string(rune('0' + f.n)) }
func (f *fakeFDs) file(string) string              { return "/proc/self/fd/" + f.next() }
func (f *fakeFDs) disk(vmpod.Disk) (string, error) { return "/dev/fdset/" + f.next(), nil }
func (f *fakeFDs) listener(string) (string, error) { return "fd=" + f.next(), nil }
func (f *fakeFDs) tap(vmpod.NIC) (string, error)   { return "fd=" + f.next(), nil }
func (f *fakeFDs) opened(*os.File) string          { return "/proc/self/fd/" + f.next() }
func (f *fakeFDs) extra() []string                 { return nil }

// TestArgvAllowList checks each argument of the fullest command line against
// what may stand there, and that nothing a pod says is among it.
func TestArgvAllowList(t *testing.T) {
	allowed := map[string]*regexp.Regexp{
		"-name":           regexp.MustCompile(`^atoll-[A-Za-z0-9._-]+$`),
		"-uuid":           regexp.MustCompile(`^[0-9a-f-]{36}$`),
		"-display":        regexp.MustCompile(`^none$`),
		"-machine":        regexp.MustCompile(`^q35,memory-backend=ram,vmport=off,sata=off,smbus=off,i8042=off,dump-guest-core=off$`),
		"-object":         regexp.MustCompile(`^(memory-backend-ram,id=ram,size=\d+M|rng-random,id=rng,filename=/dev/urandom)$`),
		"-m":              regexp.MustCompile(`^\d+M,maxmem=\d+M$`),
		"-smp":            regexp.MustCompile(`^\d+,sockets=1,cores=\d+,threads=1,maxcpus=\d+$`),
		"-rtc":            regexp.MustCompile(`^base=utc,clock=host$`),
		"-action":         regexp.MustCompile(`^reboot=shutdown,shutdown=pause,panic=pause$`),
		"-accel":          regexp.MustCompile(`^(kvm|tcg,tb-size=\d+)$`),
		"-cpu":            regexp.MustCompile(`^(host|max)$`),
		"-sandbox":        regexp.MustCompile(`^on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny$`),
		"-kernel":         regexp.MustCompile(`^/proc/self/fd/\d$`),
		"-initrd":         regexp.MustCompile(`^/proc/self/fd/\d$`),
		"-append":         cmdlineRE,
		"-chardev":        regexp.MustCompile(`^socket,id=(qmp|agent|con),fd=\d,server=on,wait=off$`),
		"-mon":            regexp.MustCompile(`^chardev=qmp,mode=control$`),
		"-serial":         regexp.MustCompile(`^chardev:con$`),
		"-netdev":         regexp.MustCompile(`^tap,id=net-[a-z0-9-]+,fd=\d$`),
		"-blockdev":       regexp.MustCompile(`^\{[^\\]*"filename":"/dev/fdset/.","read-only":(true|false)\},"node-name":"node-[a-z0-9-]+","read-only":(true|false)\}$`),
		"-device":         regexp.MustCompile(`^(vmgenid,guid=auto,id=vmgenid|pvpanic-pci,id=panic|virtio-(rng|serial|net)-pci,[a-z0-9=_.,:-]+|virtserialport,[a-z0-9=_.,]+|pcie-pci-bridge,id=plug,bus=pcie\.0,addr=0x8|\{"addr":"0x[0-9a-f]+","bus":"plug",[a-z0-9":,-]+\})$`),
		"-no-user-config": nil, "-nodefaults": nil, "-S": nil,
	}
	for _, accel := range []Accelerator{AcceleratorKVM, AcceleratorTCG} {
		c := command{spec: fullSpec(), maxCPUs: 5, maxMemory: 8 << 30, guest: Guest{Kernel: "/k", Initrd: "/i", Cmdline: "a=b"}, accel: accel, tscKHz: 2000000, sandbox: true, paused: true}
		args, err := c.argv(&fakeFDs{})
		if err != nil {
			t.Fatal(err)
		}
		for i := 0; i < len(args); i++ {
			value, ok := allowed[args[i]]
			if !ok {
				t.Fatalf("argument %q is not on the list", args[i])
			}
			if value == nil {
				continue
			}
			if i++; !value.MatchString(args[i]) {
				t.Errorf("%s %s: not on the list", args[i-1], args[i])
			}
		}
		line := strings.Join(args, " ")
		for _, text := range []string{"evil", "/var/lib"} {
			if strings.Contains(line, text) {
				t.Errorf("%q is on the command line: %s", text, line)
			}
		}
		if !slices.Contains(args, "301M,maxmem=8192M") {
			t.Errorf("memory is not rounded up: %s", line)
		}
		if tcg := strings.Contains(line, "tsc_early_khz"); tcg != (accel == AcceleratorTCG) {
			t.Errorf("%s: TSC on the kernel's command line: %v", accel, tcg)
		}
	}
}

func TestCheckSpec(t *testing.T) {
	if err := checkSpec(fullSpec()); err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*vmpod.Spec){
		"pod UID with a comma":  func(s *vmpod.Spec) { s.ID.PodUID = "a,b" },
		"pod UID with a dot":    func(s *vmpod.Spec) { s.ID.PodUID = ".." },
		"pod UID too long":      func(s *vmpod.Spec) { s.ID.PodUID = strings.Repeat("a", 65) },
		"too many CPUs":         func(s *vmpod.Spec) { s.CPUs = 256 },
		"negative memory":       func(s *vmpod.Spec) { s.Memory = -1 },
		"pool that climbs":      func(s *vmpod.Spec) { s.Pool = "a/../../b" },
		"absolute pool":         func(s *vmpod.Spec) { s.Pool = "/a" },
		"disk ID in upper case": func(s *vmpod.Spec) { s.Disks[0].ID = "A" },
		"disk ID too long":      func(s *vmpod.Spec) { s.Disks[0].ID = strings.Repeat("a", 21) },
		"disk format":           func(s *vmpod.Spec) { s.Disks[0].Format = "qcow2" },
		"disk URL":              func(s *vmpod.Spec) { s.Disks[0].Path = "nbd:host:1" },
		"too many disks":        func(s *vmpod.Spec) { s.Disks = make([]vmpod.Disk, plugSlots+1) },
		"NIC ID with an equals": func(s *vmpod.Spec) { s.NICs[0].ID = "a=b" },
		"tap with a comma":      func(s *vmpod.Spec) { s.NICs[0].Tap = "a,script=x" },
		"tap too long":          func(s *vmpod.Spec) { s.NICs[0].Tap = "a123456789012345" },
		"multicast MAC":         func(s *vmpod.Spec) { s.NICs[0].MAC = net.HardwareAddr{1, 0, 0, 0, 0, 1} },
		"short MAC":             func(s *vmpod.Spec) { s.NICs[0].MAC = s.NICs[0].MAC[:5] },
		"MTU":                   func(s *vmpod.Spec) { s.NICs[0].MTU = 67 },
		"two NICs of one ID":    func(s *vmpod.Spec) { s.NICs = append(s.NICs, s.NICs[0]) },
	} {
		s := fullSpec()
		change(&s)
		if err := checkSpec(s); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v, want InvalidArgument", name, err)
		}
	}
}

func TestGuestCheck(t *testing.T) {
	for _, g := range []Guest{
		{}, {Kernel: "rel", Initrd: "/etc/hostname"}, {Kernel: "/etc", Initrd: "/etc/hostname"},
		{Kernel: "/etc/hostname", Initrd: "/etc/hostname", Cmdline: "a\nb"},
		{Kernel: "/etc/hostname", Initrd: "/etc/hostname", Cmdline: `a"b`},
	} {
		if err := g.check(); err == nil {
			t.Errorf("guest %+v passes", g)
		}
	}
}

func TestRewriteExtents(t *testing.T) {
	in := "# Disk DescriptorFile\nRW 8 FLAT \"a b.img\" 0\nRDONLY 16 FLAT \"/x/c.img\" 128\n#DDB\nddb.adapterType = \"ide\"\n"
	var names []string
	out, err := rewriteExtents(in, func(n string) (string, error) {
		names = append(names, n)
		return fdsetPath(len(names)), nil
	})
	if err != nil {
		t.Fatal(err)
	}
	want := "# Disk DescriptorFile\nRW 8 FLAT \"/dev/fdset/1\" 0\nRW 16 FLAT \"/dev/fdset/2\" 128\n#DDB\nddb.adapterType = \"ide\"\n"
	if out != want || !slices.Equal(names, []string{"a b.img", "/x/c.img"}) {
		t.Errorf("rewriteExtents: %q, %q", out, names)
	}
	for _, bad := range []string{"# Disk DescriptorFile\n", "RW 8 SPARSE \"a\"\n", "RW 8 FLAT a 0\n", "RW 8 ZERO\nRW 8 VMFS \"x\" 0\n"} {
		if _, err := rewriteExtents(bad, func(string) (string, error) { return "", nil }); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %v, want InvalidArgument", bad, err)
		}
	}
}
