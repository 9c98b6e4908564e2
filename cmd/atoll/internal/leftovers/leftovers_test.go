package leftovers

import (
	"reflect"
	"testing"
)

func TestOurs(t *testing.T) {
	for _, tc := range []struct {
		argv []string
		want bool
	}{
		{[]string{"/x/bin/atoll", "supervisor", "--data-dir", "/d"}, true},
		{[]string{"/x/bin/atoll", "status"}, false},
		{[]string{"spherelet", "--config", "f"}, true},
		{[]string{"/usr/bin/qemu-system-x86_64", "-name", "atoll-0123"}, true},
		{[]string{"qemu-system-x86_64", "-name", "guest=atoll-0123,debug-threads=on"}, true},
		{[]string{"qemu-system-x86_64", "-name", "another"}, false},
		{[]string{"qemu-system-x86_64", "-name"}, false},
		{[]string{"vim", "spherelet"}, false},
		{[]string{"/usr/lib/qemu/virtiofsd", "--fd=3", "-o", "source=/d/vms/0123_0/shares/h0123"}, true},
		{[]string{"/usr/libexec/virtiofsd", "--shared-dir=/d/vms/0123_0/shares/h0123"}, true},
		{[]string{"/usr/libexec/virtiofsd", "--shared-dir=/srv/vms"}, false},
	} {
		if got := ours(tc.argv); got != tc.want {
			t.Errorf("ours(%q) = %v", tc.argv, got)
		}
	}
}

func TestScope(t *testing.T) {
	s := Scope{IDs: []string{"0123abcd"}, Paths: []string{"/d", "/run/atoll/0123abcd"}}
	for path, want := range map[string]bool{"/d": true, "/d/x": true, "/data": false, "/run/atoll/0123abcd/s": true} {
		if got := s.under(path); got != want {
			t.Errorf("under(%q) = %v", path, got)
		}
	}
	if !s.mentions("atoll-0123abcd") || s.mentions("atoll-99999999") || !(Scope{}).mentions("anything") {
		t.Error("mentions")
	}
}

func TestParseTables(t *testing.T) {
	got := parseTables([]byte("table ip kube-proxy\ntable inet atoll-pods\ntable ip filter\n"))
	if want := []Leftover{{Kind: "table", Name: "inet atoll-pods"}}; !reflect.DeepEqual(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

func TestFindOnThisHost(t *testing.T) {
	if _, err := Find(Scope{IDs: []string{"ffffffff"}, Paths: []string{"/nowhere"}}); err != nil {
		t.Error(err)
	}
}
