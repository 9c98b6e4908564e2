package approver

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"net"
	"net/netip"
	"net/url"
	"strings"
	"testing"
	"time"

	certificatesv1 "k8s.io/api/certificates/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

var cluster = Reserved{ClusterDomain: "cluster.local", Services: netip.MustParsePrefix("198.18.64.0/18")}

var created = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

// A sample is a request that is right until a test changes it.
type sample struct {
	req  x509.CertificateRequest
	csr  certificatesv1.CertificateSigningRequest
	node *corev1.Node
	now  time.Time
}

func newSample() *sample {
	return &sample{
		req: x509.CertificateRequest{
			Subject:     pkix.Name{CommonName: "system:node:n1", Organization: []string{"system:nodes"}},
			DNSNames:    []string{"n1"},
			IPAddresses: []net.IP{net.ParseIP("198.18.0.1")},
		},
		csr: certificatesv1.CertificateSigningRequest{
			ObjectMeta: metav1.ObjectMeta{Name: "csr-1", CreationTimestamp: metav1.NewTime(created)},
			Spec: certificatesv1.CertificateSigningRequestSpec{
				SignerName: certificatesv1.KubeletServingSignerName,
				Username:   "system:node:n1",
				Groups:     []string{"system:nodes", "system:authenticated"},
				Usages:     []certificatesv1.KeyUsage{certificatesv1.UsageDigitalSignature, certificatesv1.UsageServerAuth},
			},
		},
		node: &corev1.Node{
			ObjectMeta: metav1.ObjectMeta{Name: "n1"},
			Status: corev1.NodeStatus{Addresses: []corev1.NodeAddress{
				{Type: corev1.NodeInternalIP, Address: "198.18.0.1"},
				{Type: corev1.NodeInternalIP, Address: "fd00::1"},
				{Type: corev1.NodeHostName, Address: "n1"},
			}},
		},
		now: created.Add(time.Second),
	}
}

// claim has the Node call itself name, and ask for it.
func (s *sample) claim(name string) {
	s.node.Status.Addresses = append(s.node.Status.Addresses, corev1.NodeAddress{Type: corev1.NodeHostName, Address: name})
	s.req.DNSNames = append(s.req.DNSNames, name)
}

func (s *sample) encode(t *testing.T) {
	t.Helper()
	if s.csr.Spec.Request != nil {
		return // the test brought its own bytes
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &s.req, key)
	if err != nil {
		t.Fatal(err)
	}
	s.csr.Spec.Request = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der})
}

