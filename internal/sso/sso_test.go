package sso

import (
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

// TestOneName holds that every way to write a principal leads to one name.
func TestOneName(t *testing.T) {
	for _, tc := range []struct{ in, want string }{
		{"alice@vsphere.local", "sso:alice@vsphere.local"},
		{"Alice@VSPHERE.LOCAL", "sso:alice@vsphere.local"},
		{`VSPHERE.LOCAL\Alice`, "sso:alice@vsphere.local"},
		{"alice", "sso:alice@vsphere.local"},
		{"a@corp.example@vsphere.local", "sso:a@corp.example@vsphere.local"},
		{"platform admins@corp.example", "sso:platform admins@corp.example"},
		{"root@", "sso:root@localos"},
		{"Zoë@corp.example", "sso:zoë@corp.example"},
	} {
		p, err := Parse(tc.in, DefaultDomain)
		if err != nil || p.Subject() != tc.want {
			t.Errorf("Parse(%q) = %q, %v; want %q", tc.in, p.Subject(), err, tc.want)
			continue
		}
		if q, err := New(strings.ToUpper(p.Name), strings.ToUpper(p.Domain)); err != nil || q != p {
			t.Errorf("New(%q, %q) in capitals = %v, %v", p.Name, p.Domain, q, err)
		}
	}
}

func TestRefused(t *testing.T) {
	for _, s := range []string{
		"", "@vsphere.local", `\alice`[:1], "a\nb@vsphere.local", "a\x00@x", "\xff@vsphere.local",
		"a@vsphere local", "a@x:y", `a\b\c`, strings.Repeat("a", 257) + "@x",
	} {
		if p, err := Parse(s, DefaultDomain); !errdefs.IsInvalidArgument(err) {
			t.Errorf("Parse(%q) = %v, %v; want ErrInvalidArgument", s, p, err)
		}
	}
}
