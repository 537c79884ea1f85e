package simtest

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"time"
)

// Plan is a random scenario: a pure function of its seed and size.
type Plan struct {
	Seed     uint64
	Offices  []string
	Apart    []string // of them those that join later, if at all
	Gateways []string // beside the founder
	Lines    []Line   // that are not as good as Latency alone
	Uplinks  []Uplink // offices whose own line is narrow
	Size     int      // of the bodies of mail; 0: small
	Follow   bool     // let a reader wait at each mailbox, and keep queues and masters over time
	Latency  time.Duration
	Length   time.Duration // of the safety phase
	Kinds    []Kind        // of faults that this seed has turned on
	Events   []Event       // by time
}

// Line is what the line between two offices is like.
type Line struct {
	A, B string
	Quality
}

// Uplink is an office's own line to the world, which all its traffic with other
// offices shares.
type Uplink struct {
	Office    string
	Bandwidth int64 // bits a second, each way
}

// Kind is what an event does.
type Kind string

// The kinds of events. F numbers are those of the project's list of faults.
const (
	EvCut         Kind = "cut"      // F1, F2, F5: lines between A and B; Way is "both" or "one"
	EvHeal        Kind = "heal"     // of the same lines
	EvSlow        Kind = "slow"     // F4: Span more on each packet's way
	EvLossy       Kind = "lossy"    // F3: N per cent of the packets
	EvKill        Kind = "kill"     // F7, F9: power cut; Way is the disk's mode and what becomes of the view
	EvCrashAt     Kind = "crash-at" // F7: power cut at the N-th disk operation from now
	EvStop        Kind = "stop"     // SIGTERM
	EvStart       Kind = "start"
	EvFailSync    Kind = "fail-sync"         // F13: the next one, once
	EvFailWritten Kind = "fail-written-sync" // F13: the next one, once, though it writes
	EvSlowDisk    Kind = "slow-disk"         // F12: a sync takes Span; 0: none
	EvFull        Kind = "full"              // F11: N bytes are left; -1: room again
	EvShut        Kind = "shut"              // the outside's exchanger answers nobody
	EvOpen        Kind = "open"
	EvTransfer    Kind = "transfer" // F17: the lead is handed to A
	EvMail        Kind = "mail"     // N messages at A to B, Span apart; Way "port25" or "submission"
	EvWrite       Kind = "write"    // a change of the domain state, asked of A
	EvProbe       Kind = "probe"    // one message at A to A's own user, to be there within a second
	EvJoin        Kind = "join"     // F19: A, which was apart, joins the mesh with a token, at B or at the founder
	EvRevoke      Kind = "revoke"   // F19: A is put out of the mesh; it goes on running
	EvBurn        Kind = "burn"     // F15: A loses power and everything it kept, for ever
	EvPromote     Kind = "promote"  // F18: A takes the lead without a majority; Way "perhaps": if it has no master soon

	EvTwice   Kind = "twice"   // F3: N per cent of the packets come twice
	EvLate    Kind = "late"    // F3: N per cent of the packets are overtaken by others
	EvFlipped Kind = "flipped" // F3: N per cent of the packets have a wrong bit
	EvNarrow  Kind = "narrow"  // F2: packets of more than N bytes are lost, smaller ones pass

	EvClock Kind = "clock" // F16: A's wall clock is set Span off the right time

	EvImage    Kind = "image"     // A is stopped for a moment, and its disk copied
	EvRestore  Kind = "restore"   // F15: A is powered off and comes back with that copy
	EvLoseDisk Kind = "lose-disk" // F15: A's disk is gone; after Span a new node of its name joins and replaces it
)

// Event is one thing that happens.
type Event struct {
	At   time.Duration
	Do   Kind
	A, B []string
	Way  string
	Span time.Duration
	N    int
	Size []int // EvMail: of the bodies of its messages, 0: small
}

func (e Event) String() string {
	s := fmt.Sprintf("%v %s %s", e.At, e.Do, strings.Join(e.A, ","))
	if len(e.B) > 0 {
		s += " / " + strings.Join(e.B, ",")
	}
	if e.Way != "" {
		s += " " + e.Way
	}
	if e.Span != 0 {
		s += " " + e.Span.String()
	}
	if e.N != 0 {
		s += fmt.Sprint(" ", e.N)
	}
	if len(e.Size) > 0 {
		s += fmt.Sprint(" of ", e.Size)
	}
	return s
}

