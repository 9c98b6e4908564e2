package vsphere

import (
	"context"
	"errors"
	"strings"
	"testing"
)

func TestFromSecret(t *testing.T) {
	broken := errors.New("broken")
	for name, tt := range map[string]struct {
		data map[string][]byte
		err  error
		want string // in the error
	}{
		"both":        {map[string][]byte{"username": []byte("u"), "password": []byte("s3cret")}, nil, ""},
		"no password": {map[string][]byte{"username": []byte("u")}, nil, "Secret kube-system/vcenter lacks username or password: set both keys"},
		"no user":     {map[string][]byte{"password": []byte("s3cret")}, nil, "lacks username or password"},
		"not read":    {nil, broken, "Secret kube-system/vcenter: broken"},
	} {
		reads := 0
		credentials := FromSecret("kube-system", "vcenter", func(_ context.Context, namespace, name string) (map[string][]byte, error) {
			reads++
			if namespace != "kube-system" || name != "vcenter" {
				t.Errorf("%s: reads %s/%s", name, namespace, name)
			}
			return tt.data, tt.err
		})
		for range 2 {
			user, password, err := credentials(t.Context())
			switch {
			case tt.want == "" && (err != nil || user != "u" || password != "s3cret"):
				t.Errorf("%s: %q, %v", name, user, err)
			case tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want) || strings.Contains(err.Error(), "s3cret") || user+password != ""):
				t.Errorf("%s: %q, %v", name, user, err)
			case tt.err != nil && !errors.Is(err, tt.err):
				t.Errorf("%s: %v hides the cause", name, err)
			}
		}
		if reads != 2 {
			t.Errorf("%s: %d reads at two logins", name, reads)
		}
	}
}
