package queue

import (
	"time"

	"posthouse/mesh"
	"posthouse/transport"
)

// State is where one recipient of a leg stands on this node.
type State uint8

// The states. The numbers stand on disk: never reuse one.
const (
	Waiting  State = iota + 1 // to be tried, at its due time
	Held                      // a person holds it
	Kept                      // two-phase: this gateway keeps it, its origin has not released it
	Released                  // two-phase: released to a gateway, whose final result is awaited
	Aside                     // undeliverable hold: waits for a person's decision
	Done                      // nothing further happens here
)

var stateNames = [...]string{"", "waiting", "held", "kept", "released", "aside", "done"}

func (s State) String() string {
	if int(s) < len(stateNames) {
		return stateNames[s]
	}
	return "unknown"
}

// MarshalText implements encoding.TextMarshaler.
func (s State) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// Owes is what a recipient still has to be told about: a set.
type owes uint8

const (
	owesFailed owes = 1 << iota
	owesDelayed
	owesDelivered
	owesRelayed
	owesExpanded
	owesFinal // the final result, to the origin of a released leg
)

const owesReports = owesFailed | owesDelayed | owesDelivered | owesRelayed | owesExpanded

// Policy holds the times and bounds of the queue. Zero fields mean the defaults.
type Policy struct {
	OutsideLife  time.Duration   // default 5 days, from acceptance
	MeshLife     time.Duration   // default 30 days
	AsideAfter   time.Duration   // default 90 days: set aside for a person, never sent (dedupe keys last 100)
	DelayAfter   time.Duration   // default 4 h
	OutsideRetry []time.Duration // after the n-th attempt; the last one repeats
	MeshRetry    []time.Duration // after a deferral by a home
	BehindRetry  []time.Duration // after the answer that earlier mail waits
	MovedWait    time.Duration   // default 60 s, after MovedMax answers
	MovedMax     int             // default 3
}

const day = 24 * time.Hour

func (p Policy) withDefaults() Policy {
	def := func(d *time.Duration, v time.Duration) {
		if *d == 0 {
			*d = v
		}
	}
	def(&p.OutsideLife, 5*day)
	def(&p.MeshLife, 30*day)
	def(&p.AsideAfter, 90*day)
	def(&p.DelayAfter, 4*time.Hour)
	def(&p.MovedWait, time.Minute)
	if p.MovedMax == 0 {
		p.MovedMax = 3
	}
	if p.OutsideRetry == nil { // RFC 5321 section 4.5.4.1: two attempts in the first hour, then longer
		p.OutsideRetry = []time.Duration{time.Minute, 5 * time.Minute, 15 * time.Minute, 30 * time.Minute,
			time.Hour, time.Hour, 2 * time.Hour, 2 * time.Hour, 4 * time.Hour}
	}
	if p.MeshRetry == nil {
		p.MeshRetry = []time.Duration{30 * time.Second, 2 * time.Minute, 5 * time.Minute, 15 * time.Minute, 30 * time.Minute, time.Hour}
	}
	if p.BehindRetry == nil { // a home holds back no longer than until its answer was read (relay)
		p.BehindRetry = []time.Duration{time.Second, time.Second, 2 * time.Second, 5 * time.Second, 15 * time.Second, 30 * time.Second}
	}
	return p
}

// rcpt is one recipient of a row.
type rcpt struct {
	N        int                 `cbor:"1,keyasint"` // its number in the message, for ever
	R        transport.Recipient `cbor:"2,keyasint"`
	State    State               `cbor:"3,keyasint"`
	Owes     owes                `cbor:"4,keyasint,omitempty"`
	Due      time.Duration       `cbor:"5,keyasint,omitempty"` // queue time
	Attempts int                 `cbor:"6,keyasint,omitempty"`
	Moved    int                 `cbor:"7,keyasint,omitempty"`
	Delayed  bool                `cbor:"8,keyasint,omitempty"` // the 4 h mark was passed
	Last     transport.Result    `cbor:"9,keyasint"`
	Node     mesh.NodeID         `cbor:"10,keyasint,omitempty"` // Released: to whom
	Tried    time.Duration       `cbor:"11,keyasint,omitempty"` // deferred or moved: queue time at which that attempt began
}

