package queue

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"io"
	"slices"
	"time"

	"posthouse/mailstore/log"
	"posthouse/mailstore/mime"
	"posthouse/transport"
)

// Bounds of what is held in memory; the rest is read from the view in order.
const (
	windowLegs = 1024  // legs of one destination
	allLegs    = 20000 // legs of all destinations
	scanRows   = 512   // rows read at once
)

// Counts are recipients by state.
type Counts struct {
	Waiting  int `json:"waiting"`
	Held     int `json:"held,omitempty"`
	Kept     int `json:"kept,omitempty"`
	Released int `json:"released,omitempty"`
	Aside    int `json:"aside,omitempty"`
}

func (c *Counts) add(s State, n int) {
	switch s {
	case Waiting:
		c.Waiting += n
	case Held:
		c.Held += n
	case Kept:
		c.Kept += n
	case Released:
		c.Released += n
	case Aside:
		c.Aside += n
	}
}

func (c *Counts) plus(o Counts, sign int) {
	c.Waiting += sign * o.Waiting
	c.Held += sign * o.Held
	c.Kept += sign * o.Kept
	c.Released += sign * o.Released
	c.Aside += sign * o.Aside
}

// pair is one sender and one mailbox: their mail stays in order.
type pair [16]byte

func pairOf(from string, r *transport.Recipient) (p pair, ok bool) {
	if r.Mailbox.IsZero() {
		return p, false
	}
	h := sha256.New()
	h.Write(r.Mailbox[:])
	io.WriteString(h, from)
	copy(p[:], h.Sum(nil))
	return p, true
}

// dest is one destination's queue in memory. All fields are guarded by Queue.mu.
type dest struct {
	key    transport.Destination
	counts Counts
	rows   int   // leg rows
	bytes  int64 // of the bodies

	// The window: legs with something due, by Seq, found by a pass over the rows.
	window []*leg
	bySeq  map[uint64]*leg
	cursor uint64        // rows up to here were looked at in this pass
	whole  bool          // the pass has seen every row
	due    time.Duration // earliest due time of what the pass skipped
	again  bool          // another pass is needed
	holds  map[pair]uint64

	filling bool
	dirty   bool                // rows came while filling
	changed map[uint64]struct{} // rows that changed while filling

	listed, running bool
	woken           bool          // news of the destination came during a carry
	timer           time.Duration // earliest pending timer, 0 for none
	failures        int           // in a row
	notBefore       time.Duration
	lastErr         string // why the last carry ended
	lastErrAt       time.Time
	wake            chan struct{} // closed when something is new
}

// leg is a leg in a window.
type leg struct {
	seq    uint64
	row    *row
	meta   *acceptMeta    // nil: to be read
	out    *transport.Leg // in flight
	handed []int          // the numbers of out.Rcpts
}

func newDest(key transport.Destination) *dest {
	return &dest{key: key, bySeq: map[uint64]*leg{}, holds: map[pair]uint64{}, due: never, wake: make(chan struct{})}
}

// idle reports whether nothing at all is left here.
func (d *dest) idle() bool { return d.rows == 0 && !d.running }

// signal wakes who waits in Next.
func (d *dest) signal() {
	close(d.wake)
	d.wake = make(chan struct{})
}

// rewind starts another pass over the rows. Legs in flight stay.
func (q *Queue) rewind(d *dest) {
	d.cursor, d.whole, d.again, d.due = 0, false, false, never
	clear(d.holds)
	keep := d.window[:0]
	for _, l := range d.window {
		if l.out != nil || q.busy[legName{d.key, l.seq}] > 0 {
			keep = append(keep, l)
			d.note(l.seq, l.row, q.clock.now())
			continue
		}
		delete(d.bySeq, l.seq)
		q.held--
	}
	clear(d.window[len(keep):])
	d.window = keep
}

// note remembers what of a leg is not due yet, and whom that holds back.
func (d *dest) note(seq uint64, r *row, now time.Duration) {
	for i := range r.Rcpts {
		rc := &r.Rcpts[i]
		if rc.State != Waiting || rc.Due <= now {
			continue
		}
		d.due = min(d.due, rc.Due)
		if p, ok := pairOf(r.From, &rc.R); ok {
			if at, ok := d.holds[p]; !ok || seq < at {
				d.holds[p] = seq
			}
		}
	}
}

// ready returns the numbers of the recipients that may be tried now.
func (d *dest) ready(seq uint64, r *row, now time.Duration) (ns []int) {
	for i := range r.Rcpts {
		rc := &r.Rcpts[i]
		if rc.State != Waiting || rc.Due > now {
			continue
		}
		if len(d.holds) > 0 {
			if p, ok := pairOf(r.From, &rc.R); ok {
				if at, ok := d.holds[p]; ok && at < seq {
					continue
				}
			}
		}
		ns = append(ns, rc.N)
	}
	return ns
}

