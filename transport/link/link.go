// Package link is the node's one UDP socket: authenticated, encrypted connections
// (QUIC) to the other nodes of the mesh, and on them streams for named services and
// datagrams for gossip.
//
// It knows who may be talked to (SetPeers, from the domain state), keeps a connection
// to each of them for ever, tells when one comes or goes (Watch), and reaches a node
// that it cannot connect to through a third. Callers see node ids alone: only this
// package knows IP addresses.
//
// It does not decide who is admitted, takes custody of nothing, retries no stream and
// opens no socket: it gets a net.PacketConn. appliance builds one Endpoint a node and
// hands it to gossip, election, relay and whatever else talks to other nodes, each
// by an interface of their own. DESIGN.md describes the wire and the states.
package link

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/quic-go/quic-go"

	"posthouse/mesh"
)

// Errors that callers decide by. All may come wrapped, with the reason behind them.
var (
	// ErrUnreachable: no connection, and no third node that has one.
	ErrUnreachable = errors.New("node cannot be reached")
	// ErrNotAdmitted: the node is not among the peers, or it says that we are not.
	ErrNotAdmitted = errors.New("node is not admitted")
	// ErrNoService: the node does not offer that service (yet, or in its version).
	ErrNoService = errors.New("node does not offer this service")
	// ErrBusy: the node has a full queue for that service, or too many streams.
	ErrBusy = errors.New("node is busy")
	// ErrReset: the other side gave the stream up before its end.
	ErrReset = errors.New("stream was given up by the other side")
	// ErrClosed: this endpoint is not running, or this listener or stream was closed here.
	ErrClosed = errors.New("link is closed")
)

// Class says which of a pair's two connections carries a stream.
type Class uint8

const (
	Control Class = 1 // gossip, votes, commands, headers: small and urgent
	Bulk    Class = 2 // bodies, moves, copies: paced, so that it delays nothing else
)

// Config is what may be tuned; the zero value of each field means its default.
type Config struct {
	// IdleTimeout is how long a peer may be silent before its connection counts as
	// lost. Default 12 s, at least three times KeepAlive.
	IdleTimeout time.Duration
	// KeepAlive is the period of keep-alives. Default 4 s.
	KeepAlive time.Duration
	// HandshakeTimeout bounds a silent handshake, the hello and a stream's header.
	// Default 5 s.
	HandshakeTimeout time.Duration
	// Streams is how many streams a peer may have open on one connection; its next
	// one waits at its side. Default 256.
	Streams int
	// Backlog is how many streams of one service wait for Accept; the next is
	// refused with ErrBusy. Default 256, as many as one peer may have.
	Backlog int
	// Splices is how many streams this node carries for others at a time, a quarter
	// of it for any one peer. Default 64.
	Splices int
	// Joins is how many nodes may be in the act of joining, two of them from one
	// address. Default 8.
	Joins int
	// JoinLifetime ends a join's connection. Default 60 s.
	JoinLifetime time.Duration
	// QueueDelay is how much delay bulk may add to a path. Default 150 ms.
	QueueDelay time.Duration
}

func (c Config) withDefaults() (Config, error) {
	def := func(d *time.Duration, v time.Duration) {
		if *d == 0 {
			*d = v
		}
	}
	num := func(n *int, v int) {
		if *n == 0 {
			*n = v
		}
	}
	def(&c.IdleTimeout, 12*time.Second)
	def(&c.KeepAlive, 4*time.Second)
	def(&c.HandshakeTimeout, 5*time.Second)
	def(&c.JoinLifetime, time.Minute)
	def(&c.QueueDelay, 150*time.Millisecond)
	num(&c.Streams, 256)
	num(&c.Backlog, 256)
	num(&c.Splices, 64)
	num(&c.Joins, 8)
	if c.KeepAlive < 0 || c.IdleTimeout < 3*c.KeepAlive {
		return c, fmt.Errorf("link: idle timeout %v must be at least three times the keep-alive %v", c.IdleTimeout, c.KeepAlive)
	}
	if c.HandshakeTimeout < 0 || c.JoinLifetime < 0 || c.QueueDelay < 0 || c.Streams < 0 || c.Backlog < 0 || c.Splices < 0 || c.Joins < 0 {
		return c, errors.New("link: no setting may be negative")
	}
	return c, nil
}