// String prints the plan, one event a line; equal plans print equal bytes.
func (p Plan) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "seed %d: offices %v, gateways %v, latency %v, %v, faults %v\n", p.Seed, p.Offices, p.Gateways, p.Latency, p.Length, p.Kinds)
	for _, u := range p.Uplinks {
		fmt.Fprintf(&b, "%s's own line carries %d bit/s\n", u.Office, u.Bandwidth)
	}
	for _, e := range p.Events {
		fmt.Fprintln(&b, e)
	}
	return b.String()
}

var officeNames = []string{"hq", "plzen", "praha", "brno", "ostrava"}

// faultKinds are the groups that a seed turns on or off.
var faultKinds = []Kind{EvCut, EvSlow, EvLossy, EvKill, EvCrashAt, EvStop, EvFailSync, EvSlowDisk, EvFull, EvShut, EvTransfer}

// RandomPlan is the plan of a seed; with 0 nodes, two, three and five in turns.
func RandomPlan(seed uint64, nodes int, length time.Duration) Plan {
	if nodes == 0 {
		nodes = []int{3, 5, 3, 5, 2}[seed%5]
	}
	p := NewPlan(seed, nodes, length)
	p.members(rand.New(rand.NewPCG(seed, 5)))
	p.packets(rand.New(rand.NewPCG(seed, 6)))
	p.clocks(rand.New(rand.NewPCG(seed, 8)))
	p.uplinks(rand.New(rand.NewPCG(seed, 10)))
	slices.SortStableFunc(p.Events, func(a, b Event) int { return int(a.At - b.At) })
	p.RealSizes(rand.New(rand.NewPCG(seed, 7)), min(randomBytes, p.fits()))
	return p
}

