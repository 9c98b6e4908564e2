package main

import "regexp"

// An exclusion is a spec that cannot pass where a pod is a virtual machine and
// its volumes are disks of it: it is not run.
type exclusion struct {
	spec   string // a regular expression on the spec's full name
	reason string
}

const noHost = "It looks at the node's mounts and devices from a privileged pod that joins the node's namespaces. " +
	"There is nothing to see: the node mounts no volume, and a pod has a kernel of its own. "

// ours are the patterns that apply to the driver; the suite skips the others.
const ours = `Dynamic PV \((default fs|block volmode|filesystem volmode)\)\] `

var exclusions = []exclusion{
	{ours + `volumeMode should not mount / map unused volumes in a pod`, noHost + "That a volume is mounted in the guest alone is tested by e2e/testdata/persistent.txt."},
	{ours + `subPath should unmount if pod is (gracefully|force) deleted while kubelet is down`, noHost + "It also stops the kubelet by ssh. What becomes of pods while spherelet is down is tested by e2e/testdata/alone."},
	{`Dynamic PV \((default fs|ext4|xfs)\)\] .*provisioning should provision storage with any volume data source`, "It deploys a populator and its validator from public images, of programs that are not built here."},
	{ours + `disruptive \[Disruptive\]`, "It restarts the kubelet by ssh. e2e/testdata/alone/persistent-kill.txt kills spherelet while volumes are in use."},
}

// An explanation says why the suite skipped specs, or why they fail.
type explanation struct {
	says string // a regular expression on what the suite says
	spec string // and on the spec's full name
	why  string
}

func (e explanation) fits(name, says string) bool {
	return regexp.MustCompile(e.says).MatchString(says) && regexp.MustCompile(e.spec).MatchString(name)
}

func explain(list []explanation, name, says string) string {
	for _, e := range list {
		if e.fits(name, says) {
			return e.why
		}
	}
	return ""
}
