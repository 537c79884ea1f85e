package queue

import (
	"fmt"
	"slices"
	"sort"

	"posthouse/mailstore/kv"
	"posthouse/mailstore/log"
	"posthouse/mesh"
	"posthouse/transport"
)

// edit is the change of the view that one record makes.
type edit struct {
	q    *Queue
	b    *kv.Batch
	seq  uint64 // of the record
	rows map[legName]*edited
	seen map[string]*seenRow // rows this record wrote; nil: removed
}

type edited struct {
	old  Counts
	had  bool
	left bool // a recipient was routed elsewhere
	row  *row
}

// Apply implements journal.Engine.
func (q *Queue) Apply(rec log.Record, b *kv.Batch, live bool) error {
	e := &edit{q: q, b: b, seq: rec.Seq, rows: map[legName]*edited{}, seen: map[string]*seenRow{}}
	q.mu.Lock()
	if err := q.load(); err != nil {
		q.mu.Unlock()
		return err
	}
	q.mu.Unlock()
	var err error
	switch rec.Kind {
	case log.KindAccept:
		var meta *acceptMeta
		if meta, err = q.takeFresh(rec); err == nil {
			err = e.accept(rec, meta)
			e.commit(live, meta, nil)
		}
	case log.KindLeg:
		var m legMeta
		if err = decMode.Unmarshal(rec.Meta, &m); err == nil {
			name := legName{m.Dest, m.Seq}
			err = e.leg(&m)
			e.commit(live, nil, &name)
		}
	case log.KindDeliver:
		var d Delivered
		if d, err = q.d.Decode(rec.Meta); err == nil && d.LegSeq != 0 {
			err = e.deliver(&d)
			e.commit(live, nil, nil)
		}
	}
	if err != nil {
		return fmt.Errorf("queue: %w", err)
	}
	return nil
}

func (q *Queue) takeFresh(rec log.Record) (*acceptMeta, error) {
	q.mu.Lock()
	m := q.fresh[rec.Seq]
	delete(q.fresh, rec.Seq)
	q.mu.Unlock()
	if m != nil {
		return m, nil
	}
	m = new(acceptMeta)
	return m, decMode.Unmarshal(rec.Meta, m)
}

// lock takes q.mu with what the view has counted: every call from outside that
// asks for legs begins with it, since Run may not have begun yet. On an error
// the lock is held all the same.
func (q *Queue) lock() error {
	q.mu.Lock()
	if err := q.load(); err != nil {
		return fmt.Errorf("read queue: %w", err)
	}
	return nil
}

// load counts what the view has, once, before the first record or by Run.
// Under q.mu.
func (q *Queue) load() error {
	if q.loaded {
		return nil
	}
	if v, ok, err := q.j.View().Get([]byte(keyClock)); err != nil {
		return err
	} else if ok {
		var s stamp
		if err := decMode.Unmarshal(v, &s); err != nil {
			return err
		}
		q.clock.saw(s)
		q.saved = s.Q
	}
	var bad error
	err := q.j.View().Scan([]byte(preLeg), nil, func(k, v []byte) bool {
		key, seq, ok := parseLegKey(k)
		h, _, err := decodeHead(v)
		if !ok || err != nil {
			bad = errRow
			return false
		}
		d := q.dests[key]
		if d == nil {
			d = q.newDest(key)
			q.dests[key] = d
		}
		d.rows++
		d.bytes += h.size
		d.counts.plus(h.counts, 1)
		q.index(legName{key, seq}, h.owes, h.keeper, h.counts)
		return true
	})
	if err == nil {
		err = bad
	}
	q.loaded = err == nil
	return err
}

// index keeps who is owed what. Under q.mu.
func (q *Queue) index(n legName, o owes, keeper mesh.NodeID, c Counts) {
	if o&owesReports != 0 {
		q.owed[n] = struct{}{}
	} else {
		delete(q.owed, n)
	}
	if keeper == 0 {
		return
	}
	put(q.finals, keeper, n, o&owesFinal != 0)
	put(q.kept, keeper, n, c.Kept > 0)
}

