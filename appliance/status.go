package appliance

import (
	"context"
	"encoding/hex"
	"fmt"
	"slices"
	"strings"
	"time"

	"posthouse/appliance/admin"
	"posthouse/appliance/health"
	"posthouse/mesh"
	"posthouse/transport"
	"posthouse/transport/link"
	"posthouse/transport/queue"
)

// Status implements admin.Operations.
func (n *Node) Status(context.Context) (admin.Status, error) {
	s := admin.Status{Node: n.cfg.Name, Host: n.cfg.Host, State: string(*n.phase.Load()), Version: n.version, AsOf: n.now(), Uptime: int64(time.Since(n.began).Seconds())}
	if ds := n.state.LocalDomains(); len(ds) > 0 {
		s.Domain = ds[0].Name
	} else {
		s.Domain = n.rec.get().Domain
	}
	n.mu.Lock()
	s.JoinProgress = slices.Clone(n.progress)
	n.mu.Unlock()
	if err := n.ready(); err != nil {
		s.Conditions = n.board.Conditions()
		s.Health = admin.Health{Sentence: sentence(err.Error())}
		s.Members = []admin.Member{}
		return s, nil
	}
	n.showStore()
	n.refreshView()
	v := n.view.Load()
	s.Term, s.Generation = v.Authority.Term, v.Authority.Generation
	if v.Master != 0 {
		s.Master = n.nodeName(v.Master)
	}
	s.AppliedIndex, _ = n.state.Applied()
	disk := n.journal.Disk()
	s.StoreBytes, s.StoreLive = disk.Bytes, disk.Live
	h := n.state.Hash()
	s.StateHash = hex.EncodeToString(h[:8])
	rows, err := n.queue.List()
	if err != nil {
		return s, err
	}
	waiting := map[mesh.NodeID]queue.DestRow{}
	var homeless []queue.DestRow // for nodes that were put out of the mesh
	for _, r := range rows {
		s.QueueHeld += r.Held + r.Aside
		switch r.Key.Scope {
		case transport.ScopeNode:
			waiting[r.Key.Node] = r
			if x, ok := n.state.Node(r.Key.Node); !ok || !x.Member() {
				homeless = append(homeless, r)
				s.QueueHeld += r.Waiting
			}
		case transport.ScopeLocal:
			waiting[n.id] = r
		default:
			s.QueueOutside += r.Waiting + r.Kept
		}
	}
	paths := map[mesh.NodeID]link.PeerInfo{}
	for _, p := range n.link.Peers() {
		paths[p.ID] = p
	}
	s.Members = []admin.Member{}
	for _, m := range v.Members {
		q := waiting[m.ID]
		x := admin.Member{Name: m.Name, ID: m.ID.String(), Host: m.Host, State: string(m.State), Role: string(m.Role), Gateway: m.Gateway, Version: m.Version,
			RTT: float64(m.RTT.Microseconds()) / 1000, Path: "none", Queue: q.Waiting, Oldest: int64(q.Oldest.Seconds()), Since: m.Since}
		if d, ok := n.state.Node(m.ID); ok {
			x.Priority = d.Priority
		}
		switch p := paths[m.ID]; {
		case m.ID == n.id:
			x.Path = "self"
		case p.Connected:
			x.Path = "direct"
		case p.Via != 0:
			x.Path = "via " + n.nodeName(p.Via)
		}
		s.Members = append(s.Members, x)
	}
	s.Conditions = append(n.board.Conditions(), n.meshConditions(&s, homeless)...)
	slices.SortStableFunc(s.Conditions, func(a, b health.Condition) int { return int(b.Severity) - int(a.Severity) })
	s.Health.OK, s.Health.Sentence = health.Sum(s.Conditions)
	return s, nil
}

