package hostnet

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"testing"
)

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("network namespaces need root")
	}
}

func TestNamespaceLifecycle(t *testing.T) {
	needRoot(t)
	name := fmt.Sprintf("atoll-test-%d", os.Getpid())
	t.Cleanup(func() { _ = Remove(name) })
	for i, want := range []bool{true, false} {
		made, err := Ensure(name)
		if err != nil || made != want {
			t.Fatalf("Ensure #%d = %v, %v; want %v", i+1, made, err, want)
		}
	}
	// A listener made inside is reached from inside and not from here.
	var l net.Listener
	err := Do(Path(name), func() (err error) {
		l, err = net.Listen("tcp4", "127.0.0.1:0")
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	conn, err := Dialer(Path(name))(t.Context(), "tcp", l.Addr().String())
	if err != nil {
		t.Fatalf("dial from inside: %v", err)
	}
	conn.Close()
	if conn, err := Dialer("")(t.Context(), "tcp", l.Addr().String()); err == nil {
		conn.Close()
		t.Error("reached from outside")
	}
	for range 2 {
		if err := Remove(name); err != nil {
			t.Fatal(err)
		}
	}
	if ok, err := Exists(name); ok || err != nil {
		t.Errorf("Exists after Remove = %v, %v", ok, err)
	}
}

func TestEnsureReplacesAStaleFile(t *testing.T) {
	needRoot(t)
	name := fmt.Sprintf("atoll-stale-%d", os.Getpid())
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(Path(name), nil, 0o444); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = Remove(name) })
	if made, err := Ensure(name); err != nil || !made {
		t.Fatalf("Ensure = %v, %v; want true", made, err)
	}
}

func TestDoWithoutNamespace(t *testing.T) {
	err := Do(Path("atoll-no-such"), func() error { t.Error("ran"); return nil })
	if !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("err = %v, want fs.ErrNotExist", err)
	}
}
