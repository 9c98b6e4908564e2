package crashmatrix

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io/fs"
	"maps"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// What the product makes on a host is looked for here by what is documented of
// it (docs/architecture.md and the packages' own docs), not with its code: a
// mistake there must not hide itself.

func shortHash(text string, digits int) string {
	sum := sha256.Sum256([]byte(text))
	return hex.EncodeToString(sum[:])[:digits]
}

func tapOf(key string) string               { return "atl" + shortHash("tap\x00"+key, 11) }
func (n *node) socketsOf(key string) string { return filepath.Join(n.run, "vm", shortHash(key, 12)) }

// qemus are the QEMU processes of this node by the keys of their pods.
func (n *node) qemus() (map[string][]int, error) {
	files, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		return nil, err
	}
	found := map[string][]int{}
	// A template, or what waits to be a pod's, is of no pod that is known.
	name := regexp.MustCompile("\x00-name\x00atoll-((?:" + regexp.QuoteMeta(uidPrefix()) + "|[a-z]+~" + shortHash(filepath.Join(n.data, "vms"), 8) + ")[^\x00]*)\x00")
	for _, file := range files {
		b, err := os.ReadFile(file)
		if err != nil {
			continue // ended
		}
		if m := name.FindSubmatch(b); m != nil {
			pid, err := strconv.Atoi(filepath.Base(filepath.Dir(file)))
			if err != nil {
				return nil, err
			}
			found[string(m[1])] = append(found[string(m[1])], pid)
		}
	}
	return found, nil
}

// uidPrefix begins the UID of every pod of this process.
func uidPrefix() string { return fmt.Sprintf("matrix-%d-", os.Getpid()) }

// An expectation is what may be on the host.
type expectation struct {
	// pods are the keys of all pods that a record stands for, and whether they
	// are ready, in which case all that belongs to them must be there.
	pods map[string]bool
	// released: what is not ready has no network any more.
	released bool
	// containers are the IDs of all that a record stands for.
	containers []string
	// blobs and disks are what images there are have.
	blobs  map[string]bool
	layers map[string]bool
	images map[string]bool
}

func (n *node) expect(v view, released bool, registry *testRegistry) expectation {
	e := expectation{pods: v.ready(), released: released, blobs: map[string]bool{}, layers: map[string]bool{}, images: map[string]bool{}}
	for _, c := range v.containers {
		e.containers = append(e.containers, c.Id)
	}
	for _, i := range v.images {
		e.images[strings.TrimPrefix(i.Id, "sha256:")] = true
		for _, f := range registry.images {
			if slices.ContainsFunc(i.RepoDigests, func(d string) bool { return strings.HasSuffix(d, f.manifest) }) {
				for _, b := range f.blobs {
					e.blobs[b] = true
				}
				for _, l := range f.layers {
					e.layers[l] = true
				}
			}
		}
	}
	return e
}

// wrong lists everything on the host that no record stands for, and everything
// that a record stands for and is not there.
func (n *node) wrong(e expectation) []string {
	c := &census{node: n, expectation: e}
	for _, look := range []func() error{c.processes, c.directories, c.sockets, c.network, c.filter, c.disks, c.datastore, c.cgroups, c.secrets, c.imageStore, c.strangers} {
		if err := look(); err != nil {
			c.note("%v", err)
		}
	}
	return c.found
}

// A census collects what is wrong.
type census struct {
	*node
	expectation
	found []string
}

func (c *census) note(format string, args ...any) {
	c.found = append(c.found, fmt.Sprintf(format, args...))
}

// compare notes what is there and not allowed, and what is wanted and not
// there.
func (c *census) compare(what string, there []string, allowed, wanted func(string) bool, all []string) {
	for _, x := range there {
		if !allowed(x) {
			c.note("%s %s: no record knows it", what, x)
		}
	}
	for _, x := range all {
		if wanted(x) && !slices.Contains(there, x) {
			c.note("%s %s: it is gone", what, x)
		}
	}
}

func (c *census) known(key string) bool { _, ok := c.pods[key]; return ok }
func (c *census) ready(key string) bool { return c.pods[key] }

// networked says whether a pod may have a network.
func (c *census) networked(key string) bool {
	ready, known := c.pods[key]
	return ready || known && !c.released
}

func (c *census) keys() []string { return slices.Sorted(maps.Keys(c.pods)) }

