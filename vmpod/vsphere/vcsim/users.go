package vcsim

import (
	"crypto/hmac"
	"crypto/pbkdf2"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/containerd/errdefs"
)

// hashRounds is OWASP's figure for PBKDF2 with HMAC-SHA256 (Password Storage
// Cheat Sheet, 2023).
const hashRounds = 600_000

const (
	usersFile = "users.json"
	// PasswordFile has the administrator's password as it was made at the first
	// start, in Config.Dir.
	PasswordFile = "admin.password"
	// DefaultDomain is Config.Domain unless it says otherwise.
	DefaultDomain = "vsphere.local"
	// AdminName is the administrator's, without the domain.
	AdminName = "Administrator"
	// AdminGroup holds the administrators.
	AdminGroup = "Administrators"
)

// Users are those of the single sign-on domain. Names are compared without
// case. All methods may be used from several goroutines, and have written to
// the data directory when they return.
type Users struct {
	rounds int // of PBKDF2, for new passwords
	domain string
	file   string // empty: not kept

	mu    sync.Mutex
	state usersState
	known map[[32]byte]bool // passwords that were right, hashed with seal
	seal  []byte
	hash  sync.Mutex // one slow hash at a time
}

type usersState struct {
	Users  map[string]*user  `json:"users"`  // by lower-case name
	Groups map[string]*group `json:"groups"` // by lower-case name
}

type user struct {
	Name   string `json:"name"`
	Salt   []byte `json:"salt"`
	Hash   []byte `json:"hash"`
	Rounds int    `json:"rounds"`
}

type group struct {
	Name    string   `json:"name"`
	Members []string `json:"members"` // lower-case user names
}

// An Identity is who a session belongs to.
type Identity struct {
	// Name is "Administrator@vsphere.local".
	Name string
	// Groups as "Administrators@vsphere.local".
	Groups []string
}

// openUsers loads them, or makes the first ones: the administrator with
// password (empty: a random one, which is left in dir). New passwords are
// hashed in so many rounds.
func openUsers(dir, domain, password string, rounds int) (*Users, error) {
	u := &Users{domain: domain, rounds: rounds, known: map[[32]byte]bool{}, seal: make([]byte, 32)}
	_, _ = rand.Read(u.seal)
	if dir != "" {
		u.file = filepath.Join(dir, usersFile)
		b, err := os.ReadFile(u.file)
		if err == nil {
			if err := json.Unmarshal(b, &u.state); err != nil || u.state.Users == nil || u.state.Groups == nil {
				return nil, fmt.Errorf("vcsim: %s cannot be read; restore it from a backup: %w", u.file, errors.Join(errdefs.ErrDataLoss, err))
			}
			return u, nil
		}
		if !errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("vcsim: users: %w", err)
		}
	}
	u.state = usersState{Users: map[string]*user{}, Groups: map[string]*group{}}
	if password == "" {
		password = rand.Text()
	}
	if dir != "" {
		if err := writeFile(filepath.Join(dir, PasswordFile), []byte(password+"\n")); err != nil {
			return nil, err
		}
	}
	return u, errors.Join(u.Set(AdminName, password), u.SetGroup(AdminGroup, AdminName))
}

