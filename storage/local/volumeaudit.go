package local

import (
	"context"
	"fmt"
	"os"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/errdefs"

	"github.com/openatoll/atoll/storage"
)

var (
	_ storage.Auditor   = (*Disks)(nil)
	_ storage.Inventory = (*Disks)(nil)
)

// Compliance implements storage.Auditor. A record or file that is not what it
// was is a breach of every policy.
func (x *Disks) Compliance(_ context.Context, id string) (storage.Compliance, error) {
	d, root, r, err := x.openVolume(id)
	switch {
	case errdefs.IsUnavailable(err):
		return verdict(storage.ComplianceUnknown, err.Error()), nil
	case errdefs.IsDataLoss(err):
		return verdict(storage.NonCompliant, plain(err)), nil
	case err != nil:
		return storage.Compliance{}, explain("compliance of volume "+id, err)
	}
	defer root.Close()
	if r == nil {
		return storage.Compliance{}, noVolume(d, id)
	}
	return x.audit(d, root, *r), nil
}

func verdict(state storage.ComplianceState, message string) storage.Compliance {
	return storage.Compliance{State: state, Message: message, At: time.Now()}
}

// audit judges a volume whose record could be read.
func (x *Disks) audit(d *datastore, root *os.Root, r record) storage.Compliance {
	if err := check(root, r); err != nil {
		return verdict(storage.NonCompliant, plain(err))
	}
	if breach := x.breach(d, root, r); breach != "" {
		return verdict(storage.NonCompliant, breach)
	}
	return verdict(storage.Compliant, "")
}

// plain is an error without the name of its class, which the sentence says
// better.
func plain(err error) string {
	return strings.TrimSuffix(err.Error(), ": "+errdefs.ErrDataLoss.Error())
}

// breach says what of the policy a whole volume does not keep, empty if all is
// well. That it keeps more than its policy asks for is none, but for
// encryption, which an admin who ends it means to be rid of.
func (x *Disks) breach(d *datastore, root *os.Root, r record) string {
	p, ok := d.policy(r.Policy)
	switch {
	case !ok:
		return fmt.Sprintf("datastore %s no longer offers policy %s", d.Name, r.Policy)
	case p.Encrypted && !r.Encrypted:
		return fmt.Sprintf("policy %s is encrypted, the volume is older and not", r.Policy)
	case !p.Encrypted && r.Encrypted:
		return fmt.Sprintf("policy %s is no longer encrypted, the volume is", r.Policy)
	case p.Thick && !r.Thick:
		return fmt.Sprintf("policy %s is thick, the volume is older and thin", r.Policy)
	}
	if st, err := root.Lstat(r.Disk.path()); err == nil && r.Thick && r.Disk.Format != storage.FormatQCOW2 {
		if has := st.Sys().(*syscall.Stat_t).Blocks * 512; has < r.Bytes {
			return fmt.Sprintf("policy %s is thick, and only %d of %d bytes are reserved", r.Policy, has, r.Bytes)
		}
	}
	held, _, err := x.holding(root, r.ID)
	if err != nil {
		return plain(err)
	}
	if held != nil && held.Limits != nil && *held.Limits != (limits{p.IOPS, p.BytesPerSecond}) {
		return fmt.Sprintf("policy %s allows %s, the VM that has the volume open %s: new limits hold for the pod's next VM",
			r.Policy, limits{p.IOPS, p.BytesPerSecond}, *held.Limits)
	}
	return ""
}

// limits bound a device, 0 is no bound.
type limits struct {
	IOPS           int64 `json:"iops"`
	BytesPerSecond int64 `json:"bytesPerSecond"`
}

func (l limits) String() string {
	var parts []string
	if l.IOPS > 0 {
		parts = append(parts, fmt.Sprintf("%d IOPS", l.IOPS))
	}
	if l.BytesPerSecond > 0 {
		parts = append(parts, fmt.Sprintf("%d bytes/s", l.BytesPerSecond))
	}
	if parts == nil {
		return "any rate"
	}
	return strings.Join(parts, " and ")
}