// Identity is this node's key, as mesh/identity makes it.
type Identity interface {
	Hash() mesh.KeyHash
	StatelessResetKey() [32]byte
	// ServerTLS and ClientTLS ask check in every handshake and in no other way.
	ServerTLS(check func(alpn string, peer mesh.KeyHash) error, alpns ...string) *tls.Config
	ClientTLS(alpn string, check func(peer mesh.KeyHash) error) *tls.Config
	Peer(tls.ConnectionState) (mesh.KeyHash, error)
}

// Facts is what a node tells each peer about itself when they meet.
type Facts struct {
	BootCount uint64 // starts of this node, kept by it
	LogEnd    uint64 // end of its message log when asked
	Lineage   []byte // opaque: lineage and generation; at most 64 bytes
	// Boot is random and new at each start. It is filled in by link, and only
	// in what Meet is given.
	Boot [16]byte
}

// Deps is what an Endpoint stands on. Funcs that are nil are not called.
//
// Callbacks come from one goroutine, one at a time and in order, except Meet, which
// comes from many. None may block for long or call Run's end.
type Deps struct {
	Conn     net.PacketConn // the socket; used by Run alone until it returns, closed by the caller
	Identity Identity
	Random   io.Reader // crypto/rand.Reader; read by New only
	Log      *slog.Logger

	// Facts is asked at each meeting.
	Facts func() Facts
	// Meet judges a peer by its facts; its error, told to the peer in its words,
	// refuses the connection (a rolled-back node, another lineage).
	Meet func(peer mesh.NodeID, its Facts) error
	// Unknown tells that a key which is not admitted here wants in (or answered at a
	// peer's address). It is refused at once; whoever is told pulls the domain state
	// and calls SetPeers, and the peer's next attempt, 3 s later, succeeds.
	Unknown func(mesh.KeyHash)
	// Learned tells where a peer was met, when that changed: to be kept, and given
	// back as Peer.Learned at the next start.
	Learned func(mesh.NodeID, netip.AddrPort)
}

// Peer is a node that may be talked to.
type Peer struct {
	ID      mesh.NodeID
	Key     mesh.KeyHash
	Addrs   []netip.AddrPort // from the domain state
	Learned []netip.AddrPort // where it was met before; tried too
}

// Event tells that a peer can (Up) or can no longer be talked to directly.
type Event struct {
	Peer mesh.NodeID
	Up   bool
}

// PeerInfo is how one peer stands now.
type PeerInfo struct {
	ID        mesh.NodeID
	Connected bool           // by a connection of its own
	Since     time.Time      // of Connected's present value
	Addr      netip.AddrPort // where it is, or was last met
	RTT       time.Duration  // smoothed; 0 when not connected
	MinRTT    time.Duration
	Via       mesh.NodeID // not connected, but a stream went through this connected node in the last minute
	Err       string      // not connected: why, as of the last attempt
	Refused   bool        // not connected: it says that we are not admitted
}

// Endpoint is a node's end of all its links. Its methods are safe for concurrent
// use; all may be called before Run, but nothing is connected until then.
type Endpoint struct {
	cfg   Config
	deps  Deps
	log   *slog.Logger
	nonce [16]byte // of this boot

	seq  atomic.Uint64 // numbers the connections that we dial
	half atomic.Int64  // incoming connections before their handshake's end

	datagrams chan Datagram
	joins     chan *JoinConn
	joinGate  joinGate
	notify    notifier

	// mu guards all below and the fields of peers and sessions that say so. It is a
	// leaf but for notifier.mu, and never held during I/O.
	mu       sync.Mutex
	self     mesh.NodeID
	peers    map[mesh.NodeID]*peer
	byKey    map[mesh.KeyHash]*peer
	services map[string]*Listener
	splices  map[mesh.NodeID]int // carried for others, by who asked
	carried  int                 // sum of splices
	routes   map[mesh.NodeID]routeAnswer
	joining  bool            // a JoinListener is open
	ctx      context.Context // of Run; nil before
	wg       *sync.WaitGroup // of Run: add under mu, and only while ctx lives
	tr       *quic.Transport
}

