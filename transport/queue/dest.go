package queue

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"io"
	"slices"
	"time"

	"posthouse/mesh"
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
	if r.Mailbox.IsZero() || !lanesWait {
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
	full   func(transport.Destination, mesh.MailboxID) bool // Deps.Full
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
	flows  map[pair]struct{} // pairs of which something that was tried again went through last

	filling bool
	dirty   bool                // rows came while filling
	changed map[uint64]struct{} // rows that changed while filling

	listed, running bool
	woken           bool          // news of the destination came during a carry
	timer           time.Duration // earliest pending timer, 0 for none
	failures        int           // in a row
	notBefore       time.Duration
	room            time.Duration // whatever was deferred by then may be tried again: see Queue.Room
	lastErr         string        // why the last carry ended
	lastErrAt       time.Time
	wake            chan struct{} // closed when something is new
}

// leg is a leg in a window.
type leg struct {
	seq    uint64
	row    *row
	meta   *acceptMeta    // nil: to be read
	out    *transport.Leg // in flight
	handed []int          // the numbers of out.Rcpts, until their results are applied
	began  time.Duration  // since when it is in flight
}

func (q *Queue) newDest(key transport.Destination) *dest {
	return &dest{key: key, full: q.d.Full, bySeq: map[uint64]*leg{}, holds: map[pair]uint64{}, flows: map[pair]struct{}{}, due: never, wake: make(chan struct{})}
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
			if l.out == nil {
				d.keepBack(l.seq, l.row) // its record, perhaps a deferral, is not applied yet
			}
			continue
		}
		delete(d.bySeq, l.seq)
		q.held--
	}
	clear(d.window[len(keep):])
	d.window = keep
}

// dueOf is when a waiting recipient is due: by the schedule, or at once when the
// destination has told of room, or of what it has learnt, since that attempt.
func (d *dest) dueOf(rc *rcpt) time.Duration {
	if rc.Tried > 0 && rc.Tried < d.room && (d.full == nil || !d.full(d.key, rc.R.Mailbox)) {
		return 0
	}
	return rc.Due
}

// note remembers what of a leg is not due yet, and whom that holds back.
func (d *dest) note(seq uint64, r *row, now time.Duration) {
	for i := range r.Rcpts {
		rc := &r.Rcpts[i]
		if rc.State != Waiting {
			continue
		}
		due := d.dueOf(rc)
		if due <= now {
			continue
		}
		d.due = min(d.due, due)
		if p, ok := pairOf(r.From, &rc.R); ok {
			if at, ok := d.holds[p]; !ok || seq < at {
				d.holds[p] = seq
			}
		}
	}
}

// keepBack holds back whoever comes behind a leg whose waiting recipients' state
// is about to change. What stays waiting goes on holding, what ends lifts it.
func (d *dest) keepBack(seq uint64, r *row) {
	for i := range r.Rcpts {
		if r.Rcpts[i].State != Waiting {
			continue
		}
		if p, ok := pairOf(r.From, &r.Rcpts[i].R); ok {
			if at, ok := d.holds[p]; !ok || seq < at {
				d.holds[p] = seq
			}
		}
	}
}

// keepRest holds back whoever comes behind the recipients of a leg that wait
// while others of it are under way, or a record about it is. So does a recipient
// that is tried again: what stands behind it would most likely travel in vain. But
// once one has gone through, those that had only stood behind it go together: else
// a queue behind a full disk would drain one message a round trip.
func (d *dest) keepRest(l *leg) {
	for i := range l.row.Rcpts {
		rc := &l.row.Rcpts[i]
		handed := slices.Contains(l.handed, rc.N)
		if rc.State != Waiting || handed && rc.Attempts == 0 {
			continue
		}
		p, ok := pairOf(l.row.From, &rc.R)
		if _, flows := d.flows[p]; !ok || handed && rc.Last.Behind && flows && flowTogether {
			continue
		}
		if at, ok := d.holds[p]; !ok || l.seq < at {
			d.holds[p] = l.seq
		}
	}
}

// manyFlows bounds dest.flows. What is forgotten costs a round trip.
const manyFlows = 1024

// flow notes whether the mail of each recipient's pair goes through now. What is
// tried for the first time stands behind nothing, and says nothing new.
func (d *dest) flow(out *transport.Leg, as []answer) {
	if out.Attempts == 0 {
		return
	}
	for i := range out.Rcpts {
		p, ok := pairOf(out.Envelope.From, &out.Rcpts[i])
		switch o := as[i].Result.Outcome; {
		case !ok:
		case o != transport.Delivered:
			delete(d.flows, p)
		default:
			if len(d.flows) >= manyFlows {
				clear(d.flows)
			}
			d.flows[p] = struct{}{}
		}
	}
}

// ready returns the numbers of the recipients that may be tried now.
func (d *dest) ready(seq uint64, r *row, now time.Duration) (ns []int) {
	for i := range r.Rcpts {
		rc := &r.Rcpts[i]
		if rc.State != Waiting || d.dueOf(rc) > now {
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

// next returns when there is a reason to carry. What waits for a record to be
// applied is none: commit looks again.
func (q *Queue) next(d *dest, now time.Duration) time.Duration {
	at := d.due
	if (d.again || !d.whole) && !q.full(d) || q.hasReady(d, now) {
		at = 0
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
			if q.busy[legName{d.key, l.seq}] > 0 && busyHolds {
				d.keepBack(l.seq, l.row)
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

// prune lets go of what stands in the window and has nothing ready.
func (q *Queue) prune(d *dest, now time.Duration) {
	for _, l := range slices.Clone(d.window) {
		if l.out == nil && q.busy[legName{d.key, l.seq}] == 0 && len(d.ready(l.seq, l.row, now)) == 0 {
			d.note(l.seq, l.row, now)
			q.remove(d, l)
		}
	}
}

// pick takes the first leg of the window that has something ready.
func (q *Queue) pick(d *dest, now time.Duration) *leg {
	for i := 0; i < len(d.window); i++ {
		l := d.window[i]
		if l.out != nil || q.busy[legName{d.key, l.seq}] > 0 {
			if busyHolds {
				d.keepRest(l)
			}
			continue
		}
		ns := d.ready(l.seq, l.row, now)
		if len(ns) == 0 {
			d.note(l.seq, l.row, now)
			q.remove(d, l)
			i--
			continue
		}
		l.handed, l.began = ns, max(now, 1)
		l.out = &transport.Leg{}
		return l
	}
	return nil
}
