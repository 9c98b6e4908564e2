// Command inguest is what package bench runs inside a container:
//
//	inguest fork N PROGRAM [ARG…]      fork, exec and wait, N times; prints microseconds, one a line
//	inguest lines BYTES LINE SECONDS   writes lines of LINE bytes, as fast as it can, until either bound
//
// It is static and starts nothing but what it is told to.
package main

import (
	"bytes"
	"fmt"
	"os"
	"strconv"
	"syscall"
	"time"
)

func main() {
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
	return fmt.Errorf("unknown arguments %q", args)
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
