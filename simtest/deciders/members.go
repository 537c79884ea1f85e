package deciders

import (
	"slices"
	"time"

	"posthouse/mesh"
	"posthouse/mesh/domain"
	"posthouse/transport/queue"
)

// Revocation (F19). A node is put out of the mesh by a command, and goes on
// running and talking: to the others that have not heard of it, and to those
// that have. Its people get another home by a second command, a while later; what
// was released to it is taken back by a person, and may be sent twice then.
//
// The link's guard is a model: a node that has applied the revocation sends
// nothing more at once, and closes what comes in within linkHears. Until then
// relay's own rule of belief (relay.Believed) stands alone.
const linkHears = 2 * time.Second

// members are the nodes that are members, as the last command has it.
func (c *council) members() (in []*node) {
	for _, n := range c.w.nodes {
		if !c.isOut(n) {
			in = append(in, n)
		}
	}
	return in
}

func (c *council) isOut(n *node) bool { return c.out>>n.i&1 == 1 }

// voters are the nodes that elect: of two one alone.
func (c *council) voters() []*node {
	in := c.members()
	switch {
	case len(in) != 2:
		return in
	case c.only != nil:
		return []*node{c.only}
	}
	return in[:1]
}

// revoke puts a node out, by an admin at another one: its vote goes first, the
// lead before that if it has it.
func (c *council) revoke(n *node) bool {
	m := c.master()
	if m == nil || c.isOut(n) {
		return false
	}
	at := m
	for _, o := range c.members() {
		if m == n && at == n && o != n && c.reaches(o, m) {
			at = o // hands over what it has
			at.have = max(at.have, m.have)
		}
	}
	if at == n {
		return false
	}
	before, only := c.out, c.only
	c.out |= 1 << n.i
	if len(c.members()) == 2 || len(c.members()) == 1 {
		c.only = at
	}
	if !c.propose(at, &domain.RevokeNode{Node: n.id}) { // the others are too few
		c.out, c.only = before, only
		return false
	}
	return true
}

// revoke is the fault: A is put out, and B, a place among the others, gets its
// people after the span.
func (w *world) revoke(n *node, f Fault) {
	if len(w.mesh.members()) < 2 || !w.mesh.revoke(n) {
		return
	}
	w.note("%s is revoked", n.name)
	n.orphaned = true
	w.after(f.Span, func() { w.resettle(n, int(f.B)) })
}

// calmMembers ends what revocations left: people get a home at last.
func (w *world) calmMembers() {
	for _, n := range w.nodes {
		w.after(time.Minute, func() { w.resettle(n, 0) })
	}
}

// resettle is what an admin does about a node that was put out: another one
// gets its people, and what was released to it is taken back.
func (w *world) resettle(n *node, to int) {
	if !n.orphaned {
		return
	}
	in := w.mesh.members()
	heir := in[to%len(in)]
	if m := w.mesh.master(); m != nil {
		m.learn()
		for u := range w.people {
			if home, _, ok := m.state.Home(mailboxOf(u)); ok && home == n.id {
				w.obs.moves(u)
			}
		}
	}
	for _, at := range in {
		if w.mesh.propose(at, &domain.ReplaceNode{Old: n.id, New: heir.id}) {
			n.orphaned = false
			w.note("%s gets the people of %s", heir.name, n.name)
			for _, o := range in {
				w.takeBack(o, n)
			}
			return
		}
	}
	w.after(time.Minute, func() { w.resettle(n, to) }) // without a master a person waits
}

// takeBack is a person at a node who declares what was released to another one
// as not sent: as soon as the node has heard that the other is out.
func (w *world) takeBack(at, lost *node) {
	boot := at.boot
	if !at.runs() || at.member(lost.id) {
		w.after(time.Minute, func() { w.takeBack(at, lost) })
		return
	}
	at.step(boot, func() {
		back := at.released(lost.id)
		n, err := at.q.ReleaseFrom(w.ctx, lost.id)
		w.note("%s takes back %d recipients from %s: %v", at.name, n, lost.name, err)
		if err != nil {
			w.after(time.Minute, func() { w.takeBack(at, lost) })
		}
		w.obs.forgot(back)
		w.obs.twice(back)
	})
}

