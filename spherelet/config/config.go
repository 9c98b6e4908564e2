// Package config reads a spherelet's configuration file: strictly, with every
// default filled in and every value checked before anything is started. It
// links nothing of the kubelet, so that other programs can use it.
package config

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"sigs.k8s.io/yaml"

	"github.com/openatoll/atoll/api/v1alpha1"
)

// DataVersion is the layout of the data directory that this spherelet reads
// and writes. It grows when an older spherelet could not read the new layout.
const DataVersion = 1

// Defaults of the configuration.
const (
	DefaultPort             = 10250
	DefaultHealthPort       = 10248
	DefaultMaxPods          = 250
	DefaultClusterDomain    = "cluster.local"
	DefaultEphemeral        = "10Gi"
	DefaultTemplateMemory   = "512Mi"
	DefaultUnpackedSize     = "64Gi"
	DefaultDownloads        = 3
	DefaultGCHigh           = 85 // percent, as upstream's kubelet
	DefaultGCLow            = 80 // percent
	AcceleratorAuto         = "auto"
	AcceleratorKVM          = "kvm"
	AcceleratorTCG          = "tcg"
	maxKubeletVerbosity     = 7
	socketPathMax           = 107
	podResourcesSocketBelow = "/pod-resources/kubelet.sock"
	// RegistrationSocketBelow is where the kubelet looks for our CSI driver,
	// below its root directory.
	RegistrationSocketBelow = "/plugins_registry/atoll.sock"
)

// Load reads, defaults and validates the file. Its errors name the file, the
// key, the value and the cure, and wrap errdefs.ErrInvalidArgument
// (errdefs.ErrNotFound for a file that is not there).
func Load(file string) (*v1alpha1.SphereletConfiguration, error) {
	return load(file, Parse)
}

// LoadRuntime is Load for a host that serves the CRI without being a node:
// what only the kubelet and kube-proxy need may be left out.
func LoadRuntime(file string) (*v1alpha1.SphereletConfiguration, error) {
	return load(file, parseRuntime)
}

func load(file string, parse func([]byte) (*v1alpha1.SphereletConfiguration, error)) (*v1alpha1.SphereletConfiguration, error) {
	b, err := os.ReadFile(file)
	if errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("configuration %s: there is no such file: %w", file, errdefs.ErrNotFound)
	}
	if err != nil {
		return nil, fmt.Errorf("configuration %s: %w", file, err)
	}
	cfg, err := parse(b)
	if err != nil {
		return nil, fmt.Errorf("configuration %s: %w", file, err)
	}
	return cfg, nil
}

// Parse is Load for bytes already read.
func Parse(b []byte) (*v1alpha1.SphereletConfiguration, error) {
	cfg, err := read(b)
	if err != nil {
		return nil, err
	}
	return cfg, errors.Join(validateNode(cfg), validate(cfg))
}

func parseRuntime(b []byte) (*v1alpha1.SphereletConfiguration, error) {
	cfg, err := read(b)
	if err != nil {
		return nil, err
	}
	return cfg, validate(cfg)
}

// read decodes and fills in the defaults.
func read(b []byte) (*v1alpha1.SphereletConfiguration, error) {
	var head struct {
		APIVersion string `json:"apiVersion"`
		Kind       string `json:"kind"`
	}
	if err := yaml.Unmarshal(b, &head); err != nil {
		return nil, invalid("is not YAML: %v", err)
	}
	if head.Kind != v1alpha1.SphereletKind {
		return nil, invalid("kind is %q, must be %q", head.Kind, v1alpha1.SphereletKind)
	}
	if head.APIVersion != v1alpha1.GroupVersion {
		return nil, invalid("apiVersion is %q, must be %q", head.APIVersion, v1alpha1.GroupVersion)
	}
	cfg := &v1alpha1.SphereletConfiguration{}
	if err := yaml.UnmarshalStrict(b, cfg); err != nil {
		return nil, invalid("%s", unwrapYAML(err))
	}
	return cfg, setDefaults(cfg)
}

// unwrapYAML keeps the part of sigs.k8s.io/yaml's error that names the key.
func unwrapYAML(err error) string {
	s := err.Error()
	for _, prefix := range []string{"error converting YAML to JSON: ", "error unmarshaling JSON: ", "while decoding JSON: ", "json: "} {
		s = strings.TrimPrefix(s, prefix)
	}
	if strings.HasPrefix(s, "unknown field ") {
		s += "; see the API reference of " + v1alpha1.GroupVersion + " for the keys there are"
	}
	return s
}

func invalid(format string, args ...any) error {
	return fmt.Errorf(format+": %w", append(args, errdefs.ErrInvalidArgument)...)
}

func setDefaults(c *v1alpha1.SphereletConfiguration) error {
	if c.NodeName == "" {
		h, err := os.Hostname()
		if err != nil {
			return fmt.Errorf("nodeName is not set and the host's name is unknown: %w", err)
		}
		c.NodeName = strings.ToLower(strings.TrimSpace(h))
	}
	if c.DataDir != "" {
		c.DataDir = filepath.Clean(c.DataDir)
	}
	if c.RunDir == "" && c.DataDir != "" {
		c.RunDir = RunDir(c.DataDir)
	}
	orString(&c.Kubeconfig, filepath.Join(c.DataDir, "kubeconfig"))
	orInt(&c.Port, DefaultPort)
	orInt(&c.HealthPort, DefaultHealthPort)
	orInt(&c.MaxPods, DefaultMaxPods)
	orString(&c.ClusterDomain, DefaultClusterDomain)
	if c.KubeProxy == nil {
		yes := true
		c.KubeProxy = &yes
	}
	h := &c.Hypervisor
	if h.QEMU == "" {
		h.QEMU = "qemu-system-x86_64"
		if p, err := exec.LookPath(h.QEMU); err == nil {
			h.QEMU = p
		}
	}
	orString(&h.Accelerator, AcceleratorAuto)
	orString(&h.EphemeralDefault, DefaultEphemeral)
	if c.Templates.Enabled == nil {
		yes := true
		c.Templates.Enabled = &yes
	}
	orString(&c.Templates.Memory, DefaultTemplateMemory)
	orString(&c.Images.MaxUnpackedSize, DefaultUnpackedSize)
	if c.Images.MaxConcurrentDownloads == 0 {
		c.Images.MaxConcurrentDownloads = DefaultDownloads
	}
	orPercent(&c.Images.GCHighThresholdPercent, DefaultGCHigh)
	orPercent(&c.Images.GCLowThresholdPercent, DefaultGCLow)
	setDefaultDatastore(c)
	orString(&c.LogLevel, "info")
	return nil
}

