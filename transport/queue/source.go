package queue

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"time"

	"posthouse/mailstore/log"
	"posthouse/mailstore/mime"
	"posthouse/transport"
)

// Stored is the Body of a leg: it stands in the log.
type Stored struct {
	transport.Body
	ref       log.Ref
	structure *mime.Structure
}

// Ref returns where the message stands in the log (mailstore.Delivery.Source).
func (s *Stored) Ref() log.Ref { return s.ref }

// Structure returns the walk over the message, not to be changed.
func (s *Stored) Structure() *mime.Structure { return s.structure }

func (q *Queue) readMeta(ref log.Ref) (*acceptMeta, error) {
	rec, err := q.j.Record(ref)
	if err != nil {
		return nil, err
	}
	m := new(acceptMeta)
	if err := decMode.Unmarshal(rec.Meta, m); err != nil {
		return nil, err
	}
	return m, nil
}

// source is the transport.Source of one carry.
type source struct {
	q    *Queue
	d    *dest
	took int // legs finished; under q.mu
	over bool
}

// linger is how long a carry waits for more when nothing is due.
func linger(s transport.Scope) time.Duration {
	switch s {
	case transport.ScopeLocal:
		return time.Hour
	case transport.ScopeNode, transport.ScopeGateway:
		return 10 * time.Second
	}
	return time.Second
}

// Next implements transport.Source.
func (s *source) Next(ctx context.Context) (*transport.Leg, error) {
	var idle *time.Timer
	for {
		leg, wait, until, err := s.take(ctx)
		if leg != nil || err != nil {
			return leg, err
		}
		if idle == nil {
			idle = time.NewTimer(linger(s.d.key.Scope))
			defer idle.Stop()
		}
		again := time.NewTimer(max(until, 0))
		select {
		case <-wait:
		case <-again.C:
		case <-idle.C:
			again.Stop()
			return nil, io.EOF
		case <-ctx.Done():
			again.Stop()
			return nil, context.Cause(ctx)
		}
		again.Stop()
	}
}

// take returns the next leg that is ready now. When there is none it returns the
// channel that closes with the next news of the destination, and how long it
// is at most until something falls due.
func (s *source) take(ctx context.Context) (out *transport.Leg, wake <-chan struct{}, until time.Duration, err error) {
	q, d := s.q, s.d
	if err := q.fill(ctx, d); err != nil {
		return nil, nil, 0, err
	}
	q.mu.Lock()
	now := q.clock.now()
	if s.over {
		q.mu.Unlock()
		return nil, nil, 0, io.EOF
	}
	l := q.pick(d, now)
	if l == nil {
		defer q.mu.Unlock()
		return nil, d.wake, min(d.due-now, linger(d.key.Scope)), nil
	}
	out, r, meta := l.out, l.row, l.meta
	out.Seq, out.Dest, out.Accepted = l.seq, d.key, time.Unix(r.Wall, 0).UTC()
	for _, n := range l.handed {
		for i := range r.Rcpts {
			if r.Rcpts[i].N == n {
				rc := r.Rcpts[i].R
				rc.Delayed = rc.Delayed || delayToldOnce && r.Rcpts[i].Delayed
				out.Rcpts = append(out.Rcpts, rc)
				out.Attempts = max(out.Attempts, r.Rcpts[i].Attempts)
			}
		}
	}
	ref := r.Ref
	q.mu.Unlock()
	if meta == nil {
		if meta, err = q.readMeta(ref); err != nil {
			q.putBack(d, l, out)
			return nil, nil, 0, err
		}
	}
	out.Envelope = meta.Envelope
	out.Body = &Stored{Body: q.j.Body(ref), ref: ref, structure: meta.Structure}
	return out, nil, 0, nil
}

func (q *Queue) putBack(d *dest, l *leg, out *transport.Leg) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if l.out == out {
		l.out = nil
		d.signal()
		q.freed(legName{d.key, l.seq})
	}
}

