package login

import (
	"encoding/xml"
	"fmt"
	"strings"
	"time"

	"github.com/containerd/errdefs"

	"github.com/openatoll/atoll/internal/sso"
)

// groupAttribute holds a user's groups in the SAML tokens of vCenter's STS.
const groupAttribute = "http://rsa.com/schemas/attr-names/2009/01/GroupIdentity"

// maxGroups of a user: each is in every request that he makes.
const maxGroups = 1000

// An assertion is what Atoll reads of a SAML 2.0 token.
type assertion struct {
	XMLName xml.Name `xml:"urn:oasis:names:tc:SAML:2.0:assertion Assertion"`
	Subject struct {
		NameID string `xml:"NameID"`
	} `xml:"Subject"`
	Conditions struct {
		NotBefore    string `xml:"NotBefore,attr"`
		NotOnOrAfter string `xml:"NotOnOrAfter,attr"`
	} `xml:"Conditions"`
	Attributes []struct {
		Name   string   `xml:"Name,attr"`
		Values []string `xml:"AttributeValue"`
	} `xml:"AttributeStatement>Attribute"`
}

// clockSkew is how far vCenter's clock may be from ours. It is generous: the
// token is used in the second in which it came.
const clockSkew = 10 * time.Minute

// readAssertion takes a user's groups from a token that vCenter has just
// issued for a password, over a connection to the vCenter that the operator
// named: the channel vouches for it, not the signature. A token for somebody
// else, or of another time, is ErrUnknown: whoever hands such out has not
// looked at the password.
func readAssertion(token string, want sso.Principal, now time.Time) (Identity, error) {
	bad := func(why string) (Identity, error) {
		return Identity{}, fmt.Errorf("the token of vCenter's STS %s: %w", why, errdefs.ErrUnknown)
	}
	var a assertion
	if err := xml.Unmarshal([]byte(token), &a); err != nil {
		return bad("is no SAML 2.0 assertion")
	}
	user, err := sso.Parse(a.Subject.NameID, want.Domain)
	if err != nil {
		return bad("names no user")
	}
	// A domain's short name is vCenter's to resolve.
	short := !strings.Contains(want.Domain, ".") && user.Name == want.Name
	if user != want && !short {
		return bad(fmt.Sprintf("is for %s, not for %s", user, want))
	}
	from, err1 := time.Parse(time.RFC3339Nano, a.Conditions.NotBefore)
	until, err2 := time.Parse(time.RFC3339Nano, a.Conditions.NotOnOrAfter)
	if err1 != nil || err2 != nil || now.Add(clockSkew).Before(from) || now.Add(-clockSkew).After(until) {
		return bad(fmt.Sprintf("is good from %q to %q, which is not now", a.Conditions.NotBefore, a.Conditions.NotOnOrAfter))
	}
	who := Identity{User: user}
	for _, attribute := range a.Attributes {
		if attribute.Name != groupAttribute {
			continue
		}
		for _, value := range attribute.Values {
			group, err := sso.Parse(value, want.Domain)
			if err != nil {
				who.Warning = "a group's name cannot be used in Kubernetes and was left out"
				continue
			}
			if len(who.Groups) == maxGroups {
				who.Warning = fmt.Sprintf("vCenter names more than %d groups of yours; the rest was left out", maxGroups)
				return who, nil
			}
			who.Groups = append(who.Groups, group)
		}
	}
	return who, nil
}
