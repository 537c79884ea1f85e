package deciders

import (
	"context"
	"errors"
	"slices"
	"time"

	"posthouse/mailstore"
	"posthouse/mailstore/delivery"
	"posthouse/mailstore/log"
	"posthouse/mailstore/mime"
	"posthouse/mesh"
	"posthouse/transport"
	"posthouse/transport/queue"
	"posthouse/transport/relay"
)

// carry is one carry under way: the queue's side is real, the carrier's streams
// and transactions are the model's.
type carry struct {
	n     *node
	dest  transport.Destination
	c     *queue.Carry
	ready bool // legs can be taken
	busy  bool // an outside transaction is under way
	over  bool

	out     int           // legs taken and not finished
	again   time.Duration // when to ask for the next leg although there is no news
	idle    time.Duration // when to give up waiting
	waiting bool          // Next found nothing

	local *delivery.Hand
	st    *stream
	gate  mesh.NodeID
	told  []copyOf // delivered, and the answer has not come yet
	read  uint64   // answers of its home that have come
}

// carry begins what the queue wants to be carried.
func (n *node) carry(dest transport.Destination) {
	qc := n.hand.Begin(dest)
	if qc == nil {
		return
	}
	c := &carry{n: n, dest: dest, c: qc}
	n.carries = append(n.carries, c)
	switch dest.Scope {
	case transport.ScopeLocal:
		c.local = delivery.New(delivery.Config{Name: func() string { return n.name }}, n).ByHand(qc)
		c.ready = true
	case transport.ScopeNode:
		c.dial(n.w.byID(dest.Node), nil)
	case transport.ScopeGateway:
		gs := n.gateways()
		if len(gs) == 0 {
			c.end(relay.ErrNoGateway)
			return
		}
		c.dial(n.w.byID(gs[0]), gs[1:])
	case transport.ScopeOutside:
		c.ready = true
	}
}

func (c *carry) dial(to *node, others []mesh.NodeID) {
	if to == nil {
		c.end(errNoDial)
		return
	}
	c.n.w.links.dial(c.n, to, func(st *stream) {
		c.st, c.gate, c.ready = st, to.id, true
		st.failed = func(err error) {
			if c.dest.Scope == transport.ScopeGateway {
				c.n.shun[c.gate] = epoch.Add(c.n.w.now + 15*time.Second)
			}
			c.end(err)
		}
	}, func() {
		if len(others) > 0 {
			c.dial(c.n.w.byID(others[0]), others[1:])
			return
		}
		c.end(errNoDial)
	})
}

// end ends the carry.
func (c *carry) end(err error) {
	if c.over {
		return
	}
	c.over = true
	if c.st != nil {
		c.st.closed = true
	}
	c.n.w.obs.forgot(c.told)
	c.n.unsure = slices.DeleteFunc(c.n.unsure, func(k copyOf) bool { return slices.Contains(c.told, k) })
	if i := slices.Index(c.n.carries, c); i >= 0 {
		c.n.carries = slices.Delete(c.n.carries, i, i+1)
	}
	c.c.End(err)
}

const window = 64 // relay's

// advance does one thing, if there is one to do.
func (c *carry) advance() bool {
	if c.over || !c.ready || c.busy || c.out >= window {
		return false
	}
	now := c.n.w.now
	if c.waiting && !c.c.News() && now < c.again {
		if now >= c.idle && c.out == 0 {
			c.end(nil)
			return true
		}
		if c.out == 0 {
			c.n.wakeIn(min(c.again, c.idle) - now)
		}
		return false
	}
	leg, until, err := c.c.Next()
	switch {
	case err != nil:
		c.end(err)
		return true
	case leg == nil:
		if !c.waiting {
			c.waiting, c.idle = true, now+c.c.Linger()
		}
		if now >= c.idle && c.out == 0 {
			c.end(nil)
			return true
		}
		c.again = now + max(until, time.Millisecond)
		c.n.wakeIn(min(c.again, max(c.idle, now+time.Millisecond)) - now)
		return false
	}
	c.waiting = false
	c.out++
	switch c.dest.Scope {
	case transport.ScopeLocal:
		had := c.local.Under()
		if err := c.local.Start(leg); err != nil {
			c.end(err)
		} else if c.local.Under() == had {
			c.out--
		}
	case transport.ScopeNode:
		c.relay(leg)
	case transport.ScopeGateway:
		c.offer(leg)
	case transport.ScopeOutside:
		c.busy = true
		c.n.w.outside.attempt(c.n, leg, func(rs []transport.Result) {
			if c.over {
				return
			}
			if rs == nil {
				c.end(errLostLine)
				return
			}
			c.busy = false
			c.out--
			c.finish(leg, rs)
		})
	}
	return true
}

