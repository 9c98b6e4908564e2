//go:build e2estorage

// Package suite is upstream's external storage suite as a program: what
// e2e.test is with -storage.testdriver, without all of its other tests, which
// take most of its minutes to compile.
package suite

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/onsi/ginkgo/v2"
	"github.com/onsi/gomega"

	"k8s.io/kubernetes/test/e2e/framework"
	"k8s.io/kubernetes/test/e2e/framework/config"
	e2enode "k8s.io/kubernetes/test/e2e/framework/node"
	"k8s.io/kubernetes/test/e2e/framework/testfiles"
	e2etestingmanifests "k8s.io/kubernetes/test/e2e/testing-manifests"

	_ "k8s.io/kubernetes/test/e2e/framework/debug/init"   // events of a failed spec's namespace
	_ "k8s.io/kubernetes/test/e2e/framework/metrics/init" // asked for by the framework's flags
	_ "k8s.io/kubernetes/test/e2e/framework/node/init"    // nodes are ready after each spec
	_ "k8s.io/kubernetes/test/e2e/storage/external"       // -storage.testdriver
)

// What the runner tells: the FIFO that gets a line of JSON for each spec that
// has ended, and a file of expressions, a line each, for specs that are not to
// run: too many for a command line.
const (
	progressEnv = "ATOLL_E2E_STORAGE_PROGRESS"
	skipEnv     = "ATOLL_E2E_STORAGE_SKIP"
)

func TestMain(m *testing.M) {
	config.CopyFlags(config.Flags, flag.CommandLine)
	framework.RegisterCommonFlags(flag.CommandLine)
	framework.RegisterClusterFlags(flag.CommandLine)
	flag.Parse()
	if os.Getenv(progressEnv) == "" {
		fmt.Println("the storage suite needs a cluster: make e2e-storage")
		return
	}
	testfiles.AddFileSource(e2etestingmanifests.GetE2ETestingManifestsFS())
	testfiles.AddFileSource(testfiles.RootFileSource{Root: framework.TestContext.RepoRoot})
	framework.AfterReadingAllFlags(&framework.TestContext)
	os.Exit(m.Run())
}

// TestStorage runs the specs that -storage.testdriver has defined.
func TestStorage(t *testing.T) {
	gomega.RegisterFailHandler(framework.Fail)
	suite, reporter := framework.CreateGinkgoConfig()
	skip, err := os.ReadFile(os.Getenv(skipEnv))
	if err != nil {
		t.Fatal(err)
	}
	suite.SkipStrings = nil // the framework's default leaves out what has a [Feature:…]
	for line := range strings.Lines(string(skip)) {
		suite.SkipStrings = append(suite.SkipStrings, strings.TrimSuffix(line, "\n"))
	}
	// Other specs are linked in, too.
	for i, f := range suite.FocusStrings {
		suite.FocusStrings[i] = "External Storage .*(?:" + f + ")"
	}
	if len(suite.FocusStrings) == 0 {
		suite.FocusStrings = []string{"External Storage "}
	}
	// Here, since what is said at the top is gone after the framework's preview
	// of the specs, which is none of our business besides.
	ginkgo.ReportAfterEach(tell)
	ginkgo.RunSpecs(t, "external storage", suite, reporter)
}

var _ = ginkgo.SynchronizedBeforeSuite(func(ctx context.Context) {
	c, err := framework.LoadClientset()
	framework.ExpectNoError(err, "load the client")
	framework.ExpectNoError(e2enode.WaitForAllNodesSchedulable(ctx, c, framework.NewTimeoutContext().NodeSchedulable))
}, func(ctx context.Context) {
	c, err := framework.LoadClientset()
	framework.ExpectNoError(err, "load the client")
	nodes, err := e2enode.GetReadySchedulableNodes(ctx, c)
	framework.ExpectNoError(err, "list nodes")
	framework.TestContext.CloudConfig.NumNodes = len(nodes.Items)
	framework.TestContext.IPFamily = "ipv4"
})

// tell writes one line, short enough to be written in one piece.
func tell(r ginkgo.SpecReport) {
	line, err := json.Marshal(map[string]any{"state": r.State.String(), "name": r.FullText(), "seconds": r.RunTime.Seconds()})
	if err != nil {
		return
	}
	f, err := os.OpenFile(os.Getenv(progressEnv), os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		return
	}
	defer f.Close()
	_, _ = f.Write(append(line, '\n'))
}
