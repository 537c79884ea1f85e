package deciders

import (
	"context"
	"errors"
	"fmt"
	"math/bits"
	"time"

	"posthouse/mesh"
	"posthouse/mesh/domain"
	"posthouse/transport"
	"posthouse/transport/queue"
	"posthouse/transport/route"
)

// fault makes a fault happen, and end after its span.
func (w *world) fault(f Fault) {
	w.res.Faults[f.Kind]++
	w.note("fault %s", f)
	n := w.nodes[bits.TrailingZeros64(f.A|1<<63)%len(w.nodes)]
	count := func(c *int) {
		*c++
		w.ends(f.Span, func() { *c-- })
	}
	switch f.Kind {
	case Cut, CutOneWay:
		one := f.Kind == CutOneWay
		w.links.set(f.A, f.B, 1, one)
		w.ends(f.Span, func() { w.links.set(f.A, f.B, -1, one) })
	case Flap:
		w.flap(f, f.N)
	case Slow:
		d := time.Duration(f.N) * time.Millisecond
		w.links.slow[n.i] += d
		w.ends(f.Span, func() { w.links.slow[n.i] -= d })
	case Narrow:
		d := time.Duration(f.N) * time.Millisecond
		w.links.narrow[n.i] += d
		w.ends(f.Span, func() { w.links.narrow[n.i] -= d })
	case Crash:
		for i, o := range w.nodes {
			if f.A>>i&1 == 1 {
				o.crash(f)
				w.after(f.Span, o.come)
			}
		}
	case CrashAt:
		if n.up {
			n.crashIn, n.crashAs = f.N, f
		}
	case FailSync:
		if n.up {
			n.failSync, n.crashAs = true, Fault{}
		}
	case Pause:
		if n.up {
			n.paused++
			w.links.changed()
			w.ends(f.Span, func() { n.resume(false) })
		}
	case Full:
		n.fs.SetFree(int64(f.N))
		w.ends(f.Span, func() {
			n.fs.SetFree(-1)
			n.step(n.boot, n.room)
		})
	case SlowDisk:
		n.slowSync += f.N
		w.ends(f.Span, func() { n.slowSync -= f.N })
	case Clock:
		d := time.Duration(f.N) * time.Second
		n.skew += d
		w.after(f.Span, func() { n.skew -= d })
	case Offline:
		w.outside.offline[n.i]++
		w.ends(f.Span, func() { w.outside.offline[n.i]-- })
	case Refuse:
		count(&w.outside.refuse[f.N])
	case Defer:
		count(&w.outside.deferring[f.N])
	case Grey:
		count(&w.outside.grey[f.N])
	case DropReply:
		count(&w.outside.drop[f.N])
	case Shut:
		count(&w.outside.shut[f.N])
	case Home:
		if w.obs.gone[f.N] || w.mesh.isOut(w.nodes[f.B]) {
			return
		}
		if w.mesh.propose(n, &domain.SetHome{User: userID(f.N), Home: w.nodes[f.B].id}) {
			w.obs.moves(f.N)
		}
	case Gateway:
		w.gateway(n, w.plan.Gateways>>n.i&1 == 0)
		w.ends(f.Span, func() { w.gateway(n, w.plan.Gateways>>n.i&1 == 1) })
	case Delete:
		if !w.obs.gone[f.N] && w.mesh.propose(n, &domain.DeleteUser{User: userID(f.N)}) {
			w.obs.gone[f.N] = true
		}
	case Expunge:
		if w.obs.gone[f.N] {
			return // who could log in?
		}
		n.step(n.boot, func() { w.obs.expunge(n, f.N) })
	case OldImage:
		w.oldImage(n, f)
	case Revoke:
		w.revoke(n, f)
	case MailQuota:
		w.full[f.N]++
		w.ends(f.Span, func() { w.full[f.N]-- })
	}
}

// room tells this node and its peers that its disk has room again.
func (n *node) room() {
	n.q.RoomHere()
	for _, o := range n.w.nodes {
		if n.w.links.up[n.i][o.i] {
			boot := o.boot
			n.w.after(n.w.links.delay([]int{n.i, o.i}), func() {
				o.step(boot, func() { o.q.Room(transport.Destination{Scope: transport.ScopeNode, Node: n.id}) })
			})
		}
	}
}

