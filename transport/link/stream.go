package link

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/quic-go/quic-go"

	"posthouse/mesh"
)

// Conn is a stream to a service of another node, or from another node to a service
// of ours. It is a net.Conn whose addresses are made up (Addr). Reads and writes
// return io.EOF, timeouts as net.Conn does, and else errors that wrap those of this
// package. One Read, one Write and any of the other methods may run at a time.
type Conn struct {
	s     *session // the neighbour's: the peer's own, or that of the node in between
	st    *quic.Stream
	tls   *tls.Conn // spliced: TLS with the peer over under; else nil
	under *Conn
	peer  *peer

	wmu  sync.Mutex  // held by Write, for Close to notice; never waited for by Close
	gone atomic.Bool // closed or reset
}

var _ net.Conn = (*Conn)(nil)

// chunk is how much bulk goes between two looks at the path.
const chunk = 32 << 10

// newConn counts the stream as used; the caller has opened or accepted it.
func newConn(s *session, st *quic.Stream) *Conn {
	return &Conn{s: s, st: st, peer: s.peer}
}

// Peer is who is at the other end, proven by its key.
func (c *Conn) Peer() mesh.NodeID { return c.peer.id }

// Via is the node that carries the stream, 0 for none.
func (c *Conn) Via() mesh.NodeID {
	if c.tls == nil {
		return 0
	}
	return c.s.peer.id
}

// LocalAddr stands for this node.
func (c *Conn) LocalAddr() net.Addr {
	c.s.e.mu.Lock()
	defer c.s.e.mu.Unlock()
	return Addr(c.s.e.self)
}

// RemoteAddr stands for Peer.
func (c *Conn) RemoteAddr() net.Addr { return Addr(c.peer.id) }

// Read implements io.Reader.
func (c *Conn) Read(p []byte) (int, error) {
	var n int
	var err error
	if c.tls != nil {
		n, err = c.tls.Read(p)
	} else {
		n, err = c.st.Read(p)
	}
	if c.s.pace != nil {
		c.s.pace.reads(n)
	}
	return n, streamError(err)
}

// Write implements io.Writer. What it has taken is sent even if Close follows, for
// as long as the connection lives; only an answer says that it arrived.
func (c *Conn) Write(p []byte) (int, error) {
	if c.tls != nil {
		n, err := c.tls.Write(p)
		return n, streamError(err)
	}
	c.wmu.Lock()
	defer c.wmu.Unlock()
	if c.s.pace == nil {
		n, err := c.st.Write(p)
		return n, streamError(err)
	}
	n, err := c.s.pace.write(c.st, p)
	return n, streamError(err)
}

// CloseWrite ends our half: the peer reads io.EOF after what was written.
func (c *Conn) CloseWrite() error {
	if c.tls != nil {
		return errors.Join(streamError(c.tls.CloseWrite()), c.under.CloseWrite())
	}
	return streamError(c.st.Close())
}

// Close gives the stream up: what was written is still sent, what the peer still
// sends is refused. A Write under way is cut off, and the peer reads ErrReset.
// Closing it again does nothing, and returns at once also while the first Close
// is under way: that of a spliced stream may wait some seconds to say goodbye.
func (c *Conn) Close() error {
	if c.gone.Swap(true) {
		return nil
	}
	if c.tls != nil {
		c.leave()
		return streamError(c.tls.Close()) // closes under
	}
	if c.wmu.TryLock() {
		c.st.Close()
		c.wmu.Unlock()
	} else {
		c.st.CancelWrite(streamClosed)
	}
	c.st.CancelRead(streamClosed)
	c.s.used(-1)
	return nil
}

// Reset gives the stream up at once: what was not sent yet is not sent, and the peer
// reads ErrReset.
func (c *Conn) Reset() { c.reset(streamClosed) }

