package simtest

import (
	"net"
	"net/netip"
	"slices"
	"time"

	"github.com/quic-go/quic-go/testutils/simnet"
)

// line is what is wrong with one direction between two addresses.
type line struct {
	cut   bool
	loss  float64       // 0 to 1
	extra time.Duration // on top of what the line takes anyway

	twice, late, flipped float64 // shares of the packets that come twice, up to lateBy after others, with a wrong bit
	mtu                  int     // longer ones are lost, bytes of UDP payload; 0: none is
}

// Quality is what a line between two offices is like on a good day. The zero
// value is World.Latency, and as many bytes as anybody likes.
type Quality struct {
	Latency   time.Duration // one way
	Jitter    time.Duration // up to so much more for each packet; packets keep their order
	Bandwidth int64         // bits a second, each way; 0: no limit
	Loss      float64       // share of the packets that get lost, 0 to 1
}

// quality is one direction of a line with what is in it now.
type quality struct {
	Quality
	pipe
	last time.Time // when the packet given to it last arrives
}

// pipe is what is narrow about a line: one packet leaves it after the other.
type pipe struct {
	bandwidth int64     // bits a second; 0: no limit
	free      time.Time // when the last packet given to it has left
}

// full reports whether a packet that comes at some time is lost.
func (p *pipe) full(at time.Time) bool { return p.bandwidth > 0 && p.free.Sub(at) > lineBuffer }

// pass takes a packet of so many bytes at some time and returns when all of it has left.
func (p *pipe) pass(at time.Time, bytes int) time.Time {
	if p.bandwidth == 0 {
		return at
	}
	if p.free.After(at) {
		at = p.free
	}
	p.free = at.Add(time.Duration(int64(bytes+headers) * 8 * int64(time.Second) / p.bandwidth))
	return p.free
}

// headers are IP's and UDP's on each packet, bytes.
const headers = 28

// uplink is an office's own line to the world, with what is in it now.
type uplink struct {
	up, down pipe // each of the same bandwidth
}

// lineBuffer is how long a packet waits at most before a narrow line; what
// comes then is lost, as in a router whose queue is full.
const lineBuffer = 300 * time.Millisecond

// lateBy is how much later a packet comes that others overtake.
const lateBy = 500 * time.Millisecond

// SetLine says what the line between two offices is like, both ways.
func (w *World) SetLine(a, b string, q Quality) {
	x, y := w.Office(a).Addr, w.Office(b).Addr
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, way := range [][2]netip.Addr{{x, y}, {y, x}} {
		w.qualities[way] = &quality{Quality: q, pipe: pipe{bandwidth: q.Bandwidth}}
	}
}

// SetUplink gives an office one line to the world, of so many bits a second each
// way, which all that it sends to other nodes shares, and all that it gets from
// them. It lies before the lines to the single offices (SetLine), and has their
// buffer at either end. Simulated TCP takes nothing of it: mail from and to the
// outside and the people in the office. Say so before the office starts.
func (w *World) SetUplink(office string, bandwidth int64) {
	w.note("%s's own line carries %d kbit/s", office, bandwidth/1000)
	a := w.Office(office).Addr
	w.mu.Lock()
	defer w.mu.Unlock()
	w.uplinks[a] = &uplink{up: pipe{bandwidth: bandwidth}, down: pipe{bandwidth: bandwidth}}
}

// landing is the far end of an office's uplink: packets come there as on any
// line, and wait for their turn to come in.
type landing struct {
	w    *World
	link *uplink
	node simnet.PacketReceiver
}

// RecvPacket implements simnet.PacketReceiver.
func (l *landing) RecvPacket(p simnet.Packet) {
	l.w.mu.Lock()
	lost := l.link.down.full(time.Now())
	l.w.mu.Unlock()
	if !lost {
		l.node.RecvPacket(p)
	}
}

// takes is how long a packet takes from the far end to the office. simnet asks
// once for each packet, in the order in which they came there.
func (l *landing) takes(p simnet.Packet) time.Duration {
	l.w.mu.Lock()
	defer l.w.mu.Unlock()
	return time.Until(l.link.down.pass(time.Now(), len(p.Data)))
}

