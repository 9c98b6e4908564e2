package namespaces

import (
	"strings"
	"unicode"
)

// maxPolicyName bytes: the name is part of a resource's name in quotas, whose
// prefix may have 253, and is a namespace's annotation; 63 keeps it a label.
const maxPolicyName = 63

// safeName makes a storage policy's name one for Kubernetes: "vSAN Default
// Storage Policy" becomes vsan-default-storage-policy, as VMware's Supervisor
// has it. It may be empty, where no letter is left.
func safeName(name string) string {
	var b strings.Builder
	dash := false
	for _, r := range strings.ToLower(name) {
		switch {
		case r < unicode.MaxASCII && (unicode.IsLetter(r) || unicode.IsDigit(r)):
			if dash && b.Len() > 0 {
				b.WriteByte('-')
			}
			dash = false
			b.WriteRune(r)
		default:
			dash = true
		}
	}
	out := b.String()
	if len(out) > maxPolicyName {
		out = strings.TrimRight(out[:maxPolicyName], "-")
	}
	return out
}

// policyName is safeName, or, where that is taken or empty, one with the
// beginning of the policy's id, which is as long as it takes.
func policyName(name, id string, taken func(string) bool) string {
	plain := safeName(name)
	if plain != "" && !taken(plain) {
		return plain
	}
	if plain == "" {
		plain = "policy"
	}
	suffix := safeName(id)
	for n := min(8, len(suffix)); ; n++ {
		tail := "-" + strings.TrimRight(suffix[:min(n, len(suffix))], "-")
		head := plain
		if len(head)+len(tail) > maxPolicyName {
			head = strings.TrimRight(head[:max(maxPolicyName-len(tail), 0)], "-")
		}
		if out := strings.TrimLeft(head+tail, "-"); !taken(out) || n >= len(suffix) {
			return out
		}
	}
}