func orPercent(p **int32, def int32) {
	if *p == nil {
		*p = &def
	}
}

func orString(p *string, def string) {
	if *p == "" {
		*p = def
	}
}

func orInt(p *int32, def int32) {
	if *p == 0 {
		*p = def
	}
}

// RunDir is the default of runDir for a data directory: short, because unix
// socket paths end at 107 bytes, and of the data directory alone, so that
// every program finds it.
func RunDir(dataDir string) string {
	return filepath.Join("/run/atoll", instance(dataDir))
}

// instance tells data directories of one machine apart.
func instance(dataDir string) string {
	sum := sha256.Sum256([]byte(filepath.Clean(dataDir)))
	return hex.EncodeToString(sum[:4])
}

// Paths below the data and run directories of one spherelet.
type Paths struct {
	Images, Disks, VMs, CRIState, CRIDatabase string
	PKI, PodLogs, PodManifests                string
	// Kubelet is the kubelet's root directory as every component names it:
	// below the data directory, or a short link in the run directory when
	// the kubelet's sockets would not fit otherwise. KubeletReal is where
	// the files are.
	Kubelet, KubeletReal string
	CRISocket, CSISocket string
	// Volumes is the default datastore, VolumeState what the back end of volumes
	// remembers.
	Volumes, VolumeState string
	// Formatting is where file systems of volumes are made before they are sent.
	Formatting string
	// Cgroup holds the VMs of this data directory, relative to the root of
	// the host's hierarchies.
	Cgroup        string
	Version, Lock string
}

// PathsOf returns where the files of a configuration are.
func PathsOf(c *v1alpha1.SphereletConfiguration) Paths {
	d := func(s ...string) string { return filepath.Join(append([]string{c.DataDir}, s...)...) }
	p := Paths{
		Images: d("images"), Disks: d("disks"), VMs: d("vms"), CRIState: d("cri"), CRIDatabase: d("cri.db"),
		PKI: d("pki"), PodLogs: d("podlogs"), PodManifests: d("manifests"),
		Kubelet: d("kubelet"), KubeletReal: d("kubelet"),
		Cgroup:    "atoll/" + instance(c.DataDir),
		CRISocket: filepath.Join(c.RunDir, "cri.sock"), CSISocket: filepath.Join(c.RunDir, "csi.sock"),
		Volumes: d("volumes"), VolumeState: d("datastores"), Formatting: d("formatting"),
		Version: d("version"), Lock: filepath.Join(c.RunDir, "spherelet.lock"),
	}
	if len(p.Kubelet)+max(len(podResourcesSocketBelow), len(RegistrationSocketBelow)) > socketPathMax {
		p.Kubelet = filepath.Join(c.RunDir, "kubelet")
	}
	return p
}

// Prepare makes the directories and refuses a data directory that a newer
// spherelet has written.
func Prepare(c *v1alpha1.SphereletConfiguration) (Paths, error) {
	p := PathsOf(c)
	if err := CheckVersion(p.Version); err != nil {
		return p, err
	}
	// QEMU runs as its own user, but is handed all it needs by descriptor.
	for _, dir := range []string{c.DataDir, c.RunDir, p.PKI} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return p, fmt.Errorf("directory %s: %w", dir, err)
		}
	}
	for _, dir := range []string{p.KubeletReal, p.PodLogs} {
		if err := os.MkdirAll(dir, 0o750); err != nil {
			return p, fmt.Errorf("directory %s: %w", dir, err)
		}
	}
	if p.Kubelet != p.KubeletReal {
		if err := linkTo(p.KubeletReal, p.Kubelet); err != nil {
			return p, err
		}
	}
	return p, os.WriteFile(p.Version, []byte(strconv.Itoa(DataVersion)+"\n"), 0o600)
}

func linkTo(target, link string) error {
	if old, err := os.Readlink(link); err == nil && old == target {
		return nil
	}
	if err := os.Remove(link); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("link %s: %w", link, err)
	}
	return os.Symlink(target, link)
}

// CheckVersion reads a version file; one that is not there is fine.
func CheckVersion(file string) error {
	b, err := os.ReadFile(file)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("version of the data directory: %w", err)
	}
	v, err := strconv.Atoi(strings.TrimSpace(string(b)))
	switch {
	case err != nil || v < 1:
		return fmt.Errorf("%s says %q, must be a number from 1: restore the file (this spherelet writes %d) or use another data directory: %w",
			file, strings.TrimSpace(string(b)), DataVersion, errdefs.ErrDataLoss)
	case v > DataVersion:
		return fmt.Errorf("data directory %s has version %d and this spherelet reads up to %d: install the newer spherelet again, or use another data directory: %w",
			filepath.Dir(file), v, DataVersion, errdefs.ErrFailedPrecondition)
	}
	return nil
}
