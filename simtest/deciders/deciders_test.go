package deciders

import (
	"flag"
	"fmt"
	"maps"
	"os"
	"runtime"
	"runtime/debug"
	"runtime/pprof"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// Flags: go test ./simtest/deciders -run TestDays -v -args -seeds 1000 -from 1
var (
	seeds   = flag.Int("seeds", 150, "days to play")
	from    = flag.Uint64("from", 1, "first seed")
	minutes = flag.Float64("minutes", 0, "play days for so long instead, in real time")
	told    = flag.Bool("story", false, "print the timeline of the first seed that fails")
	profile = flag.String("profile", "", "write a profile of the processor's time there")
)

// found are the seeds that once showed something, each with the least plan that
// shows it, and what it was. A plan is kept as the names of its faults, a kind
// and its number among that kind, so that new kinds leave them alone, and as the
// places of its messages in the seed's own plan; none: all of them.
var found = []struct {
	name   string
	seed   uint64
	faults string
	load   []int
}{
	{"a delay was told by the origin, and again by the gateway", 45, "crash-at.0 shut.0 gateway.0", []int{49, 51, 52}},
	{"what a gateway gave up on a 451 was never final for its origin", 144, "defer.0", nil},
	{"the same, of two messages", 546, "cut-one-way.0 defer.3 drop-reply.1", nil},
	{"a former home took mail although it knew the new one", 2309, "defer.0 drop-reply.1 cut.0 refuse.0 crash-at.0 home.0", nil},
	{"the same, after it was cut off", 2657, "cut-one-way.0 home.0 cut.6 crash.0", []int{149}},
	{"the same, of a report", 2989, "shut.0 home.1", []int{37}},
	{"mail overtook a deferral that a full disk kept out of the log", 11892, "full.0 pause.0 quota.0 pause.1", nil},
	{"the same, at another hour", 15258, "", nil},
	{"mail overtook one whose delay was being told on a full disk", 1761, "quota.0 full.0 shut.2", nil},
	{"mail overtook one of whose other recipient a deferral was being recorded", 109449, "", nil},
	{"mail under way went into the mailbox of somebody who was deleted", 14, "cut-one-way.0 delete-user.0", []int{107}},
	{"mail behind mail that had ended was put off for an hour each, as if its home had deferred it", 100018, "quota.0 delete-user.1 cut-one-way.0", []int{96, 101, 102, 105, 106, 142, 143, 144, 145, 146}},
	{"the same, of reports", 102153, "", nil},
	{"a home that ended as it wrote a message had it on disk, and nobody had heard so: the observer's", 109528, "crash-at.0 home.1", []int{73, 74, 75, 78, 79, 81}},
	{"mail whose deferral a full disk kept out when its home was put out stayed with that home", 200150, "full.0 quota.0 revoke.0", nil},
	{"what was taken back from a gateway by a node that is one itself by now waited for another one", 300728, "defer.0 revoke.0", []int{134}},
	{"mail for somebody who was deleted waited for a home that was put out", 201712, "crash.0 delete-user.0 revoke.0", []int{74}},
	{"a report that was given up itself left no trace", 10221, "cut-one-way.0 refuse.0 quota.0", []int{100}},
}

// kept returns the plan of a line of found.
func kept(seed uint64, faults string, load []int) Plan {
	p := NewPlan(seed)
	if faults == "" { // kinds that came later are not of it
		p.Faults = slices.DeleteFunc(p.Faults, func(f Fault) bool { return f.Kind.rare() })
	} else {
		all, want := names(p.Faults), strings.Fields(faults)
		var some []Fault
		for i, f := range p.Faults {
			if slices.Contains(want, all[i]) {
				some = append(some, f)
			}
		}
		p.Faults = some
	}
	if load != nil {
		all := p.Load
		p.Load = nil
		for _, i := range load {
			p.Load = append(p.Load, all[i])
		}
	}
	return p
}

// names are the faults' names: "cut.0", "cut.1", "home.0".
func names(fs []Fault) (out []string) {
	n := map[Kind]int{}
	for _, f := range fs {
		out = append(out, fmt.Sprintf("%s.%d", f.Kind, n[f.Kind]))
		n[f.Kind]++
	}
	return out
}

// total adds up what runs showed.
type total struct {
	mu                            sync.Mutex
	seeds, events, taken, reports int
	virtual                       time.Duration
	trace                         uint64 // the sum of all runs' hashes: equal for equal seeds and code
	faults                        map[Kind]int
	failed                        []*Result
	began                         time.Time
}

func (a *total) add(r *Result) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.seeds++
	a.events += r.Events
	a.taken += r.Taken
	a.reports += r.Reports
	a.virtual += r.Virtual
	a.trace += r.Hash
	for k, n := range r.Faults {
		a.faults[k] += n
	}
	if len(r.Violations) > 0 {
		a.failed = append(a.failed, r)
	}
}

