// Treesum prints a line of JSON for every entry of a file tree: type, mode,
// owner, time, size, SHA-256, link target, device, attributes. Two trees are
// the same if what it prints of them is. It is static, so that it runs inside
// any container.
//
//	treesum [-skip /proc,/sys] [DIR]     print the tree at DIR (default /)
//	treesum -diff WANT GOT               compare two such lists
package main

import (
	"flag"
	"fmt"
	"os"
	"strings"

	"github.com/openatoll/atoll/storage/treesum"
)

func main() {
	skip := flag.String("skip", "", "comma-separated `paths` to leave out, with what is below")
	diff := flag.Bool("diff", false, "compare two lists made before")
	flag.Parse()
	var paths []string
	if *skip != "" {
		paths = strings.Split(*skip, ",")
	}
	if err := run(*diff, paths, flag.Args()); err != nil {
		fmt.Fprintln(os.Stderr, "treesum:", err)
		os.Exit(1)
	}
}

func run(diff bool, skip, args []string) error {
	switch {
	case diff && len(args) == 2:
		return compare(args[0], args[1], skip)
	case diff || len(args) > 1:
		return fmt.Errorf("usage: treesum [-skip PATHS] [DIR], or treesum -diff WANT GOT")
	}
	root := "/"
	if len(args) == 1 {
		root = args[0]
	}
	entries, err := treesum.Dir(root, skip...)
	if err != nil {
		return err
	}
	return treesum.Write(os.Stdout, entries)
}

func compare(want, got string, skip []string) error {
	var lists [2][]treesum.Entry
	for i, path := range []string{want, got} {
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		lists[i], err = treesum.Read(f)
		f.Close()
		if err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
	}
	diffs := treesum.Diff(lists[0], lists[1], 50, skip...)
	for _, d := range diffs {
		fmt.Println(d)
	}
	if len(diffs) > 0 {
		return fmt.Errorf("%s and %s differ", want, got)
	}
	return nil
}
