package appliance

import (
	"cmp"
	"context"
	"errors"
	"io"
	"net/netip"
	"time"

	"posthouse/appliance/login"
	"posthouse/mesh"
	"posthouse/mesh/domain"
	"posthouse/transport"
	"posthouse/transport/intake"
	"posthouse/transport/queue"
	"posthouse/transport/route"
	"posthouse/transport/smtpd"

	"posthouse/mailstore/log"
	"posthouse/mailstore/mime"
)

// directory answers what the engines ask about people and addresses, from this
// node's copy of the domain state. It is the only place where the types of
// mesh/domain and of the mail engines meet.
type directory struct {
	state *domain.Machine
	node  func() mesh.NodeID
	view  func() *mesh.View
	// age is how long ago this copy was last known to be current.
	age   func() time.Duration
	check *login.Checker
	// full reports whether a mailbox's home says that it is over its quota.
	full func(home mesh.NodeID, m mesh.MailboxID) bool
	// ask has a home judge a password that cannot be judged here.
	ask func(ctx context.Context, home mesh.NodeID, q login.Question) (login.Verdict, error)
}

// Resolve implements route.Directory.
func (d *directory) Resolve(a mesh.Address) route.Resolution {
	r := d.state.Resolve(a)
	out := route.Resolution{Expanded: r.Expanded, Owner: r.Owner, Closed: r.MembersOnly}
	switch r.Kind {
	case domain.Outside:
		out.Kind = route.Outside
	case domain.TooMany:
		out.Kind, out.TooMany = route.Found, true
	case domain.Inside:
		out.Kind = route.Found
		for _, x := range r.Recipients {
			out.Targets = append(out.Targets, route.Target{Mailbox: x.Mailbox, Address: x.Address, Home: x.Home, Version: x.HomeVersion, Detail: r.Detail,
				Full: !x.Mailbox.IsZero() && d.full(x.Home, x.Mailbox)})
		}
	}
	return out
}

// Home implements route.Directory.
func (d *directory) Home(m mesh.MailboxID) (mesh.NodeID, uint64, bool) { return d.state.Home(m) }

// routing is what a decision stands on now.
func (d *directory) routing() route.State {
	return route.State{View: d.view(), Directory: d, Age: d.age()}
}

// noMesh is the fault of every mail while the node belongs to no mesh.
var noMesh = transport.Faultf(451, "4.3.2", "This node belongs to no mesh yet, try again later")

// recipients implements smtpd.Recipients.
type recipients struct{ *directory }

func (d recipients) Check(_ context.Context, s *smtpd.Session, r smtpd.Rcpt) error {
	if !d.state.Founded() {
		return noMesh
	}
	env := &transport.Envelope{Origin: s.Origin, From: fromOf(s)}
	if s.Login != nil {
		env.Login = s.Login.Address
	}
	if f := d.routing().Check(env, route.Rcpt{Address: r.Address, Notify: r.Notify, ORcpt: r.ORcpt}); f != nil {
		return f
	}
	return nil
}

func fromOf(s *smtpd.Session) string {
	if s.From == (mesh.Address{}) {
		return ""
	}
	return s.From.String()
}

// senders implements smtpd.Senders: MAIL.md, Submission and device rules.
type senders struct{ *directory }

func (d senders) Check(_ context.Context, s *smtpd.Session, from mesh.Address, _ smtpd.MailParams) (transport.Origin, error) {
	if !d.state.Founded() {
		return 0, noMesh
	}
	if s.Login != nil {
		if from != (mesh.Address{}) && !d.state.MaySend(s.Login.User, from) {
			return 0, transport.Faultf(553, "5.7.1", "You may not send as <%s>", from)
		}
		return transport.OriginSubmission, nil
	}
	for _, r := range d.state.Rules(d.node()) {
		p, err := netip.ParsePrefix(r.CIDR)
		if err != nil || !p.Contains(s.Remote) {
			continue
		}
		for _, a := range r.Senders {
			if b, err := mesh.ParseAddress(a); err == nil && b.Key() == from.Key() {
				return transport.OriginDevice, nil
			}
		}
	}
	return transport.OriginOutside, nil
}

// errLogin is the answer to every wrong name or password.
var errLogin = transport.Faultf(535, "5.7.8", "The user name or the password is wrong")

// errHome is the answer while nobody can be asked whether a password is right.
var errHome = transport.Faultf(454, "4.7.0", "Your office, which checks your password, cannot be reached now, try again later")

// credential names a user's password of now. Its print is the box for the home:
// every node has it, and no two are equal.
func credential(u *domain.User) login.Credential {
	return login.Credential{User: u.ID, Version: u.CredVersion, Print: u.Verifier.Home}
}

// logIn checks a name and password against the domain state; where this node
// cannot open the verifier, by asking the user's home. The error of a wrong one
// is errLogin, after the same time whether or not the user exists; errHome when
// nobody can say. from is the client's address, for the home's delays.
func (d *directory) logIn(ctx context.Context, name, password string, from netip.Addr) (*domain.User, error) {
	u, ok := d.state.Login(name)
	if !ok || u.Disabled || u.Verifier == nil {
		return nil, d.logInNobody(ctx, name, password, from)
	}
	c := credential(u)
	if d.check.Known(c, password) {
		return u, nil
	}
	verifier, err := d.state.Verifier(u)
	var right bool
	switch {
	case err == nil:
		right, err = d.check.Check(ctx, c, verifier, password)
	case errors.Is(err, domain.ErrSealed):
		if right, err = d.askHome(ctx, u.Home, login.About(c, password, from)); right {
			d.check.Remember(c, password)
		}
	}
	if err != nil {
		return nil, err
	}
	if !right {
		return nil, errLogin
	}
	return u, nil
}

