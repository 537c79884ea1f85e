package command

import (
	"cmp"
	"flag"
	"fmt"
	"io"
	"maps"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"posthouse/simtest"
	"posthouse/simtest/record"
)

// random plays random plans, seed after seed.
func random(t *testing.T, args []string, term Terminal) (int, error) {
	var seeds, nodes, jobs int
	var seed uint64
	var minutes float64
	var length, shrink time.Duration
	var story, trace bool
	var with string
	_, err := flags("random", args, 0, func(f *flag.FlagSet) {
		f.IntVar(&seeds, "seeds", 10, "")
		f.Uint64Var(&seed, "seed", 1, "")
		f.Float64Var(&minutes, "minutes", 0, "")
		f.IntVar(&nodes, "nodes", 0, "")
		f.IntVar(&jobs, "jobs", runtime.GOMAXPROCS(0), "")
		f.DurationVar(&length, "length", 5*time.Minute, "")
		f.DurationVar(&shrink, "shrink", 0, "")
		f.StringVar(&with, "with", "", "")
		f.BoolVar(&story, "story", false, "")
		f.BoolVar(&trace, "trace", false, "")
	})
	if err != nil {
		return 0, err
	}
	if nodes != 0 && (nodes < 2 || nodes > 5) {
		return 0, misuse("random: --nodes is 2 to 5")
	}
	if length < time.Second || seeds < 1 || minutes < 0 || jobs < 1 {
		return 0, misuse("random: --length, --seeds, --minutes and --jobs are more than nothing")
	}
	plans := &plans{seed: seed, nodes: nodes, length: length, with: simtest.Kind(with)}
	if _, ok := plans.peek(); !ok {
		return 0, misuse("random: no plan from seed %d on has the fault %q", seed, with)
	}
	var watcher simtest.Watcher
	if trace {
		watcher.Trace, jobs = term.Err, 1
	}
	sum := &totals{out: term.Out, began: time.Now(), faults: map[simtest.Kind]int{}, under: map[uint64]time.Duration{}}
	done := make(chan struct{})
	told := sync.WaitGroup{}
	told.Go(func() { sum.news(term, done) })
	var wg sync.WaitGroup
	for range jobs {
		wg.Go(func() {
			for {
				p, n := plans.next()
				if p == nil || minutes > 0 && time.Since(sum.began).Minutes() >= minutes || minutes == 0 && n > seeds {
					return
				}
				t.Run(fmt.Sprint("seed ", p.Seed), func(t *testing.T) {
					watcher := watcher
					watcher.Clock = func(at time.Duration) { sum.clock(p.Seed, at) }
					watcher.Clock(0)
					r := simtest.Run(t, *p, watcher)
					sum.add(r, story)
					if len(r.Violations) > 0 && shrink > 0 {
						sum.say(smaller(t, r, shrink))
					}
				})
			}
		})
	}
	wg.Wait()
	close(done)
	told.Wait()
	sum.print(term.Out)
	if sum.wrong > 0 || t.Failed() {
		return broken, nil
	}
	return held, nil
}

// plans are the random plans from a seed on. Safe for concurrent use.
type plans struct {
	nodes  int
	length time.Duration
	with   simtest.Kind // only those with this fault; "": all

	mu    sync.Mutex
	seed  uint64 // to look at next
	given int
}

// rare is after how many seeds without a fault no plan has it.
const rare = 1000

// peek moves to the next plan and returns it.
func (s *plans) peek() (*simtest.Plan, bool) {
	for range rare {
		if p := simtest.RandomPlan(s.seed, s.nodes, s.length); s.with == "" || slices.Contains(p.Kinds, s.with) {
			return &p, true
		}
		s.seed++
	}
	return nil, false
}

// next returns the next plan, nil when there is none, and how many that makes.
func (s *plans) next() (*simtest.Plan, int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	p, _ := s.peek()
	s.seed++
	s.given++
	return p, s.given
}

// again is how often a smaller plan is run before it counts as one that holds:
// two runs of a plan differ.
const again = 3

// smaller takes events out of a plan that failed while it still does, for some
// time, and says what is left.
func smaller(t *testing.T, failed simtest.Result, limit time.Duration) string {
	end, runs := time.Now().Add(limit), 0
	fails := func(p simtest.Plan) (same bool) {
		for range again {
			if time.Now().After(end) {
				return false
			}
			runs++
			t.Run("smaller", func(t *testing.T) { same = simtest.Run(t, p, simtest.Watcher{}).SameAs(failed) })
			if same {
				return true
			}
		}
		return false
	}
	p := simtest.Shrink(failed.Plan, fails)
	if len(p.Events) == len(failed.Plan.Events) {
		return fmt.Sprintf("  seed %d: nothing smaller failed in %d runs\n", p.Seed, runs)
	}
	return fmt.Sprintf("  seed %d: %d of %d events are enough, by %d runs:\n%s", p.Seed, len(p.Events), len(failed.Plan.Events), runs, p)
}