// under reports whether local deliveries wait for the next flush.
func (c *carry) under() bool { return c.local != nil && c.local.Under() > 0 }

// synced goes on with what waited for the disk.
func (c *carry) synced() {
	if c.over || !c.under() {
		return
	}
	c.out = 0
	if err := c.local.Settle(); err != nil {
		c.end(err)
	}
}

// finish hands results to the queue, and notes that they are not on disk yet.
func (c *carry) finish(leg *transport.Leg, rs []transport.Result) {
	n := c.n
	for i := range leg.Rcpts {
		k := copyOf{leg.Envelope.ID, leg.Rcpts[i].Key()}
		if at := slices.Index(n.unsure, k); at >= 0 {
			n.unsure = slices.Delete(n.unsure, at, at+1)
			c.told = slices.DeleteFunc(c.told, func(x copyOf) bool { return x == k })
			n.unsynced = append(n.unsynced, k)
		}
	}
	c.c.Finish(leg, rs)
}

// message is what a frame carries.
type message struct {
	env       transport.Envelope
	rcpts     []transport.Recipient
	body      []byte
	seq, read uint64 // see relay.Holds
}

func (m *message) lane(i int) relay.Lane {
	return relay.Lane{To: m.rcpts[i].Mailbox, From: m.env.From}
}

func (m *message) lanes() (ls []relay.Lane) {
	for i := range m.rcpts {
		ls = append(ls, m.lane(i))
	}
	return ls
}

func (c *carry) message(leg *transport.Leg) (*message, bool) {
	b, err := read(leg.Body)
	if err != nil {
		c.n.w.violation("%s cannot read %s: %v", c.n.name, c.n.w.obs.name(leg.Envelope.ID), err)
		return nil, false
	}
	return &message{leg.Envelope, slices.Clone(leg.Rcpts), b, leg.Seq, c.read}, true
}

func read(b transport.Body) ([]byte, error) {
	r, err := b.Open()
	if err != nil {
		return nil, err
	}
	defer r.Close()
	out := make([]byte, b.Size())
	_, err = r.ReadAt(out, 0)
	if err != nil && len(out) > 0 {
		err = nil
		if _, e := r.ReadAt(out[:len(out)-1], 0); e != nil {
			err = e
		}
	}
	return out, err
}

// twice reports whether a frame comes twice.
func (w *world) twice() bool { return w.plan.Lossy && w.net.IntN(40) == 0 }

// relay sends a leg to its home, in one phase.
func (c *carry) relay(leg *transport.Leg) {
	m, ok := c.message(leg)
	if !ok {
		return
	}
	st := c.st
	c.n.w.obs.sends(c.n, st.server, m)
	st.send(func() {
		rs := st.server.deliver(st, m)
		if c.n.w.twice() {
			rs = st.server.deliver(st, m)
		}
		if rs == nil { // its log has ended: it says nothing, and its disk may have the message
			for i := range m.rcpts {
				c.n.w.obs.forgot([]copyOf{{m.env.ID, m.rcpts[i].Key()}})
			}
			return
		}
		for i := range rs {
			if rs[i].Outcome == transport.Delivered {
				k := copyOf{m.env.ID, m.rcpts[i].Key()}
				c.n.unsure, c.told = append(c.n.unsure, k), append(c.told, k)
			}
		}
		st.answer(func() { st.holds.Tell(m.seq, m.lanes()) }, func() {
			c.out--
			c.finish(leg, rs)
			c.read++
		})
	})
}

