#!/usr/bin/env bash
# Installs what Atoll needs from Debian 12, and nothing when it is all there.
#
#   deploy/deps.sh                what a host needs to build and run Atoll
#   DEPS=test deploy/deps.sh      what `make test` needs as well
#   DEPS=kernel deploy/deps.sh    what `make guest-kernel` needs as well
#   DEPS=critest deploy/deps.sh   what `make critest` needs as well
#   DEPS=generate deploy/deps.sh  what `make generate` needs as well
set -euo pipefail

# Minimum Go, as go.mod has it.
go_minimum=1.26

# A package and what it is for, on one line each.
host_packages() {
	cat <<'LIST'
qemu-system-x86          the VM monitor of every pod
linux-image-cloud-amd64  the guest kernel
crun                     containers inside the guest
xz-utils                 compressed modules of the guest kernel
busybox-static           the demo image atoll.local/busybox
e2fsprogs                mkfs.ext4: writable disks, volumes
xfsprogs                 mkfs.xfs: volumes that want xfs
qemu-utils               qemu-img, qemu-io: volumes in qcow2, encrypted ones
nftables                 nft: Services
ca-certificates          registries' TLS
dpkg-dev                 the source of the guest's crun, which is built static
gcc                      its compiler
libc6-dev                its libraries: libc,
libcap-dev               capabilities,
libseccomp-dev           system call filters,
libyajl-dev              JSON
make                     its build, and this one
LIST
}

extra_packages() {
	case "${DEPS:-}" in
	test) # EROFS to compare ours with, ip, the race detector's C compiler, critest's busybox, scripts,
		# what else a disk may hold that must not be formatted
		for p in erofs-utils iproute2 procps gcc libc6-dev make bzip2 util-linux curl git fdisk dosfstools btrfs-progs cryptsetup-bin; do echo "$p"; done ;;
	kernel)
		for p in linux-source-6.1 build-essential flex bison libelf-dev libssl-dev bc xz-utils; do echo "$p"; done ;;
	critest) # busybox is compiled; the suite runs ipcmk
		for p in build-essential bzip2 util-linux; do echo "$p"; done ;;
	generate)
		echo protobuf-compiler ;;
	"") ;;
	*)
		echo "deps: DEPS=$DEPS is not known; use test, kernel, critest, generate or nothing" >&2
		exit 2 ;;
	esac
}

installed() { [ "$(dpkg-query -W -f='${db:Status-Status}' "$1" 2>/dev/null)" = installed ]; }

check_go() {
	local have
	if ! command -v go >/dev/null; then
		echo "deps: Go is not installed; install Go $go_minimum or newer from https://go.dev/dl and put it in PATH" >&2
		exit 1
	fi
	have=$(go env GOVERSION | sed 's/^go//')
	if [ "$(printf '%s\n%s\n' "$go_minimum" "$have" | sort -V | head -n1)" != "$go_minimum" ]; then
		echo "deps: Go $have is too old; install Go $go_minimum or newer from https://go.dev/dl" >&2
		exit 1
	fi
}

main() {
	check_go
	if ! command -v dpkg-query >/dev/null; then
		echo "deps: this is not Debian; install the equivalents of these yourself:" >&2
		host_packages | sed 's/^/  /' >&2
		exit 1
	fi
	local missing=() p
	for p in $(host_packages | awk '{print $1}') $(extra_packages); do
		installed "$p" || missing+=("$p")
	done
	if [ ${#missing[@]} -eq 0 ]; then
		return 0
	fi
	if [ "$(id -u)" != 0 ]; then
		echo "deps: these packages are missing: ${missing[*]}" >&2
		echo "deps: only root may install them; run: sudo make deps" >&2
		exit 1
	fi
	echo "deps: installing ${missing[*]}"
	export DEBIAN_FRONTEND=noninteractive
	apt-get update -qq </dev/null
	apt-get install -y -qq --no-install-recommends "${missing[@]}" </dev/null
}

main "$@"
