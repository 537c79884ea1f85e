// Package bufpipe is a pair of connected net.Conns with buffers, deadlines and
// half-close, for tests of wire protocols in synctest bubbles: unlike net.Pipe
// a write returns at once, as it does on a socket. Only tests import it.
package bufpipe

import (
	"io"
	"net"
	"os"
	"sync"
	"time"
)

// New returns the two ends, which name each other by those addresses.
func New(a, b net.Addr) (*Conn, *Conn) {
	ab, ba := newHalf(), newHalf()
	return &Conn{in: ba, out: ab, local: a, remote: b}, &Conn{in: ab, out: ba, local: b, remote: a}
}

// Conn is one end.
type Conn struct {
	in, out       *half
	local, remote net.Addr
}

// half is one direction.
type half struct {
	mu     sync.Mutex
	cond   *sync.Cond
	buf    []byte
	eof    bool  // the writer has finished
	broken error // nobody reads any more, or the reader is gone
	limit  int   // the writer waits beyond it; 0: never
	rd, wr time.Time
	rt, wt *time.Timer
	rn     int // largest read; 0: any
}

func newHalf() *half {
	h := &half{}
	h.cond = sync.NewCond(&h.mu)
	return h
}

// SetWindow makes writes to this end's peer wait while more than n bytes are
// unread.
func (c *Conn) SetWindow(n int) { c.out.mu.Lock(); c.out.limit = n; c.out.mu.Unlock() }

// SetReadMax makes each Read return at most n bytes.
func (c *Conn) SetReadMax(n int) { c.in.mu.Lock(); c.in.rn = n; c.in.mu.Unlock() }

// Read implements net.Conn.
func (c *Conn) Read(p []byte) (int, error) {
	h := c.in
	h.mu.Lock()
	defer h.mu.Unlock()
	for {
		switch {
		case h.broken != nil:
			return 0, h.broken
		case !h.rd.IsZero() && !time.Now().Before(h.rd):
			return 0, os.ErrDeadlineExceeded
		case len(h.buf) > 0:
			if h.rn > 0 && len(p) > h.rn {
				p = p[:h.rn]
			}
			n := copy(p, h.buf)
			h.buf = h.buf[n:]
			h.cond.Broadcast()
			return n, nil
		case h.eof:
			return 0, io.EOF
		case len(p) == 0:
			return 0, nil
		}
		h.cond.Wait()
	}
}

// Write implements net.Conn.
func (c *Conn) Write(p []byte) (n int, err error) {
	h := c.out
	h.mu.Lock()
	defer h.mu.Unlock()
	for {
		switch {
		case h.broken != nil:
			return n, h.broken
		case h.eof:
			return n, net.ErrClosed
		case !h.wr.IsZero() && !time.Now().Before(h.wr):
			return n, os.ErrDeadlineExceeded
		case h.limit == 0:
			h.buf = append(h.buf, p...)
			h.cond.Broadcast()
			return n + len(p), nil
		}
		if room := h.limit - len(h.buf); room > 0 {
			m := min(room, len(p))
			h.buf = append(h.buf, p[:m]...)
			n, p = n+m, p[m:]
			h.cond.Broadcast()
		}
		if len(p) == 0 {
			return n, nil
		}
		h.cond.Wait()
	}
}

// CloseWrite lets the peer read what is under way, then io.EOF.
func (c *Conn) CloseWrite() error {
	c.out.mu.Lock()
	defer c.out.mu.Unlock()
	c.out.eof = true
	c.out.cond.Broadcast()
	return nil
}

// Close ends both directions: the peer reads what is under way, and cannot
// write any more.
func (c *Conn) Close() error {
	c.out.mu.Lock()
	c.out.eof = true
	c.out.cond.Broadcast()
	stop(c.out.wt)
	c.out.mu.Unlock()
	c.in.mu.Lock()
	c.in.broken = net.ErrClosed
	c.in.cond.Broadcast()
	stop(c.in.rt)
	c.in.mu.Unlock()
	return nil
}

func stop(t *time.Timer) {
	if t != nil {
		t.Stop()
	}
}

// LocalAddr implements net.Conn.
func (c *Conn) LocalAddr() net.Addr { return c.local }

// RemoteAddr implements net.Conn.
func (c *Conn) RemoteAddr() net.Addr { return c.remote }

// SetDeadline implements net.Conn.
func (c *Conn) SetDeadline(t time.Time) error {
	c.SetReadDeadline(t)
	return c.SetWriteDeadline(t)
}

// SetReadDeadline implements net.Conn.
func (c *Conn) SetReadDeadline(t time.Time) error {
	c.in.arm(&c.in.rd, &c.in.rt, t)
	return nil
}

// SetWriteDeadline implements net.Conn.
func (c *Conn) SetWriteDeadline(t time.Time) error {
	c.out.arm(&c.out.wr, &c.out.wt, t)
	return nil
}

func (h *half) arm(at *time.Time, timer **time.Timer, t time.Time) {
	h.mu.Lock()
	defer h.mu.Unlock()
	*at = t
	stop(*timer)
	if !t.IsZero() {
		*timer = time.AfterFunc(time.Until(t), func() {
			h.mu.Lock()
			defer h.mu.Unlock()
			h.cond.Broadcast()
		})
	}
	h.cond.Broadcast()
}

// Listener is a net.Listener whose Dial is beside it.
type Listener struct {
	addr  net.Addr
	conns chan net.Conn
	once  sync.Once
	done  chan struct{}
}

// Listen returns a listener with that address.
func Listen(addr net.Addr) *Listener {
	return &Listener{addr: addr, conns: make(chan net.Conn), done: make(chan struct{})}
}

// Dial connects from an address.
func (l *Listener) Dial(from net.Addr) (*Conn, error) {
	c, s := New(from, l.addr)
	select {
	case l.conns <- s:
		return c, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}

// Accept implements net.Listener.
func (l *Listener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}

// Close implements net.Listener.
func (l *Listener) Close() error {
	l.once.Do(func() { close(l.done) })
	return nil
}

// Addr implements net.Listener.
func (l *Listener) Addr() net.Addr { return l.addr }
