package vcsim

import (
	"encoding/xml"
	"fmt"
	"io"
	"net/http"
	"path"
	"strings"
	"text/template"
	"time"

	"github.com/google/uuid"
)

// stsPath is where vCenter's token service is (WS-Trust 1.4 over SOAP).
const stsPath = "/sts/STSService"

const (
	maxTokenRequest = 64 << 10
	tokenLife       = 5 * time.Minute
)

// A tokenRequest is what is read of one: a user name and a password
// (WS-Security UsernameToken).
type tokenRequest struct {
	User     string    `xml:"Header>Security>UsernameToken>Username"`
	Password string    `xml:"Header>Security>UsernameToken>Password"`
	Issue    *struct{} `xml:"Body>RequestSecurityToken"`
}

// serveSTS issues a SAML 2.0 assertion with the user's groups for a password
// that is right. It is not signed: it tells its bearer's groups to whoever asked
// for it, over this connection, and opens nothing here.
func (s *Server) serveSTS(w http.ResponseWriter, r *http.Request) {
	var req tokenRequest
	action := path.Base(strings.Trim(r.Header.Get("SOAPAction"), `"`))
	if err := xml.NewDecoder(io.LimitReader(r.Body, maxTokenRequest)).Decode(&req); err != nil || req.Issue == nil || action != "Issue" {
		s.stsFault(w, "InvalidRequest", "only requests to issue a token for a user name and a password are served here")
		return
	}
	who, err := s.users.Authenticate(req.User, req.Password)
	if err != nil {
		s.stsFault(w, "FailedAuthentication", "Invalid credentials")
		return
	}
	now := time.Now().UTC()
	const stamp = "2006-01-02T15:04:05.000Z"
	token := struct {
		ID, Issuer, User, Created, Expires string
		Groups                             []string
	}{"_" + uuid.NewString(), s.url.Scheme + "://" + s.url.Host, who.Name, now.Format(stamp), now.Add(tokenLife).Format(stamp), nil}
	for _, g := range who.Groups {
		name, domain, _ := strings.Cut(g, "@")
		token.Groups = append(token.Groups, domain+`\`+name)
	}
	w.Header().Set("Content-Type", "text/xml; charset=utf-8")
	if err := stsResponse.Execute(w, token); err != nil {
		s.log.Debug("token not sent", "error", err)
	}
}

// stsFault answers as vCenter does: a code of WS-Trust or WS-Security.
func (s *Server) stsFault(w http.ResponseWriter, code, reason string) {
	w.Header().Set("Content-Type", "text/xml; charset=utf-8")
	w.WriteHeader(http.StatusInternalServerError)
	fmt.Fprintf(w, `<?xml version="1.0" encoding="UTF-8"?><S:Envelope xmlns:S="http://schemas.xmlsoap.org/soap/envelope/"><S:Body><S:Fault xmlns:ns0="http://docs.oasis-open.org/ws-sx/ws-trust/200512"><faultcode>ns0:%s</faultcode><faultstring>%s</faultstring></S:Fault></S:Body></S:Envelope>`, code, reason)
}

var stsResponse = template.Must(template.New("").Parse(`<?xml version="1.0" encoding="UTF-8"?>` +
	`<S:Envelope xmlns:S="http://schemas.xmlsoap.org/soap/envelope/"><S:Body>` +
	`<wst:RequestSecurityTokenResponseCollection xmlns:wst="http://docs.oasis-open.org/ws-sx/ws-trust/200512" xmlns:wsu="http://docs.oasis-open.org/wss/2004/01/oasis-200401-wss-wssecurity-utility-1.0.xsd">` +
	`<wst:RequestSecurityTokenResponse><wst:RequestedSecurityToken>` +
	`<saml2:Assertion xmlns:saml2="urn:oasis:names:tc:SAML:2.0:assertion" ID="{{.ID}}" IssueInstant="{{.Created}}" Version="2.0">` +
	`<saml2:Issuer>{{html .Issuer}}</saml2:Issuer>` +
	`<saml2:Subject><saml2:NameID Format="http://schemas.xmlsoap.org/claims/UPN">{{html .User}}</saml2:NameID></saml2:Subject>` +
	`<saml2:Conditions NotBefore="{{.Created}}" NotOnOrAfter="{{.Expires}}"/>` +
	`<saml2:AttributeStatement><saml2:Attribute FriendlyName="Groups" Name="http://rsa.com/schemas/attr-names/2009/01/GroupIdentity">` +
	`{{range .Groups}}<saml2:AttributeValue>{{html .}}</saml2:AttributeValue>{{end}}` +
	`</saml2:Attribute></saml2:AttributeStatement></saml2:Assertion>` +
	`</wst:RequestedSecurityToken><wst:Lifetime><wsu:Created>{{.Created}}</wsu:Created><wsu:Expires>{{.Expires}}</wsu:Expires></wst:Lifetime>` +
	`</wst:RequestSecurityTokenResponse></wst:RequestSecurityTokenResponseCollection></S:Body></S:Envelope>`))
