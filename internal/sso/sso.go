// Package sso names the users and groups of vSphere's single sign-on as
// Kubernetes knows them: "sso:NAME@DOMAIN", of users and of groups alike, all in
// lower case. Whoever writes a RoleBinding and whoever signs a user in must
// both take the name from here, or the binding lets nobody in.
package sso

import (
	"fmt"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/containerd/errdefs"
)

const (
	// Prefix sets these names apart from those of certificates and service
	// accounts.
	Prefix = "sso:"
	// LocalDomain is that of the accounts of the vCenter host itself, which
	// vSphere writes without a domain.
	LocalDomain = "localos"
	// DefaultDomain is vSphere's own, and that of a user who names none.
	DefaultDomain = "vsphere.local"
)

// maxName is what vSphere SSO allows a name or a domain, in bytes (Active
// Directory's user principal names end at 256 altogether).
const maxName = 256

// A Principal is a user or a group, in lower case: SSO does not tell cases
// apart, Kubernetes does.
type Principal struct {
	Name   string // without its domain
	Domain string // never empty
}

// New returns the principal of a name and a domain, as an access list has them;
// an empty domain is LocalDomain. A name that cannot be is ErrInvalidArgument.
func New(name, domain string) (Principal, error) {
	if domain == "" {
		domain = LocalDomain
	}
	if err := (Principal{Name: name, Domain: domain}).check(); err != nil {
		return Principal{}, err
	}
	return Principal{Name: strings.ToLower(name), Domain: strings.ToLower(domain)}, nil
}

// Parse reads "NAME@DOMAIN" or "DOMAIN\NAME", the two ways in which vSphere
// writes a principal. What has neither is of the domain given.
func Parse(s, domain string) (Principal, error) {
	if d, name, ok := strings.Cut(s, `\`); ok {
		return New(name, d)
	}
	// A name may hold an "@", a domain cannot.
	if i := strings.LastIndexByte(s, '@'); i >= 0 {
		return New(s[:i], s[i+1:])
	}
	return New(s, domain)
}

func (p Principal) check() error {
	bad := func(why string) error {
		return fmt.Errorf("%q is no user or group of vSphere SSO, %s: write NAME@DOMAIN: %w", p.Name+"@"+p.Domain, why, errdefs.ErrInvalidArgument)
	}
	switch {
	case p.Name == "":
		return bad("the name is empty")
	case len(p.Name) > maxName || len(p.Domain) > maxName:
		return bad(fmt.Sprintf("a name or domain ends at %d bytes", maxName))
	case !utf8.ValidString(p.Name) || !utf8.ValidString(p.Domain):
		return bad("it is not UTF-8")
	case strings.ContainsFunc(p.Name+p.Domain, func(r rune) bool { return !unicode.IsPrint(r) }):
		return bad("it has characters that cannot be printed")
	case strings.ContainsAny(p.Name, `\`) || strings.ContainsAny(p.Domain, `\@: `):
		return bad(`a name has no "\", a domain none of "\@: "`)
	}
	return nil
}

// String is "NAME@DOMAIN", as people write it.
func (p Principal) String() string { return p.Name + "@" + p.Domain }

// Subject is the name for RoleBindings and in the API server: a User's or a
// Group's, the kind says which.
func (p Principal) Subject() string { return Prefix + p.String() }
