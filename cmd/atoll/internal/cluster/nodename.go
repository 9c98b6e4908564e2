package cluster

import (
	"fmt"
	"os"
	"strings"

	"github.com/containerd/errdefs"
	"k8s.io/apimachinery/pkg/util/validation"
)

// DefaultNodeName is the host's name, as the kubelet would use it. A host
// that has no name of its own is refused (ErrFailedPrecondition), because
// every such host would be the same Node.
func DefaultNodeName() (string, error) {
	h, err := os.Hostname()
	if err != nil {
		return "", fmt.Errorf("read the host's name: %w", err)
	}
	return nodeName(h)
}

func nodeName(host string) (string, error) {
	name := strings.ToLower(strings.TrimSpace(host))
	if short, _, _ := strings.Cut(name, "."); name == "" || short == "localhost" {
		return "", fmt.Errorf("%q names no host; set a name with hostnamectl or use --node-name: %w", host, errdefs.ErrFailedPrecondition)
	}
	if errs := validation.IsDNS1123Subdomain(name); len(errs) > 0 {
		return "", fmt.Errorf("%q cannot name a Node (%s); use another --node-name: %w", host, errs[0], errdefs.ErrFailedPrecondition)
	}
	return name, nil
}
