package simtest

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestASeedIsAlwaysTheSamePlan(t *testing.T) {
	for seed := range uint64(50) {
		a, b := RandomPlan(seed, 0, 5*time.Minute).String(), RandomPlan(seed, 0, 5*time.Minute).String()
		if a != b {
			t.Fatalf("seed %d gave two plans", seed)
		}
		if c := RandomPlan(seed+1, 0, 5*time.Minute).String(); a == c {
			t.Fatalf("seeds %d and %d give one plan", seed, seed+1)
		}
	}
}

// report prints why a scenario failed.
func report(t *testing.T, r Result) {
	t.Helper()
	if len(r.Violations) == 0 {
		return
	}
	t.Logf("seed %d, %d offices, faults %v:\n%s\n\nlast minute:\n%s", r.Plan.Seed, len(r.Plan.Offices), r.Plan.Kinds, strings.Join(r.Story, "\n"), strings.Join(r.Logs, "\n"))
	for _, v := range r.Violations {
		t.Errorf("seed %d: %s", r.Plan.Seed, v)
	}
}

func TestAPlanShrinksToTheEventsThatMatter(t *testing.T) {
	p := RandomPlan(5, 3, 5*time.Minute)
	a, b := p.Events[len(p.Events)/3], p.Events[len(p.Events)-2]
	runs := 0
	got := Shrink(p, func(q Plan) bool {
		runs++
		has := func(e Event) bool {
			return slices.ContainsFunc(q.Events, func(x Event) bool { return x.String() == e.String() })
		}
		return has(a) && has(b)
	})
	if len(got.Events) != 2 || got.Events[0].String() != a.String() || got.Events[1].String() != b.String() {
		t.Errorf("shrunk to\n%s", got)
	}
	if runs > 4*len(p.Events) {
		t.Errorf("%d runs for %d events", runs, len(p.Events))
	}
}

func TestRandom(t *testing.T) {
	for seed := range uint64(3) {
		t.Run(fmt.Sprint(seed+1), func(t *testing.T) { report(t, Run(t, RandomPlan(seed+1, 0, 5*time.Minute), Watcher{})) })
	}
}
