package appliance

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"

	"posthouse/appliance/admin"
	"posthouse/appliance/health"
	"posthouse/appliance/joining"
	"posthouse/mesh"
	"posthouse/mesh/domain"
	"posthouse/mesh/identity"
)

// addresses are where other nodes reach this one, as far as it knows itself.
func (n *Node) addresses() []string {
	if len(n.cfg.Advertise) > 0 {
		return n.cfg.Advertise
	}
	if a, err := netip.ParseAddrPort(n.cfg.Listen.Mesh); err == nil && !a.Addr().IsUnspecified() {
		return []string{a.String()}
	}
	return nil
}

// Init implements admin.Operations: this node founds a mesh.
func (n *Node) Init(ctx context.Context, r admin.InitRequest) (admin.InitResult, error) {
	if err := n.started(); err != nil {
		return admin.InitResult{}, err
	}
	if phase := *n.phase.Load(); phase != mesh.Fresh {
		return admin.InitResult{}, admin.Errorf(admin.Conflict, "mesh.member", "This node is %s: it can found a mesh only while it belongs to none.", phase)
	}
	if r.AdminName == "" {
		r.AdminName = "admin"
	}
	address := r.AdminName + "@" + r.Domain
	if _, err := mesh.ParseAddress(address); err != nil || !strings.Contains(r.Domain, ".") {
		return admin.InitResult{}, admin.Errorf(admin.Usage, "mesh.domain", "%q does not make an address: want a domain such as company.com and a name such as admin.", address)
	}
	verifier, err := n.verifier(r.AdminPassword)
	if err != nil {
		return admin.InitResult{}, err
	}
	var networks []netip.Prefix
	for _, s := range r.Networks {
		p, err := netip.ParsePrefix(s)
		if err != nil {
			return admin.InitResult{}, admin.Errorf(admin.Usage, "mesh.network", "%q is not a network such as 10.0.0.0/8.", s)
		}
		networks = append(networks, p)
	}
	certificate, secret, err := n.certs.found(r.Domain, networks)
	if err != nil {
		return admin.InitResult{}, err
	}
	n.becomeMember()
	e := n.elected()
	for e == nil {
		changed := n.live.wait()
		if e = n.elected(); e != nil {
			break
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return admin.InitResult{}, context.Cause(ctx)
		}
	}
	lineage, err := e.Bootstrap(ctx)
	if err != nil {
		return admin.InitResult{}, err
	}
	ring, to, user := n.keyring(), n.key.SealKey(), newID()
	key, err := domain.NewCandidateKey(ring, to)
	if err != nil {
		return admin.InitResult{}, err
	}
	password, err := domain.SealVerifier(ring, user, verifier, n.id, to, key)
	if err != nil {
		return admin.InitResult{}, err
	}
	authority, err := domain.SealAuthority(ring, certificate, secret, key)
	if err != nil {
		return admin.InitResult{}, err
	}
	found := &domain.Found{
		Lineage:  lineage.ID,
		Node:     domain.AdmitNode{ID: n.id, Name: n.cfg.Name, Host: n.cfg.Host, Key: n.key.Hash(), Addresses: n.addresses(), Voter: true, Gateway: true, Priority: 100, Version: n.version, Level: domain.Level, Seal: to},
		Domain:   domain.Domain{ID: newID(), Name: r.Domain},
		Admin:    domain.User{ID: user, Mailbox: mesh.MailboxID(newID()), Address: address, Name: "Admin", Home: n.id, Verifier: password, Role: domain.RoleMeshAdmin},
		MeshName: r.Domain, Key: *key, Authority: authority,
	}
	if _, err := n.propose(ctx, found); err != nil {
		return admin.InitResult{}, err
	}
	if err := n.rec.change(func(r2 *record) { r2.Member, r2.Domain = true, r.Domain }); err != nil {
		return admin.InitResult{}, err
	}
	if r.Postmaster != "" {
		if u, ok := n.state.Login(r.Postmaster); ok {
			if _, err := n.propose(ctx, &domain.SetSettings{Postmaster: &u.ID}); err != nil {
				return admin.InitResult{}, err
			}
		}
	}
	// The mesh is founded whatever becomes of the certificate: a condition says
	// what clients will not like, such as a host name outside the domain.
	if err := n.certs.renew(ctx, noneToAsk); err != nil {
		n.log.Warn("certificate for clients", "err", err)
	}
	n.log.Info("mesh founded", "domain", r.Domain)
	return admin.InitResult{Node: n.cfg.Name, Domain: r.Domain, Admin: address, CA: string(n.certs.ca())}, nil
}