func (r *rcpt) ended() bool { return r.State == Done && r.Owes == 0 }

// change is what a LEG record says of one recipient. Values are absolute, so
// that applying it twice is harmless.
type change struct {
	N        int                    `cbor:"1,keyasint"`
	State    State                  `cbor:"2,keyasint,omitempty"` // 0: as it was
	Add      owes                   `cbor:"3,keyasint,omitempty"`
	Clear    owes                   `cbor:"4,keyasint,omitempty"`
	Due      time.Duration          `cbor:"5,keyasint,omitempty"` // with Waiting
	Attempts int                    `cbor:"6,keyasint,omitempty"` // 0: as it was
	Moved    int                    `cbor:"7,keyasint,omitempty"` // with Waiting
	Delayed  bool                   `cbor:"8,keyasint,omitempty"`
	Last     *transport.Result      `cbor:"9,keyasint,omitempty"`
	Node     mesh.NodeID            `cbor:"10,keyasint,omitempty"`
	To       *transport.Destination `cbor:"11,keyasint,omitempty"` // routed anew
	Forget   bool                   `cbor:"12,keyasint,omitempty"` // a kept copy dropped: as if it had never been offered
	Tried    time.Duration          `cbor:"13,keyasint,omitempty"` // with Waiting, after a deferral or "moved"
}

// apply puts the change into r. What ended stays ended, whatever comes late; but
// a failure that nobody could be told of is set aside.
func (c *change) apply(r *rcpt) {
	untold := c.State == Aside && r.Owes&c.Clear&owesFailed != 0
	if r.State == Done && c.State != 0 && c.State != Done && !untold {
		return
	}
	if r.State != Done || c.State == 0 || untold {
		if c.State != 0 {
			r.State = c.State
		}
		r.Owes |= c.Add
		if c.State == Waiting {
			r.Due, r.Moved, r.Tried = c.Due, c.Moved, c.Tried
		}
		if c.Attempts != 0 {
			r.Attempts = c.Attempts
		}
		if c.Last != nil {
			r.Last = *c.Last
		}
		if c.Node != 0 {
			r.Node = c.Node
		}
	}
	r.Delayed = r.Delayed || c.Delayed
	r.Owes &^= c.Clear
}

// eventKind says what happened to a leg.
type eventKind uint8

const (
	evAnswers eventKind = iota + 1 // a carrier reported results
	evTick                         // time passed
	evRoutes                       // homes or gateways changed
)

// answer is what was heard of one recipient.
type answer struct {
	N      int
	Result transport.Result
	// Route is where it would go now (for Moved and evRoutes); zero: not known.
	Route transport.Destination
	Gone  bool // the current domain state has no such mailbox
}

// event is one input of Step.
type event struct {
	Kind    eventKind
	Answers []answer
	// Began is when the attempt that was answered began.
	Began time.Duration
	// Unanswered: the last attempt got no answer, so the other side may have it.
	Unanswered bool
	// Reason is why the destination could not be tried, when nothing was heard
	// of the recipient itself.
	Reason string
	// Member: the destination's node stands in the domain state.
	Member bool
}

