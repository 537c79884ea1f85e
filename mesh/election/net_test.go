package election

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"time"

	"posthouse/mesh"
)

// simNet is a network of nodes whose lines have a latency and can be cut. A cut
// swallows what is under way; what ran over it dies of silence after idle.
type simNet struct {
	mu    sync.Mutex
	hosts map[mesh.NodeID]*simHost
	cuts  map[[2]mesh.NodeID]bool
	lines map[*simLine]struct{}
}

const (
	simLatency = 40 * time.Millisecond
	simIdle    = 12 * time.Second
)

type simHost struct {
	net *simNet
	id  mesh.NodeID
	in  chan simCall
	up  bool
	e   *Election
}

type simCall struct {
	conn net.Conn
	from mesh.NodeID
}

type simLine struct {
	key  [2]mesh.NodeID
	ends [2]*simConn
	dead bool
}

func newSimNet() *simNet {
	return &simNet{hosts: map[mesh.NodeID]*simHost{}, cuts: map[[2]mesh.NodeID]bool{}, lines: map[*simLine]struct{}{}}
}

func pair(a, b mesh.NodeID) [2]mesh.NodeID { return [2]mesh.NodeID{min(a, b), max(a, b)} }

func (n *simNet) host(id mesh.NodeID) *simHost {
	n.mu.Lock()
	defer n.mu.Unlock()
	h := &simHost{net: n, id: id, in: make(chan simCall, 32), up: true}
	n.hosts[id] = h
	return h
}

func (n *simNet) cut(a, b mesh.NodeID, cut bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.cuts[pair(a, b)] = cut
	if cut {
		for l := range n.lines {
			if l.key == pair(a, b) {
				n.kill(l)
			}
		}
	}
}

func (n *simNet) kill(l *simLine) {
	l.dead = true
	time.AfterFunc(simIdle, func() { l.ends[0].end(io.ErrUnexpectedEOF); l.ends[1].end(io.ErrUnexpectedEOF) })
}

func (n *simNet) open(a, b mesh.NodeID) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.openLocked(a, b)
}

func (n *simNet) openLocked(a, b mesh.NodeID) bool {
	return !n.cuts[pair(a, b)] && n.hosts[a] != nil && n.hosts[a].up && n.hosts[b] != nil && n.hosts[b].up
}

// down stops a host: its lines break at once.
func (h *simHost) down() {
	h.net.mu.Lock()
	h.up = false
	var ends []*simConn
	for l := range h.net.lines {
		if l.key[0] == h.id || l.key[1] == h.id {
			ends = append(ends, l.ends[:]...)
		}
	}
	h.net.mu.Unlock()
	for _, c := range ends {
		c.end(io.ErrUnexpectedEOF)
	}
}

var errNoLine = errors.New("no connection to that node")

