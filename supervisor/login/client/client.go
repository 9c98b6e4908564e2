// Package client signs in at a supervisor and keeps what it gets in a
// kubeconfig: what `kubectl atoll login` and `logout` do.
package client

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"go.yaml.in/yaml/v3"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"

	"github.com/openatoll/atoll/supervisor/login/loginapi"
)

// extension marks the users in a kubeconfig that are of a login, and says where
// to sign out.
const extension = "atoll.dev/login"

// A mark is that extension.
type mark struct {
	Server  string    `json:"server"` // of the login, a URL
	User    string    `json:"user"`
	Expires time.Time `json:"expires"`
}

// Options of a login.
type Options struct {
	// Server is HOST, HOST:PORT or a URL of https.
	Server string
	// User is NAME, NAME@DOMAIN or DOMAIN\NAME.
	User string
	// Password is asked when the server has been reached and is trusted. What it
	// returns is not kept.
	Password func() (string, error)
	// CAFile is the authority that signed the server's certificate (PEM). Empty:
	// the one that an earlier login put into the kubeconfig, or the system's.
	CAFile string
	// Insecure takes any certificate, this once: the kubeconfig gets the
	// authority that the server names, and later logins check it.
	Insecure bool
	// Kubeconfig is the file to change; empty: the one that kubectl would.
	Kubeconfig string
	// Namespace becomes the current context; empty: see Result.Current.
	Namespace string
}

// A Result is what a login did.
type Result struct {
	Server, User string
	Expires      time.Time
	Warning      string // of the server; may be empty
	Kubeconfig   string // the file that was changed
	// Contexts that the user has at this supervisor: its own first, then one a
	// namespace, in order.
	Contexts []string
	// Current is the kubeconfig's current context: the one that it was, if it is
	// one of Contexts; the namespace's, if there is one alone; the supervisor's.
	Current string
	// Fingerprint is the SHA-256 of the authority that was taken on trust; empty
	// unless Options.Insecure.
	Fingerprint string
}

// Login signs in. On an error the kubeconfig is as it was. A wrong password is
// ErrUnauthenticated, too many of them ErrResourceExhausted, a certificate that
// is not trusted ErrPermissionDenied, a server that is not there ErrUnavailable.
func Login(ctx context.Context, o Options) (Result, error) {
	t, err := parseTarget(o.Server)
	if err != nil {
		return Result{}, err
	}
	files := kubeconfigFiles(o.Kubeconfig)
	have, err := files.Load()
	if err != nil {
		return Result{}, fmt.Errorf("kubeconfig: %w", err)
	}
	ca, err := o.authority(have, t)
	if err != nil {
		return Result{}, err
	}
	s, err := dial(t, ca, o.Insecure)
	if err != nil {
		return Result{}, err
	}
	defer s.close()
	if err := s.reach(ctx); err != nil {
		return Result{}, err
	}
	password, err := o.Password()
	if err != nil {
		return Result{}, err
	}
	l, err := s.login(ctx, o.User, password)
	if err != nil {
		return Result{}, err
	}
	r, err := s.keep(ctx, o, files.GetDefaultFilename(), l)
	if err != nil {
		// Nobody has the token: it must not be good for hours.
		return Result{}, errors.Join(err, s.logout(context.WithoutCancel(ctx), l.Token))
	}
	return r, nil
}

func kubeconfigFiles(explicit string) *clientcmd.ClientConfigLoadingRules {
	files := clientcmd.NewDefaultClientConfigLoadingRules()
	files.ExplicitPath = explicit
	files.WarnIfAllMissing = false
	if explicit != "" {
		if _, err := os.Stat(explicit); errors.Is(err, os.ErrNotExist) {
			// To be made: Load would fail, for kubectl's sake.
			files.ExplicitPath, files.Precedence = "", []string{explicit}
		}
	}
	return files
}

