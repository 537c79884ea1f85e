package simtest

import (
	"flag"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
	"testing"
	"time"
)

// Flags of the random scenarios: go test ./simtest -run TestRandom -args -seeds 100 -from 1000
var (
	seeds   = flag.Int("seeds", 3, "random scenarios to run")
	from    = flag.Uint64("from", 1, "first seed")
	nodes   = flag.Int("nodes", 0, "offices in each; 0: two, three and five in turns")
	length  = flag.Duration("length", 5*time.Minute, "of the phase with faults, in virtual time")
	minutes = flag.Float64("minutes", 0, "run seeds for so long instead, in real time")
	traced  = flag.Bool("trace", false, "print story and logs as they happen")
	verbose = flag.Bool("story", false, "print the story of each scenario, also when it went well")
)

func planOf(seed uint64) Plan {
	n := *nodes
	if n == 0 {
		n = []int{3, 5, 3, 5, 2}[seed%5]
	}
	return NewPlan(seed, n, *length)
}

func TestASeedIsAlwaysTheSamePlan(t *testing.T) {
	for seed := range uint64(50) {
		a, b := planOf(seed).String(), planOf(seed).String()
		if a != b {
			t.Fatalf("seed %d gave two plans", seed)
		}
		if c := planOf(seed + 1).String(); a == c {
			t.Fatalf("seeds %d and %d give one plan", seed, seed+1)
		}
	}
}

// report prints why a scenario failed.
func report(t *testing.T, r Result) {
	t.Helper()
	if len(r.Violations) == 0 && !*verbose {
		return
	}
	t.Logf("seed %d, %d offices, faults %v:\n%s\n\nlast minute:\n%s", r.Plan.Seed, len(r.Plan.Offices), r.Plan.Kinds, strings.Join(r.Story, "\n"), strings.Join(r.Logs, "\n"))
	for _, v := range r.Violations {
		t.Errorf("seed %d: %s", r.Plan.Seed, v)
	}
}

func TestRandom(t *testing.T) {
	began := time.Now()
	var virtual, nodeTime time.Duration
	attempts, taken, done, wrong := 0, 0, 0, 0
	faults := map[Kind]int{}
	for seed := *from; ; seed++ {
		if *minutes > 0 && time.Since(began).Minutes() >= *minutes || *minutes == 0 && seed >= *from+uint64(*seeds) {
			break
		}
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			var trace io.Writer
			if *traced {
				trace = os.Stderr
			}
			r := Run(t, planOf(seed), Watcher{Trace: trace})
			report(t, r)
			virtual += r.Virtual
			nodeTime += r.Virtual * time.Duration(len(r.Plan.Offices))
			attempts, taken, done = attempts+r.Mail.Sent, taken+r.Mail.Taken, done+1
			wrong += len(r.Violations)
			for k, n := range r.Faults {
				faults[k] += n
			}
		})
	}
	took := time.Since(began)
	t.Logf("%d seeds, %.1f virtual hours (%.1f node-hours) in %v: %.2f virtual hours a minute; %d recipients sent, %d taken; %d violations",
		done, virtual.Hours(), nodeTime.Hours(), took.Round(time.Second), virtual.Hours()/took.Minutes(), attempts, taken, wrong)
	for _, k := range slices.Sorted(maps.Keys(faults)) {
		t.Logf("  %-10s %d", k, faults[k])
	}
}
