//go:build !failpoints

package main

import (
	"context"

	"github.com/openatoll/atoll/vmpod"
)

// serveHints is for tests; see hints_failpoints.go.
func serveHints(context.Context, string, vmpod.Preparer) error { return nil }
