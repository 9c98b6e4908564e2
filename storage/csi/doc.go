// Package csi serves storage.Disks as a CSI driver, csi.atoll.dev: identity,
// controller and node service of the Container Storage Interface on one unix
// socket.
//
// The node service mounts nothing on the host. It writes a vmpod.VolumeRecord
// where the kubelet wants a mount or a device; the pod's VM gets the disk, and
// the guest makes and mounts its file system. Statistics and the growth of file
// systems are asked of the guest.
//
// There is no ControllerPublishVolume: who has a volume open is decided by
// storage.Attacher when the disk is plugged.
package csi