// Step decides what a leg's event changes. It is pure: the same inputs, with
// the same numbers from jitter (each in [0,1)), give the same changes.
func (p *Policy) Step(now time.Duration, dest transport.Destination, l *row, ev event, jitter func() float64) []change {
	var cs []change
	byN := func(n int) *rcpt {
		for i := range l.Rcpts {
			if l.Rcpts[i].N == n {
				return &l.Rcpts[i]
			}
		}
		return nil
	}
	switch ev.Kind {
	case evAnswers:
		for _, a := range ev.Answers {
			if r := byN(a.N); r != nil && r.State == Waiting {
				cs = append(cs, p.answered(now, dest, l, r, a, ev.Began, jitter))
			}
		}
	case evRoutes:
		for _, a := range ev.Answers {
			r := byN(a.N)
			if r == nil || r.State != Waiting {
				continue
			}
			if a.Gone {
				c := change{N: r.N}
				p.moved(now, dest, l, r, a, now, &c)
				cs = append(cs, c)
				continue
			}
			if a.Route.Scope == 0 || a.Route == dest {
				continue
			}
			cs = append(cs, change{N: r.N, State: Waiting, To: &a.Route, Due: now})
		}
	case evTick:
		for i := range l.Rcpts {
			if c, ok := p.tick(now, dest, l, &l.Rcpts[i], ev); ok {
				cs = append(cs, c)
			}
		}
	}
	return cs
}

func (p *Policy) answered(now time.Duration, dest transport.Destination, l *row, r *rcpt, a answer, began time.Duration, jitter func() float64) change {
	res := a.Result
	c := change{N: r.N, Last: &res, Attempts: r.Attempts + 1}
	if !deferredWaits && res.Outcome == transport.Deferred {
		c.State = Done
		return c
	}
	switch res.Outcome {
	case transport.Delivered, transport.Relayed:
		c.State = Done
		c.Add = p.success(l, r, &res)
	case transport.Failed:
		p.fail(l, r, &c)
	case transport.Moved:
		p.moved(now, dest, l, r, a, began, &c)
	default: // Deferred, and whatever a carrier may invent
		if res.Behind && !behindIsDeferred {
			// Nothing is said of it. Once what stood before it has ended, nobody
			// else tells; as long as that waits, it holds this one back here.
			c.State, c.Tried = Waiting, began
			c.Due = now + p.BehindRetry[min(r.Attempts, len(p.BehindRetry)-1)]
			break
		}
		if now-l.Accepted >= p.life(dest) {
			if givenUpIsFinal {
				c.Last = p.expired(dest, &res, "")
			}
			p.fail(l, r, &c)
			break
		}
		retry := p.OutsideRetry
		if inMesh(dest) {
			retry = p.MeshRetry
		}
		wait := retry[min(r.Attempts, len(retry)-1)]
		c.State = Waiting
		c.Due, c.Tried = now+spread(wait, jitter()), began
	}
	return c
}

func (p *Policy) moved(now time.Duration, dest transport.Destination, l *row, r *rcpt, a answer, began time.Duration, c *change) {
	if a.Gone {
		// One more look-up was made, and the current state has nobody.
		c.Last = &transport.Result{Outcome: transport.Failed, Code: 550, Enhanced: "5.1.1",
			Text: "No such user here any more", By: a.Result.By}
		p.fail(l, r, c)
		return
	}
	c.State, c.Tried = Waiting, began
	if c.Moved = r.Moved + 1; c.Moved >= p.MovedMax {
		// The maps are stale somewhere: wait for them, never bounce for it.
		c.Moved, c.Due = 0, now+p.MovedWait
	} else if a.Route.Scope == 0 || a.Route == dest {
		c.Due = now + time.Duration(c.Moved)*time.Second
	} else {
		c.Due = now
	}
	if a.Route.Scope != 0 && a.Route != dest {
		c.To = &a.Route
	}
}

