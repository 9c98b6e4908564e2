package cluster

import (
	"encoding/json"
	"testing"

	"github.com/openatoll/atoll/api/v1alpha1"
)

func TestDescribeNamespace(t *testing.T) {
	for name, tc := range map[string]struct{ object, want string }{
		"new": {
			`{"metadata":{"name":"shop"},"spec":{}}`,
			`{"name":"shop","synced":false,"reason":"not looked at yet","cpu":{},"memory":{},"pools":[]}`,
		},
		"in step": {
			`{"metadata":{"name":"shop"},"spec":{"cpu":{"limit":"4"},"memory":{"limit":"8Gi"}},"status":{
				"conditions":[{"type":"Synced","status":"True","reason":"InSync"}],
				"pools":[{"zone":"a","id":"resgroup-1"},{"zone":"b","id":"resgroup-2"}],
				"usage":{"cpu":"500m","memory":"1Gi"}}}`,
			`{"name":"shop","synced":true,"cpu":{"used":"500m","limit":"4"},"memory":{"used":"1Gi","limit":"8Gi"},"pools":["resgroup-1","resgroup-2"]}`,
		},
		"not in step": {
			`{"metadata":{"name":"shop"},"spec":{"cpu":{"limit":"4"}},"status":{"conditions":[{"type":"Synced","status":"False","reason":"NoPermission"}]}}`,
			`{"name":"shop","synced":false,"reason":"NoPermission","cpu":{"limit":"4"},"memory":{},"pools":[]}`,
		},
	} {
		var ns v1alpha1.SupervisorNamespace
		if err := json.Unmarshal([]byte(tc.object), &ns); err != nil {
			t.Fatal(err)
		}
		got, err := json.Marshal(describeNamespace(&ns))
		if err != nil || string(got) != tc.want {
			t.Errorf("%s:\n got %s (%v)\nwant %s", name, got, err, tc.want)
		}
	}
}