func (c *Conn) reset(code quic.StreamErrorCode) {
	if c.gone.Swap(true) {
		return
	}
	if c.tls != nil {
		c.leave()
		c.under.reset(code)
		return
	}
	c.st.CancelWrite(code)
	c.st.CancelRead(code)
	c.s.used(-1)
}

// SetDeadline implements net.Conn.
func (c *Conn) SetDeadline(t time.Time) error {
	return errors.Join(c.SetReadDeadline(t), c.SetWriteDeadline(t))
}

// SetReadDeadline implements net.Conn.
func (c *Conn) SetReadDeadline(t time.Time) error {
	if c.under != nil {
		return c.under.SetReadDeadline(t)
	}
	return c.st.SetReadDeadline(t)
}

// SetWriteDeadline implements net.Conn. The wait of a paced write counts only
// at its end. Spliced: after a timeout no more can be written.
func (c *Conn) SetWriteDeadline(t time.Time) error {
	if c.under != nil {
		return c.under.SetWriteDeadline(t)
	}
	return c.st.SetWriteDeadline(t)
}

// streamError gives errors of reading and writing their meaning. io.EOF and timeouts
// stay as they are.
func streamError(err error) error {
	if err == nil || err == io.EOF {
		return err
	}
	var alert tls.AlertError
	switch {
	case errors.As(err, &alert):
		if alert == 42 { // bad_certificate: how the far end's check says no
			return fmt.Errorf("%w: %w", ErrNotAdmitted, err)
		}
		return fmt.Errorf("%w: %w", ErrReset, err)
	case errors.Is(err, io.ErrUnexpectedEOF):
		return fmt.Errorf("%w: %w", ErrReset, err)
	}
	if err = wireError(err); errors.Is(err, net.ErrClosed) {
		return fmt.Errorf("%w: %w", ErrClosed, err)
	}
	return err
}

// Listener takes the streams to one service.
type Listener struct {
	e     *Endpoint
	name  string
	queue chan *Conn
	done  chan struct{}
	once  sync.Once
}

// Listen offers a service: its name and version, such as "relay/1", of a-z, 0-9, '-',
// '.', '/'. Streams wait for Accept in a queue of Config.Backlog; while it is full
// further ones are refused with ErrBusy. A service that is slow delays no other.
func (e *Endpoint) Listen(service string) (*Listener, error) {
	if err := checkName(service); err != nil {
		return nil, fmt.Errorf("listen: %w", err)
	}
	l := &Listener{e: e, name: service, queue: make(chan *Conn, e.cfg.Backlog), done: make(chan struct{})}
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.services[service] != nil {
		return nil, fmt.Errorf("listen: service %q is offered already", service)
	}
	e.services[service] = l
	return l, nil
}

