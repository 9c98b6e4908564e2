// Package deptest holds the layering of docs/architecture.md as tests: which
// packages may import which, what the guest's agent must not link, and how
// files are named and sized.
package deptest
