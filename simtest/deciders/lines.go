package deciders

import (
	"time"

	"posthouse/transport/relay"
)

// links is the model of the lines between nodes: who reaches whom, how long a
// frame takes, and streams that keep their frames in order.
type links struct {
	w    *world
	cut  [][]int // from, to: how many faults cut it
	slow []time.Duration
	// narrow is how long a message is on its way over a node's lines beside that, at
	// most: the next comes behind it.
	narrow []time.Duration
	base   [][]time.Duration
	up     [][]bool // a connection stands
	topo   uint64   // grows when anything changes
}

func newLinks(w *world) *links {
	n := w.plan.Nodes
	l := &links{w: w, slow: make([]time.Duration, n), narrow: make([]time.Duration, n)}
	for i := range n {
		l.cut = append(l.cut, make([]int, n))
		l.up = append(l.up, make([]bool, n))
		l.base = append(l.base, make([]time.Duration, n))
		for k := range i {
			d := time.Millisecond + time.Duration(w.net.Int64N(int64(w.plan.Latency)))
			l.base[i][k], l.base[k][i] = d, d
		}
	}
	return l
}

// set adds n cuts to the lines from a to b, given as bits.
func (l *links) set(a, b uint64, n int, oneWay bool) {
	for i := range l.cut {
		for k := range l.cut {
			if i == k || a>>i&1 == 0 || b>>k&1 == 0 {
				continue
			}
			l.cut[i][k] += n
			if !oneWay {
				l.cut[k][i] += n
			}
		}
	}
	l.changed()
}

func (l *links) calm() {
	for i := range l.cut {
		clear(l.cut[i])
		l.slow[i], l.narrow[i] = 0, 0
	}
	l.changed()
}

// usable reports whether two nodes can talk to each other directly.
func (l *links) usable(a, b int) bool {
	return l.cut[a][b] == 0 && l.cut[b][a] == 0 && !l.apart(a, b) && l.w.nodes[a].runs() && l.w.nodes[b].runs()
}

// changed looks at all lines: what can be dialled again is, within seconds.
func (l *links) changed() {
	l.topo++
	l.w.mesh.touch()
	for a := range l.cut {
		for b := range a {
			if !l.usable(a, b) {
				l.up[a][b], l.up[b][a] = false, false
				continue
			}
			if l.up[a][b] {
				continue
			}
			l.w.after(time.Duration(l.w.net.Int64N(int64(4*time.Second))), func() {
				if l.up[a][b] || !l.usable(a, b) {
					return
				}
				l.up[a][b], l.up[b][a] = true, true
				l.topo++
				l.w.mesh.spread()
				l.w.nodes[a].peerUp(l.w.nodes[b])
				l.w.nodes[b].peerUp(l.w.nodes[a])
			})
		}
	}
	l.w.mesh.spread()
}

// way returns the nodes on the way from a to b: directly, or through a third
// that has a connection to both; nil: none.
func (l *links) way(a, b int) []int {
	if l.usable(a, b) {
		return []int{a, b}
	}
	if l.apart(a, b) {
		return nil
	}
	for c := range l.cut {
		if c != a && c != b && l.up[a][c] && l.up[c][b] && l.usable(a, c) && l.usable(c, b) {
			return []int{a, c, b}
		}
	}
	return nil
}

// open reports whether a frame passes along a way now.
func (l *links) open(way []int) bool {
	if l.apart(way[0], way[len(way)-1]) {
		return false
	}
	for i := range way[1:] {
		if l.cut[way[i]][way[i+1]] > 0 || l.apart(way[i], way[i+1]) || !l.w.nodes[way[i]].runs() || !l.w.nodes[way[i+1]].runs() {
			return false
		}
	}
	return true
}

func (l *links) delay(way []int) time.Duration {
	d := time.Duration(0)
	for i := range way[1:] {
		a, b := way[i], way[i+1]
		d += l.base[a][b] + l.slow[a] + l.slow[b]
	}
	if l.w.plan.Lossy && l.w.net.IntN(20) == 0 { // sent again
		d += d + time.Duration(l.w.net.Int64N(int64(2*time.Second)))
	}
	return d
}

// transit is how long the bytes of a message take along a way.
func (l *links) transit(way []int) time.Duration {
	most := time.Duration(0)
	for _, i := range way {
		most = max(most, l.narrow[i])
	}
	if most == 0 {
		return 0
	}
	return time.Duration(l.w.net.Int64N(int64(most)))
}

// patience is how long a client waits for a sign of life.
const patience = 5 * time.Second

