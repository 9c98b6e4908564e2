package main

// An exclusion is a spec that a pod in a virtual machine cannot pass, as it
// presumes that host and pod share one kernel.
type exclusion struct {
	spec   string // a regular expression on the spec's full name
	reason string
}

var exclusions = []exclusion{}
