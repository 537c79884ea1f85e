package deciders

import (
	"fmt"
	"slices"
	"time"

	"posthouse/mailstore"
	"posthouse/mailstore/kv"
	"posthouse/mailstore/log/simfs"
	"posthouse/mesh"
	"posthouse/mesh/domain"
	"posthouse/transport"
	"posthouse/transport/queue"
)

// Old disk images (F15). A copy is made of a node's disk, and hours later takes
// its place: the log, and how far the node had heard of the domain state. It has
// forgotten what it accepted, delivered, sent and was answered since. Its peers
// know, as the appliance's witness does: they talk with it about mail again when
// it has taken its next incarnation through the master. Before that it holds what
// it has for the outside, and renews its UIDVALIDITYs. A person lets go what is held.
//
// The peers' word is a model: all of them reach the node when its disk is made
// an older one, and it does not serve before one has spoken (appliance/DESIGN.md
// names what cannot be seen otherwise). The only voter of two is left out: what it
// forgot only a person can bring back, which layer B plays.

// image is a copy of a node's disk, and what an observer saw then.
type image struct {
	at    time.Duration
	fs    *simfs.FS
	have  int // commands in its log
	boxes map[mesh.MailboxID]map[mailstore.UID]string
}

// copyDisk makes an image of what is on the disk of a node, which goes on.
func (n *node) copyDisk() *image {
	i := &image{at: n.w.now, fs: n.fs.Image(simfs.LoseAll, 0), have: n.applied, boxes: map[mesh.MailboxID]map[mailstore.UID]string{}}
	n.w.obs.glance(n)
	for u := range n.w.people {
		box := mailboxOf(u)
		i.boxes[box] = map[mailstore.UID]string{}
		for uid, what := range n.w.obs.seen[place{n.i, box}] {
			if _, gone := n.w.obs.going[place{n.i, box}][uid]; !gone {
				i.boxes[box][uid] = what
			}
		}
	}
	return i
}

// glance reads all mailboxes of a node.
func (o *observer) glance(n *node) {
	for u := range o.w.people {
		o.read(n, u)
	}
}

// oldImage is the fault: an image of A's disk is made, and takes its place after
// the span, as soon as its peers can tell then.
func (w *world) oldImage(n *node, f Fault) {
	if !n.runs() || w.mesh.isOut(n) {
		return
	}
	n.step(n.boot, func() {
		i := n.copyDisk()
		w.note("an image of the disk of %s is kept", n.name)
		w.ends(f.Span, func() { w.restore(n, i) })
	})
}

func (w *world) restore(n *node, i *image) {
	if w.mesh.isOut(n) {
		return
	}
	ok := n.runs() && n.fs.Free() < 0 && !w.mesh.doubted(n) && n.applied == n.have
	for _, o := range w.mesh.members() {
		ok = ok && (o == n || w.links.up[n.i][o.i] && w.links.usable(n.i, o.i) && o.have == len(w.mesh.commands) && o.applied == o.have)
	}
	if !ok {
		w.ends(time.Minute, func() { w.restore(n, i) })
		return
	}
	if vs := w.mesh.voters(); len(vs) == 1 && vs[0] == n {
		return
	}
	w.res.Faults["restored"]++
	w.obs.glance(n)
	had := n.rows()
	n.crash(Fault{Mode: simfs.LoseAll, View: Gone})
	w.note("%s is restored from its image of %v ago", n.name, w.now-i.at)
	n.fs, n.kept = i.fs, new(kv.Memory)
	n.fs.SetFree(-1) // on a disk that has room
	n.state, n.applied, n.have, n.parted, n.shut = domain.NewMachine(), 0, i.have, 0, 0
	w.mesh.heard[n.i] = w.now - time.Hour
	n.renewals++
	n.before = had
	w.obs.rolledBack(n, i)
	n.come()
}

// doubted reports whether a node was rolled back and has not been taken in anew,
// by the last command: its vote does not count.
func (c *council) doubted(n *node) bool { return n.renewals > n.renewed }

