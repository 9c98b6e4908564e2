package controlplane

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"

	"github.com/openatoll/atoll/api/v1alpha1"
	"github.com/openatoll/atoll/supervisor/controlplane/pki"
	"github.com/openatoll/atoll/supervisor/namespaces/vc"
	"github.com/openatoll/atoll/vmpod/vsphere/vcsim"
)

// DefaultVCenterPort is the embedded vCenter's, on Config.Address.
const DefaultVCenterPort = 8989

const (
	// vcenterUser is whom the supervisor signs in as, with the role that
	// deploy/vsphere-role.json ships. Its password is new at each start.
	vcenterUser       = "atoll-supervisor"
	vcenterSecret     = "embedded-vcenter"
	vcenterLeaf       = "vcenter"
	vcenterCluster    = "atoll"
	vcenterDatacenter = "Atoll"
)

// VCenterZone is the one zone of the embedded vCenter's Supervisor: what its nodes
// bear as topology.kubernetes.io/zone.
const VCenterZone = vcenterCluster

// VCenter configures the embedded vCenter.
type VCenter struct {
	// Port is on Config.Address.
	Port uint16
	// Hosts are the nodes that it shows.
	Hosts []vcsim.Host
}

// VCenterDir holds the embedded vCenter's users and inventory.
func (c Config) VCenterDir() string { return filepath.Join(c.DataDir, "vcenter") }

// VCenterPasswordFile has the password of its administrator, as it was made.
func (c Config) VCenterPasswordFile() string {
	return filepath.Join(c.VCenterDir(), vcsim.PasswordFile)
}

// VCenterAddress is where it is served.
func (c Config) VCenterAddress() netip.AddrPort { return netip.AddrPortFrom(c.Address, c.VCenter.Port) }

// VCenterUser is its administrator.
func (c Config) VCenterUser() string { return vcsim.AdminName + "@" + vcsim.DefaultDomain }

// vcenterLeaves is its certificate.
func (c Config) vcenterLeaves() []pki.Leaf {
	if c.VCenter == nil {
		return nil
	}
	return []pki.Leaf{{File: vcenterLeaf, CommonName: "atoll-vcenter", Server: true, Addresses: []netip.Addr{c.Address}, DNSNames: []string{"vcenter." + c.ClusterDomain}}}
}

// startVCenter serves the embedded vCenter, if there is to be one.
func (s *supervisor) startVCenter() error {
	c := s.config
	if c.VCenter == nil {
		return nil
	}
	cert, ca, err := c.vcenterCertificate()
	if err != nil {
		return err
	}
	server, err := vcsim.New(vcsim.Config{
		Dir: c.VCenterDir(), Listen: c.VCenterAddress(), Certificate: &cert, CA: ca,
		Datacenter: vcenterDatacenter,
		Clusters:   []vcsim.Cluster{{Name: vcenterCluster, Hosts: c.VCenter.Hosts}},
		Power:      s.mirrorPower.do,
	})
	if err != nil {
		return err
	}
	s.vcenter = server
	s.start(s.apis, "vcenter", server.Wait)
	s.done(PhaseVCenter, "on "+server.URL().String())
	return c.serveNamespaces(server)
}

func (c Config) vcenterCertificate() (tls.Certificate, []byte, error) {
	cert, err := tls.LoadX509KeyPair(c.pkiPath(vcenterLeaf+".crt"), c.pkiPath(vcenterLeaf+".key"))
	if err != nil {
		return cert, nil, fmt.Errorf("the embedded vCenter's certificate: %w", err)
	}
	ca, err := os.ReadFile(c.ClientCAFile())
	if err != nil {
		return cert, nil, fmt.Errorf("the embedded vCenter's certificate: %w", err)
	}
	return cert, ca, nil
}

// checkVCenter asks the embedded vCenter what every client asks first.
func (s *supervisor) checkVCenter(ctx context.Context) (string, error) {
	base := "https://" + s.config.VCenterAddress().String()
	return "embedded, on " + base, s.get(ctx, base+"/sdk/vimServiceVersions.xml")
}

// renewVCenter shows a renewed certificate.
func (s *supervisor) renewVCenter(renewed []string) error {
	if s.vcenter == nil || !slices.Contains(renewed, vcenterLeaf) {
		return nil
	}
	cert, _, err := s.config.vcenterCertificate()
	if err == nil {
		s.vcenter.SetCertificate(cert)
	}
	return err
}