func (c *census) processes() error {
	qs, err := c.qemus()
	if err != nil {
		return err
	}
	for key, pids := range qs {
		if len(pids) > 1 {
			c.note("QEMU %s: %d processes", key, len(pids))
		}
	}
	c.compare("QEMU", slices.Sorted(maps.Keys(qs)), c.ready, c.ready, c.keys())
	return nil
}

func names(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if os.IsNotExist(err) {
		return nil, nil
	}
	var out []string
	for _, e := range entries {
		out = append(out, e.Name())
	}
	return out, err
}

func (c *census) directories() error {
	there, err := names(filepath.Join(c.data, "vms"))
	if err != nil {
		return err
	}
	there = slices.DeleteFunc(there, func(s string) bool { return s == ".lock" || s == "kvm-probe.json" })
	c.compare("VM directory", there, c.known, c.ready, c.keys())
	return nil
}

func (c *census) sockets() error {
	there, err := names(filepath.Join(c.run, "vm"))
	if err != nil {
		return err
	}
	var want, may []string
	for key := range c.pods {
		for _, s := range []string{".qmp", ".agent", ".con"} {
			name := filepath.Base(c.socketsOf(key)) + s
			may = append(may, name)
			if c.ready(key) {
				want = append(want, name)
			}
		}
	}
	isIn := func(list []string) func(string) bool {
		return func(s string) bool { return slices.Contains(list, s) }
	}
	// A VM may have more sockets of its own; they bear its name.
	allowed := func(s string) bool {
		return slices.ContainsFunc(may, func(m string) bool { return strings.Split(m, ".")[0] == strings.Split(s, ".")[0] })
	}
	c.compare("socket", there, allowed, isIn(want), want)
	return nil
}

func (c *census) network() error {
	records, err := filepath.Glob(filepath.Join(c.data, "network", "attachments", "*"))
	if err != nil {
		return err
	}
	hidden, err := filepath.Glob(filepath.Join(c.data, "network", "attachments", ".*"))
	if err != nil {
		return err
	}
	var keys []string
	for _, file := range append(records, hidden...) {
		b, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		var r struct {
			Key string `json:"key"`
		}
		if err := json.Unmarshal(b, &r); err != nil || filepath.Base(file) != tapOf(r.Key)+".json" {
			c.note("network record %s is of no pod", file)
			continue
		}
		keys = append(keys, r.Key)
	}
	c.compare("network record", keys, c.networked, c.ready, c.keys())

	ifs, err := net.Interfaces() // not /sys/class/net, which is another namespace's
	if err != nil {
		return err
	}
	var links []string
	for _, i := range ifs {
		if i.Name != "lo" && i.Name != "atoll0" {
			links = append(links, i.Name)
		}
	}
	may, must := c.taps()
	c.compare("link", links, func(s string) bool { return slices.Contains(may, s) }, func(string) bool { return true }, must)
	return nil
}

func (c *census) taps() (may, must []string) {
	for key := range c.pods {
		if c.networked(key) {
			may = append(may, tapOf(key))
		}
		if c.ready(key) {
			must = append(must, tapOf(key))
		}
	}
	return may, must
}

var (
	tapName    = regexp.MustCompile(`atl[0-9a-f]{11}`)
	podAddress = regexp.MustCompile(`198\.19\.\d+\.\d+`)
)

// filter looks at what the packet filter has of pods.
func (c *census) filter() error {
	table := "atoll-" + shortHash("instance\x00"+filepath.Join(c.data, "network"), 8)
	list := func(set string) (string, error) {
		out, err := exec.Command("nft", "list", "set", "inet", table, set).CombinedOutput()
		if err != nil && bytes.Contains(out, []byte("No such file or directory")) {
			return "", nil
		}
		return string(out), err
	}
	taps, err := list("taps")
	if err != nil {
		return err
	}
	addresses, err := list("addresses")
	if err != nil {
		return err
	}
	may, must := c.taps()
	there := tapName.FindAllString(taps, -1)
	c.compare("filtered link", there, func(s string) bool { return slices.Contains(may, s) }, func(string) bool { return true }, must)
	if have := podAddress.FindAllString(addresses, -1); len(have) != len(there) {
		c.note("packet filter: %d links and %d addresses", len(there), len(have))
	}
	return nil
}

