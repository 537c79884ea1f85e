package appliance

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"

	"posthouse/appliance/admin"
	"posthouse/appliance/config"
	"posthouse/mailstore"
	"posthouse/mailstore/delivery"
	"posthouse/mailstore/imapd"
	"posthouse/mesh"
	"posthouse/mesh/domain"
	"posthouse/transport"
	"posthouse/transport/archive"
	"posthouse/transport/filter"
	"posthouse/transport/intake"
	"posthouse/transport/smtpd"
	"posthouse/transport/smtpout"
)

// openDoors opens the ports for mail. drain refuses new sessions and lets those
// in hand finish; call it before the group is stopped.
func (n *Node) openDoors(g *group) (drain func(), err error) {
	var trusted []netip.Prefix
	for _, t := range n.cfg.Trusted {
		trusted = append(trusted, netip.MustParsePrefix(t)) // Validate has seen it
	}
	chain := filter.New(n.part("filter"))
	in := intake.New(intake.Deps{
		Now: n.now, Node: n.id, Host: func() string { return n.cfg.Host }, NewDraft: n.journal.NewDraft, Admit: n.journal.Admit,
		Router: custody{n.dir, n.queue}, MaySend: n.dir.mayWrite, Random: n.env.Random, Archive: archive.Nothing{},
		Filter: func(ctx context.Context, env *transport.Envelope, rcpts []intake.Rcpt, body transport.Body) ([]string, *transport.Fault) {
			m := &filter.Mail{Envelope: env, Body: body}
			for _, r := range rcpts {
				m.Recipients = append(m.Recipients, r.Address.String())
			}
			return chain.Run(ctx, m)
		},
	})
	mailTLS := n.certs.config()
	smtp, err := smtpd.New(smtpd.Config{Hostname: n.cfg.Host, Trusted: trusted}, smtpd.Deps{
		Recipients: recipients{n.dir}, Senders: senders{n.dir}, Authenticator: authenticator{n.dir}, Failures: &n.failures, Intake: smtpIntake{in},
		TLS: func() *tls.Config { return mailTLS }, MaxSize: n.maxMessage, Reverse: n.reverse, Logger: n.part("smtpd"), Rand: n.env.Random,
	})
	if err != nil {
		return func() {}, err
	}
	imap := imapd.New(imapd.Config{}, imapd.Deps{
		Login: n.imapLogin, Failures: &n.failures, Mailbox: n.store.Mailbox, NewDraft: n.journal.NewDraft, Admit: n.journal.Admit, MaxMessage: n.maxMessage, TLS: mailTLS, Log: n.part("imapd"),
	})
	g.run("sessions", func(ctx context.Context) error { return n.endSessions(ctx, imap.EndUser) })
	n.mu.Lock()
	n.cutSessions = func() {
		for _, u := range n.state.Users() {
			if u.Home == n.id {
				imap.EndUser(u.ID.String(), "the mailboxes were renewed")
			}
		}
	}
	n.mu.Unlock()
	drain = func() {
		ctx, cancel := context.WithTimeout(context.Background(), drainLimit)
		defer cancel()
		done := make(chan struct{})
		go func() { imap.Drain(ctx); close(done) }()
		if err := smtp.Drain(ctx); err != nil {
			n.log.Warn("some SMTP transactions were cut off", "err", err)
		}
		<-done
	}
	serve := func(what, address string, f func(context.Context, net.Listener) error) error {
		if address == config.Off {
			return nil
		}
		l, err := n.env.Listen(g.ctx, "tcp", address)
		if err != nil {
			return err
		}
		g.run(what, func(ctx context.Context) error {
			if err := f(ctx, l); err != nil && !errors.Is(err, smtpd.ErrDraining) {
				return err
			}
			return nil
		})
		return nil
	}
	mail := func(p smtpd.Port) func(context.Context, net.Listener) error {
		return func(ctx context.Context, l net.Listener) error { return smtp.Serve(ctx, l, p) }
	}
	for _, d := range []struct {
		what, address string
		f             func(context.Context, net.Listener) error
	}{
		{"SMTP port", n.cfg.Listen.SMTP, mail(smtpd.PortMX)},
		{"submission port", n.cfg.Listen.Submission, mail(smtpd.PortSubmission)},
		{"submissions port", n.cfg.Listen.Submissions, mail(smtpd.PortSubmissions)},
		{"IMAP port", n.cfg.Listen.IMAP, func(ctx context.Context, l net.Listener) error { return imap.Serve(ctx, l, false) }},
		{"IMAPS port", n.cfg.Listen.IMAPS, func(ctx context.Context, l net.Listener) error { return imap.Serve(ctx, l, true) }},
	} {
		if err := serve(d.what, d.address, d.f); err != nil {
			return drain, errors.Join(errors.New("open the "+d.what), err)
		}
	}
	return drain, nil
}

func (n *Node) maxMessage() int64 {
	if m := n.state.Settings().MaxMessage; m > 0 {
		return m
	}
	return domain.DefaultMaxMessage
}

// reverse is the verified name of an address: a PTR name whose addresses
// include it again (RFC 8601 section 2.7.3, "iprev").
func (n *Node) reverse(ctx context.Context, a netip.Addr) string {
	names, err := n.env.Resolver.LookupAddr(ctx, a.String())
	if err != nil {
		return ""
	}
	for _, name := range names[:min(len(names), 3)] {
		back, err := n.env.Resolver.LookupHost(ctx, name)
		if err == nil && slices.Contains(back, a.String()) {
			return strings.TrimSuffix(name, ".")
		}
	}
	return ""
}