func (h *simHost) Dial(ctx context.Context, to mesh.NodeID) (net.Conn, error) {
	select {
	case <-time.After(simLatency):
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	h.net.mu.Lock()
	defer h.net.mu.Unlock()
	if !h.net.openLocked(h.id, to) {
		return nil, errNoLine
	}
	l := &simLine{key: pair(h.id, to)}
	l.ends[0], l.ends[1] = newSimConn(h.net, l), newSimConn(h.net, l)
	l.ends[0].peer, l.ends[1].peer = l.ends[1], l.ends[0]
	select {
	case h.net.hosts[to].in <- simCall{l.ends[1], h.id}:
	default:
		return nil, errNoLine
	}
	h.net.lines[l] = struct{}{}
	return l.ends[0], nil
}

func (h *simHost) Accept(ctx context.Context) (net.Conn, mesh.NodeID, error) {
	select {
	case c := <-h.in:
		return c.conn, c.from, nil
	case <-ctx.Done():
		return nil, 0, ctx.Err()
	}
}

func (h *simHost) Forward(ctx context.Context, to mesh.NodeID, req []byte) ([]byte, error) {
	if err := h.cross(ctx, to); err != nil {
		return nil, err
	}
	h.net.mu.Lock()
	e := h.net.hosts[to].e
	h.net.mu.Unlock()
	rep := e.HandleForward(h.id, req)
	return rep, h.cross(ctx, to)
}

// cross takes a message over the line, or fails when it goes nowhere.
func (h *simHost) cross(ctx context.Context, to mesh.NodeID) error {
	if h.net.open(h.id, to) {
		time.Sleep(simLatency)
		return nil
	}
	select {
	case <-ctx.Done():
	case <-time.After(2 * time.Second):
	}
	return errNoLine
}

// simConn is one end of a line: what is written arrives a latency later.
type simConn struct {
	net  *simNet
	line *simLine
	peer *simConn

	mu       sync.Mutex
	queue    []simChunk
	err      error
	deadline time.Time
	changed  chan struct{}
}

type simChunk struct {
	at   time.Time
	data []byte
}

func newSimConn(n *simNet, l *simLine) *simConn {
	return &simConn{net: n, line: l, changed: make(chan struct{})}
}

func (c *simConn) wakeLocked() { close(c.changed); c.changed = make(chan struct{}) }

func (c *simConn) end(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err == nil {
		c.err = err
		c.wakeLocked()
	}
}

func (c *simConn) Read(b []byte) (int, error) {
	for {
		c.mu.Lock()
		now := time.Now()
		var wait <-chan time.Time
		until := time.Time{}
		if len(c.queue) > 0 {
			if q := &c.queue[0]; !q.at.After(now) {
				n := copy(b, q.data)
				if q.data = q.data[n:]; len(q.data) == 0 {
					c.queue = c.queue[1:]
				}
				c.mu.Unlock()
				return n, nil
			}
			until = c.queue[0].at
		} else if c.err != nil {
			err := c.err
			c.mu.Unlock()
			return 0, err
		}
		if !c.deadline.IsZero() {
			if !c.deadline.After(now) {
				c.mu.Unlock()
				return 0, os.ErrDeadlineExceeded
			}
			if until.IsZero() || c.deadline.Before(until) {
				until = c.deadline
			}
		}
		changed := c.changed
		c.mu.Unlock()
		var t *time.Timer
		if !until.IsZero() {
			t = time.NewTimer(until.Sub(now))
			wait = t.C
		}
		select {
		case <-changed:
		case <-wait:
		}
		if t != nil {
			t.Stop()
		}
	}
}

func (c *simConn) Write(b []byte) (int, error) {
	c.mu.Lock()
	err := c.err
	c.mu.Unlock()
	if err != nil {
		return 0, err
	}
	c.net.mu.Lock()
	dead := c.line.dead
	c.net.mu.Unlock()
	if dead {
		return len(b), nil
	}
	p := c.peer
	p.mu.Lock()
	defer p.mu.Unlock()
	p.queue = append(p.queue, simChunk{time.Now().Add(simLatency), append([]byte(nil), b...)})
	p.wakeLocked()
	return len(b), nil
}

func (c *simConn) Close() error {
	c.net.mu.Lock()
	dead := c.line.dead
	delete(c.net.lines, c.line)
	c.net.mu.Unlock()
	c.end(net.ErrClosed)
	if !dead {
		c.peer.end(io.EOF)
	}
	return nil
}

func (c *simConn) LocalAddr() net.Addr  { return nodeAddr(c.line.key[0]) }
func (c *simConn) RemoteAddr() net.Addr { return nodeAddr(c.line.key[1]) }
func (c *simConn) SetDeadline(t time.Time) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.deadline = t
	c.wakeLocked()
	return nil
}
func (c *simConn) SetReadDeadline(t time.Time) error { return c.SetDeadline(t) }
func (c *simConn) SetWriteDeadline(time.Time) error  { return nil }