// Accept waits for the next stream. It returns ErrClosed when the listener or the
// endpoint is closed, or the context's error.
func (l *Listener) Accept(ctx context.Context) (*Conn, error) {
	select {
	case <-l.done:
		return nil, ErrClosed
	default:
	}
	select {
	case c := <-l.queue:
		return c, nil
	case <-l.done:
		return nil, ErrClosed
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// Close ends the offer and refuses what waits.
func (l *Listener) Close() error {
	l.e.mu.Lock()
	if l.e.services[l.name] == l {
		delete(l.e.services, l.name)
	}
	l.shut()
	l.e.mu.Unlock()
	for {
		select {
		case c := <-l.queue:
			c.reset(streamNoService)
		default:
			return nil
		}
	}
}

func (l *Listener) shut() { l.once.Do(func() { close(l.done) }) }

// deliver hands c to the service, or refuses it.
func (e *Endpoint) deliver(c *Conn, service string) {
	e.mu.Lock()
	l := e.services[service]
	code := streamNoService
	if l != nil {
		select {
		case l.queue <- c:
			e.mu.Unlock()
			return
		default:
			code = streamBusy
		}
	}
	e.mu.Unlock()
	e.log.Warn("stream refused", "peer", c.Peer().String(), "service", service, "busy", code == streamBusy)
	c.reset(code)
}

// Dial opens a stream to a service of node: by its own connection, else through a
// third node (then Via says which). It does not wait for an answer: that the node
// lacks the service (ErrNoService) or is busy (ErrBusy) is what the first Read or a
// later Write returns. Its own errors wrap ErrUnreachable, ErrNotAdmitted or ErrClosed.
func (e *Endpoint) Dial(ctx context.Context, node mesh.NodeID, service string, class Class) (*Conn, error) {
	p, err := e.target(node, service, class)
	if err != nil {
		return nil, err
	}
	e.mu.Lock()
	doubtful := time.Now().Before(p.doubtful)
	e.mu.Unlock()
	if doubtful {
		if c, err := e.dialThrough(ctx, p, service, class); err == nil {
			return c, nil
		}
	}
	s, err := e.session(ctx, p, class)
	if err == nil {
		var c *Conn
		if c, err = s.openStream(ctx, header{kind: kindService, class: class, name: service}); err == nil {
			return c, nil
		}
	}
	if !errors.Is(err, ErrUnreachable) || ctx.Err() != nil || !goesAround {
		return nil, fmt.Errorf("dial %s at %v: %w", service, node, err)
	}
	c, verr := e.dialThrough(ctx, p, service, class)
	if verr != nil {
		return nil, fmt.Errorf("dial %s at %v: %w; through others: %w", service, node, err, verr)
	}
	return c, nil
}

// target checks the arguments of a dial.
func (e *Endpoint) target(node mesh.NodeID, service string, class Class) (*peer, error) {
	if err := checkName(service); err != nil {
		return nil, fmt.Errorf("dial: %w", err)
	}
	if class != Control && class != Bulk {
		return nil, fmt.Errorf("dial %s: class %d", service, class)
	}
	e.mu.Lock()
	p := e.peers[node]
	e.mu.Unlock()
	if p == nil {
		return nil, fmt.Errorf("dial %s at %v: %w", service, node, ErrNotAdmitted)
	}
	return p, nil
}

// openStream opens a stream and sends its header. While the peer allows no more
// streams (Config.Streams) it waits.
func (s *session) openStream(ctx context.Context, h header) (*Conn, error) {
	s.used(1)
	st, err := s.conn.OpenStreamSync(ctx)
	if err != nil {
		s.used(-1)
		if ctx.Err() != nil {
			return nil, fmt.Errorf("%w: all streams are in use: %w", ErrBusy, ctx.Err())
		}
		return nil, wireError(err)
	}
	c := newConn(s, st)
	// A header is small: it is taken at once and goes with what is written next.
	if _, err := st.Write(h.encode()); err != nil {
		c.Reset()
		return nil, wireError(err)
	}
	return c, nil
}

// acceptStreams takes what the peer opens until the connection ends. QUIC bounds how
// many there are.
func (s *session) acceptStreams() {
	for {
		st, err := s.conn.AcceptStream(s.conn.Context())
		if err != nil {
			return
		}
		s.used(1)
		c := newConn(s, st)
		if !s.e.spawn(func(ctx context.Context) { s.incoming(ctx, c) }) {
			c.Reset()
		}
	}
}

// incoming reads a stream's header and hands the stream on.
func (s *session) incoming(ctx context.Context, c *Conn) {
	e := s.e
	c.st.SetReadDeadline(time.Now().Add(e.cfg.HandshakeTimeout))
	h, err := readHeader(c.st)
	if err != nil {
		e.log.Warn("stream refused", "peer", s.peer.id.String(), "err", err)
		c.reset(streamProtocol)
		return
	}
	c.st.SetReadDeadline(time.Time{})
	switch h.kind {
	case kindService:
		e.deliver(c, h.name)
	case kindVia:
		e.carry(ctx, c, h)
	case kindSpliced:
		e.acceptSpliced(ctx, c, h)
	case kindPeers:
		e.answerPeers(c)
	}
}
