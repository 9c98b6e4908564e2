package qemu

// MaxDisks is how many disks one VM can have, plugged or from the start, with
// a slot left for a NIC that is plugged.
const MaxDisks = plugSlots - 1
