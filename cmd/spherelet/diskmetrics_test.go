package main

import (
	"context"
	"strings"
	"testing"

	"k8s.io/component-base/metrics"

	"github.com/openatoll/atoll/api/v1alpha1"
	"github.com/openatoll/atoll/storage"
)

// inventory answers when it is let go.
type inventory struct{ items chan []storage.Item }

func (i inventory) Inventory(context.Context) ([]storage.Item, []storage.DatastoreState) {
	return <-i.items, []storage.DatastoreState{{Name: "own", ID: "abc"}, {Name: "nfs", Problem: "away"}}
}

func TestDiskMetrics(t *testing.T) {
	i := inventory{make(chan []storage.Item, 1)}
	c := newDiskCollector(i)
	registry := metrics.NewKubeRegistry()
	registry.CustomMustRegister(c)
	gather := func() map[string]string {
		families, err := registry.Gather()
		if err != nil {
			t.Fatal(err)
		}
		out := map[string]string{}
		for _, f := range families {
			for _, m := range f.GetMetric() {
				out[f.GetName()] += m.String() + "\n"
			}
		}
		return out
	}
	// A file system that hangs: the others' metrics are there all the same.
	if got := gather(); len(got) != 0 {
		t.Errorf("%v before there is an answer", got)
	}
	asking := c.asking
	i.items <- []storage.Item{
		{Volume: storage.Volume{ID: "abc.v-1", Bytes: 4096, Policy: "gold", Datastore: "own", Format: "raw"}, Used: 512, Holder: &storage.Holder{VM: "p_0", Host: "n1"}},
		{Volume: storage.Volume{Datastore: "own"}, File: "disks/x", Used: -1},
	}
	<-asking
	select {
	case <-c.changed:
	default:
		t.Error("nobody was told that volumes are new")
	}
	got := gather()
	for name, want := range map[string][]string{
		v1alpha1.MetricDisk:      {`"abc.v-1"`, `"gold"`, `"p_0"`, `"own:disks/x"`, `"file"`},
		v1alpha1.MetricDiskSize:  {`"abc.v-1"`, "4096"},
		v1alpha1.MetricDiskUsed:  {`"abc.v-1"`, "512"},
		v1alpha1.MetricDatastore: {`"away"`, `"own"`},
		v1alpha1.MetricDisksAge:  {"gauge"},
	} {
		for _, w := range want {
			if !strings.Contains(got[name], w) {
				t.Errorf("%s has no %s:\n%s", name, w, got[name])
			}
		}
	}
}
