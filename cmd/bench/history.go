package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// historyDir has one file a run, of which a later one is compared with the
// latest of the same kind of host.
const historyDir = "docs/bench"

// history returns the committed runs, and their names.
func history(ctx context.Context) (map[string]report, error) {
	list, err := git(ctx, "ls-tree", "-r", "--name-only", "HEAD", "--", historyDir)
	if err != nil {
		return nil, err
	}
	runs := map[string]report{}
	for _, name := range strings.Fields(string(list)) {
		if filepath.Ext(name) != ".json" {
			continue
		}
		text, err := git(ctx, "show", "HEAD:"+name)
		if err != nil {
			return nil, err
		}
		if runs[name], err = parseReport(name, text); err != nil {
			return nil, err
		}
	}
	return runs, nil
}

func git(ctx context.Context, args ...string) ([]byte, error) {
	out, err := exec.CommandContext(ctx, "git", args...).Output()
	if err != nil {
		var failed *exec.ExitError
		if errors.As(err, &failed) {
			err = fmt.Errorf("%w: %s", err, failed.Stderr)
		}
		return nil, fmt.Errorf("git %s: %w", args[0], err)
	}
	return out, nil
}

// latest picks the newest run on a host of the same kind; "" if there is none.
func latest(runs map[string]report, like host) (name string) {
	for n, r := range runs {
		if r.Host.sameKind(like) && (name == "" || r.Date.After(runs[name].Date)) {
			name = n
		}
	}
	return name
}

// compareWithHistory prints what has changed since the last committed run. It
// fails if anything got worse than noise explains.
func compareWithHistory(ctx context.Context, path string) error {
	now, err := readReport(path)
	if err != nil {
		return err
	}
	runs, err := history(ctx)
	if err != nil {
		return err
	}
	name := latest(runs, now.Host)
	if name == "" {
		return fmt.Errorf("no committed run in %s is of a host like this one (%s): `make bench-save` and commit it", historyDir, now.Host.kind())
	}
	old := runs[name]
	fmt.Printf("before: %s, %s (%s)\n        %s\nnow:    %s (%s)\n        %s\n\n",
		name, old.Date.Format("2006-01-02 15:04"), old.Version, old.Host, now.Date.Format("2006-01-02 15:04"), now.Version, now.Host)
	if len(now.Parts) > 0 { // what did not run is not gone
		old.Figures = old.Figures.among(now.Figures)
	}
	changes := compare(old.Figures, now.Figures)
	if bad := printChanges(os.Stdout, changes); len(bad) > 0 {
		return fmt.Errorf("worse than before, beyond noise: %s", strings.Join(bad, ", "))
	}
	return nil
}

// among returns the figures that others have as well.
func (rs results) among(others results) (out results) {
	for _, r := range rs {
		if others.find(r.Name) != nil {
			out = append(out, r)
		}
	}
	return out
}

// saveToHistory puts a whole run where it can be committed.
func saveToHistory(path string) error {
	r, err := readReport(path)
	if err != nil {
		return err
	}
	if len(r.Parts) > 0 {
		return fmt.Errorf("%s is of %s alone: the history has whole runs", path, strings.Join(r.Parts, ", "))
	}
	to := filepath.Join(historyDir, r.Date.Format("2006-01-02T1504")+"-"+r.Host.kind()+".json")
	if err := writeJSON(to, r); err != nil {
		return err
	}
	fmt.Println(to)
	return nil
}