// authority is whose certificates to trust; nil: the system's.
func (o Options) authority(have *clientcmdapi.Config, t target) ([]byte, error) {
	if o.CAFile != "" {
		ca, err := os.ReadFile(o.CAFile)
		if err != nil {
			return nil, fmt.Errorf("--ca-file: %w", err)
		}
		return ca, nil
	}
	if c := have.Clusters[t.cluster()]; c != nil {
		return c.CertificateAuthorityData, nil
	}
	return nil, nil
}

// keep writes the login's contexts into the kubeconfig.
func (s *server) keep(ctx context.Context, o Options, path string, l loginapi.Login) (Result, error) {
	list, err := s.workloads(ctx, l.Token)
	if err != nil {
		return Result{}, err
	}
	var namespaces []string
	for _, w := range list {
		namespaces = append(namespaces, w.Namespace)
	}
	slices.Sort(namespaces)
	if o.Namespace != "" && !slices.Contains(namespaces, o.Namespace) {
		return Result{}, fmt.Errorf("%s has no namespace %s that %s may use: %w", s.target.name(), o.Namespace, l.User, errdefs.ErrNotFound)
	}
	r := Result{Server: s.target.name(), User: l.User, Expires: l.Expires, Warning: l.Warning, Kubeconfig: path}
	if o.Insecure {
		if r.Fingerprint, err = fingerprint(l.CertificateAuthority); err != nil {
			return Result{}, s.notALoginServer("it names no authority")
		}
	}
	var replaced []string // tokens of other users that nobody can find any more
	err = edit(path, func(d *document, have *clientcmdapi.Config) error {
		var current string
		r.Contexts, current, replaced, err = s.merge(d, have, l, namespaces, o.Namespace)
		if err == nil {
			d.setCurrent(current)
			r.Current = current
		}
		return err
	})
	if err != nil {
		return Result{}, err
	}
	for _, token := range replaced {
		_ = s.logout(ctx, token) // it expires all the same
	}
	return r, nil
}

// merge makes the document have this login, and no other at this supervisor.
func (s *server) merge(d *document, have *clientcmdapi.Config, l loginapi.Login, namespaces []string, wanted string) (all []string, current string, replaced []string, err error) {
	cluster, user := s.target.cluster(), s.target.user(l.User)
	d.set(clusters, cluster, [][2]string{
		{"server", target{s.target.host, int(l.APIServerPort)}.url("")},
		{"certificate-authority-data", base64Of(l.CertificateAuthority)},
		{"certificate-authority", ""}, {"insecure-skip-tls-verify", ""},
	})
	for name, auth := range have.AuthInfos {
		if name != user && strings.HasPrefix(name, s.target.user("")) {
			d.remove(users, name)
			replaced = append(replaced, auth.Token)
		}
	}
	body := d.set(users, user, [][2]string{{"token", l.Token}})
	if err := setMark(body, mark{Server: s.target.url(""), User: l.User, Expires: l.Expires}); err != nil {
		return nil, "", nil, err
	}
	byNamespace := map[string]string{}
	place := func(name, fallback, namespace string) (string, error) {
		for _, n := range []string{name, fallback} {
			if c := have.Contexts[n]; !d.touched[contexts+"/"+n] && (c == nil || c.Cluster == cluster) {
				fields := [][2]string{{"cluster", cluster}, {"user", user}}
				if namespace != "" {
					fields = append(fields, [2]string{"namespace", namespace})
				}
				d.set(contexts, n, fields)
				return n, nil
			}
		}
		return "", fmt.Errorf("the kubeconfig has contexts %q and %q of another cluster: rename one with `kubectl config rename-context`: %w", name, fallback, errdefs.ErrAlreadyExists)
	}
	own, err := place(s.target.name(), cluster, "")
	if err != nil {
		return nil, "", nil, err
	}
	all = []string{own}
	for _, n := range namespaces {
		if byNamespace[n], err = place(n, n+"-"+s.target.name(), n); err != nil {
			return nil, "", nil, err
		}
		all = append(all, byNamespace[n])
	}
	// Of namespaces that he may use no longer.
	for name, c := range have.Contexts {
		if c.Cluster == cluster && !slices.Contains(all, name) && strings.HasPrefix(c.AuthInfo, s.target.user("")) {
			d.remove(contexts, name)
		}
	}
	switch {
	case wanted != "":
		current = byNamespace[wanted]
	case slices.Contains(all, have.CurrentContext):
		current = have.CurrentContext
	case len(namespaces) == 1:
		current = all[1]
	default:
		current = own
	}
	return all, current, replaced, nil
}

