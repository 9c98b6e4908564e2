package controlplane

import (
	"strings"
	_ "unsafe" // for go:linkname

	"k8s.io/component-base/version"
)

// upstreamVersion is what the Makefile stamps with
// -ldflags "-X k8s.io/component-base/version.gitVersion=…".
//
//go:linkname upstreamVersion k8s.io/component-base/version.gitVersion
var upstreamVersion string

// stampVersion makes a build without those flags report KubernetesVersion
// instead of v0.0.0-master, which clients take for a server of unknown age.
func stampVersion() {
	if !strings.HasPrefix(upstreamVersion, "v0.0.0") {
		return
	}
	upstreamVersion = KubernetesVersion
	// Get reads a copy that was taken at package initialization; the copy may
	// only be set to what upstreamVersion says.
	_ = version.SetDynamicVersion(KubernetesVersion)
}