// New checks cfg and prepares an Endpoint. It starts nothing.
func New(cfg Config, deps Deps) (*Endpoint, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, err
	}
	if deps.Conn == nil || deps.Identity == nil || deps.Random == nil {
		return nil, errors.New("link: Conn, Identity and Random are needed")
	}
	e := &Endpoint{
		cfg: cfg, deps: deps, log: deps.Log,
		peers: map[mesh.NodeID]*peer{}, byKey: map[mesh.KeyHash]*peer{}, services: map[string]*Listener{},
		splices: map[mesh.NodeID]int{}, routes: map[mesh.NodeID]routeAnswer{},
		datagrams: make(chan Datagram, datagramBacklog), joins: make(chan *JoinConn, cfg.Joins),
	}
	if e.log == nil {
		e.log = slog.New(slog.DiscardHandler)
	}
	e.notify.signal = make(chan struct{}, 1)
	if _, err := io.ReadFull(deps.Random, e.nonce[:]); err != nil {
		return nil, fmt.Errorf("link: make boot nonce: %w", err)
	}
	return e, nil
}

// quicConfig is the one for both directions and all protocols: the listener cannot
// know yet what a connection is for.
func (e *Endpoint) quicConfig() *quic.Config {
	return &quic.Config{
		HandshakeIdleTimeout:  e.cfg.HandshakeTimeout,
		MaxIdleTimeout:        e.cfg.IdleTimeout,
		KeepAlivePeriod:       e.cfg.KeepAlive,
		MaxIncomingStreams:    int64(e.cfg.Streams),
		MaxIncomingUniStreams: maxUniStreams,
		EnableDatagrams:       true,
		// A peer can make us hold at most this much a connection; there are few peers.
		MaxStreamReceiveWindow:     6 << 20,
		MaxConnectionReceiveWindow: 15 << 20,
	}
}

// Incoming handshakes: from validateAbove on, addresses must be proven first
// (RFC 9000 section 8.1.2); from refuseAbove on, new ones are refused.
const (
	validateAbove = 64
	refuseAbove   = 512
)

type halfOpenKey struct{}

// Run serves until ctx ends, then closes every connection and returns nil; an error
// means that the socket could not be used. Nothing of it is left when it returns. It
// may be called once.
func (e *Endpoint) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	reset := quic.StatelessResetKey(e.deps.Identity.StatelessResetKey())
	tr := &quic.Transport{
		Conn:              e.deps.Conn,
		StatelessResetKey: &reset,
		// Eight bytes: stateless resets and strangers' packets collide with no connection.
		ConnectionIDLength:  8,
		VerifySourceAddress: func(net.Addr) bool { return e.half.Load() > validateAbove },
		ConnContext: func(ctx context.Context, _ *quic.ClientInfo) (context.Context, error) {
			if e.half.Add(1) > refuseAbove {
				e.half.Add(-1)
				return nil, ErrBusy
			}
			done := sync.OnceFunc(func() { e.half.Add(-1) })
			context.AfterFunc(ctx, done)
			return context.WithValue(ctx, halfOpenKey{}, done), nil
		},
	}
	ln, err := tr.Listen(e.deps.Identity.ServerTLS(e.check, alpnMesh, alpnJoin), e.quicConfig())
	if err != nil {
		tr.Close()
		return fmt.Errorf("link: listen: %w", err)
	}

	var wg sync.WaitGroup
	e.mu.Lock()
	if e.ctx != nil {
		e.mu.Unlock()
		ln.Close()
		tr.Close()
		return errors.New("link: Run was called twice")
	}
	e.ctx, e.wg, e.tr = ctx, &wg, tr
	for _, p := range e.peers {
		e.startPeer(p)
	}
	wg.Go(func() { e.notify.run(ctx, e.deps) })
	wg.Go(func() { e.acceptLoop(ctx, ln) })
	e.mu.Unlock()

	<-ctx.Done()

	// From here nobody adds to wg: ctx is looked at under mu.
	e.mu.Lock()
	var open []*session
	var spliced []*Conn
	for _, p := range e.peers {
		open = append(open, p.all()...)
		for c := range p.spliced {
			spliced = append(spliced, c)
		}
	}
	for _, l := range e.services {
		l.shut()
	}
	e.mu.Unlock()
	for _, c := range spliced {
		c.Reset()
	}
	closeAll(open, codeBye, "shutting down")
	ln.Close()
	err = tr.Close()
	wg.Wait()
	return err
}