// Finish implements transport.Source.
func (s *source) Finish(out *transport.Leg, results []transport.Result) {
	q, d := s.q, s.d
	as := make([]answer, len(out.Rcpts))
	for i := range out.Rcpts {
		if i < len(results) {
			as[i].Result = results[i]
		} else {
			as[i].Result = transport.Result{Outcome: transport.Deferred, Text: "no result"}
		}
		if as[i].Result.Outcome == transport.Moved {
			as[i].Route, as[i].Gone = q.routeMoved(d.key, &out.Rcpts[i], &as[i].Result)
		}
	}
	q.mu.Lock()
	d.flow(out, as)
	l := d.bySeq[out.Seq]
	if l == nil || l.out != out {
		// Ended as a whole meanwhile, by its DELIVER record, or handed back.
		s.took++
		q.mu.Unlock()
		q.tell(out, as)
		return
	}
	for i := range as {
		as[i].N = l.handed[i]
	}
	l.out = nil
	s.took++
	now := q.clock.now()
	cs := q.policy.Step(now, d.key, l.row, event{Kind: evAnswers, Answers: as, Began: l.began}, q.rnd.float)
	waited := now - l.row.Accepted
	q.record(legName{d.key, l.seq}, l.row, cs)
	q.freed(legName{d.key, l.seq})
	d.signal()
	q.mu.Unlock()
	for i := range as {
		q.d.Event(Event{What: as[i].Result.Outcome.String(), ID: out.Envelope.ID, Queue: ID(out.Seq), Dest: d.key,
			Recipient: out.Rcpts[i].Address, Result: as[i].Result, Waited: waited})
	}
}

func (q *Queue) tell(out *transport.Leg, as []answer) {
	for i := range as {
		q.d.Event(Event{What: as[i].Result.Outcome.String(), ID: out.Envelope.ID, Queue: ID(out.Seq), Dest: out.Dest,
			Recipient: out.Rcpts[i].Address, Result: as[i].Result, Waited: q.clock.src.Now().Sub(out.Accepted)})
	}
}

// routeMoved asks where a recipient goes whose supposed home said "moved". The
// other node's word counts only where our own maps have nothing better, and
// only towards a member.
func (q *Queue) routeMoved(at transport.Destination, r *transport.Recipient, res *transport.Result) (transport.Destination, bool) {
	to, gone := q.d.Route(r)
	if gone || to.Scope != 0 && to != at {
		return to, gone
	}
	switch h := res.Home; {
	case h == 0 || h == at.Node || !q.d.Member(h):
		return to, false
	case h == q.d.Self:
		if at.Scope == transport.ScopeLocal {
			return to, false
		}
		return transport.Destination{Scope: transport.ScopeLocal}, false
	default:
		return transport.Destination{Scope: transport.ScopeNode, Node: h}, false
	}
}

// record appends a LEG record. Under q.mu; what it changes is due when it is
// applied, but what it holds back counts at once.
func (q *Queue) record(n legName, r *row, cs []change) {
	if len(cs) == 0 {
		return
	}
	d := q.dests[n.dest]
	for i := range cs {
		if c := &cs[i]; c.State == Waiting && d != nil {
			for k := range r.Rcpts {
				if p, ok := pairOf(r.From, &r.Rcpts[k].R); ok && r.Rcpts[k].N == c.N {
					if at, ok := d.holds[p]; !ok || n.seq < at {
						d.holds[p] = n.seq
					}
				}
			}
		}
	}
	b, err := encMode.Marshal(&legMeta{V: version, Seq: n.seq, Dest: n.dest, Stamp: q.clock.stamp(), Changes: cs})
	if err != nil {
		q.d.Logger.Error("leg record", "err", err) // cannot happen: our own types
		return
	}
	write := q.j.AppendBehind
	if n.dest.Scope == transport.ScopeOutside {
		write = q.j.Append // until it is on disk, a power cut sends the message again
	}
	q.busy[n]++
	q.follow(underway{n: n, t: write(log.Entry{Kind: log.KindLeg, Meta: b}), again: b})
}