func TestJudge(t *testing.T) {
	late := func(s *sample) { s.now = created.Add(Patience + time.Second) }
	for name, tc := range map[string]struct {
		change func(*sample)
		want   Verdict
		reason string // part of it
	}{
		"right":                     {func(*sample) {}, Approve, `Node "n1"`},
		"right, with key encipher":  {func(s *sample) { s.csr.Spec.Usages = append(s.csr.Spec.Usages, certificatesv1.UsageKeyEncipherment) }, Approve, ""},
		"right, only an address":    {func(s *sample) { s.req.DNSNames = nil }, Approve, ""},
		"right, IPv6 in other form": {func(s *sample) { s.req.IPAddresses = []net.IP{net.ParseIP("fd00:0:0::1")} }, Approve, ""},
		"another signer":            {func(s *sample) { s.csr.Spec.SignerName = certificatesv1.KubeAPIServerClientSignerName }, Ignore, ""},
		"approved already": {func(s *sample) {
			s.csr.Status.Conditions = []certificatesv1.CertificateSigningRequestCondition{{Type: certificatesv1.CertificateApproved}}
		}, Ignore, ""},
		"denied already": {func(s *sample) {
			s.csr.Status.Conditions = []certificatesv1.CertificateSigningRequestCondition{{Type: certificatesv1.CertificateDenied}}
		}, Ignore, ""},
		"signed already":        {func(s *sample) { s.csr.Status.Certificate = []byte("x") }, Ignore, ""},
		"a user, not a node":    {func(s *sample) { s.csr.Spec.Username = "jane" }, Deny, "not a node"},
		"a node without a name": {func(s *sample) { s.csr.Spec.Username, s.req.Subject.CommonName = "system:node:", "system:node:" }, Deny, "not a node"},
		"a node's name alone":   {func(s *sample) { s.csr.Spec.Groups = []string{"system:authenticated"} }, Deny, "not in group"},
		"a bootstrap token": {func(s *sample) {
			s.csr.Spec.Username, s.csr.Spec.Groups = "system:bootstrap:abcdef", []string{"system:bootstrappers"}
		}, Deny, "not a node"},
		"another node's common name": {func(s *sample) { s.req.Subject.CommonName = "system:node:n2" }, Deny, "common name"},
		"an admin's organization":    {func(s *sample) { s.req.Subject.Organization = []string{"system:masters"} }, Deny, "organizations"},
		"one organization more":      {func(s *sample) { s.req.Subject.Organization = []string{"system:nodes", "system:masters"} }, Deny, "organizations"},
		"no organization":            {func(s *sample) { s.req.Subject.Organization = nil }, Deny, "organizations"},
		"more in the subject": {func(s *sample) {
			s.req.Subject.ExtraNames = []pkix.AttributeTypeAndValue{{Type: asn1.ObjectIdentifier{2, 5, 4, 11}, Value: "unit"}}
		}, Deny, "subject has more"},
		"two common names": {func(s *sample) {
			cn := asn1.ObjectIdentifier{2, 5, 4, 3}
			s.req.Subject.ExtraNames = []pkix.AttributeTypeAndValue{{Type: cn, Value: "kube-apiserver"}, {Type: cn, Value: "system:node:n1"}}
		}, Deny, "subject has more"},
		"a client's usage":                     {func(s *sample) { s.csr.Spec.Usages = append(s.csr.Spec.Usages, certificatesv1.UsageClientAuth) }, Deny, "client auth"},
		"an authority's usage":                 {func(s *sample) { s.csr.Spec.Usages = append(s.csr.Spec.Usages, certificatesv1.UsageCertSign) }, Deny, "cert sign"},
		"any usage":                            {func(s *sample) { s.csr.Spec.Usages = []certificatesv1.KeyUsage{certificatesv1.UsageAny} }, Deny, "any"},
		"no usage":                             {func(s *sample) { s.csr.Spec.Usages = nil }, Deny, "server auth"},
		"not a server's":                       {func(s *sample) { s.csr.Spec.Usages = []certificatesv1.KeyUsage{certificatesv1.UsageDigitalSignature} }, Deny, "server auth"},
		"no name at all":                       {func(s *sample) { s.req.DNSNames, s.req.IPAddresses = nil, nil }, Deny, "no DNS name"},
		"an email address":                     {func(s *sample) { s.req.EmailAddresses = []string{"a@b.example"} }, Deny, "email"},
		"a URI":                                {func(s *sample) { s.req.URIs = []*url.URL{{Scheme: "spiffe", Host: "x"}} }, Deny, "URI"},
		"the API server's name":                {func(s *sample) { s.req.DNSNames = []string{"n1", "kubernetes.default.svc"}; late(s) }, Deny, "kubernetes.default.svc"},
		"a Service's name, claimed as its own": {func(s *sample) { s.claim("db.prod.svc"); late(s) }, Deny, "can have"},
		"the API server's in full, claimed":    {func(s *sample) { s.claim("kubernetes.default.svc.cluster.local"); late(s) }, Deny, "can have"},
		"a host's name with svc in it":         {func(s *sample) { s.claim("n1.svc.example.com") }, Approve, ""},
		"a Service's address, claimed": {func(s *sample) {
			s.node.Status.Addresses = append(s.node.Status.Addresses, corev1.NodeAddress{Type: corev1.NodeInternalIP, Address: "198.18.64.1"})
			s.req.IPAddresses = append(s.req.IPAddresses, net.ParseIP("198.18.64.1"))
			late(s)
		}, Deny, "198.18.64.1"},
		"a wildcard":               {func(s *sample) { s.req.DNSNames = []string{"*"}; late(s) }, Deny, `"*"`},
		"a name in other case":     {func(s *sample) { s.req.DNSNames = []string{"N1"}; late(s) }, Deny, `"N1"`},
		"a name with a final dot":  {func(s *sample) { s.req.DNSNames = []string{"n1."}; late(s) }, Deny, `"n1."`},
		"an address as a DNS name": {func(s *sample) { s.req.DNSNames = []string{"198.18.0.1"}; late(s) }, Deny, "DNS name"},
		"a foreign address, early": {func(s *sample) { s.req.IPAddresses = append(s.req.IPAddresses, net.ParseIP("198.18.0.2")) }, Wait, "198.18.0.2"},
		"a foreign address, late":  {func(s *sample) { s.req.IPAddresses = append(s.req.IPAddresses, net.ParseIP("198.18.0.2")); late(s) }, Deny, "198.18.0.2"},
		"loopback":                 {func(s *sample) { s.req.IPAddresses = []net.IP{net.ParseIP("127.0.0.1")}; late(s) }, Deny, "127.0.0.1"},
		"no Node yet":              {func(s *sample) { s.node = nil }, Wait, "no Node"},
		"no Node ever":             {func(s *sample) { s.node = nil; late(s) }, Deny, "no Node"},
		"a Node without addresses": {func(s *sample) { s.node.Status.Addresses = nil }, Wait, "n1"},
		"no PEM":                   {func(s *sample) { s.csr.Spec.Request = []byte("hello") }, Deny, "PEM"},
		"garbage in PEM": {func(s *sample) {
			s.csr.Spec.Request = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: []byte("x")})
		}, Deny, "parsed"},
		"another PEM type": {func(s *sample) {
			s.csr.Spec.Request = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: []byte("x")})
		}, Deny, "PEM"},
	} {
		t.Run(name, func(t *testing.T) {
			s := newSample()
			tc.change(s)
			s.encode(t)
			got, reason := cluster.Judge(&s.csr, s.node, s.now)
			if got != tc.want || !strings.Contains(reason, tc.reason) {
				t.Fatalf("%s (%q), want %s (…%s…)", got, reason, tc.want, tc.reason)
			}
		})
	}
}

// The bytes that Judge reads and the bytes that the signer reads are the same
// block: what follows the first block or breaks its signature is refused.
func TestJudgeRefusesTamperedRequests(t *testing.T) {
	s, other := newSample(), newSample()
	s.encode(t)
	other.req.DNSNames = []string{"kubernetes"}
	other.encode(t)
	two := newSample()
	two.csr.Spec.Request = append(append([]byte{}, s.csr.Spec.Request...), other.csr.Spec.Request...)
	if got, reason := cluster.Judge(&two.csr, two.node, two.now); got != Deny {
		t.Errorf("two blocks: %s (%q)", got, reason)
	}
	block, _ := pem.Decode(s.csr.Spec.Request)
	block.Bytes[len(block.Bytes)-1] ^= 1
	s.csr.Spec.Request = pem.EncodeToMemory(block)
	if got, reason := cluster.Judge(&s.csr, s.node, s.now); got != Deny {
		t.Errorf("broken signature: %s (%q)", got, reason)
	}
}
