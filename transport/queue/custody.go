package queue

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"posthouse/mailstore/log"
	"posthouse/mailstore/mime"
	"posthouse/mesh"
	"posthouse/transport"
)

// Two-phase custody of outside legs (MESH.md, Relay):
//
//	origin                                gateway
//	offer (body)             ──────────>  Keep: ACCEPT with Keeper, synced
//	                         <──────────  kept
//	Release: LEG, synced
//	release                  ──────────>  Let: LEG; from now on it is tried
//	                         <──────────  final result (Finals), until
//	Final: LEG                            Told: LEG
//
// A gateway that keeps something unreleased asks its origin (Kept, Ask); an
// origin that has not written its release may offer it to another gateway.

// Keep takes, at a gateway, an outside leg offered by origin, without trying
// it. It returns one fate for each recipient once all of it is on disk.
// The draft is used up or discarded.
func (q *Queue) Keep(ctx context.Context, origin mesh.NodeID, env transport.Envelope, rcpts []transport.Recipient, body *log.Draft, structure *mime.Structure) ([]transport.Fate, error) {
	m := &Message{Envelope: env, Body: body, Structure: structure}
	fates := make([]transport.Fate, len(rcpts))
	meta := acceptMeta{Once: true, Keeper: origin}
	at := map[transport.Destination]int{}
	var legs []Leg
	for i := range rcpts {
		s, err := q.seenRow(seenKey(m.Envelope.ID, rcpts[i].Key()))
		if err != nil {
			m.Body.Discard()
			return nil, err
		}
		fates[i].Kept = true
		if s != nil {
			if s.State == Done {
				fates[i] = transport.Fate{Result: s.Last}
			}
			continue
		}
		d := q.d.Domain(rcpts[i].Address)
		n, ok := at[d]
		if !ok {
			n = len(legs)
			at[d] = n
			legs = append(legs, Leg{Dest: d})
		}
		legs[n].Rcpts = append(legs[n].Rcpts, rcpts[i])
	}
	if len(legs) == 0 {
		m.Body.Discard()
		return fates, nil
	}
	t, err := q.accept(ctx, m, legs, meta)
	if err != nil {
		m.Body.Discard()
		return nil, err
	}
	if err := t.Applied(ctx); err != nil {
		return nil, fmt.Errorf("keep message: %w", err)
	}
	return fates, nil
}

// find returns where the kept recipients of a message are, or those that
// ended; the missing are left out.
func (q *Queue) find(id transport.MessageID, keys []string, ended bool) (map[legName][]int, error) {
	at := map[legName][]int{}
	for _, k := range keys {
		s, err := q.seenRow(seenKey(id, k))
		if err != nil {
			return nil, err
		}
		if s != nil && (s.State == Done) == ended {
			n := legName{s.Dest, s.Seq}
			at[n] = append(at[n], s.N)
		}
	}
	return at, nil
}

// Let is the origin's release, at the gateway: from now on the recipients are
// tried. Repeating it is harmless.
func (q *Queue) Let(ctx context.Context, origin mesh.NodeID, id transport.MessageID, keys []string) error {
	return q.decideKept(ctx, origin, id, keys, func(now time.Duration, n int) change {
		return change{N: n, State: Waiting, Due: now}
	})
}

// Drop forgets kept recipients that their origin gave to somebody else: as if
// they had never been offered. What was released is not dropped.
func (q *Queue) Drop(ctx context.Context, origin mesh.NodeID, id transport.MessageID, keys []string) error {
	return q.decideKept(ctx, origin, id, keys, func(_ time.Duration, n int) change {
		return change{N: n, State: Done, Forget: true}
	})
}

// Strand sets kept recipients aside for a person: their origin does not know
// them, so nobody can say whether they were sent.
func (q *Queue) Strand(ctx context.Context, origin mesh.NodeID, id transport.MessageID, keys []string) error {
	return q.decideKept(ctx, origin, id, keys, func(_ time.Duration, n int) change {
		return change{N: n, State: Aside, Last: &transport.Result{Outcome: transport.Deferred,
			Text: "kept for another office that does not know it any more: release it to send it, or delete it"}}
	})
}

