package cri

import (
	"fmt"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// refuse says that a field cannot be honoured, and what to do instead.
func refuse(field, why string) error {
	return fmt.Errorf("%s: %s: %w", field, why, errdefs.ErrInvalidArgument)
}

// checkSandboxConfig refuses what a pod VM cannot honour. Nothing is silently
// ignored.
func checkSandboxConfig(c *runtimeapi.PodSandboxConfig, handler string) error {
	m := c.GetMetadata()
	if m == nil || m.Name == "" || m.Namespace == "" {
		return refuse("config.metadata", "name and namespace are required")
	}
	if err := checkPodUID(m.Uid); err != nil {
		return err
	}
	for field, text := range map[string]string{"config.metadata.name": m.Name, "config.metadata.namespace": m.Namespace} {
		if err := checkText(field, text, maxNameLength); err != nil {
			return err
		}
	}
	if handler != "" && handler != RuntimeName {
		return refuse("runtime_handler", fmt.Sprintf("%.100q is not known: leave it empty or use %q", handler, RuntimeName))
	}
	if err := checkHostPath("config.log_directory", c.GetLogDirectory()); err != nil {
		return err
	}
	if err := checkNet(c); err != nil {
		return err
	}
	if err := checkSysctls(c.GetLinux().GetSysctls()); err != nil {
		return err
	}
	if err := checkResources("config.linux.resources", c.GetLinux().GetResources()); err != nil {
		return err
	}
	if err := checkResources("config.linux.overhead", c.GetLinux().GetOverhead()); err != nil {
		return err
	}
	if c.GetWindows() != nil {
		return refuse("config.windows", "pod VMs run Linux: use a Windows node")
	}
	sc := c.GetLinux().GetSecurityContext()
	if err := checkNamespaces("config.linux.security_context.namespace_options", sc.GetNamespaceOptions(), true); err != nil {
		return err
	}
	if err := checkLSM("config.linux.security_context", sc.GetApparmor(), ""); err != nil {
		return err
	}
	return nil
}

func checkNamespaces(field string, o *runtimeapi.NamespaceOption, sandbox bool) error {
	const own = "a pod VM has its own kernel and cannot join the node's"
	switch {
	case o.GetNetwork() == runtimeapi.NamespaceMode_NODE:
		return refuse(field+".network", own+" network (hostNetwork): use a Service, or a hostPort where the node's network has them")
	case o.GetPid() == runtimeapi.NamespaceMode_NODE:
		return refuse(field+".pid", own+" processes (hostPID): use shareProcessNamespace to see the pod's")
	case o.GetIpc() == runtimeapi.NamespaceMode_NODE:
		return refuse(field+".ipc", own+" IPC objects (hostIPC): containers of one pod share IPC already")
	case o.GetIpc() == runtimeapi.NamespaceMode_CONTAINER:
		return refuse(field+".ipc", "containers of one pod VM share IPC: use POD")
	case sandbox && o.GetPid() == runtimeapi.NamespaceMode_TARGET:
		return refuse(field+".pid", "TARGET is for containers")
	}
	_, err := userNamespace(field+".userns_options", o.GetUsernsOptions())
	return err
}

// checkLSM refuses AppArmor profiles, which the guest kernel cannot apply.
// SELinux options are let through, as by other runtimes where there is no
// SELinux; a node's admission tells the pod's owner that they have no effect.
func checkLSM(field string, apparmor *runtimeapi.SecurityProfile, old string) error {
	if apparmor != nil && apparmor.ProfileType != runtimeapi.SecurityProfile_Unconfined {
		return refuse(field+".apparmor", "the guest kernel has no AppArmor: leave the profile unset or Unconfined; seccomp works")
	}
	if apparmor == nil && old != "" && old != "unconfined" {
		return refuse(field+".apparmor_profile", "the guest kernel has no AppArmor: leave the profile unset or unconfined; seccomp works")
	}
	return nil
}

// checkContainerConfig refuses what a container in a pod VM cannot honour.
func checkContainerConfig(c *runtimeapi.ContainerConfig) error {
	if c.GetMetadata().GetName() == "" {
		return refuse("config.metadata", "name is required")
	}
	if err := checkText("config.metadata.name", c.Metadata.Name, maxNameLength); err != nil {
		return err
	}
	if c.GetImage().GetImage() == "" {
		return refuse("config.image", "image is required")
	}
	if err := checkFiles(c); err != nil {
		return err
	}
	if err := checkEnvironment(c.GetEnvs()); err != nil {
		return err
	}
	if err := checkResources("config.linux.resources", c.GetLinux().GetResources()); err != nil {
		return err
	}
	if len(c.GetCDIDevices()) > 0 {
		return refuse("config.CDI_devices", fmt.Sprintf("%s: device plug-ins and CDI are not supported in pod VMs", c.CDIDevices[0].Name))
	}
	if c.GetWindows() != nil {
		return refuse("config.windows", "pod VMs run Linux: use a Windows node")
	}
	for _, m := range c.GetMounts() {
		if err := checkMountMappings(m, c.GetLinux().GetSecurityContext().GetNamespaceOptions().GetUsernsOptions()); err != nil {
			return err
		}
	}
	sc := c.GetLinux().GetSecurityContext()
	if err := checkNamespaces("config.linux.security_context.namespace_options", sc.GetNamespaceOptions(), false); err != nil {
		return err
	}
	if err := checkLSM("config.linux.security_context", sc.GetApparmor(), sc.GetApparmorProfile()); err != nil {
		return err
	}
	for _, f := range []struct {
		name string
		id   *runtimeapi.Int64Value
	}{{"run_as_user", sc.GetRunAsUser()}, {"run_as_group", sc.GetRunAsGroup()}} {
		if v := f.id.GetValue(); v < 0 || v > 1<<32-2 {
			return refuse("config.linux.security_context."+f.name, fmt.Sprintf("%d is not an id", v))
		}
	}
	if len(c.GetLinux().GetResources().GetHugepageLimits()) > 0 {
		for _, h := range c.Linux.Resources.HugepageLimits {
			if h.Limit > 0 {
				return refuse("config.linux.resources.hugepage_limits", "guests have no huge pages of "+h.PageSize+": remove the hugepages- resource")
			}
		}
	}
	return nil
}

// checkFiles looks at every path that a container's config names.
func checkFiles(c *runtimeapi.ContainerConfig) error {
	if p := c.GetLogPath(); p != "" && (checkText("config.log_path", p, maxPathLength-1) != nil || !filepath.IsLocal(p) || filepath.Clean(p) == "." || strings.HasSuffix(p, "/")) {
		return refuse("config.log_path", fmt.Sprintf("%.200q: want a file that stays below the pod's log directory", p))
	}
	if err := checkGuestPath("config.working_dir", c.GetWorkingDir()); err != nil {
		return err
	}
	for _, m := range c.GetMounts() {
		if err := checkGuestPath("config.mounts.container_path", m.GetContainerPath()); err != nil {
			return err
		}
		if err := checkGuestPath("config.mounts.host_path", m.GetHostPath()); err != nil {
			return err
		}
	}
	sc := c.GetLinux().GetSecurityContext()
	for field, list := range map[string][]string{"masked_paths": sc.GetMaskedPaths(), "readonly_paths": sc.GetReadonlyPaths()} {
		for _, p := range list {
			if err := checkGuestPath("config.linux.security_context."+field, p); err != nil {
				return err
			}
		}
	}
	return nil
}