// spawn runs f as part of Run, or not at all if Run is not in progress.
func (e *Endpoint) spawn(f func(context.Context)) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.spawnLocked(f)
}

func (e *Endpoint) spawnLocked(f func(context.Context)) bool {
	if e.ctx == nil || e.ctx.Err() != nil {
		return false
	}
	ctx := e.ctx
	e.wg.Go(func() { f(ctx) })
	return true
}

// check is asked in every incoming handshake.
func (e *Endpoint) check(alpn string, key mesh.KeyHash) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	switch {
	case alpn == alpnJoin && e.joining:
		return nil
	case alpn == alpnJoin:
		return errors.New("this node admits nobody")
	}
	return e.checkKey(key)
}

// checkKey needs e.mu.
func (e *Endpoint) checkKey(key mesh.KeyHash) error {
	if e.byKey[key] == nil {
		e.notify.unknown(key)
		return ErrNotAdmitted
	}
	return nil
}

func (e *Endpoint) acceptLoop(ctx context.Context, ln *quic.Listener) {
	for {
		conn, err := ln.Accept(ctx)
		if err != nil {
			return // only when ctx ends or the listener was closed
		}
		if done, ok := conn.Context().Value(halfOpenKey{}).(func()); ok {
			done()
		}
		// The accept queue is short (32): nothing may be done in this loop.
		if conn.ConnectionState().TLS.NegotiatedProtocol == alpnJoin {
			e.spawn(func(ctx context.Context) { e.acceptJoin(ctx, conn) })
		} else {
			e.spawn(func(ctx context.Context) { e.acceptMesh(ctx, conn) })
		}
	}
}

// SetPeers says who this node is and who may be talked to, all of them; the entry of
// this node itself is ignored. Who is no longer among them, or has another key, is
// cut off before SetPeers returns: connections are closed and streams through third
// nodes are reset. New ones are dialled at once.
func (e *Endpoint) SetPeers(self mesh.NodeID, peers []Peer) {
	e.mu.Lock()
	e.self = self
	var open []*session
	var spliced []*Conn
	var gone []*peer
	next := make(map[mesh.NodeID]Peer, len(peers))
	for _, n := range peers {
		if n.ID != 0 && n.ID != self && n.Key != e.deps.Identity.Hash() {
			next[n.ID] = n
		}
	}
	for id, p := range e.peers {
		if n, ok := next[id]; ok && n.Key == p.key {
			continue
		}
		open = append(open, p.all()...)
		for c := range p.spliced {
			spliced = append(spliced, c)
		}
		gone = append(gone, p)
		delete(e.peers, id)
		delete(e.byKey, p.key)
		delete(e.routes, id)
		p.removed = true
		p.stop()
		if p.up {
			p.up = false
			e.notify.event(Event{Peer: id})
		}
	}
	for _, n := range next {
		p := e.peers[n.ID]
		if p == nil {
			p = newPeer(n)
			e.peers[n.ID], e.byKey[n.Key] = p, p
			e.startPeer(p)
			continue
		}
		if p.setAddrs(n.Addrs, n.Learned) {
			p.poke()
		}
	}
	e.mu.Unlock()
	for _, c := range spliced {
		c.Reset()
	}
	if revokesAtOnce {
		closeAll(open, codeRevoked, "not admitted")
	}
	for _, p := range gone {
		e.log.Info("peer removed", "peer", p.id.String())
	}
}

