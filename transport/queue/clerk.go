package queue

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"posthouse/mailstore/log"
	"posthouse/transport"
	"posthouse/transport/dsn"
)

// clerk does what needs no carrier: reports, ages, routing anew.
func (q *Queue) clerk(ctx context.Context) {
	tick := time.NewTicker(sweepEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-q.chore:
		case <-tick.C:
			q.sweep(ctx)
		}
		q.chores(ctx)
	}
}

// chores routes anew if somebody asked for it, and makes the reports that are
// owed.
func (q *Queue) chores(ctx context.Context) {
	q.mu.Lock()
	anew := q.anew
	q.anew = false
	var free []legName
	for _, n := range inOrder(q.missed) {
		if !q.isBusy(n) {
			delete(q.missed, n)
			free = append(free, n)
		}
	}
	q.mu.Unlock()
	if anew {
		q.routeAnew(ctx)
	}
	for _, n := range free {
		q.routeLeg(n)
	}
	q.reports(ctx)
}

// Reroute tells that homes, gateways or this node's own part changed: every
// waiting recipient is routed anew, and gateways are looked for at once. It
// returns at once.
func (q *Queue) Reroute() {
	q.mu.Lock()
	q.routes++
	q.anew = true
	q.mu.Unlock()
	q.poke(q.chore)
	q.Wake(transport.Destination{Scope: transport.ScopeGateway})
}

// Routes counts the calls of Reroute. Who asks before he decides where a message
// goes (Message.Routes) has it routed anew if homes changed before it was here.
func (q *Queue) Routes() uint64 {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.routes
}

// errBusy says that a leg is being tried, or changed, at this moment.
var errBusy = errors.New("being tried at this moment, ask again in a minute")

