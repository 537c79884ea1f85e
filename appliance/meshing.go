package appliance

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"time"

	"posthouse/appliance/admin"
	"posthouse/appliance/health"
	"posthouse/mesh"
	"posthouse/mesh/domain"
	"posthouse/mesh/election"
	"posthouse/mesh/gossip"
	"posthouse/transport/link"
)

// buildLink prepares the one UDP socket's endpoint.
//
// Unknown keys are refused, and nothing is pulled for them from some peer: that
// peer's word would admit a key. The domain state which admits it is on its way
// by Raft (through a third node if the line to the master is cut), and link
// dials a new member the moment it is there. Only when the master itself is not
// known here a majority of those that vote is asked (vouching.go). Lineages are not judged here either:
// nodes of two lineages have to talk, for the election to find out which follows.
func (n *Node) buildLink(socket net.PacketConn) (err error) {
	n.witness = newWitness(n)
	n.link, err = link.New(link.Config{}, link.Deps{
		Conn: socket, Identity: n.key, Random: n.env.Random, Log: n.part("link"),
		Facts: func() link.Facts {
			f := link.Facts{BootCount: n.boots, LogEnd: n.journal.Applied()}
			if ls := n.state.Lineages(); len(ls) > 0 {
				f.Lineage = append(ls[len(ls)-1].ID[:], byte(ls[len(ls)-1].Generation))
			}
			return f
		},
		Meet: n.witness.meet, Unknown: n.stranger,
		Learned: func(id mesh.NodeID, at netip.AddrPort) {
			n.rec.change(func(r *record) {
				next := map[mesh.NodeID]netip.AddrPort{id: at}
				for k, v := range r.Learned {
					if k != id {
						next[k] = v
					}
				}
				r.Learned = next
			})
		},
	})
	return err
}

