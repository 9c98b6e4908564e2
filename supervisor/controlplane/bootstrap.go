package controlplane

import (
	"context"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
	bootstrapapi "k8s.io/cluster-bootstrap/token/api"

	"github.com/openatoll/atoll/supervisor/controlplane/addons"
)

// bootstrapGroup is what kubeadm's tokens authenticate as; the manifests give
// it the right to ask for a node's first certificate and nothing else.
const bootstrapGroup = "system:bootstrappers:kubeadm:default-node-token"

// addonValues fill the manifests.
func (c Config) addonValues() (addons.Values, error) {
	ca, err := os.ReadFile(c.ClientCAFile())
	if err != nil {
		return addons.Values{}, err
	}
	info, err := clientcmd.Write(clientcmdapi.Config{
		Clusters: map[string]*clientcmdapi.Cluster{"": {Server: c.Server(), CertificateAuthorityData: ca}},
	})
	if err != nil {
		return addons.Values{}, err
	}
	return addons.Values{
		Address:     c.Address,
		DNSAddress:  c.DNSAddress,
		DNSPort:     c.DNSPort,
		MetricsPort: c.MetricsPort,
		CABundle:    base64.StdEncoding.EncodeToString(ca),
		ClusterInfo: string(info),
	}, nil
}

// ensureBootstrapToken keeps a token with at least a third of its life left in
// DIR/bootstrap.kubeconfig. The one before stays good until it expires; the
// controller manager's token cleaner deletes it then.
func ensureBootstrapToken(ctx context.Context, c Config, client kubernetes.Interface, now time.Time) error {
	if id, secret, ok := readBootstrapToken(c); ok && tokenGood(ctx, c, client, id, secret, now) {
		return writeBootstrapKubeconfig(c, id, secret)
	}
	id, secret, err := newToken()
	if err != nil {
		return err
	}
	_, err = client.CoreV1().Secrets(metav1.NamespaceSystem).Create(ctx, tokenSecret(id, secret, now.Add(c.BootstrapTokenTTL)), metav1.CreateOptions{})
	if err != nil {
		return fmt.Errorf("bootstrap token: %w", err)
	}
	return writeBootstrapKubeconfig(c, id, secret)
}

func tokenSecret(id, secret string, expires time.Time) *corev1.Secret {
	return &corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{Name: bootstrapapi.BootstrapTokenSecretPrefix + id, Namespace: metav1.NamespaceSystem},
		Type:       corev1.SecretTypeBootstrapToken,
		StringData: map[string]string{
			bootstrapapi.BootstrapTokenDescriptionKey:      "joins nodes; made and replaced by atoll",
			bootstrapapi.BootstrapTokenIDKey:               id,
			bootstrapapi.BootstrapTokenSecretKey:           secret,
			bootstrapapi.BootstrapTokenExpirationKey:       expires.UTC().Format(time.RFC3339),
			bootstrapapi.BootstrapTokenUsageAuthentication: "true",
			bootstrapapi.BootstrapTokenUsageSigningKey:     "true",
			bootstrapapi.BootstrapTokenExtraGroupsKey:      bootstrapGroup,
		},
	}
}

// tokenGood says whether the API server still has the token, for long enough.
func tokenGood(ctx context.Context, c Config, client kubernetes.Interface, id, secret string, now time.Time) bool {
	s, err := client.CoreV1().Secrets(metav1.NamespaceSystem).Get(ctx, bootstrapapi.BootstrapTokenSecretPrefix+id, metav1.GetOptions{})
	if err != nil {
		// Unreachable is no reason to make a new one; the caller's next call
		// to the API server reports it.
		return !apierrors.IsNotFound(err)
	}
	expires, err := time.Parse(time.RFC3339, string(s.Data[bootstrapapi.BootstrapTokenExpirationKey]))
	return err == nil && expires.Sub(now) > c.BootstrapTokenTTL/3 && string(s.Data[bootstrapapi.BootstrapTokenSecretKey]) == secret
}

func writeBootstrapKubeconfig(c Config, id, secret string) error {
	ca, err := os.ReadFile(c.ClientCAFile())
	if err != nil {
		return err
	}
	return writeKubeconfig(c, c.BootstrapKubeconfig(), "tls-bootstrap-token-user", &clientcmdapi.AuthInfo{Token: id + "." + secret}, ca)
}

// readBootstrapToken returns the token in the file, if there is one.
func readBootstrapToken(c Config) (id, secret string, ok bool) {
	b, err := os.ReadFile(c.BootstrapKubeconfig())
	if errors.Is(err, fs.ErrNotExist) {
		return "", "", false
	}
	kubeconfig, err := clientcmd.Load(b)
	if err != nil {
		return "", "", false
	}
	for _, auth := range kubeconfig.AuthInfos {
		id, secret, ok = strings.Cut(auth.Token, ".")
		return id, secret, ok && len(id) == 6 && len(secret) == 16
	}
	return "", "", false
}

// newToken has the form [a-z0-9]{6}.[a-z0-9]{16}, as k8s.io/cluster-bootstrap
// demands: 82 bits in the secret part.
func newToken() (id, secret string, err error) {
	const alphabet = "abcdefghijklmnopqrstuvwxyz0123456789"
	out := make([]byte, 0, 22)
	for buf := make([]byte, 32); len(out) < cap(out); {
		if _, err := rand.Read(buf); err != nil {
			return "", "", err
		}
		for _, b := range buf {
			// 252 is the largest multiple of 36 in a byte: no letter is
			// likelier than another.
			if b < 252 && len(out) < cap(out) {
				out = append(out, alphabet[int(b)%len(alphabet)])
			}
		}
	}
	return string(out[:6]), string(out[6:]), nil
}
