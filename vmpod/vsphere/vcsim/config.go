package vcsim

import (
	"context"
	"crypto/tls"
	"fmt"
	"log/slog"
	"net/netip"
	"strings"

	"github.com/containerd/errdefs"
)

// Config says what the vCenter is. Its zero value, made complete by New, is
// one with the names that `atoll up` uses, on a free port of 127.0.0.1, that
// forgets everything when it ends.
type Config struct {
	// Dir keeps users and inventory across restarts; made with mode 0700. One
	// process at a time. Empty: nothing is kept.
	Dir string
	// Listen is where TLS is served, an address and a port; 0 takes a free one.
	Listen netip.AddrPort
	// Certificate is shown to clients; nil makes a self-signed one (kept in
	// Dir), whose thumbprint Server.Thumbprint returns.
	Certificate *tls.Certificate
	// CA is the PEM of the authority that signed Certificate.
	CA []byte

	// Domain of users and groups; empty: vsphere.local.
	Domain string
	// AdminPassword is the administrator's at the first start only, for tests;
	// empty makes a random one, in Dir/admin.password (0600).
	AdminPassword string
	// PasswordRounds of PBKDF2 for passwords that are set from now on; 0: what
	// OWASP advises. Tests take fewer.
	PasswordRounds int

	// Datacenter's name; empty: Atoll.
	Datacenter string
	// Clusters and their hosts; nil: one cluster named "atoll" without hosts.
	// A host or cluster that was there before and is listed no more stays, a
	// host as "not responding", as a vCenter keeps what it lost.
	Clusters []Cluster
	// Datastores of all hosts; nil: one named "atoll".
	Datastores []Datastore
	// Policies are the storage policies made at start; nil: one that fits every
	// datastore, "Atoll Default Storage Policy". Policies that users made are
	// kept beside them.
	Policies []Policy

	// Power is asked to do a power operation on a mirror; nil refuses them all.
	// An error refuses it, and its text is the reason that the caller is given.
	Power func(ctx context.Context, r PowerRequest) error

	// Logger; nil: slog.Default().
	Logger *slog.Logger
}

// A Cluster of hosts.
type Cluster struct {
	Name  string
	Hosts []Host
}

// A Host is shown with what it has.
type Host struct {
	// Name is the node's.
	Name string
	// CPUs are logical processors; 0: unknown, shown as 2.
	CPUs int
	// MHz of one; 0: unknown, shown as 2294.
	MHz int
	// Memory in bytes; 0: unknown, shown as 4 GiB.
	Memory int64
	// State is how it is.
	State HostState
}

// A Datastore of the inventory.
type Datastore struct {
	Name string
	// Capacity and Free in bytes; 0: those of the file system that holds Dir.
	Capacity, Free int64
}

// A Policy is a storage policy, of PBM.
type Policy struct {
	// ID is a UUID; empty: derived from Name.
	ID   string
	Name string
	// Description may be empty.
	Description string
	// Datastores it is compatible with, by name; nil: all.
	Datastores []string
}

// complete returns c with its defaults, or ErrInvalidArgument.
func (c Config) complete() (Config, error) {
	if !c.Listen.IsValid() {
		c.Listen = netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), 0)
	}
	if c.PasswordRounds <= 0 {
		c.PasswordRounds = hashRounds
	}
	if c.Domain == "" {
		c.Domain = DefaultDomain
	}
	if c.Datacenter == "" {
		c.Datacenter = "Atoll"
	}
	if c.Clusters == nil {
		c.Clusters = []Cluster{{Name: "atoll"}}
	}
	if c.Datastores == nil {
		c.Datastores = []Datastore{{Name: "atoll"}}
	}
	if c.Policies == nil {
		c.Policies = []Policy{{Name: "Atoll Default Storage Policy", Description: "Any datastore"}}
	}
	if c.Logger == nil {
		c.Logger = slog.Default()
	}
	c.Logger = c.Logger.With("component", "vcsim")
	return c, c.validate()
}

func (c Config) validate() error {
	seen := map[string]bool{}
	check := func(kind, name string) error {
		switch {
		case name == "" || len(name) > 80 || strings.ContainsAny(name, "/\\%\n"):
			return fmt.Errorf("vcsim: %s name %q: 1 to 80 characters, without / \\ %%: %w", kind, name, errdefs.ErrInvalidArgument)
		case seen[kind+"/"+name]:
			return fmt.Errorf("vcsim: two %ss are named %q: %w", kind, name, errdefs.ErrInvalidArgument)
		}
		seen[kind+"/"+name] = true
		return nil
	}
	if err := check("datacenter", c.Datacenter); err != nil {
		return err
	}
	for _, cl := range c.Clusters {
		if err := check("cluster", cl.Name); err != nil {
			return err
		}
		for _, h := range cl.Hosts {
			if err := check("host", h.Name); err != nil {
				return err
			}
		}
	}
	for _, d := range c.Datastores {
		if err := check("datastore", d.Name); err != nil {
			return err
		}
	}
	for _, p := range c.Policies {
		if err := check("policy", p.Name); err != nil {
			return err
		}
	}
	return nil
}
