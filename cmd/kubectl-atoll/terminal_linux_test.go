package main

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/creack/pty"
	"golang.org/x/term"
)

// TestTerminal types at a terminal: the name is seen, the password is not.
func TestTerminal(t *testing.T) {
	near, far, err := pty.Open()
	if err != nil {
		t.Fatal(err)
	}
	defer near.Close()
	defer far.Close()
	screen := watch(near)
	ui := terminal{in: far, out: far}
	t.Setenv(passwordEnv, "")

	name := make(chan string, 1)
	go func() { s, _ := ui.line(t.Context(), "User name: "); name <- s }()
	screen.await(t, "User name: ")
	io.WriteString(near, "ada@vsphere.local\n")
	if got := <-name; got != "ada@vsphere.local" {
		t.Errorf("name %q", got)
	}
	password := make(chan string, 1)
	go func() { s, _ := ui.password(t.Context(), "ada", false); password <- s }()
	screen.await(t, "Password of ada: ")
	untilQuiet(t, far)
	io.WriteString(near, "s3same\n")
	if got := <-password; got != "s3same" {
		t.Errorf("password %q", got)
	}
	// The line's end is the last that is shown.
	screen.await(t, "Password of ada: \r\n")
	if s := screen.text(); !strings.Contains(s, "ada@vsphere.local") || strings.Contains(s, "s3same") {
		t.Errorf("on the screen: %q", s)
	}

	// Ctrl-C leaves a terminal that shows what is typed.
	before, err := term.GetState(int(far.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	ctx, interrupt := context.WithCancel(t.Context())
	failed := make(chan error, 1)
	go func() { _, err := ui.password(ctx, "bob", false); failed <- err }()
	screen.await(t, "Password of bob: ")
	untilQuiet(t, far)
	interrupt()
	if err := <-failed; !errors.Is(err, context.Canceled) {
		t.Errorf("interrupted: %v", err)
	}
	io.WriteString(near, "\n") // for the read that is still under way
	if after, err := term.GetState(int(far.Fd())); err != nil || *after != *before {
		t.Errorf("the terminal is not as it was: %v", err)
	}
}

// untilQuiet returns when the terminal has stopped to show what is typed.
func untilQuiet(t *testing.T, f *os.File) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); echoes(t, f); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the terminal goes on showing what is typed")
		}
	}
}

// A watched terminal keeps what it shows.
type watched struct {
	shown bytes.Buffer
	more  chan []byte
}

func watch(near *os.File) *watched {
	w := &watched{more: make(chan []byte, 64)}
	go func() {
		for {
			b := make([]byte, 256)
			n, err := near.Read(b)
			if err != nil {
				close(w.more)
				return
			}
			w.more <- b[:n]
		}
	}()
	return w
}

func (w *watched) await(t *testing.T, text string) {
	t.Helper()
	deadline := time.After(time.Minute)
	for !strings.Contains(w.shown.String(), text) {
		select {
		case b := <-w.more:
			w.shown.Write(b)
		case <-deadline:
			t.Fatalf("no %q on the screen: %q", text, w.text())
		}
	}
}

func (w *watched) text() string { return w.shown.String() }
