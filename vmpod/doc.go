// Package vmpod defines what a pod virtual machine is: the plain-data Spec a
// machine is made from, the Driver that makes machines on one host, and the
// Machine that results. Nothing here knows QEMU, vSphere, CRI or Kubernetes;
// vmpod/qemu and vmpod/vsphere implement it, vmpod/vmpodtest judges them, and
// package cri consumes it.
package vmpod
