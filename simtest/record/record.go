// Package record holds what an observer writes down while a simulated mesh
// runs: power, lines, masters, queues, deliveries, and at the end the verdicts.
//
// It judges nothing and draws nothing. simtest writes a Record, simtest/report
// makes a page of it, and the command line prints it.
package record

import (
	"slices"
	"sync"
	"time"
)

// Record is one run, in virtual time from its beginning.
type Record struct {
	Title     string
	About     string
	Seed      uint64
	Offices   []string      // in the order of their lanes
	FaultsEnd time.Duration // when all was healed and started
	Length    time.Duration // of the whole run
	Took      time.Duration // in real time

	Moments    []Moment
	States     []State // by time
	Cuts       []Cut
	Samples    []Sample
	Deliveries []Delivery
	Retries    []Retry // by time
	Mail       Mail
	Verdicts   []Verdict
}

// Moment is something that happened, in words.
type Moment struct {
	At   time.Duration
	Text string
	Bad  bool // something that must never be
}

// Power is how an office's node is doing.
type Power string

// The states of an office's node.
const (
	Away    Power = "not yet a member"
	On      Power = "running"
	Off     Power = "stopped"
	Dead    Power = "without power"
	Burnt   Power = "burnt"
	Full    Power = "disk full"
	SlowIO  Power = "slow disk"
	Revoked Power = "revoked"
)

// State is an office's state from this time on.
type State struct {
	At     time.Duration
	Office string
	Power  Power
}

// Cut is one line that nothing passed, in one direction at least.
type Cut struct {
	A, B  string
	At    time.Duration
	Until time.Duration // 0: to the end
}

// Sample is how things were at one time.
type Sample struct {
	At     time.Duration
	Queue  []int    // recipients that wait at each office, -1 where no node runs
	Oldest []int64  // age of the oldest that waits for a node, seconds
	Master []string // who leads, as each office sees it
	Term   []uint64
}

// Delivery is one message that was seen in its mailbox.
type Delivery struct {
	From, To string        // offices
	At       time.Duration // when it was seen
	Took     time.Duration // since the sender read the 250
}

// Retry is one attempt at a destination that failed: what waits there is tried
// again later.
type Retry struct {
	At     time.Duration
	Office string // that tried
	To     string // an office, "gateway", "local", or a domain outside
}

// Mail counts recipients of messages.
type Mail struct {
	Sent       int // attempts
	Taken      int // answered with 250
	Refused    int // answered with 4xx or 5xx
	Unanswered int // the connection broke first
	Arrived    int // copies found in mailboxes at the end, one for each message and mailbox
	Lost       int // taken, and neither there nor reported
	Outside    int // of those taken, to recipients outside
	Excused    int // of those taken, at or for offices that burnt or were revoked
}

// Verdict is what a run says of one invariant.
type Verdict struct {
	Number  int
	Text    string
	Checked int
	Broken  int
}

// Says is the verdict in a word; what was never checked is not held.
func (v Verdict) Says() string {
	switch {
	case v.Broken > 0:
		return "broken"
	case v.Checked == 0:
		return "not touched"
	}
	return "held"
}

// Held reports whether no invariant was broken.
func (r *Record) Held() bool {
	return !slices.ContainsFunc(r.Verdicts, func(v Verdict) bool { return v.Broken > 0 })
}

// Keeper writes a Record. Its methods may be called by any goroutine.
type Keeper struct {
	mu    sync.Mutex
	r     Record
	began time.Time
	tell  func(Moment)
}

// NewKeeper makes a Keeper; tell, if not nil, hears each Moment as it happens.
func NewKeeper(tell func(Moment)) *Keeper { return &Keeper{tell: tell} }

// Begin sets the record's zero. What happened before is not kept.
func (k *Keeper) Begin(offices []string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.began, k.r.Offices = time.Now(), offices
}

func (k *Keeper) keep(f func(r *Record, at time.Duration)) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if !k.began.IsZero() {
		f(&k.r, time.Since(k.began))
	}
}

// Moment keeps something that happened.
func (k *Keeper) Moment(text string, bad bool) {
	var m Moment
	k.keep(func(r *Record, at time.Duration) {
		m = Moment{at, text, bad}
		r.Moments = append(r.Moments, m)
	})
	if k.tell != nil && m.Text != "" {
		k.tell(m)
	}
}

// State keeps an office's state from now on.
func (k *Keeper) State(office string, p Power) {
	k.keep(func(r *Record, at time.Duration) { r.States = append(r.States, State{at, office, p}) })
}

// Line keeps that nothing passes between two offices from now on, or that
// packets do.
func (k *Keeper) Line(a, b string, cut bool) {
	if a > b {
		a, b = b, a
	}
	k.keep(func(r *Record, at time.Duration) {
		for i := len(r.Cuts) - 1; i >= 0; i-- {
			if c := &r.Cuts[i]; c.A == a && c.B == b && c.Until == 0 {
				if !cut {
					c.Until = at
				}
				return
			}
		}
		if cut {
			r.Cuts = append(r.Cuts, Cut{A: a, B: b, At: at})
		}
	})
}

// Sample keeps how things are now.
func (k *Keeper) Sample(s Sample) {
	k.keep(func(r *Record, at time.Duration) { s.At = at; r.Samples = append(r.Samples, s) })
}

// Retry keeps that an office tried a destination now, in vain.
func (k *Keeper) Retry(office, to string) {
	k.keep(func(r *Record, at time.Duration) { r.Retries = append(r.Retries, Retry{at, office, to}) })
}

// FaultsEnd keeps that all is healed and started from now on.
func (k *Keeper) FaultsEnd() {
	k.keep(func(r *Record, at time.Duration) { r.FaultsEnd = at })
}

// Seen keeps a delivery that was seen at a time.
func (k *Keeper) Seen(from, to string, accepted, seen time.Time) {
	k.keep(func(r *Record, _ time.Duration) {
		r.Deliveries = append(r.Deliveries, Delivery{from, to, seen.Sub(k.began), max(0, seen.Sub(accepted))})
	})
}

// Stop ends the time that the record covers.
func (k *Keeper) Stop() {
	k.keep(func(r *Record, at time.Duration) { r.Length = at; k.began = time.Time{} })
}

// End completes the record and returns it; the Keeper is of no use any more.
func (k *Keeper) End(m Mail, v []Verdict) *Record {
	k.Stop()
	k.mu.Lock()
	defer k.mu.Unlock()
	r := k.r
	r.Mail, r.Verdicts = m, v
	for i := range r.Cuts {
		if r.Cuts[i].Until == 0 {
			r.Cuts[i].Until = r.Length
		}
	}
	return &r
}
