package queue

import (
	"encoding/binary"
	"hash/fnv"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"

	"posthouse/transport"
)

// life plays random events on one leg for months and checks, at each step,
// what the rules promise. It returns a hash of everything that was decided.
func life(t interface{ Fatalf(string, ...any) }, seed uint64) uint64 {
	p := Policy{}.withDefaults()
	rnd := rand.New(rand.NewPCG(seed, 1))
	jitter := rand.New(rand.NewPCG(seed, 2)) // its own, so that a new event does not shift it
	dests := []transport.Destination{toFar, toPlzen, local, gateway}
	dest := dests[rnd.IntN(len(dests))]
	l := &row{ID: msgID(1), From: []string{anna, "", "x@far.example"}[rnd.IntN(3)], Accepted: time.Duration(rnd.Int64N(int64(day)))}
	l.Origin = []transport.Origin{transport.OriginOutside, transport.OriginSubmission, transport.OriginLocal}[rnd.IntN(3)]
	if l.Origin == transport.OriginLocal {
		l.From = "" // a report
	}
	if dest == toFar && rnd.IntN(3) == 0 {
		l.Keeper = plzen
	}
	for n := range 1 + rnd.IntN(4) {
		x := rcpt{N: n, State: Waiting}
		x.R = user(string(rune('a'+n)) + "@ours.example")
		x.R.Notify = transport.Notify(rnd.IntN(16))
		if x.R.Notify&transport.NotifyNever != 0 {
			x.R.Notify = transport.NotifyNever
		}
		if rnd.IntN(8) == 0 {
			x.R.Bounces = carl
		}
		l.Rcpts = append(l.Rcpts, x)
	}
	h := fnv.New64a()
	reported := map[int]owes{} // what each recipient was ever reported
	ended := map[int]bool{}
	now := l.Accepted
	for step := 0; step < 3000 && now < l.Accepted+120*day; step++ {
		now += time.Duration(rnd.Int64N(int64(2 * time.Hour)))
		ev := event{Kind: evTick, Unanswered: rnd.IntN(2) == 0, Member: rnd.IntN(10) != 0}
		if dest.Scope == transport.ScopeLocal {
			ev.Member = true
		}
		switch rnd.IntN(4) {
		case 0, 1:
			ev.Kind = evAnswers
			for i := range l.Rcpts {
				x := &l.Rcpts[i]
				if x.State != Waiting || x.Due > now || rnd.IntN(3) == 0 {
					continue
				}
				o := transport.Deferred
				if rnd.IntN(40) == 0 {
					o = transport.Outcome(1 + rnd.IntN(5))
				}
				a := answer{N: x.N, Result: transport.Result{Outcome: o, Text: "said", DSN: rnd.IntN(2) == 0}}
				if o == transport.Moved {
					a.Gone = rnd.IntN(4) == 0
				}
				ev.Answers = append(ev.Answers, a)
			}
		case 2:
			ev.Kind = evRoutes
			for i := range l.Rcpts {
				to := dest
				if inMesh(dest) && rnd.IntN(100) == 0 {
					to = toBrno
				}
				ev.Answers = append(ev.Answers, answer{N: l.Rcpts[i].N, Route: to})
			}
		}
		before := l.clone()
		cs := p.Step(now, dest, l, ev, jitter.Float64)
		if !slices.EqualFunc(before.Rcpts, l.Rcpts, func(a, b rcpt) bool { return a == b }) {
			t.Fatalf("seed %d: Step changed its input", seed)
		}
		age := now - l.Accepted
		for _, c := range cs {
			b, err := encMode.Marshal(c)
			if err != nil {
				t.Fatalf("%v", err)
			}
			h.Write(binary.BigEndian.AppendUint64(nil, uint64(now)))
			h.Write(b)
			x := &l.Rcpts[c.N]
			if ended[c.N] {
				t.Fatalf("seed %d: %+v after the end", seed, c)
			}
			if c.State == Waiting && c.To == nil && ev.Kind == evAnswers && c.Due <= now {
				t.Fatalf("seed %d: tried again without a pause: %+v", seed, c)
			}
			if c.State == Waiting && c.Due > now+5*time.Hour {
				t.Fatalf("seed %d: waits too long: %v", seed, c.Due-now)
			}
			if ev.Kind == evTick && c.State == Done {
				if age < p.life(dest) {
					t.Fatalf("seed %d: given up after %v", seed, age)
				}
				if inMesh(dest) && ev.Unanswered && ev.Member {
					t.Fatalf("seed %d: given up though the home may have it", seed)
				}
			}
			if c.State == Aside && l.Origin != transport.OriginOutside && l.Origin != transport.OriginLocal && age <= p.AsideAfter {
				t.Fatalf("seed %d: set aside after %v", seed, age)
			}
			if o := c.Add & owesReports; o != 0 {
				if l.Origin == transport.OriginLocal {
					t.Fatalf("seed %d: a report about a report: %+v", seed, c)
				}
				if o&reported[c.N] != 0 {
					t.Fatalf("seed %d: reported twice: %+v", seed, c)
				}
				reported[c.N] |= o
				to := l.From
				if x.R.Bounces != "" && o == owesFailed {
					to = x.R.Bounces
				} else if l.Origin == transport.OriginOutside {
					t.Fatalf("seed %d: back-scatter: %+v", seed, c)
				}
				if to == "" {
					t.Fatalf("seed %d: report to the null sender", seed)
				}
				if x.R.Bounces == "" && x.R.Notify == transport.NotifyNever {
					t.Fatalf("seed %d: report that nobody wanted", seed)
				}
				if o == owesDelayed && age < p.DelayAfter {
					t.Fatalf("seed %d: delay told after %v", seed, age)
				}
			}
			if c.State == Done && l.Keeper != 0 && c.Add&owesFinal == 0 {
				t.Fatalf("seed %d: the origin hears nothing: %+v", seed, c)
			}
			c.apply(x)
			once := *x
			c.apply(x)
			if *x != once {
				t.Fatalf("seed %d: applying twice differs: %+v", seed, c)
			}
			if x.State == Done || x.State == Aside {
				ended[c.N] = true
			}
			if c.To != nil {
				dest = *c.To // the whole leg, in this model
			}
		}
		if next := p.nextTick(dest, l); ev.Kind == evTick && len(cs) > 0 && next != 0 && before.Rcpts[0].State == Waiting && p.nextTick(dest, before) > now && ev.Member {
			t.Fatalf("seed %d: the sweep would have missed this: %+v", seed, cs)
		}
	}
	return h.Sum64()
}

