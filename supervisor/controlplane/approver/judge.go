// Package approver approves kubelets' requests for serving certificates, which
// no controller of upstream does: a serving certificate for a name that is not
// the node's would let that node pose as another host.
package approver

import (
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"

	certificatesv1 "k8s.io/api/certificates/v1"
	corev1 "k8s.io/api/core/v1"
)

// Patience is how long a request waits for its Node, and for the Node to have
// the requested addresses, before it is denied: a kubelet asks for its
// certificate as soon as it knows its addresses, a moment before it has
// reported them.
const Patience = 30 * time.Second

// A Verdict is what to do with a request.
type Verdict int

// Verdicts.
const (
	Ignore Verdict = iota // not ours, or decided already
	Wait                  // may become right within Patience
	Approve
	Deny
)

func (v Verdict) String() string {
	return [...]string{"ignore", "wait", "approve", "deny"}[v]
}

const (
	nodeUserPrefix = "system:node:"
	nodesGroup     = "system:nodes"
)

// NodeName is the node that a request claims to be from.
func NodeName(csr *certificatesv1.CertificateSigningRequest) (string, bool) {
	name, ok := strings.CutPrefix(csr.Spec.Username, nodeUserPrefix)
	return name, ok && name != ""
}

// Judge decides on a request. node is the Node that NodeName names, nil when
// there is none. The reason is a sentence for the request's condition.
//
// It is right when: the requester is system:node:X of group system:nodes; the
// subject is exactly CN=system:node:X, O=system:nodes; the usages are those of
// a TLS server (digital signature, server auth, and key encipherment, which
// RSA needs); there is at least one subject alternative name, of kinds DNS and
// IP alone; and each is one of X's status.addresses, none of them reserved.
func (r Reserved) Judge(csr *certificatesv1.CertificateSigningRequest, node *corev1.Node, now time.Time) (Verdict, string) {
	if csr.Spec.SignerName != certificatesv1.KubeletServingSignerName || decided(csr) {
		return Ignore, ""
	}
	nodeName, ok := NodeName(csr)
	if !ok {
		return Deny, fmt.Sprintf("requester %q is not a node (%s<name>)", csr.Spec.Username, nodeUserPrefix)
	}
	if !slices.Contains(csr.Spec.Groups, nodesGroup) {
		return Deny, fmt.Sprintf("requester %q is not in group %s", csr.Spec.Username, nodesGroup)
	}
	if reason := wrongUsages(csr.Spec.Usages); reason != "" {
		return Deny, reason
	}
	req, reason := parse(csr.Spec.Request)
	if reason == "" {
		reason = wrongRequest(req, csr.Spec.Username)
	}
	if reason != "" {
		return Deny, reason
	}
	if reason = r.foreignName(req, node, nodeName); reason == "" {
		return Approve, fmt.Sprintf("every name is an address of Node %q", nodeName)
	}
	if now.Sub(csr.CreationTimestamp.Time) < Patience {
		return Wait, reason
	}
	return Deny, reason
}

func decided(csr *certificatesv1.CertificateSigningRequest) bool {
	return len(csr.Status.Certificate) > 0 || slices.ContainsFunc(csr.Status.Conditions, func(c certificatesv1.CertificateSigningRequestCondition) bool {
		return c.Type == certificatesv1.CertificateApproved || c.Type == certificatesv1.CertificateDenied || c.Type == certificatesv1.CertificateFailed
	})
}

func wrongUsages(usages []certificatesv1.KeyUsage) string {
	server := false
	for _, u := range usages {
		switch u {
		case certificatesv1.UsageServerAuth:
			server = true
		case certificatesv1.UsageDigitalSignature, certificatesv1.UsageKeyEncipherment:
		default:
			return fmt.Sprintf("usage %q is not one of a serving certificate", u)
		}
	}
	if !server {
		return "usage \"server auth\" is missing"
	}
	return ""
}

func parse(request []byte) (*x509.CertificateRequest, string) {
	block, rest := pem.Decode(request)
	if block == nil || block.Type != "CERTIFICATE REQUEST" || len(strings.TrimSpace(string(rest))) > 0 {
		return nil, "the request is not one PEM block CERTIFICATE REQUEST"
	}
	req, err := x509.ParseCertificateRequest(block.Bytes)
	if err != nil {
		return nil, "the request cannot be parsed: " + err.Error()
	}
	if err := req.CheckSignature(); err != nil {
		return nil, "the request is not signed by its own key: " + err.Error()
	}
	return req, ""
}

func wrongRequest(req *x509.CertificateRequest, user string) string {
	switch {
	case req.Subject.CommonName != user:
		return fmt.Sprintf("common name %q is not the requester %q", req.Subject.CommonName, user)
	case !slices.Equal(req.Subject.Organization, []string{nodesGroup}):
		return fmt.Sprintf("organizations %q are not [%q]", req.Subject.Organization, nodesGroup)
	case len(req.Subject.Names) != 2:
		return "the subject has more than a common name and an organization"
	case len(req.EmailAddresses) > 0:
		return "an email address is not a name of a server"
	case len(req.URIs) > 0:
		return "a URI is not a name of a node"
	case len(req.DNSNames)+len(req.IPAddresses) == 0:
		return "there is no DNS name and no IP address"
	}
	return ""
}

// foreignName returns why not every name of the request is the node's.
func (r Reserved) foreignName(req *x509.CertificateRequest, node *corev1.Node, nodeName string) string {
	if node == nil {
		return fmt.Sprintf("there is no Node %q", nodeName)
	}
	var names []string
	var ips []net.IP
	for _, a := range node.Status.Addresses {
		switch a.Type {
		case corev1.NodeHostName, corev1.NodeInternalDNS, corev1.NodeExternalDNS:
			names = append(names, a.Address)
		case corev1.NodeInternalIP, corev1.NodeExternalIP:
			ips = append(ips, net.ParseIP(a.Address))
		}
	}
	for _, name := range req.DNSNames {
		if r.name(name) {
			return fmt.Sprintf("DNS name %q is not one that a node can have", name)
		}
		if !slices.Contains(names, name) {
			return fmt.Sprintf("DNS name %q is not among the addresses of Node %q", name, nodeName)
		}
	}
	for _, ip := range req.IPAddresses {
		if r.address(ip) {
			return fmt.Sprintf("IP address %s is not one that a node can have", ip)
		}
		if !slices.ContainsFunc(ips, ip.Equal) {
			return fmt.Sprintf("IP address %s is not among the addresses of Node %q", ip, nodeName)
		}
	}
	return ""
}

// Reserved is what no node may be called: names and addresses of Services, the
// API server's among them. A node writes its own addresses, and with one of these
// could pose as a Service, since pods trust the same authority.
type Reserved struct {
	ClusterDomain string       // of Services' names
	Services      netip.Prefix // of Services' addresses
}

func (r Reserved) name(name string) bool {
	name = strings.TrimSuffix(strings.ToLower(name), ".")
	return name == "kubernetes" || name == "kubernetes.default" || strings.HasSuffix(name, ".svc") ||
		r.ClusterDomain != "" && strings.HasSuffix(name, ".svc."+strings.ToLower(r.ClusterDomain))
}

func (r Reserved) address(ip net.IP) bool {
	a, ok := netip.AddrFromSlice(ip)
	return !ok || !ip.IsGlobalUnicast() || r.Services.Contains(a.Unmap())
}