// logInNobody refuses a name that nobody has, by the way and in the time that it
// takes for one that somebody has: where this node judges all, here; else its
// own people would be told from all others by who is asked, so a home is chosen
// by the name.
func (d *directory) logInNobody(ctx context.Context, name, password string, from netip.Addr) error {
	id, n := d.check.StandIn(name)
	all := d.state.Members()
	if asksForNobody && !d.state.Holds() && len(all) > 0 {
		if home := all[n%uint64(len(all))].ID; home != d.node() {
			_, err := d.askHome(ctx, home, login.AboutNobody(id, password, from))
			return cmp.Or(err, error(errLogin))
		}
	}
	_, err := d.check.Check(ctx, login.Credential{}, "", password)
	return cmp.Or(err, error(errLogin))
}

func (d *directory) askHome(ctx context.Context, home mesh.NodeID, q login.Question) (bool, error) {
	v, err := d.ask(ctx, home, q)
	switch {
	case err != nil:
		return false, &transport.Fault{Code: errHome.Code, Enhanced: errHome.Enhanced, Text: errHome.Text, Cause: err}
	case v == login.Right:
		return true, nil
	case v == login.Wrong:
		return false, nil
	}
	return false, errHome
}

// authenticator implements smtpd.Authenticator.
type authenticator struct{ *directory }

func (d authenticator) Authenticate(ctx context.Context, user, password string, from netip.Addr) (smtpd.Login, error) {
	u, err := d.logIn(ctx, user, password, from)
	if err != nil {
		return smtpd.Login{}, err
	}
	return smtpd.Login{User: u.ID, Address: u.Address}, nil
}

// mayWrite reports whether the user who logged in may write as a.
func (d *directory) mayWrite(user string, a mesh.Address) bool {
	u, ok := d.state.Login(user)
	return ok && d.state.MaySend(u.ID, a)
}

// custody implements intake.Router on route and queue.
type custody struct {
	*directory
	queue *queue.Queue
}

func (c custody) Route(env *transport.Envelope, rcpts []intake.Rcpt) (intake.Plan, *transport.Fault) {
	in := make([]route.Rcpt, len(rcpts))
	for i, r := range rcpts {
		in[i] = route.Rcpt{Address: r.Address, Notify: r.Notify, ORcpt: r.ORcpt}
	}
	routes := c.queue.Routes()
	d := c.routing().Decide(env, in)
	for _, f := range d.Faults {
		// A recipient that was fine at RCPT is not any more. Nothing is taken,
		// so that the sender's server reports it.
		if f != nil {
			return nil, f
		}
	}
	return plan{c.queue, d, routes}, nil
}

// plan implements intake.Plan.
type plan struct {
	queue  *queue.Queue
	d      route.Decision
	routes uint64 // queue.Message.Routes
}

func (p plan) Take(ctx context.Context, env *transport.Envelope, draft *log.Draft, s *mime.Structure) (string, error) {
	m := &queue.Message{Envelope: *env, Body: draft, Structure: s, Routes: p.routes}
	for _, n := range p.d.Notices {
		m.Expanded = append(m.Expanded, queue.Expanded{List: n.List, Rcpt: transport.Recipient{Address: n.Rcpt.Address.String(), Notify: n.Rcpt.Notify, ORcpt: n.Rcpt.ORcpt}})
	}
	id, err := p.queue.Accept(ctx, m, legsOf(p.d))
	if err != nil {
		return "", err
	}
	return id.String(), nil
}

func legsOf(d route.Decision) []queue.Leg {
	legs := make([]queue.Leg, len(d.Legs))
	for i, l := range d.Legs {
		legs[i] = queue.Leg{Dest: l.Dest, Rcpts: l.Rcpts}
	}
	return legs
}

// resolveReport routes a report to an address for the queue.
func (d *directory) resolveReport(env *transport.Envelope, address string) []queue.Leg {
	a, err := mesh.ParseAddress(address)
	if err != nil {
		return nil
	}
	return legsOf(d.routing().Decide(env, []route.Rcpt{{Address: a, Notify: transport.NotifyNever}}))
}

// next says where a waiting recipient goes by the state and view of now.
func (d *directory) next(r *transport.Recipient) (dest transport.Destination, gone bool) {
	dest, known := d.routing().Next(r)
	return dest, !known && d.age() < route.CurrentFor
}

// smtpIntake implements smtpd.Intake.
type smtpIntake struct{ in *intake.Intake }

func (s smtpIntake) Accept(ctx context.Context, env *transport.Envelope, rcpts []smtpd.Rcpt, body io.Reader) (string, error) {
	out := make([]intake.Rcpt, len(rcpts))
	for i, r := range rcpts {
		out[i] = intake.Rcpt{Address: r.Address, Notify: r.Notify, ORcpt: r.ORcpt}
	}
	return s.in.Accept(ctx, env, out, body)
}

var errNotHome = errors.New("the mailbox lives at another office")
