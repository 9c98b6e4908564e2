package login

import (
	"context"
	"encoding/pem"
	"fmt"
	"html"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/openatoll/atoll/internal/sso"
)

// saml is an assertion as vCenter's STS issues it.
func saml(user string, from, until time.Time, groups ...string) string {
	const stamp = "2006-01-02T15:04:05.000Z"
	var values strings.Builder
	for _, g := range groups {
		fmt.Fprintf(&values, "<saml2:AttributeValue>%s</saml2:AttributeValue>", html.EscapeString(g))
	}
	return fmt.Sprintf(`<saml2:Assertion xmlns:saml2="urn:oasis:names:tc:SAML:2.0:assertion" ID="_1" Version="2.0"><saml2:Issuer>vc</saml2:Issuer>`+
		`<saml2:Subject><saml2:NameID Format="http://schemas.xmlsoap.org/claims/UPN">%s</saml2:NameID></saml2:Subject>`+
		`<saml2:Conditions NotBefore="%s" NotOnOrAfter="%s"><saml2:ProxyRestriction Count="10"/></saml2:Conditions>`+
		`<saml2:AttributeStatement><saml2:Attribute Name="http://rsa.com/schemas/attr-names/2009/01/GroupIdentity">%s</saml2:Attribute>`+
		`<saml2:Attribute Name="http://schemas.xmlsoap.org/ws/2005/05/identity/claims/surname"><saml2:AttributeValue>no\group</saml2:AttributeValue></saml2:Attribute>`+
		`</saml2:AttributeStatement></saml2:Assertion>`, html.EscapeString(user), from.UTC().Format(stamp), until.UTC().Format(stamp), values.String())
}

func TestAssertion(t *testing.T) {
	want := ada.User
	soon := epoch.Add(5 * time.Minute)
	who, err := readAssertion(saml("Ada@VSPHERE.LOCAL", epoch, soon, `vsphere.local\Shop-Devs`, `CORP.example\Everyone`), want, epoch)
	if err != nil || who.User != want || fmt.Sprint(who.Groups) != "[shop-devs@vsphere.local everyone@corp.example]" || who.Warning != "" {
		t.Errorf("%+v, %v", who, err)
	}
	var many []string
	for i := range maxGroups + 1 {
		many = append(many, fmt.Sprintf(`vsphere.local\g%d`, i))
	}
	if who, err := readAssertion(saml("ada@vsphere.local", epoch, soon, many...), want, epoch); err != nil || len(who.Groups) != maxGroups || who.Warning == "" {
		t.Errorf("%d groups, warning %q, %v", len(who.Groups), who.Warning, err)
	}
	if who, err := readAssertion(saml("ada@vsphere.local", epoch, soon, "a\nb", "ok"), want, epoch); err != nil || len(who.Groups) != 1 || who.Warning == "" {
		t.Errorf("a bad group: %+v, %v", who, err)
	}
	for name, token := range map[string]string{
		"another user":   saml("administrator@vsphere.local", epoch, soon),
		"another domain": saml("ada@corp.example", epoch, soon),
		"long ago":       saml("ada@vsphere.local", epoch.Add(-time.Hour), epoch.Add(-30*time.Minute)),
		"not yet":        saml("ada@vsphere.local", epoch.Add(time.Hour), epoch.Add(2*time.Hour)),
		"no token":       "<html/>",
		"nothing":        "",
	} {
		if who, err := readAssertion(token, want, epoch); err == nil || errdefs.IsUnauthorized(err) {
			t.Errorf("%s: %+v, %v", name, who, err)
		}
	}
	// A short domain is vCenter's to resolve.
	if who, err := readAssertion(saml("ada@corp.example", epoch, soon), sso.Principal{Name: "ada", Domain: "corp"}, epoch); err != nil || who.User.Domain != "corp.example" {
		t.Errorf("short domain: %+v, %v", who, err)
	}
}

// A fakeVCenter answers STS by sts and SOAP's login by password; neither is
// there if it is empty.
type fakeVCenter struct {
	sts      func(body string) (status int, answer string)
	password string
	sessions int // logged in and not out
}

func (f *fakeVCenter) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	b, _ := io.ReadAll(r.Body)
	body := string(b)
	answer := func(status int, inner string) {
		w.WriteHeader(status)
		fmt.Fprintf(w, `<S:Envelope xmlns:S="http://schemas.xmlsoap.org/soap/envelope/"><S:Body>%s</S:Body></S:Envelope>`, inner)
	}
	switch {
	case r.URL.Path == "/sts/STSService" && f.sts != nil:
		status, inner := f.sts(body)
		answer(status, inner)
	case r.URL.Path != "/sdk" || f.password == "":
		http.NotFound(w, r)
	case strings.Contains(body, "<RetrieveServiceContent"):
		answer(200, `<RetrieveServiceContentResponse xmlns="urn:vim25"><returnval><sessionManager type="SessionManager">SessionManager</sessionManager></returnval></RetrieveServiceContentResponse>`)
	case strings.Contains(body, "<Login ") && strings.Contains(body, "<password>"+f.password+"</password>"):
		f.sessions++
		answer(200, `<LoginResponse xmlns="urn:vim25"><returnval><key>k</key><userName>ada</userName></returnval></LoginResponse>`)
	case strings.Contains(body, "<Login "):
		answer(500, `<S:Fault><faultcode>ServerFaultCode</faultcode><faultstring>no</faultstring><detail><InvalidLoginFault xmlns="urn:vim25" xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance" xsi:type="InvalidLogin"/></detail></S:Fault>`)
	case strings.Contains(body, "<Logout "):
		f.sessions--
		answer(200, `<LogoutResponse xmlns="urn:vim25"/>`)
	default:
		http.Error(w, "?", http.StatusTeapot)
	}
}

