// Package login signs users of vSphere's single sign-on in against the
// supervisor, as `kubectl vsphere login` does.
//
// A Server listens twice. Users send name and password to the port next to the
// API server's (package loginapi has the calls); vCenter judges them, nobody
// else sees or keeps the password; the answer is a token, and the namespaces
// that it opens. The API server asks about tokens at the other port, on
// loopback, with a client certificate: its webhook token authenticator. A token
// makes "sso:NAME@DOMAIN" out of its bearer, in groups "sso:GROUP@DOMAIN"
// (internal/sso), and gives no right by itself: RoleBindings do.
//
// Tokens are JWTs signed with ES256 by keys of this package, which are replaced
// every RotateEvery, with an overlap as long as a token lives. A token is good
// until it expires or is given back, which is remembered on disk, or until
// vCenter says that it has the user no more, which it is asked once a minute. The API
// server keeps what it was told for ten seconds: that long a token outlives
// both. Why so: docs/decisions/0016-login.md.
package login
