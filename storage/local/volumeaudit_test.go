package local

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/openatoll/atoll/storage"
)

// changed is a configuration whose policies of the first datastore are changed.
func changed(c DisksConfig, change func(*DatastorePolicy)) DisksConfig {
	c.Datastores = slices.Clone(c.Datastores)
	c.Datastores[0].Policies = slices.Clone(c.Datastores[0].Policies)
	for i := range c.Datastores[0].Policies {
		change(&c.Datastores[0].Policies[i])
	}
	return c
}

// TestCompliance changes what a policy says, or what lies in the datastore, and
// changes it back.
func TestCompliance(t *testing.T) {
	for name, tc := range map[string]struct {
		policy string
		held   bool
		config func(*DatastorePolicy) // nil: none
		disk   func(t *testing.T, file string) (undo func())
		want   string // in the message; empty: compliant
	}{
		"nothing": {policy: "thin"},
		"a thick volume whose blocks went": {policy: "thick", want: "are reserved", disk: func(t *testing.T, file string) func() {
			f, err := os.OpenFile(file, os.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			if err := unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, mib); err != nil {
				t.Fatal(err)
			}
			return func() {
				f, err := os.OpenFile(file, os.O_RDWR, 0)
				if err != nil {
					t.Fatal(err)
				}
				defer f.Close()
				if err := unix.Fallocate(int(f.Fd()), 0, 0, 4*mib); err != nil {
					t.Fatal(err)
				}
			}
		}},
		"a file that is gone": {policy: "thin", want: "is gone", disk: func(t *testing.T, file string) func() {
			if err := os.Rename(file, file+".away"); err != nil {
				t.Fatal(err)
			}
			return func() {
				if err := os.Rename(file+".away", file); err != nil {
					t.Fatal(err)
				}
			}
		}},
		"now thick":                     {policy: "thin", want: "is older and thin", config: func(p *DatastorePolicy) { p.Thick = true }},
		"no longer offered":             {policy: "thin", want: "no longer offers policy thin", config: func(p *DatastorePolicy) { p.Name += "-new" }},
		"no longer encrypted":           {policy: "sealed", want: "no longer encrypted", config: func(p *DatastorePolicy) { p.Encrypted, p.KeyFile = false, "" }},
		"other limits, nobody has it":   {policy: "thin", config: func(p *DatastorePolicy) { p.IOPS = 50 }},
		"other limits while it is held": {policy: "thin", held: true, want: "allows 50 IOPS and 67108864 bytes/s, the VM that has the volume open 1000 IOPS", config: func(p *DatastorePolicy) { p.IOPS = 50 }},
		"held, as it was":               {policy: "thin", held: true},
	} {
		t.Run(name, func(t *testing.T) {
			before := testConfig(t, scratch(t), "node-a", "raw")
			d := openTest(t, before)
			v := mustCreate(t, d, "pvc-1", tc.policy, 4*mib)
			if tc.held {
				if _, err := attach(d, v.ID); err != nil {
					t.Fatal(err)
				}
			}
			undo, file := func() {}, fileOf(t, d, v.ID)
			if tc.disk != nil {
				undo = tc.disk(t, file)
			}
			after := before
			if tc.config != nil {
				after = changed(before, tc.config)
			}
			judge := func(c DisksConfig, want string) {
				t.Helper()
				d := openTest(t, c)
				got, err := d.Compliance(t.Context(), v.ID)
				if err != nil || (got.State == storage.Compliant) != (want == "") || !strings.Contains(got.Message, want) || want == "" && got.Message != "" {
					t.Errorf("%+v, %v; want %q", got, err, want)
				}
				items, _ := d.Inventory(t.Context())
				i := slices.IndexFunc(items, func(i storage.Item) bool { return i.ID == v.ID })
				if i < 0 || items[i].Compliance.State != got.State || items[i].Compliance.Message != got.Message || (items[i].Holder != nil) != tc.held {
					t.Errorf("inventory %+v", items)
				}
			}
			judge(after, tc.want)
			undo()
			judge(before, "")
		})
	}
}

// A holder that asks again gets what its device has, whatever the policy says
// now; the next one gets what it says.
func TestLimitsOfAHolderStay(t *testing.T) {
	c := testConfig(t, scratch(t), "node-a", "raw")
	d := openTest(t, c)
	v := mustCreate(t, d, "pvc-1", "thin", mib)
	if _, err := attach(d, v.ID); err != nil {
		t.Fatal(err)
	}
	d = openTest(t, changed(c, func(p *DatastorePolicy) { p.IOPS = 50 }))
	for _, want := range []int64{1000, 50} {
		a, err := attach(d, v.ID)
		if err != nil || a.IOPS != want || a.BytesPerSecond != map[int64]int64{1000: 64 << 20, 50: 64 << 20}[want] {
			t.Errorf("%+v, %v; want %d IOPS", a, err, want)
		}
		if err := d.Detach(t.Context(), v.ID, holder("node-a")); err != nil {
			t.Fatal(err)
		}
	}
}

// TestInventory finds what is nobody's, what is damaged and what is away, and
// changes none of it.
func TestInventory(t *testing.T) {
	c := testConfig(t, scratch(t), "node-a", "qcow2")
	d := openTest(t, c)
	whole, bad := mustCreate(t, d, "pvc-1", "sealed", mib), mustCreate(t, d, "pvc-2", "thin", mib)
	if _, err := d.Snapshot(t.Context(), whole.ID, "snap", nil); err != nil {
		t.Fatal(err) // its files are no strays
	}
	own := c.Datastores[0].Path
	stray := filepath.Join(own, disksDir, "v-000000000000000000000000-000000000000.raw")
	if err := os.WriteFile(stray, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(c.Datastores[1].Path, c.Datastores[1].Path+".away"); err != nil {
		t.Fatal(err)
	}
	look := func() (ids []string, byID map[string]storage.Item) {
		items, states := d.Inventory(t.Context())
		if len(states) != 2 || states[0].Problem != "" || !strings.Contains(states[1].Problem, c.Datastores[1].Path) || states[1].ID == "" {
			t.Errorf("datastores %+v", states)
		}
		byID = map[string]storage.Item{}
		for _, i := range items {
			ids, byID[i.ID] = append(ids, i.ID+i.File), i
		}
		return ids, byID
	}
	ids, items := look()
	if len(ids) != 3 || !slices.ContainsFunc(ids, func(s string) bool { return strings.HasSuffix(s, filepath.Base(stray)) }) {
		t.Errorf("items %q", ids)
	}
	if i := items[whole.ID]; !i.Encrypted || i.Used <= 0 || i.Damage != "" || i.Policy != "sealed" || i.Format != storage.FormatLUKS || i.Compliance.State != storage.Compliant {
		t.Errorf("%+v", i)
	}
	if i := items[""]; i.Used <= 0 || i.Bytes != 1 {
		t.Errorf("%+v", i)
	}
	if err := os.Truncate(filepath.Join(own, recordPath(bad.ID)), 40); err != nil {
		t.Fatal(err)
	}
	// Whose files are whose is not known any more.
	ids, items = look()
	if i := items[bad.ID]; len(ids) != 2 || !strings.Contains(i.Damage, "not JSON") || i.Used != -1 || i.Compliance.State != storage.NonCompliant || i.Datastore != "own" {
		t.Errorf("%q, %+v", ids, i)
	}
	if _, err := os.Stat(stray); err != nil {
		t.Error("a stray was removed")
	}
}