// imapLogin lets a user into the mailbox that lives here.
func (n *Node) imapLogin(ctx context.Context, user, password string, from netip.Addr) (imapd.Account, error) {
	u, err := n.dir.logIn(ctx, user, password, from)
	if errors.Is(err, errLogin) {
		return imapd.Account{}, imapd.ErrCredentials
	}
	if err != nil {
		return imapd.Account{}, err
	}
	here, err := n.home(ctx, u.Mailbox)
	if err != nil {
		return imapd.Account{}, err
	}
	if !here {
		return imapd.Account{}, errNotHome
	}
	return imapd.Account{User: u.ID.String(), Mailbox: u.Mailbox}, nil
}

// endSessions ends the IMAP connections of users whose password changed, who
// were locked out or removed, or whose mailbox went elsewhere.
func (n *Node) endSessions(ctx context.Context, end func(user, reason string)) error {
	changed := make(chan struct{}, 1)
	stop := n.state.Watch(func(c domain.Change) {
		if c.Parts&(domain.Users|domain.Homes) != 0 {
			select {
			case changed <- struct{}{}:
			default:
			}
		}
	})
	defer stop()
	type login struct {
		version uint64
		home    mesh.NodeID
		locked  bool
	}
	look := func() map[mesh.ID]login {
		now := map[mesh.ID]login{}
		for _, u := range n.state.Users() {
			now[u.ID] = login{u.CredVersion, u.Home, u.Disabled}
		}
		return now
	}
	for known := look(); ; {
		select {
		case <-changed:
		case <-ctx.Done():
			return nil
		}
		now := look()
		for id, was := range known {
			if now[id] != was {
				end(id.String(), "your account was changed; log in again")
			}
		}
		known = now
	}
}

// adminLogin lets a mesh admin into the pages.
func (n *Node) adminLogin(ctx context.Context, name, password string, from netip.Addr) (admin.Actor, error) {
	began := time.Now()
	u, err := n.dir.logIn(ctx, name, password, from)
	if errors.Is(err, errLogin) || err == nil && u.Role != domain.RoleMeshAdmin {
		select {
		case <-time.After(time.Until(began.Add(n.failures.Failed(from, name, began)))):
		case <-ctx.Done():
		}
		return admin.Actor{}, admin.Errorf(admin.Denied, "login", "The name or the password is wrong, or it is not an admin's.")
	}
	if f := transport.AsFault(err); err != nil && f.Code == errHome.Code {
		return admin.Actor{}, admin.Errorf(admin.Unavailable, "login.home", "The office that checks this password cannot be reached now: log in there, or at a node that may lead the mesh.")
	}
	if err != nil {
		return admin.Actor{}, err
	}
	n.failures.Succeeded(from, name)
	return admin.Actor{Name: u.Address, Admin: true}, nil
}

// carrier is who carries to a destination.
func (n *Node) carrier(d transport.Destination) transport.Carrier {
	switch d.Scope {
	case transport.ScopeLocal:
		return delivery.New(delivery.Config{Name: func() string { return n.cfg.Name }, Logger: n.part("delivery")}, homeStore{n})
	case transport.ScopeNode, transport.ScopeGateway:
		return n.relay
	case transport.ScopeOutside:
		return n.outside(d)
	}
	return nil
}

// outside carries to hosts of the Internet.
func (n *Node) outside(transport.Destination) transport.Carrier {
	cfg := smtpout.Config{Hostname: n.cfg.Host, Port: uint16(n.cfg.SMTPOutPort)}
	if s := n.state.Settings().Smarthost; s != "" {
		host, port := s, uint16(0)
		if a, err := netip.ParseAddrPort(s); err == nil {
			host, port = a.Addr().String(), a.Port()
		} else if h, p, ok := strings.Cut(s, ":"); ok {
			host = h
			for _, c := range p {
				port = port*10 + uint16(c-'0')
			}
		}
		cfg.Smarthost = &smtpout.Smarthost{Host: host, Port: port}
	}
	ready := func() error {
		if err := n.journal.Err(); err != nil {
			return err
		}
		if n.journal.Full() {
			return fmt.Errorf("outside mail waits for room on this disk: %w", transport.ErrNoSpace)
		}
		return nil
	}
	c, err := smtpout.New(cfg, smtpout.Deps{Resolver: n.env.Resolver, Ready: ready, Dial: n.env.Dial, Logger: n.part("smtpout"), Rand: n.env.Random, TLS: &tls.Config{Time: n.now},
		OwnName: func(host string) bool {
			return slices.ContainsFunc(n.state.Members(), func(x *domain.Node) bool { return strings.EqualFold(x.Host, strings.TrimSuffix(host, ".")) })
		}})
	if err != nil {
		n.log.Error("carry outside", "err", err)
		return nil
	}
	return c
}

// homeStore is mailstore for deliveries: it makes the mailbox of somebody who
// was added a moment ago before the first message arrives in it.
type homeStore struct{ n *Node }

func (h homeStore) StartDelivery(ctx context.Context, d *mailstore.Delivery) (*mailstore.Pending, error) {
	for i := range d.Rcpts {
		if _, err := h.n.home(ctx, d.Rcpts[i].Mailbox); err != nil {
			return nil, err
		}
	}
	return h.n.store.StartDelivery(ctx, d)
}