// change decides on a leg that nobody is trying, and records it. decide gets a
// row that it must not change. It reports whether anything was recorded.
func (q *Queue) change(n legName, decide func(now time.Duration, r *row) []change) (bool, error) {
	if err := q.lock(); err != nil {
		q.mu.Unlock()
		return false, err
	}
	d := q.dests[n.dest]
	if d == nil {
		q.mu.Unlock()
		return false, nil
	}
	if q.isBusy(n) {
		q.mu.Unlock()
		return false, errBusy
	}
	l := d.bySeq[n.seq]
	r, known := q.last[n]
	if l != nil {
		r, known = l.row, true
	}
	q.busy[n]++ // nobody else touches it meanwhile
	q.mu.Unlock()
	var err error
	if !known {
		r, err = q.getRow(n.dest, n.seq)
	}
	var cs []change
	if err == nil && r != nil {
		q.mu.Lock()
		now := q.clock.now()
		q.mu.Unlock()
		cs = decide(now, r)
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	if len(cs) > 0 {
		q.record(n, r, cs)
	}
	if q.busy[n]--; q.busy[n] <= 0 {
		delete(q.busy, n)
		d.signal()
		q.look(d)
		q.freed(n)
	}
	return len(cs) > 0, err
}

// isBusy reports whether a leg is being tried, or a record about it is under
// way. Under q.mu.
func (q *Queue) isBusy(n legName) bool {
	if q.busy[n] > 0 {
		return true
	}
	d := q.dests[n.dest]
	return d != nil && d.bySeq[n.seq] != nil && d.bySeq[n.seq].out != nil
}

// freed tells the clerk of a leg that may not be busy any more, if it waits for
// it. Under q.mu.
func (q *Queue) freed(n legName) {
	if _, ok := q.missed[n]; ok {
		q.poke(q.chore)
	}
}

// each calls f with the rows of a destination that want says yes to, in pages,
// without holding anything.
func (q *Queue) each(ctx context.Context, key transport.Destination, want func(head) bool, f func(n legName)) error {
	from := uint64(0)
	for ctx.Err() == nil {
		var seqs []uint64
		end := true
		looked := 0
		var bad error
		err := q.j.View().Scan(destKey(key), legKey(key, from), func(k, v []byte) bool {
			h, _, err := decodeHead(v)
			_, seq, ok := parseLegKey(k)
			if err != nil || !ok {
				bad = errRow
				return false
			}
			if looked++; looked > 4*scanRows {
				end = false
				return false
			}
			from = seq + 1
			if want(h) {
				seqs = append(seqs, seq)
			}
			return true
		})
		if err = errors.Join(err, bad); err != nil {
			return err
		}
		for _, s := range seqs {
			f(legName{key, s})
		}
		if end {
			return nil
		}
	}
	return context.Cause(ctx)
}

func (q *Queue) destinations() []transport.Destination {
	q.mu.Lock()
	defer q.mu.Unlock()
	ds := make([]transport.Destination, 0, len(q.dests))
	for k, d := range q.dests {
		if d.rows > 0 {
			ds = append(ds, k)
		}
	}
	slices.SortFunc(ds, func(a, b transport.Destination) int { return slices.Compare(destKey(a), destKey(b)) })
	return ds
}

// sweep looks at ages: notices of delay, and giving up.
func (q *Queue) sweep(ctx context.Context) {
	for _, key := range q.destinations() {
		q.mu.Lock()
		now := q.clock.now()
		ev := event{Kind: evTick, Unanswered: true, Member: true}
		if d := q.dests[key]; d != nil {
			ev.Reason = d.lastErr
		}
		q.mu.Unlock()
		if key.Scope == transport.ScopeNode {
			ev.Member = q.d.Member(key.Node)
		}
		err := q.each(ctx, key, func(h head) bool { return h.tick != 0 && h.tick <= now }, func(n legName) {
			var told []Event
			_, err := q.change(n, func(now time.Duration, r *row) []change {
				cs := q.policy.Step(now, key, r, ev, q.rnd.float)
				told = q.lines(n, r, now, cs)
				return cs
			})
			if err != nil && !errors.Is(err, errBusy) {
				q.d.Logger.Error("queue sweep", "dest", key.String(), "err", err)
				return
			}
			for _, e := range told {
				q.d.Event(e)
			}
		})
		if err != nil && ctx.Err() == nil {
			q.d.Logger.Error("queue sweep", "dest", key.String(), "err", err)
		}
	}
}

// lines are the mail log's words for changes that no carrier reported.
func (q *Queue) lines(n legName, r *row, now time.Duration, cs []change) (es []Event) {
	for i := range cs {
		c := &cs[i]
		what := ""
		switch {
		case c.State == Aside:
			what = "aside"
		case c.State == Done:
			what = "failed"
		case c.To != nil:
			what = "moved"
		default:
			continue
		}
		for k := range r.Rcpts {
			if x := &r.Rcpts[k]; x.N == c.N {
				e := Event{What: what, ID: r.ID, Queue: ID(n.seq), Dest: n.dest, Recipient: x.R.Address, Waited: now - r.Accepted}
				if c.Last != nil {
					e.Result = *c.Last
				}
				es = append(es, e)
			}
		}
	}
	return es
}

// routeAnew asks for every waiting recipient where it goes now. What this node
// keeps as a gateway for others stays: custody has passed, master or not.
func (q *Queue) routeAnew(ctx context.Context) {
	for _, key := range q.destinations() {
		if key.Scope == 0 {
			continue
		}
		err := q.each(ctx, key, func(h head) bool { return h.counts.Waiting > 0 && h.keeper == 0 }, q.routeLeg)
		if err != nil && ctx.Err() == nil {
			q.d.Logger.Error("route anew", "dest", key.String(), "err", err)
		}
	}
}

// routeLeg asks for the waiting recipients of one leg where they go now. One
// that is busy is asked for as soon as it is not: what it waits for may be a
// home that answers no more, or a full disk.
func (q *Queue) routeLeg(n legName) {
	_, err := q.change(n, func(now time.Duration, r *row) []change {
		ev := event{Kind: evRoutes}
		for i := range r.Rcpts {
			if x := &r.Rcpts[i]; x.State == Waiting && r.Keeper == 0 {
				to, gone := q.d.Route(&x.R)
				// Of who is gone the home says so, not we (see Policy.moved), unless it
				// was put out and says nothing any more.
				if !gone || n.dest.Scope == transport.ScopeNode && !q.d.Member(n.dest.Node) {
					ev.Answers = append(ev.Answers, answer{N: x.N, Route: to, Gone: gone})
				}
			}
		}
		return q.policy.Step(now, n.dest, r, ev, q.rnd.float)
	})
	switch {
	case errors.Is(err, errBusy) && !busyIsRoutedLater:
	case errors.Is(err, errBusy):
		q.routeSoon(n)
	case err != nil:
		q.d.Logger.Error("route anew", "dest", n.dest.String(), "err", err)
	}
}

// routeSoon has the clerk ask where the recipients of one leg go, as soon as it
// is not busy.
func (q *Queue) routeSoon(n legName) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.miss(n)
}

