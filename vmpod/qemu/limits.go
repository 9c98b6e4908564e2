package qemu

// MaxDisks is how many disks one VM can have, plugged or from the start. A NIC
// that is plugged, and a share, take the place of one.
const MaxDisks = plugSlots