// noneToAsk is for the first node, which signs for itself.
func noneToAsk(context.Context, []byte) ([]byte, error) {
	return nil, errors.New("there is no other node yet")
}

// Join implements admin.Operations: it writes the intent and lets the loop run.
func (n *Node) Join(_ context.Context, r admin.JoinRequest) error {
	if err := n.started(); err != nil {
		return err
	}
	phase := *n.phase.Load()
	if phase != mesh.Fresh && phase != mesh.Joining {
		return admin.Errorf(admin.Conflict, "mesh.member", "This node is %s: it belongs to a mesh already.", phase)
	}
	in := joining.Intent{Target: strings.TrimSpace(r.Target), At: r.At, Admin: r.Admin, Password: r.Password, Member: r.Member}
	if in.Target == "" {
		return admin.Errorf(admin.Usage, "join.target", "Say which mesh: a name such as mail.company.com, or a token.")
	}
	if strings.HasPrefix(strings.ToUpper(in.Target), "PH1") {
		if _, err := identity.ParseToken(in.Target); err != nil {
			return &admin.Error{Kind: admin.Usage, Code: "join.token", Text: sentence(err.Error()), Next: "Ask an admin for a new token: posthouse mesh token create."}
		}
	}
	kept := in
	kept.Password = ""
	if in.Admin != "" {
		kept = joining.Intent{} // without the password it could not go on after a restart
	}
	if err := n.rec.change(func(rec *record) { rec.Intent = kept }); err != nil {
		return err
	}
	n.setPhase(mesh.Joining)
	n.startJoin(in)
	return nil
}

// startJoin runs the join loop for an intent, instead of an earlier one.
func (n *Node) startJoin(in joining.Intent) {
	ctx, cancel := context.WithCancel(context.Background())
	n.mu.Lock()
	if n.joinStop != nil {
		n.joinStop()
	}
	n.joinStop = cancel
	n.progress = nil
	n.mu.Unlock()
	n.meshes.run("join", func(g context.Context) error {
		stop := context.AfterFunc(g, cancel)
		defer stop()
		defer cancel()
		n.join(ctx, in)
		return nil
	})
}

func (n *Node) join(ctx context.Context, in joining.Intent) {
	j := &joining.Joiner{
		Key: n.key,
		Self: func() joining.Request {
			return joining.Request{Node: n.id, Name: n.cfg.Name, Host: n.cfg.Host, Addresses: n.addresses(), Software: n.version, Level: domain.Level, Seal: n.key.SealKey(), Plain: in.Member}
		},
		Now: n.now,
		SRV: n.lookUpSRV, Host: n.env.Resolver.LookupHost, Dial: n.dialDoor,
		Progress: func(line string) { n.joinLine(line) },
		Failed: func(f *joining.Failure) {
			n.joinLine(f.Code + ": " + f.Error())
			n.board.Set(health.Condition{Name: f.Code, About: "join", Severity: health.Problem, Text: "This node is not in the mesh yet: " + f.Text, Next: f.Next})
			for _, c := range n.board.Conditions() {
				if c.About == "join" && c.Name != f.Code {
					n.board.Clear(c.Name, c.About)
				}
			}
		},
		Remember: func(name string, addrs []string) {
			n.rec.change(func(r *record) { r.Doors = map[string][]string{name: addrs} })
		},
		Recall: func(name string) []string { return n.rec.get().Doors[name] },
	}
	a, err := j.Run(ctx, in)
	if err != nil {
		return
	}
	err = n.rec.change(func(r *record) {
		r.Member, r.Node, r.Intent, r.Peers, r.Domain = true, a.Node, joining.Intent{}, a.Peers, a.Domain
	})
	if err == nil && len(a.CA) > 0 {
		err = n.env.Files.Write(n.certs.path("ca.pem"), a.CA, 0o644)
	}
	if err != nil {
		n.joinLine("join.disk: " + sentence(err.Error()))
		return
	}
	for _, c := range n.board.Conditions() {
		if c.About == "join" {
			n.board.Clear(c.Name, c.About)
		}
	}
	if a.Node != n.id {
		// Its key was admitted before, and its record was lost since.
		n.meshes.fail(fmt.Errorf("the mesh knows this node's key as node %s: it has to start again as that", a.Node))
		return
	}
	n.setPeers(nil)
	n.becomeMember()
}