// miss is routeSoon under q.mu.
func (q *Queue) miss(n legName) {
	q.missed[n] = struct{}{}
	q.poke(q.chore)
}

// reports makes what is owed. A leg whose report cannot be made now stays owed
// and is met again by the next turn.
func (q *Queue) reports(ctx context.Context) {
	for ctx.Err() == nil {
		q.mu.Lock()
		todo := inOrder(q.owed)
		q.mu.Unlock()
		if len(todo) == 0 {
			return
		}
		made := 0
		for _, n := range todo {
			ok, err := q.report(ctx, n)
			if err != nil {
				q.d.Logger.Warn("report waits", "queue", n.seq, "err", err)
			}
			if ok {
				made++
			}
			if ctx.Err() != nil {
				return
			}
		}
		if made == 0 {
			return
		}
	}
}

var reportKinds = []struct {
	owes owes
	kind dsn.Kind
}{
	{owesFailed, dsn.Failed}, {owesDelayed, dsn.Delayed}, {owesDelivered, dsn.Delivered},
	{owesRelayed, dsn.Relayed}, {owesExpanded, dsn.Expanded},
}

// report makes one leg's reports: for each kind and addressee one message, in
// one group with the record that it is no longer owed. So a crash leaves both
// or none, and the computed id guards the rest.
func (q *Queue) report(ctx context.Context, n legName) (bool, error) {
	q.mu.Lock()
	r, known := q.last[n]
	if d := q.dests[n.dest]; d != nil && d.bySeq[n.seq] != nil {
		r, known = d.bySeq[n.seq].row, true
	}
	q.mu.Unlock()
	if !known {
		var err error
		if r, err = q.getRow(n.dest, n.seq); err != nil {
			return false, err
		}
	}
	if r == nil {
		return false, nil
	}
	meta, err := q.readMeta(r.Ref)
	if err != nil {
		return false, err
	}
	type about struct {
		kind dsn.Kind
		to   string
	}
	var order []about
	rcpts := map[about][]*rcpt{}
	var cs []change
	at := map[int]int{} // recipient to change
	for i := range r.Rcpts {
		x := &r.Rcpts[i]
		if x.Owes&owesReports == 0 {
			continue
		}
		cs = append(cs, change{N: x.N, Clear: x.Owes & owesReports})
		at[x.N] = len(cs) - 1
		for _, k := range reportKinds {
			if x.Owes&k.owes == 0 {
				continue
			}
			a := about{k.kind, r.From}
			if x.R.Bounces != "" {
				a.to = x.R.Bounces
			}
			if rcpts[a] == nil {
				order = append(order, a)
			}
			rcpts[a] = append(rcpts[a], x)
		}
	}
	if len(cs) == 0 {
		return false, nil
	}
	now := q.clockStamp()
	entries := []log.Entry{{Kind: log.KindLeg}}
	var accepts []*acceptMeta
	for _, a := range order {
		am, draft, err := q.write(ctx, n, r, meta, a.kind, a.to, rcpts[a])
		if errors.Is(err, errNobody) {
			q.d.Logger.Warn("report has nobody to go to", "msg_id", r.ID.String(), "kind", string(a.kind))
			for _, x := range rcpts[a] {
				if a.kind == dsn.Failed {
					cs[at[x.N]].State = Aside
				}
			}
			continue
		}
		if err != nil {
			discard(entries)
			return false, fmt.Errorf("report to <%s>: %w", a.to, err)
		}
		if am == nil {
			continue // it is made already
		}
		am.Stamp = now
		b, err := encMode.Marshal(am)
		if err != nil {
			draft.Discard()
			discard(entries)
			return false, err
		}
		entries = append(entries, log.Entry{Kind: log.KindAccept, Meta: b, Body: draft})
		accepts = append(accepts, am)
	}
	if entries[0].Meta, err = encMode.Marshal(&legMeta{V: version, Seq: n.seq, Dest: n.dest, Stamp: now, Changes: cs}); err != nil {
		discard(entries)
		return false, err
	}
	if err := q.j.Admit(ctx, 64<<10); err != nil {
		discard(entries)
		return false, err
	}
	told := q.lines(n, r, now.Q, cs) // before the record changes r
	q.mu.Lock()
	q.busy[n]++
	t := q.j.Append(entries...)
	for i, am := range accepts {
		am.Routes = q.routes // the clerk itself routes anew, once this is applied
		q.fresh[t.First()+1+uint64(i)] = am
	}
	q.follow(underway{n: n, t: t, fresh: numbers(t, len(accepts))})
	q.mu.Unlock()
	for _, e := range told {
		q.d.Event(e)
	}
	// Applied before the next look at what is owed.
	if err := t.Applied(ctx); err != nil {
		return false, err
	}
	return true, nil
}

