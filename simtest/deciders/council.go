package deciders

import (
	"encoding/binary"
	"fmt"
	"time"

	"posthouse/mesh"
	"posthouse/mesh/domain"
	"posthouse/transport/route"
)

// council is the model of the election: one list of commands, written by a
// master that has a majority in reach, learnt by whoever reaches it. What the
// commands do is the domain state's own code, on each node.
type council struct {
	w        *world
	commands [][]byte
	heard    []time.Duration // when each node last had the master in reach
	ids      uint64
	out      uint64 // nodes that were put out, as bits
	only     *node  // of two: who has the vote; nil: the first
}

func newCouncil(w *world) *council {
	return &council{w: w, heard: make([]time.Duration, w.plan.Nodes)}
}

func (c *council) id() (id mesh.ID) {
	c.ids++
	binary.BigEndian.PutUint64(id[:], c.w.plan.Seed|1<<63)
	binary.BigEndian.PutUint64(id[8:], c.ids)
	return id
}

func mailboxOf(user int) (m mesh.MailboxID) {
	binary.BigEndian.PutUint64(m[8:], uint64(user)+1)
	m[0] = 0xb0
	return m
}

func userID(user int) (id mesh.ID) {
	binary.BigEndian.PutUint64(id[8:], uint64(user)+1)
	id[0] = 0xa0
	return id
}

const (
	domainName = "company.test"
	strangers  = "stranger@elsewhere.example"
	groupName  = "all@" + domainName
)

func address(user int) string { return fmt.Sprintf("u%d@%s", user, domainName) }

// found makes the commands that everybody has from the beginning.
func (c *council) found() {
	p := c.w.plan
	admin := domain.User{ID: userID(1000), Mailbox: mailboxOf(1000), Address: "admin@" + domainName, Home: c.w.nodes[0].id}
	bodies := []domain.Body{&domain.Found{Lineage: c.id(), Node: c.admit(0), Domain: domain.Domain{ID: c.id(), Name: domainName}, Admin: admin,
		Key: domain.CandidateKey{Number: 1, Public: mesh.SealKey{1}, Wraps: []domain.Wrap{{Node: c.w.nodes[0].id, Box: []byte("model")}}}}}
	for i := 1; i < p.Nodes; i++ {
		a := c.admit(i)
		bodies = append(bodies, &a)
	}
	for u := range p.Nodes * p.Users {
		bodies = append(bodies, &domain.CreateUser{User: domain.User{ID: userID(u), Mailbox: mailboxOf(u), Address: address(u), Home: c.w.nodes[u/p.Users].id}})
	}
	g := domain.Group{ID: c.id(), Address: groupName}
	for u := range 3 {
		g.Members = append(g.Members, domain.Target{ID: userID(u)})
	}
	bodies = append(bodies, &domain.PutGroup{Group: g})
	for _, b := range bodies {
		c.commands = append(c.commands, c.encode(b, c.w.nodes[0]))
	}
}

func (c *council) admit(i int) domain.AdmitNode {
	n := c.w.nodes[i]
	a := domain.AdmitNode{ID: n.id, Name: n.name, Voter: true, Gateway: c.w.plan.Gateways>>i&1 == 1, Level: domain.Level, Priority: -i, Seal: mesh.SealKey{1, byte(i)}}
	binary.BigEndian.PutUint64(a.Key[:], uint64(n.id))
	return a
}

func (c *council) encode(b domain.Body, via *node) []byte {
	cmd := domain.Command{ID: c.id(), Actor: "simulator", Via: via.id, At: domain.TimeOf(via.wall()), Body: b}
	return cmd.Encode()
}

// master returns who leads now: of the nodes with a majority in reach the one
// that has the most commands; nil: nobody.
func (c *council) master() *node {
	voters := c.voters()
	var best *node
	for _, n := range voters {
		if !n.runs() || c.doubted(n) {
			continue
		}
		reach := 0
		for _, m := range voters {
			if m == n || c.w.links.usable(n.i, m.i) && !c.doubted(m) {
				reach++
			}
		}
		if reach > len(voters)/2 && (best == nil || n.have > best.have) {
			best = n
		}
	}
	return best
}