func setMark(body *yaml.Node, m mark) error {
	var value yaml.Node
	if err := value.Encode([]map[string]any{{"name": extension, "extension": map[string]string{
		"server": m.Server, "user": m.User, "expires": m.Expires.UTC().Format(time.RFC3339),
	}}}); err != nil {
		return err
	}
	setField(body, "extensions", &value)
	return nil
}

// markOf returns a user's mark, if it is of a login.
func markOf(auth *clientcmdapi.AuthInfo) (m mark, ok bool) {
	raw, isRaw := auth.Extensions[extension].(*runtime.Unknown)
	if !isRaw || json.Unmarshal(raw.Raw, &m) != nil {
		return m, false
	}
	return m, m.Server != ""
}

func fingerprint(ca string) (string, error) {
	block, _ := pem.Decode([]byte(ca))
	if block == nil {
		return "", errors.New("no PEM")
	}
	return fmt.Sprintf("%X", sha256.Sum256(block.Bytes)), nil
}

// A SignedOut is one login that Logout ended.
type SignedOut struct {
	Server, User string
	// NotRevoked says why the token is good until Expires all the same; nil: it
	// is not.
	NotRevoked error
	Expires    time.Time
}

// Logout takes the contexts of a supervisor, or of all of them if server is
// empty, out of every kubeconfig that kubectl reads, and gives their tokens
// back. A supervisor that cannot be reached does not keep them there.
func Logout(ctx context.Context, server, kubeconfig string) ([]SignedOut, error) {
	cluster := ""
	if server != "" {
		t, err := parseTarget(server)
		if err != nil {
			return nil, err
		}
		cluster = t.cluster()
	}
	files := kubeconfigFiles(kubeconfig)
	var out []SignedOut
	for _, path := range files.GetLoadingPrecedence() {
		if _, err := os.Stat(path); errors.Is(err, os.ErrNotExist) {
			continue
		}
		var logins []login
		err := edit(path, func(d *document, have *clientcmdapi.Config) error {
			logins = takeOut(d, have, cluster)
			return nil
		})
		if err != nil {
			return out, err
		}
		for _, l := range logins {
			out = append(out, SignedOut{Server: l.target.name(), User: l.mark.User, Expires: l.mark.Expires, NotRevoked: l.revoke(ctx)})
		}
	}
	return out, nil
}

// A login as a kubeconfig has it.
type login struct {
	target target
	mark   mark
	token  string
	ca     []byte
}

// takeOut removes the logins at cluster, or all if it is empty.
func takeOut(d *document, have *clientcmdapi.Config, cluster string) (logins []login) {
	for name, auth := range have.AuthInfos {
		m, ok := markOf(auth)
		t, err := parseTarget(m.Server)
		if !ok || err != nil || cluster != "" && t.cluster() != cluster {
			continue
		}
		l := login{target: t, mark: m, token: auth.Token}
		if c := have.Clusters[t.cluster()]; c != nil {
			l.ca = c.CertificateAuthorityData
			d.remove(clusters, t.cluster())
		}
		d.remove(users, name)
		for context, c := range have.Contexts {
			if c.AuthInfo == name && c.Cluster == t.cluster() {
				d.remove(contexts, context)
				if context == have.CurrentContext {
					d.setCurrent("")
				}
			}
		}
		logins = append(logins, l)
	}
	return logins
}

func (l login) revoke(ctx context.Context) error {
	if !l.mark.Expires.IsZero() && time.Now().After(l.mark.Expires) {
		return nil
	}
	s, err := dial(l.target, l.ca, false)
	if err != nil {
		return err
	}
	defer s.close()
	return s.logout(ctx, l.token)
}
