package deciders

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	"posthouse/mailstore/log/simfs"
	"posthouse/transport"
)

// Plan is a run: a pure function of its seed, until shrinking takes faults out.
type Plan struct {
	Seed     uint64
	Nodes    int
	Gateways uint64        // nodes, as bits
	Users    int           // of each node
	Length   time.Duration // of the safety phase
	Short    bool          // lifetimes of hours instead of days
	Latency  time.Duration // of a line, at most
	Lossy    bool          // packets are lost: frames come late; and frames come twice
	Kinds    []Kind        // of faults that this seed has turned on
	Faults   []Fault
	Load     []Load
}

// Kind is a kind of fault; the numbers are those of the project's list.
type Kind string

// The kinds of faults.
const (
	Cut       Kind = "cut"         // F1: the lines between A and B, both ways
	CutOneWay Kind = "cut-one-way" // F2: from A to B alone
	Flap      Kind = "flap"        // F5: cut and healed N times
	Slow      Kind = "slow"        // F4: N ms more on the lines of A
	Crash     Kind = "crash"       // F7, F9: the power of A goes; back after Span
	CrashAt   Kind = "crash-at"    // F7: at the N-th disk operation from now
	Pause     Kind = "pause"       // F10: A stands still for Span and goes on
	Full      Kind = "full"        // F11: N bytes are left on A's disk
	SlowDisk  Kind = "slow-disk"   // F12: a sync takes N ms
	FailSync  Kind = "fail-sync"   // F13: A's next sync fails, and the node with it
	Clock     Kind = "clock"       // F16: A's wall clock jumps by N seconds
	Offline   Kind = "offline"     // A cannot reach the Internet
	Refuse    Kind = "refuse"      // F22: outside host N says 550
	Defer     Kind = "defer"       // F22: it says 451
	Grey      Kind = "grey"        // F22: it says 451 to what it has not seen ten minutes ago
	DropReply Kind = "drop-reply"  // F22: it takes mail and hangs up before it says so
	Shut      Kind = "shut"        // F22: it does not answer at all
	Home      Kind = "home"        // F20: user N gets another home, B
	Gateway   Kind = "gateway"     // A becomes, or is no more, a gateway
	MailQuota Kind = "quota"       // user N's mailbox is full
	Expunge   Kind = "expunge"     // user N removes half of what is in INBOX at A
	Delete    Kind = "delete-user" // user N is deleted, for ever
	Revoke    Kind = "revoke"      // F19: A is put out, and goes on; its people get another home, B, after Span
	OldImage  Kind = "old-image"   // F15: A's disk is copied, and after Span the copy takes its place
	Narrow    Kind = "narrow"      // F4: A's lines carry one message after the other, each in up to N ms
)

// Kinds are all kinds that a seed may turn on.
var Kinds = []Kind{Cut, CutOneWay, Flap, Slow, Crash, CrashAt, Pause, Full, SlowDisk, FailSync, Clock, Offline,
	Refuse, Defer, Grey, DropReply, Shut, Home, Gateway, MailQuota, Expunge, Delete, Revoke, OldImage, Narrow} // new ones at the end: a seed stays the same

// rare kinds come once in a sixth of the days: after them much is excused.
func (k Kind) rare() bool { return k == Revoke || k == OldImage }

// Fault is one fault: it begins, and ends after Span by itself, so that each
// can be taken out of a plan without a trace.
type Fault struct {
	At   time.Duration
	Kind Kind
	A, B uint64 // nodes, as bits
	Span time.Duration
	N    int
	Mode simfs.Mode
	View View // what is left of the view
	// Again: the power goes once more at that disk operation of the next life.
	Again int
}

// View is what a crash leaves of the view.
type View int

// The states of a view: as the committer had it, which is a little behind the
// log; one of before, as after a crash of the view's own; none; with all that
// was applied; with rows that cannot be read.
const (
	Committed View = iota
	Older
	Gone
	Level
	Damaged
	views = iota
)

func (v View) String() string {
	return [...]string{"committed", "older", "gone", "level", "damaged"}[v]
}

func (f Fault) String() string {
	s := fmt.Sprintf("%v %s a=%b b=%b span=%v n=%d", f.At, f.Kind, f.A, f.B, f.Span, f.N)
	if f.Kind == Crash || f.Kind == CrashAt {
		s += fmt.Sprintf(" %s", f.Mode)
		if f.View != Committed {
			s += " view " + f.View.String()
		}
	}
	return s
}

// Load is one message that a client sends.
type Load struct {
	At      time.Duration
	Node    int // where
	From    int // user, or -1: the null sender, -2: somebody outside (port 25)
	Users   []int
	Outside []int // addresses at outside hosts: host*10 + number
	Group   bool  // the group of the first three users too
	Notify  transport.Notify
}

// String prints what a person needs to see of a plan.
func (p Plan) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "seed %d: %d nodes, gateways %b, %d users each, short lives %v, lossy %v, latency %v, faults %v\n", p.Seed, p.Nodes, p.Gateways, p.Users, p.Short, p.Lossy, p.Latency, p.Kinds)
	for i, f := range p.Faults {
		fmt.Fprintf(&b, "%3d %s\n", i, f)
	}
	return b.String()
}

const (
	hosts = 4 // outside
	spare = 2 * time.Minute
)

