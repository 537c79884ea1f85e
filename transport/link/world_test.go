package link

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/quic-go/quic-go/testutils/simnet"

	"posthouse/mesh"
	"posthouse/mesh/identity"
)

// world is a few nodes on a simulated network, inside a bubble.
type world struct {
	t     *testing.T
	nodes []*node

	mu  sync.Mutex
	cut func(from, to netip.AddrPort) bool
	tap func(simnet.Packet)
	simnet.PerfectRouter
}

// latency is one way, so a round trip takes twice that.
const latency = 10 * time.Millisecond

func (w *world) SendPacket(p simnet.Packet) error {
	w.mu.Lock()
	cut, tap := w.cut, w.tap
	w.mu.Unlock()
	if tap != nil {
		tap(p)
	}
	if cut != nil && cut(addrPort(p.From), addrPort(p.To)) {
		return nil
	}
	w.PerfectRouter.SendPacket(p) // nobody there: lost, as on a real network
	return nil
}

func addrPort(a net.Addr) netip.AddrPort {
	ap := a.(*net.UDPAddr).AddrPort()
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
}

type node struct {
	*Endpoint
	w      *world
	id     mesh.NodeID
	key    *identity.Key
	addr   netip.AddrPort
	net    *simnet.Simnet // its line
	sock   *simnet.SimConn
	facts  Facts
	cancel context.CancelFunc
	done   chan struct{}

	mu      sync.Mutex
	events  []string // "up 2", "down 2", with the virtual time before
	unknown []mesh.KeyHash
	learned []netip.AddrPort
	started time.Time
}

type seed byte

func (s *seed) Read(p []byte) (int, error) {
	for i := range p {
		p[i] = byte(*s)
		*s += 7
	}
	return len(p), nil
}

func keyOf(id mesh.NodeID) *identity.Key {
	b := binary.BigEndian.AppendUint64(make([]byte, 24), uint64(id))
	k, err := identity.Generate(&fixed{b})
	if err != nil {
		panic(err)
	}
	return k
}

type fixed struct{ b []byte }

func (f *fixed) Read(p []byte) (int, error) { return copy(p, f.b), nil }

func addrOfNode(id mesh.NodeID) netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, byte(id >> 8), byte(id)}), 44337)
}

// run makes a bubble with n nodes, numbered from 1, that know each other but are not
// started, and checks at the end that nothing is left over.
func run(t *testing.T, n int, f func(t *testing.T, w *world)) {
	synctest.Test(t, func(t *testing.T) {
		w := &world{t: t}
		for i := range n {
			w.nodes = append(w.nodes, w.make(mesh.NodeID(i+1), addrOfNode(mesh.NodeID(i+1)), 1))
		}
		for _, n := range w.nodes {
			n.SetPeers(n.id, w.peers())
		}
		f(t, w)
		for _, n := range w.nodes {
			n.stop()
		}
	})
}

var bootNonce = func() func() io.Reader {
	var mu sync.Mutex
	var s seed
	return func() io.Reader {
		mu.Lock()
		defer mu.Unlock()
		s++
		one := s
		return &one
	}
}()

func (w *world) make(id mesh.NodeID, addr netip.AddrPort, boot uint64) *node {
	return w.makeOn(id, addr, boot, simnet.NodeBiDiLinkSettings{Latency: latency})
}

func (w *world) makeOn(id mesh.NodeID, addr netip.AddrPort, boot uint64, line simnet.NodeBiDiLinkSettings) *node {
	n := &node{w: w, id: id, key: keyOf(id), addr: addr, facts: Facts{BootCount: boot, LogEnd: 100 * boot, Lineage: []byte("L1")}}
	n.net = &simnet.Simnet{Router: w}
	n.sock = n.net.NewEndpoint(udp(addr), line)
	n.net.Start()
	n.build(Config{}, nil)
	return n
}

func (n *node) build(cfg Config, meet func(mesh.NodeID, Facts) error) {
	e, err := New(cfg, Deps{
		Conn: n.sock, Identity: n.key, Random: bootNonce(), Log: slog.New(slog.DiscardHandler),
		Facts: func() Facts {
			n.mu.Lock()
			defer n.mu.Unlock()
			return n.facts
		},
		Meet: meet,
		Unknown: func(k mesh.KeyHash) {
			n.mu.Lock()
			defer n.mu.Unlock()
			n.unknown = append(n.unknown, k)
		},
		Learned: func(_ mesh.NodeID, a netip.AddrPort) {
			n.mu.Lock()
			defer n.mu.Unlock()
			n.learned = append(n.learned, a)
		},
	})
	if err != nil {
		n.w.t.Fatal(err)
	}
	n.Endpoint = e
	e.Watch(func(ev Event) {
		n.mu.Lock()
		defer n.mu.Unlock()
		what := "down"
		if ev.Up {
			what = "up"
		}
		n.events = append(n.events, fmt.Sprintf("%s %d", what, ev.Peer))
	})
}

