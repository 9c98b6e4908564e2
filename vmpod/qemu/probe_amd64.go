package qemu

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// KVM's ioctls and structures (linux/kvm.h, x86).
const (
	kvmGetAPIVersion       = 0xae00
	kvmCreateVM            = 0xae01
	kvmGetVCPUMmapSize     = 0xae04
	kvmCreateVCPU          = 0xae41
	kvmSetUserMemoryRegion = 0x4020ae46
	kvmRun                 = 0xae80
	kvmSetRegs             = 0x4090ae82
	kvmGetSregs            = 0x8138ae83
	kvmSetSregs            = 0x4138ae84

	kvmExitIO        = 2
	kvmExitHlt       = 5
	kvmExitReasonOff = 8 // in struct kvm_run
)

type kvmMemoryRegion struct {
	slot, flags                uint32
	guestAddr, size, userspace uint64
}

type kvmRegs struct {
	rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp uint64
	r8, r9, r10, r11, r12, r13, r14, r15   uint64
	rip, rflags                            uint64
}

type kvmSegment struct {
	base                           uint64
	limit                          uint32
	selector                       uint16
	typ, present, dpl, db, s, l, g uint8
	avl, unusable, padding         uint8
}

type kvmTable struct {
	base    uint64
	limit   uint16
	padding [3]uint16
}

type kvmSregs struct {
	cs, ds, es, fs, gs, ss, tr, ldt kvmSegment
	gdt, idt                        kvmTable
	cr0, cr2, cr3, cr4, cr8         uint64
	efer, apicBase                  uint64
	interrupts                      [4]uint64
}

func ioctl(fd int, request uintptr, arg uintptr) (int, error) {
	r, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), request, arg)
	if e != 0 {
		return 0, e
	}
	return int(r), nil
}

// probeKVM runs a virtual CPU in long mode that counts probeLoops down, then
// writes to a port. Real virtualisation does that at the CPU's speed; KVM on
// a host that lacks it interprets instruction by instruction, if at all.
func probeKVM(limit time.Duration) KVMStatus {
	vcpu, run, err := probeVCPU()
	if err != nil {
		return KVMStatus{Reason: err.Error()}
	}
	runtime.LockOSThread()
	thread, begin := unix.Gettid(), time.Now()
	// KVM_RUN ends with EINTR when its thread gets a signal; Go's own
	// pre-emption signal is one that the runtime expects at any time.
	kick := time.AfterFunc(limit, func() { _ = unix.Tgkill(unix.Getpid(), thread, unix.SIGURG) })
	defer kick.Stop()
	for {
		_, err := ioctl(vcpu, kvmRun, 0)
		switch reason := binary.LittleEndian.Uint32(run[kvmExitReasonOff:]); {
		case errors.Is(err, unix.EINTR) || errors.Is(err, unix.EAGAIN):
			if time.Since(begin) >= limit {
				return KVMStatus{Reason: reasonSlow}
			}
		case err != nil:
			return KVMStatus{Reason: "cannot run a guest: " + err.Error()}
		case reason == kvmExitIO || reason == kvmExitHlt:
			if time.Since(begin) >= limit {
				return KVMStatus{Reason: reasonSlow}
			}
			return KVMStatus{Usable: true}
		default:
			return KVMStatus{Reason: fmt.Sprintf("cannot run a guest: KVM exit %d", reason)}
		}
	}
}

// probeVCPU sets up the CPU and its 4 MiB of memory: page tables that map the
// first 4 MiB onto themselves, code at 0x1000.
func probeVCPU() (vcpu int, run []byte, err error) {
	kvm, err := unix.Open("/dev/kvm", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0, nil, fmt.Errorf("cannot open /dev/kvm: %w", err)
	}
	if v, err := ioctl(kvm, kvmGetAPIVersion, 0); err != nil || v != 12 {
		return 0, nil, fmt.Errorf("/dev/kvm has API version %d (%v), not 12", v, err)
	}
	vm, err := ioctl(kvm, kvmCreateVM, 0)
	if err != nil {
		return 0, nil, os.NewSyscallError("KVM_CREATE_VM", err)
	}
	const size = 4 << 20
	mem, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_ANONYMOUS)
	if err != nil {
		return 0, nil, os.NewSyscallError("mmap", err)
	}
	region := kvmMemoryRegion{size: size, userspace: uint64(uintptr(unsafe.Pointer(&mem[0])))}
	if _, err := ioctl(vm, kvmSetUserMemoryRegion, uintptr(unsafe.Pointer(&region))); err != nil {
		return 0, nil, os.NewSyscallError("KVM_SET_USER_MEMORY_REGION", err)
	}
	if vcpu, err = ioctl(vm, kvmCreateVCPU, 0); err != nil {
		return 0, nil, os.NewSyscallError("KVM_CREATE_VCPU", err)
	}
	n, err := ioctl(kvm, kvmGetVCPUMmapSize, 0)
	if err != nil {
		return 0, nil, os.NewSyscallError("KVM_GET_VCPU_MMAP_SIZE", err)
	}
	if run, err = unix.Mmap(vcpu, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err != nil {
		return 0, nil, os.NewSyscallError("mmap", err)
	}
	return vcpu, run, probeProgram(vcpu, mem)
}

func probeProgram(vcpu int, mem []byte) error {
	code := []byte{
		0xb9, 0, 0, 0, 0, // mov ecx, probeLoops
		0xff, 0xc9, // dec ecx
		0x75, 0xfc, // jnz to the dec
		0xba, 0xf8, 0x03, 0, 0, // mov edx, 0x3f8
		0xee, // out dx, al
		0xf4, // hlt
	}
	binary.LittleEndian.PutUint32(code[1:], probeLoops)
	copy(mem[0x1000:], code)
	for addr, entry := range map[int]uint64{
		0x10000: 0x11003, 0x11000: 0x12003, // levels 4 and 3: present, writable
		0x12000: 0x83, 0x12008: 0x200083, // level 2: two pages of 2 MiB
	} {
		binary.LittleEndian.PutUint64(mem[addr:], entry)
	}
	var s kvmSregs
	if _, err := ioctl(vcpu, kvmGetSregs, uintptr(unsafe.Pointer(&s))); err != nil {
		return os.NewSyscallError("KVM_GET_SREGS", err)
	}
	s.cr0, s.cr3, s.cr4, s.efer = 0x80050033, 0x10000, 0x20, 0x500 // paging, PAE, long mode
	data := kvmSegment{limit: 0xffffffff, selector: 16, typ: 3, present: 1, db: 1, s: 1, g: 1}
	s.cs = kvmSegment{limit: 0xffffffff, selector: 8, typ: 11, present: 1, s: 1, l: 1, g: 1}
	s.ds, s.es, s.fs, s.gs, s.ss = data, data, data, data, data
	if _, err := ioctl(vcpu, kvmSetSregs, uintptr(unsafe.Pointer(&s))); err != nil {
		return os.NewSyscallError("KVM_SET_SREGS", err)
	}
	r := kvmRegs{rip: 0x1000, rsp: 0x8000, rflags: 2}
	if _, err := ioctl(vcpu, kvmSetRegs, uintptr(unsafe.Pointer(&r))); err != nil {
		return os.NewSyscallError("KVM_SET_REGS", err)
	}
	return nil
}