// joinLine adds a line to what command, log and page show of a join; the same
// line is not said twice.
func (n *Node) joinLine(line string) {
	n.mu.Lock()
	seen := slices.Contains(n.progress, line)
	if !seen {
		n.progress = append(n.progress, line)
		if len(n.progress) > 50 {
			n.progress = n.progress[1:]
		}
	}
	n.mu.Unlock()
	if !seen {
		n.part("join").Info(line)
		n.live.send()
	}
}

func (n *Node) lookUpSRV(ctx context.Context, name string) ([]string, error) {
	_, srvs, err := n.env.Resolver.LookupSRV(ctx, "posthouse", "udp", name)
	if err != nil {
		return nil, err
	}
	var out []string
	for _, s := range srvs {
		out = append(out, net.JoinHostPort(strings.TrimSuffix(s.Target, "."), fmt.Sprint(s.Port)))
	}
	return out, nil
}

func (n *Node) dialDoor(ctx context.Context, addr string, expect func(mesh.KeyHash) error) (*joining.Session, error) {
	a, err := netip.ParseAddrPort(addr)
	if err != nil {
		return nil, fmt.Errorf("address %q: %w", addr, err)
	}
	c, err := n.link.DialJoin(ctx, a, expect)
	if err != nil {
		return nil, err
	}
	return &joining.Session{Conn: c, Deadline: c.SetDeadline, Peer: c.Key, Exporter: c.Exporter}, nil
}

// untilFounded waits until the node has started and belongs to a mesh; false when
// ctx ends before.
func (n *Node) untilFounded(ctx context.Context) bool {
	select {
	case <-n.startup:
	case <-ctx.Done():
		return false
	}
	for {
		changed := n.live.wait()
		if n.state.Founded() {
			return true
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return false
		}
	}
}

// keepDoor lets other nodes in while this one is a member.
func (n *Node) keepDoor(ctx context.Context) error {
	if !n.untilFounded(ctx) {
		return nil
	}
	l, err := n.link.ListenJoin()
	if err != nil {
		return err
	}
	defer l.Close()
	decoy := newID()
	d := &joining.Door{Key: n.key, Name: n.cfg.Name, Software: n.version, Now: n.now, Decoy: decoy[:],
		Current: n.current,
		Token: func(public []byte) (mesh.ID, bool) {
			for _, t := range n.state.Tokens() {
				if string(t.Public) == string(public) {
					return t.ID, true
				}
			}
			return mesh.ID{}, false
		},
		Admin: func(name string) string {
			if u, ok := n.state.Login(name); ok && u.Role == domain.RoleMeshAdmin && !u.Disabled {
				if v, err := n.state.Verifier(u); err == nil {
					return v
				}
			}
			return ""
		},
		Judges: n.judges,
		Fail:   func(string) time.Duration { return 2 * time.Second },
		Admit:  n.admit, Welcome: n.welcome,
	}
	g := newGroup(func(error) {})
	defer g.stop()
	for {
		c, err := l.Accept(ctx)
		if err != nil {
			return nil // the link or this node stops
		}
		g.run("joining", func(ctx context.Context) error {
			s := &joining.Session{Conn: c, Deadline: c.SetDeadline, Peer: c.Key, Exporter: c.Exporter}
			if err := d.Serve(ctx, s, c.Addr); err != nil {
				n.part("join").Info("a node did not finish joining", "from", c.Addr.String(), "err", err)
			}
			return nil
		})
	}
}

