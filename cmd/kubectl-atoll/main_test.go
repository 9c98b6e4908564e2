package main

import (
	"bytes"
	"context"
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// TestPassword: where it comes from, and where not.
func TestPassword(t *testing.T) {
	for name, tc := range map[string]struct {
		stdin, env string
		fromStdin  bool
		want       string
	}{
		"stdin":                {stdin: "s3same\n", fromStdin: true, want: "s3same"},
		"stdin with a return":  {stdin: "s3same\r\n", fromStdin: true, want: "s3same"},
		"stdin, spaces kept":   {stdin: " s3 same ", fromStdin: true, want: " s3 same "},
		"stdin goes first":     {stdin: "s3same", env: "other", fromStdin: true, want: "s3same"},
		"environment":          {env: "s3same", want: "s3same"},
		"empty stdin":          {fromStdin: true, env: "other"},
		"endless stdin":        {stdin: strings.Repeat("a", 2000), fromStdin: true},
		"stdin only if asked":  {stdin: "s3same\n"},
		"neither, no terminal": {},
	} {
		t.Run(name, func(t *testing.T) {
			t.Setenv(passwordEnv, tc.env)
			var shown bytes.Buffer
			got, err := terminal{in: strings.NewReader(tc.stdin), out: &shown}.password(t.Context(), "ada", tc.fromStdin)
			if got != tc.want || (err == nil) != (tc.want != "") {
				t.Errorf("%q, %v", got, err)
			}
			if err != nil && tc.stdin != "" && strings.Contains(err.Error(), strings.TrimSpace(tc.stdin)) {
				t.Errorf("the error shows it: %v", err)
			}
			if shown.Len() > 0 {
				t.Errorf("shown: %q", &shown)
			}
		})
	}
}

// TestCommandLine: mistakes end with 2, and no flag takes a password.
func TestCommandLine(t *testing.T) {
	for _, args := range []string{
		"login", "login --server sv --nonsense", "login --server sv -u ada --ca-file a --insecure-skip-tls-verify", "login --server sv",
	} {
		t.Setenv(usernameEnv, "")
		var out, errs bytes.Buffer
		if code := run(context.Background(), strings.Fields(args), strings.NewReader(""), &out, &errs); code != exitUsage || errs.Len() == 0 {
			t.Errorf("%s: exit %d, %s%s", args, code, &out, &errs)
		}
	}
	var walk func(*cobra.Command)
	walk = func(c *cobra.Command) {
		c.Flags().VisitAll(func(f *pflag.Flag) {
			if strings.Contains(f.Name, "password") && f.Value.Type() != "bool" || strings.Contains(f.Name, "token") {
				t.Errorf("%s --%s takes a secret", c.CommandPath(), f.Name)
			}
		})
		for _, sub := range c.Commands() {
			walk(sub)
		}
	}
	walk(newRoot())
}
