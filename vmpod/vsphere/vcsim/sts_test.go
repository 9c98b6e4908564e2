package vcsim

import (
	"net/url"
	"strings"
	"testing"

	"github.com/vmware/govmomi/sts"
	"github.com/vmware/govmomi/vim25/soap"
)

// TestSTS asks for tokens by govmomi's client.
func TestSTS(t *testing.T) {
	s := start(t, Config{})
	if err := s.Users().Set("ada", `p<&"'>w`); err != nil {
		t.Fatal(err)
	}
	if err := s.Users().SetGroup("shop & co", "ada"); err != nil {
		t.Fatal(err)
	}
	sc := soap.NewClient(s.URL(), false)
	if err := setCA(sc, s.CA()); err != nil {
		t.Fatal(err)
	}
	service := sc.NewServiceClient(sts.Path, sts.Namespace)
	client := &sts.Client{Client: service, RoundTripper: service}
	issue := func(user, password string) (string, error) {
		token, err := client.Issue(t.Context(), sts.TokenRequest{Userinfo: url.UserPassword(user, password)})
		if err != nil {
			return "", err
		}
		return token.Token, nil
	}
	token, err := issue("ADA@vsphere.local", `p<&"'>w`)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{">ada@vsphere.local</saml2:NameID>", `>vsphere.local\shop &amp; co</saml2:AttributeValue>`} {
		if !strings.Contains(token, want) {
			t.Errorf("no %q in %s", want, token)
		}
	}
	for _, user := range []string{"ada@vsphere.local", "nobody@vsphere.local", AdminName + "@vsphere.local", "ada@other.example", ""} {
		_, err := issue(user, "wrong")
		if !soap.IsSoapFault(err) || !strings.HasSuffix(soap.ToSoapFault(err).Code, "FailedAuthentication") {
			t.Errorf("%q with a wrong password: %v", user, err)
		}
	}
	if _, err := client.Renew(t.Context(), sts.TokenRequest{Token: token}); err == nil {
		t.Error("a token was renewed without a password")
	}
}
