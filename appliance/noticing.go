package appliance

import (
	"context"
	"net"
	"slices"

	"posthouse/mesh"
	"posthouse/transport"
	"posthouse/transport/link"
	"posthouse/transport/notice"
)

// What this node and its peers tell each other of room: see transport/notice.

// buildNotices makes both ends of the notices between nodes.
func (n *Node) buildNotices() {
	n.notices = notice.New(notice.Deps{
		Dial: func(ctx context.Context, to mesh.NodeID, service string) (net.Conn, error) {
			return n.link.Dial(ctx, to, service, link.Control)
		},
		Heard: n.heardNotice, Name: n.nodeName, Logger: n.part("notice"),
	})
}

// heardNotice hastens what a peer has deferred, once it has room for it.
func (n *Node) heardNotice(peer mesh.NodeID, was, is notice.Facts, first bool) {
	if was.Full != is.Full {
		n.part("notice").Info("disk of another office", "peer", n.nodeName(peer), "full", is.Full)
	}
	n.live.send()
	freed := slices.ContainsFunc(was.Mailboxes, func(m mesh.MailboxID) bool { return !slices.Contains(is.Mailboxes, m) })
	if is.Full || !first && !was.Full && !freed {
		return
	}
	n.queue.Room(transport.Destination{Scope: transport.ScopeNode, Node: peer})
	if was.Full {
		n.relay.PeerUp(peer) // it did not dial a full disk
	}
	if first || was.Full {
		n.queue.Room(transport.Destination{Scope: transport.ScopeGateway})
	}
}

// diskSpace is told by the store that the disk is full, or has room again.
func (n *Node) diskSpace(full bool) {
	n.diskFull.Store(full)
	n.notify()
	n.showStore()
	if !full {
		n.queue.RoomHere()
	}
}

// notify lets tellNotices look again. It does not wait.
func (n *Node) notify() {
	select {
	case n.noticed <- struct{}{}:
	default:
	}
}

// tellNotices keeps what this node says of itself as it is, until ctx ends.
func (n *Node) tellNotices(ctx context.Context) error {
	var before []mesh.MailboxID
	for {
		select {
		case <-n.noticed:
		case <-ctx.Done():
			return nil
		}
		full := n.store.Full()
		n.notices.Set(notice.Facts{Full: n.diskFull.Load(), Mailboxes: full})
		if slices.ContainsFunc(before, func(m mesh.MailboxID) bool { return !slices.Contains(full, m) }) {
			n.queue.Room(transport.Destination{Scope: transport.ScopeLocal})
		}
		before = full
	}
}

// mailboxFull reports whether the home of a mailbox, by the domain state, says
// that it is over its quota. What is not known is not full.
func (n *Node) mailboxFull(home mesh.NodeID, m mesh.MailboxID) bool {
	if home == n.id {
		return n.store != nil && n.store.IsFull(m)
	}
	return n.notices != nil && n.notices.MailboxFull(home, m)
}

// destinationFull is mailboxFull for what waits in the queue.
func (n *Node) destinationFull(d transport.Destination, m mesh.MailboxID) bool {
	switch d.Scope {
	case transport.ScopeLocal:
		return n.mailboxFull(n.id, m)
	case transport.ScopeNode:
		return n.mailboxFull(d.Node, m)
	}
	return false
}

// serveNotices hears the other nodes.
func (n *Node) serveNotices(ctx context.Context, l *link.Listener) error {
	return n.serveStreams(ctx, l, "notice", func(ctx context.Context, c *link.Conn) error {
		return n.notices.Serve(ctx, c.Peer(), c)
	})
}
