package vcsim

import (
	"fmt"
	"testing"

	"github.com/containerd/errdefs"
)

func TestJoinAndList(t *testing.T) {
	dir := t.TempDir()
	u, err := openUsers(dir, "vsphere.local", "pw", 1000)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"bob", "Ada"} {
		if err := u.Set(name, "pw"); err != nil {
			t.Fatal(err)
		}
	}
	for _, join := range [][2]string{{"devs", "ada"}, {"Devs", "BOB@vsphere.local"}, {"devs", "ada"}, {"ops", "ada"}} {
		if err := u.Join(join[0], join[1]); err != nil {
			t.Errorf("%v: %v", join, err)
		}
	}
	if err := u.Join("devs", "nobody"); !errdefs.IsNotFound(err) {
		t.Errorf("nobody joins: %v", err)
	}
	if err := u.Join("a/b", "ada"); !errdefs.IsInvalidArgument(err) {
		t.Errorf("no group: %v", err)
	}
	u, err = openUsers(dir, "vsphere.local", "", 1000)
	if err != nil {
		t.Fatal(err)
	}
	want := "[{Ada@vsphere.local [devs@vsphere.local ops@vsphere.local]} {Administrator@vsphere.local [Administrators@vsphere.local]} {bob@vsphere.local [devs@vsphere.local]}]"
	if got := fmt.Sprint(u.List()); got != want {
		t.Errorf("%s\nwant %s", got, want)
	}
}
