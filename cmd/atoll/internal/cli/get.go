package cli

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"slices"
	"sync"
	"time"

	"github.com/spf13/cobra"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"sigs.k8s.io/yaml"

	"github.com/openatoll/atoll/cmd/atoll/internal/disks"
)

func newGet(g *globals) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "get",
		Short: "Show what nodes have for pods",
		Args:  cobra.NoArgs,
		RunE:  func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(newGetDisks(g))
	return cmd
}

// A diskView is the flags of `get disks`.
type diskView struct {
	kubeconfig, namespace, node, format string
	everywhere                          bool
}

func newGetDisks(g *globals) *cobra.Command {
	var v diskView
	cmd := &cobra.Command{
		Use:     "disks",
		Aliases: []string{"disk"},
		Short:   "Show volumes: their policies, claims, pods, VMs, datastores, and how they are",
		Long: `Shows the disks of persistent volumes as nodes have them in their datastores,
beside what Kubernetes says of them. A disk is

  in use   a VM has it open
  free     nobody has it open
  orphan   no PersistentVolume has it, or no record stands for the file; nothing
           deletes it by itself
  damaged  it is not what its record says; it is refused, and nothing touches it
  unknown  its node or datastore does not answer

Disks that are no claim's are shown with -A. The nodes are asked through the API
server, which lets those who may get nodes/proxy. Of vSphere's volumes it shows what
the supervisor saw in vCenter last, which the API server's /metrics have: after each
change of a volume, and every spec.policyPollSeconds of the Supervisor.`,
		Example: "  atoll get disks -A\n  atoll get disks -n shop -o wide\n  atoll get disks -A --node n1 -o json",
		Args:    cobra.NoArgs,
		RunE:    func(cmd *cobra.Command, _ []string) error { return v.run(cmd, g) },
	}
	cmd.Flags().StringVar(&v.kubeconfig, "kubeconfig", "", "access to the cluster (default: that of the data directory)")
	cmd.Flags().StringVarP(&v.namespace, "namespace", "n", metav1.NamespaceDefault, "disks of claims of this namespace")
	cmd.Flags().BoolVarP(&v.everywhere, "all-namespaces", "A", false, "disks of all namespaces, and of none")
	cmd.Flags().StringVar(&v.node, "node", "", "disks that this node has open or alone reaches")
	cmd.Flags().StringVarP(&v.format, "output", "o", "table", "table, wide, json or yaml")
	_ = cmd.RegisterFlagCompletionFunc("output", cobra.FixedCompletions([]string{"table", "wide", "json", "yaml"}, cobra.ShellCompDirectiveNoFileComp))
	_ = cmd.RegisterFlagCompletionFunc("node", func(cmd *cobra.Command, _ []string, _ string) ([]string, cobra.ShellCompDirective) {
		return v.nodeNames(cmd.Context(), g), cobra.ShellCompDirectiveNoFileComp
	})
	return cmd
}

// nodeNames completes --node; none where there is no cluster.
func (v *diskView) nodeNames(ctx context.Context, g *globals) []string {
	client, err := topClient(g, v.kubeconfig)
	if err != nil {
		return nil
	}
	nodes, err := client.CoreV1().Nodes().List(ctx, metav1.ListOptions{Limit: podsAtOnce})
	if err != nil {
		return nil
	}
	var names []string
	for _, n := range nodes.Items {
		names = append(names, n.Name)
	}
	return names
}

