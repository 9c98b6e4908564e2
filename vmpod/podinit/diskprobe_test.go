package podinit

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/openatoll/atoll/vmpod"
	"github.com/openatoll/atoll/vmpod/agentapi"
)

// TestProbe puts one thing at a time onto a blank disk.
func TestProbe(t *testing.T) {
	const size = 8 << 20
	for _, tt := range []struct {
		name  string
		at    int64
		data  string
		kind  string
		noise bool
	}{
		{"nothing", 0, "", "", false},
		{"ext4", 1080, "\x53\xef", "ext4", false},
		{"xfs", 0, "XFSB", "xfs", false},
		{"btrfs", 65600, "_BHRfS_M", "btrfs", false},
		{"LUKS", 0, "LUKS\xba\xbe\x00\x02", "LUKS", false},
		{"LVM", 512, "LABELONE", "LVM", false},
		{"GPT", 512, "EFI PART", "GPT", false},
		{"GPT of large sectors", 4096, "EFI PART", "GPT", false},
		{"the backup of a GPT", size - 512, "EFI PART", "GPT", false},
		{"MBR", 510, "\x55\xaa", "partition table", false},
		{"FAT", 82, "FAT32   ", "FAT", false},
		{"swap", 4086, "SWAPSPACE2", "swap", false},
		{"RAID", size - 65536, "\xfc\x4e\x2b\xa9", "RAID", false},
		{"a byte at the start", 0, "\x01", "unknown kind (at byte 0)", false},
		{"a byte in the first MiB", 1<<20 - 1, "\x01", "unknown kind (at byte 1048575)", false},
		{"a byte in the last MiB", size - 1<<20, "\x01", "unknown kind (1048576 bytes before its end)", false},
		{"the last byte", size - 1, "\x01", "unknown kind (1 bytes before its end)", false},
		{"noise behind the first MiB", size - 100, "noise", "", true},
		{"a byte in the first MiB of noise", 4711, "\x80", "unknown kind (at byte 4711)", true},
		{"a formatting that was cut off", 0, string(formMark) + strings.Repeat("x", 4096), "", false},
		{"something like it", 0, string(formMark[:40]) + "x", "unknown kind", false},
	} {
		f := sparse(t, size)
		if _, err := f.WriteAt([]byte(tt.data), tt.at); err != nil {
			t.Fatal(err)
		}
		got, bytes, err := probeDisk(f, tt.noise)
		if err != nil || bytes != size || got.blank != (tt.kind == "") || !strings.Contains(got.kind, tt.kind) {
			t.Errorf("%s: %+v, %d, %v; want %q", tt.name, got, bytes, err, tt.kind)
		}
	}
}

func sparse(t *testing.T, size int64) *os.File {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "disk"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	return f
}

// TestProbeOfRealDisks asks about what the tools make.
func TestProbeOfRealDisks(t *testing.T) {
	for kind, command := range map[string][]string{
		"ext4":                   {"mkfs.ext4", "-q"},
		"xfs":                    {"mkfs.xfs", "-q"},
		"btrfs":                  {"mkfs.btrfs", "-q"},
		"swap space":             {"mkswap"},
		"a FAT file system":      {"mkfs.vfat"},
		"a LUKS container":       {"cryptsetup", "luksFormat", "-q", "--pbkdf-force-iterations", "1000", "--pbkdf", "pbkdf2", "--key-file", "/proc/version"},
		"an LVM physical volume": {"pvcreate", "-q"},
		"a partition table":      {"sh", "-c", `echo ',,83' | sfdisk -q "$0"`},
		"a GPT partition table":  {"sh", "-c", `printf 'label: gpt\n,,\n' | sfdisk -q "$0"`},
	} {
		t.Run(kind, func(t *testing.T) {
			if _, err := exec.LookPath(command[0]); err != nil {
				t.Skipf("%s is not installed", command[0])
			}
			f := sparse(t, 320<<20)
			if out, err := exec.CommandContext(t.Context(), command[0], append(command[1:], f.Name())...).CombinedOutput(); err != nil {
				t.Skipf("%v: %v: %s", command, err, out)
			}
			if got, _, err := probeDisk(f, false); err != nil || got.kind != kind {
				t.Errorf("%+v, %v", got, err)
			}
		})
	}
}

// A cutDisk stops taking writes after a number of them, as a VM that is killed
// does, and remembers what a sync has made sure of.
type cutDisk struct {
	*os.File
	left int
}

var errCut = errors.New("cut")

func (c *cutDisk) WriteAt(b []byte, at int64) (int, error) {
	if c.left--; c.left < 0 {
		return 0, errCut
	}
	return c.File.WriteAt(b, at)
}

func (c *cutDisk) Sync() error {
	if c.left--; c.left < 0 {
		return errCut
	}
	return nil
}

