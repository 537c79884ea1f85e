package queue

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"time"

	"posthouse/mesh"
	"posthouse/transport"
)

func beUint64(b []byte) uint64 { return binary.BigEndian.Uint64(b) }

// DestRow is one destination as people see it.
type DestRow struct {
	Destination string                `json:"destination"`
	Key         transport.Destination `json:"-"`
	Counts
	Messages int           `json:"messages"`
	Bytes    int64         `json:"bytes"`
	Oldest   time.Duration `json:"oldest_ns"`            // age of the oldest that is here in whatever state
	Error    string        `json:"last_error,omitempty"` // in the other side's own words
	ErrorAt  time.Time     `json:"last_error_at,omitzero"`
	Active   bool          `json:"active"` // being carried at this moment
	RetryIn  time.Duration `json:"retry_in_ns,omitempty"`
}

// List returns every destination with something in it, the ones with the most
// recipients waiting first.
func (q *Queue) List() ([]DestRow, error) {
	var out []DestRow
	if err := q.lock(); err != nil {
		q.mu.Unlock()
		return nil, err
	}
	now := q.clock.now()
	for key, d := range q.dests {
		if d.rows == 0 || key.Scope == 0 {
			continue
		}
		out = append(out, DestRow{Destination: key.String(), Key: key, Counts: d.counts, Messages: d.rows, Bytes: d.bytes,
			Error: d.lastErr, ErrorAt: d.lastErrAt, Active: d.running, RetryIn: max(d.notBefore-now, 0)})
	}
	q.mu.Unlock()
	for i := range out {
		var first uint64
		if err := q.j.View().Scan(destKey(out[i].Key), nil, func(k, v []byte) bool {
			_, first, _ = parseLegKey(k)
			return false
		}); err != nil {
			return nil, err
		}
		if r, err := q.peek(legName{out[i].Key, first}); err != nil {
			return nil, err
		} else if r != nil {
			out[i].Oldest = now - r.Accepted
			if out[i].Error == "" {
				for k := range r.Rcpts {
					if x := &r.Rcpts[k]; x.State != Done && x.Last.Text != "" {
						out[i].Error = said(&x.Last)
						break
					}
				}
			}
		}
	}
	slices.SortFunc(out, func(a, b DestRow) int {
		if a.Waiting != b.Waiting {
			return b.Waiting - a.Waiting
		}
		return slices.Compare(destKey(a.Key), destKey(b.Key))
	})
	return out, nil
}

func said(r *transport.Result) string {
	s := r.Text
	if r.Code != 0 {
		s = fmt.Sprintf("%d %s", r.Code, s)
	}
	if r.By != "" {
		s = r.By + ": " + s
	}
	return s
}

// RcptRow is one recipient as people see it.
type RcptRow struct {
	Address  string        `json:"address"`
	State    State         `json:"state"`
	Attempts int           `json:"attempts,omitempty"`
	RetryIn  time.Duration `json:"retry_in_ns,omitempty"`
	Error    string        `json:"last_error,omitempty"`
	Gateway  mesh.NodeID   `json:"gateway,omitempty"` // released to
}

// LegRow is one leg as people see it.
type LegRow struct {
	Queue       ID                  `json:"queue"`
	Destination string              `json:"destination"`
	Message     transport.MessageID `json:"message"`
	From        string              `json:"from"`
	Size        int64               `json:"size"`
	Accepted    time.Time           `json:"accepted"` // by this node's clock
	Age         time.Duration       `json:"age_ns"`
	Origin      mesh.NodeID         `json:"kept_for,omitempty"`
	Recipients  []RcptRow           `json:"recipients"`
}

func (q *Queue) legRow(n legName, r *row) LegRow {
	q.mu.Lock()
	now := q.clock.now()
	q.mu.Unlock()
	l := LegRow{Queue: ID(n.seq), Destination: n.dest.String(), Message: r.ID, From: r.From, Size: r.Size,
		Accepted: time.Unix(r.Wall, 0).UTC(), Age: now - r.Accepted, Origin: r.Keeper}
	for i := range r.Rcpts {
		x := &r.Rcpts[i]
		rr := RcptRow{Address: x.R.Address, State: x.State, Attempts: x.Attempts}
		if x.Last.Text != "" {
			rr.Error = said(&x.Last)
		}
		if x.State == Waiting {
			rr.RetryIn = max(x.Due-now, 0)
		}
		if x.State == Released {
			rr.Gateway = x.Node
		}
		l.Recipients = append(l.Recipients, rr)
	}
	return l
}