// Set makes a user, or changes its password. ErrInvalidArgument for a name
// with a domain that is not this one's, and for an empty password.
func (u *Users) Set(name, password string) error {
	local, err := u.local(name)
	if err != nil {
		return err
	}
	if password == "" {
		return fmt.Errorf("vcsim: user %q needs a password: %w", name, errdefs.ErrInvalidArgument)
	}
	salt := make([]byte, 16)
	_, _ = rand.Read(salt)
	n := &user{Name: local, Salt: salt, Rounds: u.rounds}
	if n.Hash, err = pbkdf2.Key(sha256.New, password, salt, n.Rounds, 32); err != nil {
		return fmt.Errorf("vcsim: hash a password: %w", err)
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	key := strings.ToLower(local)
	u.state.Users[key] = n
	clear(u.known)
	u.known[u.proof(key, password)] = true
	return u.save()
}

// Remove takes a user away, from its groups too; ErrNotFound if there is none.
func (u *Users) Remove(name string) error {
	local, err := u.local(name)
	if err != nil {
		return err
	}
	key := strings.ToLower(local)
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.state.Users[key] == nil {
		return fmt.Errorf("vcsim: user %q: %w", name, errdefs.ErrNotFound)
	}
	delete(u.state.Users, key)
	for _, g := range u.state.Groups {
		g.Members = slices.DeleteFunc(g.Members, func(m string) bool { return m == key })
	}
	clear(u.known)
	return u.save()
}

// SetGroup makes a group, or changes its members; members that are not there
// are ErrNotFound.
func (u *Users) SetGroup(name string, members ...string) error {
	local, err := u.local(name)
	if err != nil {
		return err
	}
	g := &group{Name: local}
	u.mu.Lock()
	defer u.mu.Unlock()
	for _, m := range members {
		ml, err := u.local(m)
		if err != nil {
			return err
		}
		key := strings.ToLower(ml)
		if u.state.Users[key] == nil {
			return fmt.Errorf("vcsim: group %q: user %q: %w", name, m, errdefs.ErrNotFound)
		}
		g.Members = append(g.Members, key)
	}
	u.state.Groups[strings.ToLower(local)] = g
	return u.save()
}

// Lookup returns who name is, without any password; ErrNotFound if nobody.
func (u *Users) Lookup(name string) (Identity, error) {
	local, err := u.local(name)
	if err != nil {
		return Identity{}, err
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.identity(strings.ToLower(local))
}

// Authenticate checks a password. A wrong one and an unknown user are the same
// ErrUnauthenticated and take the same time.
func (u *Users) Authenticate(name, password string) (Identity, error) {
	denied := fmt.Errorf("vcsim: user name or password is wrong: %w", errdefs.ErrUnauthenticated)
	local, err := u.local(name)
	if err != nil {
		return Identity{}, denied
	}
	key := strings.ToLower(local)
	u.mu.Lock()
	account := u.state.Users[key]
	proof := u.proof(key, password)
	known := account != nil && u.known[proof]
	u.mu.Unlock()
	if !known && !u.check(account, password) {
		return Identity{}, denied
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.state.Users[key] != account { // changed meanwhile
		return Identity{}, denied
	}
	u.known[proof] = true
	return u.identity(key)
}

// check is slow on purpose; sign-ins wait for each other, so that guesses
// cannot take more than one processor.
func (u *Users) check(account *user, password string) bool {
	if account == nil {
		account = &user{Salt: make([]byte, 16), Rounds: u.rounds}
	}
	u.hash.Lock()
	defer u.hash.Unlock()
	got, err := pbkdf2.Key(sha256.New, password, account.Salt, account.Rounds, 32)
	return err == nil && len(account.Hash) > 0 && subtle.ConstantTimeCompare(got, account.Hash) == 1
}

// proof stands for a password that was right, as long as this process runs:
// clients that sign in for each call do not wait for the slow hash each time.
func (u *Users) proof(key, password string) (p [32]byte) {
	mac := hmac.New(sha256.New, u.seal)
	mac.Write([]byte(key + "\x00" + password))
	copy(p[:], mac.Sum(nil))
	return p
}

func (u *Users) identity(key string) (Identity, error) {
	account := u.state.Users[key]
	if account == nil {
		return Identity{}, fmt.Errorf("vcsim: user %q: %w", key, errdefs.ErrNotFound)
	}
	id := Identity{Name: account.Name + "@" + u.domain}
	for _, g := range u.state.Groups {
		if slices.Contains(g.Members, key) {
			id.Groups = append(id.Groups, g.Name+"@"+u.domain)
		}
	}
	slices.Sort(id.Groups)
	return id, nil
}

// principal brings "user", "user@domain" and "DOMAIN\user" to the form of
// Identity.Name, for comparing; empty if the domain is another one.
func (u *Users) principal(name string) string {
	local, err := u.local(name)
	if err != nil {
		return ""
	}
	return strings.ToLower(local + "@" + u.domain)
}

// exists tells whether there is such a user, or such a group.
func (u *Users) exists(name string, isGroup bool) bool {
	local, err := u.local(name)
	if err != nil {
		return false
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	if isGroup {
		return u.state.Groups[strings.ToLower(local)] != nil
	}
	return u.state.Users[strings.ToLower(local)] != nil
}

func (u *Users) names() (users, groups []string) {
	u.mu.Lock()
	defer u.mu.Unlock()
	for _, x := range u.state.Users {
		users = append(users, x.Name)
	}
	for _, x := range u.state.Groups {
		groups = append(groups, x.Name)
	}
	slices.Sort(users)
	slices.Sort(groups)
	return users, groups
}

// local strips the domain.
func (u *Users) local(name string) (string, error) {
	local := name
	if domain, rest, ok := strings.Cut(name, `\`); ok {
		if !strings.EqualFold(domain, u.domain) {
			return "", fmt.Errorf("vcsim: %q is not of domain %s: %w", name, u.domain, errdefs.ErrInvalidArgument)
		}
		local = rest
	} else if rest, domain, ok := strings.Cut(name, "@"); ok {
		if !strings.EqualFold(domain, u.domain) {
			return "", fmt.Errorf("vcsim: %q is not of domain %s: %w", name, u.domain, errdefs.ErrInvalidArgument)
		}
		local = rest
	}
	if local == "" || len(local) > 200 || strings.ContainsAny(local, "@\\/:\x00\n") {
		return "", fmt.Errorf("vcsim: %q is no name of a user or group: %w", name, errdefs.ErrInvalidArgument)
	}
	return local, nil
}

func (u *Users) save() error {
	if u.file == "" {
		return nil
	}
	b, err := json.Marshal(u.state)
	if err != nil {
		return fmt.Errorf("vcsim: users: %w", err)
	}
	return writeFile(u.file, b)
}

// writeFile replaces a file of mode 0600, so that a crash leaves the old one
// or the new one.
func writeFile(file string, content []byte) error {
	f, err := os.CreateTemp(filepath.Dir(file), ".new-*")
	if err != nil {
		return fmt.Errorf("vcsim: write %s: %w", file, err)
	}
	defer os.Remove(f.Name())
	_, err = f.Write(content)
	if err == nil {
		err = f.Sync()
	}
	if err := errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("vcsim: write %s: %w", file, err)
	}
	if err := os.Rename(f.Name(), file); err != nil {
		return fmt.Errorf("vcsim: write %s: %w", file, err)
	}
	return syncDir(filepath.Dir(file))
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("vcsim: %w", err)
	}
	defer d.Close()
	if err := d.Sync(); err != nil {
		return fmt.Errorf("vcsim: sync %s: %w", dir, err)
	}
	return nil
}

// spelled is a user's, or a group's, name as it was made, with the domain.
func (u *Users) spelled(name string, isGroup bool) string {
	local, err := u.local(name)
	if err != nil {
		return name
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	if g := u.state.Groups[strings.ToLower(local)]; isGroup && g != nil {
		local = g.Name
	}
	if a := u.state.Users[strings.ToLower(local)]; !isGroup && a != nil {
		local = a.Name
	}
	return local + "@" + u.domain
}

func (u *Users) matches(name, search string, exact bool) bool {
	if local, err := u.local(search); err == nil {
		search = local
	}
	if exact {
		return strings.EqualFold(name, search)
	}
	return strings.Contains(strings.ToLower(name), strings.ToLower(search))
}
