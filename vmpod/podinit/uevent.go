package podinit

import (
	"context"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"
)

// waitDevice calls found until it says true, again after each event that the
// kernel announces, for at most the given time. what names the device.
func waitDevice(ctx context.Context, what string, limit time.Duration, found func() (bool, error)) error {
	if ok, err := found(); ok || err != nil {
		return err
	}
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_KOBJECT_UEVENT)
	if err != nil {
		return fmt.Errorf("wait for %s: %w", what, err)
	}
	defer unix.Close(fd)
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: 1}); err != nil {
		return fmt.Errorf("wait for %s: %w", what, err)
	}
	deadline := time.Now().Add(limit)
	buf := make([]byte, 8<<10)
	for {
		// It may have come before the socket was bound, or with this event.
		if ok, err := found(); ok || err != nil {
			return err
		}
		left := time.Until(deadline)
		if left <= 0 || ctx.Err() != nil {
			return fmt.Errorf("%s did not appear within %v: %w", what, limit, errNoDevice)
		}
		tv := unix.NsecToTimeval(int64(min(left, time.Second)) + 1000)
		if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv); err != nil {
			return err
		}
		_, _, err := unix.Recvfrom(fd, buf, 0)
		if err != nil && !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EINTR) && !errors.Is(err, unix.ENOBUFS) {
			return fmt.Errorf("wait for %s: %w", what, err)
		}
	}
}
