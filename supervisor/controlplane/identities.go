package controlplane

import (
	"bytes"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"

	"github.com/openatoll/atoll/supervisor/controlplane/durable"
	"github.com/openatoll/atoll/supervisor/controlplane/pki"
)

// Names of the components' kubeconfigs under DIR/pki/kubeconfig. Each user
// has the rights of its role and no more; superAdmin bypasses RBAC, as
// kubeadm's super-admin.conf, and installs everybody else's rights.
const (
	superAdmin        = "super-admin"
	controllerManager = "controller-manager"
	scheduler         = "scheduler"
	coreDNS           = "coredns"
	metricsServer     = "metrics-server"
	csrApprover       = "csr-approver"
	podMirror         = "pod-mirror"
	complianceKeeper  = "compliance"
	namespaceKeeper   = "namespaces"
	volumeKeeper      = "volumes"
	snapshotKeeper    = "snapshots"
	loginIdentity     = "login"
	vsphereREST       = "vsphere-rest"
	// tokenReview is a kubeconfig without an identity at the API server: with it
	// the API server asks the login server.
	tokenReview = "token-review"
)

// User names of Atoll's own components; manifests.yaml binds them.
const (
	coreDNSUser       = "system:coredns"
	metricsServerUser = "system:metrics-server"
	csrApproverUser   = "atoll:csr-approver"
	podMirrorUser     = "atoll:pod-mirror"
	complianceUser    = "atoll:compliance"
	namespacesUser    = "atoll:namespaces"
	volumesUser       = "atoll:volumes"
	snapshotsUser     = "atoll:snapshots"
	loginUser         = "atoll:login"
	vsphereRESTUser   = "atoll:vsphere-rest"
	kubeletClientUser = "kube-apiserver-kubelet-client"
	adminUser         = "kubernetes-admin"
	adminGroup        = "kubeadm:cluster-admins"
)

// An identity is a client certificate with a kubeconfig that names its files,
// so that a renewed certificate is picked up without a restart.
type identity struct {
	name, user string
	groups     []string
}

var identities = []identity{
	{superAdmin, "kubernetes-super-admin", []string{"system:masters"}},
	{controllerManager, "system:kube-controller-manager", nil},
	{scheduler, "system:kube-scheduler", nil},
	{coreDNS, coreDNSUser, nil},
	{metricsServer, metricsServerUser, nil},
	{csrApprover, csrApproverUser, nil},
	{podMirror, podMirrorUser, nil},
	{complianceKeeper, complianceUser, nil},
	{namespaceKeeper, namespacesUser, nil},
	{volumeKeeper, volumesUser, nil},
	{snapshotKeeper, snapshotsUser, nil},
	{loginIdentity, loginUser, nil},
	{vsphereREST, vsphereRESTUser, nil},
}

// apiServerLeaf is the API server's serving certificate.
func (c Config) apiServerLeaf() pki.Leaf {
	l := pki.Leaf{
		File: "apiserver", CommonName: "kube-apiserver", Server: true,
		DNSNames: []string{
			"kubernetes", "kubernetes.default", "kubernetes.default.svc",
			"kubernetes.default.svc." + c.ClusterDomain,
		},
		Addresses: []netip.Addr{c.Address, c.KubernetesServiceAddress()},
	}
	for _, san := range c.ExtraSANs {
		if a, err := netip.ParseAddr(san); err == nil {
			l.Addresses = append(l.Addresses, a)
		} else {
			l.DNSNames = append(l.DNSNames, san)
		}
	}
	return l
}

// leaves are the certificates of the cluster's authority.
func (c Config) leaves() []pki.Leaf {
	loopback := []netip.Addr{netip.AddrFrom4([4]byte{127, 0, 0, 1})}
	leaves := []pki.Leaf{
		c.apiServerLeaf(),
		{File: "apiserver-kubelet-client", CommonName: kubeletClientUser, Client: true},
		{File: "controller-manager-server", CommonName: "kube-controller-manager", Server: true, DNSNames: []string{"localhost"}, Addresses: loopback},
		{File: "scheduler-server", CommonName: "kube-scheduler", Server: true, DNSNames: []string{"localhost"}, Addresses: loopback},
		{
			File: "metrics-server", CommonName: "metrics-server", Server: true,
			DNSNames:  []string{"metrics-server.kube-system.svc", "metrics-server.kube-system.svc." + c.ClusterDomain},
			Addresses: []netip.Addr{c.Address},
		},
		{File: "admin", CommonName: adminUser, Organizations: []string{adminGroup}, Client: true},
	}
	leaves = append(leaves, c.loginLeaves()...)
	leaves = append(leaves, c.vcenterLeaves()...)
	for _, id := range identities {
		leaves = append(leaves, pki.Leaf{File: filepath.Join("kubeconfig", id.name), CommonName: id.user, Organizations: id.groups, Client: true})
	}
	return leaves
}