func (w *world) peers(except ...mesh.NodeID) (ps []Peer) {
	for _, n := range w.nodes {
		if !slices.Contains(except, n.id) {
			ps = append(ps, Peer{ID: n.id, Key: n.key.Hash(), Addrs: []netip.AddrPort{n.addr}})
		}
	}
	return ps
}

func (n *node) start() {
	ctx, cancel := context.WithCancel(context.Background())
	n.cancel, n.done, n.started = cancel, make(chan struct{}), time.Now()
	go func() {
		defer close(n.done)
		if err := n.Run(ctx); err != nil {
			n.w.t.Error(err)
		}
	}()
}

func (n *node) stop() {
	if n.cancel != nil {
		n.cancel()
		<-n.done
		n.cancel = nil
	}
	if n.net != nil {
		n.w.RemoveNode(udp(n.addr))
		n.sock.Close()
		n.net.Close()
		n.net = nil
	}
}

// reboot kills a node without a word and starts it anew at addr.
func (w *world) reboot(i int, addr netip.AddrPort, boot uint64) *node {
	old := w.nodes[i]
	w.setCut(func(from, to netip.AddrPort) bool { return from == old.addr }) // its goodbye is not heard
	old.stop()
	w.setCut(nil)
	n := w.make(old.id, addr, boot)
	w.nodes[i] = n
	n.SetPeers(n.id, w.peers())
	n.start()
	return n
}

func (w *world) startAll() {
	for _, n := range w.nodes {
		n.start()
	}
	synctest.Wait()
}

func (w *world) setCut(f func(from, to netip.AddrPort) bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.cut = f
}

// cutBetween loses everything between a and b.
func (w *world) cutBetween(a, b *node) {
	w.setCut(func(from, to netip.AddrPort) bool {
		return from == a.addr && to == b.addr || from == b.addr && to == a.addr
	})
}

func (n *node) up(id mesh.NodeID) bool {
	for _, p := range n.Peers() {
		if p.ID == id {
			return p.Connected
		}
	}
	return false
}

// until waits for cond in steps of a millisecond of virtual time and returns how
// long it took.
func (w *world) until(what string, limit time.Duration, cond func() bool) time.Duration {
	w.t.Helper()
	start := time.Now()
	for !cond() {
		if time.Since(start) > limit {
			w.t.Fatalf("not within %v: %s", limit, what)
		}
		time.Sleep(time.Millisecond)
	}
	synctest.Wait()
	return time.Since(start)
}

// connected waits until every node that runs is connected to every other.
func (w *world) connected() time.Duration {
	return w.until("all connected", 10*time.Second, func() bool {
		for _, a := range w.nodes {
			for _, b := range w.nodes {
				if a != b && a.cancel != nil && b.cancel != nil && !a.up(b.id) {
					return false
				}
			}
		}
		return true
	})
}

// seen is a copy of what n was told by callbacks.
func (n *node) seen() (events []string, unknown []mesh.KeyHash, learned []netip.AddrPort) {
	n.mu.Lock()
	defer n.mu.Unlock()
	return slices.Clone(n.events), slices.Clone(n.unknown), slices.Clone(n.learned)
}

func (n *node) sessions(id mesh.NodeID) (all []*session) {
	n.Endpoint.mu.Lock()
	defer n.Endpoint.mu.Unlock()
	return n.peers[id].all()
}

func (n *node) listen(name string) *Listener {
	n.w.t.Helper()
	l, err := n.Listen(name)
	if err != nil {
		n.w.t.Fatal(err)
	}
	return l
}

// echo offers a service that returns what it gets.
func (n *node) echo(ctx context.Context, name string) {
	l := n.listen(name)
	go func() {
		for {
			c, err := l.Accept(ctx)
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				io.Copy(c, c)
				c.CloseWrite()
			}()
		}
	}()
}

// call sends msg to an echo and returns the answer.
func (n *node) call(to mesh.NodeID, name string, class Class, msg string) (string, mesh.NodeID, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	c, err := n.Dial(ctx, to, name, class)
	if err != nil {
		return "", 0, err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(10 * time.Second))
	if _, err := io.WriteString(c, msg); err != nil {
		return "", c.Via(), err
	}
	if err := c.CloseWrite(); err != nil {
		return "", c.Via(), err
	}
	b, err := io.ReadAll(c)
	return string(b), c.Via(), err
}

func wantErr(t *testing.T, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("got %v, want %v", err, want)
	}
}

func udp(a netip.AddrPort) *net.UDPAddr { return net.UDPAddrFromAddrPort(a) }