func put(m map[mesh.NodeID]map[legName]struct{}, k mesh.NodeID, n legName, on bool) {
	switch {
	case on && m[k] == nil:
		m[k] = map[legName]struct{}{n: {}}
	case on:
		m[k][n] = struct{}{}
	case m[k] != nil:
		if delete(m[k], n); len(m[k]) == 0 {
			delete(m, k)
		}
	}
}

// row returns a leg to change; nil when there is none.
func (e *edit) row(n legName) (*row, error) {
	if x, ok := e.rows[n]; ok {
		return x.row, nil
	}
	e.q.mu.Lock()
	var r *row
	if d := e.q.dests[n.dest]; d != nil {
		if l := d.bySeq[n.seq]; l != nil {
			r = l.row.clone()
		}
	}
	e.q.mu.Unlock()
	if r == nil {
		var err error
		if r, err = e.q.getRow(n.dest, n.seq); err != nil || r == nil {
			return nil, err
		}
	}
	e.rows[n] = &edited{old: r.counts(), had: true, row: r}
	return r, nil
}

func (e *edit) accept(rec log.Record, m *acceptMeta) error {
	e.clock(m.Stamp)
	var msg msgRow
	msg.V, msg.Ref = version, rec.Ref
	fresh := func() *row {
		return &row{Ref: rec.Ref, ID: m.Envelope.ID, From: m.Envelope.From, Origin: m.Envelope.Origin, Size: rec.BodySize,
			Accepted: m.Stamp.Q, Wall: m.Stamp.W, Keeper: m.Keeper}
	}
	n := 0
	if m.Once && m.Keeper == 0 { // a report
		k := seenKey(m.Envelope.ID, "")
		if s, err := e.lookup(k); err != nil || s != nil {
			return err
		}
		e.remember(k, &seenRow{V: version, Seq: rec.Seq, State: Done}, m.Stamp)
	}
	gateway := false
	for _, l := range m.Legs {
		r := fresh()
		for _, rc := range l.Rcpts {
			x := rcpt{N: n, R: rc, State: Waiting, Delayed: rc.Delayed}
			if rec.Compacted { // without the view, what became of it is not known: a person decides
				x.State = Held
			}
			n++
			if m.Keeper != 0 {
				if waitsForRelease {
					x.State = Kept
				}
				k := seenKey(m.Envelope.ID, rc.Key())
				if s, err := e.lookup(k); err != nil {
					return err
				} else if s != nil {
					continue
				}
				e.remember(k, &seenRow{V: version, Seq: rec.Seq, Dest: l.Dest, N: x.N, State: Kept}, m.Stamp)
			}
			r.Rcpts = append(r.Rcpts, x)
		}
		if len(r.Rcpts) > 0 {
			e.rows[legName{l.Dest, rec.Seq}] = &edited{row: r}
			msg.Dests = append(msg.Dests, l.Dest)
			gateway = gateway || l.Dest.Scope == transport.ScopeGateway
		}
	}
	if len(m.Expands) > 0 {
		r := fresh()
		for _, x := range m.Expands {
			r.Rcpts = append(r.Rcpts, rcpt{N: n, R: x.Rcpt, State: Done, Owes: expandOwes(m, x),
				Last: transport.Result{Outcome: transport.Relayed, Enhanced: "2.1.5", Text: "expanded"}})
			n++
		}
		if !r.ended() {
			e.rows[legName{transport.Destination{}, rec.Seq}] = &edited{row: r}
			msg.Dests = append(msg.Dests, transport.Destination{})
		}
	}
	if gateway {
		if err := e.gate(m.Envelope.ID, rec.Seq, m.Stamp); err != nil {
			return err
		}
	}
	if len(msg.Dests) == 0 {
		return nil
	}
	return e.putMsg(rec.Seq, &msg)
}

func expandOwes(m *acceptMeta, x notice) owes {
	if m.Envelope.From == "" || m.Envelope.Origin == transport.OriginOutside {
		return 0
	}
	if x.List {
		return owesDelivered
	}
	return owesExpanded
}

