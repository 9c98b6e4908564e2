// Command inguest is what package bench runs inside a container:
//
//	inguest fork N PROGRAM [ARG…]      fork, exec and wait, N times; prints microseconds, one a line
//	inguest lines BYTES LINE SECONDS   writes lines of LINE bytes, as fast as it can, until either bound
//	inguest read N DIR DIR             drops the kernel's caches, reads the files of one DIR; turn by turn; prints the microseconds of both, N lines
//	inguest diskfile FILE MIB          makes a file without holes
//	inguest disk FILE BLOCKS           reads and writes that file past the kernel's cache, in order and BLOCKS of 4 KiB at random places; prints four times in microseconds
//	inguest wait                       until it is killed
//
// It is static and starts nothing but what it is told to. As PID 1 of a guest
// that was booted by hand it does what "disk" does, on the guest's first disk,
// for each line on the console.
package main

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"strconv"
	"syscall"
	"time"
)

func main() {
	if os.Getpid() == 1 && len(os.Args) == 1 {
		fmt.Println("raw guest:", raw())
		for { // else the kernel panics, and what was said is lost
			time.Sleep(time.Hour)
		}
	}
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "inguest:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	switch {
	case len(args) >= 3 && args[0] == "fork":
		n, err := strconv.Atoi(args[1])
		if err != nil {
			return err
		}
		return fork(n, args[2:])
	case len(args) == 4 && args[0] == "lines":
		var n [3]int
		for i := range n {
			var err error
			if n[i], err = strconv.Atoi(args[i+1]); err != nil || n[i] < 1 {
				return fmt.Errorf("%q is not a positive number", args[i+1])
			}
		}
		return lines(n[0], n[1], time.Duration(n[2])*time.Second)
	}
	switch {
	case len(args) == 3 && (args[0] == "disk" || args[0] == "diskfile"):
		n, err := strconv.Atoi(args[2])
		if err != nil {
			return err
		}
		if args[0] == "diskfile" {
			return diskFile(args[1], n)
		}
		out, err := diskTurn(args[1], n)
		if err == nil {
			fmt.Println(out)
		}
		return err
	case len(args) == 4 && args[0] == "read":
		n, err := strconv.Atoi(args[1])
		if err != nil {
			return err
		}
		return readTurns(n, [2]string(args[2:]))
	case len(args) == 1 && args[0] == "wait":
		for {
			time.Sleep(time.Hour)
		}
	}
	return fmt.Errorf("unknown arguments %q", args)
}

var readBuffer = make([]byte, 1<<20)

func readTurns(n int, dirs [2]string) error {
	for turn := range n {
		var took [2]time.Duration
		for i := range dirs {
			i = (i + turn) % 2
			var err error
			if took[i], err = read(dirs[i]); err != nil {
				return err
			}
		}
		fmt.Println(took[0].Microseconds(), took[1].Microseconds())
	}
	return nil
}

func read(dir string) (time.Duration, error) {
	if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0); err != nil {
		return 0, err
	}
	files, err := os.ReadDir(dir)
	if err != nil {
		return 0, err
	}
	start := time.Now()
	for _, e := range files {
		f, err := os.Open(dir + "/" + e.Name())
		if err != nil {
			return 0, err
		}
		for {
			_, err := f.Read(readBuffer)
			if err == io.EOF {
				break
			}
			if err != nil {
				return 0, err
			}
		}
		f.Close()
	}
	return time.Since(start), nil
}

func fork(n int, argv []string) error {
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	attr := &syscall.ProcAttr{Files: []uintptr{null.Fd(), null.Fd(), null.Fd()}}
	for range n {
		start := time.Now()
		pid, err := syscall.ForkExec(argv[0], argv, attr)
		if err != nil {
			return err
		}
		var ws syscall.WaitStatus
		if _, err := syscall.Wait4(pid, &ws, 0, nil); err != nil {
			return err
		}
		if ws.ExitStatus() != 0 {
			return fmt.Errorf("%s ended with %d", argv[0], ws.ExitStatus())
		}
		fmt.Println(time.Since(start).Microseconds())
	}
	return nil
}

func lines(total, length int, limit time.Duration) error {
	line := append(bytes.Repeat([]byte{'x'}, length-1), '\n')
	block := bytes.Repeat(line, max(1, 32<<10/length))
	for end := time.Now().Add(limit); total > 0 && time.Now().Before(end); {
		n, err := os.Stdout.Write(block[:min(len(block), total)])
		if err != nil {
			return err
		}
		total -= n
	}
	return nil
}