// NewPlan derives the scenario of a seed, as far as it goes that seeds were kept
// of: faults that came later are RandomPlan's. Each concern has a generator of its
// own, so that a change in one leaves the others' choices alone.
func NewPlan(seed uint64, nodes int, length time.Duration) Plan {
	gen := func(concern uint64) *rand.Rand { return rand.New(rand.NewPCG(seed, concern)) }
	world, net, disk, load, syncs := gen(1), gen(2), gen(3), gen(4), gen(5)
	p := Plan{Seed: seed, Offices: officeNames[:nodes], Length: length, Latency: time.Duration(1+world.IntN(60)) * time.Millisecond}
	for _, n := range p.Offices[1:] {
		if world.IntN(3) == 0 {
			p.Gateways = append(p.Gateways, n)
		}
	}
	on := map[Kind]bool{}
	for _, k := range faultKinds {
		if world.IntN(2) == 0 {
			on[k] = true
			p.Kinds = append(p.Kinds, k)
		}
	}
	// Mean time between two faults of a kind, log-uniform: in hours as dense as in half an hour.
	rate := map[Kind]time.Duration{}
	for _, k := range faultKinds {
		rate[k] = time.Duration(float64(min(length, 30*time.Minute)) / []float64{1.5, 2, 3, 4, 6, 8}[world.IntN(6)])
	}
	pick := func(r *rand.Rand) string { return p.Offices[r.IntN(nodes)] }
	short := func(r *rand.Rand, most time.Duration) time.Duration { // log-uniform from 100 ms
		d := 100 * time.Millisecond
		for d < most && r.IntN(4) != 0 {
			d = d*2 + time.Duration(r.Int64N(int64(d)))
		}
		return min(d, most)
	}
	add := func(at time.Duration, e Event) {
		e.At = at.Round(time.Millisecond)
		if at < length {
			p.Events = append(p.Events, e)
		}
	}
	times := func(r *rand.Rand, k Kind, f func(at time.Duration)) {
		if !on[k] {
			return
		}
		for at := time.Duration(r.Int64N(int64(rate[k]))); at < length; at += rate[k]/2 + time.Duration(r.Int64N(int64(rate[k]))) {
			f(at)
		}
	}
	split := func(r *rand.Rand) (a, b []string) {
		for len(a) == 0 || len(b) == 0 {
			a, b = nil, nil
			for _, n := range p.Offices {
				if r.IntN(2) == 0 {
					a = append(a, n)
				} else {
					b = append(b, n)
				}
			}
		}
		return a, b
	}
	times(net, EvCut, func(at time.Duration) {
		a, b := split(net)
		way := "both"
		switch net.IntN(6) {
		case 0:
			way = "one"
		case 1: // one line only
			a, b = a[:1], b[:1]
		case 2: // an office off the Internet
			a, b = a[:1], []string{"outside"}
		}
		turns := 1
		if net.IntN(4) == 0 {
			turns = 2 + net.IntN(10)
		}
		for range turns {
			d := short(net, length/2/time.Duration(turns))
			add(at, Event{Do: EvCut, A: a, B: b, Way: way})
			add(at+d, Event{Do: EvHeal, A: a, B: b})
			at += d + short(net, 20*time.Second)
		}
	})
	times(net, EvSlow, func(at time.Duration) {
		a, b := split(net)
		add(at, Event{Do: EvSlow, A: a, B: b, Span: time.Duration(20+net.IntN(780)) * time.Millisecond})
		add(at+short(net, length/3), Event{Do: EvSlow, A: a, B: b})
	})
	times(net, EvLossy, func(at time.Duration) {
		a, b := split(net)
		add(at, Event{Do: EvLossy, A: a, B: b, N: 1 + net.IntN(30)})
		add(at+short(net, length/3), Event{Do: EvLossy, A: a, B: b})
	})
	down := func(r *rand.Rand) time.Duration {
		if r.IntN(3) == 0 {
			return 0
		}
		return short(r, length/3)
	}
	times(disk, EvKill, func(at time.Duration) {
		who := []string{pick(disk)}
		if disk.IntN(5) == 0 { // F9: several together
			for _, n := range p.Offices {
				if n != who[0] && disk.IntN(2) == 0 {
					who = append(who, n)
				}
			}
		}
		for _, n := range who {
			add(at+time.Duration(disk.IntN(100))*time.Millisecond, Event{Do: EvKill, A: []string{n}, Way: fmt.Sprintf("%d %d", disk.IntN(4), []int{0, 0, 1, 2}[disk.IntN(4)])})
			add(at+100*time.Millisecond+down(disk), Event{Do: EvStart, A: []string{n}})
		}
	})
	times(disk, EvCrashAt, func(at time.Duration) {
		n := []string{pick(disk)}
		add(at, Event{Do: EvCrashAt, A: n, N: 1 + disk.IntN(40), Way: fmt.Sprintf("%d %d", disk.IntN(4), []int{0, 0, 1, 2}[disk.IntN(4)])})
	})
	times(disk, EvStop, func(at time.Duration) {
		n := []string{pick(disk)}
		add(at, Event{Do: EvStop, A: n})
		add(at+100*time.Millisecond+down(disk), Event{Do: EvStart, A: n})
	})
	times(disk, EvFailSync, func(at time.Duration) { add(at, Event{Do: EvFailSync, A: []string{pick(disk)}}) })
	if k := EvFailWritten; syncs.IntN(3) == 0 {
		on[k], rate[k] = true, length/time.Duration(1+syncs.IntN(4))
		p.Kinds = append(p.Kinds, k)
		times(syncs, k, func(at time.Duration) { add(at, Event{Do: k, A: []string{pick(syncs)}}) })
	}
	times(disk, EvSlowDisk, func(at time.Duration) {
		n := []string{pick(disk)}
		add(at, Event{Do: EvSlowDisk, A: n, Span: short(disk, 8*time.Second)})
		add(at+short(disk, length/3), Event{Do: EvSlowDisk, A: n})
	})
	times(disk, EvFull, func(at time.Duration) {
		n := []string{pick(disk)}
		add(at, Event{Do: EvFull, A: n, N: disk.IntN(20000)})
		add(at+short(disk, length/3), Event{Do: EvFull, A: n, N: -1})
	})
	times(world, EvShut, func(at time.Duration) {
		add(at, Event{Do: EvShut})
		add(at+short(world, length/2), Event{Do: EvOpen})
	})
	times(world, EvTransfer, func(at time.Duration) { add(at, Event{Do: EvTransfer, A: []string{pick(world)}}) })

	for at := time.Duration(0); at < length; at += time.Duration(1+load.IntN(20)) * time.Second {
		e := Event{Do: EvMail, A: []string{pick(load)}, B: []string{pick(load)}, Way: "port25", N: 1 + load.IntN(8), Span: time.Duration(load.IntN(4)) * 300 * time.Millisecond}
		switch load.IntN(10) {
		case 0, 1, 2: // by the office's user, also to the outside
			e.Way = "submission"
			kind := []string{"keep", "keep", "refuse", "later", "drop"}[load.IntN(5)]
			e.B = append(e.B, kind+"@"+outsideDomain)
			if load.IntN(2) == 0 {
				e.B = e.B[1:]
			}
		case 3:
			e.B = append(e.B, pick(load))
			slices.Sort(e.B)
			e.B = slices.Compact(e.B)
		case 4:
			e.Way, e.B = "submission", []string{"all"}
		case 5:
			e.N = 30 + load.IntN(100)
			e.Span = 0
		}
		add(at, e)
		if load.IntN(6) == 0 {
			add(at+time.Duration(load.IntN(5000))*time.Millisecond, Event{Do: EvProbe, A: []string{pick(load)}})
		}
		if load.IntN(8) == 0 {
			add(at+time.Duration(load.IntN(5000))*time.Millisecond, Event{Do: EvWrite, A: []string{pick(load)}, N: load.IntN(1 << 30)})
		}
	}
	slices.SortStableFunc(p.Events, func(a, b Event) int { return int(a.At - b.At) })
	return p
}