// meshConditions are what is wrong in the mesh at this moment, as this node
// sees it.
func (n *Node) meshConditions(s *admin.Status, homeless []queue.DestRow) (out []health.Condition) {
	add := func(c health.Condition) {
		c.Level = c.Severity.String()
		out = append(out, c)
	}
	switch *n.phase.Load() {
	case mesh.Fresh:
		add(health.Condition{Name: "mesh.fresh", Severity: health.Problem, Since: n.began.UTC(), Text: "This node belongs to no mesh yet, so it takes no mail.", Next: "posthouse init founds one, posthouse join brings the node into one."})
		return out
	case mesh.Joining:
		return out // the join's own condition says why
	}
	for _, m := range s.Members {
		waits := ""
		if m.Queue > 0 {
			waits = fmt.Sprintf("; mail for %d recipients waits here for it", m.Queue)
		}
		switch {
		case m.State == string(mesh.Unreachable):
			add(health.Condition{Name: "node.unreachable", About: m.Name, Severity: health.Warning, Since: m.Since, Text: fmt.Sprintf("%s has been cut off for %s%s.", m.Name, admin.Spoken(time.Since(m.Since)), waits), Next: "Check the office's line; mail leaves by itself when it is back."})
		case m.State == string(mesh.Left):
			add(health.Condition{Name: "node.left", About: m.Name, Severity: health.Warning, Since: m.Since, Text: fmt.Sprintf("%s was shut down %s ago%s.", m.Name, admin.Spoken(time.Since(m.Since)), waits), Next: "Start it again; mail leaves by itself then."})
		case strings.HasPrefix(m.Path, "via "):
			add(health.Condition{Name: "line.cut", About: m.Name, Severity: health.Notice, Since: m.Since, Text: fmt.Sprintf("The line to %s is cut; mail goes %s.", m.Name, m.Path), Next: "Check the line between the two offices."})
		}
	}
	for _, x := range n.state.Members() {
		if n.notices.Full(x.ID) {
			add(health.Condition{Name: "node.disk-full", About: x.Name, Severity: health.Problem, Since: s.AsOf, Text: fmt.Sprintf("The disk of %s is full: mail for its people waits.", x.Name), Next: "Make room there; what waits here leaves by itself then."})
		}
	}
	for _, r := range homeless {
		name := n.nodeName(r.Key.Node)
		add(health.Condition{Name: "home.revoked", About: name, Severity: health.Problem, Since: s.AsOf.Add(-r.Oldest), Text: fmt.Sprintf("Mail for %d recipients is held: their home %s was put out of the mesh.", r.Waiting, name), Next: "Give them another home: posthouse mesh node NEW --replaces " + name + ", or posthouse user set."})
	}
	if n.refusedByAll() {
		add(health.Condition{Name: "node.revoked", Severity: health.Problem, Since: s.AsOf, Text: "The other nodes refuse this one: it was put out of the mesh.", Next: revokedNext})
	}
	e := n.elected()
	if e == nil {
		return out
	}
	es := e.State()
	switch {
	case es.Stopped != "":
		add(health.Condition{Name: "mesh.frozen", Severity: health.Problem, Since: s.AsOf, Text: sentence("this node's copy of the domain state is frozen: " + es.Stopped), Next: "Mail goes on."})
	case es.Rival.Generation != 0:
		add(health.Condition{Name: "mesh.rival", Severity: health.Problem, Since: s.AsOf, Text: "Two halves of the mesh were promoted apart; neither can change the domain state.", Next: "Decide for one: posthouse mesh promote --yes on a node of it."})
	case es.Master == 0:
		add(health.Condition{Name: "mesh.no-master", Severity: health.Warning, Since: s.AsOf, Text: fmt.Sprintf("There is no master: %d of %d nodes that vote can be reached, %d are needed. Mail inside goes on; the domain cannot be changed, and Internet mail may wait.", es.Reached, len(es.Voters), es.Needs),
			Next: "If the others are lost for good: posthouse mesh promote."})
	}
	if es.Damaged != "" {
		add(health.Condition{Name: "mesh.damaged", Severity: health.Warning, Since: n.began.UTC(), Text: sentence("this node's copy of the domain state was damaged and is fetched again from the master: " + es.Damaged), Next: "Look after the disk; posthouse store verify, with the node stopped, names the places."})
	}
	if len(es.Forked) > 0 {
		add(health.Condition{Name: "mesh.forked", Severity: health.Warning, Since: s.AsOf, Text: forkedText(len(es.Forked)), Next: "See posthouse mesh forked, and make again what is still wanted."})
	}
	return out
}

const revokedNext = "Ask an admin of the mesh; to come back, remove its data folder and join anew."

// refusedByAll reports whether every node that can be talked to says that this
// one is not admitted.
func (n *Node) refusedByAll() bool {
	refused := false
	for _, p := range n.link.Peers() {
		if p.Connected {
			return false
		}
		refused = refused || p.Refused
	}
	return refused
}

func forkedText(n int) string {
	if n == 1 {
		return "One change of an earlier lineage does not hold any more."
	}
	return fmt.Sprintf("%d changes of an earlier lineage do not hold any more.", n)
}