// runMesh starts what makes this node part of a mesh. What needs membership
// waits for it. It returns when the domain state is what it was at the last
// stop: nobody may see this node's peers, or ask it for a mailbox, while the
// state still grows command by command.
func (n *Node) runMesh(ctx context.Context, g *group, offers offers) error {
	changed, homes, news := make(chan struct{}, 1), make(chan struct{}, 1), make(chan struct{}, 1)
	poke := func(c chan struct{}) {
		select {
		case c <- struct{}{}:
		default:
		}
	}
	if err := n.buildGossip(func() { poke(changed); poke(news) }); err != nil {
		return err
	}
	g.run("membership", n.membership)
	rec := n.rec.get()
	if rec.Member {
		n.setStage("the domain state is being read")
		n.becomeMember()
		select {
		case <-n.restored:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	up := make(chan mesh.NodeID, 256)
	stopState := n.state.Watch(func(c domain.Change) {
		poke(changed)
		if e := n.elected(); e != nil && c.Parts&domain.Nodes != 0 {
			e.Kick()
		}
		if c.Parts&(domain.Users|domain.Homes) != 0 {
			poke(homes)
		}
		if c.Parts&(domain.Users|domain.Homes|domain.Values|domain.Nodes) != 0 {
			n.notify() // quotas, and who lives here
		}
		if c.Parts&(domain.Nodes|domain.Users|domain.Secrets) != 0 {
			n.pokeSeals()
		}
		n.live.send()
	})
	stopLink := n.link.Watch(func(e link.Event) {
		if e.Up {
			n.queue.PeerUp(e.Peer)
			n.relay.PeerUp(e.Peer)
			n.notices.PeerUp(e.Peer)
			select {
			case up <- e.Peer:
			default: // others will say it too
			}
		}
		n.gossip.SetPeerUp(e.Peer, e.Up)
		poke(changed)
		poke(news)
	})
	g.run("watchers", func(ctx context.Context) error { <-ctx.Done(); stopState(); stopLink(); return nil })
	g.run("witness", n.witness.run)
	g.run("doubts", n.witness.clearDoubts)
	g.run("strangers", func(ctx context.Context) error { return n.meetStrangers(ctx, func() { poke(changed) }) })
	g.run("vet", func(ctx context.Context) error { return n.vet(ctx, up) })
	g.run("detours", func(ctx context.Context) error { return n.detours(ctx, news) })
	g.run("peers", func(ctx context.Context) error { return n.keepPeers(ctx, changed) })
	g.run("mailboxes", func(ctx context.Context) error { return n.homes(ctx, homes) })
	g.run("calls", n.answerCalls)
	g.run("log-ins of others", n.judge)
	g.run("secrets", n.keepSealed)
	g.run("join door", n.keepDoor)
	g.run("relay", func(ctx context.Context) error { return n.serveRelay(ctx, offers.relay) })
	g.run("notices told", n.tellNotices)
	g.run("notices", n.notices.Run)
	g.run("notices heard", func(ctx context.Context) error { return n.serveNotices(ctx, offers.notice) })
	g.run("certificates", n.keepCertificate)
	if !rec.Member && rec.Intent.Target != "" {
		n.setPhase(mesh.Joining)
		n.startJoin(rec.Intent)
	}
	return nil
}

// becomeMember lets the election start; harmless when it has.
func (n *Node) becomeMember() {
	n.mu.Lock()
	defer n.mu.Unlock()
	if !n.member {
		n.member = true
		close(n.startup)
	}
}

// membership takes part in the election, once the node is a member.
func (n *Node) membership(ctx context.Context) error {
	select {
	case <-n.startup:
	case <-ctx.Done():
		return nil
	}
	storage, err := n.env.Election(filepath.Join(n.cfg.Data, "election"))
	if err != nil {
		return fmt.Errorf("open the election's files: %w", err)
	}
	l, err := n.link.Listen(serviceRaft)
	if err != nil {
		return err
	}
	defer l.Close()
	e, err := election.New(election.Config{Self: n.id, TakeBack: time.Duration(n.cfg.TakeBack)}, election.Deps{
		Machine: n.state, Storage: storage, Network: raftNetwork{n, l}, Forward: forwarder{n}, Members: n.voters,
		Trusted: func(id mesh.NodeID) bool { return !n.witness.suspect(id) }, Vetted: n.sound,
		Blank:   func() election.Machine { return domain.NewMachine() },
		Reached: n.reached, Since: n.commandsSince, Now: n.now, Rand: n.env.Random, Logger: n.part("election"),
	})
	if err != nil {
		return err
	}
	stop := e.Watch(func(s election.State) {
		n.refreshView()
		n.logMaster(s)
		n.pokeSeals()
	})
	defer stop()
	n.mu.Lock()
	n.election = e
	n.mu.Unlock()
	n.setPhase(mesh.Serving)
	talk := newGroup(func(error) {})
	defer talk.stop()
	talk.run("version", n.reportVersion)
	talk.run("gossip", func(ctx context.Context) error {
		err := n.gossip.Run(ctx)
		if err != nil {
			n.part("gossip").Error("gossip ended", "err", err)
		}
		return err
	})
	talk.run("restored", func(ctx context.Context) error {
		select {
		case <-e.Ready():
			close(n.restored)
		case <-ctx.Done():
		}
		return nil
	})
	// The goodbye comes after the lead was handed over.
	defer n.farewell()
	return e.Run(ctx)
}

// logMaster writes a line when another node leads, or none.
func (n *Node) logMaster(s election.State) {
	n.mu.Lock()
	same := n.ledBy == s.Master && (s.Master == 0 || n.ledIn == s.Authority.Term)
	n.ledBy, n.ledIn = s.Master, s.Authority.Term
	n.mu.Unlock()
	switch {
	case same:
	case s.Master == 0:
		n.part("election").Warn("no master", "term", s.Authority.Term, "reached", s.Reached, "needs", s.Needs)
	default:
		n.part("election").Info("master", "name", n.nodeName(s.Master), "term", s.Authority.Term, "generation", s.Authority.Generation)
	}
}

// elected returns the election, nil before the node is a member.
func (n *Node) elected() *election.Election {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.election
}

func (n *Node) voters() []election.Member {
	var out []election.Member
	for _, x := range n.state.Members() {
		out = append(out, election.Member{ID: x.ID, Name: x.Name, Voter: x.Voter, Priority: x.Priority})
	}
	return out
}

// commandsSince lists the domain state's journal for the election.
func (n *Node) commandsSince(index uint64) []election.Command {
	entries, _ := n.state.CommandsSince(index)
	out := make([]election.Command, 0, len(entries))
	for _, e := range entries {
		out = append(out, election.Command{Index: e.Index, ID: e.ID, At: e.At.Std(), Actor: e.Actor, Text: e.Text})
	}
	return out
}

func (n *Node) reached(id mesh.NodeID) bool {
	for _, p := range n.link.Peers() {
		if p.ID == id {
			return p.Connected || p.Via != 0
		}
	}
	return id == n.id
}

var noMeshYet = &admin.Error{Kind: admin.Unavailable, Code: "mesh.fresh", Text: "This node belongs to no mesh yet.", Next: "Found one with posthouse init, or join one with posthouse join."}

// proposeAs gives a command to the mesh and returns when it holds here.
func (n *Node) proposeAs(ctx context.Context, actor string, body domain.Body) (domain.Result, error) {
	e := n.elected()
	if e == nil {
		return domain.Result{}, noMeshYet
	}
	c := domain.Command{ID: newID(), Actor: actor, Body: body}
	b, err := e.Propose(ctx, c.Encode())
	if err != nil {
		var r *domain.Refusal
		switch {
		case !failuresAreTold:
			return domain.Result{}, nil
		case errors.As(err, &r):
			return r.Result, refused(err)
		case ctx.Err() != nil:
			return domain.Result{}, context.Cause(ctx)
		}
		return domain.Result{}, &admin.Error{Kind: admin.Unavailable, Code: "mesh.no-master", Text: sentence(err.Error()), Next: "Mail goes on; try the change again when the mesh has a master."}
	}
	r, err := domain.DecodeResult(b)
	if err != nil {
		return r, err
	}
	return r, refused(r.Err())
}

// current returns when this node's copy of the domain state holds all that the
// mesh had decided before the call. The error is a sentence.
func (n *Node) current(ctx context.Context) error {
	e := n.elected()
	if e == nil {
		return noMeshYet
	}
	if err := e.Current(ctx); err != nil {
		return errors.New(sentence(err.Error()))
	}
	return nil
}

// stateAge is how long ago this node's copy of the domain state was last known
// to be current.
func (n *Node) stateAge() time.Duration {
	e := n.elected()
	if e == nil {
		return time.Hour
	}
	at := e.Contact()
	if at.IsZero() {
		return time.Hour
	}
	return time.Since(at)
}

// keepPeers keeps the link's peers as the domain state has them. Nothing waits for
// DNS: it is down where the line is cut.
func (n *Node) keepPeers(ctx context.Context, changed <-chan struct{}) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	known := map[string][]netip.AddrPort{} // what each peer's name meant when it was last found
	found := make(chan map[string][]netip.AddrPort, 1)
	looking := false
	asked := map[string]bool{} // in the last look-up
	var again <-chan time.Time // when names are looked up again; link dials by itself
	last := ""
	for {
		names := n.setPeers(known)
		n.refreshView()
		if key := n.routeKey(); key != last {
			last = key
			n.queue.Reroute()
		}
		if !looking && slices.ContainsFunc(names, func(name string) bool { return !asked[name] }) {
			looking, again = true, nil
			clear(asked)
			for _, name := range names {
				asked[name] = true
			}
			wg.Go(func() { found <- n.lookUp(ctx, names) })
		}
		select {
		case <-changed:
		case f := <-found:
			looking, again = false, time.After(lookUpEvery)
			maps.Copy(known, f)
			maps.DeleteFunc(known, func(name string, _ []netip.AddrPort) bool { return !asked[name] })
		case <-again:
			again = nil
			clear(asked)
		case <-ctx.Done():
			return nil
		}
	}
}

const (
	lookUpEvery = 30 * time.Second
	lookUpTime  = 5 * time.Second
	lookUps     = 32 // at once
)

// routeKey changes when mail may have to go another way.
func (n *Node) routeKey() string {
	var b bytes.Buffer
	v := n.view.Load()
	fmt.Fprintf(&b, "%x %d;", uint64(v.Master), v.Authority.Generation)
	for _, m := range v.Members {
		fmt.Fprintf(&b, "%x %v %v;", uint64(m.ID), m.Gateway, m.State)
	}
	for _, u := range n.state.Users() {
		if u.HomeVersion > 1 {
			fmt.Fprintf(&b, "%x %d;", u.Mailbox[:4], u.HomeVersion)
		}
	}
	return b.String()
}

// setPeers hands the admitted nodes to the link, their names as they are known. It
// returns the names.
func (n *Node) setPeers(known map[string][]netip.AddrPort) (names []string) {
	n.admitting.Lock()
	defer n.admitting.Unlock()
	rec := n.rec.get()
	var peers []link.Peer
	add := func(id mesh.NodeID, key mesh.KeyHash, addrs []string) {
		p := link.Peer{ID: id, Key: key}
		for _, a := range addrs {
			if at, err := netip.ParseAddrPort(a); err == nil {
				p.Addrs = append(p.Addrs, at)
				continue
			}
			p.Addrs = append(p.Addrs, known[a]...)
			names = append(names, a)
		}
		if at, ok := rec.Learned[id]; ok {
			p.Learned = []netip.AddrPort{at}
		}
		peers = append(peers, p)
	}
	nodes := n.state.Nodes() // once: it may grow meanwhile
	among := func(id mesh.NodeID) int {
		return slices.IndexFunc(nodes, func(x *domain.Node) bool { return x.ID == id })
	}
	here := among(n.id)
	if here >= 0 && !nodes[here].Member() {
		n.setAdmitted(nil)
		n.setPhase(mesh.Left)
		n.board.Set(health.Condition{Name: "node.revoked", Severity: health.Problem, Text: "This node was put out of the mesh.", Next: revokedNext})
		return nil
	}
	for _, x := range nodes {
		if peersAreMembers && !x.Member() {
			continue
		}
		add(x.ID, x.Key, x.Addresses)
	}
	if here < 0 { // the copy grows command by command: those that the join told of come in later
		for _, p := range rec.Peers {
			if among(p.ID) < 0 {
				add(p.ID, p.Key, p.Addresses)
			}
		}
	}
	n.strangersLetIn(add)
	n.setAdmitted(peers)
	return names
}

// setAdmitted tells link and gossip who belongs to the mesh.
func (n *Node) setAdmitted(peers []link.Peer) {
	n.link.SetPeers(n.id, peers)
	ids := make([]mesh.NodeID, len(peers))
	for i, p := range peers {
		ids[i] = p.ID
	}
	n.gossip.SetAdmitted(ids)
}

// lookUp asks for what names, as host:port, mean now, all at once. Those that are
// not found are left out.
func (n *Node) lookUp(ctx context.Context, names []string) map[string][]netip.AddrPort {
	ctx, cancel := context.WithTimeout(ctx, lookUpTime)
	defer cancel()
	var mu sync.Mutex
	out := map[string][]netip.AddrPort{}
	var wg sync.WaitGroup
	slots := make(chan struct{}, lookUps)
	for _, name := range names {
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			host, port, err := net.SplitHostPort(name)
			if err != nil {
				return
			}
			p, err := strconv.ParseUint(port, 10, 16)
			if err != nil {
				return
			}
			found, err := n.env.Resolver.LookupNetIP(ctx, "ip", host)
			if err != nil || len(found) == 0 {
				return
			}
			var at []netip.AddrPort
			for _, a := range found {
				at = append(at, netip.AddrPortFrom(a.Unmap(), uint16(p)))
			}
			mu.Lock()
			defer mu.Unlock()
			out[name] = at
		})
	}
	wg.Wait()
	return out
}