// extents is a small "file system" in FORMAT's form.
func extents(t *testing.T, head []byte) []byte {
	t.Helper()
	var b bytes.Buffer
	for _, e := range []agentapi.Extent{{Offset: 0, Data: head}, {Offset: 1 << 20, Data: []byte("inodes")}, {Offset: 2 << 20, Data: []byte("journal")}} {
		if err := agentapi.WriteExtent(&b, e); err != nil {
			t.Fatal(err)
		}
	}
	return b.Bytes()
}

// TestFormCut cuts a formatting off at every write and sync: the disk is blank
// or formatted, and formatting it again works.
func TestFormCut(t *testing.T) {
	ext4 := make([]byte, 8192)
	copy(ext4[1080:], "\x53\xef")
	ext4[8191] = 7
	xfs := make([]byte, 8192)
	copy(xfs, "XFSB")
	for fsType, head := range map[string][]byte{"ext4": ext4, "xfs": xfs} {
		stream := extents(t, head)
		for cut, done := 0, false; !done; cut++ {
			f := sparse(t, 4<<20)
			err := form(&cutDisk{f, cut}, 4<<20, fsType, bytes.NewReader(stream))
			done = err == nil
			if !done && !errors.Is(err, errCut) {
				t.Fatal(err)
			}
			found, _, err := probeDisk(f, false)
			if err != nil || found.blank == (found.kind == fsType) {
				t.Fatalf("%s after %d steps: %+v, %v", fsType, cut, found, err)
			}
			if done && found.blank {
				t.Fatalf("%s: done, and blank", fsType)
			}
			if !found.blank {
				checkFormed(t, f, head)
				continue
			}
			if err := form(f, 4<<20, fsType, bytes.NewReader(stream)); err != nil {
				t.Fatal(err)
			}
			checkFormed(t, f, head)
			if cut > 100 {
				t.Fatal("it never ends")
			}
		}
	}
}

func checkFormed(t *testing.T, f *os.File, head []byte) {
	t.Helper()
	b, err := io.ReadAll(io.NewSectionReader(f, 0, 4<<20))
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(b[:len(head)], head) || string(b[1<<20:1<<20+6]) != "inodes" || string(b[2<<20:2<<20+7]) != "journal" {
		t.Errorf("what was sent is not on the disk")
	}
}

// TestFormRefused sends what must not become a file system.
func TestFormRefused(t *testing.T) {
	good := make([]byte, 4096)
	copy(good[1080:], "\x53\xef")
	var outside bytes.Buffer
	if err := agentapi.WriteExtent(&outside, agentapi.Extent{Offset: 4<<20 - 1, Data: []byte("xx")}); err != nil {
		t.Fatal(err)
	}
	huge := binary.BigEndian.AppendUint64(binary.BigEndian.AppendUint64(nil, 0), 1<<30)
	for name, stream := range map[string][]byte{
		"nothing":          nil,
		"another kind":     extents(t, append([]byte("XFSB"), make([]byte, 4092)...)),
		"cut in the data":  extents(t, good)[:3000],
		"cut in a header":  append(extents(t, good), 0, 0),
		"outside":          outside.Bytes(),
		"too long at once": append(huge, 1),
	} {
		f := sparse(t, 4<<20)
		if err := form(f, 4<<20, "ext4", bytes.NewReader(stream)); err == nil {
			t.Errorf("%s was taken", name)
		}
		if found, _, err := probeDisk(f, false); err != nil || !found.blank {
			t.Errorf("%s: the disk is left as %+v, %v", name, found, err)
		}
	}
}

// TestMountArguments holds the options that a record may carry against those
// that the guest knows.
func TestMountArguments(t *testing.T) {
	for o := range mountFlags {
		if err := vmpod.CheckMountOptions([]string{o}); err != nil {
			t.Error(err)
		}
	}
	for _, o := range []string{"discard", "nodiscard", "ro", "rw", "noatime", "lazytime", "nosuid", "dev", "dirsync", "nobarrier", "barrier=0", "data=writeback", "norecovery", "sb=1", "context=system_u"} {
		_, _, err := mountArguments(&agentapi.VolumeDisk{FsType: "ext4", Options: []string{o}})
		if want := vmpod.CheckMountOptions([]string{o}); (err == nil) != (want == nil) || err != nil && !errdefs.IsInvalidArgument(err) {
			t.Errorf("option %s: the guest says %v, the host %v", o, err, want)
		}
	}
	if _, data, err := mountArguments(&agentapi.VolumeDisk{FsType: "xfs", Options: []string{"nodiscard"}}); err != nil || strings.Join(data, ",") != "nouuid" {
		t.Errorf("%v, %v", data, err)
	}
}