// plug connects an office's machine to the network: its socket, a function to
// call once it may get packets, and one that ends it all.
func (o *Office) plug() (socket *simnet.SimConn, open, end func()) {
	w, addr := o.w, &net.UDPAddr{IP: o.Addr.AsSlice(), Port: 44337}
	w.mu.Lock()
	u := w.uplinks[o.Addr]
	w.mu.Unlock()
	gate := &gate{World: w}
	near := &simnet.Simnet{Router: gate}
	if u == nil {
		socket = near.NewEndpoint(addr, simnet.NodeBiDiLinkSettings{LatencyFunc: w.latency})
		near.Start()
		return socket, gate.open, func() { near.Close() }
	}
	land := &landing{w: w, link: u}
	socket = near.NewEndpoint(addr, simnet.NodeBiDiLinkSettings{LatencyFunc: land.takes})
	land.node = gate.node
	far := &simnet.SimulatedLink{LatencyFunc: w.latency}
	far.AddNode(addr, land)
	gate.node = far
	near.Start()
	far.Start()
	return socket, gate.open, func() { far.Close(); near.Close() }
}

// SendPacket implements simnet.Router: cut lines lose everything, lossy ones a
// share, narrow ones what does not fit.
func (w *World) SendPacket(p simnet.Packet) error {
	way := [2]netip.Addr{udpAddr(p.From), udpAddr(p.To)}
	w.mu.Lock()
	l := w.lines[way]
	share := func(s float64) bool { return s > 0 && w.dice.Float64() < s }
	lost := l.cut || share(l.loss) || l.mtu > 0 && len(p.Data) > l.mtu
	twice, flipped := share(l.twice), share(l.flipped)
	bit := w.dice.IntN(max(1, 8*len(p.Data)))
	if q := w.qualities[way]; q != nil && !lost {
		lost = q.Loss > 0 && w.dice.Float64() < q.Loss || q.full(time.Now())
	}
	if u := w.uplinks[way[0]]; u != nil && !lost {
		lost = u.up.full(time.Now())
	}
	w.mu.Unlock()
	if lost {
		return nil
	}
	if twice { // the first of the two is as it was sent
		w.PerfectRouter.SendPacket(simnet.Packet{To: p.To, From: p.From, Data: slices.Clone(p.Data)})
	}
	if flipped && len(p.Data) > 0 {
		p.Data = slices.Clone(p.Data)
		p.Data[bit/8] ^= 1 << (bit % 8)
	}
	w.PerfectRouter.SendPacket(p) // nobody there: lost, as on a real network
	return nil
}

// gate is the network as a new endpoint meets it: packets for it pass once it is
// open, since simnet makes an endpoint known before it can take one.
type gate struct {
	*World
	addr net.Addr
	node simnet.PacketReceiver
}

// AddNode implements simnet.Router.
func (g *gate) AddNode(addr net.Addr, node simnet.PacketReceiver) { g.addr, g.node = addr, node }

func (g *gate) open() { g.World.AddNode(g.addr, g.node) }

// latency is what a packet's line takes. simnet asks once for each packet, in
// the order in which they were sent.
func (w *World) latency(p simnet.Packet) time.Duration {
	way := [2]netip.Addr{udpAddr(p.From), udpAddr(p.To)}
	w.mu.Lock()
	defer w.mu.Unlock()
	now := time.Now()
	sent := now
	if u := w.uplinks[way[0]]; u != nil {
		sent = u.up.pass(now, len(p.Data))
	}
	extra, q := w.lines[way].extra, w.qualities[way]
	if late := w.lines[way].late; late > 0 && w.dice.Float64() < late {
		return sent.Sub(now) + w.Latency + extra + time.Duration(w.dice.Int64N(int64(lateBy)))
	}
	if q == nil {
		return sent.Sub(now) + w.Latency + extra
	}
	sent = q.pass(sent, len(p.Data))
	at := sent.Add(q.Latency + extra)
	if q.Jitter > 0 {
		at = at.Add(time.Duration(w.dice.Int64N(int64(q.Jitter) + 1)))
	}
	if at.Before(q.last) {
		at = q.last
	}
	q.last = at
	return at.Sub(now)
}

func udpAddr(a net.Addr) netip.Addr { return a.(*net.UDPAddr).AddrPort().Addr().Unmap() }
