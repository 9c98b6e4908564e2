package cri

import (
	"context"
	"errors"
	"strings"
	"testing"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// What a checking driver and a network say.
type missingDriver struct {
	fakeDriver
	err error
}

func (d missingDriver) Ready(context.Context) error { return d.err }

type missingNetwork struct {
	fakeNetwork
	err error
}

func (n missingNetwork) Ready(context.Context) error { return n.err }

// A condition that is false says what is missing.
func TestConditions(t *testing.T) {
	h := newFakeHost()
	for _, c := range []struct{ driver, network error }{
		{nil, nil}, {errors.New("the guest's kernel is not at /k"), nil}, {nil, errors.New("the node has no pod CIDR yet")},
	} {
		s := serve(t, h, t.TempDir(), func(o *Config) {
			o.Driver, o.Network = missingDriver{fakeDriver{h}, c.driver}, missingNetwork{fakeNetwork{h}, c.network}
		})
		st, err := s.rt.Status(t.Context(), &runtimeapi.StatusRequest{Verbose: true})
		if err != nil {
			t.Fatal(err)
		}
		for i, want := range []error{c.driver, c.network} {
			got := st.Status.Conditions[i]
			if got.Status != (want == nil) || want != nil && (got.Message != want.Error() || got.Reason == "" || !strings.Contains(st.Info["config"], want.Error())) {
				t.Errorf("condition %v, info %s; want %v", got, st.Info["config"], want)
			}
		}
	}
	config, err := serve(t, h, t.TempDir()).rt.RuntimeConfig(t.Context(), &runtimeapi.RuntimeConfigRequest{})
	if err != nil || config.Linux.CgroupDriver != runtimeapi.CgroupDriver_CGROUPFS {
		t.Errorf("RuntimeConfig = %v, %v", config, err)
	}
}