// refreshView publishes how this node sees the mesh.
func (n *Node) refreshView() {
	n.viewing.Lock() // or an older picture could replace a newer one
	defer n.viewing.Unlock()
	v := &mesh.View{Self: n.id}
	var es election.State
	if e := n.elected(); e != nil {
		es = e.State()
		v.Master, v.Authority = es.Master, es.Authority
	}
	linked := map[mesh.NodeID]link.PeerInfo{}
	for _, p := range n.link.Peers() {
		linked[p.ID] = p
	}
	old, said := n.view.Load(), n.heard()
	for _, x := range n.state.Members() {
		m := mesh.Member{ID: x.ID, Name: x.Name, Host: x.Host, Gateway: x.Gateway, Version: x.Version, Role: mesh.RoleMember}
		g := said[x.ID]
		if g.Tags.Version != "" {
			m.Version = g.Tags.Version
		}
		switch p := linked[x.ID]; {
		case x.ID == n.id:
			m.State, m.Version = *n.phase.Load(), n.version
		case p.Connected:
			m.State, m.RTT = saidState(g), p.RTT
		case g.Status == gossip.Left:
			m.State = mesh.Left
		case g.Status == gossip.Alive && p.Via != 0:
			m.State = saidState(g)
			m.RTT, _ = n.gossip.RTT(x.ID)
		default:
			m.State = mesh.Unreachable
		}
		switch {
		case x.ID == es.Master:
			m.Role = mesh.RoleMaster
		case slices.Contains(es.Voters, x.ID):
			m.Role = mesh.RoleVoter
		}
		m.Since = time.Now().UTC()
		if was, ok := old.Member(x.ID); ok && was.State == m.State {
			m.Since = was.Since
		}
		v.Members = append(v.Members, m)
	}
	n.view.Store(v)
	n.live.send()
}