// next returns when there is a reason to carry.
func (d *dest) next(now time.Duration) time.Duration {
	at := d.due
	if d.again || !d.whole {
		at = 0
	}
	for _, l := range d.window {
		if l.out == nil {
			at = 0
			break
		}
	}
	return max(at, d.notBefore)
}

// insert puts a leg into the window at its place.
func (q *Queue) insert(d *dest, l *leg) {
	i, _ := slices.BinarySearchFunc(d.window, l.seq, func(l *leg, s uint64) int {
		switch {
		case l.seq < s:
			return -1
		case l.seq > s:
			return 1
		}
		return 0
	})
	d.window = slices.Insert(d.window, i, l)
	d.bySeq[l.seq] = l
	q.held++
}

func (q *Queue) remove(d *dest, l *leg) {
	if i := slices.Index(d.window, l); i >= 0 {
		d.window = slices.Delete(d.window, i, i+1)
		delete(d.bySeq, l.seq)
		q.held--
	}
}

func (q *Queue) full(d *dest) bool {
	return len(d.window) >= windowLegs || q.held >= allLegs && len(d.window) > 0
}

// fill reads rows into the window until something is ready, the window is full
// or the pass has seen all. One goroutine at a time does it for a destination.
func (q *Queue) fill(ctx context.Context, d *dest) error {
	for {
		q.mu.Lock()
		now := q.clock.now()
		if d.filling {
			w := d.wake
			q.mu.Unlock()
			select {
			case <-w:
			case <-ctx.Done():
				return context.Cause(ctx)
			}
			continue
		}
		if d.due <= now {
			d.again = true
		}
		if d.again {
			q.rewind(d)
		}
		if d.whole || q.full(d) || q.hasReady(d, now) {
			q.mu.Unlock()
			return nil
		}
		d.filling, d.dirty, d.changed = true, false, map[uint64]struct{}{}
		from := d.cursor
		// What the last record did may not be visible in the view yet.
		over := map[uint64]*row{}
		for n, r := range q.last {
			if n.dest == d.key {
				over[n.seq] = r
			}
		}
		q.mu.Unlock()
		found, end, err := q.scan(d.key, from)
		q.mu.Lock()
		for seq, r := range over {
			if seq > from && (end || len(found) > 0 && seq < found[len(found)-1].seq) {
				found = slices.DeleteFunc(found, func(l *leg) bool { return l.seq == seq })
				if r != nil {
					found = append(found, &leg{seq: seq, row: r})
				}
			}
		}
		slices.SortFunc(found, func(a, b *leg) int {
			if a.seq < b.seq {
				return -1
			}
			return 1
		})
		for _, l := range found {
			if q.full(d) {
				end = false
				break
			}
			d.cursor = l.seq
			if _, ok := d.changed[l.seq]; ok {
				d.again = true
				continue
			}
			if d.bySeq[l.seq] != nil || l.row == nil {
				continue
			}
			d.note(l.seq, l.row, now)
			if len(d.ready(l.seq, l.row, now)) > 0 {
				q.insert(d, l)
			}
		}
		d.whole = end && !d.dirty && err == nil
		d.filling, d.changed = false, nil
		d.signal()
		q.mu.Unlock()
		if err != nil {
			return err
		}
	}
}

// scan reads rows after from; a leg without row has nobody waiting.
func (q *Queue) scan(key transport.Destination, from uint64) (found []*leg, end bool, err error) {
	type raw struct {
		seq uint64
		v   []byte
	}
	var raws []raw
	end = true
	var bad error
	err = q.j.View().Scan(destKey(key), legKey(key, from+1), func(k, v []byte) bool {
		if len(raws) == scanRows {
			end = false
			return false
		}
		h, _, err := decodeHead(v)
		if err != nil {
			bad = err
			return false
		}
		r := raw{seq: binary.BigEndian.Uint64(k[len(k)-8:])}
		if h.counts.Waiting > 0 {
			r.v = slices.Clone(v)
		}
		raws = append(raws, r)
		return true
	})
	if err = errors.Join(err, bad); err != nil {
		return nil, false, err
	}
	for _, w := range raws {
		l := &leg{seq: w.seq}
		if w.v != nil {
			if l.row, err = q.readRow(key, w.seq, w.v); err != nil {
				// The row changed under us: the change is noted in d.changed.
				l.row = nil
			}
		}
		found = append(found, l)
	}
	return found, end, nil
}