// ends plans a fault's end; when all faults have ended before, it is nothing.
func (w *world) ends(d time.Duration, f func()) {
	w.after(d, func() {
		if !w.calmed {
			f()
		}
	})
}

func (w *world) flap(f Fault, left int) {
	if left == 0 {
		return
	}
	w.links.set(f.A, f.B, 1, false)
	w.ends(f.Span, func() {
		w.links.set(f.A, f.B, -1, false)
		w.ends(f.Span, func() { w.flap(f, left-1) })
	})
}

func (w *world) gateway(n *node, on bool) {
	if !w.mesh.isOut(n) {
		w.mesh.propose(n, &domain.UpdateNode{Node: n.id, Gateway: &on})
	}
}

// quota is one byte while a mailbox is said to be full.
func (w *world) quota(m mesh.MailboxID) int64 {
	for u, n := range w.full {
		if n > 0 && mailboxOf(u) == m {
			return 1
		}
	}
	return 0
}

// submit is a client with one message. Clients of one sender at one node wait
// for their answer before they send the next.
func (w *world) submit(i int, l *Load) {
	n, c := w.nodes[l.Node], client{l.From, l.Node}
	if !n.runs() || w.obs.busy[c] {
		return
	}
	if l.From >= 0 {
		if _, ok := n.state.User(userID(l.From)); !ok {
			return // nobody can log in
		}
	}
	env := transport.Envelope{Origin: transport.OriginSubmission, EntryNode: n.id, EntryTime: n.wall(), Body: transport.Body8Bit}
	switch l.From {
	case -1:
	case -2:
		env.Origin, env.From = transport.OriginOutside, strangers
	default:
		env.From = address(l.From)
	}
	var rcpts []route.Rcpt
	add := func(s string) {
		a, err := mesh.ParseAddress(s)
		if err != nil {
			panic(err)
		}
		rcpts = append(rcpts, route.Rcpt{Address: a, Notify: l.Notify})
	}
	for _, u := range l.Users {
		add(address(u))
	}
	for _, o := range l.Outside {
		add(outsideAddress(o))
	}
	if l.Group {
		add(groupName)
	}
	boot := n.boot
	w.obs.busy[c] = true
	n.step(boot, func() {
		id, err := n.accept(i, env, rcpts)
		var fault *transport.Fault
		switch {
		case errors.As(err, &fault), errors.Is(err, transport.ErrNoSpace):
			w.note("%s refuses m%d: %v", n.name, i, err)
			w.obs.refused(id)
			w.obs.busy[c] = false
			return
		case err != nil: // the connection breaks
			w.obs.busy[c] = false
			return
		}
		w.after(n.syncTime()+time.Duration(w.load.IntN(50))*time.Millisecond, func() {
			// Its 250 is on its way, whatever becomes of the node now.
			w.obs.busy[c] = false
			w.obs.taken(i, l, c, id)
		})
	})
}

// accept is intake's last part: route, then custody.
func (n *node) accept(i int, env transport.Envelope, rcpts []route.Rcpt) (transport.MessageID, error) {
	if _, err := n.rand.Read(env.ID[:]); err != nil {
		return env.ID, err
	}
	if err := n.j.Admit(context.Background(), 0); err != nil {
		return env.ID, err
	}
	d := n.routing().Decide(&env, rcpts)
	for _, f := range d.Faults {
		if f != nil {
			return env.ID, f
		}
	}
	text := fmt.Sprintf("From: <%s>\r\nSubject: m%d\r\nX-Number: %d\r\n\r\nThis is message %d, and %d is its sum.\r\n", env.From, i, i, i, i*7919)
	draft, s, err := n.draft("Received: by "+n.name+"\r\n", []byte(text))
	if err != nil {
		return env.ID, err
	}
	n.w.obs.made(env.ID, i, text, d)
	m := &queue.Message{Envelope: env, Body: draft, Structure: s}
	for _, x := range d.Notices {
		m.Expanded = append(m.Expanded, queue.Expanded{List: x.List, Rcpt: transport.Recipient{Address: x.Rcpt.Address.String(), Notify: x.Rcpt.Notify, ORcpt: x.Rcpt.ORcpt}})
	}
	_, err = n.q.Accept(context.Background(), m, legsOf(d))
	if err != nil && !errors.Is(err, transport.ErrNoSpace) && !errors.Is(err, transport.ErrUncertain) {
		return env.ID, fmt.Errorf("accept: %w", err)
	}
	return env.ID, err
}
