package main

import (
	"slices"
	"testing"
	"time"
)

// What an observer finds wrong with what writers say: a line is "what run n".
func TestObserver(t *testing.T) {
	type said struct {
		what, run string
		n         int64
	}
	for name, c := range map[string]struct {
		said []said
		want []string // kinds of violations
	}{
		"all is well":                    {[]said{{"/begin", "a", 0}, {"/wrote", "a", 1}, {"/wrote", "a", 2}, {"/begin", "b", 2}, {"/wrote", "b", 3}}, nil},
		"one that was under way":         {[]said{{"/begin", "a", 0}, {"/wrote", "a", 1}, {"/begin", "b", 2}, {"/wrote", "b", 3}}, nil},
		"said again":                     {[]said{{"/begin", "a", 0}, {"/wrote", "a", 1}, {"/wrote", "a", 1}, {"/begin", "b", 1}, {"/begin", "b", 1}}, nil},
		"the last value is gone":         {[]said{{"/begin", "a", 0}, {"/wrote", "a", 1}, {"/wrote", "a", 2}, {"/begin", "b", 1}}, []string{"lost"}},
		"formatted":                      {[]said{{"/begin", "a", 0}, {"/wrote", "a", 1}, {"/begin", "b", 0}, {"/wrote", "b", 1}}, []string{"lost"}},
		"more than anybody wrote":        {[]said{{"/begin", "a", 0}, {"/wrote", "a", 1}, {"/begin", "b", 3}}, []string{"order"}},
		"one is left out":                {[]said{{"/begin", "a", 0}, {"/wrote", "a", 1}, {"/wrote", "a", 3}}, []string{"order"}},
		"the predecessor writes on":      {[]said{{"/begin", "a", 0}, {"/wrote", "a", 1}, {"/begin", "b", 1}, {"/wrote", "a", 2}}, []string{"twice"}},
		"a write that the disk refused":  {[]said{{"/begin", "a", 0}, {"/failed", "a", 1}}, []string{"failed"}},
		"the same pod's next VM, as new": {[]said{{"/begin", "a", 0}, {"/begin", "b", 0}, {"/wrote", "b", 1}}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			o := &observer{f: &findings{began: time.Now()}, writers: map[string]*writerState{}}
			for _, s := range c.said {
				o.heard(s.what, "pod", s.run, s.n)
			}
			var got []string
			for _, v := range o.f.all {
				got = append(got, v.Kind)
			}
			if !slices.Equal(got, c.want) {
				t.Errorf("violations %q, want %q: %+v", got, c.want, o.f.all)
			}
		})
	}
}

func TestJudgeValues(t *testing.T) {
	const two = "000000000000001\n000000000000002\n"
	for name, c := range map[string]struct {
		text  string
		acked int64
		ok    bool
	}{
		"all":           {two, 2, true},
		"one more":      {two, 1, true},
		"none":          {"", 0, true},
		"one lost":      {two, 3, false},
		"a hole":        {"000000000000001\n\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00", 1, false},
		"torn":          {two + "00000", 2, false},
		"twice":         {"000000000000001\n000000000000001\n", 1, false},
		"another order": {"000000000000002\n000000000000001\n", 2, false},
	} {
		if err := judgeValues(c.text, c.acked); (err == nil) != c.ok {
			t.Errorf("%s: %v", name, err)
		}
	}
}
