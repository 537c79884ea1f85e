// Package gossip finds out who is alive: Serf over the mesh's own link. What it says
// is a hint (dial this node now, show that one as gone), never authority: who belongs
// to the mesh, who is home and who may do what stands in the domain state.
//
// It carries liveness, versions and digests, no content. It keeps nothing on disk:
// link dials every member for ever, and each peer that comes up is joined again, so
// Serf's snapshot would only be a second and worse list of addresses.
//
// appliance builds one Gossip a node, gives it the link (Network), tells it who is
// admitted and whose connection came or went, and passes its hints on.
package gossip

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"sync"
	"time"

	"github.com/hashicorp/memberlist"
	"github.com/hashicorp/serf/serf"

	"posthouse/mesh"
)

// Network is what gossip needs of the link.
type Network interface {
	// SendDatagram sends or loses b; it never blocks.
	SendDatagram(to mesh.NodeID, b []byte) error
	// ReceiveDatagram waits for the next.
	ReceiveDatagram(context.Context) (from mesh.NodeID, b []byte, err error)
	// Dial and Accept make streams of a service of gossip's own.
	Dial(ctx context.Context, to mesh.NodeID) (net.Conn, error)
	Accept(context.Context) (Stream, error)
	// Addr is the constant made-up address of a node: a 16-byte IP that ends in its
	// id, and a port.
	Addr(mesh.NodeID) net.Addr
}

// Stream is an accepted stream, whose peer has proven who it is.
type Stream interface {
	net.Conn
	Peer() mesh.NodeID
}

// Status is what gossip believes of a node.
type Status string

const (
	Alive  Status = "alive"
	Failed Status = "failed" // does not answer
	Left   Status = "left"   // has said goodbye
)

// Event says that a node's status or tags changed.
type Event struct {
	Node   mesh.NodeID
	Status Status
	Tags   Tags
}

// Member is what gossip knows of one node.
type Member = Event

// Config is fixed for a Gossip's life.
type Config struct {
	Self mesh.NodeID
	// Tags are told from the start on; SetTags changes them.
	Tags Tags
}

// Deps is what a Gossip stands on.
type Deps struct {
	Network Network
	Log     *slog.Logger
	// Events is called from one goroutine, in order; it must return soon. May be nil.
	Events func(Event)
}

const (
	// Measured with five nodes: a dead one is marked within 11.7 to 15.7 s (the WAN
	// profile needs 38 to 53 s).
	probeInterval = 2 * time.Second
	probeTimeout  = time.Second
	suspicionMult = 4
	// forever: a failed member is never forgotten by time. With Serf's 24 h, a
	// partition of 25 h never healed by itself.
	forever = 100 * 365 * 24 * time.Hour
	// tombstone is how long it is remembered that a node left.
	tombstone = 24 * time.Hour
	// maxPacket is memberlist's; what is larger does not fit a QUIC datagram.
	maxPacket = 1100
	// joinRetry is between two attempts to join a peer that is connected but not
	// alive here (its gossip may not have started yet).
	joinRetry = 5 * time.Second
	// broadcastTimeout bounds waiting for a change to be sent, propagate the wait
	// after a goodbye, so that probes are still answered while it spreads.
	broadcastTimeout = 3 * time.Second
	propagate        = time.Second
	streamTimeout    = 10 * time.Second
)

// Gossip is this node's part. Its methods are safe for concurrent use and do not
// block, except Leave.
type Gossip struct {
	cfg  Config
	deps Deps
	wake chan struct{}

	mu       sync.Mutex
	sf       *serf.Serf // nil but during Run
	tags     Tags
	retag    bool // tags were changed and not told yet
	admitted map[mesh.NodeID]bool
	up       map[mesh.NodeID]bool // connected by link
	ended    bool
}

// New prepares a Gossip. It starts nothing.
func New(cfg Config, deps Deps) (*Gossip, error) {
	if cfg.Self == 0 || deps.Network == nil {
		return nil, errors.New("gossip: Self and Network are needed")
	}
	if _, err := cfg.Tags.encode(); err != nil {
		return nil, fmt.Errorf("gossip: %w", err)
	}
	if deps.Log == nil {
		deps.Log = slog.New(slog.DiscardHandler)
	}
	return &Gossip{cfg: cfg, deps: deps, tags: cfg.Tags, wake: make(chan struct{}, 1), admitted: map[mesh.NodeID]bool{}, up: map[mesh.NodeID]bool{}}, nil
}