func TestDecisionsKeepTheRulesAndRepeatBitForBit(t *testing.T) {
	sum := fnv.New64a()
	for seed := range uint64(200) {
		a := life(t, seed)
		if seed%10 == 0 && life(t, seed) != a {
			t.Fatalf("seed %d: two runs differ", seed)
		}
		sum.Write(binary.BigEndian.AppendUint64(nil, a))
	}
	t.Logf("trace hash %016x of 200 legs over up to 120 days each", sum.Sum64())
	rapid.Check(t, func(t *rapid.T) { life(t, rapid.Uint64().Draw(t, "seed")) })
}

func TestClockNeverRunsAheadOfWhatPassed(t *testing.T) {
	tests := []struct {
		name string
		gap  time.Duration // what the wall clock says between the last record and the start
		want time.Duration
	}{
		{"a short restart counts in full", time.Minute, time.Minute},
		{"a clock set back counts nothing", -10 * 365 * day, 0},
		{"a clock set ahead counts a day", 10 * 365 * day, day},
		{"a long sleep counts a day", 30 * day, day},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			c := clock{src: machine{time.Now()}}
			c.saw(stamp{Q: time.Hour, W: time.Now().Add(-tt.gap).Unix()})
			if got := c.now() - time.Hour; got < tt.want-time.Second || got > tt.want+2*time.Second {
				t.Errorf("counted %v, want %v", got, tt.want)
			}
		})
	}
}

func TestWhatIsGivenUpOnAnAnswerIsFinalForItsOrigin(t *testing.T) {
	p := Policy{}.withDefaults()
	l := &row{ID: msgID(1), From: anna, Origin: transport.OriginSubmission, Keeper: plzen, Rcpts: []rcpt{{State: Waiting, R: transport.Recipient{Address: "x@far.example"}}}}
	ev := event{Kind: evAnswers, Answers: []answer{{Result: transport.Result{Outcome: transport.Deferred, Code: 451, Text: "not now"}}}}
	cs := p.Step(p.OutsideLife, toFar, l, ev, func() float64 { return 0 })
	if len(cs) != 1 || cs[0].State != Done || cs[0].Last.Outcome != transport.Failed || cs[0].Add != owesFailed|owesFinal {
		t.Fatalf("decided %+v, last %+v", cs, cs[0].Last)
	}
	if want := "not delivered within 5 days; last heard: not now"; cs[0].Last.Text != want {
		t.Errorf("says %q, want %q", cs[0].Last.Text, want)
	}
}