// tell prints one seed's story, and what went wrong in it.
func tell(w io.Writer, r simtest.Result) {
	fmt.Fprintf(w, "seed %d, %d offices, faults %v:\n%s\n", r.Plan.Seed, len(r.Plan.Offices), r.Plan.Kinds, strings.Join(r.Story, "\n"))
	if len(r.Violations) > 0 {
		fmt.Fprintf(w, "\nlast minute:\n%s\n\n", strings.Join(r.Logs, "\n"))
	}
	for _, v := range r.Violations {
		fmt.Fprintf(w, "  ✗ seed %d: %s\n", r.Plan.Seed, v)
	}
}

// totals sums seeds up.
type totals struct {
	mu             sync.Mutex
	out            io.Writer
	began          time.Time
	seeds, wrong   int
	virtual, nodes time.Duration
	mail           record.Mail
	faults         map[simtest.Kind]int
	under          map[uint64]time.Duration // how far the seeds are that are not done
}

// standsStill is after how long of real time without any of virtual time a seed
// shows what its goroutines do: something turns on the spot.
const standsStill = 5 * time.Minute

// stands are the seeds that have come no further, and since when.
type stands map[uint64]stand

type stand struct {
	at    time.Duration
	since time.Time
}

// look returns the seeds that have just stood still for too long.
func (w stands) look(under map[uint64]time.Duration, now time.Time) (still []uint64) {
	for seed, at := range under {
		x, ok := w[seed]
		if !ok || x.at != at {
			x.at, x.since = at, now
		} else if now.Sub(x.since) > standsStill {
			still = append(still, seed)
			x.since = now
		}
		w[seed] = x
	}
	maps.DeleteFunc(w, func(seed uint64, _ stand) bool {
		_, ok := under[seed]
		return !ok
	})
	return still
}

// news says every half minute where the seeds are, until done is closed: they
// take minutes, and what is held says nothing.
func (s *totals) news(term Terminal, done <-chan struct{}) {
	tick := time.NewTicker(cmp.Or(term.News, 30*time.Second))
	defer tick.Stop()
	stands := stands{}
	for {
		select {
		case <-tick.C:
			fmt.Fprint(term.Err, s.far())
			s.mu.Lock()
			still := stands.look(s.under, time.Now())
			s.mu.Unlock()
			for _, seed := range still {
				stacks := make([]byte, 8<<20)
				stacks = stacks[:runtime.Stack(stacks, true)]
				fmt.Fprintf(term.Err, "seed %d stands still: no virtual time has passed in it for %v. All goroutines:\n%s\n", seed, standsStill, stacks)
			}
		case <-done:
			return
		}
	}
}

// far is a line of news.
func (s *totals) far() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	virtual := s.virtual
	for _, at := range s.under {
		virtual += at
	}
	return fmt.Sprintf("%7s  %d seeds done, %d under way, %.1f virtual hours; %d recipients sent, %d taken; %d violations\n",
		time.Since(s.began).Round(time.Second), s.seeds, len(s.under), virtual.Hours(), s.mail.Sent, s.mail.Taken, s.wrong)
}

// clock notes how far a seed is.
func (s *totals) clock(seed uint64, at time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.under[seed] = at
}

// say prints something of one seed.
func (s *totals) say(text string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	fmt.Fprint(s.out, text)
}

// add adds one seed's, and tells its story if anything is wrong with it.
func (s *totals) add(r simtest.Result, story bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if story || len(r.Violations) > 0 {
		tell(s.out, r)
	}
	delete(s.under, r.Plan.Seed)
	s.seeds++
	s.wrong += len(r.Violations)
	s.virtual += r.Virtual
	s.nodes += r.Virtual * time.Duration(len(r.Plan.Offices))
	s.mail.Sent += r.Mail.Sent
	s.mail.Taken += r.Mail.Taken
	for k, n := range r.Faults {
		s.faults[k] += n
	}
}

func (s *totals) print(w io.Writer) {
	took := time.Since(s.began)
	fmt.Fprintf(w, "%d seeds, %.1f virtual hours (%.1f node-hours) in %v: %.2f virtual hours a minute; %d recipients sent, %d taken; %d violations\n",
		s.seeds, s.virtual.Hours(), s.nodes.Hours(), took.Round(time.Second), s.virtual.Hours()/took.Minutes(), s.mail.Sent, s.mail.Taken, s.wrong)
	for _, k := range slices.Sorted(maps.Keys(s.faults)) {
		fmt.Fprintf(w, "  %-10s %d\n", k, s.faults[k])
	}
}