// config is Serf's.
func (g *Gossip) config(tr *transport, events chan serf.Event) (*serf.Config, error) {
	tags, err := g.currentTags().encode()
	if err != nil {
		return nil, err
	}
	ml := memberlist.DefaultWANConfig()
	ml.Name = g.cfg.Self.String()
	ml.Transport = tr
	ml.UDPBufferSize = maxPacket
	ml.ProbeInterval, ml.ProbeTimeout, ml.SuspicionMult = probeInterval, probeTimeout, suspicionMult
	ml.EnableCompression = false // packets are small, and a decompressor is one more parser
	ml.TCPTimeout = streamTimeout
	ml.DNSConfigPath = ""
	ml.Alive = g
	ml.Logger = slog.NewLogLogger(g.deps.Log.Handler(), slog.LevelDebug)
	ml.LogOutput = nil

	c := serf.DefaultConfig()
	c.NodeName = g.cfg.Self.String()
	c.Tags = tags
	c.EventCh = events
	c.MemberlistConfig = ml
	c.ReconnectTimeout, c.TombstoneTimeout = forever, tombstone
	c.BroadcastTimeout, c.LeavePropagateDelay = broadcastTimeout, propagate
	// The loser of a name conflict would shut itself down. Names are NodeIDs, and
	// link binds each to one key.
	c.EnableNameConflictResolution = false
	// Fixed for ever: nodes of different versions must read each other's times.
	c.MsgpackUseNewTimeFormat = true
	c.Logger = ml.Logger
	c.LogOutput = nil
	return c, nil
}

// Run gossips until ctx ends. It may be called once. memberlist does not wait for its
// own last probe, which ends by itself within probeInterval.
func (g *Gossip) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	tr := &transport{network: g.deps.Network, ctx: ctx, self: g.cfg.Self, packets: make(chan *memberlist.Packet, 64), streams: make(chan net.Conn, 8)}
	events := make(chan serf.Event, 256)
	config, err := g.config(tr, events)
	if err != nil {
		return fmt.Errorf("gossip: %w", err)
	}
	sf, err := serf.Create(config)
	if err != nil {
		return fmt.Errorf("start gossip: %w", err)
	}
	g.mu.Lock()
	if g.sf != nil || g.ended {
		g.mu.Unlock()
		sf.Shutdown()
		return errors.New("gossip: Run was called twice")
	}
	g.sf = sf
	g.mu.Unlock()

	var wg sync.WaitGroup
	wg.Go(tr.receive)
	wg.Go(tr.accept)
	drained := make(chan struct{})
	var telling sync.WaitGroup
	telling.Go(func() { g.tell(drained, events) })
	wg.Go(func() { g.work(ctx, sf) })
	<-ctx.Done()

	g.mu.Lock()
	g.sf, g.ended = nil, true
	g.mu.Unlock()
	err = sf.Shutdown()
	wg.Wait()
	close(drained)
	telling.Wait()
	if err != nil {
		return fmt.Errorf("stop gossip: %w", err)
	}
	return nil
}

// NotifyAlive implements memberlist.AliveDelegate: an error ignores the message.
func (g *Gossip) NotifyAlive(n *memberlist.Node) error {
	id, err := mesh.ParseNodeID(n.Name)
	if err != nil {
		return err
	}
	g.mu.Lock()
	ok := id == g.cfg.Self || g.admitted[id]
	g.mu.Unlock()
	if !ok {
		return fmt.Errorf("node %v is not admitted", id)
	}
	// A node has one address, made from its id: another is a lie or a mistake.
	if want, ok := g.deps.Network.Addr(id).(*net.TCPAddr); !ok || !want.IP.Equal(n.Addr) || want.Port != int(n.Port) {
		return fmt.Errorf("node %v claims address %v", id, n.Addr)
	}
	return nil
}

// SetAdmitted says which nodes belong to the mesh, by the domain state. Others are
// neither believed in nor told about, and are forgotten when they have failed.
func (g *Gossip) SetAdmitted(nodes []mesh.NodeID) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.admitted = make(map[mesh.NodeID]bool, len(nodes))
	for _, id := range nodes {
		g.admitted[id] = true
	}
	g.poke()
}

// SetPeerUp says whether link has a connection to node: one that is up but not alive
// here is joined, and joined again until it is.
func (g *Gossip) SetPeerUp(node mesh.NodeID, up bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if up {
		g.up[node] = true
		g.poke()
	} else {
		delete(g.up, node)
	}
}