func (p *Policy) tick(now time.Duration, dest transport.Destination, l *row, r *rcpt, ev event) (change, bool) {
	age := now - l.Accepted
	c := change{N: r.N}
	switch {
	case r.State != Waiting && r.State != Held && r.State != Released:
		return c, false
	case age > p.AsideAfter:
		c.State = Aside
		c.Last = &transport.Result{Outcome: transport.Deferred, Enhanced: "4.4.7",
			Text: "older than " + days(p.AsideAfter) + ", set aside for a person; last heard: " + words(&r.Last, ev.Reason)}
		return c, true
	case r.State != Waiting:
		return c, false
	case age >= p.life(dest) && !(inMesh(dest) && ev.Unanswered && ev.Member):
		c.Last = p.expired(dest, &r.Last, ev.Reason)
		p.fail(l, r, &c)
		return c, true
	case age >= p.DelayAfter && !r.Delayed:
		c.Delayed = true
		if p.hearsOfDelay(l, r) {
			c.Add = owesDelayed
		}
		return c, true
	}
	return c, false
}

// expired is the final result of who was not delivered in time.
func (p *Policy) expired(dest transport.Destination, last *transport.Result, reason string) *transport.Result {
	return &transport.Result{Outcome: transport.Failed, Code: last.Code, Enhanced: "5.4.7",
		Text: "not delivered within " + days(p.life(dest)) + "; last heard: " + words(last, reason), By: last.By}
}

// nextTick returns when tick would next change something, or 0 for never.
func (p *Policy) nextTick(dest transport.Destination, l *row) time.Duration {
	next := time.Duration(0)
	at := func(t time.Duration) {
		if next == 0 || t < next {
			next = t
		}
	}
	for i := range l.Rcpts {
		switch r := &l.Rcpts[i]; r.State {
		case Waiting:
			if !r.Delayed {
				at(l.Accepted + p.DelayAfter)
			}
			at(l.Accepted + p.life(dest))
		case Held, Released:
			at(l.Accepted + p.AsideAfter + 1)
		}
	}
	return next
}

// fail ends a recipient. Who hears of it: the owner of the list, else the
// sender unless it is null (RFC 5321 section 6.1), does not want it (RFC 3461
// section 4.1), or came from outside unproven: a report to a forged sender
// would be back-scatter, so such mail waits for a person. So does a report
// that cannot be delivered: it makes none, and its news must not vanish.
func (p *Policy) fail(l *row, r *rcpt, c *change) {
	c.State = Done
	if l.Keeper != 0 {
		c.Add |= owesFinal
	}
	switch {
	case l.Origin == transport.OriginLocal && holdsReports:
		c.State, c.Add = Aside, 0
	case r.R.Bounces != "":
		c.Add |= owesFailed
	case l.Origin == transport.OriginOutside:
		c.State, c.Add = Aside, 0
	case l.From == "" && noReportToNobody:
	case r.R.Notify == 0 || r.R.Notify&transport.NotifyFailure != 0:
		c.Add |= owesFailed
	}
}

func (p *Policy) success(l *row, r *rcpt, res *transport.Result) (o owes) {
	if l.Keeper != 0 {
		o |= owesFinal
	}
	if l.From == "" || l.Origin == transport.OriginOutside || r.R.Notify&transport.NotifySuccess == 0 {
		return o
	}
	if res.Outcome == transport.Delivered {
		return o | owesDelivered
	}
	if !res.DSN { // RFC 3461 section 5.2.2: the next system will not report
		o |= owesRelayed
	}
	return o
}

func (p *Policy) hearsOfDelay(l *row, r *rcpt) bool {
	if l.From == "" || l.Origin == transport.OriginOutside || r.R.Bounces != "" {
		return false
	}
	return r.R.Notify == 0 || r.R.Notify&transport.NotifyDelay != 0
}

func (p *Policy) life(d transport.Destination) time.Duration {
	if inMesh(d) {
		return p.MeshLife
	}
	return p.OutsideLife
}

// inMesh reports whether the destination is a home of the mesh.
func inMesh(d transport.Destination) bool {
	return d.Scope == transport.ScopeLocal || d.Scope == transport.ScopeNode
}

// spread makes of d something between 80 and 120 % of it.
func spread(d time.Duration, f float64) time.Duration {
	return (d*4/5 + time.Duration(f*float64(d)*0.4)).Truncate(time.Millisecond)
}
