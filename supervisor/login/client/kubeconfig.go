package client

import (
	"bytes"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"time"

	"github.com/containerd/errdefs"
	"go.yaml.in/yaml/v3"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
)

// A kubeconfig is changed as the text that it is: comments, order, and fields
// that this client does not know stay. The lists of named entries in it:
const (
	clusters = "clusters"
	users    = "users"
	contexts = "contexts"
)

// entryKey is the field of an entry beside its name.
var entryKey = map[string]string{clusters: "cluster", users: "user", contexts: "context"}

// A document is a kubeconfig's text.
type document struct {
	root *yaml.Node // the document node
	// touched are the entries ("list/name") that were set or removed.
	touched map[string]bool
}

func parseDocument(text []byte) (*document, error) {
	d := &document{root: &yaml.Node{}, touched: map[string]bool{}}
	decoder := yaml.NewDecoder(bytes.NewReader(text))
	err := decoder.Decode(d.root)
	if errors.Is(err, io.EOF) || err == nil && d.root.Content[0].Tag == "!!null" {
		return d, yaml.Unmarshal([]byte("apiVersion: v1\nkind: Config\n"), d.root)
	}
	if err != nil {
		return nil, err
	}
	if err := decoder.Decode(&yaml.Node{}); !errors.Is(err, io.EOF) {
		return nil, errors.New("it holds more than one YAML document")
	}
	if d.root.Content[0].Kind != yaml.MappingNode {
		return nil, errors.New("it is no YAML mapping")
	}
	return d, nil
}

func (d *document) text() ([]byte, error) {
	var b bytes.Buffer
	e := yaml.NewEncoder(&b)
	e.SetIndent(2)
	err := e.Encode(d.root)
	return b.Bytes(), errors.Join(err, e.Close())
}

func (d *document) top() *yaml.Node { return d.root.Content[0] }

// field returns the value of a mapping's key, nil if there is none.
func field(m *yaml.Node, key string) *yaml.Node {
	if m == nil || m.Kind != yaml.MappingNode {
		return nil
	}
	for i := 0; i+1 < len(m.Content); i += 2 {
		if m.Content[i].Value == key {
			return resolve(m.Content[i+1])
		}
	}
	return nil
}

func resolve(n *yaml.Node) *yaml.Node {
	if n.Kind == yaml.AliasNode {
		return n.Alias
	}
	return n
}

func setField(m *yaml.Node, key string, value *yaml.Node) {
	for i := 0; i+1 < len(m.Content); i += 2 {
		if m.Content[i].Value == key {
			value.HeadComment, value.LineComment = m.Content[i+1].HeadComment, m.Content[i+1].LineComment
			m.Content[i+1] = value
			return
		}
	}
	m.Content = append(m.Content, &yaml.Node{Kind: yaml.ScalarNode, Value: key}, value)
}

func removeField(m *yaml.Node, key string) {
	for i := 0; i+1 < len(m.Content); i += 2 {
		if m.Content[i].Value == key {
			m.Content = slices.Delete(m.Content, i, i+2)
			return
		}
	}
}

func stringNode(s string) *yaml.Node {
	n := &yaml.Node{}
	n.SetString(s)
	return n
}

// list returns the sequence of that name, which it makes if asked to.
func (d *document) list(name string, make bool) *yaml.Node {
	l := field(d.top(), name)
	if l != nil && l.Kind == yaml.SequenceNode {
		if make && len(l.Content) == 0 {
			l.Style = 0 // not "[]"
		}
		return l
	}
	if !make {
		return nil
	}
	l = &yaml.Node{Kind: yaml.SequenceNode}
	setField(d.top(), name, l)
	return l
}

// entry returns what an entry holds beside its name, nil if there is none.
func (d *document) entry(list, name string) *yaml.Node {
	l := d.list(list, false)
	if l == nil {
		return nil
	}
	for _, e := range l.Content {
		if n := field(resolve(e), "name"); n != nil && n.Value == name {
			return field(resolve(e), entryKey[list])
		}
	}
	return nil
}

// set gives an entry these fields, in place of those of the same name; an empty
// value takes a field away. Other fields of the entry stay.
func (d *document) set(list, name string, fields [][2]string) *yaml.Node {
	d.touched[list+"/"+name] = true
	body := d.entry(list, name)
	if body == nil || body.Kind != yaml.MappingNode {
		d.remove(list, name) // one without a body
		body = &yaml.Node{Kind: yaml.MappingNode}
		e := &yaml.Node{Kind: yaml.MappingNode}
		setField(e, entryKey[list], body)
		setField(e, "name", stringNode(name))
		l := d.list(list, true)
		l.Content = append(l.Content, e)
	}
	for _, f := range fields {
		if f[1] == "" {
			removeField(body, f[0])
		} else {
			setField(body, f[0], stringNode(f[1]))
		}
	}
	return body
}

