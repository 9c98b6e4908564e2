#!/bin/bash
# Builds the tuned kernel of pod VMs from the distribution's source package.
#
#   build.sh [-C] OUT
#
# OUT/<hash>/vmlinux and OUT/<hash>/kernel.json result, the hash being that of
# the configuration fragment and the source's version: what is there is not
# built again. -C only makes and checks the configuration. JOBS (default: the
# number of CPUs) is the parallelism; about 13 CPU-minutes and 1.5 GB of disk
# are needed for a while, in OUT/work.
set -euo pipefail

fail() { echo "guest-kernel: $*" >&2; exit 1; }

check_only=
if [ "${1:-}" = -C ]; then check_only=1; shift; fi
[ $# -eq 1 ] || fail "usage: build.sh [-C] OUT"
mkdir -p "$1"
out=$(cd "$1" && pwd)
fragment=$(cd "$(dirname "$0")" && pwd)/podvm.config
series=6.1
package=linux-source-$series
tarball=/usr/src/$package.tar.xz

cure="run \`apt-get install $package flex bison libelf-dev libssl-dev bc xz-utils gcc make\`"
[ -f "$tarball" ] || fail "$tarball is missing: $cure"
for tool in flex bison bc xz gcc make tar; do
	command -v $tool >/dev/null || fail "$tool is not installed: $cure"
done
source=$(dpkg-query -W -f '${Version}' "$package" 2>/dev/null) || source=$(sha256sum "$tarball" | cut -c1-16)
fragment_hash=$(sha256sum "$fragment" | cut -d' ' -f1)
hash=$(printf '%s %s\n' "$fragment_hash" "$source" | sha256sum | cut -c1-16)
dest=$out/$hash
if [ -z "$check_only" ] && [ -f "$dest/kernel.json" ] && [ -f "$dest/vmlinux" ]; then
	echo "guest-kernel: $dest is up to date" >&2
	exit 0
fi

# One build at a time in OUT: the work tree is shared, so that a change of the
# configuration rebuilds only what it touches.
exec 9>"$out/.lock"
flock -n 9 || fail "another build runs in $out: wait for it"

work=$out/work
if [ "$(cat "$work/.source" 2>/dev/null)" != "$source" ]; then
	rm -rf "$work"
	mkdir -p "$work"
	echo "guest-kernel: unpacking $tarball" >&2
	tar -C "$work" --strip-components=1 -xJf "$tarball"
	echo "$source" >"$work/.source"
fi
cd "$work"

# The same fragment and source must give the same kernel, wherever it is built.
export KBUILD_BUILD_TIMESTAMP='1970-01-01' KBUILD_BUILD_USER=atoll KBUILD_BUILD_HOST=atoll KBUILD_BUILD_VERSION=1
export KCONFIG_ALLCONFIG=$fragment
make -s allnoconfig

lost=
while IFS= read -r line; do
	case $line in
	CONFIG_*=*) grep -qxF -- "$line" .config || lost="$lost"$'\n'"  $line" ;;
	'# CONFIG_'*' is not set')
		option=${line#\# }
		option=${option%% *}
		! grep -q "^$option=" .config || lost="$lost"$'\n'"  $line" ;;
	esac
done <"$fragment"
[ -z "$lost" ] || fail "these lines of $fragment did not survive (a dependency is missing, or the option does not exist in $source):$lost"
if [ -n "$check_only" ]; then
	echo "guest-kernel: the configuration holds, $(grep -c '=y' .config) options are on" >&2
	exit 0
fi

make -s -j"${JOBS:-$(nproc)}" vmlinux
release=$(make -s kernelrelease)
rm -rf "$dest.new" && mkdir "$dest.new"
# Symbols are not needed to boot: 4/5 of the file.
objcopy --strip-all vmlinux "$dest.new/vmlinux"
cp .config "$dest.new/config"
cat >"$dest.new/kernel.json" <<JSON
{"release": "$release", "fragment": "$fragment_hash", "source": "$source"}
JSON
rm -rf "$dest" && mv "$dest.new" "$dest"
cd "$out" && rm -rf "$work"
echo "guest-kernel: $dest/vmlinux ($release)" >&2