// saidState is how a node that can be reached describes itself.
func saidState(g gossip.Member) mesh.State {
	if g.Status == gossip.Alive && g.Tags.State == mesh.Draining {
		return mesh.Draining
	}
	return mesh.Serving
}

// reportVersion tells the mesh which version runs here, and where, once it can.
func (n *Node) reportVersion(ctx context.Context) error {
	actor, addrs := "posthouse on "+n.cfg.Name, n.addresses()
	for {
		if x, ok := n.state.Node(n.id); ok {
			var err error
			if x.Version != n.version || x.Level != domain.Level {
				_, err = n.proposeAs(ctx, actor, &domain.ReportVersion{Node: n.id, Version: n.version, Level: domain.Level})
			}
			if err == nil && len(addrs) > 0 && !slices.Equal(x.Addresses, addrs) {
				_, err = n.proposeAs(ctx, actor, &domain.UpdateNode{Node: n.id, Addresses: &addrs})
			}
			if err == nil {
				return nil
			}
		}
		select {
		case <-time.After(5 * time.Second):
		case <-ctx.Done():
			return nil
		}
	}
}

// keepCertificate gets and renews what clients see.
func (n *Node) keepCertificate(ctx context.Context) error {
	if !n.untilFounded(ctx) {
		return nil
	}
	ask := func(ctx context.Context, csr []byte) ([]byte, error) {
		err := errors.New("no node that may lead the mesh can be reached")
		for _, m := range n.view.Load().Members {
			if x, ok := n.state.Node(m.ID); m.ID == n.id || m.State != mesh.Serving || !ok || !x.Candidate() {
				continue
			}
			var chain []byte
			if chain, err = n.ask(ctx, m.ID, call{What: callSign, Body: csr}); err == nil {
				return chain, nil
			}
		}
		return nil, err
	}
	for {
		wait := time.Hour
		if err := n.certs.renew(ctx, ask); err != nil {
			wait = 3 * time.Second
			n.board.Set(health.Condition{Name: "tls.certificate", Severity: health.Warning, Text: sentence("mail clients see no certificate of the mesh at this office yet: " + err.Error()), Next: "It is signed as soon as a node that may lead the mesh can be reached; a host name outside the mail domain needs tls.certificate in the configuration."})
		} else {
			n.board.Clear("tls.certificate", "")
		}
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return nil
		}
	}
}