func (e *edit) putMsg(seq uint64, m *msgRow) error {
	if len(m.Dests) == 0 {
		e.b.Delete(msgKey(seq))
		return nil
	}
	v, err := encMode.Marshal(m)
	if err != nil {
		return err
	}
	e.b.Put(msgKey(seq), v)
	return nil
}

// leg applies a LEG record: each change to its recipient, wherever that leads.
func (e *edit) leg(m *legMeta) error {
	e.clock(m.Stamp)
	name := legName{m.Dest, m.Seq}
	r, err := e.row(name)
	if err != nil || r == nil {
		return err // the leg ended before: nothing is left to say
	}
	for _, c := range m.Changes {
		i := slices.IndexFunc(r.Rcpts, func(x rcpt) bool { return x.N == c.N })
		if i < 0 {
			continue // it was routed elsewhere, or ended
		}
		x := &r.Rcpts[i]
		was := x.State
		c.apply(x)
		if r.Keeper != 0 {
			if err := e.keepSeen(r, x, m.Stamp, c.Forget); err != nil {
				return err
			}
		}
		if c.To == nil || was == Done || x.State != Waiting {
			continue
		}
		moved := *x
		r.Rcpts = slices.Delete(r.Rcpts, i, i+1)
		e.rows[name].left = true
		if err := e.move(r, moved, m.Seq, *c.To, m.Stamp); err != nil {
			return err
		}
	}
	return nil
}

// move puts a recipient into the leg of the same message to another destination.
func (e *edit) move(from *row, x rcpt, seq uint64, to transport.Destination, at stamp) error {
	name := legName{to, seq}
	r, err := e.row(name)
	if err != nil {
		return err
	}
	if r == nil {
		r = from.clone()
		r.Rcpts, r.more = nil, 0
		e.rows[name] = &edited{row: r}
	}
	r.Rcpts = append(r.Rcpts, x)
	sort.Slice(r.Rcpts, func(i, j int) bool { return r.Rcpts[i].N < r.Rcpts[j].N })
	if to.Scope == transport.ScopeGateway {
		return e.gate(r.ID, seq, at)
	}
	return nil
}

// deliver ends the recipients of a local leg that got their copy.
func (e *edit) deliver(d *Delivered) error {
	r, err := e.row(legName{transport.Destination{Scope: transport.ScopeLocal}, d.LegSeq})
	if err != nil || r == nil || r.ID != d.ID {
		return err
	}
	res := transport.Result{Outcome: transport.Delivered, Code: 250, Enhanced: "2.0.0", Text: "delivered to the mailbox"}
	for i := range r.Rcpts {
		x := &r.Rcpts[i]
		if x.State == Done || !slices.Contains(d.Mailboxes, x.R.Mailbox) {
			continue
		}
		c := change{N: x.N, State: Done, Add: e.q.policy.success(r, x, &res), Last: &res}
		c.apply(x)
	}
	return nil
}

// commit writes the rows of the edit and brings memory in step with them.
// The leg named by done is not busy any more.
func (e *edit) commit(live bool, meta *acceptMeta, done *legName) {
	q := e.q
	q.mu.Lock()
	defer q.mu.Unlock()
	if done != nil {
		if q.busy[*done]--; q.busy[*done] <= 0 {
			delete(q.busy, *done)
			q.freed(*done)
		}
		if _, ok := e.rows[*done]; !ok { // it ended before this record
			if d := q.dests[done.dest]; d != nil {
				d.signal()
				q.look(d)
			}
		}
	}
	clear(q.last)
	for _, n := range e.names() {
		x := e.rows[n]
		d := q.dests[n.dest]
		if d == nil {
			d = q.newDest(n.dest)
			d.whole = live // nothing else is there to be looked at
			q.dests[n.dest] = d
		}
		now := x.row.counts()
		gone := x.row.ended()
		d.counts.plus(x.old, -1)
		if x.had {
			d.rows--
			d.bytes -= x.row.Size
		}
		var o owes
		if gone {
			q.deleteRow(e.b, n.dest, n.seq, x.row)
			q.last[n] = nil
		} else {
			if err := q.putRow(e.b, n.dest, n.seq, x.row); err != nil {
				q.d.Logger.Error("queue row", "err", err) // cannot happen: our own types
			}
			d.counts.plus(now, 1)
			d.rows++
			d.bytes += x.row.Size
			q.last[n] = x.row
			o = x.row.owes()
		}
		q.index(n, o, x.row.Keeper, cond(gone, Counts{}, now))
		if o&owesFinal != 0 && live {
			q.d.Finals(x.row.Keeper)
		}
		if o&owesReports != 0 {
			q.poke(q.chore)
		}
		q.inMemory(d, n.seq, x, gone, live, meta)
		if live && meta != nil && meta.Routes != q.routes && now.Waiting > 0 && busyIsRoutedLater {
			q.miss(n) // homes changed while it was on its way here
		}
		if x.had && gone || !x.had && e.seq != n.seq {
			e.relink(n, gone)
		}
	}
}

