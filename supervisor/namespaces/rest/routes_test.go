package rest

import (
	"os"
	"strings"
	"testing"
)

const page = "../../../docs/namespaces-rest.md"

// TestDocumentation holds the tables of the page against what is served.
func TestDocumentation(t *testing.T) {
	b, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	var served, refused strings.Builder
	for _, r := range Routes() {
		call := "`" + r.Method + "` `" + r.Path + "`"
		if len(r.actions) > 0 {
			call += " `?action=" + strings.Join(r.actions, "\\|") + "`"
		}
		switch {
		case r.Unsupported != "":
			refused.WriteString("| " + call + " | " + r.Unsupported + " |\n")
		default:
			object, privilege := r.Object, r.Privilege
			if object == "" {
				object = "nothing: the list is empty"
			}
			if privilege == "" {
				privilege = "a session"
			}
			served.WriteString("| " + call + " | " + object + " | " + privilege + " |\n")
		}
	}
	for name, want := range map[string]string{"served": served.String(), "refused": refused.String()} {
		_, rest, ok := strings.Cut(string(b), "<!-- "+name+":begin -->\n")
		table, _, ok2 := strings.Cut(rest, "<!-- "+name+":end -->")
		lines := strings.SplitAfterN(table, "\n", 3) // two of heading
		if !ok || !ok2 || len(lines) != 3 || lines[2] != want {
			t.Errorf("%s: the table %q is not what is served, which is\n%s", page, name, want)
		}
	}
}

// TestQuotaDocumentation holds that each figure of a resource_spec is explained.
func TestQuotaDocumentation(t *testing.T) {
	b, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range quotaNames {
		if !strings.Contains(string(b), "`"+name+"`") {
			t.Errorf("%s does not explain %s", page, name)
		}
	}
	for _, f := range []fault{
		faultAlreadyExists, faultConcurrentChange, faultError, faultInvalidArgument, faultNotAllowedNow, faultNotFound, faultOperationNotFound,
		faultResourceInUse, faultServiceUnavailable, faultTimedOut, faultUnauthenticated, faultUnauthorized, faultUnexpectedInput, faultUnsupported,
	} {
		if !strings.Contains(string(b), "`"+f.kind+"`") {
			t.Errorf("%s does not explain %s", page, f.kind)
		}
	}
}