// packets adds what happens to packets beside being lost or late.
func (p *Plan) packets(r *rand.Rand) {
	for _, k := range []Kind{EvTwice, EvLate, EvFlipped, EvNarrow} {
		if r.IntN(4) != 0 {
			continue
		}
		p.Kinds = append(p.Kinds, k)
		for range 1 + r.IntN(3) {
			i, j := r.IntN(len(p.Offices)), r.IntN(len(p.Offices)-1)
			if j >= i {
				j++
			}
			e := Event{At: time.Duration(r.Int64N(int64(p.Length))).Round(time.Millisecond), Do: k, A: p.Offices[i : i+1], B: p.Offices[j : j+1], N: 1 + r.IntN(30)}
			if k == EvNarrow {
				e.N = []int{1100, 1200, 1280, 1400, 300}[r.IntN(5)] // QUIC wants 1,200
			}
			end := e
			end.At, end.N = min(p.Length, e.At+time.Duration(r.Int64N(int64(p.Length)/3))).Round(time.Millisecond), 0
			p.Events = append(p.Events, e, end)
		}
	}
}

// members adds what happens to members for good: disks that are lost or become
// older ones, a node that is revoked, an office that a person promotes. Too many
// of them at once leave nobody who could say what holds, in life as here.
func (p *Plan) members(r *rand.Rand) {
	some := func() []string { return []string{p.Offices[r.IntN(len(p.Offices))]} }
	at := func(from, to time.Duration) time.Duration { // shares of the length, in per cent
		return (p.Length*from/100 + time.Duration(r.Int64N(int64(p.Length*(to-from)/100)))).Round(time.Millisecond)
	}
	add := func(at time.Duration, e Event) {
		e.At = at
		p.Events = append(p.Events, e)
		if !slices.Contains(p.Kinds, e.Do) {
			p.Kinds = append(p.Kinds, e.Do)
		}
	}
	budget := map[bool]int{true: 1, false: 2}[len(p.Offices) < 5]
	if r.IntN(4) == 0 { // alone: two lineages are enough
		n := some()
		var others []string
		for _, o := range p.Offices {
			if o != n[0] {
				others = append(others, o)
			}
		}
		t, d := at(5, 60), 40*time.Second+at(0, 20)
		add(t, Event{Do: EvCut, A: n, B: others, Way: "both"})
		add(min(t+20*time.Second, p.Length), Event{Do: EvPromote, A: n, Way: "perhaps"})
		add(min(t+d, p.Length), Event{Do: EvHeal, A: n, B: others})
		return
	}
	if r.IntN(4) == 0 && budget > 0 {
		n := some()
		budget--
		add(at(0, 50), Event{Do: EvImage, A: n})
		add(at(60, 95), Event{Do: EvRestore, A: n})
	}
	if r.IntN(4) == 0 && budget > 0 {
		budget--
		add(at(5, 80), Event{Do: EvLoseDisk, A: some(), Span: at(0, 15)})
	}
	if r.IntN(4) == 0 && budget > 0 && len(p.Offices) > 2 {
		n := some()
		if n[0] != p.Offices[0] || len(p.Gateways) > 0 { // somebody is left who may send to the outside
			add(at(20, 80), Event{Do: EvRevoke, A: n})
		}
	}
}
