package tap

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Cleanup removes everything that a Network with this configuration has made
// in the present network namespace (taps with their routes, the nftables
// table, the records), and turns forwarding off again if it was the Network
// that turned it on. Only cfg.StateDir matters; the directory itself may be
// gone. No Network of that directory may be in use. What fails does not stop
// the rest; Cleanup may be repeated.
func Cleanup(ctx context.Context, cfg Config) error {
	dir, err := filepath.Abs(cfg.StateDir)
	if err != nil {
		return err
	}
	instance := instanceOf(dir)
	nl, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("pod network: netlink: %w", err)
	}
	defer nl.Close()

	taps, err := markedTaps(nl, instance)
	errs := []error{err}
	for _, name := range taps {
		errs = append(errs, removeTapOf(nl, instance, name))
	}
	// A tap whose mark could not be set any more before a crash.
	records, err := (store{dir: filepath.Join(dir, "attachments")}).names()
	errs = append(errs, err)
	for _, name := range records {
		errs = append(errs, removeTapOf(nl, instance, name))
	}
	fw, err := newFirewall(instance, cfg)
	if err == nil {
		err = fw.drop(ctx)
	}
	errs = append(errs, err, restoreForwarding(dir))
	if errors.Join(errs...) == nil {
		errs = append(errs, os.RemoveAll(filepath.Join(dir, "attachments")))
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("pod network: clean up: %w", err)
	}
	return nil
}
