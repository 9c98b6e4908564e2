// Package disks shows an admin all volumes of a cluster: what Kubernetes says of
// them beside what nodes have in their datastores.
package disks

import (
	"bufio"
	"fmt"
	"io"
	"strings"
	"time"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"

	"github.com/openatoll/atoll/api/v1alpha1"
)

// A Node is what one node has in its datastores.
type Node struct {
	Name string
	// Err is why nothing is known of it, nil if it has answered.
	Err        error
	Items      []Item
	Datastores []Datastore
}

// An Item is a volume, or a file of a disk that is none's.
type Item struct {
	ID, Name, Policy, Datastore, DatastoreID, Format string
	File, Encrypted                                  bool
	// VM has it open, on Host.
	VM, Host           string
	Damage, Unfinished string
	// Silent is why this is not known to be so still.
	Silent             string
	Compliance, Reason string
	// Namespace and Claim are for whom it was made.
	Namespace, Claim string
	Created          time.Time
	// Bytes and Used are -1 if they are not known.
	Bytes, Used int64
}

// A Datastore is one of a node's.
type Datastore struct {
	Name, ID string
	// Problem is why nothing of it is known, empty if it is there.
	Problem string
}

// stale is how old what a node says may be: it looks whenever it is asked, and
// shows what it saw last where a file system hangs.
const stale = 30 * time.Second

// ReadNode reads a node's metrics.
func ReadNode(name string, metrics io.Reader) Node {
	families, err := parse(metrics)
	if err != nil {
		return Node{Name: name, Err: fmt.Errorf("metrics of node %s: %w", name, err)}
	}
	if age := families[v1alpha1.MetricDisksAge].GetMetric(); len(age) == 1 && age[0].GetGauge().GetValue() > stale.Seconds() {
		return Node{Name: name, Err: fmt.Errorf("a datastore of node %s does not answer for %.0f s", name, age[0].GetGauge().GetValue())}
	}
	return read(name, families)
}

// ReadVCenter reads in the API server's metrics what the supervisor has seen in
// vCenter; nil if it serves none. What it saw before vCenter was silent is shown
// with the reason.
func ReadVCenter(metrics io.Reader) *Node {
	families, err := parse(only(metrics))
	if err != nil {
		return &Node{Err: fmt.Errorf("metrics of the API server: %w", err)}
	}
	n := read("", families)
	if len(n.Datastores) == 0 {
		return nil
	}
	if why := n.Datastores[0].Problem; why != "" {
		for i := range n.Items {
			n.Items[i].Silent = "vCenter " + n.Datastores[0].Name + ": " + why
		}
	}
	return &n
}

// only leaves the metrics of disks: the API server has thousands of others.
func only(metrics io.Reader) io.Reader {
	var kept strings.Builder
	lines := bufio.NewReader(metrics)
	for {
		line, err := lines.ReadString('\n')
		for _, name := range []string{v1alpha1.MetricDisk, v1alpha1.MetricDatastore} {
			if strings.HasPrefix(line, name) || strings.HasPrefix(line, "# TYPE "+name) {
				kept.WriteString(line)
			}
		}
		if err != nil {
			return strings.NewReader(kept.String())
		}
	}
}

func parse(metrics io.Reader) (map[string]*dto.MetricFamily, error) {
	parser := expfmt.NewTextParser(model.UTF8Validation)
	return parser.TextToMetricFamilies(metrics)
}

func read(name string, families map[string]*dto.MetricFamily) Node {
	n := Node{Name: name}
	at := map[string]int{}
	for _, m := range families[v1alpha1.MetricDisk].GetMetric() {
		i := item(labels(m))
		at[i.ID] = len(n.Items)
		n.Items = append(n.Items, i)
	}
	for metric, set := range map[string]func(*Item, int64){
		v1alpha1.MetricDiskSize: func(i *Item, v int64) { i.Bytes = v },
		v1alpha1.MetricDiskUsed: func(i *Item, v int64) { i.Used = v },
	} {
		for _, m := range families[metric].GetMetric() {
			if k, ok := at[labels(m)[v1alpha1.DiskID]]; ok {
				set(&n.Items[k], int64(m.GetGauge().GetValue()))
			}
		}
	}
	for _, m := range families[v1alpha1.MetricDatastore].GetMetric() {
		l := labels(m)
		n.Datastores = append(n.Datastores, Datastore{l[v1alpha1.DatastoreName], l[v1alpha1.DatastoreID], l[v1alpha1.DatastoreProblem]})
	}
	return n
}

func labels(m *dto.Metric) map[string]string {
	out := map[string]string{}
	for _, l := range m.GetLabel() {
		out[l.GetName()] = l.GetValue()
	}
	return out
}

func item(l map[string]string) Item {
	i := Item{
		ID: l[v1alpha1.DiskID], Name: l[v1alpha1.DiskName], Policy: l[v1alpha1.DiskPolicy], Datastore: l[v1alpha1.DiskDatastore],
		DatastoreID: l[v1alpha1.DiskDatastoreID], Format: l[v1alpha1.DiskFormat], File: l[v1alpha1.DiskKind] == "file", Encrypted: l[v1alpha1.DiskEncrypted] == "true",
		VM: l[v1alpha1.DiskVM], Host: l[v1alpha1.DiskHost], Damage: l[v1alpha1.DiskDamage], Unfinished: l[v1alpha1.DiskUnfinished],
		Compliance: l[v1alpha1.DiskCompliance], Reason: l[v1alpha1.DiskReason], Namespace: l[v1alpha1.DiskNamespace], Claim: l[v1alpha1.DiskClaim],
		Bytes: -1, Used: -1,
	}
	i.Created, _ = time.Parse(time.RFC3339, l[v1alpha1.DiskCreated]) // zero if it is not known
	return i
}

// podUID is the UID of the pod whose VM has the ID.
func podUID(vm string) string {
	uid, _, _ := strings.Cut(vm, "_")
	return uid
}
