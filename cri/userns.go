package cri

import (
	"fmt"

	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/openatoll/atoll/vmpod/agentapi"
)

// featureUserNamespaces is the guest's word for them.
const featureUserNamespaces = "userns"

// userNamespace reads the options of a pod: nil is the VM's own users. A pod
// has one range for users and groups alike, which begins at the containers'
// id 0; it is a range of the guest's ids, not of the node's.
func userNamespace(field string, o *runtimeapi.UserNamespace) (*agentapi.IDMap, error) {
	if o == nil {
		return nil, nil
	}
	switch o.Mode {
	case runtimeapi.NamespaceMode_NODE:
		if len(o.Uids) > 0 || len(o.Gids) > 0 {
			return nil, refuse(field, "mode NODE with mappings: leave them out, or use POD")
		}
		return nil, nil
	case runtimeapi.NamespaceMode_POD:
	default:
		return nil, refuse(field+".mode", fmt.Sprintf("%s: use POD or NODE", o.Mode))
	}
	if len(o.Uids) != 1 || len(o.Gids) != 1 || !proto.Equal(o.Uids[0], o.Gids[0]) {
		return nil, refuse(field, "want one mapping, the same for users and groups")
	}
	m := o.Uids[0]
	switch {
	case m.ContainerId != 0:
		return nil, refuse(field, fmt.Sprintf("the mapping begins at id %d of containers: it must begin at 0", m.ContainerId))
	case m.Length == 0 || uint64(m.HostId)+uint64(m.Length) > 1<<32-1:
		return nil, refuse(field, fmt.Sprintf("host ids %d and the next %d: want at least one, all below %d", m.HostId, m.Length, uint32(1<<32-1)))
	}
	return &agentapi.IDMap{First: m.HostId, Length: m.Length}, nil
}

// checkUserNamespace: a container is in its pod's namespace.
func checkUserNamespace(sb *sandbox, o *runtimeapi.NamespaceOption) error {
	const field = "namespace_options.userns_options"
	pod, err := userNamespace(field, sb.Config.GetLinux().GetSecurityContext().GetNamespaceOptions().GetUsernsOptions())
	if err != nil || o == nil { // a client without options means the pod's
		return err
	}
	own, err := userNamespace(field, o.GetUsernsOptions())
	if err == nil && !proto.Equal(pod, own) {
		err = refuse(field, "differ from the sandbox's: give the container the same")
	}
	return err
}

// checkMountMappings allows what a kubelet sends for a pod with a user
// namespace: the pod's own mapping, which every volume in the guest has
// anyway.
func checkMountMappings(m *runtimeapi.Mount, o *runtimeapi.UserNamespace) error {
	if len(m.UidMappings) == 0 && len(m.GidMappings) == 0 {
		return nil
	}
	same := &runtimeapi.UserNamespace{Mode: o.GetMode(), Uids: m.UidMappings, Gids: m.GidMappings}
	if o == nil || !proto.Equal(same, o) {
		return refuse("config.mounts", fmt.Sprintf("%s: its id mappings are not those of the pod's user namespace", m.ContainerPath))
	}
	return nil
}
