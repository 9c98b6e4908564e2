#!/bin/busybox sh
# PID 1 of the driver suite's guest. Answers each line on the agent port with
# one line; guest.go lists the commands.
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev 2>/dev/null
for m in /modules/*; do insmod "$m"; done

button() {
	head -c 1 /dev/input/event0 >/dev/null 2>&1 && poweroff -f
}
button &
button=$!

disk() { # serial -> device
	for d in /sys/block/vd*; do
		[ "$(cat $d/serial 2>/dev/null)" = "$1" ] && echo /dev/${d##*/}
	done
}

answer() {
	case $1 in
	boot) cat /proc/sys/kernel/random/boot_id ;;
	cpus) grep -c ^processor /proc/cpuinfo ;;
	memory) sed -n 's/^MemTotal: *\([0-9]*\).*/\1/p' /proc/meminfo ;;
	disks)
		for d in /sys/block/vd*; do
			[ -e $d ] && printf '%s:%s:%s ' "$(cat $d/serial)" "$(cat $d/size)" "$(cat $d/ro)"
		done
		echo ;;
	nics)
		for n in /sys/class/net/e*; do
			[ -e $n ] && printf '%s:%s ' "$(cat $n/address)" "$(cat $n/mtu)"
		done
		echo ;;
	read) echo "$(head -n 1 "$(disk $2)" | tr -d '\0' | head -c 100)" ;;
	readat) echo "$(tail -c +$(($3 + 1)) "$(disk $2)" | head -n 1 | tr -d '\0' | head -c 100)" ;;
	write) dd if=/dev/zero of="$(disk $2)" bs=1M count=$3 conv=fsync 2>/dev/null && echo ok || echo failed ;;
	mark) echo "$3" | dd of="$(disk $2)" conv=notrunc,fsync 2>/dev/null && echo ok || echo failed ;;
	stamp) # into a block of its own, then into the first one
		for at in $3 0; do
			printf '%08d\n' $3 | dd of="$(disk $2)" bs=4096 seek=$at conv=notrunc,fsync 2>/dev/null || { echo failed; return; }
		done
		echo ok ;;
	pour)
		read begin rest </proc/uptime
		yes atoll | head -c $(($3 << 20)) | dd of="$(disk $2)" bs=64k conv=notrunc,fsync 2>/dev/null || begin=failed
		read end rest </proc/uptime
		echo $begin $end ;;
	online)
		echo online_kernel >/sys/devices/system/memory/auto_online_blocks
		for m in /sys/devices/system/memory/memory*/state; do grep -q offline $m && echo online_kernel >$m; done
		for c in /sys/devices/system/cpu/cpu*/online; do [ "$(cat $c)" = 0 ] && echo 1 >$c; done
		echo ok ;;
	fill)
		mkdir -p /fill && mount -t tmpfs -o size=100% tmpfs /fill
		dd if=/dev/zero of=/fill/x bs=1M count=$2 2>/dev/null && echo ok || echo failed
		umount /fill ;;
	share)
		for m in /demand/*; do insmod "$m" 2>/dev/null; done
		mkdir -p /share/$2 && mount -t virtiofs $2 /share/$2 2>/dev/null && echo ok || echo failed ;;
	first) head -n 1 $2 2>/dev/null || echo failed ;;
	put) echo "$3" 2>/dev/null >$2 && echo ok || echo failed ;;
	list) echo $(ls -A $2) ;;
	device) mknod $2 c 1 3 2>/dev/null && echo ok || echo failed ;;
	deaf) kill -9 $button; echo ok ;;
	poweroff) poweroff -f ;;
	reboot) reboot -f ;;
	panic) echo c >/proc/sysrq-trigger ;;
	*) echo "$1" ;;
	esac
}

for p in /sys/class/virtio-ports/*; do
	[ "$(cat $p/name)" = atoll.agent ] && port=/dev/${p##*/}
done
exec 3<>$port
while :; do
	# While nobody is connected, read returns at once with nothing.
	if read -r command a b <&3; then
		[ -n "$command" ] && answer $command $a $b >&3
	else
		sleep 0.05
	fi
done
