package scenario

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"time"

	"posthouse/mailstore/log/simfs"
	"posthouse/simtest"
)

// realBytes is how much mail of real sizes comes to: simulated disks are memory.
const realBytes = 64 << 20

// Plan makes the plan that simtest plays; equal seeds give equal plans. short
// divides times and mail as the file says.
func (s *Scenario) Plan(seed uint64, short bool) simtest.Plan {
	p := &planner{s: s, time: 1, mail: 1, gen: func(concern uint64) *rand.Rand { return rand.New(rand.NewPCG(seed, concern)) }}
	if short {
		p.time, p.mail = max(1, s.Short.DivideTimeBy), max(1, s.Short.DivideMailBy)
	}
	p.Seed, p.Latency, p.Length, p.Follow = seed, time.Duration(s.Latency), p.span(s.Length), true
	for i, o := range s.Office {
		p.Offices = append(p.Offices, o.Name)
		if o.Gateway && i > 0 {
			p.Gateways = append(p.Gateways, o.Name)
		}
		if o.Bandwidth > 0 {
			p.Uplinks = append(p.Uplinks, simtest.Uplink{Office: o.Name, Bandwidth: int64(o.Bandwidth)})
		}
	}
	for _, l := range s.Line {
		latency := l.Latency
		if latency == 0 {
			latency = s.Latency
		}
		p.Lines = append(p.Lines, simtest.Line{A: l.Between[0], B: l.Between[1], Quality: simtest.Quality{
			Latency: time.Duration(latency), Jitter: time.Duration(l.Jitter), Bandwidth: int64(l.Bandwidth), Loss: float64(l.Loss) / 100}})
	}
	for _, e := range s.Event {
		p.event(e)
	}
	p.flow()
	p.probes()
	slices.SortStableFunc(p.Events, func(a, b simtest.Event) int { return int(a.At - b.At) })
	if s.Mail.Sizes == "real" {
		p.RealSizes(p.gen(12), realBytes)
	}
	for _, e := range p.Events {
		if !slices.Contains(p.Kinds, e.Do) {
			p.Kinds = append(p.Kinds, e.Do)
		}
	}
	return p.Plan
}

// planner makes one plan.
type planner struct {
	simtest.Plan
	s          *Scenario
	time, mail float64 // by what times and mail are divided
	gen        func(concern uint64) *rand.Rand
	changes    []simtest.Event // those of who is a member
}

func (p *planner) span(s Span) time.Duration {
	return time.Duration(float64(s) / p.time).Round(time.Millisecond)
}

func (p *planner) add(at time.Duration, e simtest.Event) {
	e.At = at
	if at <= p.Length {
		p.Events = append(p.Events, e)
		if e.Do == simtest.EvJoin || e.Do == simtest.EvBurn || e.Do == simtest.EvRevoke {
			p.changes = append(p.changes, e)
		}
	}
}

// others are the offices that a verb on lines means.
func (p *planner) others(e Event) (names []string, way string) {
	switch {
	case len(e.Toward) > 0:
		return e.Toward, "one"
	case len(e.From) > 0:
		return e.From, "both"
	}
	for _, n := range p.Offices {
		if !slices.Contains(e.who(), n) {
			names = append(names, n)
		}
	}
	return names, "both"
}