// Watch implements admin.Operations. RTTs and ages change all the time: they
// are sent again every two seconds while somebody looks.
func (n *Node) Watch(ctx context.Context, f func(admin.Status) bool) error {
	for {
		changed := n.live.wait()
		s, err := n.Status(ctx)
		if err != nil {
			return err
		}
		if !f(s) {
			return nil
		}
		select {
		case <-changed: // let what belongs together come together
			select {
			case <-time.After(50 * time.Millisecond):
			case <-ctx.Done():
			}
		case <-time.After(2 * time.Second):
		case <-ctx.Done():
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
	}
}

// queued calls f with what waits here, destination by destination in order,
// until it returns false; at most 10,000 legs.
func (n *Node) queued(ctx context.Context, f func(queue.DestRow, queue.LegRow) bool) error {
	rows, err := n.queue.List()
	if err != nil {
		return err
	}
	left := 10_000
	for _, d := range rows {
		if left <= 0 {
			return nil
		}
		legs, err := n.queue.Legs(ctx, d.Key, 0, left)
		if err != nil {
			return err
		}
		left -= len(legs)
		for _, l := range legs {
			if !f(d, l) {
				return nil
			}
		}
	}
	return nil
}

// Queue implements admin.Operations.
func (n *Node) Queue(ctx context.Context) ([]admin.QueueEntry, error) {
	if err := n.started(); err != nil {
		return nil, err
	}
	out := []admin.QueueEntry{}
	err := n.queued(ctx, func(d queue.DestRow, l queue.LegRow) bool {
		out = append(out, n.queueEntry(d, l))
		return true
	})
	return out, err
}

func (n *Node) destName(d transport.Destination) string {
	if d.Scope == transport.ScopeNode {
		return n.nodeName(d.Node)
	}
	return d.String()
}

func (n *Node) queueEntry(d queue.DestRow, l queue.LegRow) admin.QueueEntry {
	e := admin.QueueEntry{ID: l.Queue.String(), From: l.From, Destination: n.destName(d.Key), Size: l.Size, Accepted: l.Accepted}
	for _, r := range l.Recipients {
		e.Attempts = max(e.Attempts, r.Attempts)
		e.Recipients = append(e.Recipients, admin.QueueRcpt{Address: r.Address, State: r.State.String(), Said: r.Error})
		switch r.State {
		case queue.Held:
			e.Held = "by an admin"
		case queue.Aside:
			e.Held = "undeliverable"
		case queue.Waiting:
			if wait := max(r.RetryIn, d.RetryIn); d.Key.Scope == transport.ScopeOutside && wait > 0 {
				t := n.now().Add(wait)
				e.Next = &t
			}
		}
	}
	return e
}

// eachQueued does f for every message that an action names.
func (n *Node) eachQueued(ctx context.Context, a admin.QueueAction, f func(queue.ID) (int, error)) (int, error) {
	if err := n.started(); err != nil {
		return 0, err
	}
	var ids []queue.ID
	err := n.queued(ctx, func(d queue.DestRow, l queue.LegRow) bool {
		named := a.All || a.ID == l.Queue.String() || a.ID == "" && a.Destination == n.destName(d.Key)
		if named && !slices.Contains(ids, l.Queue) {
			ids = append(ids, l.Queue)
		}
		return true
	})
	if err != nil {
		return 0, err
	}
	if len(ids) == 0 && a.ID != "" {
		return 0, admin.Errorf(admin.NotFound, "queue.unknown", "No message %s waits here.", a.ID)
	}
	total := 0
	for _, id := range ids {
		k, err := f(id)
		total += k
		if err != nil {
			return total, err
		}
	}
	return total, nil
}

// QueueRetry implements admin.Operations.
func (n *Node) QueueRetry(ctx context.Context, a admin.QueueAction) (int, error) {
	return n.eachQueued(ctx, a, func(id queue.ID) (int, error) { return n.queue.Retry(ctx, id) })
}

// QueueHold implements admin.Operations.
func (n *Node) QueueHold(ctx context.Context, a admin.QueueAction) (int, error) {
	return n.eachQueued(ctx, a, func(id queue.ID) (int, error) { return n.queue.Hold(ctx, id) })
}

// QueueRelease implements admin.Operations.
func (n *Node) QueueRelease(ctx context.Context, a admin.QueueAction) (int, error) {
	if a.From != "" {
		if err := n.started(); err != nil {
			return 0, err
		}
		x, err := n.nodeByName(a.From)
		if err != nil {
			return 0, err
		}
		return n.queue.ReleaseFrom(ctx, x.ID)
	}
	return n.eachQueued(ctx, a, func(id queue.ID) (int, error) { return n.queue.Unhold(ctx, id) })
}

// QueueDelete implements admin.Operations.
func (n *Node) QueueDelete(ctx context.Context, a admin.QueueAction) (int, error) {
	return n.eachQueued(ctx, a, func(id queue.ID) (int, error) { return n.queue.Delete(ctx, id) })
}
