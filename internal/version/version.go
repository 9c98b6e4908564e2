// Package version says which Atoll this is.
package version

// Version is set by the linker (see Makefile): a tag, or the version under
// development.
var Version = "v0.1.0-dev"
