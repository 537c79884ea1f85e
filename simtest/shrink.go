package simtest

import "slices"

// Shrink takes events out of a plan while fails says that it still fails, halves
// of them first and single ones last, and returns the smallest that it found.
// Every fault ends by itself at the end of a run, so any event may go. Two runs
// of a plan differ: fails may run it a few times, and bounds the time.
func Shrink(p Plan, fails func(Plan) bool) Plan {
	for size := max(1, len(p.Events)/2); ; size /= 2 {
		for at := 0; at < len(p.Events); {
			q := p
			q.Events = slices.Delete(slices.Clone(p.Events), at, min(at+size, len(p.Events)))
			if fails(q) {
				p = q
			} else {
				at += size
			}
		}
		if size <= 1 {
			return p
		}
	}
}

// SameAs reports whether a run broke one of the invariants that another one broke.
func (r Result) SameAs(was Result) bool {
	if r.Record == nil || was.Record == nil {
		return r.Record == was.Record // neither came to its end
	}
	for i, v := range was.Record.Verdicts {
		if v.Broken > 0 && r.Record.Verdicts[i].Broken > 0 {
			return true
		}
	}
	return false
}