func (q *Queue) clockStamp() stamp {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.clock.stamp()
}

func discard(es []log.Entry) {
	for _, e := range es {
		if e.Body != nil {
			e.Body.Discard()
		}
	}
}

// errNobody says that an address to which a report should go leads nowhere.
var errNobody = errors.New("nobody has that address")

// write makes one report; nil when it was made before. errNobody: it has
// nobody to go to.
func (q *Queue) write(ctx context.Context, n legName, r *row, about *acceptMeta, kind dsn.Kind, to string, xs []*rcpt) (*acceptMeta, *log.Draft, error) {
	keys := make([]string, len(xs))
	for i, x := range xs {
		keys[i] = x.R.Key()
	}
	am := &acceptMeta{V: version, Once: true, Envelope: transport.Envelope{
		ID:     transport.ReportID(r.ID, strings.Join(keys, "\x00"), string(kind)),
		Origin: transport.OriginLocal, EntryNode: q.d.Self, EntryTime: q.clock.src.Now().UTC(), Body: transport.Body8Bit,
	}}
	if s, err := q.seenRow(seenKey(am.Envelope.ID, "")); err != nil {
		return nil, nil, err
	} else if s != nil {
		return nil, nil, nil
	}
	legs := q.d.Resolve(&am.Envelope, to)
	if len(legs) == 0 {
		return nil, nil, errNobody
	}
	for _, l := range legs {
		for i := range l.Rcpts {
			l.Rcpts[i].Notify = transport.NotifyNever
		}
		am.Legs = append(am.Legs, acceptLeg(l))
	}
	rep := &dsn.Report{
		Kind: kind, To: to, From: q.d.Postmaster(), Reporter: q.d.Host(), ID: am.Envelope.ID.String(),
		Date: am.Envelope.EntryTime, Arrived: about.Envelope.EntryTime, Sender: r.From,
		Ret: about.Envelope.Ret, SMTPUTF8: about.Envelope.SMTPUTF8, Original: q.j.Body(r.Ref),
	}
	if to == r.From {
		rep.EnvID = about.Envelope.EnvID
	}
	life := q.policy.life(n.dest)
	rep.Until = time.Unix(r.Wall, 0).Add(life).UTC()
	for _, x := range xs {
		rep.Recipients = append(rep.Recipients, dsn.Recipient{Address: x.R.Address, ORcpt: x.R.ORcpt, Result: x.Last})
		if kind == dsn.Delayed && x.Last.Text == "" {
			rep.Recipients[len(rep.Recipients)-1].Result.Text = q.why(n.dest)
		}
	}
	draft := q.j.NewDraft()
	if err := dsn.Write(draft, rep); err != nil {
		draft.Discard()
		return nil, nil, err
	}
	if err := draft.Seal(ctx); err != nil {
		draft.Discard()
		return nil, nil, err
	}
	br, err := draft.Open()
	if err == nil {
		am.Structure, err = q.d.Parse(br, draft.Size())
		br.Close()
	}
	if err != nil {
		draft.Discard()
		return nil, nil, err
	}
	am.Envelope.SMTPUTF8 = rep.NeedsUTF8()
	return am, draft, nil
}

// why says why a destination waits, for a report of delay.
func (q *Queue) why(key transport.Destination) string {
	q.mu.Lock()
	defer q.mu.Unlock()
	if d := q.dests[key]; d != nil && d.lastErr != "" && key.Scope == transport.ScopeOutside {
		return d.lastErr
	}
	if key.Scope == transport.ScopeNode || key.Scope == transport.ScopeGateway {
		return "the office that has to take it cannot be reached now"
	}
	return ""
}
