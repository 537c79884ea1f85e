package gossip_test

import (
	"context"
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/quic-go/quic-go/testutils/simnet"

	"posthouse/mesh"
	"posthouse/mesh/gossip"
	"posthouse/mesh/identity"
	"posthouse/transport/link"
)

// world is n nodes that gossip over one of the networks below.
type world struct {
	t     *testing.T
	nodes []*node

	mu  sync.Mutex
	cut mesh.NodeID // nothing reaches or leaves it
}

func (w *world) setCut(id mesh.NodeID) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.cut = id
}

func (w *world) isCut(a, b mesh.NodeID) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.cut != 0 && (a == w.cut || b == w.cut)
}

type node struct {
	*gossip.Gossip
	id     mesh.NodeID
	cancel context.CancelFunc
	done   chan struct{}
	mu     sync.Mutex
	events []gossip.Event
}

func (n *node) start(w *world, network gossip.Network) {
	g, err := gossip.New(gossip.Config{Self: n.id, Tags: gossip.Tags{Version: "1.0", State: mesh.Serving, Boot: uint64(n.id)}}, gossip.Deps{
		Network: network,
		Events: func(e gossip.Event) {
			n.mu.Lock()
			defer n.mu.Unlock()
			n.events = append(n.events, e)
		},
	})
	if err != nil {
		w.t.Fatal(err)
	}
	n.Gossip = g
	ctx, cancel := context.WithCancel(context.Background())
	n.cancel, n.done = cancel, make(chan struct{})
	go func() {
		defer close(n.done)
		if err := g.Run(ctx); err != nil {
			w.t.Error(err)
		}
	}()
}

func (n *node) stop() {
	n.cancel()
	<-n.done
}

func (n *node) status(of mesh.NodeID) gossip.Status {
	for _, m := range n.Members() {
		if m.Node == of {
			return m.Status
		}
	}
	return ""
}

func (w *world) until(what string, limit time.Duration, cond func() bool) time.Duration {
	w.t.Helper()
	start := time.Now()
	for !cond() {
		if time.Since(start) > limit {
			w.t.Fatalf("not within %v: %s", limit, what)
		}
		time.Sleep(100 * time.Millisecond)
	}
	return time.Since(start)
}

// others reports whether all but the given node see it so.
func (w *world) others(id mesh.NodeID, want gossip.Status) bool {
	for _, n := range w.nodes {
		if n.id != id && n.status(id) != want {
			return false
		}
	}
	return true
}

func (w *world) allAlive() bool {
	for _, n := range w.nodes {
		if !w.others(n.id, gossip.Alive) {
			return false
		}
	}
	return true
}

// --- a network in memory

type packet struct {
	from mesh.NodeID
	b    []byte
}

type pipe struct {
	net.Conn
	peer mesh.NodeID
}

func (p pipe) Peer() mesh.NodeID    { return p.peer }
func (p pipe) RemoteAddr() net.Addr { return link.Addr(p.peer) }

var errCut = errors.New("the line is cut")

// overMemory starts n nodes on a network that loses nothing but what is cut.
func overMemory(t *testing.T, n int, f func(t *testing.T, w *world)) {
	synctest.Test(t, func(t *testing.T) {
		w := &world{t: t}
		nets := map[mesh.NodeID]*memNet{}
		for id := mesh.NodeID(1); id <= mesh.NodeID(n); id++ {
			nets[id] = &memNet{w: w, id: id, all: nets, packets: make(chan packet, 64), streams: make(chan gossip.Stream, 8)}
		}
		for id := mesh.NodeID(1); id <= mesh.NodeID(n); id++ {
			x := &node{id: id}
			x.start(w, nets[id])
			w.nodes = append(w.nodes, x)
		}
		w.play(f)
		for _, x := range w.nodes {
			x.stop()
		}
		time.Sleep(2 * time.Minute) // memberlist does not wait for its last probe
	})
}

// play admits all, says that all are connected, and runs the story.
func (w *world) play(f func(t *testing.T, w *world)) {
	synctest.Wait()
	for _, n := range w.nodes {
		w.admitAll(n)
		for _, m := range w.nodes {
			if m != n {
				n.SetPeerUp(m.id, true)
			}
		}
	}
	f(w.t, w)
}

func (w *world) admitAll(n *node) {
	var ids []mesh.NodeID
	for _, m := range w.nodes {
		ids = append(ids, m.id)
	}
	n.SetAdmitted(ids)
}