// deliver takes a message for mailboxes of this node from a stream. Nil: the
// node's log has ended.
func (n *node) deliver(st *stream, m *message) []transport.Result {
	rs := make([]transport.Result, len(m.rcpts))
	fault := relay.Believed(st.client.id, false, &m.env, m.rcpts, n.member)
	env := m.env
	env.Hops++
	var todo []transport.Recipient
	var at []int
	for i, r := range m.rcpts {
		if st.holds.Waits(m.lane(i), m.seq, m.read) {
			rs[i] = transport.Waits(n.name)
			st.holds.Defer(m.lane(i), m.seq)
			continue
		}
		todo, at = append(todo, r), append(at, i)
	}
	var got []transport.Result
	err := error(nil)
	if fault != nil {
		err = fault
	} else if len(todo) > 0 {
		var d *log.Draft
		var s *mime.Structure
		if d, s, err = n.draft("Received: from "+st.client.name+" by "+n.name+"\r\n", m.body); err == nil {
			var p *mailstore.Pending
			if p, err = n.StartDelivery(context.Background(), &mailstore.Delivery{Envelope: env, Rcpts: todo, Draft: d, Structure: s}); err == nil {
				got, err = p.Synced(context.Background())
			} else {
				d.Discard()
			}
		}
	}
	if errors.Is(err, log.ErrClosed) {
		return nil
	}
	for k, i := range at {
		if err != nil {
			rs[i] = transport.AsFault(err).Result(n.name)
		} else {
			rs[i] = got[k]
		}
		switch rs[i].Outcome {
		case transport.Deferred, transport.Moved:
			st.holds.Defer(m.lane(i), m.seq)
		case transport.Delivered:
			n.w.obs.took(n, st.client, m)
		}
	}
	return rs
}

// draft puts a message into the log's hands, with its walk.
func (n *node) draft(trace string, body []byte) (*log.Draft, *mime.Structure, error) {
	d := n.j.NewDraft()
	_, err := d.WriteString(trace)
	if err == nil {
		_, err = d.Write(body)
	}
	if err == nil {
		err = d.Seal(context.Background())
	}
	if err != nil {
		d.Discard()
		return nil, nil, err
	}
	r, err := d.Open()
	if err != nil {
		return nil, nil, err
	}
	defer r.Close()
	s, err := mime.Parse(r, d.Size())
	return d, s, err
}

// offer sends an outside leg to a gateway, in two phases.
func (c *carry) offer(leg *transport.Leg) {
	m, ok := c.message(leg)
	if !ok {
		return
	}
	st, n := c.st, c.n
	n.w.obs.sends(n, st.server, m)
	st.send(func() {
		fates := st.server.keep(st, m)
		if n.w.twice() {
			fates = st.server.keep(st, m)
		}
		if fates == nil {
			return
		}
		st.answer(nil, func() {
			kept, keys, rs := relay.Fates(leg, fates, st.server.name)
			if len(kept) > 0 {
				if err := n.q.Release(context.Background(), leg, kept, st.server.id); err != nil {
					c.end(err)
					return
				}
				n.w.after(n.syncTime(), func() {
					n.step(st.cboot, func() {
						st.tell(func() { st.server.q.Let(context.Background(), n.id, m.env.ID, keys) })
					})
				})
			}
			c.out--
			c.finish(leg, rs)
		})
	})
}

// keep answers an offer at a gateway.
func (n *node) keep(st *stream, m *message) []transport.Fate {
	fates := make([]transport.Fate, len(m.rcpts))
	var err error
	if f := relay.Believed(st.client.id, true, &m.env, m.rcpts, n.member); f != nil {
		err = f
	} else if !n.isGateway() {
		err = transport.Faultf(450, "4.3.2", "%s is no gateway now", n.name)
	} else {
		env := m.env
		env.Hops++
		d, s, e := n.draft("Received: from "+st.client.name+" by "+n.name+"\r\n", m.body)
		if err = e; err == nil {
			var fs []transport.Fate
			if fs, err = n.q.Keep(context.Background(), st.client.id, env, m.rcpts, d, s); err == nil {
				n.w.obs.took(n, st.client, m)
				return fs
			}
		}
	}
	if errors.Is(err, log.ErrClosed) {
		return nil
	}
	for i := range fates {
		fates[i].Result = transport.AsFault(err).Result(n.name)
		fates[i].Result.Outcome = transport.Deferred
	}
	return fates
}