// suspects reports whether this node takes another one for rolled back.
func (n *node) suspects(o *node) bool {
	if o.renewals == 0 {
		return false
	}
	return o.renewals > n.incarnation(o)
}

// incarnation is another node's, or this one's, as this one knows.
func (n *node) incarnation(o *node) uint64 {
	if x, ok := n.state.Node(o.id); ok {
		return x.Incarnation
	}
	return 0
}

// warned reports whether a peer can tell a node that starts, or that runs, that
// it is rolled back; alone: it reaches nobody.
func (n *node) warned() (yes, alone bool) {
	alone = true
	for _, o := range n.w.mesh.members() {
		if o != n && o.runs() && n.w.links.cut[n.i][o.i] == 0 && n.w.links.cut[o.i][n.i] == 0 {
			alone = false
			yes = yes || o.suspects(n) && o.incarnation(n) >= n.incarnation(n)
		}
	}
	return yes, alone
}

// reconcile brings a rolled-back node into a state in which it may serve, as the
// appliance does: no carrier has run yet. It reports whether it may go on.
func (n *node) reconcile() bool {
	n.w.obs.restored(n)
	var ids []queue.ID
	n.legs(func(d queue.DestRow, l queue.LegRow, _ queue.RcptRow) {
		if (d.Key.Scope == transport.ScopeOutside || d.Key.Scope == transport.ScopeGateway) && !slices.Contains(ids, l.Queue) {
			ids = append(ids, l.Queue)
		}
	})
	for _, id := range ids {
		if _, err := n.q.Hold(n.w.ctx, id); err != nil {
			n.w.note("%s: mail to the outside may be sent twice: %v", n.name, err)
			break
		}
	}
	err := n.store.RenewAt(n.w.ctx, uint32(n.renewals))
	if n.dying() {
		return false
	}
	if err != nil { // the node ends by that
		n.w.note("%s cannot renew its mailboxes: %v", n.name, err)
		n.crash(Fault{Mode: simfs.KeepAll})
		n.w.after(5*time.Second, n.come)
		return false
	}
	n.w.note("%s has renewed its mailboxes, and holds %d messages", n.name, len(ids))
	boot := n.boot
	n.w.after(time.Second, func() { n.takeIn(boot) })
	return true
}

// takeIn asks the master for the next incarnation until it is there, and then
// lets go what is held.
func (n *node) takeIn(boot int) {
	n.step(boot, func() {
		if n.w.mesh.doubted(n) {
			if n.w.mesh.propose(n, &domain.RenewNode{Node: n.id, Incarnation: n.renewals}) {
				n.renewed = n.renewals
				n.w.note("%s is taken in anew", n.name)
			}
			n.w.after(3*time.Second, func() { n.takeIn(boot) })
		}
	})
}

// letGo is a person who has what was held for the outside sent: some of it a
// second time.
func (n *node) letGo(boot int) {
	n.step(boot, func() {
		var ids []queue.ID
		n.legs(func(_ queue.DestRow, l queue.LegRow, r queue.RcptRow) {
			if r.State == queue.Held && !slices.Contains(ids, l.Queue) {
				ids = append(ids, l.Queue)
			}
		})
		for _, id := range ids {
			if _, err := n.q.Unhold(n.w.ctx, id); err != nil {
				n.w.note("%s: %v", n.name, err)
			}
		}
		if len(ids) > 0 {
			n.w.after(time.Minute, func() { n.letGo(boot) }) // what could not be written
		}
	})
}

// waits is one recipient in a queue, and how it stands.
type waits struct {
	state queue.State
	scope transport.Scope
}

// rows are the recipients in a node's queue.
func (n *node) rows() map[copyOf]waits {
	out := map[copyOf]waits{}
	n.legs(func(d queue.DestRow, l queue.LegRow, r queue.RcptRow) {
		if r.State != queue.Done {
			out[copyOf{l.Message, r.Address}] = waits{r.State, d.Key.Scope}
		}
	})
	return out
}

