package cri

import (
	"testing"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func TestUserNamespace(t *testing.T) {
	ids := func(container, host, length uint32) []*runtimeapi.IDMapping {
		return []*runtimeapi.IDMapping{{ContainerId: container, HostId: host, Length: length}}
	}
	for name, c := range map[string]struct {
		mode       runtimeapi.NamespaceMode
		uids, gids []*runtimeapi.IDMapping
		ok         bool
	}{
		"the pod's":           {runtimeapi.NamespaceMode_POD, ids(0, 1000, 100000), ids(0, 1000, 100000), true},
		"the VM's":            {runtimeapi.NamespaceMode_NODE, nil, nil, true},
		"the VM's, mapped":    {runtimeapi.NamespaceMode_NODE, ids(0, 1, 1), ids(0, 1, 1), false},
		"no mapping":          {runtimeapi.NamespaceMode_POD, nil, nil, false},
		"two":                 {runtimeapi.NamespaceMode_POD, append(ids(0, 1, 1), ids(1, 5, 1)...), append(ids(0, 1, 1), ids(1, 5, 1)...), false},
		"groups differ":       {runtimeapi.NamespaceMode_POD, ids(0, 1000, 10), ids(0, 2000, 10), false},
		"root is not mapped":  {runtimeapi.NamespaceMode_POD, ids(1, 1000, 10), ids(1, 1000, 10), false},
		"empty":               {runtimeapi.NamespaceMode_POD, ids(0, 1000, 0), ids(0, 1000, 0), false},
		"beyond the last":     {runtimeapi.NamespaceMode_POD, ids(0, 1<<32-2, 10), ids(0, 1<<32-2, 10), false},
		"a container's":       {runtimeapi.NamespaceMode_CONTAINER, nil, nil, false},
		"another container's": {runtimeapi.NamespaceMode_TARGET, nil, nil, false},
	} {
		m, err := userNamespace("f", &runtimeapi.UserNamespace{Mode: c.mode, Uids: c.uids, Gids: c.gids})
		if c.ok && err != nil || !c.ok && !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", name, err)
		}
		if err == nil && (m != nil) != (c.mode == runtimeapi.NamespaceMode_POD) {
			t.Errorf("%s: %v", name, m)
		}
	}
}

func TestMappingsOfAMount(t *testing.T) {
	ids := []*runtimeapi.IDMapping{{HostId: 1000, Length: 10}}
	pod := &runtimeapi.UserNamespace{Mode: runtimeapi.NamespaceMode_POD, Uids: ids, Gids: ids}
	if err := checkMountMappings(&runtimeapi.Mount{UidMappings: ids, GidMappings: ids}, pod); err != nil {
		t.Error(err)
	}
	for name, m := range map[string]*runtimeapi.Mount{"half": {UidMappings: ids}, "another": {UidMappings: ids, GidMappings: []*runtimeapi.IDMapping{{HostId: 1, Length: 1}}}} {
		if err := checkMountMappings(m, pod); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := checkMountMappings(&runtimeapi.Mount{UidMappings: ids, GidMappings: ids}, nil); !errdefs.IsInvalidArgument(err) {
		t.Errorf("without a namespace: %v", err)
	}
}