// SetTags changes what is told about this node. The error is about their size.
func (g *Gossip) SetTags(t Tags) error {
	if _, err := t.encode(); err != nil {
		return fmt.Errorf("gossip: %w", err)
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.tags, g.retag = t, true
	g.poke()
	return nil
}

func (g *Gossip) currentTags() Tags {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.tags
}

func (g *Gossip) poke() {
	select {
	case g.wake <- struct{}{}:
	default:
	}
}

func (g *Gossip) serf() *serf.Serf {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.sf
}

// Members lists the admitted nodes that were ever heard of, this one included, in no
// order. Without Run it is empty.
func (g *Gossip) Members() []Member {
	sf := g.serf()
	if sf == nil {
		return nil
	}
	var all []Member
	for _, m := range sf.Members() {
		if e, ok := g.event(m); ok {
			all = append(all, e)
		}
	}
	return all
}

// RTT estimates the round trip between this node and another from their network
// coordinates; false until both are known.
func (g *Gossip) RTT(node mesh.NodeID) (time.Duration, bool) {
	sf := g.serf()
	if sf == nil {
		return 0, false
	}
	theirs, ok := sf.GetCachedCoordinate(node.String())
	if !ok {
		return 0, false
	}
	ours, err := sf.GetCoordinate()
	if err != nil {
		return 0, false
	}
	return ours.DistanceTo(theirs), true
}

// Leave tells the others that this node goes on purpose. It takes some seconds; end
// Run's context after it.
func (g *Gossip) Leave() error {
	sf := g.serf()
	if sf == nil {
		return nil
	}
	if err := sf.Leave(); err != nil {
		return fmt.Errorf("leave gossip: %w", err)
	}
	return nil
}

// event translates, and drops what is not ours to tell.
func (g *Gossip) event(m serf.Member) (Event, bool) {
	id, err := mesh.ParseNodeID(m.Name)
	if err != nil {
		return Event{}, false
	}
	g.mu.Lock()
	ok := id == g.cfg.Self || g.admitted[id]
	g.mu.Unlock()
	e := Event{Node: id, Tags: decodeTags(m.Tags)}
	switch m.Status {
	case serf.StatusAlive:
		e.Status = Alive
	case serf.StatusFailed:
		e.Status = Failed
	case serf.StatusLeaving, serf.StatusLeft:
		e.Status = Left
	default:
		ok = false
	}
	return e, ok
}

// tell passes Serf's events on. Serf waits for us when its channel is full, so it is
// drained until Serf has shut down.
func (g *Gossip) tell(end <-chan struct{}, events <-chan serf.Event) {
	for {
		select {
		case <-end:
			return
		case ev := <-events:
			me, ok := ev.(serf.MemberEvent)
			if !ok {
				continue // nobody here sends user events or queries
			}
			for _, m := range me.Members {
				// The member's own status is as of the event, but for these two.
				switch me.Type {
				case serf.EventMemberReap:
					continue
				case serf.EventMemberLeave:
					m.Status = serf.StatusLeft
				}
				if e, ok := g.event(m); ok && g.deps.Events != nil {
					g.deps.Events(e)
				}
			}
			if me.Type == serf.EventMemberFailed {
				g.poke() // it may be one to forget, or to join again
			}
		}
	}
}

// work does what takes time: joining peers, telling tags, forgetting the removed.
func (g *Gossip) work(ctx context.Context, sf *serf.Serf) {
	// A join of our own tells everybody that we are back: until then those who
	// only heard through others of our goodbye believe it.
	announced := false
	retry := time.NewTimer(0)
	retry.Stop()
	defer retry.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-g.wake:
		case <-retry.C:
		}
		g.mu.Lock()
		tags, retag := g.tags, g.retag
		g.retag = false
		want := make(map[mesh.NodeID]bool, len(g.up))
		for id := range g.up {
			if g.admitted[id] && id != g.cfg.Self {
				want[id] = true
			}
		}
		var forget []string
		g.mu.Unlock()
		for _, m := range sf.Members() {
			id, err := mesh.ParseNodeID(m.Name)
			if err != nil {
				continue
			}
			if m.Status == serf.StatusAlive && announced {
				delete(want, id)
			}
			g.mu.Lock()
			gone := !g.admitted[id] && id != g.cfg.Self
			g.mu.Unlock()
			if gone && m.Status == serf.StatusFailed {
				forget = append(forget, m.Name)
			}
		}
		if retag {
			enc, err := tags.encode()
			if err == nil {
				err = sf.SetTags(enc)
			}
			if err != nil {
				g.deps.Log.Warn("tags told late", "err", err) // they go with the next push/pull
			}
		}
		for _, name := range forget {
			if err := sf.RemoveFailedNodePrune(name); err != nil {
				g.deps.Log.Warn("removed node not forgotten yet", "peer", name, "err", err)
			}
		}
		for id := range want {
			if ctx.Err() != nil {
				return
			}
			addr := g.deps.Network.Addr(id).String()
			if _, err := sf.Join([]string{id.String() + "/" + addr}, true); err != nil {
				g.deps.Log.Info("peer not joined yet", "peer", id.String(), "err", err)
				retry.Reset(joinRetry - time.Second + rand.N(2*time.Second))
			} else {
				announced = true
			}
		}
	}
}