// reaches reports whether a node hears the master.
func (c *council) reaches(n *node, m *node) bool {
	return m != nil && n.runs() && !c.isOut(n) && (m == n || c.w.links.usable(m.i, n.i))
}

// touch notes who hears the master until now: the lines are about to change.
func (c *council) touch() {
	m := c.master()
	for _, n := range c.w.nodes {
		if c.reaches(n, m) {
			c.heard[n.i] = c.w.now
		}
	}
}

// age is how long ago a node's copy was known to be current.
func (c *council) age(n *node) time.Duration {
	if c.reaches(n, c.master()) {
		c.heard[n.i] = c.w.now
	}
	return c.w.now - c.heard[n.i]
}

// propose asks for a change at a node. It is refused without a master.
func (c *council) propose(at *node, b domain.Body) bool {
	m := c.master()
	if !c.reaches(at, m) {
		return false
	}
	m.learn()
	via := m
	if _, own := b.(*domain.RenewNode); own { // of its own alone
		via = at
	}
	cmd, err := m.state.Prepare(c.encode(b, via), via.id, m.wall())
	if err != nil {
		c.w.violation("propose: %v", err)
		return false
	}
	c.commands = append(c.commands, cmd)
	m.have = len(c.commands)
	c.spread()
	m.step(m.boot, m.learn)
	return true
}

// spread lets whoever hears the master have its commands, and apply them a
// moment later.
func (c *council) spread() {
	m := c.master()
	if m == nil {
		return
	}
	for _, n := range c.w.nodes {
		if n.have >= m.have && n.applied == n.have || !c.reaches(n, m) {
			continue
		}
		n.have = max(n.have, m.have)
		boot := n.boot
		c.w.after(c.w.links.base[m.i][n.i]+c.w.links.slow[n.i], func() { n.step(boot, n.learn) })
	}
}

// view is the mesh as a node sees it.
func (c *council) view(n *node) *mesh.View {
	if n.view != nil && n.viewTopo == c.w.links.topo && n.viewIndex == n.applied {
		return n.view
	}
	v := &mesh.View{Self: n.id}
	if m := c.master(); c.reaches(n, m) {
		v.Master = m.id
	}
	for _, x := range n.state.Members() {
		m := mesh.Member{ID: x.ID, Name: x.Name, State: mesh.Unreachable, Gateway: x.Gateway}
		if o := c.w.byID(x.ID); o == n || c.w.links.up[n.i][o.i] {
			m.State = mesh.Serving
		}
		v.Members = append(v.Members, m)
	}
	n.view, n.viewTopo, n.viewIndex = v, c.w.links.topo, n.applied
	return v
}

func (w *world) byID(id mesh.NodeID) *node {
	for _, n := range w.nodes {
		if n.id == id {
			return n
		}
	}
	return nil
}

// directory answers route from a node's copy of the domain state, as the
// appliance's does.
type directory struct{ n *node }

func (d directory) Resolve(a mesh.Address) route.Resolution {
	r := d.n.state.Resolve(a)
	out := route.Resolution{Expanded: r.Expanded, Owner: r.Owner, Closed: r.MembersOnly}
	switch r.Kind {
	case domain.Outside:
		out.Kind = route.Outside
	case domain.TooMany:
		out.Kind, out.TooMany = route.Found, true
	case domain.Inside:
		out.Kind = route.Found
		for _, x := range r.Recipients {
			out.Targets = append(out.Targets, route.Target{Mailbox: x.Mailbox, Address: x.Address, Home: x.Home, Version: x.HomeVersion, Detail: r.Detail})
		}
	}
	return out
}

func (d directory) Home(m mesh.MailboxID) (mesh.NodeID, uint64, bool) { return d.n.state.Home(m) }