// stream carries frames both ways, each way in order, as long as the client
// keeps it open.
type stream struct {
	w              *world
	client, server *node
	cboot, sboot   int
	way            []int
	there, back    lane
	closed         bool // by the client: nothing is sent again
	heard          time.Duration
	work           int // frames that the server has not answered
	waits          int // frames that the client waits for
	watched        bool
	failed         func(error)

	holds relay.Holds // at the server
}

type lane struct {
	frames []frame
	moving bool
	filled time.Duration // until then bytes of messages are on their way
}

type frame struct {
	at time.Duration // not before
	do func()
}

// dial opens a stream and calls ready when it stands, or failed.
func (l *links) dial(c, s *node, ready func(*stream), failed func()) {
	boot := c.boot
	if c.refuses(s) || c.suspects(s) {
		l.w.after(time.Millisecond, func() { c.step(boot, failed) })
		return
	}
	way := l.way(c.i, s.i)
	if way == nil {
		l.w.after(patience, func() { c.step(boot, failed) })
		return
	}
	l.w.after(2*l.delay(way), func() {
		if !l.open(way) || !l.open(reversed(way)) || c.refuses(s) || c.suspects(s) || s.suspects(c) {
			l.w.after(patience, func() { c.step(boot, failed) })
			return
		}
		st := &stream{w: l.w, client: c, server: s, cboot: boot, sboot: s.boot, way: way, heard: l.w.now}
		c.step(boot, func() { ready(st) })
	})
}

func reversed(way []int) []int {
	out := make([]int, len(way))
	for i, n := range way {
		out[len(way)-1-i] = n
	}
	return out
}

// send sends a message, which the server answers.
func (s *stream) send(do func()) {
	s.there.filled = max(s.there.filled, s.w.now) + s.w.links.transit(s.way)
	s.ask(do)
}

// ask sends a frame that the server answers.
func (s *stream) ask(do func()) {
	s.waits++
	s.watch()
	s.there.push(s, s.way, func() {
		s.server.step(s.sboot, func() {
			s.work++
			do()
		})
	})
}

// tell sends a frame that nobody waits for.
func (s *stream) tell(do func()) {
	s.there.push(s, s.way, func() { s.server.step(s.sboot, do) })
}

// answer sends the server's answer, once its disk has it; goes, if any, is told when.
func (s *stream) answer(goes, do func()) {
	boot := s.sboot
	s.w.after(s.server.syncTime(), func() {
		if s.server.boot != boot || !s.server.up {
			return
		}
		s.work--
		if goes != nil {
			goes()
		}
		s.back.push(s, reversed(s.way), func() {
			s.client.step(s.cboot, func() {
				if s.closed {
					return
				}
				s.heard = s.w.now
				s.waits--
				do()
			})
		})
	})
}

func (la *lane) push(s *stream, way []int, do func()) {
	la.frames = append(la.frames, frame{max(s.w.now, la.filled) + s.w.links.delay(way), do})
	if !la.moving {
		la.move(s, way)
	}
}

func (la *lane) move(s *stream, way []int) {
	la.moving = len(la.frames) > 0
	if !la.moving {
		return
	}
	s.w.after(la.frames[0].at-s.w.now, func() { la.arrive(s, way) })
}

func (la *lane) arrive(s *stream, way []int) {
	if s.client.boot != s.cboot || s.server.boot != s.sboot {
		la.frames, la.moving = nil, false
		return
	}
	if !s.w.links.open(way) {
		if s.closed {
			la.frames, la.moving = nil, false
			return
		}
		s.w.after(500*time.Millisecond, func() { la.arrive(s, way) })
		return
	}
	f := la.frames[0]
	la.frames = la.frames[1:]
	f.do()
	la.move(s, way)
}

// watch fails the stream when nothing is heard for too long.
func (s *stream) watch() {
	if s.watched {
		return
	}
	s.watched = true
	s.heard = s.w.now
	s.w.after(patience, s.check)
}

func (s *stream) check() {
	if s.closed || s.waits == 0 || s.client.boot != s.cboot {
		s.watched = false
		return
	}
	alive := s.server.boot == s.sboot && s.server.runs() && s.w.links.open(s.way) && s.w.links.open(reversed(s.way))
	if alive && (s.work > 0 || s.w.now < s.there.filled) { // it says "wait", or bytes go out
		s.heard = s.w.now
	}
	if left := s.heard + patience - s.w.now; left > 0 {
		s.w.after(left, s.check)
		return
	}
	s.watched = false
	s.client.step(s.cboot, func() {
		if !s.closed {
			s.closed = true
			s.failed(errSilent)
		}
	})
}