// rolledBack notes what a node's mailboxes lost, and that they are other ones
// now: what stood in them at the time of the image must be there.
func (o *observer) rolledBack(n *node, i *image) {
	for u := range o.w.people {
		p := place{n.i, mailboxOf(u)}
		there := map[string]bool{}
		for _, what := range i.boxes[p.box] {
			there[what] = true
		}
		for _, uid := range sorted(o.seen[p]) {
			if what := o.seen[p][uid]; !there[what] {
				o.excused[what+" "+p.box.String()] = true
			}
		}
		if was, ok := o.was[p]; ok {
			o.floor[p] = was.UIDValidity
		}
		o.due[p] = i.boxes[p.box]
		delete(o.seen, p)
		delete(o.was, p)
		delete(o.mods, p)
		delete(o.going, p)
	}
}

// restored compares the queue of a node that was rolled back with what it was:
// what it forgot is excused, what it has done before may come again.
func (o *observer) restored(n *node) {
	for p := range o.was { // each renewal is seen
		if p.node == n.i {
			o.floor[p] = o.was[p].UIDValidity
			delete(o.was, p)
			delete(o.mods, p)
		}
	}
	if n.before == nil {
		return
	}
	now := n.rows()
	for k, was := range n.before {
		if _, ok := now[k]; !ok {
			o.excused[o.name(k.id)+" "+k.key] = true
			o.strayed[k] = was.scope == transport.ScopeOutside
			if report, ok := o.written[k.id.String()]; ok {
				for _, about := range report.rcpts {
					o.excused["m"+report.num+" "+about] = true
				}
			}
		}
	}
	for k, is := range now {
		o.retold[k] = true // that it is delayed, say: to all who wait now, in one report
		if n.before[k] == is {
			continue
		}
		o.again[k] = true
		o.lost[k]++
		if is.state == queue.Released { // its gateway has told what became of it, and does not again
			o.strayed[k] = true
		}
		var user int
		if _, err := fmt.Sscanf(k.key, "u%d@"+domainName, &user); err == nil {
			o.again[copyOf{k.id, mailboxOf(user).String()}] = true
			o.lost[copyOf{k.id, mailboxOf(user).String()}]++
		}
	}
	n.before = nil
}

// allStrayed reports whether all that waits for one destination was given to a
// gateway of which nobody will hear about it, as the one or the other has forgotten
// with its disk: it is set aside for a person after 90 days.
func (n *node) allStrayed(d queue.DestRow) bool {
	if len(n.w.obs.strayed) == 0 || d.Key.Scope != transport.ScopeGateway {
		return false
	}
	legs, err := n.q.Legs(n.w.ctx, d.Key, 0, 10000)
	for _, l := range legs {
		for _, r := range l.Recipients {
			waits := r.State == queue.Waiting || r.State == queue.Kept || r.State == queue.Released
			if waits && (r.State != queue.Released || !n.w.obs.strayed[copyOf{l.Message, r.Address}]) {
				return false
			}
		}
	}
	return err == nil
}

// renewedBox checks the first reading of a mailbox after a renewal.
func (o *observer) renewedBox(n *node, user int, st mailstore.Status) {
	p := place{n.i, mailboxOf(user)}
	if floor, ok := o.floor[p]; ok && st.UIDValidity <= floor {
		o.w.violation("I17: UIDVALIDITY of u%d at %s is %d after a rollback, it was %d", user, n.name, st.UIDValidity, floor)
	}
	delete(o.floor, p)
}

// dueThere checks that what stood in a mailbox at the time of an image is there
// again.
func (o *observer) dueThere(n *node, user int) {
	p := place{n.i, mailboxOf(user)}
	for _, uid := range sorted(o.due[p]) {
		if o.seen[p][uid] != o.due[p][uid] {
			o.w.violation("I17: %s, UID %d of u%d at %s when its image was made, is not there", o.due[p][uid], uid, user, n.name)
		}
	}
	delete(o.due, p)
}