// released lists what this node has released to a gateway and not heard of.
func (n *node) released(to mesh.NodeID) (ks []copyOf) {
	n.legs(func(_ queue.DestRow, l queue.LegRow, r queue.RcptRow) {
		if r.State == queue.Released && r.Gateway == to {
			ks = append(ks, copyOf{l.Message, r.Address})
		}
	})
	return ks
}

// legs calls f for each recipient in the queue.
func (n *node) legs(f func(queue.DestRow, queue.LegRow, queue.RcptRow)) {
	rows, err := n.q.List()
	for _, d := range rows {
		var legs []queue.LegRow
		if legs, err = n.q.Legs(n.w.ctx, d.Key, 0, 10000); err != nil {
			break
		}
		for _, l := range legs {
			for _, r := range l.Recipients {
				f(d, l, r)
			}
		}
	}
	if err != nil {
		n.w.violation("%s: %v", n.name, err)
	}
}

// heardOf is the node's link when the domain state's nodes have changed: who was
// put out gets nothing more, and is not heard any more within linkHears.
func (n *node) heardOf() {
	for _, o := range n.w.nodes {
		if o == n || n.refuses(o) || !n.putOut(o.id) {
			continue
		}
		n.parted |= 1 << o.i
		for _, c := range slices.Clone(n.carries) {
			if c.st != nil && c.st.server == o {
				c.end(errLostLine)
			}
		}
		n.w.after(time.Duration(n.w.net.Int64N(int64(linkHears))), func() {
			n.w.note("%s talks with %s no more", n.name, o.name)
			n.shut |= 1 << o.i
			n.w.links.changed()
		})
	}
}

// putOut reports whether a node was a member and is none, as this one knows.
func (n *node) putOut(id mesh.NodeID) bool { x, ok := n.state.Node(id); return ok && !x.Member() }

// refuses reports whether this node sends nothing to another one.
func (n *node) refuses(o *node) bool { return n.parted>>o.i&1 == 1 }

// apart reports whether one of two nodes does not let the other in.
func (l *links) apart(a, b int) bool {
	return l.w.nodes[a].shut>>b&1 == 1 || l.w.nodes[b].shut>>a&1 == 1
}

// sends checks a message on its way out: not to who was put out, as the sender
// knows.
func (o *observer) sends(n, to *node, m *message) {
	if !n.member(to.id) {
		o.w.violation("I10: %s sends %s to %s, of which it knows that it was put out", n.name, o.name(m.env.ID), to.name)
	}
}

// took checks a message that came in and was taken.
func (o *observer) took(n, from *node, m *message) {
	if !n.member(from.id) {
		o.w.violation("I10: %s takes %s from %s, of which it knows that it was put out", n.name, o.name(m.env.ID), from.name)
	}
}

// twice excuses a second copy outside, and a second report.
func (o *observer) twice(ks []copyOf) {
	for _, k := range ks {
		o.again[k] = true
	}
}

// isTwice reports whether a message, given by its number, may come twice, or be reported
// twice, for a recipient that a report names.
func (o *observer) isTwice(s *sent, address string) bool {
	k := copyOf{o.idOf(s), address}
	return o.again[k] || o.retold[k]
}

// stuck is what waits at nodes that were put out, in whatever state: as held,
// and nobody's any more. Their people and papers are outside of I1.
func (o *observer) stuck() map[string]bool {
	out := map[string]bool{}
	for _, n := range o.w.nodes {
		if !o.w.mesh.isOut(n) {
			continue
		}
		n.legs(func(_ queue.DestRow, l queue.LegRow, r queue.RcptRow) {
			if r.State == queue.Done {
				return
			}
			out[o.name(l.Message)+" "+r.Address] = true
			if report, ok := o.written[l.Message.String()]; ok {
				for _, about := range report.rcpts {
					out["m"+report.num+" "+about] = true
				}
			}
		})
	}
	return out
}

// equal is I9: one state on all nodes.
func (o *observer) equal() {
	first := o.w.mesh.members()[0]
	want := first.state.Hash()
	for _, n := range o.w.mesh.members()[1:] {
		if got := n.state.Hash(); n.applied != first.applied || got != want {
			o.w.violation("I9: the domain state of %s (at %d) is not that of %s (at %d)", n.name, n.applied, first.name, first.applied)
		}
	}
}
