package deciders

import (
	"slices"
	"strings"
)

// Shrink takes faults and load out of a plan while it still fails in the same
// way, and returns the smallest plan that it found: delta debugging, with at
// most limit runs.
func Shrink(p Plan, limit int) Plan {
	r := Run(p, Options{})
	limit--
	if len(r.Violations) == 0 {
		return p
	}
	want := class(r.Violations[0])
	fails := func(q Plan) bool {
		limit--
		r := Run(q, Options{})
		return len(r.Violations) > 0 && class(r.Violations[0]) == want
	}
	p.Faults = less(p.Faults, &limit, func(fs []Fault) bool { q := p; q.Faults = fs; return fails(q) })
	p.Load = less(p.Load, &limit, func(ls []Load) bool { q := p; q.Load = ls; return fails(q) })
	p.Faults = less(p.Faults, &limit, func(fs []Fault) bool { q := p; q.Faults = fs; return fails(q) })
	return p
}

// class is a violation's kind: what stands before its colon.
func class(s string) string { c, _, _ := strings.Cut(s, ":"); return c }

// less drops parts of a list, halves first, single ones last, while ok holds.
func less[T any](list []T, limit *int, ok func([]T) bool) []T {
	for size := max(len(list)/2, 1); len(list) > 0; size /= 2 {
		for at := 0; at < len(list) && *limit > 0; {
			shorter := slices.Delete(slices.Clone(list), at, min(at+size, len(list)))
			if ok(shorter) {
				list = shorter
			} else {
				at += size
			}
		}
		if size <= 1 {
			return list
		}
	}
	return list
}
