package qemu

import (
	"strconv"

	govmm "github.com/kata-containers/kata-containers/src/runtime/pkg/govmm/qemu"
)

// Disks sit on PCIe root ports, since nothing on q35's root bus itself can be
// plugged or unplugged; NICs of the boot sit on the root bus, which is cheaper.
const (
	// hotplugSlots is how many disks and plugged NICs a VM can have.
	hotplugSlots = 16
	maxBootNICs  = 4
	// firstNICSlot and firstPortSlot are PCI device numbers on pcie.0. Fixed
	// ones, so that the guest's interfaces keep their order.
	firstNICSlot  = 0x08
	firstPortSlot = 0x10
	portsPerSlot  = 8 // PCI functions
)

func portName(i int) string { return "rp" + strconv.Itoa(i) }

// hotplugPorts are the root ports, 8 functions to a slot.
func hotplugPorts() []govmm.Device {
	var devs []govmm.Device
	for i := range hotplugSlots {
		n := strconv.Itoa(i + 1)
		devs = append(devs, govmm.PCIeRootPortDevice{
			ID: portName(i), Chassis: n, Slot: n, Multifunction: true,
			Addr: hexAddr(firstPortSlot+i/portsPerSlot) + "." + strconv.Itoa(i%portsPerSlot),
			// A virtio device needs memory, no I/O ports, and nothing below it.
			IOReserve: "0",
		})
	}
	return devs
}
