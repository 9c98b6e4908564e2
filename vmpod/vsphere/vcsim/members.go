package vcsim

import (
	"slices"
	"strings"
)

// List returns all users, by name.
func (u *Users) List() []Identity {
	u.mu.Lock()
	defer u.mu.Unlock()
	all := []Identity{}
	for key := range u.state.Users {
		if id, err := u.identity(key); err == nil {
			all = append(all, id)
		}
	}
	slices.SortFunc(all, func(a, b Identity) int { return strings.Compare(a.Name, b.Name) })
	return all
}

// Join makes a user a member of a group, which is made if it is not there; its
// other members stay. An unknown user is ErrNotFound.
func (u *Users) Join(groupName, userName string) error {
	if _, err := u.Lookup(userName); err != nil {
		return err
	}
	local, err := u.local(groupName)
	if err != nil {
		return err
	}
	member, err := u.local(userName)
	if err != nil {
		return err
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	g := u.state.Groups[strings.ToLower(local)]
	if g == nil {
		g = &group{Name: local}
		u.state.Groups[strings.ToLower(local)] = g
	}
	if !slices.Contains(g.Members, strings.ToLower(member)) {
		g.Members = append(g.Members, strings.ToLower(member))
	}
	return u.save()
}
