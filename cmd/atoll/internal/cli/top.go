package cli

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/term"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/openatoll/atoll/cmd/atoll/internal/cluster"
	"github.com/openatoll/atoll/cmd/atoll/internal/starts"
)

func newTop(g *globals) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "top",
		Short: "Show where time goes",
		Args:  cobra.NoArgs,
		RunE:  func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(newTopStarts(g))
	return cmd
}

func newTopStarts(g *globals) *cobra.Command {
	var kubeconfig, namespace string
	var everywhere bool
	var last int
	var out output
	cmd := &cobra.Command{
		Use:   "starts",
		Short: "Show the last starts of pods, with a bar of their phases",
		Long: `Shows, latest first, how long pods of the whole cluster took until their first
container ran, and which phase that was: waiting in the queue, network, image,
VM, agent or container. Phases run side by side where they can.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			client, err := topClient(g, kubeconfig)
			if err != nil {
				return err
			}
			if everywhere {
				namespace = metav1.NamespaceAll
			}
			found, err := listStarts(cmd.Context(), client, namespace, last)
			if err != nil {
				return err
			}
			return out.print(cmd.OutOrStdout(), found, func(w io.Writer) error {
				if len(found) == 0 {
					_, err := fmt.Fprintln(cmd.ErrOrStderr(), "no pod there has told of its start")
					return err
				}
				return starts.Table(w, found, styleOf(w, everywhere))
			})
		},
	}
	cmd.Flags().StringVar(&kubeconfig, "kubeconfig", "", "access to the cluster (default: that of the data directory)")
	cmd.Flags().StringVarP(&namespace, "namespace", "n", metav1.NamespaceDefault, "pods of this namespace")
	cmd.Flags().BoolVarP(&everywhere, "all-namespaces", "A", false, "pods of all namespaces")
	cmd.Flags().IntVar(&last, "last", 20, "how many at most; 0: all")
	out.add(cmd)
	return cmd
}

func topClient(g *globals, kubeconfig string) (kubernetes.Interface, error) {
	if kubeconfig != "" {
		config, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
		if err != nil {
			return nil, fmt.Errorf("read kubeconfig %s: %w", kubeconfig, err)
		}
		return kubernetes.NewForConfig(config)
	}
	l, err := g.layout()
	if err != nil {
		return nil, err
	}
	s, err := cluster.ReadState(l)
	if err != nil {
		return nil, err
	}
	return cluster.Client(l, s)
}

// podsAtOnce bounds what one answer of the API holds.
const podsAtOnce = 500

func listStarts(ctx context.Context, client kubernetes.Interface, namespace string, last int) ([]starts.Start, error) {
	found := []starts.Start{} // an empty list in JSON, too
	opts := metav1.ListOptions{Limit: podsAtOnce}
	for {
		pods, err := client.CoreV1().Pods(namespace).List(ctx, opts)
		if err != nil {
			return nil, fmt.Errorf("list pods: %w", err)
		}
		for i := range pods.Items {
			if s, ok := starts.Of(&pods.Items[i]); ok {
				found = append(found, s)
			}
		}
		found = starts.Last(found, last)
		if opts.Continue = pods.Continue; opts.Continue == "" {
			return found, nil
		}
	}
}

// widthElsewhere is for what is no terminal.
const widthElsewhere = 120

// styleOf asks the terminal for its width and the locale for its characters;
// COLUMNS is for what is no terminal.
func styleOf(w io.Writer, namespaces bool) starts.Style {
	style := starts.Style{Width: widthElsewhere, ASCII: true, Namespaces: namespaces}
	if n, err := strconv.Atoi(os.Getenv("COLUMNS")); err == nil && n > 0 {
		style.Width = n
	}
	f, ok := w.(*os.File)
	if !ok || !term.IsTerminal(int(f.Fd())) {
		return style
	}
	if n, _, err := term.GetSize(int(f.Fd())); err == nil && n > 0 {
		style.Width = n
	}
	locale := strings.ToUpper(cmp.Or(os.Getenv("LC_ALL"), os.Getenv("LC_CTYPE"), os.Getenv("LANG")))
	style.ASCII = !strings.Contains(locale, "UTF-8") && !strings.Contains(locale, "UTF8")
	return style
}
