package appliance

import (
	"context"
	"net"
	"sync"
	"time"

	"posthouse/mesh"
	"posthouse/mesh/gossip"
	"posthouse/transport/link"
)

// What gossip says is a hint: it changes how members are shown, and what is
// dialled or tried next. Nothing is decided by it.

const (
	serviceGossip = "gossip/1"
	// detourEvery is how often a node that only others reach is asked for a sign
	// of life through them; below the minute for which link remembers the way.
	detourEvery = 30 * time.Second
)

// gossipNetwork implements gossip.Network on the link.
type gossipNetwork struct {
	*link.Endpoint
	l *link.Listener
}

func (gossipNetwork) Addr(id mesh.NodeID) net.Addr { return link.Addr(id) }

func (g gossipNetwork) Dial(ctx context.Context, to mesh.NodeID) (net.Conn, error) {
	return g.Endpoint.Dial(ctx, to, serviceGossip, link.Control)
}

func (g gossipNetwork) Accept(ctx context.Context) (gossip.Stream, error) { return g.l.Accept(ctx) }

// buildGossip prepares this node's part of the gossip; heard is called when
// there is news.
func (n *Node) buildGossip(heard func()) (err error) {
	if n.gossipDoor, err = n.link.Listen(serviceGossip); err != nil {
		return err
	}
	n.gossip, err = gossip.New(gossip.Config{Self: n.id, Tags: n.tags()}, gossip.Deps{
		Network: gossipNetwork{n.link, n.gossipDoor}, Log: n.part("gossip"),
		Events: func(e gossip.Event) {
			if e.Node == n.id {
				return
			}
			n.witness.heard(e)
			if e.Status == gossip.Alive {
				n.link.Hint(e.Node)
			}
			heard()
		},
	})
	return err
}

func (n *Node) tags() gossip.Tags {
	return gossip.Tags{Version: n.version, State: *n.phase.Load(), Boot: n.boots, Digests: map[string]uint64{logDigest: n.journal.Applied()}}
}

// tell spreads what this node says of itself.
func (n *Node) tell() {
	if n.gossip == nil {
		return
	}
	if err := n.gossip.SetTags(n.tags()); err != nil {
		n.part("gossip").Warn("tags not told", "err", err)
	}
}

// farewell tells the others that this node goes on purpose, if it does.
func (n *Node) farewell() {
	if !n.parting.Load() {
		return
	}
	for _, p := range n.link.Peers() {
		if p.Connected {
			if err := n.gossip.Leave(); err != nil {
				n.part("gossip").Info("goodbye may not have been heard", "err", err)
			}
			return
		}
	}
}

// heard is what gossip says of each node.
func (n *Node) heard() map[mesh.NodeID]gossip.Member {
	out := map[mesh.NodeID]gossip.Member{}
	for _, m := range n.gossip.Members() {
		out[m.Node] = m
	}
	return out
}

// detours asks for a sign of life, through others, of each node whose own line
// is cut though gossip says that it lives: the answer proves a way, and shows it.
func (n *Node) detours(ctx context.Context, news <-chan struct{}) error {
	for {
		var timer <-chan time.Time
		var asks sync.WaitGroup
		said := n.heard()
		for _, p := range n.link.Peers() {
			if p.Connected || said[p.ID].Status != gossip.Alive {
				continue
			}
			timer = time.After(detourEvery)
			asks.Go(func() {
				if _, err := n.ask(ctx, p.ID, call{What: callHello}); err == nil && p.Via == 0 {
					n.queue.PeerUp(p.ID)
					n.relay.PeerUp(p.ID)
					n.notices.PeerUp(p.ID)
					n.refreshView()
				}
			})
		}
		asks.Wait()
		select {
		case <-news:
		case <-timer:
		case <-ctx.Done():
			return nil
		}
	}
}
