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
	free time.Time // when the last packet given to it has left its sender
	last time.Time // when that packet arrives
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
	w.qualities[[2]netip.Addr{x, y}], w.qualities[[2]netip.Addr{y, x}] = &quality{Quality: q}, &quality{Quality: q}
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
		lost = q.Loss > 0 && w.dice.Float64() < q.Loss || q.Bandwidth > 0 && time.Until(q.free) > lineBuffer
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
	extra, q := w.lines[way].extra, w.qualities[way]
	if late := w.lines[way].late; late > 0 && w.dice.Float64() < late {
		return w.Latency + extra + time.Duration(w.dice.Int64N(int64(lateBy)))
	}
	if q == nil {
		return w.Latency + extra
	}
	now := time.Now()
	sent := now
	if q.Bandwidth > 0 {
		if q.free.After(now) {
			sent = q.free
		}
		sent = sent.Add(time.Duration(int64(len(p.Data)+28) * 8 * int64(time.Second) / q.Bandwidth)) // 28: IP and UDP headers
		q.free = sent
	}
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