// closeAll closes connections at the same time and waits for the packets that say
// so to be sent.
func closeAll(open []*session, code quic.ApplicationErrorCode, why string) {
	var wg sync.WaitGroup
	for _, s := range open {
		wg.Go(func() { s.conn.CloseWithError(code, why) })
	}
	wg.Wait()
}

// Hint says that a node is believed to be alive: if it is not connected it is
// dialled at once.
func (e *Endpoint) Hint(node mesh.NodeID) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if p := e.peers[node]; p != nil && !p.up {
		p.kick(hintGap)
	}
}

// doubtFor is how long Doubt holds: until a dead connection has been noticed.
const doubtFor = 15 * time.Second

// Doubt says that a stream to node has seen no progress for so long that its
// connection may be dead, though nothing has noticed yet: for a while, or until a
// new connection, streams go through a third node if one can reach it. The bulk
// connection takes no new streams of ours once it was doubted twice and nothing moved
// in it: a line that lost its packets, and only the large ones, leaves it alive with
// pauses of a minute between its attempts, where a new one is through as soon as the
// line is. On a slow line that is full something moves, and a new one would only be
// one more on it.
func (e *Endpoint) Doubt(node mesh.NodeID) {
	e.mu.Lock()
	defer e.mu.Unlock()
	p := e.peers[node]
	if p == nil || !p.up {
		return
	}
	p.doubtful = time.Now().Add(doubtFor)
	for _, s := range p.sessions[Bulk] {
		if time.Since(s.since) < doubtAge {
			continue
		}
		if heard := s.pace.heard.Load(); heard != s.heard || s.pace.stands() < doubtStands {
			s.doubts, s.heard = 0, heard
		}
		s.doubts++
		s.doubted = s.doubted || s.doubts > 1 && leavesDoubted
	}
}

// doubtAge is the least age of a bulk connection that is doubted: a younger one is
// not that in which nothing went on for so long.
const doubtAge = 5 * time.Second

// doubtStands is for how long nothing has moved in a connection that is left.
const doubtStands = 4 * time.Second

// Watch calls f for each peer that is up now and then whenever one goes up or down,
// until stop is called. A peer that goes down and up between two calls is told as up
// again. f is a callback like those of Deps.
func (e *Endpoint) Watch(f func(Event)) (stop func()) {
	e.mu.Lock()
	defer e.mu.Unlock()
	var up []Event
	for id, p := range e.peers {
		if p.up {
			up = append(up, Event{Peer: id, Up: true})
		}
	}
	return e.notify.watch(f, up)
}

// Peers tells how each peer stands, in no order.
func (e *Endpoint) Peers() []PeerInfo {
	e.mu.Lock()
	infos := make([]PeerInfo, 0, len(e.peers))
	conns := make([]*quic.Conn, 0, len(e.peers))
	for _, p := range e.peers {
		info := PeerInfo{ID: p.id, Connected: p.up, Since: p.since, Addr: p.lastAddr()}
		var conn *quic.Conn
		if s := p.current(Control); s != nil {
			conn = s.conn
		} else {
			if p.err != nil {
				info.Err, info.Refused = p.err.Error(), errors.Is(p.err, ErrNotAdmitted)
			}
			// A way through a node that is gone itself is none.
			if by := e.peers[p.via]; by != nil && by.up && time.Since(p.viaAt) < time.Minute {
				info.Via = p.via
			}
		}
		infos, conns = append(infos, info), append(conns, conn)
	}
	e.mu.Unlock()
	for i, c := range conns {
		if c != nil {
			st := c.ConnectionStats()
			infos[i].RTT, infos[i].MinRTT = st.SmoothedRTT, st.MinRTT
		}
	}
	return infos
}

// jitter returns d ± spread. It spreads load and decides nothing, so it needs no
// source of its own.
func jitter(d, spread time.Duration) time.Duration {
	return d - spread + rand.N(2*spread+1)
}
