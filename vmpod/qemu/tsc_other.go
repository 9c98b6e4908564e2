//go:build !amd64

package qemu

// hostTSCkHz: only x86 has a TSC.
func hostTSCkHz() int { return 0 }
