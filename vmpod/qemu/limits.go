package qemu

// MaxDisks is how many disks one VM can have beside one NIC, plugged or from
// the start. Another NIC that is plugged, and a share, take the place of one.
const MaxDisks = plugSlots - 1
