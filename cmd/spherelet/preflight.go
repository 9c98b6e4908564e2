package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strconv"

	"github.com/containerd/errdefs"

	"github.com/openatoll/atoll/api/v1alpha1"
	"github.com/openatoll/atoll/spherelet"
	"github.com/openatoll/atoll/spherelet/config"
	"github.com/openatoll/atoll/storage"
	"github.com/openatoll/atoll/vmpod/guestimage"
	"github.com/openatoll/atoll/vmpod/qemu"
)

// preflight says whether a node could run here, line by line. It changes
// nothing.
func preflight(ctx context.Context, cfg *v1alpha1.SphereletConfiguration, out io.Writer) error {
	var errs []error
	report := func(what, good string, err error) {
		if err != nil {
			fmt.Fprintf(out, "FAIL  %-16s %v\n", what, err)
			errs = append(errs, fmt.Errorf("%s: %w", what, err))
			return
		}
		fmt.Fprintf(out, "ok    %-16s %s\n", what, good)
	}
	p := config.PathsOf(cfg)
	report("data directory", cfg.DataDir, config.CheckVersion(p.Version))
	ip, err := spherelet.NodeIP(cfg)
	report("node address", ip.String(), err)
	if err == nil {
		report("port", strconv.Itoa(int(cfg.Port)), portFree(ip.String(), cfg.Port, "port"))
	}
	if cfg.HealthPort > 0 {
		report("health port", strconv.Itoa(int(cfg.HealthPort)), portFree("127.0.0.1", cfg.HealthPort, "healthPort"))
	}
	_, err = os.Stat(cfg.ClientCAFile)
	report("client CA", cfg.ClientCAFile, err)
	report("credentials", cfg.Kubeconfig, credentials(cfg))
	guest, err := guestimage.Load(cfg.Hypervisor.Guest)
	report("guest", guest.Flavour+" kernel "+guest.KernelRelease, err)
	for _, tool := range [][2]string{{cfg.Hypervisor.QEMU, "qemu-system-x86"}, {"mkfs.ext4", "e2fsprogs"}, {"nft", "nftables"}} {
		path, err := exec.LookPath(tool[0])
		if err != nil {
			err = fmt.Errorf("%s is not installed: apt-get install %s: %w", tool[0], tool[1], errdefs.ErrNotFound)
		}
		report(tool[1], path, err)
	}
	if !cfg.Storage.Disabled {
		if path, err := exec.LookPath("mkfs.xfs"); err != nil {
			fmt.Fprintf(out, "warn  %-16s mkfs.xfs is not installed: volumes of file system xfs cannot be mounted: apt-get install xfsprogs\n", "xfsprogs")
		} else {
			report("xfsprogs", path, nil)
		}
	}
	if why := needsQEMUImg(cfg.Storage); why != "" {
		for _, tool := range []string{"qemu-img", "qemu-io"} {
			path, err := exec.LookPath(tool)
			if err != nil {
				err = fmt.Errorf("%s is not installed, and %s: apt-get install qemu-utils: %w", tool, why, errdefs.ErrNotFound)
			}
			report(tool, path, err)
		}
	}
	if len(cfg.HostDirectories) > 0 {
		path, err := qemu.FindVirtiofsd(ctx)
		report("virtiofsd", path, err)
	}
	_, _, _, err = vmUser(cfg.Hypervisor.User)
	report("user of QEMU", cfg.Hypervisor.User, err)
	kvm, err := probeKVM(ctx, p.VMs)
	if err != nil {
		return err
	}
	switch {
	case kvm.Usable:
		report("KVM", "usable", nil)
	case cfg.Hypervisor.Accelerator == config.AcceleratorKVM:
		report("KVM", "", fmt.Errorf("%s: enable virtualisation, or set hypervisor.accelerator to auto: %w", kvm.Reason, errdefs.ErrFailedPrecondition))
	default:
		fmt.Fprintf(out, "warn  %-16s unusable: %s; pod VMs will be emulated, which is slow and no security boundary\n", "KVM", kvm.Reason)
	}
	return errors.Join(errs...)
}

// needsQEMUImg says which datastore has volumes that qemu-img and qemu-io make;
// "" for none.
func needsQEMUImg(s v1alpha1.StorageConfiguration) string {
	if s.Disabled {
		return ""
	}
	for _, d := range s.Datastores {
		if d.Format == storage.FormatQCOW2 {
			return "datastore " + d.Name + " has volumes of format qcow2"
		}
		for _, p := range d.Policies {
			if p.Encrypted {
				return "policy " + p.Name + " of datastore " + d.Name + " is encrypted"
			}
		}
	}
	return ""
}

// probeKVM uses what a node of this directory has found out, if there was one.
func probeKVM(ctx context.Context, vms string) (qemu.KVMStatus, error) {
	if _, err := os.Stat(vms); err == nil {
		return qemu.ProbeKVM(ctx, vms), nil
	}
	dir, err := os.MkdirTemp("", "atoll-check-")
	if err != nil {
		return qemu.KVMStatus{}, err
	}
	return qemu.ProbeKVM(ctx, dir), os.RemoveAll(dir)
}

func portFree(ip string, port int32, key string) error {
	l, err := net.Listen("tcp", net.JoinHostPort(ip, strconv.Itoa(int(port))))
	if err != nil {
		return fmt.Errorf("%w: stop what uses the port, or set another %s", err, key)
	}
	return l.Close()
}

func credentials(cfg *v1alpha1.SphereletConfiguration) error {
	for _, f := range []string{cfg.Kubeconfig, cfg.BootstrapKubeconfig} {
		if _, err := os.Stat(f); f != "" && err == nil {
			return nil
		}
	}
	return fmt.Errorf("neither kubeconfig %s nor bootstrapKubeconfig %q is there: set bootstrapKubeconfig to a file with a bootstrap token: %w",
		cfg.Kubeconfig, cfg.BootstrapKubeconfig, errdefs.ErrNotFound)
}
