//go:build !failpoints

package main

import "context"

// serveHints is for tests; see hints_failpoints.go.
func serveHints(context.Context, *host) error { return nil }