func (a *total) String() string {
	took := time.Since(a.began)
	s := fmt.Sprintf("%d seeds, %.0f a minute; %.0f virtual hours a real minute; %d messages taken, %d failures reported, %d events; %d violations; trace %016x\nfaults:",
		a.seeds, float64(a.seeds)/took.Minutes(), a.virtual.Hours()/took.Minutes(), a.taken, a.reports, a.events, len(a.failed), a.trace)
	for _, k := range slices.Sorted(maps.Keys(a.faults)) {
		s += fmt.Sprintf(" %s %d", k, a.faults[k])
	}
	return s
}

// many plays plans on all processors until next has no more.
func many(next func(k int) (Plan, bool)) *total {
	defer debug.SetGCPercent(debug.SetGCPercent(400)) // a run is small and leaves much behind
	a := &total{faults: map[Kind]int{}, began: time.Now()}
	var wg sync.WaitGroup
	var mu sync.Mutex
	k := 0
	for range runtime.GOMAXPROCS(0) {
		wg.Go(func() {
			for {
				mu.Lock()
				p, ok := next(k)
				k++
				mu.Unlock()
				a.mu.Lock()
				ok = ok && len(a.failed) < enough
				a.mu.Unlock()
				if !ok {
					return
				}
				a.add(Run(p, Options{}))
			}
		})
	}
	wg.Wait()
	slices.SortFunc(a.failed, func(x, y *Result) int { return int(int64(x.Plan.Seed) - int64(y.Plan.Seed)) })
	return a
}

// enough failures are a reason to stop.
const enough = 10

func TestDays(t *testing.T) {
	if *profile != "" {
		f, err := os.Create(*profile)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if err := pprof.StartCPUProfile(f); err != nil {
			t.Fatal(err)
		}
		defer pprof.StopCPUProfile()
	}
	began := time.Now()
	a := many(func(k int) (Plan, bool) {
		if *minutes > 0 {
			if time.Since(began).Minutes() > *minutes {
				return Plan{}, false
			}
		} else if k >= *seeds {
			return Plan{}, false
		}
		return NewPlan(*from + uint64(k)), true
	})
	t.Log(a)
	for i, r := range a.failed {
		t.Errorf("seed %d, trace %016x: %s", r.Plan.Seed, r.Hash, strings.Join(r.Violations, "\n"))
		if i == 0 {
			explain(t, r.Plan)
		}
	}
}

// explain shrinks a plan that fails and prints what a person needs.
func explain(t *testing.T, p Plan) {
	t.Helper()
	least := Shrink(p, 150)
	all := names(p.Faults)
	faults := []string{}
	for _, i := range places(p.Faults, least.Faults, Fault.String) {
		faults = append(faults, all[i])
	}
	load := fmt.Sprintf("%#v", places(p.Load, least.Load, func(l Load) string { return fmt.Sprintf("%+v", l) }))
	t.Logf("the least that still fails, for found in deciders_test.go: {\"\", %d, %q, %s}\n%s", p.Seed, strings.Join(faults, " "), load, least)
	if *told {
		t.Log(strings.Join(Run(least, Options{Timeline: true}).Timeline, "\n"))
	}
}

// places says where the members of some stand in all.
func places[T any](all, some []T, name func(T) string) (at []int) {
	for k, x := range all {
		if i := len(at); i < len(some) && name(x) == name(some[i]) {
			at = append(at, k)
		}
	}
	return at
}

func TestWhatDaysFoundStaysMended(t *testing.T) {
	a := many(func(k int) (Plan, bool) {
		if k >= len(found) {
			return Plan{}, false
		}
		return kept(found[k].seed, found[k].faults, found[k].load), true
	})
	for _, r := range a.failed {
		t.Errorf("seed %d: %s", r.Plan.Seed, strings.Join(r.Violations, "\n"))
	}
}

func TestASeedIsTheSameDayBitForBit(t *testing.T) {
	for seed := range uint64(16) {
		var sums [3]uint64
		var wg sync.WaitGroup
		for i := range sums { // beside each other, so that nothing is shared
			wg.Go(func() { sums[i] = Run(NewPlan(seed), Options{}).Hash })
		}
		wg.Wait()
		if sums[0] != sums[1] || sums[1] != sums[2] {
			t.Errorf("seed %d: %016x", seed, sums)
		}
		if seed < 4 {
			t.Logf("seed %d: trace %016x", seed, sums[0])
		}
	}
}

func TestShrinkingKeepsWhatFails(t *testing.T) {
	list := make([]int, 64)
	for i := range list {
		list[i] = i
	}
	limit := 200
	got := less(list, &limit, func(l []int) bool { return slices.Contains(l, 7) && slices.Contains(l, 40) })
	if !slices.Equal(got, []int{7, 40}) {
		t.Errorf("left %v", got)
	}
}