func (c *census) disks() error {
	there, err := names(filepath.Join(c.data, "disks"))
	if err != nil {
		return err
	}
	there = slices.DeleteFunc(there, func(name string) bool { return name == ".masters" }) // no pod's: see ours
	for i := range there {
		there[i] = strings.TrimSuffix(there[i], ".ext4")
	}
	c.compare("disk", there, c.known, c.ready, c.keys())
	return nil
}

func (c *census) cgroups() error {
	dirs, err := filepath.Glob("/sys/fs/cgroup/*/atoll/" + shortHash(c.data, 8) + "/*")
	if err != nil {
		return err
	}
	unified, err := filepath.Glob("/sys/fs/cgroup/atoll/" + shortHash(c.data, 8) + "/*")
	if err != nil {
		return err
	}
	for _, dir := range append(dirs, unified...) {
		if st, err := os.Stat(dir); err == nil && st.IsDir() && !c.known(filepath.Base(dir)) {
			c.note("cgroup %s: no record knows it", dir)
		}
	}
	return nil
}

func (c *census) secrets() error {
	there, err := names(filepath.Join(c.run, "secrets"))
	if err != nil {
		return err
	}
	for i := range there {
		there[i] = strings.TrimSuffix(there[i], ".json")
	}
	c.compare("secrets of container", there, func(s string) bool { return slices.Contains(c.containers, s) }, func(string) bool { return true }, c.containers)
	return nil
}

func (c *census) imageStore() error {
	ingests, err := names(filepath.Join(c.data, "images/content/ingest"))
	if err != nil {
		return err
	}
	for _, i := range ingests {
		c.note("half a blob, %s", i)
	}
	blobs, err := names(filepath.Join(c.data, "images/content/blobs/sha256"))
	if err != nil {
		return err
	}
	c.compare("blob", blobs, func(s string) bool { return c.blobs[s] }, func(string) bool { return true }, slices.Sorted(maps.Keys(c.blobs)))
	disks, err := names(filepath.Join(c.data, "images/disks"))
	if err != nil {
		return err
	}
	want := withSuffixes(c.images, ".erofs", ".vmdk")
	c.compare("image disk", disks, func(s string) bool { return slices.Contains(want, s) }, func(string) bool { return true }, want)
	layers, err := names(filepath.Join(c.data, "images/layers"))
	if err != nil {
		return err
	}
	want = withSuffixes(c.layers, ".data", ".index")
	c.compare("layer", layers, func(s string) bool { return slices.Contains(want, s) }, func(string) bool { return true }, want)
	return nil
}

// withSuffixes are the names of files, of each key one with each suffix.
func withSuffixes(keys map[string]bool, suffixes ...string) []string {
	var files []string
	for _, key := range slices.Sorted(maps.Keys(keys)) {
		for _, suffix := range suffixes {
			files = append(files, key+suffix)
		}
	}
	return files
}

// ours are the files that a data directory has besides those that the other
// looks are at.
var ours = regexp.MustCompile(`^(version|datastores/[^/]+\.json|volumes/(atoll-datastore\.json|atoll-lock|(hosts|volumes|leases)/[^./][^/]*\.json|disks/[^./][^/]*\.raw)|disks/[^/]+\.ext4|disks/\.masters/[0-9a-f]+/[0-9]+-[0-9a-f]+\.ext4|images/(images\.db|disks/[0-9a-f]{64}\.(erofs|vmdk)|layers/[0-9a-f]{64}\.(data|index)|content/(blobs/sha256/[0-9a-f]{64}|ingest/.*))|cri/cri\.db|network/(podcidr\.json|ip_forward\.before|attachments/atl[0-9a-f]{11}\.json)|vms/(\.lock|kvm-probe\.json|[^./][^/]*/(spec|process|devices|stop|exit|extent)\.json|[^./][^/]*/(console|stderr)\.log(\.[0-9]+)?))$`)

// strangers notes files below the data directory that are nobody's.
func (c *census) strangers() error {
	return filepath.WalkDir(c.data, func(path string, e fs.DirEntry, err error) error {
		if os.IsNotExist(err) {
			return nil
		}
		if err != nil || e.IsDir() {
			return err
		}
		rel, err := filepath.Rel(c.data, path)
		if err == nil && !ours.MatchString(rel) {
			c.note("file %s: nobody knows it", rel)
		}
		return err
	})
}