// names returns the legs that the record touches, in the order of their
// destinations.
func (e *edit) names() []legName {
	names := make([]legName, 0, len(e.rows))
	for n := range e.rows {
		names = append(names, n)
	}
	if len(names) > 1 {
		slices.SortFunc(names, func(a, b legName) int { return slices.Compare(destKey(a.dest), destKey(b.dest)) })
	}
	return names
}

func cond[T any](b bool, x, y T) T {
	if b {
		return x
	}
	return y
}

// relink keeps the message's list of its legs.
func (e *edit) relink(n legName, gone bool) {
	v, ok, err := e.q.j.View().Get(msgKey(n.seq))
	var m msgRow
	if err != nil || !ok || decMode.Unmarshal(v, &m) != nil {
		return // it only serves to find things sooner
	}
	m.Dests = slices.DeleteFunc(m.Dests, func(d transport.Destination) bool {
		if x, ok := e.rows[legName{d, n.seq}]; ok {
			return x.row.ended()
		}
		return false
	})
	for _, o := range e.names() {
		if x := e.rows[o]; o.seq == n.seq && !x.row.ended() && !slices.Contains(m.Dests, o.dest) {
			m.Dests = append(m.Dests, o.dest)
		}
	}
	_ = e.putMsg(n.seq, &m)
}

// inMemory brings the window of d in step with a changed row. Under q.mu.
func (q *Queue) inMemory(d *dest, seq uint64, x *edited, gone, live bool, meta *acceptMeta) {
	if !live {
		return
	}
	// Whom the leg held back is free once its recipient no longer waits.
	for i := range x.row.Rcpts {
		q.unhold(d, seq, x.row, &x.row.Rcpts[i])
	}
	if x.left && len(d.holds) > 0 {
		d.again = true
	}
	if d.filling { // what the scan found of this row may be old
		d.changed[seq] = struct{}{}
	}
	now := q.clock.now()
	l := d.bySeq[seq]
	switch {
	case l != nil && gone:
		q.remove(d, l)
	case l != nil:
		l.row = x.row
		if l.out == nil && q.busy[legName{d.key, seq}] == 0 {
			l.handed = nil
			d.note(seq, x.row, now)
			if len(d.ready(seq, x.row, now)) == 0 {
				q.remove(d, l)
			}
		}
	case gone || x.row.counts().Waiting == 0:
	case x.had: // may have become due
		d.again = true
	case d.filling:
		d.dirty = true
		if seq <= d.cursor {
			d.again = true
		}
	case seq <= d.cursor:
		d.again = true
	case !d.whole:
	case q.full(d):
		d.whole = false
	default:
		l := &leg{seq: seq, row: x.row}
		if inMesh(d.key) {
			l.meta = meta
		}
		d.cursor = seq
		q.insert(d, l)
	}
	d.signal()
	if !d.running {
		q.look(d)
	}
}

// unhold lifts what a recipient held back, when it does not wait any more.
func (q *Queue) unhold(d *dest, seq uint64, r *row, x *rcpt) {
	if len(d.holds) == 0 || x.State == Waiting {
		return
	}
	if p, ok := pairOf(r.From, &x.R); ok && d.holds[p] == seq {
		delete(d.holds, p)
		d.again = true
	}
}