// joinVCenter has the controllers of namespaces and of mirrors use the embedded
// vCenter: an account of their own there, and a Supervisor that names it,
// unless the cluster's Supervisor is of another vCenter.
func (s *supervisor) joinVCenter(ctx context.Context) error {
	if s.vcenter == nil {
		return nil
	}
	client, dyn, err := clients(s.config, superAdmin)
	if err != nil {
		return err
	}
	password := rand.Text()
	if err := s.vcenter.Users().Set(vcenterUser, password); err != nil {
		return err
	}
	if err := s.vcenter.SetRole(vc.RoleName, vc.Privileges()); err != nil {
		return err
	}
	if err := s.vcenter.Grant(vcenterUser, vc.RoleName); err != nil {
		return err
	}
	if err := ensureVCenterSecret(ctx, client, vcenterUser+"@"+vcsim.DefaultDomain, password); err != nil {
		return err
	}
	if err := s.ensureSupervisor(ctx, dyn); err != nil {
		return err
	}
	mirror, err := s.config.newPodMirror(s.vcenter, &s.mirrorPower)
	if err != nil {
		return err
	}
	s.start(s.clients, "pod-mirror", mirror.Run)
	return nil
}

func ensureVCenterSecret(ctx context.Context, client kubernetes.Interface, user, password string) error {
	secret := &corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{Namespace: metav1.NamespaceSystem, Name: vcenterSecret},
		Type:       corev1.SecretTypeBasicAuth,
		StringData: map[string]string{corev1.BasicAuthUsernameKey: user, corev1.BasicAuthPasswordKey: password},
	}
	secrets := client.CoreV1().Secrets(secret.Namespace)
	_, err := secrets.Create(ctx, secret, metav1.CreateOptions{})
	if apierrors.IsAlreadyExists(err) {
		_, err = secrets.Update(ctx, secret, metav1.UpdateOptions{})
	}
	if err != nil {
		return fmt.Errorf("credentials of the embedded vCenter: %w", err)
	}
	return nil
}

// ensureSupervisor makes the cluster's Supervisor, or keeps the address and
// the certificate of one that is of the embedded vCenter.
func (s *supervisor) ensureSupervisor(ctx context.Context, dyn dynamic.Interface) error {
	address := s.config.VCenterAddress().String()
	supervisors := dyn.Resource(v1alpha1.SchemeGroupVersion.WithResource("supervisors"))
	have, err := supervisors.Get(ctx, v1alpha1.SupervisorName, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		object, err := runtime.DefaultUnstructuredConverter.ToUnstructured(&v1alpha1.Supervisor{
			ObjectMeta: metav1.ObjectMeta{Name: v1alpha1.SupervisorName},
			Spec: v1alpha1.SupervisorSpec{
				VCenter: v1alpha1.VCenter{
					Server: address, CABundle: s.vcenter.CA(),
					CredentialsSecret: v1alpha1.SecretReference{Namespace: metav1.NamespaceSystem, Name: vcenterSecret},
				},
				Zones: []v1alpha1.Zone{{Name: VCenterZone, Cluster: vcenterCluster}},
			},
		})
		if err != nil {
			return fmt.Errorf("supervisor of the embedded vCenter: %w", err)
		}
		made := &unstructured.Unstructured{Object: object}
		made.SetGroupVersionKind(v1alpha1.SchemeGroupVersion.WithKind("Supervisor"))
		_, err = supervisors.Create(ctx, made, metav1.CreateOptions{})
		return err
	}
	if err != nil {
		return fmt.Errorf("supervisor of the embedded vCenter: %w", err)
	}
	name, _, _ := unstructured.NestedString(have.Object, "spec", "vCenter", "credentialsSecret", "name")
	if name != vcenterSecret {
		return nil // an administrator's, of another vCenter
	}
	var spec v1alpha1.Supervisor
	if err := runtime.DefaultUnstructuredConverter.FromUnstructured(have.Object, &spec); err != nil {
		return fmt.Errorf("supervisor of the embedded vCenter: %w", err)
	}
	if spec.Spec.VCenter.Server == address && slices.Equal(spec.Spec.VCenter.CABundle, s.vcenter.CA()) {
		return nil
	}
	patch, err := json.Marshal(map[string]any{"spec": map[string]any{"vCenter": map[string]any{"server": address, "caBundle": s.vcenter.CA()}}})
	if err != nil {
		return fmt.Errorf("supervisor of the embedded vCenter: %w", err)
	}
	if _, err := supervisors.Patch(ctx, v1alpha1.SupervisorName, types.MergePatchType, patch, metav1.PatchOptions{}); err != nil {
		return fmt.Errorf("supervisor of the embedded vCenter: %w", err)
	}
	return nil
}
