package main

import (
	"testing"

	"github.com/containerd/errdefs"
)

// Metrics have no login, and are for this host alone.
func TestListen(t *testing.T) {
	for _, address := range []string{"0.0.0.0:0", ":0", "192.0.2.1:9470", "localhost:0", "127.0.0.1"} {
		if l, err := listen(address); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v, %v", address, l, err)
		}
	}
	if l, err := listen(""); l != nil || err != nil {
		t.Errorf("none: %v, %v", l, err)
	}
	l, err := listen("127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
}

// What is called like a flag of a library's must not be one.
func TestFlags(t *testing.T) {
	kubeconfig, address, err := parse([]string{"--kubeconfig", "k", "--metrics-address", "m"})
	if kubeconfig != "k" || address != "m" || err != nil {
		t.Errorf("%q, %q, %v", kubeconfig, address, err)
	}
}

func TestNoKubeconfig(t *testing.T) {
	if err := run(t.Context(), "", ""); !errdefs.IsInvalidArgument(err) {
		t.Errorf("without a kubeconfig: %v", err)
	}
}
