#!/bin/bash
# Builds the guest's crun, static, from the source of the installed package:
# docs/decisions/0001-crun-in-the-guest.md says why.
#
#   build.sh [--once|--quiet] OUT
#
# OUT/crun and OUT/crun.json result; what is there is not built again. With
# --once a failure is remembered, and neither an error nor tried again: the guest
# gets the distribution's crun. --quiet says nothing of what is there. It takes
# about 20 CPU-seconds. The source comes from the Debian archive that this machine
# uses, checked by apt, with Debian's patches.
set -euo pipefail

fail() { echo "guest-crun: $*" >&2; exit 1; }

once= quiet=
case "${1:-}" in
--once) once=1 && shift ;;
--quiet) quiet=1 && shift ;;
esac
[ $# -eq 1 ] || fail "usage: build.sh [--once|--quiet] OUT"
mkdir -p "$1"
out=$(cd "$1" && pwd)
script=$(sha256sum "$0" | cut -d' ' -f1)
if [ -n "$once" ]; then
	tried="$script $(sha256sum <"$(command -v crun || echo /dev/null)" | cut -d' ' -f1)"
	[ "$(cat "$out/failed" 2>/dev/null)" != "$tried" ] || exit 0
	"$0" --quiet "$out" && exit 0
	echo "$tried" >"$out/failed"
	echo "guest-crun: the guest gets the distribution's crun; \`make guest-crun\` tries again" >&2
	exit 0
fi
cure="run \`make deps\`"
for tool in gcc make strip dpkg-source crun; do
	command -v $tool >/dev/null || fail "$tool is not installed: $cure"
done
version=$(dpkg-query -W -f '${source:Version}' crun) || fail "the crun here is no package of the distribution"
installed=$(sha256sum "$(command -v crun)" | cut -d' ' -f1)
record="{\"version\": \"$version\", \"script\": \"$script\", \"installed\": \"$installed\"}"
if [ -f "$out/crun" ] && [ "$(cat "$out/crun.json" 2>/dev/null)" = "$record" ]; then
	[ -n "$quiet" ] || echo "guest-crun: $out/crun is up to date" >&2
	exit 0
fi

exec 9>"$out/.lock"
flock -n 9 || fail "another build runs in $out: wait for it"
work=$out/work
rm -rf "$work"
mkdir -p "$work/parts" "$work/lists/partial"
trap 'rm -rf "$work"' EXIT

# The machine's Debian archives, as archives of sources, and nobody else's.
grep -l debian.org /etc/apt/sources.list.d/*.sources 2>/dev/null | while read -r f; do
	sed 's/^Types:.*/Types: deb-src/' "$f" >"$work/parts/$(basename "$f")"
done || true
if [ -f /etc/apt/sources.list ]; then
	sed -n 's/^deb \(.*debian\.org.*\)/deb-src \1/p' /etc/apt/sources.list >"$work/parts/main.list"
fi
archive=(-qq -o Dir::Etc::sourcelist=/dev/null -o "Dir::Etc::sourceparts=$work/parts" -o "Dir::State::lists=$work/lists" -o APT::Sandbox::User=root)
cd "$work"
apt-get "${archive[@]}" update
apt-get "${archive[@]}" source "crun=$version" >"$work/log" 2>&1 || { cat "$work/log" >&2; fail "the source of crun $version cannot be had"; }
cd "$work"/crun-*/

# No PIE: a program at fixed addresses starts with nothing to relocate, and an
# emulator can use again what it has translated. Debian's other hardening stays.
libs=$(dirname "$(gcc -print-file-name=libyajl_s.a)")
[ -f "$libs/libyajl_s.a" ] || fail "libyajl_s.a is missing: $cure"
mkdir "$work/lib"
ln -s "$libs/libyajl_s.a" "$work/lib/libyajl.a"
build() { "$@" >>"$work/log" 2>&1 || { tail -n 40 "$work/log" >&2; fail "$1 failed"; }; }
flags="-O2 -fno-pie -fstack-protector-strong -fstack-clash-protection -fcf-protection -D_FORTIFY_SOURCE=2"
# Nothing is built that Python would use; configure only insists on one.
build ./configure --disable-systemd --disable-dl --disable-criu PYTHON=true CPPFLAGS="-I/usr/include/yajl" CFLAGS="$flags" \
	LDFLAGS="-L$work/lib -static -no-pie"
build make git-version.h
build make -j"${JOBS:-$(nproc)}" crun LDFLAGS="-L$work/lib -all-static -no-pie -Wl,-z,relro,-z,now"
strip -o "$out/crun.new" crun
"$out/crun.new" --version | grep -q +SECCOMP || fail "the result has no seccomp"
mv "$out/crun.new" "$out/crun"
echo "$record" >"$out/crun.json"
rm -f "$out/failed"
echo "guest-crun: $out/crun ($version)" >&2