// NewPlan derives a day from a seed.
func NewPlan(seed uint64) Plan {
	gen := func(concern uint64) *rand.Rand { return rand.New(rand.NewPCG(seed, concern)) }
	shape, load := gen(1), gen(3)
	p := Plan{Seed: seed, Nodes: 2 + shape.IntN(4), Users: 2, Length: 24 * time.Hour, Short: shape.IntN(4) == 0,
		Latency: time.Duration(2+shape.IntN(150)) * time.Millisecond, Lossy: shape.IntN(2) == 0, Gateways: 1}
	for i := 1; i < p.Nodes; i++ {
		if shape.IntN(3) == 0 {
			p.Gateways |= 1 << i
		}
	}
	for _, k := range Kinds { // swarm: each kind on with p = 1/2, rates log-uniform
		on, rate, own := shape.IntN(2) == 0, 1+shape.IntN(4), gen(100+uint64(slices.Index(Kinds, k)))
		if !on || k.rare() && own.IntN(3) != 0 {
			continue
		}
		if k.rare() {
			rate = 1
		}
		p.Kinds = append(p.Kinds, k)
		n := 1 << rate / 2
		for range 1 + own.IntN(n) {
			p.Faults = append(p.Faults, p.fault(own, k))
		}
	}
	slices.SortStableFunc(p.Faults, func(a, b Fault) int { return int(a.At - b.At) })
	p.Load = p.mail(load)
	return p
}

// span is log-uniform between a second and a third of a day.
func span(r *rand.Rand) time.Duration {
	d := time.Second
	for d < 8*time.Hour && r.IntN(8) != 0 {
		d = d*3/2 + time.Duration(r.Int64N(int64(d)))
	}
	return d.Truncate(time.Millisecond)
}

func (p *Plan) fault(r *rand.Rand, k Kind) Fault {
	f := Fault{Kind: k, At: time.Duration(r.Int64N(int64(p.Length - spare))).Truncate(time.Millisecond), Span: span(r)}
	f.A = 1 << r.IntN(p.Nodes)
	all := uint64(1)<<p.Nodes - 1
	switch k {
	case Cut, CutOneWay, Flap:
		f.A = 1 + r.Uint64N(all-1) // any split
		f.B = all &^ f.A
		if r.IntN(3) == 0 { // one line alone
			f.A, f.B = 1<<r.IntN(p.Nodes), 1<<r.IntN(p.Nodes)
		}
		f.N = 2 + r.IntN(8)
		if k == Flap {
			f.Span = time.Duration(1+r.IntN(40)) * time.Second
		}
	case Slow:
		f.N = 50 + r.IntN(750)
	case Narrow:
		f.N = 200 << r.IntN(8)
	case Crash, CrashAt:
		if r.IntN(4) == 0 && k == Crash {
			f.A = 1 + r.Uint64N(all)
		}
		f.N = 1 + r.IntN(60)
		f.Mode = simfs.Mode(r.IntN(4))
		if r.IntN(6) == 0 {
			f.View = Gone
		}
		if r.IntN(2) == 0 {
			f.Span = min(f.Span, time.Minute)
		}
	case Pause:
		f.Span = min(f.Span, time.Hour)
	case Full:
		f.N = r.IntN(64 << 10)
	case SlowDisk:
		f.N = 10 + r.IntN(8000)
	case Clock:
		f.N = []int{1, 60, 3600, 86400, 31536000, 315360000}[r.IntN(6)]
		if r.IntN(2) == 0 {
			f.N = -f.N
		}
	case Refuse, Defer, Grey, DropReply, Shut:
		f.N = r.IntN(hosts)
	case Home:
		f.N = r.IntN(p.Nodes * p.Users)
		f.B = uint64(r.IntN(p.Nodes))
	case Revoke:
		f.B = uint64(r.IntN(p.Nodes))
	case OldImage:
		f.At /= 3 // while there is mail
		f.Span = max(f.Span, time.Minute)
	case MailQuota, Expunge, Delete:
		f.N = r.IntN(p.Nodes * p.Users)
	}
	return f
}

// mail is the load of a day: bursts and quiet hours.
func (p *Plan) mail(r *rand.Rand) (out []Load) {
	users := p.Nodes * p.Users
	at := time.Duration(0)
	for len(out) < 150 {
		gap := 20 * time.Minute
		if r.IntN(3) != 0 {
			gap = 20 * time.Second // a burst
		}
		at += time.Duration(r.Int64N(int64(gap))).Truncate(time.Millisecond)
		if at >= p.Length-spare {
			break
		}
		l := Load{At: at, Node: r.IntN(p.Nodes), From: r.IntN(users)}
		switch r.IntN(12) {
		case 0:
			l.From = -1
		case 1, 2:
			l.From = -2
		}
		for range 1 + r.IntN(2) {
			if u := r.IntN(users); !slices.Contains(l.Users, u) {
				l.Users = append(l.Users, u)
			}
		}
		if l.From != -2 && r.IntN(3) == 0 {
			l.Outside = append(l.Outside, r.IntN(hosts)*10+r.IntN(3))
			if r.IntN(2) == 0 {
				l.Users = nil
			}
			if x := r.IntN(hosts)*10 + r.IntN(3); r.IntN(4) == 0 && x != l.Outside[0] {
				l.Outside = append(l.Outside, x)
			}
		}
		l.Group = l.From != -2 && r.IntN(10) == 0
		switch r.IntN(8) {
		case 0:
			l.Notify = transport.NotifyNever
		case 1:
			l.Notify = transport.NotifySuccess | transport.NotifyFailure
		case 2:
			l.Notify = transport.NotifyFailure | transport.NotifyDelay
		}
		out = append(out, l)
	}
	return out
}