// carry runs the carrier of one destination once.
func (q *Queue) carry(ctx context.Context, d *dest) {
	s := &source{q: q, d: d}
	ready, err := q.prepare(ctx, d)
	tried := false
	if c := q.d.Carrier(d.key); ready && c != nil {
		tried = true
		err = c.Carry(ctx, d.key, s)
	}
	q.settled(ctx, s, tried, err)
}

// prepare looks for legs to carry, and reports whether there are any.
func (q *Queue) prepare(ctx context.Context, d *dest) (ready bool, err error) {
	err = q.fill(ctx, d)
	q.mu.Lock()
	defer q.mu.Unlock()
	ready = err == nil && q.hasReady(d, q.clock.now())
	if err == nil && !ready {
		q.prune(d, q.clock.now())
	}
	return ready, err
}

// settled ends a carry, which was tried or not: what it left is pending again,
// and an error puts the next one off.
func (q *Queue) settled(ctx context.Context, s *source, tried bool, err error) {
	seen := q.d.Seen != nil && q.d.Seen(s.d.key)
	q.mu.Lock()
	defer q.mu.Unlock()
	d := s.d
	s.over = true
	now := q.clock.now()
	lost := 0
	for _, l := range d.window {
		if l.out != nil {
			l.out, l.handed = nil, nil
			lost++
			q.freed(legName{d.key, l.seq})
		}
	}
	d.running = false
	if d.key.Scope == transport.ScopeOutside {
		q.running--
	}
	if err == nil && tried && s.took == 0 && lost == 0 && q.hasReady(d, now) {
		err = errors.New("the carrier took nothing")
	}
	if err == nil && lost > 0 {
		err = errors.New("the carrier left messages without a result")
	}
	if s.took > 0 {
		d.failures = 0
	}
	if err != nil && ctx.Err() == nil {
		wait := nodeRetry
		switch {
		case d.key.Scope == transport.ScopeOutside:
			wait = q.policy.OutsideRetry
		case seen && seenSoon:
			wait = nodeRetry[:seenRetry]
		}
		d.notBefore = now + spread(wait[min(d.failures, len(wait)-1)], q.rnd.float())
		if d.failures++; d.woken {
			d.notBefore, d.failures = 0, 0
		}
		why := transport.AsFault(err).Error()
		if f := (*transport.Fault)(nil); !errors.As(err, &f) {
			why = err.Error()
		}
		level := slog.LevelInfo
		if why == d.lastErr && d.failures > len(nodeRetry) && d.failures%12 != 0 {
			level = slog.LevelDebug // who is seen is tried twelve times a minute
		}
		d.lastErr, d.lastErrAt = why, q.clock.src.Now().UTC()
		q.d.Logger.Log(ctx, level, "destination waits", "dest", d.key.String(), "attempt", d.failures, "err", err)
		d.again = true
		q.rewind(d) // lets go of what was in memory
	} else if err == nil {
		d.failures, d.notBefore, d.lastErr = 0, 0, ""
	}
	d.woken = false
	d.signal() // what was out may be waited for
	q.look(d)
}

// seenRetry is how many steps of nodeRetry are taken for a node that is seen alive,
// the last of them again and again: it answers, and yet mail does not get there,
// say on a line that loses large packets only. When that ends there is no news of
// the peer, and an attempt costs little: one that began before the end gives up
// after 5 s (relay), the next comes 4 to 6 s later, so mail flows within 15 s.
const seenRetry = 3

// nodeRetry is how soon a node is tried again without any news of it: peer-up
// does not wait for it.
var nodeRetry = []time.Duration{time.Second, 2 * time.Second, 5 * time.Second, 15 * time.Second, 30 * time.Second, time.Minute}
