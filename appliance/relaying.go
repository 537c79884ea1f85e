package appliance

import (
	"context"
	"errors"
	"net"
	"os"
	"sync/atomic"
	"time"

	"posthouse/mailstore"
	"posthouse/mailstore/log"
	"posthouse/mailstore/mime"
	"posthouse/mesh"
	"posthouse/transport"
	"posthouse/transport/link"
	"posthouse/transport/notice"
	"posthouse/transport/relay"
	"posthouse/transport/route"
)

// buildRelay makes both ends of the relay between nodes.
func (n *Node) buildRelay() {
	n.relay = relay.New(relay.Deps{
		Self: n.id,
		Dial: func(ctx context.Context, to mesh.NodeID, service string) (net.Conn, error) {
			if n.witness.suspect(to) {
				return nil, errors.New("it runs on an older copy of its disk; mail waits until it was taken in again")
			}
			if n.notices.Full(to) {
				return nil, errors.New("its disk is full; mail waits until it says that it has room")
			}
			c, err := n.link.Dial(ctx, to, service, link.Bulk)
			if err != nil {
				return nil, err
			}
			return &patient{Conn: c, ended: func() { n.link.Doubt(to) }}, nil
		},
		Name:     n.nodeName,
		Member:   func(id mesh.NodeID) bool { x, ok := n.state.Node(id); return ok && x.Member() },
		PutOut:   func(id mesh.NodeID) bool { x, ok := n.state.Node(id); return ok && !x.Member() },
		Gateways: func() []mesh.NodeID { return route.Gateways(n.view.Load(), n.rank) },
		IsGateway: func() bool {
			x, ok := n.state.Node(n.id)
			return ok && x.Member() && x.Gateway
		},
		Home: relayHome{n}, Gateway: n.queue, Origin: n.queue, NewDraft: n.journal.NewDraft, Now: n.now, Logger: n.part("relay"),
	})
}

// patient is a stream that tells link when its patience has ended: the next may
// go another way. What comes in moves the end for what goes out: over a narrow
// line, where what was lost goes first, and through a third node, which takes much
// at a time, nothing more may be taken for longer than anybody waits, while the
// other side says every other second that it gets bytes.
type patient struct {
	net.Conn
	ended  func()
	writes atomic.Int64 // how long a write may stand, a time.Duration
}

// SetWriteDeadline sets the deadline, and the patience after whatever comes in.
func (p *patient) SetWriteDeadline(t time.Time) error {
	p.writes.Store(int64(time.Until(t)))
	return p.Conn.SetWriteDeadline(t)
}

func (p *patient) Read(b []byte) (int, error) {
	k, err := p.Conn.Read(b)
	if d := time.Duration(p.writes.Load()); k > 0 && d > 0 && hearingIsProgress {
		p.Conn.SetWriteDeadline(time.Now().Add(d))
	}
	if errors.Is(err, os.ErrDeadlineExceeded) {
		p.ended()
	}
	return k, err
}

func (p *patient) Write(b []byte) (int, error) {
	k, err := p.Conn.Write(b)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		p.ended()
	}
	return k, err
}

// rank orders gateways: the highest priority first.
func (n *Node) rank(id mesh.NodeID) int {
	if x, ok := n.state.Node(id); ok {
		return -x.Priority
	}
	return 0
}

// destinationSeen reports whether a node, or for outside mail any gateway, seems to
// be alive: connected, or reached through a third.
func (n *Node) destinationSeen(d transport.Destination) bool {
	for _, m := range n.view.Load().Members {
		wanted := d.Scope == transport.ScopeNode && m.ID == d.Node || d.Scope == transport.ScopeGateway && m.Gateway && m.ID != n.id
		if wanted && (m.State == mesh.Serving || m.State == mesh.Draining) {
			return true
		}
	}
	return false
}

// offers are the services of peers that stand from the first moment of the link.
type offers struct{ relay, notice *link.Listener }

func (n *Node) offer() (o offers, err error) {
	if o.relay, err = n.link.Listen(relay.Service); err != nil {
		return o, err
	}
	o.notice, err = n.link.Listen(notice.Service)
	return o, err
}

// serveRelay answers the other nodes' relay streams.
func (n *Node) serveRelay(ctx context.Context, l *link.Listener) error {
	return n.serveStreams(ctx, l, "relay", func(ctx context.Context, c *link.Conn) error {
		// Who has just joined knows no office yet: mail would be put off for the
		// time that a deferral takes, while the stream is tried again at once.
		if _, here := n.state.Node(n.id); !here && joinersWait {
			n.turned.stream()
			n.notify()
			return c.Close()
		}
		if n.witness.suspect(c.Peer()) {
			return c.Close()
		}
		return n.relay.Serve(ctx, c.Peer(), c)
	})
}

// relayHome implements relay.Home on the mailstore.
type relayHome struct{ n *Node }

func (h relayHome) Start(ctx context.Context, env transport.Envelope, rcpts []transport.Recipient, body *log.Draft, s *mime.Structure, after []relay.Started) (relay.Started, error) {
	if err := h.n.journal.Admit(ctx, body.Size()); err != nil {
		return nil, err
	}
	d := &mailstore.Delivery{Envelope: env, Rcpts: rcpts, Draft: body, Structure: s}
	for _, a := range after {
		d.After = append(d.After, a.(*mailstore.Pending)) // we made it
	}
	p, err := homeStore(h).StartDelivery(ctx, d)
	if err != nil {
		return nil, err
	}
	for i, r := range p.Known() {
		if r.Outcome == transport.Moved {
			h.n.turned.mailbox(rcpts[i].Mailbox)
			h.n.notify() // it may have become ours since
		}
	}
	return p, nil
}

func (h relayHome) Where(m mesh.MailboxID) (mesh.NodeID, uint64, bool) { return h.n.state.Home(m) }
