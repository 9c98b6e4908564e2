package qemu

import (
	"strconv"

	govmm "github.com/kata-containers/kata-containers/src/runtime/pkg/govmm/qemu"
)

// Nothing on q35's root bus can be plugged or unplugged. So disks, and NICs
// that come later, sit behind one PCIe-to-PCI bridge, whose 31 slots ACPI
// hot-plugs; it costs the boot nothing, where as many PCIe root ports cost
// 0.3 s of emulation (docs/decisions/0003-qemu-command-line.md). NICs of the
// boot are on the root bus, in fixed slots that keep their order.
const (
	plugBus      = "plug"
	plugSlots    = 30 // 1 to 30; the bridge's controller has slot 0
	growSlot     = 31 // of the device by which the VM's memory grows
	maxBootNICs  = 4
	firstNICSlot = 0x10 // on pcie.0, clear of what QEMU places itself
)

// plugAddress is the PCI address on plugBus of slot 1 to plugSlots.
func plugAddress(slot int) string { return hexAddr(slot) }

func hexAddr(n int) string { return "0x" + strconv.FormatInt(int64(n), 16) }

// plugBridge is the bridge. govmm's type for bridges knows no PCIe-to-PCI one.
func plugBridge() govmm.Device {
	return arg{"-device", "pcie-pci-bridge,id=" + plugBus + ",bus=pcie.0,addr=0x8"}
}
