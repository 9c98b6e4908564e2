package cluster

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"time"

	"golang.org/x/net/dns/dnsmessage"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/openatoll/atoll/cmd/atoll/internal/hostnet"
)

// RESTConfig is the administrator's access, which works from any network
// namespace.
func RESTConfig(l Layout, s State) (*rest.Config, error) {
	c, err := clientcmd.BuildConfigFromFlags("", l.Kubeconfig())
	if err != nil {
		return nil, fmt.Errorf("read the cluster's kubeconfig: %w", err)
	}
	c.Dial = hostnet.Dialer(s.Netns(l))
	c.QPS = -1 // no client-side limit: a handful of calls
	c.Proxy = nil
	return c, nil
}

// Client is a client with RESTConfig.
func Client(l Layout, s State) (kubernetes.Interface, error) {
	c, err := RESTConfig(l, s)
	if err != nil {
		return nil, err
	}
	return kubernetes.NewForConfig(c)
}

// ready waits until a pod could run: the Node is Ready, names resolve and
// metrics are served.
func (u *up) ready(ctx context.Context, sup, node component) error {
	client, err := Client(u.Layout, u.state)
	if err != nil {
		return err
	}
	nctx, cancel := context.WithTimeout(ctx, nodeLimit)
	err = waitNode(nctx, client, u.state.Node, node.since)
	cancel()
	if err != nil {
		return node.fail(fmt.Errorf("node %s is not Ready: %w", u.state.Node, causeOf(ctx, err)))
	}
	u.step("node "+u.state.Node, "Ready")

	cfg := ControlPlaneConfig(u.Layout, u.state)
	server := netip.AddrPortFrom(cfg.DNSAddress, 53)
	name := "kubernetes.default.svc." + cfg.ClusterDomain + "."
	dial := hostnet.Dialer(u.state.Netns(u.Layout))
	err = until(ctx, addonLimit, 100*time.Millisecond, func(ctx context.Context) error {
		return lookup(ctx, dial, server, name)
	})
	if err != nil {
		return sup.fail(fmt.Errorf("DNS does not answer at %s: %w", server, err))
	}
	u.step("DNS", server.Addr().String())

	err = until(ctx, addonLimit, 250*time.Millisecond, func(ctx context.Context) error {
		return client.CoreV1().RESTClient().Get().AbsPath("/apis/metrics.k8s.io/v1beta1").Do(ctx).Error()
	})
	if err != nil {
		return sup.fail(fmt.Errorf("the metrics API does not answer: %w", err))
	}
	u.step("metrics", "metrics.k8s.io")
	return nil
}

// causeOf prefers why a context ended to the bare fact.
func causeOf(ctx context.Context, err error) error {
	if cause := context.Cause(ctx); cause != nil {
		return cause
	}
	return err
}

// until calls f until it succeeds; when ctx or the limit ends it returns f's
// last error.
func until(ctx context.Context, limit, every time.Duration, f func(context.Context) error) error {
	lctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	for {
		actx, acancel := context.WithTimeout(lctx, 5*time.Second)
		err := f(actx)
		acancel()
		if err == nil {
			return nil
		}
		select {
		case <-lctx.Done():
			if ctx.Err() != nil {
				return errors.Join(context.Cause(ctx), err)
			}
			return fmt.Errorf("after %v: %w", limit, err)
		case <-time.After(every):
		}
	}
}

// waitNode returns when the Node is Ready and has said so since a given time.
func waitNode(ctx context.Context, client kubernetes.Interface, name string, since time.Time) error {
	last := errors.New("it has not registered")
	for {
		// Without a resource version a watch begins with what there is.
		w, err := client.CoreV1().Nodes().Watch(ctx, metav1.ListOptions{
			FieldSelector: fields.OneTermEqualSelector(metav1.ObjectNameField, name).String(),
		})
		if err != nil {
			return errors.Join(last, err)
		}
		for ev := range w.ResultChan() {
			n, ok := ev.Object.(*corev1.Node)
			if !ok {
				break
			}
			if last = nodeReady(n, since); last == nil {
				w.Stop()
				return nil
			}
		}
		w.Stop()
		// A watch may end at any time; one that ends at once must not spin.
		select {
		case <-ctx.Done():
			return errors.Join(last, ctx.Err())
		case <-time.After(200 * time.Millisecond):
		}
	}
}

// nodeReady returns why a node is not Ready, nil if it is. What it said before
// since is old: the API server keeps the word of a node agent that has died.
func nodeReady(n *corev1.Node, since time.Time) error {
	for _, c := range n.Status.Conditions {
		if c.Type != corev1.NodeReady {
			continue
		}
		// Times in the API have seconds.
		if c.LastHeartbeatTime.Time.Before(since.Truncate(time.Second)) {
			return errors.New("it has not reported since it was started")
		}
		if c.Status == corev1.ConditionTrue {
			return nil
		}
		return fmt.Errorf("%s: %s", c.Reason, c.Message)
	}
	return errors.New("it has not reported its condition yet")
}

// lookup asks a DNS server for the A record of an absolute name.
func lookup(ctx context.Context, dial hostnet.DialFunc, server netip.AddrPort, name string) error {
	qname, err := dnsmessage.NewName(name)
	if err != nil {
		return err
	}
	msg := dnsmessage.Message{
		Header:    dnsmessage.Header{ID: uint16(time.Now().UnixNano()), RecursionDesired: true},
		Questions: []dnsmessage.Question{{Name: qname, Type: dnsmessage.TypeA, Class: dnsmessage.ClassINET}},
	}
	query, err := msg.Pack()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	conn, err := dial(ctx, "udp", server.String())
	if err != nil {
		return err
	}
	defer conn.Close()
	deadline, _ := ctx.Deadline()
	if err := conn.SetDeadline(deadline); err != nil {
		return err
	}
	if _, err := conn.Write(query); err != nil {
		return err
	}
	return readAnswer(conn, msg.ID, name)
}

func readAnswer(conn net.Conn, id uint16, name string) error {
	buf := make([]byte, 1500)
	n, err := conn.Read(buf)
	if err != nil {
		return err
	}
	if n < 2 || binary.BigEndian.Uint16(buf) != id {
		return errors.New("an answer to another question")
	}
	var p dnsmessage.Parser
	h, err := p.Start(buf[:n])
	if err != nil {
		return err
	}
	if h.RCode != dnsmessage.RCodeSuccess {
		return fmt.Errorf("%s: %s", strings.TrimSuffix(name, "."), h.RCode)
	}
	if err := p.SkipAllQuestions(); err != nil {
		return err
	}
	_, err = p.AnswerHeader() // one answer is enough
	return err
}