type memNet struct {
	w       *world
	id      mesh.NodeID
	all     map[mesh.NodeID]*memNet
	packets chan packet
	streams chan gossip.Stream
}

func (m *memNet) Addr(id mesh.NodeID) net.Addr { return link.Addr(id) }

func (m *memNet) SendDatagram(to mesh.NodeID, b []byte) error {
	if !m.w.isCut(m.id, to) && m.all[to] != nil {
		select {
		case m.all[to].packets <- packet{m.id, append([]byte(nil), b...)}:
		default:
		}
	}
	return nil
}

func (m *memNet) ReceiveDatagram(ctx context.Context) (mesh.NodeID, []byte, error) {
	select {
	case p := <-m.packets:
		return p.from, p.b, nil
	case <-ctx.Done():
		return 0, nil, ctx.Err()
	}
}

func (m *memNet) Dial(ctx context.Context, to mesh.NodeID) (net.Conn, error) {
	if m.w.isCut(m.id, to) || m.all[to] == nil {
		return nil, errCut
	}
	a, b := net.Pipe()
	select {
	case m.all[to].streams <- pipe{b, m.id}:
		return pipe{a, to}, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (m *memNet) Accept(ctx context.Context) (gossip.Stream, error) {
	select {
	case s := <-m.streams:
		return s, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// --- the real link, on a simulated network

type overLink struct {
	*link.Endpoint
	l *link.Listener
}

func (o overLink) Addr(id mesh.NodeID) net.Addr { return link.Addr(id) }

func (o overLink) Dial(ctx context.Context, to mesh.NodeID) (net.Conn, error) {
	return o.Endpoint.Dial(ctx, to, "gossip/1", link.Control)
}

func (o overLink) Accept(ctx context.Context) (gossip.Stream, error) { return o.l.Accept(ctx) }

type router struct {
	simnet.PerfectRouter
	w *world
}

func (r *router) SendPacket(p simnet.Packet) error {
	id := func(a net.Addr) mesh.NodeID { return mesh.NodeID(a.(*net.UDPAddr).IP.To4()[3]) }
	if !r.w.isCut(id(p.From), id(p.To)) {
		r.PerfectRouter.SendPacket(p)
	}
	return nil
}

type seeded struct{ b []byte }

func (s seeded) Read(p []byte) (int, error) { return copy(p, s.b), nil }

func overTheLink(t *testing.T, n int, f func(t *testing.T, w *world)) {
	synctest.Test(t, func(t *testing.T) {
		w := &world{t: t}
		sim := &simnet.Simnet{Router: &router{w: w}}
		var peers []link.Peer
		var keys []*identity.Key
		var socks []*simnet.SimConn
		for id := 1; id <= n; id++ {
			key, err := identity.Generate(seeded{binary.BigEndian.AppendUint64(make([]byte, 24), uint64(id))})
			if err != nil {
				t.Fatal(err)
			}
			addr := netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, 0, byte(id)}), 44337)
			keys = append(keys, key)
			socks = append(socks, sim.NewEndpoint(net.UDPAddrFromAddrPort(addr), simnet.NodeBiDiLinkSettings{Latency: 40 * time.Millisecond}))
			peers = append(peers, link.Peer{ID: mesh.NodeID(id), Key: key.Hash(), Addrs: []netip.AddrPort{addr}})
		}
		sim.Start()
		ctx, cancel := context.WithCancel(context.Background())
		var wg sync.WaitGroup
		for i, p := range peers {
			e, err := link.New(link.Config{}, link.Deps{Conn: socks[i], Identity: keys[i], Random: seeded{[]byte{byte(i), 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}}})
			if err != nil {
				t.Fatal(err)
			}
			e.SetPeers(p.ID, peers)
			l, err := e.Listen("gossip/1")
			if err != nil {
				t.Fatal(err)
			}
			x := &node{id: p.ID}
			x.start(w, overLink{e, l})
			e.Watch(func(ev link.Event) { x.SetPeerUp(ev.Peer, ev.Up) })
			w.nodes = append(w.nodes, x)
			wg.Go(func() {
				if err := e.Run(ctx); err != nil {
					t.Error(err)
				}
			})
		}
		for _, x := range w.nodes {
			w.admitAll(x)
		}
		synctest.Wait()
		f(t, w)
		for _, x := range w.nodes {
			x.stop()
		}
		cancel()
		wg.Wait()
		time.Sleep(2 * time.Minute) // memberlist does not wait for its last probe
		for _, s := range socks {
			s.Close()
		}
		sim.Close()
	})
}

func both(t *testing.T, n int, f func(t *testing.T, w *world)) {
	t.Run("over memory", func(t *testing.T) { overMemory(t, n, f) })
	t.Run("over the link", func(t *testing.T) { overTheLink(t, n, f) })
}

func TestFiveNodesFindEachOtherAndNoticeACutAndAHeal(t *testing.T) {
	both(t, 5, func(t *testing.T, w *world) {
		w.until("all alive", 20*time.Second, w.allAlive)
		time.Sleep(time.Minute)
		w.setCut(3)
		d := w.until("3 is marked failed", 30*time.Second, func() bool { return w.others(3, gossip.Failed) })
		t.Logf("failed after %v", d)
		if d > 20*time.Second {
			t.Errorf("marked failed only after %v", d)
		}
		time.Sleep(30 * time.Minute)
		w.setCut(0)
		t.Logf("healed after %v", w.until("all alive again", 45*time.Second, w.allAlive))
		n := w.nodes[0]
		n.mu.Lock()
		var of3 []gossip.Status
		for _, e := range n.events {
			if e.Node == 3 {
				of3 = append(of3, e.Status)
			}
		}
		n.mu.Unlock()
		if diff := cmp.Diff([]gossip.Status{gossip.Alive, gossip.Failed, gossip.Alive}, of3); diff != "" {
			t.Errorf("events about 3:\n%s", diff)
		}
		if _, ok := n.RTT(2); !ok {
			t.Error("no estimate of the round trip")
		}
	})
}

func TestTagsSpreadAndGoodbyesAreToldApart(t *testing.T) {
	both(t, 3, func(t *testing.T, w *world) {
		w.until("all alive", 20*time.Second, w.allAlive)
		a := w.nodes[0]
		want := gossip.Tags{Version: "1.1", State: mesh.Draining, Boot: 7, Digests: map[string]uint64{"pub": 1 << 40}}
		if err := a.SetTags(want); err != nil {
			t.Fatal(err)
		}
		w.until("the tags are everywhere", 5*time.Second, func() bool {
			for _, n := range w.nodes {
				for _, m := range n.Members() {
					if m.Node == a.id && !cmp.Equal(m.Tags, want) {
						return false
					}
				}
			}
			return true
		})
		if err := a.Leave(); err != nil {
			t.Fatal(err)
		}
		w.until("a has left", 5*time.Second, func() bool { return w.others(a.id, gossip.Left) })
	})
}

func TestWhoIsNotAdmittedIsNotBelievedIn(t *testing.T) {
	both(t, 3, func(t *testing.T, w *world) {
		a, b := w.nodes[0], w.nodes[1]
		b.SetAdmitted([]mesh.NodeID{1, 2})
		time.Sleep(20 * time.Second)
		if a.status(3) != gossip.Alive || b.status(3) != "" || b.status(1) != gossip.Alive {
			t.Errorf("a sees %q, b sees %q", a.status(3), b.status(3))
		}
		// Removed later: shown no more at once, and forgotten when it has failed.
		a.SetAdmitted([]mesh.NodeID{1, 2})
		if a.status(3) != "" {
			t.Error("a removed node is still shown")
		}
		w.setCut(3)
		time.Sleep(time.Minute)
		w.admitAll(a)
		if got := a.status(3); got != "" {
			t.Errorf("not forgotten: %q", got)
		}
	})
}

func TestTagsAreBounded(t *testing.T) {
	g, err := gossip.New(gossip.Config{Self: 1}, gossip.Deps{Network: &memNet{}})
	if err != nil {
		t.Fatal(err)
	}
	long := map[string]uint64{}
	for i := range 100 {
		long[string(rune('a'+i%26))+string(rune('a'+i/26))] = 1 << 60
	}
	for name, tags := range map[string]gossip.Tags{
		"a long version": {Version: string(make([]byte, 65))},
		"many digests":   {Digests: long},
	} {
		if g.SetTags(tags) == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	if len(g.Members()) != 0 {
		t.Error("members without Run")
	}
	if err := g.Leave(); err != nil {
		t.Error(err)
	}
	if _, ok := g.RTT(2); ok {
		t.Error("a round trip without Run")
	}
}
