package relay

import (
	"context"
	"errors"
	"slices"
	"time"

	"posthouse/mesh"
	"posthouse/transport"
)

// The rules of custody and of order, apart from the streams that carry them:
// pure, or calls of Gateway alone. The simulator of the deciders
// (simtest/deciders) runs them over lines of its own.

// Fates says what an origin does with a gateway's answer to an offer: whose
// custody it releases now, by their places in leg.Rcpts and by their keys, and
// what it reports to the queue once that is on disk. by is the gateway's name.
func Fates(leg *transport.Leg, fates []transport.Fate, by string) (kept []int, keys []string, results []transport.Result) {
	results = make([]transport.Result, len(fates))
	for i, f := range fates {
		switch {
		case f.Kept:
			kept = append(kept, i)
			keys = append(keys, leg.Rcpts[i].Key())
			results[i] = transport.Result{Outcome: transport.Relayed, Code: 250, Text: "taken over by " + by, By: by, DSN: true}
		case f.Result.Outcome.Final():
			// It ended there before; its reports were made there too.
			results[i] = f.Result
			results[i].Outcome, results[i].DSN = transport.Relayed, true
		default:
			results[i] = f.Result
			results[i].Outcome = transport.Deferred
		}
	}
	return kept, keys, results
}

// Stand does at a gateway what an origin's answer about a kept leg asks for.
// undecided: the origin has not decided about all of it.
func Stand(ctx context.Context, g Gateway, origin mesh.NodeID, k transport.KeptLeg, standings []transport.Standing) (undecided bool, err error) {
	by := map[transport.Standing][]string{}
	for j, st := range standings {
		by[st] = append(by[st], k.Keys[j])
	}
	var errs []error
	if keys := by[transport.ReleasedYou]; len(keys) > 0 {
		errs = append(errs, g.Let(ctx, origin, k.ID, keys))
	}
	if keys := by[transport.NotYours]; len(keys) > 0 {
		errs = append(errs, g.Drop(ctx, origin, k.ID, keys))
	}
	if keys := by[transport.NotKnown]; len(keys) > 0 {
		errs = append(errs, g.Strand(ctx, origin, k.ID, keys))
	}
	return len(by[transport.Undecided]) > 0, errors.Join(errs...)
}

// Orphans does at a gateway what is to be done for an origin that was put out of
// the mesh: what is kept for it unreleased is set aside for a person, as nobody
// can say any more whether another gateway sent it; final results have nobody to
// hear them.
func Orphans(ctx context.Context, g Gateway, origin mesh.NodeID, finals []transport.FinalResult, kept []transport.KeptLeg) error {
	err := g.Told(ctx, origin, finals)
	for _, k := range kept {
		err = errors.Join(err, g.Strand(ctx, origin, k.ID, k.Keys))
	}
	return err
}

// Lane is one sender's mail to one mailbox: it stays in order.
type Lane struct {
	To   mesh.MailboxID
	From string
}

// Holds keep the lanes of one stream in order at a home, exactly and without any
// time: mail whose sender had not read yet, when it chose it, that earlier mail of
// its lane was deferred, is deferred too. What a sender chooses later it has put in
// order itself. A large message may be on its way for hours.
//
// The zero value is empty. Holds is not safe for concurrent use.
type Holds struct {
	answers uint64 // results told so far
	lanes   map[Lane][]deferred
	many    int    // entries of lanes
	all     uint64 // who had not read so many answers waits, whatever its lane
}

// deferred is a message that was not taken.
type deferred struct {
	seq  uint64
	told uint64 // which answer said so, 0: none yet
}

// manyDeferred bounds the entries of Holds. Beyond it whatever was sent before its
// sender had read all answers so far waits.
const manyDeferred = 1 << 14

// Waits reports whether a message has to wait for an earlier one: its place in its
// sender's queue, and how many answers had been read when it was chosen.
func (h *Holds) Waits(l Lane, seq, read uint64) bool {
	list := h.lanes[l]
	if n := len(list); n > 0 {
		// Later ones of the stream have read as much, or more.
		list = slices.DeleteFunc(list, func(d deferred) bool { return d.told > 0 && (d.told <= read || !untilRead) })
		h.keep(l, list, len(list)-n)
	}
	return read < h.all || slices.ContainsFunc(list, func(d deferred) bool { return d.seq < seq })
}

// Defer notes that a message was not taken: it was deferred, or has moved, or waits.
// It may be called again for the same one.
func (h *Holds) Defer(l Lane, seq uint64) {
	h.keep(l, append(h.lanes[l], deferred{seq: seq}), 1)
}

// Tell numbers the next answer, which is about the message with that seq: of those
// lanes, at least, in which it was not taken.
func (h *Holds) Tell(seq uint64, lanes []Lane) {
	h.answers++
	for _, l := range lanes {
		for i, d := range h.lanes[l] {
			if d.seq == seq && d.told == 0 {
				h.lanes[l][i].told = h.answers
			}
		}
	}
	if h.many > manyDeferred {
		h.all = h.answers
		for l, list := range h.lanes {
			n := len(list)
			list = slices.DeleteFunc(list, func(d deferred) bool { return d.told > 0 })
			h.keep(l, list, len(list)-n)
		}
	}
}

func (h *Holds) keep(l Lane, list []deferred, more int) {
	if h.many += more; len(list) == 0 {
		delete(h.lanes, l)
		return
	}
	if h.lanes == nil {
		h.lanes = map[Lane][]deferred{}
	}
	h.lanes[l] = list
}

// Prefer puts gateways that failed a moment ago behind the others; until says
// when each is trusted again.
func Prefer(gs []mesh.NodeID, until map[mesh.NodeID]time.Time, now time.Time) []mesh.NodeID {
	gs = slices.Clone(gs)
	slices.SortStableFunc(gs, func(a, b mesh.NodeID) int {
		x, y := now.Before(until[a]), now.Before(until[b])
		switch {
		case x == y:
			return 0
		case x:
			return 1
		}
		return -1
	})
	return gs
}

// Believed is check for a message that begins to come in from peer.
func Believed(peer mesh.NodeID, offer bool, env *transport.Envelope, rcpts []transport.Recipient, member func(mesh.NodeID) bool) *transport.Fault {
	f := legFrame{Envelope: *env, Rcpts: rcpts}
	return f.check(peer, offer, member)
}
