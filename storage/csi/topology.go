package csi

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"maps"
	"regexp"
	"slices"
	"strings"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/openatoll/atoll/storage"
)

// Keys of topology segments, which are labels of the Node.
const (
	// TopologyHost has the node's name: a datastore of one host is reached there
	// alone.
	TopologyHost = "topology.atoll.dev/host"
	// TopologyVCenter has the instance UUID of the vCenter of which the node is a
	// host. KVM nodes have none, whatever their names are.
	TopologyVCenter = "topology.atoll.dev/vcenter"
	// TopologyZone is Kubernetes' own.
	TopologyZone = "topology.kubernetes.io/zone"
	// topologyDatastore and a shared datastore's ID are the key that nodes have
	// on which it can be reached, with the value reachable.
	topologyDatastore = "datastore.topology.atoll.dev/"
	// Reachable is the value of such a key.
	Reachable = "true"
)

var labelName = regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?$`)

// DatastoreKey is the key of a datastore, whose ID may be no label's name. Nodes
// that reach it have it as a label with the value Reachable.
func DatastoreKey(id string) string {
	if labelName.MatchString(id) {
		return topologyDatastore + id
	}
	sum := sha256.Sum256([]byte(id))
	return topologyDatastore + "h-" + hex.EncodeToString(sum[:16])
}

// topologyOf says from where a volume or snapshot can be reached.
func topologyOf(t storage.Topology) []*csi.Topology {
	segments := map[string]string{}
	switch {
	case t.Host != "":
		segments[TopologyHost] = t.Host
	case t.Datastore != "":
		segments[DatastoreKey(t.Datastore)] = Reachable
	}
	if t.Zone != "" {
		segments[TopologyZone] = t.Zone
	}
	if len(segments) == 0 {
		return nil
	}
	return []*csi.Topology{{Segments: segments}}
}

// nodeTopology is what can be reached from a node: its own datastores, and the
// shared ones.
func (d *Driver) nodeTopology(ctx context.Context) (*csi.Topology, error) {
	policies, err := d.disks.Policies(ctx)
	if err != nil {
		return nil, err
	}
	segments := map[string]string{TopologyHost: d.config.NodeName}
	if d.config.Zone != "" {
		segments[TopologyZone] = d.config.Zone
	}
	for _, p := range policies {
		for _, t := range p.Topology {
			if t.Host == "" && t.Datastore != "" {
				segments[DatastoreKey(t.Datastore)] = Reachable
			}
		}
	}
	return &csi.Topology{Segments: segments}, nil
}

// wanted turns what a claim's topology asks for into places, best first. Each
// segment of a node stands for its host's own datastores and for the shared
// ones that it names.
func (d *Driver) wanted(ctx context.Context, r *csi.TopologyRequirement) ([]storage.Topology, error) {
	terms := append(slices.Clone(r.GetPreferred()), r.GetRequisite()...)
	if len(terms) == 0 {
		return nil, nil
	}
	ids, err := d.datastoreIDs(ctx)
	if err != nil {
		return nil, err
	}
	var out []storage.Topology
	add := func(t storage.Topology) {
		if t != (storage.Topology{}) && !slices.Contains(out, t) {
			out = append(out, t)
		}
	}
	for _, term := range terms {
		for _, t := range places(term, ids) {
			add(t)
		}
	}
	return out, nil
}

// places are what one term allows.
func places(term *csi.Topology, ids map[string]string) []storage.Topology {
	s := term.GetSegments()
	var out []storage.Topology
	if host := s[TopologyHost]; host != "" || s[TopologyZone] != "" {
		out = append(out, storage.Topology{Host: host, Zone: s[TopologyZone]})
	}
	for _, key := range slices.Sorted(maps.Keys(s)) {
		if strings.HasPrefix(key, topologyDatastore) && ids[key] != "" {
			out = append(out, storage.Topology{Datastore: ids[key], Zone: s[TopologyZone]})
		}
	}
	return out
}

// datastoreIDs are the datastores by their keys.
func (d *Driver) datastoreIDs(ctx context.Context) (map[string]string, error) {
	policies, err := d.disks.Policies(ctx)
	if err != nil {
		return nil, err
	}
	ids := map[string]string{}
	for _, p := range policies {
		for _, id := range p.Datastores {
			ids[DatastoreKey(id)] = id
		}
	}
	return ids, nil
}