func (q *Queue) hasReady(d *dest, now time.Duration) bool {
	for _, l := range d.window {
		if l.out == nil && q.busy[legName{d.key, l.seq}] == 0 && len(d.ready(l.seq, l.row, now)) > 0 {
			return true
		}
	}
	return false
}

// pick takes the first leg of the window that has something ready.
func (q *Queue) pick(d *dest, now time.Duration) *leg {
	for i := 0; i < len(d.window); i++ {
		l := d.window[i]
		if l.out != nil || q.busy[legName{d.key, l.seq}] > 0 {
			continue
		}
		ns := d.ready(l.seq, l.row, now)
		if len(ns) == 0 {
			d.note(l.seq, l.row, now)
			q.remove(d, l)
			i--
			continue
		}
		l.handed = ns
		l.out = &transport.Leg{}
		return l
	}
	return nil
}

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
	q, d := s.q, s.d
	var idle *time.Timer
	for {
		if err := q.fill(ctx, d); err != nil {
			return nil, err
		}
		q.mu.Lock()
		now := q.clock.now()
		if s.over {
			q.mu.Unlock()
			return nil, io.EOF
		}
		if l := q.pick(d, now); l != nil {
			out, r, meta := l.out, l.row, l.meta
			out.Seq, out.Dest, out.Accepted = l.seq, d.key, time.Unix(r.Wall, 0).UTC()
			for _, n := range l.handed {
				for i := range r.Rcpts {
					if r.Rcpts[i].N == n {
						out.Rcpts = append(out.Rcpts, r.Rcpts[i].R)
						out.Attempts = max(out.Attempts, r.Rcpts[i].Attempts)
					}
				}
			}
			ref := r.Ref
			q.mu.Unlock()
			if meta == nil {
				var err error
				if meta, err = q.readMeta(ref); err != nil {
					q.putBack(d, l, out)
					return nil, err
				}
			}
			out.Envelope = meta.Envelope
			out.Body = &Stored{Body: q.j.Body(ref), ref: ref, structure: meta.Structure}
			return out, nil
		}
		wait, until := d.wake, min(d.due-now, linger(d.key.Scope))
		q.mu.Unlock()
		if idle == nil {
			idle = time.NewTimer(linger(d.key.Scope))
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

func (q *Queue) putBack(d *dest, l *leg, out *transport.Leg) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if l.out == out {
		l.out = nil
		d.signal()
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
	l.out, l.handed = nil, nil
	s.took++
	now := q.clock.now()
	cs := q.policy.Step(now, d.key, l.row, event{Kind: evAnswers, Answers: as}, q.rnd.float)
	waited := now - l.row.Accepted
	q.record(legName{d.key, l.seq}, l.row, cs)
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
			Recipient: out.Rcpts[i].Address, Result: as[i].Result, Waited: time.Since(out.Accepted)})
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
	q.busy[n]++
	q.j.Append(log.Entry{Kind: log.KindLeg, Meta: b})
}

// carry runs the carrier of one destination once.
func (q *Queue) carry(ctx context.Context, d *dest) {
	s := &source{q: q, d: d}
	err := q.fill(ctx, d)
	tried := false
	q.mu.Lock()
	ready := err == nil && q.hasReady(d, q.clock.now())
	q.mu.Unlock()
	if c := q.d.Carrier(d.key); ready && c != nil {
		tried = true
		err = c.Carry(ctx, d.key, s)
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	s.over = true
	now := q.clock.now()
	lost := 0
	for _, l := range d.window {
		if l.out != nil {
			l.out, l.handed = nil, nil
			lost++
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
		if d.key.Scope == transport.ScopeOutside {
			wait = q.policy.OutsideRetry
		}
		d.notBefore = now + spread(wait[min(d.failures, len(wait)-1)], q.rnd.float())
		if d.failures++; d.woken {
			d.notBefore, d.failures = 0, 0
		}
		d.lastErr, d.lastErrAt = transport.AsFault(err).Error(), time.Now().UTC()
		if f := (*transport.Fault)(nil); !errors.As(err, &f) {
			d.lastErr = err.Error()
		}
		q.d.Logger.Info("destination waits", "dest", d.key.String(), "attempt", d.failures, "err", err)
		d.again = true
		q.rewind(d) // lets go of what was in memory
	} else if err == nil {
		d.failures, d.notBefore, d.lastErr = 0, 0, ""
	}
	d.woken = false
	q.look(d)
}

// nodeRetry is how soon a node is tried again without any news of it: peer-up
// does not wait for it.
var nodeRetry = []time.Duration{time.Second, 2 * time.Second, 5 * time.Second, 15 * time.Second, 30 * time.Second, time.Minute}