// judges says where an admin's password can be checked, when that is not here.
func (n *Node) judges() string {
	if n.state.Holds() {
		return ""
	}
	var hosts []string
	for _, x := range n.state.Members() {
		if x.Candidate() {
			hosts = append(hosts, x.Host)
		}
	}
	return strings.Join(hosts, " or ")
}

// admit proposes what a joining node asks for.
func (n *Node) admit(ctx context.Context, key mesh.KeyHash, q *joining.Request, from netip.AddrPort, token mesh.ID, actor string) joining.Verdict {
	addrs := q.Addresses
	if len(addrs) == 0 {
		addrs = []string{from.String()}
	}
	admission := &domain.AdmitNode{ID: q.Node, Name: q.Name, Host: q.Host, Key: key, Addresses: addrs, Voter: !q.Plain, Version: q.Software, Level: q.Level, Token: token, Seal: q.Seal}
	if token.IsZero() && actor == "" {
		return n.apply(ctx, key, q, addrs)
	}
	if actor == "" {
		actor = "join token of " + n.cfg.Name
	}
	r, err := n.proposeAs(ctx, actor, admission)
	return verdict(r, err)
}

func verdict(r domain.Result, err error) joining.Verdict {
	var e *admin.Error
	switch {
	case err == nil:
		return joining.Verdict{Code: "admitted", Node: r.Node}
	case errors.As(err, &e) && e.Kind == admin.Unavailable:
		return joining.Verdict{Code: "join.no-master", Text: e.Text}
	}
	v := joining.Verdict{Code: "join.refused", Text: sentence(err.Error())}
	switch r.Code {
	case domain.TokenUnknown, domain.TokenExpired, domain.TokenUsed, domain.TokenRevoked:
		v.Code = "join.token"
	case domain.NameTaken:
		v.Code = "join.name-taken"
	}
	return v
}

// apply is the door without a token: an application that an admin decides.
func (n *Node) apply(ctx context.Context, key mesh.KeyHash, q *joining.Request, addrs []string) joining.Verdict {
	if x, ok := n.state.NodeByKey(key); ok {
		return joining.Verdict{Code: "admitted", Node: x.ID}
	}
	for _, p := range n.state.Applications() {
		if p.Key != key {
			continue
		}
		switch p.StateAt(domain.TimeOf(n.now())) {
		case domain.PendingOpen:
			return joining.Verdict{Code: "join.pending", Text: "The node waits for an admin's approval; its code is " + p.Code + "."}
		case domain.PendingRefused:
			return joining.Verdict{Code: "join.refused", Text: "An admin has turned this node away."}
		}
	}
	code := identity.ComparisonCode(key, n.key.Hash())
	r, err := n.proposeAs(ctx, "posthouse on "+n.cfg.Name, &domain.AskAdmission{ID: newID(), Node: q.Node, Key: key, Name: q.Name, Host: q.Host, Addresses: addrs, Code: code, Seal: q.Seal, Plain: q.Plain})
	if err != nil {
		return verdict(r, err)
	}
	return joining.Verdict{Code: "join.pending", Text: "The node waits for an admin's approval; its code is " + code + "."}
}

// welcome tells an admitted node what it needs until it has the domain state.
func (n *Node) welcome(a *joining.Answer) {
	for _, x := range n.state.Members() {
		a.Peers = append(a.Peers, joining.Peer{ID: x.ID, Key: x.Key, Name: x.Name, Addresses: x.Addresses})
	}
	a.Users, _ = n.state.UserCount(0)
	a.CA = n.certs.ca()
	if ds := n.state.LocalDomains(); len(ds) > 0 {
		a.Domain = ds[0].Name
	}
}
