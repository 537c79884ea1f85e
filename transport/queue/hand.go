package queue

import (
	"context"
	"errors"
	"io"
	"time"

	"posthouse/transport"
)

// Hand drives a queue without goroutines: its owner takes every step that Run,
// the clerk and the carriers take otherwise, in whatever order it likes, and
// gets the same decisions from the same code. The journal must be by hand too
// (journal.Options.ByHand); all calls to the queue come from one goroutine.
// It is for the simulator of the deciders (simtest/deciders).
type Hand struct{ q *Queue }

// ByHand is Run for somebody who takes the steps himself.
func (q *Queue) ByHand() (*Hand, error) {
	if err := q.begin(); err != nil {
		return nil, err
	}
	q.poke(q.chore)
	return &Hand{q}, nil
}

// Turn says which destinations to Begin now, and when to call it again at the
// latest; negative: after the next change.
func (h *Hand) Turn() (starts []transport.Destination, wait time.Duration) {
	select {
	case <-h.q.kick:
	default:
	}
	ds, wait := h.q.turn()
	for _, d := range ds {
		starts = append(starts, d.key)
	}
	return starts, wait
}

// Clerk does what the clerk has to do now; with ages also what is due every
// SweepEvery.
func (h *Hand) Clerk(ages bool) {
	select {
	case <-h.q.chore:
	default:
		if !ages {
			return
		}
	}
	if ages {
		h.q.sweep(context.Background())
	}
	h.q.chores(context.Background())
}

// SweepEvery is how often the clerk looks at ages.
const SweepEvery = sweepEvery

// Refused looks after the records that a full disk refused. It reports whether
// some wait for Repeat, which is to be called RepeatEvery later.
func (h *Hand) Refused() (repeat bool) {
	q := h.q
	q.mu.Lock()
	batch := q.underway
	q.underway = nil
	q.mu.Unlock()
	var left []underway
	for _, u := range batch {
		select {
		case <-u.t.Done():
			q.answered(u, u.t.Synced(context.Background()))
		default:
			left = append(left, u)
		}
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	q.underway = append(left, q.underway...)
	return len(q.again) > 0
}

// Repeat writes again what a full disk refused.
func (h *Hand) Repeat() { h.q.repeat() }

// RepeatEvery is how soon a record that a full disk refused is tried again.
const RepeatEvery = repeatEvery

// Carry is one carry of one destination. It is the Source that a carrier has,
// with a Next that does not wait.
type Carry struct {
	s     *source
	wake  <-chan struct{}
	tried bool
}

// Begin begins to carry to a destination that Turn named; nil: there is nothing
// to carry after all.
func (h *Hand) Begin(key transport.Destination) *Carry {
	h.q.mu.Lock()
	d := h.q.dests[key]
	h.q.mu.Unlock()
	if d == nil {
		return nil
	}
	c := &Carry{s: &source{q: h.q, d: d}}
	var err error
	if c.tried, err = h.q.prepare(context.Background(), d); !c.tried {
		c.End(err)
		return nil
	}
	return c
}

// Next returns the next leg that is ready, nil when there is none now: ask
// again when News says so, or after the time given.
func (c *Carry) Next() (leg *transport.Leg, until time.Duration, err error) {
	leg, c.wake, until, err = c.s.take(context.Background())
	if errors.Is(err, io.EOF) {
		err = nil
	}
	return leg, until, err
}

// News reports whether something has changed since Next found nothing.
func (c *Carry) News() bool {
	select {
	case <-c.wake:
		return true
	default:
		return false
	}
}

// Linger is how long the carry stays open with nothing to carry.
func (c *Carry) Linger() time.Duration { return linger(c.s.d.key.Scope) }

// Finish is transport.Source's.
func (c *Carry) Finish(leg *transport.Leg, results []transport.Result) { c.s.Finish(leg, results) }

// End ends the carry, as the return of Carrier.Carry does.
func (c *Carry) End(err error) { c.s.q.settled(context.Background(), c.s, c.tried, err) }
