package vsphere

import (
	"context"
	"fmt"
)

// Keys of a Secret with credentials, as Kubernetes' type basic-auth has them.
const (
	secretUser     = "username"
	secretPassword = "password"
)

// FromSecret returns Config.Credentials that are those of a Kubernetes Secret. It
// is read at each login with read, which reaches the API server and no cache, and
// returns the Secret's data. An error names the Secret, never what is in it.
func FromSecret(namespace, name string, read func(ctx context.Context, namespace, name string) (map[string][]byte, error)) func(context.Context) (user, password string, err error) {
	return func(ctx context.Context) (user, password string, err error) {
		data, err := read(ctx, namespace, name)
		if err != nil {
			return "", "", fmt.Errorf("Secret %s/%s: %w", namespace, name, err) //nolint:staticcheck // a kind's name
		}
		user, password = string(data[secretUser]), string(data[secretPassword])
		if user == "" || password == "" {
			return "", "", fmt.Errorf("Secret %s/%s lacks %s or %s: set both keys", namespace, name, secretUser, secretPassword) //nolint:staticcheck // a kind's name
		}
		return user, password, nil
	}
}