// remove takes all entries of that name away.
func (d *document) remove(list, name string) {
	l := d.list(list, false)
	if l == nil {
		return
	}
	d.touched[list+"/"+name] = true
	l.Content = slices.DeleteFunc(l.Content, func(e *yaml.Node) bool {
		n := field(resolve(e), "name")
		return n != nil && n.Value == name
	})
	if len(l.Content) == 0 {
		l.Style = yaml.FlowStyle // "[]"
	}
}

func (d *document) current() string {
	if n := field(d.top(), "current-context"); n != nil {
		return n.Value
	}
	return ""
}

func (d *document) setCurrent(name string) { setField(d.top(), "current-context", stringNode(name)) }

// lockWait is how long another program may hold the file; kubectl does for
// milliseconds.
const lockWait = 5 * time.Second

// edit changes a kubeconfig under the lock that kubectl takes, in one step and
// with mode 0600, and makes it if it is not there. Nothing but what change
// touched is different afterwards: that is checked before it is written. It is
// not written at all when change leaves it as it is.
func edit(path string, change func(*document, *clientcmdapi.Config) error) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return fmt.Errorf("kubeconfig: %w", err)
	}
	unlock, err := lock(path)
	if err != nil {
		return err
	}
	defer unlock()
	// A link stays one: what it names is replaced.
	target := path
	if resolved, err := filepath.EvalSymlinks(path); err == nil {
		target = resolved
	}
	old, err := os.ReadFile(target)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("kubeconfig: %w", err)
	}
	broken := func(err error) error {
		return fmt.Errorf("kubeconfig %s: %w; it was not changed", path, err)
	}
	before, err := clientcmd.Load(old)
	if err != nil {
		return broken(err)
	}
	d, err := parseDocument(old)
	if err != nil {
		return broken(err)
	}
	if err := change(d, before); err != nil {
		return err
	}
	text, err := d.text()
	if err != nil {
		return broken(err)
	}
	if len(d.touched) == 0 && d.current() == before.CurrentContext {
		return nil
	}
	after, err := clientcmd.Load(text)
	if err != nil {
		return broken(err)
	}
	if err := d.sameBut(before, after); err != nil {
		return broken(err)
	}
	return replace(target, text)
}

// sameBut compares all entries that were not touched.
func (d *document) sameBut(before, after *clientcmdapi.Config) error {
	lost := func(list, name string) error {
		return fmt.Errorf("%s %q would be changed by mistake: %w", list, name, errdefs.ErrInternal)
	}
	if err := same(before.Clusters, after.Clusters, func(n string) bool { return d.touched[clusters+"/"+n] }); err != "" {
		return lost(clusters, err)
	}
	if err := same(before.AuthInfos, after.AuthInfos, func(n string) bool { return d.touched[users+"/"+n] }); err != "" {
		return lost(users, err)
	}
	if err := same(before.Contexts, after.Contexts, func(n string) bool { return d.touched[contexts+"/"+n] }); err != "" {
		return lost(contexts, err)
	}
	return nil
}

// same returns the first name that differs.
func same[T any](before, after map[string]*T, touched func(string) bool) string {
	for n := range after {
		if !touched(n) && before[n] == nil {
			return n
		}
	}
	for n, b := range before {
		if !touched(n) && !reflect.DeepEqual(b, after[n]) {
			return n
		}
	}
	return ""
}

// lock takes the lock of client-go's tools/clientcmd: a file beside it.
func lock(path string) (unlock func(), err error) {
	name := path + ".lock"
	for deadline := time.Now().Add(lockWait); ; time.Sleep(20 * time.Millisecond) {
		f, err := os.OpenFile(name, os.O_CREATE|os.O_EXCL, 0)
		if err == nil {
			f.Close()
			return func() { os.Remove(name) }, nil
		}
		if !errors.Is(err, fs.ErrExist) {
			return nil, fmt.Errorf("kubeconfig: %w", err)
		}
		if time.Now().After(deadline) {
			return nil, fmt.Errorf("kubeconfig %s is locked by another program: if none runs, remove %s: %w", path, name, errdefs.ErrUnavailable)
		}
	}
}

// replace puts content in the place of a file, which keeps its owner; whoever
// reads it sees the old or the new one.
func replace(name string, content []byte) (err error) {
	f, err := os.CreateTemp(filepath.Dir(name), "."+filepath.Base(name)+".*") // 0600
	if err != nil {
		return fmt.Errorf("kubeconfig: %w", err)
	}
	defer func() {
		if err != nil {
			f.Close()
			os.Remove(f.Name())
			err = fmt.Errorf("kubeconfig: %w", err)
		}
	}()
	if st, err := os.Stat(name); err == nil {
		if err := keepOwner(f, st); err != nil {
			return err
		}
	}
	if _, err = f.Write(content); err != nil {
		return err
	}
	if err = f.Sync(); err != nil {
		return err
	}
	if err = f.Close(); err != nil {
		return err
	}
	return os.Rename(f.Name(), name)
}

// base64Of is how a kubeconfig holds PEM.
func base64Of(pem string) string { return base64.StdEncoding.EncodeToString([]byte(pem)) }