// Legs lists a destination's legs in order, after the given queue id, at most
// limit.
func (q *Queue) Legs(ctx context.Context, dest transport.Destination, after ID, limit int) ([]LegRow, error) {
	var seqs []uint64
	if err := q.j.View().Scan(destKey(dest), legKey(dest, uint64(after)+1), func(k, _ []byte) bool {
		_, seq, _ := parseLegKey(k)
		seqs = append(seqs, seq)
		return len(seqs) < limit
	}); err != nil {
		return nil, err
	}
	var out []LegRow
	for _, s := range seqs {
		n := legName{dest, s}
		r, err := q.peek(n)
		if err != nil {
			return nil, err
		}
		if r != nil {
			out = append(out, q.legRow(n, r))
		}
	}
	return out, ctx.Err()
}

// Show returns all legs of a message that are still here; none: it is unknown,
// or all of it has ended.
func (q *Queue) Show(id ID) ([]LegRow, error) {
	var out []LegRow
	err := q.legsOf(id, func(n legName) error {
		r, err := q.peek(n)
		if r != nil {
			out = append(out, q.legRow(n, r))
		}
		return err
	})
	return out, err
}

func (q *Queue) legsOf(id ID, f func(legName) error) error {
	v, ok, err := q.j.View().Get(msgKey(uint64(id)))
	if err != nil || !ok {
		return err
	}
	var m msgRow
	if err := decMode.Unmarshal(v, &m); err != nil {
		return err
	}
	for _, d := range m.Dests {
		if err := f(legName{d, uint64(id)}); err != nil {
			return err
		}
	}
	return nil
}

// Hold keeps a message's waiting recipients from being tried until Unhold.
func (q *Queue) Hold(ctx context.Context, id ID) (int, error) {
	return q.person(ctx, id, func(now time.Duration, x *rcpt) *change {
		if x.State != Waiting {
			return nil
		}
		return &change{N: x.N, State: Held}
	})
}

// Unhold lets held recipients, and those set aside, go on. What is kept for
// another node's release is not touched.
func (q *Queue) Unhold(ctx context.Context, id ID) (int, error) {
	n, err := q.person(ctx, id, func(now time.Duration, x *rcpt) *change {
		if x.State != Held && x.State != Aside {
			return nil
		}
		return &change{N: x.N, State: Waiting, Due: now}
	})
	// Homes may have changed meanwhile.
	return n, errors.Join(err, q.legsOf(id, func(name legName) error { q.routeSoon(name); return nil }))
}

// Retry tries a message's waiting recipients now.
func (q *Queue) Retry(ctx context.Context, id ID) (int, error) {
	dests := map[transport.Destination]bool{}
	if err := q.legsOf(id, func(n legName) error { dests[n.dest] = true; return nil }); err != nil {
		return 0, err
	}
	n, err := q.person(ctx, id, func(now time.Duration, x *rcpt) *change {
		if x.State != Waiting {
			return nil
		}
		return &change{N: x.N, State: Waiting, Due: now}
	})
	for d := range dests {
		q.Wake(d)
	}
	return n, err
}

// RetryAll tries everything of a destination now.
func (q *Queue) RetryAll(ctx context.Context, dest transport.Destination) (int, error) {
	n := 0
	err := q.each(ctx, dest, func(h head) bool { return h.counts.Waiting > 0 }, func(name legName) {
		ok, _ := q.change(name, func(now time.Duration, r *row) (cs []change) {
			for i := range r.Rcpts {
				if x := &r.Rcpts[i]; x.State == Waiting && x.Due > now {
					cs = append(cs, change{N: x.N, State: Waiting, Due: now})
				}
			}
			return cs
		})
		if ok {
			n++
		}
	})
	q.Wake(dest)
	return n, err
}

// Delete ends a message here without a report. Recipients released to a
// gateway are that gateway's.
func (q *Queue) Delete(ctx context.Context, id ID) (int, error) {
	return q.person(ctx, id, func(now time.Duration, x *rcpt) *change {
		if x.State == Done || x.State == Released {
			return nil
		}
		c := &change{N: x.N, State: Done, Last: &transport.Result{Outcome: transport.Failed, Code: 550, Enhanced: "5.7.1", Text: "deleted by an administrator"}}
		if x.State == Kept {
			c.Forget = true
		}
		return c
	})
}

func (q *Queue) person(ctx context.Context, id ID, f func(time.Duration, *rcpt) *change) (int, error) {
	n := 0
	err := q.legsOf(id, func(name legName) error {
		return q.settle(ctx, name, func(now time.Duration, r *row) (cs []change) {
			for i := range r.Rcpts {
				c := f(now, &r.Rcpts[i])
				if c == nil {
					continue
				}
				if c.State == Done && r.Keeper != 0 && !c.Forget {
					c.Add |= owesFinal
				}
				cs = append(cs, *c)
				n++
			}
			return cs
		})
	})
	return n, err
}