func (p *planner) event(e Event) {
	at, lasts, who := p.span(e.At), p.span(e.For), []string(e.who())
	end := at + lasts
	others, way := p.others(e)
	undo := func(u simtest.Event) {
		if e.For > 0 {
			p.add(end, u)
		}
	}
	// each does something at each office, and undoes it.
	each := func(do, u simtest.Event) {
		for _, n := range who {
			do.A, u.A = []string{n}, []string{n}
			p.add(at, do)
			if u.Do != "" {
				undo(u)
			}
		}
	}
	down, up := time.Duration(e.Down), time.Duration(e.Up) // how a line flaps is not a question of time at hand
	switch e.verb() {
	case "cut":
		p.add(at, simtest.Event{Do: simtest.EvCut, A: who, B: others, Way: way})
		undo(simtest.Event{Do: simtest.EvHeal, A: who, B: others})
	case "slow":
		p.add(at, simtest.Event{Do: simtest.EvSlow, A: who, B: others, Way: way, Span: time.Duration(e.By)})
		undo(simtest.Event{Do: simtest.EvSlow, A: who, B: others, Way: way})
	case "lossy":
		p.add(at, simtest.Event{Do: simtest.EvLossy, A: who, B: others, Way: way, N: int(e.Loss)})
		undo(simtest.Event{Do: simtest.EvLossy, A: who, B: others, Way: way})
	case "flap":
		dice := p.gen(11)
		some := func(d time.Duration) time.Duration { // half to one and a half of it
			return d/2 + time.Duration(dice.Int64N(int64(d)+1))
		}
		for t := at; t < end; {
			p.add(t, simtest.Event{Do: simtest.EvCut, A: who, B: others, Way: way})
			t = min(t+some(down), end)
			p.add(t, simtest.Event{Do: simtest.EvHeal, A: who, B: others})
			t += some(up)
		}
	case "heal":
		p.add(at, simtest.Event{Do: simtest.EvHeal, A: who, B: others})
	case "kill":
		each(simtest.Event{Do: simtest.EvKill, Way: fmt.Sprintf("%d %d", simfs.Random, simtest.KeepView)}, simtest.Event{Do: simtest.EvStart})
	case "stop":
		each(simtest.Event{Do: simtest.EvStop}, simtest.Event{Do: simtest.EvStart})
	case "start":
		each(simtest.Event{Do: simtest.EvStart}, simtest.Event{})
	case "restart":
		for i, n := range who {
			t := at + time.Duration(i)*(max(down, time.Second)+max(up, time.Minute))
			p.add(t, simtest.Event{Do: simtest.EvStop, A: []string{n}})
			p.add(t+max(down, time.Second), simtest.Event{Do: simtest.EvStart, A: []string{n}})
		}
	case "full_disk":
		each(simtest.Event{Do: simtest.EvFull}, simtest.Event{Do: simtest.EvFull, N: -1})
	case "free_disk":
		each(simtest.Event{Do: simtest.EvFull, N: -1}, simtest.Event{})
	case "slow_disk":
		each(simtest.Event{Do: simtest.EvSlowDisk, Span: time.Duration(e.By)}, simtest.Event{Do: simtest.EvSlowDisk})
	case "clock":
		each(simtest.Event{Do: simtest.EvClock, Span: time.Duration(e.By)}, simtest.Event{Do: simtest.EvClock})
	case "burn":
		each(simtest.Event{Do: simtest.EvBurn}, simtest.Event{})
	case "image":
		each(simtest.Event{Do: simtest.EvImage}, simtest.Event{})
	case "restore":
		each(simtest.Event{Do: simtest.EvRestore}, simtest.Event{})
	case "lose_disk":
		each(simtest.Event{Do: simtest.EvLoseDisk, Span: lasts}, simtest.Event{})
	case "join":
		p.Apart = append(p.Apart, who...)
		each(simtest.Event{Do: simtest.EvJoin, B: e.From}, simtest.Event{})
	case "revoke":
		each(simtest.Event{Do: simtest.EvRevoke}, simtest.Event{})
	case "promote":
		each(simtest.Event{Do: simtest.EvPromote}, simtest.Event{})
	case "lead":
		each(simtest.Event{Do: simtest.EvTransfer}, simtest.Event{})
	case "change":
		for i, t := 0, at; t < end; i, t = i+1, t+max(time.Second, p.span(Span(e.By))) {
			p.add(t, simtest.Event{Do: simtest.EvWrite, A: []string{who[i%len(who)]}, N: int(at/time.Second)*1000 + i})
		}
	case "send":
		p.send(at, lasts, e)
	case "outside":
		p.add(at, simtest.Event{Do: simtest.EvShut})
		undo(simtest.Event{Do: simtest.EvOpen})
	}
}

// send shares a burst out among its senders, each of whom sends to each of its
// recipients in turn.
func (p *planner) send(at, lasts time.Duration, e Event) {
	n := max(1, int(float64(e.Send)/p.mail))
	pairs := len(e.From) * len(e.To)
	for i := range pairs {
		share := n / pairs
		if i < n%pairs {
			share++
		}
		if share > 0 {
			p.add(at, simtest.Event{Do: simtest.EvMail, A: []string{e.From[i%len(e.From)]}, B: []string{e.To[i/len(e.From)]}, Way: "port25", N: share, Span: lasts / time.Duration(share)})
		}
	}
}

// flow is the mail of every day: little groups of messages, at random times.
func (p *planner) flow() {
	m := p.s.Mail
	if m.PerHour <= 0 {
		return
	}
	dice := p.gen(10)
	pause := time.Duration(float64(time.Hour) / m.PerHour)
	for at := time.Duration(0); ; {
		n := 1 + dice.IntN(3)
		at += time.Duration(dice.ExpFloat64() * float64(n) * float64(pause)).Round(time.Millisecond)
		if at >= p.Length {
			return
		}
		there := p.members(at)
		from := there[dice.IntN(len(there))]
		e := simtest.Event{Do: simtest.EvMail, A: []string{from}, Way: "port25", N: n, Span: 200 * time.Millisecond}
		switch x := Percent(dice.Float64() * 100); {
		case x < m.Inside || len(there) == 1:
			e.B = []string{from}
		case x < m.Inside+m.Outside:
			e.Way, e.B = "submission", []string{"keep@example.net"}
		default:
			to := from
			for to == from {
				to = there[dice.IntN(len(there))]
			}
			e.B = []string{to}
		}
		p.add(at, e)
	}
}

// members are the offices that may be members at a time.
func (p *planner) members(at time.Duration) (names []string) {
	for _, n := range p.Offices {
		if !slices.ContainsFunc(p.changes, func(e simtest.Event) bool {
			return e.A[0] == n && (e.Do == simtest.EvJoin && e.At >= at || e.Do != simtest.EvJoin && e.At <= at)
		}) {
			names = append(names, n)
		}
	}
	return names
}

// probes time the local mail of each office.
func (p *planner) probes() {
	pause := max(time.Minute, p.span(p.s.Mail.Probe))
	for i, n := range p.Offices {
		for at := pause/2 + time.Duration(i)*time.Second; at < p.Length; at += pause {
			if slices.Contains(p.members(at), n) {
				p.add(at, simtest.Event{Do: simtest.EvProbe, A: []string{n}})
			}
		}
	}
}
