package queue

import (
	"context"
	"errors"
	"slices"
	"time"

	"posthouse/mailstore/journal"
	"posthouse/mailstore/log"
	"posthouse/transport"
)

// underway is an appended record on which a leg waits (busy). A full disk may
// refuse it: then nothing is ever applied.
type underway struct {
	n legName
	t *journal.Ticket
	// again is the meta of a LEG record that must not get lost, as it holds what
	// the other side answered; nil: the leg is as if nothing had been tried.
	again []byte
	fresh []uint64 // of accepts in the same group
}

// repeatEvery is how soon a record that a full disk refused is tried again.
const repeatEvery = time.Second

var errEnded = errors.New("the queue has ended")

// follow looks after a record until it is on disk. Under q.mu, which was held
// since before Append.
func (q *Queue) follow(u underway) {
	q.underway = append(q.underway, u)
	q.poke(q.news)
}

// refused waits for the records under way, in the log's order, and repeats or
// forgets what a full disk refused.
func (q *Queue) refused(ctx context.Context) {
	defer func() {
		q.mu.Lock()
		defer q.mu.Unlock()
		q.ended = true
		for _, d := range q.dests {
			d.signal()
		}
	}()
	timer := time.NewTimer(repeatEvery)
	timer.Stop()
	defer timer.Stop()
	for {
		q.mu.Lock()
		batch := q.underway
		q.underway = nil
		q.mu.Unlock()
		for _, u := range batch {
			err := u.t.Synced(ctx)
			if ctx.Err() != nil {
				return
			}
			if q.answered(u, err) {
				timer.Reset(repeatEvery)
			}
		}
		if len(batch) > 0 {
			continue
		}
		select {
		case <-q.news:
		case <-timer.C:
			q.repeat()
		case <-ctx.Done():
			return
		}
	}
}

// answered looks at what became of a record. It reports whether it is the first
// one to be repeated.
func (q *Queue) answered(u underway, err error) bool {
	switch {
	case !errors.Is(err, transport.ErrNoSpace):
	case u.again != nil:
		q.mu.Lock()
		defer q.mu.Unlock()
		q.again = append(q.again, u)
		return len(q.again) == 1
	default:
		q.forget(u)
	}
	return false
}

// repeat writes again what a full disk refused.
func (q *Queue) repeat() {
	q.mu.Lock()
	defer q.mu.Unlock()
	for _, u := range q.again {
		u.t = q.j.Append(log.Entry{Kind: log.KindLeg, Meta: u.again})
		q.follow(u)
	}
	q.again = nil
}

// forget brings a leg back to where it was before its record was refused.
func (q *Queue) forget(u underway) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for _, seq := range u.fresh {
		delete(q.fresh, seq)
	}
	if u.n == (legName{}) {
		return
	}
	if q.busy[u.n]--; q.busy[u.n] <= 0 {
		delete(q.busy, u.n)
		q.freed(u.n)
	}
	if d := q.dests[u.n.dest]; d != nil {
		d.again = true
		d.signal()
		q.look(d)
	}
	if _, owes := q.owed[u.n]; owes {
		q.poke(q.chore)
	}
}

// waitFor waits for the next change of a destination, whose wake was read under
// q.mu.
func (q *Queue) waitFor(ctx context.Context, wake <-chan struct{}) error {
	q.mu.Lock()
	ended := q.ended
	q.mu.Unlock()
	if ended {
		return errEnded
	}
	if q.j.ByHand() {
		if q.j.Turn() {
			return nil
		}
		return errBusy
	}
	select {
	case <-wake:
		return nil
	case <-q.j.Done(): // nothing is applied any more
		return errors.Join(errEnded, q.j.Err())
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// numbers are the sequence numbers of n accepts that follow a ticket's first.
func numbers(t *journal.Ticket, n int) []uint64 {
	out := make([]uint64, 0, n)
	for i := range n {
		out = append(out, t.First()+1+uint64(i))
	}
	return slices.Clip(out)
}
