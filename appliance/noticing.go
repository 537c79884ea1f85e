package appliance

import (
	"context"
	"net"
	"slices"
	"sync"

	"posthouse/mesh"
	"posthouse/transport"
	"posthouse/transport/link"
	"posthouse/transport/notice"
)

// What this node and its peers tell each other of room, and of what they have
// learnt: see transport/notice.

// turned is what this node turned mail away for. Whoever sent it may try again in
// half a minute or a minute only, when there is room again, or when this node has
// heard that a mailbox is its own: its copy of the domain state was behind.
type turned struct {
	mu        sync.Mutex
	mailboxes []mesh.MailboxID // not its own, or not yet: the last maxTurned
	streams   bool             // whole streams, before this node knew itself
	again     uint64           // notice.Facts.Again
}

// maxTurned bounds what is remembered. What is forgotten comes by the sender's schedule.
const maxTurned = 1024

func (t *turned) mailbox(m mesh.MailboxID) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if slices.Contains(t.mailboxes, m) {
		return
	}
	if len(t.mailboxes) == maxTurned {
		t.mailboxes = slices.Delete(t.mailboxes, 0, 1)
	}
	t.mailboxes = append(t.mailboxes, m)
}

func (t *turned) stream() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.streams = true
}

// room counts that there is room where there was none.
func (t *turned) room() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.again++
}

// learn counts what is this node's own by now: self says that it knows itself,
// ours that a mailbox lives here. It returns notice.Facts.Again.
func (t *turned) learn(self bool, ours func(mesh.MailboxID) bool) uint64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	n := len(t.mailboxes)
	t.mailboxes = slices.DeleteFunc(t.mailboxes, ours)
	if saysWhatItLearns && (len(t.mailboxes) < n || t.streams && self) {
		t.again++
		t.streams = t.streams && !self
	}
	return t.again
}

// buildNotices makes both ends of the notices between nodes.
func (n *Node) buildNotices() {
	n.notices = notice.New(notice.Deps{
		Dial: func(ctx context.Context, to mesh.NodeID, service string) (net.Conn, error) {
			return n.link.Dial(ctx, to, service, link.Control)
		},
		Heard: n.heardNotice, Name: n.nodeName, Logger: n.part("notice"),
	})
}

// heardNotice hastens what a peer has put off, once it has room for it or knows
// whose it is.
func (n *Node) heardNotice(peer mesh.NodeID, was, is notice.Facts, first bool) {
	if was.Full != is.Full {
		n.part("notice").Info("disk of another office", "peer", n.nodeName(peer), "full", is.Full)
	}
	n.live.send()
	freed := slices.ContainsFunc(was.Mailboxes, func(m mesh.MailboxID) bool { return !slices.Contains(is.Mailboxes, m) })
	if is.Full || !first && !was.Full && !freed && was.Again == is.Again {
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
	if !full {
		n.turned.room()
	}
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
		_, here := n.state.Node(n.id)
		again := n.turned.learn(here, func(m mesh.MailboxID) bool { home, _, ok := n.state.Home(m); return ok && home == n.id })
		n.notices.Set(notice.Facts{Full: n.diskFull.Load(), Mailboxes: full, Again: again})
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