// ensureIdentities makes or renews everything under DIR/pki and the
// administrator's kubeconfig. It is what a start and the running renewal call.
func ensureIdentities(c Config, now time.Time) (renewed []string, err error) {
	dir := c.pkiPath()
	ca, err := pki.EnsureAuthority(dir, "ca", "kubernetes", now)
	if err != nil {
		return nil, err
	}
	frontProxy, err := pki.EnsureAuthority(dir, "front-proxy-ca", "front-proxy-ca", now)
	if err != nil {
		return nil, err
	}
	if err := pki.EnsureServiceAccountKeys(dir); err != nil {
		return nil, err
	}
	if err := ensureEncryptionKey(c); err != nil {
		return nil, err
	}
	issue := func(a *pki.Authority, l pki.Leaf) error {
		wrote, err := a.Ensure(dir, l, now)
		if wrote {
			renewed = append(renewed, l.File)
		}
		return err
	}
	if err := issue(frontProxy, pki.Leaf{File: "front-proxy-client", CommonName: "front-proxy-client", Client: true}); err != nil {
		return renewed, err
	}
	for _, l := range c.leaves() {
		if err := issue(ca, l); err != nil {
			return renewed, err
		}
	}
	for _, id := range identities {
		base := c.pkiPath("kubeconfig", id.name)
		auth := &clientcmdapi.AuthInfo{ClientCertificate: base + ".crt", ClientKey: base + ".key"}
		if err := writeKubeconfig(c, c.componentKubeconfig(id.name), id.user, auth, nil); err != nil {
			return renewed, err
		}
	}
	if err := writeTokenReviewKubeconfig(c); err != nil {
		return renewed, err
	}
	return renewed, writeAdminKubeconfig(c, ca.PEM())
}

// writeAdminKubeconfig holds everything itself, so that it can be copied to
// another machine.
func writeAdminKubeconfig(c Config, caPEM []byte) error {
	crt, err := os.ReadFile(c.pkiPath("admin.crt"))
	if err != nil {
		return err
	}
	key, err := os.ReadFile(c.pkiPath("admin.key"))
	if err != nil {
		return err
	}
	auth := &clientcmdapi.AuthInfo{ClientCertificateData: crt, ClientKeyData: key}
	return writeKubeconfig(c, c.Kubeconfig(), adminUser, auth, caPEM)
}

// writeKubeconfig writes file unless it is the same already. Without caPEM it
// names the authority's file.
func writeKubeconfig(c Config, file, user string, auth *clientcmdapi.AuthInfo, caPEM []byte) error {
	cluster := &clientcmdapi.Cluster{Server: c.Server(), CertificateAuthorityData: caPEM}
	if caPEM == nil {
		cluster.CertificateAuthority = c.ClientCAFile()
	}
	b, err := clientcmd.Write(clientcmdapi.Config{
		Clusters:       map[string]*clientcmdapi.Cluster{"atoll": cluster},
		AuthInfos:      map[string]*clientcmdapi.AuthInfo{user: auth},
		Contexts:       map[string]*clientcmdapi.Context{"atoll": {Cluster: "atoll", AuthInfo: user}},
		CurrentContext: "atoll",
	})
	if err != nil {
		return err
	}
	return writeIfChanged(file, b, 0o600)
}

func writeIfChanged(file string, content []byte, mode os.FileMode) error {
	if have, err := os.ReadFile(file); err == nil && bytes.Equal(have, content) {
		return os.Chmod(file, mode)
	}
	return durable.WriteFile(file, content, mode)
}

// ensureEncryptionKey makes the key of Secrets at rest once. A data directory
// with etcd data that lost the file is refused: with a new key every Secret
// would be unreadable and every controller would fail.
func ensureEncryptionKey(c Config) error {
	_, err := os.Stat(c.encryptionFile())
	if err == nil || !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if entries, err := os.ReadDir(c.etcdDir()); err == nil && len(entries) > 0 {
		return fmt.Errorf("%s is missing, the Secrets in %s cannot be read without it: restore it from a backup", c.encryptionFile(), c.etcdDir())
	}
	key := make([]byte, 32) // secretbox: XSalsa20-Poly1305
	if _, err := rand.Read(key); err != nil {
		return err
	}
	content := fmt.Sprintf(`apiVersion: apiserver.config.k8s.io/v1
kind: EncryptionConfiguration
resources:
- resources: [secrets]
  providers:
  - secretbox:
      keys:
      - name: key1
        secret: %s
  - identity: {}
`, base64.StdEncoding.EncodeToString(key))
	return durable.WriteFile(c.encryptionFile(), []byte(content), 0o600)
}
