package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
	"unsafe"
)

// Sizes of what a disk is asked for at once.
const (
	seqBytes  = 1 << 20
	randBytes = 4 << 10
)

// diskTurn opens a file past the guest's cache and prints, in microseconds, how
// long it took to read all of it in order, to write all of it in order, and to
// read and to write so many blocks at random places. The file is of whole MiB
// and has no holes. Nothing is flushed within those times, all of it behind
// them.
func diskTurn(file string, blocks int) (string, error) {
	f, err := os.OpenFile(file, os.O_RDWR|syscall.O_DIRECT, 0)
	if err != nil {
		return "", err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return "", err
	}
	size := st.Size()
	if size < seqBytes || size%seqBytes != 0 {
		return "", fmt.Errorf("%s has %d bytes, want whole MiB", file, size)
	}
	buf := aligned(seqBytes)
	for i := range buf {
		buf[i] = byte(i*7 + i>>8 | 1) // no zeroes, which disks may save
	}
	var took [4]int64
	for i, act := range []struct {
		do   func([]byte, int64) (int, error)
		step int64
		n    int
	}{{f.ReadAt, seqBytes, int(size / seqBytes)}, {f.WriteAt, seqBytes, int(size / seqBytes)}, {f.ReadAt, randBytes, blocks}, {f.WriteAt, randBytes, blocks}} {
		places := order(act.n, size/act.step, act.step == randBytes)
		start := time.Now()
		for _, p := range places {
			if _, err := act.do(buf[:act.step], p*act.step); err != nil {
				return "", err
			}
		}
		took[i] = time.Since(start).Microseconds()
		if err := f.Sync(); err != nil {
			return "", err
		}
	}
	return strings.Trim(fmt.Sprint(took), "[]"), nil
}

// order is where the n acts go among so many places: always the same ones.
func order(n int, places int64, random bool) []int64 {
	out := make([]int64, n)
	x := uint64(1)
	for i := range out {
		out[i] = int64(i) % places
		if random {
			x = x*6364136223846793005 + 1442695040888963407 // Knuth's MMIX
			out[i] = int64(x>>33) % places
		}
	}
	return out
}

// aligned is memory that O_DIRECT takes.
func aligned(n int) []byte {
	b := make([]byte, n+randBytes)
	skip := randBytes - int(uintptr(unsafe.Pointer(&b[0]))%randBytes)
	return b[skip : skip+n]
}

// diskFile lays a file of so many MiB out, on the disk when it returns.
func diskFile(file string, mib int) error {
	f, err := os.Create(file)
	if err != nil {
		return err
	}
	block := make([]byte, 1<<20)
	for i := range block {
		block[i] = byte(i*5 | 1)
	}
	for range mib {
		if _, err := f.Write(block); err != nil {
			return err
		}
	}
	return errors.Join(f.Sync(), f.Close())
}

// Where a guest that has nothing but this program has the disk.
const (
	rawDevice = "/dev/vda"
	rawMount  = "/data"
)

// raw is PID 1 of a guest booted by hand: it mounts the disk, and does what
// lines on the console ask for: "FILE BLOCKS".
func raw() error {
	for _, m := range []struct{ what, at string }{{"devtmpfs", "/dev"}, {"proc", "/proc"}} {
		if err := os.MkdirAll(m.at, 0o755); err != nil {
			return err
		}
		if err := syscall.Mount(m.what, m.at, m.what, 0, ""); err != nil && !errors.Is(err, syscall.EBUSY) {
			return fmt.Errorf("mount %s: %w", m.at, err)
		}
	}
	modules, _ := filepath.Glob("/modules/*.ko") // sorted, as they are to be loaded
	for _, m := range modules {
		if err := loadModule(m); err != nil && !errors.Is(err, syscall.EEXIST) {
			fmt.Println(m, err) // some are for devices that this machine has not
		}
	}
	if err := os.MkdirAll(rawMount, 0o755); err != nil {
		return err
	}
	for tries := 0; ; tries++ { // the disk's driver looks for it in its own time
		err := syscall.Mount(rawDevice, rawMount, "ext4", 0, "")
		if err == nil {
			break
		}
		if tries == 200 {
			return fmt.Errorf("mount %s: %w", rawDevice, err)
		}
		time.Sleep(50 * time.Millisecond)
	}
	fmt.Println("\nraw guest ready")
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		words := strings.Fields(lines.Text())
		if len(words) != 2 {
			continue
		}
		blocks, err := strconv.Atoi(words[1])
		if err != nil {
			continue
		}
		out, err := diskTurn(filepath.Join(rawMount, words[0]), blocks)
		if err != nil {
			out = "failed: " + err.Error()
		}
		fmt.Printf("\ntook %s.\n", out)
	}
	return errors.Join(lines.Err(), io.EOF)
}

func loadModule(file string) error {
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	none := []byte{0}
	if _, _, errno := syscall.Syscall(313, f.Fd(), uintptr(unsafe.Pointer(&none[0])), 0); errno != 0 { // finit_module, x86-64
		return errno
	}
	return nil
}
