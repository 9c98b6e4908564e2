// Podinit is PID 1 of every pod VM. See package vmpod/podinit.
package main

import "github.com/openatoll/atoll/vmpod/podinit"

func main() { podinit.Main() }
