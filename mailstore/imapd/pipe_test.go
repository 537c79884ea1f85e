package imapd

import (
	"io"
	"net"
	"os"
	"sync"
	"time"
)

// pipe returns two ends of a connection with room for what is written, with
// deadlines, fit for a synctest bubble.
func pipe(client, server string) (net.Conn, net.Conn) {
	a, b := newHalf(), newHalf()
	ca, sa := fakeAddr(client), fakeAddr(server)
	return &pipeEnd{r: a, w: b, local: ca, remote: sa}, &pipeEnd{r: b, w: a, local: sa, remote: ca}
}

type fakeAddr string

func (fakeAddr) Network() string  { return "tcp" }
func (a fakeAddr) String() string { return string(a) }

type half struct {
	mu     sync.Mutex
	cond   *sync.Cond
	buf    []byte
	closed bool // by the writer or the reader
	late   bool // the reader's deadline has passed
	timer  *time.Timer
}

func newHalf() *half { h := &half{}; h.cond = sync.NewCond(&h.mu); return h }

func (h *half) close() { h.mu.Lock(); h.closed = true; h.mu.Unlock(); h.cond.Broadcast() }

type pipeEnd struct {
	r, w          *half
	local, remote net.Addr
}

func (p *pipeEnd) Read(b []byte) (int, error) {
	h := p.r
	h.mu.Lock()
	defer h.mu.Unlock()
	for len(h.buf) == 0 && !h.closed && !h.late {
		h.cond.Wait()
	}
	switch {
	case h.late:
		return 0, os.ErrDeadlineExceeded
	case len(h.buf) > 0:
		n := copy(b, h.buf)
		h.buf = h.buf[n:]
		return n, nil
	}
	return 0, io.EOF
}

func (p *pipeEnd) Write(b []byte) (int, error) {
	h := p.w
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.closed {
		return 0, io.ErrClosedPipe
	}
	h.buf = append(h.buf, b...)
	h.cond.Broadcast()
	return len(b), nil
}

func (p *pipeEnd) Close() error         { p.r.close(); p.w.close(); return nil }
func (p *pipeEnd) LocalAddr() net.Addr  { return p.local }
func (p *pipeEnd) RemoteAddr() net.Addr { return p.remote }

func (p *pipeEnd) SetDeadline(t time.Time) error      { return p.SetReadDeadline(t) }
func (p *pipeEnd) SetWriteDeadline(t time.Time) error { return nil }
func (p *pipeEnd) SetReadDeadline(t time.Time) error {
	h := p.r
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.timer != nil {
		h.timer.Stop()
	}
	h.late = false
	if t.IsZero() {
		return nil
	}
	if d := time.Until(t); d <= 0 {
		h.late = true
		h.cond.Broadcast()
	} else {
		h.timer = time.AfterFunc(d, func() { h.mu.Lock(); h.late = true; h.mu.Unlock(); h.cond.Broadcast() })
	}
	return nil
}

// pipeListener accepts what dial makes.
type pipeListener struct {
	conns chan net.Conn
	done  chan struct{}
	once  sync.Once
}

func newPipeListener() *pipeListener {
	return &pipeListener{conns: make(chan net.Conn), done: make(chan struct{})}
}

func (l *pipeListener) dial(from string) net.Conn {
	c, s := pipe(from, "192.0.2.1:143")
	select {
	case l.conns <- s:
	case <-l.done:
		s.Close()
	}
	return c
}

func (l *pipeListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}
func (l *pipeListener) Close() error   { l.once.Do(func() { close(l.done) }); return nil }
func (l *pipeListener) Addr() net.Addr { return fakeAddr("192.0.2.1:143") }