func (q *Queue) decideKept(ctx context.Context, origin mesh.NodeID, id transport.MessageID, keys []string, f func(time.Duration, int) change) error {
	at, err := q.find(id, keys, false)
	if err != nil {
		return err
	}
	for _, n := range inOrder(at) {
		ns := at[n]
		err := q.settle(ctx, n, func(now time.Duration, r *row) (cs []change) {
			if r.Keeper != origin || r.ID != id {
				return nil
			}
			for i := range r.Rcpts {
				if x := &r.Rcpts[i]; x.State == Kept && slices.Contains(ns, x.N) {
					cs = append(cs, f(now, x.N))
				}
			}
			return cs
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// settle is change that waits for its turn and until the record is applied.
func (q *Queue) settle(ctx context.Context, n legName, decide func(time.Duration, *row) []change) error {
	for {
		err := q.lock()
		d := q.dests[n.dest]
		if d == nil || err != nil {
			q.mu.Unlock()
			return err
		}
		wake := d.wake
		q.mu.Unlock()
		done, err := q.change(n, decide)
		switch {
		case err == nil && done:
			return q.applied(ctx, n)
		case !errors.Is(err, errBusy):
			return err
		}
		if err := q.waitFor(ctx, wake); err != nil {
			return err
		}
	}
}

// applied waits until no record of the leg is under way.
func (q *Queue) applied(ctx context.Context, n legName) error {
	for {
		q.mu.Lock()
		d := q.dests[n.dest]
		if d == nil || q.busy[n] == 0 {
			q.mu.Unlock()
			return nil
		}
		wake := d.wake
		q.mu.Unlock()
		if err := q.waitFor(ctx, wake); err != nil {
			return err
		}
	}
}

// Kept lists what is kept for an origin without a release, oldest first, at
// most limit, that was kept at least age ago.
func (q *Queue) Kept(origin mesh.NodeID, age time.Duration, limit int) ([]transport.KeptLeg, error) {
	var out []transport.KeptLeg
	err := q.indexed(q.kept, origin, func(n legName, r *row, now time.Duration) bool {
		if now-r.Accepted < age {
			return true
		}
		k := transport.KeptLeg{ID: r.ID}
		for i := range r.Rcpts {
			if r.Rcpts[i].State == Kept {
				k.Keys = append(k.Keys, r.Rcpts[i].R.Key())
			}
		}
		if len(k.Keys) > 0 {
			out = append(out, k)
		}
		return len(out) < limit
	})
	return out, err
}

// Origins lists the nodes for which something is kept, or to whom final
// results are owed.
func (q *Queue) Origins() []mesh.NodeID {
	defer q.mu.Unlock()
	if q.lock() != nil {
		return nil // Run says why
	}
	var ns []mesh.NodeID
	for n := range q.kept {
		ns = append(ns, n)
	}
	for n := range q.finals {
		if q.kept[n] == nil {
			ns = append(ns, n)
		}
	}
	slices.Sort(ns)
	return ns
}

func (q *Queue) indexed(m map[mesh.NodeID]map[legName]struct{}, origin mesh.NodeID, f func(legName, *row, time.Duration) bool) error {
	if err := q.lock(); err != nil {
		q.mu.Unlock()
		return err
	}
	ns := inOrder(m[origin])
	now := q.clock.now()
	q.mu.Unlock()
	for _, n := range ns {
		r, err := q.peek(n)
		if err != nil {
			return err
		}
		if r != nil && !f(n, r, now) {
			return nil
		}
	}
	return nil
}

// inOrder returns the legs of a map, oldest first.
func inOrder[T any](m map[legName]T) []legName {
	ns := make([]legName, 0, len(m))
	for n := range m {
		ns = append(ns, n)
	}
	slices.SortFunc(ns, func(a, b legName) int {
		return cmp.Or(cmp.Compare(a.seq, b.seq), slices.Compare(destKey(a.dest), destKey(b.dest)))
	})
	return ns
}

// peek reads a leg as it stands now.
func (q *Queue) peek(n legName) (*row, error) {
	q.mu.Lock()
	r, known := q.last[n]
	if d := q.dests[n.dest]; d != nil && d.bySeq[n.seq] != nil {
		r, known = d.bySeq[n.seq].row, true
	}
	q.mu.Unlock()
	if known {
		return r, nil
	}
	return q.getRow(n.dest, n.seq)
}

// Finals lists final results that an origin has not confirmed yet, oldest
// first, at most limit.
func (q *Queue) Finals(origin mesh.NodeID, limit int) ([]transport.FinalResult, error) {
	var out []transport.FinalResult
	err := q.indexed(q.finals, origin, func(n legName, r *row, _ time.Duration) bool {
		for i := range r.Rcpts {
			if x := &r.Rcpts[i]; x.Owes&owesFinal != 0 && len(out) < limit {
				out = append(out, transport.FinalResult{ID: r.ID, Key: x.R.Key(), Result: x.Last})
			}
		}
		return len(out) < limit
	})
	return out, err
}

// Told records that the origin has these final results.
func (q *Queue) Told(ctx context.Context, origin mesh.NodeID, fs []transport.FinalResult) error {
	for _, f := range fs {
		at, err := q.find(f.ID, []string{f.Key}, true)
		if err != nil {
			return err
		}
		for _, n := range inOrder(at) {
			ns := at[n]
			err := q.settle(ctx, n, func(_ time.Duration, r *row) (cs []change) {
				for i := range r.Rcpts {
					if x := &r.Rcpts[i]; r.Keeper == origin && slices.Contains(ns, x.N) && x.Owes&owesFinal != 0 {
						cs = append(cs, change{N: x.N, Clear: owesFinal})
					}
				}
				return cs
			})
			if err != nil {
				return err
			}
		}
	}
	return nil
}

// ErrNotOurs says that a recipient is not waiting here any more.
var ErrNotOurs = errors.New("not waiting here any more")

// Release records, at the origin, that custody of those recipients of a leg
// that is being carried passes to a gateway, and returns when that is on disk
// and seen by all: only then may the release be sent. All of them or none: with
// ErrNotOurs nothing was recorded.
func (q *Queue) Release(ctx context.Context, out *transport.Leg, rcpts []int, gateway mesh.NodeID) error {
	q.mu.Lock()
	d := q.dests[out.Dest]
	if d == nil || d.bySeq[out.Seq] == nil || d.bySeq[out.Seq].out != out {
		q.mu.Unlock()
		return ErrNotOurs
	}
	l := d.bySeq[out.Seq]
	var cs []change
	for _, i := range rcpts {
		n := l.handed[i]
		k := slices.IndexFunc(l.row.Rcpts, func(x rcpt) bool { return x.N == n })
		if k < 0 || l.row.Rcpts[k].State != Waiting {
			q.mu.Unlock()
			return ErrNotOurs
		}
		cs = append(cs, change{N: n, State: Released, Node: gateway})
	}
	b, err := encMode.Marshal(&legMeta{V: version, Seq: out.Seq, Dest: out.Dest, Stamp: q.clock.stamp(), Changes: cs})
	if err != nil || len(cs) == 0 {
		q.mu.Unlock()
		return err
	}
	q.busy[legName{out.Dest, out.Seq}]++
	t := q.j.Append(log.Entry{Kind: log.KindLeg, Meta: b})
	q.follow(underway{n: legName{out.Dest, out.Seq}, t: t})
	q.mu.Unlock()
	return t.Applied(ctx)
}

// Ask answers, at the origin, how each recipient of a message stands towards a
// gateway that keeps it.
func (q *Queue) Ask(gateway mesh.NodeID, id transport.MessageID, keys []string) ([]transport.Standing, error) {
	out := make([]transport.Standing, len(keys))
	rows, known, err := q.ofGate(id)
	if err != nil {
		return nil, err
	}
	for i, key := range keys {
		out[i] = transport.NotKnown
		if !known {
			continue
		}
		out[i] = transport.NotYours
		for _, r := range rows {
			for k := range r.Rcpts {
				x := &r.Rcpts[k]
				if x.R.Key() != key {
					continue
				}
				switch {
				case x.State == Released && x.Node == gateway:
					out[i] = transport.ReleasedYou
				case x.State == Waiting || x.State == Held || x.State == Aside:
					out[i] = transport.Undecided
				}
			}
		}
	}
	return out, nil
}

// ofGate returns the gateway leg of one of our messages.
func (q *Queue) ofGate(id transport.MessageID) (rows map[legName]*row, known bool, err error) {
	v, ok, err := q.j.View().Get(append([]byte(preGate), id[:]...))
	if err != nil || !ok || len(v) != 8 {
		return nil, false, err
	}
	n := legName{transport.Destination{Scope: transport.ScopeGateway}, beUint64(v)}
	rows = map[legName]*row{}
	r, err := q.peek(n)
	if err == nil && r != nil {
		rows[n] = r
	}
	return rows, true, err
}

// Final records, at the origin, what a gateway reports of a recipient that was
// released to it. From anybody else it is ignored. The gateway has made the
// reports that are due. It returns when that is applied.
func (q *Queue) Final(ctx context.Context, gateway mesh.NodeID, f transport.FinalResult) error {
	if !f.Result.Outcome.Final() {
		return fmt.Errorf("result %s is not final", f.Result.Outcome)
	}
	rows, _, err := q.ofGate(f.ID)
	if err != nil {
		return err
	}
	for n := range rows {
		err := q.settle(ctx, n, func(_ time.Duration, r *row) (cs []change) {
			for i := range r.Rcpts {
				if x := &r.Rcpts[i]; x.State == Released && x.Node == gateway && x.R.Key() == f.Key {
					cs = append(cs, change{N: x.N, State: Done, Last: &f.Result})
				}
			}
			return cs
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// ReleaseFrom takes back what was released to a node that a person declared
// lost: it is offered to another gateway. It returns the number of recipients.
// Should the node return, it may have sent some of them: whoever calls this
// was told so.
func (q *Queue) ReleaseFrom(ctx context.Context, gateway mesh.NodeID) (int, error) {
	n := 0
	key := transport.Destination{Scope: transport.ScopeGateway}
	var fail error
	err := q.each(ctx, key, func(h head) bool { return h.counts.Released > 0 }, func(name legName) {
		err := q.settle(ctx, name, func(now time.Duration, r *row) (cs []change) {
			for i := range r.Rcpts {
				if x := &r.Rcpts[i]; x.State == Released && x.Node == gateway {
					cs = append(cs, change{N: x.N, State: Waiting, Due: now})
					n++
				}
			}
			return cs
		})
		fail = errors.Join(fail, err)
		q.routeSoon(name) // this node may be a gateway itself by now
	})
	q.Wake(key)
	return n, errors.Join(err, fail)
}