func (v *diskView) run(cmd *cobra.Command, g *globals) error {
	if !slices.Contains([]string{"table", "wide", "json", "yaml"}, v.format) {
		return usageError{fmt.Errorf("-o %s: want table, wide, json or yaml", v.format)}
	}
	client, err := topClient(g, v.kubeconfig)
	if err != nil {
		return err
	}
	c, err := readDisks(cmd.Context(), client)
	if err != nil {
		return err
	}
	for _, n := range c.Nodes {
		if n.Err != nil {
			fmt.Fprintf(cmd.ErrOrStderr(), "atoll: node %s does not say what it has: %v\n", n.Name, n.Err)
		}
	}
	if c.VCenter != nil && c.VCenter.Err != nil {
		fmt.Fprintf(cmd.ErrOrStderr(), "atoll: what is in vCenter is not known: %v\n", c.VCenter.Err)
	}
	all := c.List()
	found := slices.DeleteFunc(slices.Clone(all), func(d disks.Disk) bool {
		return !v.everywhere && d.Namespace != v.namespace || v.node != "" && d.Node != v.node
	})
	if !v.everywhere && v.node == "" && len(found) < len(all) && v.format != "json" && v.format != "yaml" {
		defer fmt.Fprintf(cmd.ErrOrStderr(), "%d more are of other namespaces, or of none: -A shows them\n", len(all)-len(found))
	}
	return v.print(cmd.OutOrStdout(), found)
}

func (v *diskView) print(w io.Writer, found []disks.Disk) error {
	switch v.format {
	case "yaml":
		b, err := yaml.Marshal(found)
		if err != nil {
			return err
		}
		_, err = w.Write(b)
		return err
	case "json":
		return (&output{format: "json"}).print(w, found, nil)
	}
	return disks.Table(w, found, disks.Style{Namespaces: v.everywhere, Wide: v.format == "wide"})
}

const (
	// nodesAtOnce is how many nodes are asked side by side, nodeTimeout for how
	// long one.
	nodesAtOnce = 16
	nodeTimeout = 10 * time.Second
)

// readDisks asks the API server, and through it the nodes.
func readDisks(ctx context.Context, client kubernetes.Interface) (disks.Cluster, error) {
	// First: a volume is there before its PersistentVolume, and goes after it.
	nodes, err := client.CoreV1().Nodes().List(ctx, metav1.ListOptions{})
	if err != nil {
		return disks.Cluster{}, fmt.Errorf("list nodes: %w", err)
	}
	c := disks.Cluster{Now: time.Now(), Nodes: make([]disks.Node, len(nodes.Items))}
	var asked sync.WaitGroup
	places := make(chan struct{}, nodesAtOnce)
	for i, n := range nodes.Items {
		asked.Go(func() {
			places <- struct{}{}
			defer func() { <-places }()
			c.Nodes[i] = readNode(ctx, client, &n)
		})
	}
	asked.Go(func() { c.VCenter = readVCenter(ctx, client) })
	asked.Wait()
	opts := metav1.ListOptions{}
	volumes, err := client.CoreV1().PersistentVolumes().List(ctx, opts)
	if err != nil {
		return c, fmt.Errorf("list PersistentVolumes: %w", err)
	}
	claims, err := client.CoreV1().PersistentVolumeClaims(metav1.NamespaceAll).List(ctx, opts)
	if err != nil {
		return c, fmt.Errorf("list PersistentVolumeClaims: %w", err)
	}
	pods, err := client.CoreV1().Pods(metav1.NamespaceAll).List(ctx, opts)
	if err != nil {
		return c, fmt.Errorf("list pods: %w", err)
	}
	c.Volumes, c.Claims, c.Pods = volumes.Items, claims.Items, pods.Items
	return c, nil
}

func readNode(ctx context.Context, client kubernetes.Interface, n *corev1.Node) disks.Node {
	ctx, cancel := context.WithTimeout(ctx, nodeTimeout)
	defer cancel()
	b, err := client.CoreV1().RESTClient().Get().Resource("nodes").Name(n.Name).SubResource("proxy").Suffix("metrics").DoRaw(ctx)
	if err != nil {
		return disks.Node{Name: n.Name, Err: err}
	}
	return disks.ReadNode(n.Name, bytes.NewReader(b))
}

// readVCenter asks the API server, whose process the supervisor is, what it has
// seen in vCenter.
func readVCenter(ctx context.Context, client kubernetes.Interface) *disks.Node {
	ctx, cancel := context.WithTimeout(ctx, nodeTimeout)
	defer cancel()
	b, err := client.CoreV1().RESTClient().Get().AbsPath("/metrics").DoRaw(ctx)
	if err != nil {
		return &disks.Node{Err: err}
	}
	return disks.ReadVCenter(bytes.NewReader(b))
}
