//go:build !amd64

package qemu

import (
	"runtime"
	"time"
)

func probeKVM(time.Duration) KVMStatus {
	return KVMStatus{Reason: "pod VMs on " + runtime.GOARCH + " are not supported"}
}