func issued(token string) string {
	return `<RequestSecurityTokenResponseCollection xmlns="http://docs.oasis-open.org/ws-sx/ws-trust/200512"><RequestSecurityTokenResponse><RequestedSecurityToken>` + token +
		`</RequestedSecurityToken></RequestSecurityTokenResponse></RequestSecurityTokenResponseCollection>`
}

func fault(code string) string {
	return `<S:Fault><faultcode xmlns:ns0="x">ns0:` + code + `</faultcode><faultstring>Invalid credentials</faultstring></S:Fault>`
}

func TestSSO(t *testing.T) {
	now := time.Now()
	token := issued(saml("ada@vsphere.local", now, now.Add(time.Minute), `vsphere.local\devs`))
	checks := func(body string) (int, string) {
		if strings.Contains(body, "Username>ada@vsphere.local<") && strings.Contains(body, "Password>right<") {
			return 200, token
		}
		return 500, fault("FailedAuthentication")
	}
	stock := func(string) (int, string) {
		return 200, issued(saml("Administrator@VSPHERE.LOCAL", now.AddDate(-8, 0, 0), now.AddDate(-8, 0, 1), `vsphere.local\Administrators`))
	}
	always := func(status int, answer string) func(string) (int, string) {
		return func(string) (int, string) { return status, answer }
	}
	is := map[string]func(error) bool{
		"ok": func(err error) bool { return err == nil }, "wrong": errdefs.IsUnauthorized, "unknown": errdefs.IsUnavailable,
	}
	for name, tc := range map[string]struct {
		vc             fakeVCenter
		user, password string
		want           string
		groups         int
		warns          bool
	}{
		"right":                    {fakeVCenter{sts: checks}, "ada", "right", "ok", 1, false},
		"right, DOMAIN\\NAME":      {fakeVCenter{sts: checks}, `VSPHERE.LOCAL\Ada`, "right", "ok", 1, false},
		"wrong":                    {fakeVCenter{sts: checks}, "ada", "left", "wrong", 0, false},
		"wrong is not asked twice": {fakeVCenter{sts: checks, password: "left"}, "ada", "left", "wrong", 0, false},
		"no name":                  {fakeVCenter{sts: checks}, "a\nb", "right", "wrong", 0, false},
		"clocks apart":             {fakeVCenter{sts: always(500, fault("InvalidTimeRange"))}, "ada", "right", "unknown", 0, false},
		"starting":                 {fakeVCenter{sts: always(503, ""), password: "right"}, "ada", "right", "unknown", 0, false},
		"garbage":                  {fakeVCenter{sts: always(200, "<x"), password: "right"}, "ada", "right", "unknown", 0, false},
		"stock simulator, right":   {fakeVCenter{sts: stock, password: "right"}, "administrator", "right", "ok", 0, true},
		"stock simulator, wrong":   {fakeVCenter{sts: stock, password: "right"}, "administrator", "left", "wrong", 0, false},
		"no token service, right":  {fakeVCenter{password: "right"}, "ada", "right", "ok", 0, true},
		"no token service, wrong":  {fakeVCenter{password: "right"}, "ada", "left", "wrong", 0, false},
		"neither is there":         {fakeVCenter{}, "ada", "right", "unknown", 0, false},
	} {
		t.Run(name, func(t *testing.T) {
			srv := httptest.NewTLSServer(&tc.vc)
			defer srv.Close()
			ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: srv.Certificate().Raw})
			s := &SSO{
				VCenter: func(context.Context) (VCenter, error) {
					return VCenter{Address: srv.Listener.Addr().String(), CA: ca}, nil
				},
				Log: slog.New(slog.DiscardHandler), Now: time.Now,
			}
			who, err := s.Authenticate(t.Context(), tc.user, tc.password)
			if !is[tc.want](err) || len(who.Groups) != tc.groups || (who.Warning != "") != tc.warns {
				t.Errorf("%+v, %v; want %s", who, err, tc.want)
			}
			if tc.want == "ok" && who.User.Domain != "vsphere.local" {
				t.Errorf("user %v", who.User)
			}
			if err != nil && strings.Contains(err.Error(), tc.password) {
				t.Errorf("the password is in %q", err)
			}
			if tc.vc.sessions != 0 {
				t.Errorf("%d sessions left in vCenter", tc.vc.sessions)
			}
		})
	}
}

// TestSSONotTrusted: a vCenter whose certificate is another's is asked nothing.
func TestSSONotTrusted(t *testing.T) {
	asked := false
	vc := &fakeVCenter{sts: func(string) (int, string) { asked = true; return 500, fault("FailedAuthentication") }}
	srv := httptest.NewTLSServer(vc)
	defer srv.Close()
	ca, err := os.ReadFile(newTestPKI(t).file("ca.crt"))
	if err != nil {
		t.Fatal(err)
	}
	for name, v := range map[string]VCenter{
		"authority":  {Address: srv.Listener.Addr().String(), CA: ca},
		"thumbprint": {Address: srv.Listener.Addr().String(), Thumbprint: strings.Repeat("ab", 32)},
		"system":     {Address: srv.Listener.Addr().String()},
		"gone":       {Address: "127.0.0.1:1", CA: ca},
	} {
		s := &SSO{VCenter: func(context.Context) (VCenter, error) { return v, nil }, Log: slog.New(slog.DiscardHandler), Now: time.Now}
		if _, err := s.Authenticate(t.Context(), "ada", "right"); !errdefs.IsUnavailable(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if asked {
		t.Error("it was shown the password")
	}
}
