package link

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/quic-go/quic-go"

	"posthouse/mesh"
)

const (
	joinVersion   = 1
	joinsFromOne  = 2               // at a time from one address
	joinEvery     = time.Second / 4 // on average, a new join may begin
	joinBurst     = 16              // so many may come together
	joinGrace     = 2 * time.Second // for the joiner to read the last answer
	exporterLabel = "EXPORTER-posthouse-join"
)

// JoinConn is the one stream of a join, before either side is admitted by the other.
// Nothing else can be reached over its connection. It ends after Config.JoinLifetime.
// The joiner speaks first.
type JoinConn struct {
	*quic.Stream
	conn     *quic.Conn
	Key      mesh.KeyHash // of the other side, which has proven to hold it
	Addr     netip.AddrPort
	Exporter []byte // RFC 8446 section 7.5: 32 bytes, equal at both ends, and of this session alone
	dialled  bool
	lifetime time.Duration
	closed   chan struct{}
	once     sync.Once
}

// Close ends the join. What was written is still sent: the admitting side's connection
// stays until the joiner has closed, at most two seconds.
func (j *JoinConn) Close() error {
	j.once.Do(func() {
		j.Stream.Close()
		j.Stream.CancelRead(streamClosed)
		close(j.closed)
	})
	return nil
}

// attend ends the connection in its time.
func (j *JoinConn) attend(ctx context.Context) {
	defer j.conn.CloseWithError(codeBye, "")
	defer j.Close()
	lifetime := time.NewTimer(j.lifetime)
	defer lifetime.Stop()
	select {
	case <-lifetime.C:
		return
	case <-j.conn.Context().Done():
		return
	case <-ctx.Done():
		return
	case <-j.closed:
	}
	if j.dialled {
		return
	}
	lifetime.Reset(joinGrace)
	select {
	case <-lifetime.C:
	case <-j.conn.Context().Done():
	case <-ctx.Done():
	}
}

// joinGate bounds joins: at a time, from one address, and by rate. The clock is the
// monotonic one.
type joinGate struct {
	mu     sync.Mutex
	open   int
	from   map[netip.Addr]int
	credit float64
	last   time.Time
}

func (g *joinGate) enter(now time.Time, from netip.Addr, limit int) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.last.IsZero() {
		g.credit, g.from = joinBurst, map[netip.Addr]int{}
	} else {
		g.credit = min(joinBurst, g.credit+float64(now.Sub(g.last))/float64(joinEvery))
	}
	g.last = now
	if g.credit < 1 || g.open >= limit || g.from[from] >= joinsFromOne {
		return false
	}
	g.credit--
	g.open++
	g.from[from]++
	return true
}

func (g *joinGate) leave(from netip.Addr) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.open--
	if g.from[from]--; g.from[from] == 0 {
		delete(g.from, from)
	}
}

// JoinListener takes nodes that want to join. While there is none, joins are refused
// in the handshake.
type JoinListener struct {
	e    *Endpoint
	done chan struct{}
	once sync.Once
}

// ListenJoin lets nodes ask to be admitted; one listener at a time.
func (e *Endpoint) ListenJoin() (*JoinListener, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.joining {
		return nil, fmt.Errorf("listen for joins: somebody does already")
	}
	e.joining = true
	return &JoinListener{e: e, done: make(chan struct{})}, nil
}

// Accept waits for the next. It returns ErrClosed or the context's error.
func (l *JoinListener) Accept(ctx context.Context) (*JoinConn, error) {
	l.e.mu.Lock()
	running := l.e.ctx
	l.e.mu.Unlock()
	var stopped <-chan struct{}
	if running != nil {
		stopped = running.Done()
	}
	for {
		select {
		case j := <-l.e.joins:
			if j.conn.Context().Err() == nil { // else it gave up while it waited
				return j, nil
			}
		case <-l.done:
			return nil, ErrClosed
		case <-stopped:
			return nil, ErrClosed
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// Close ends the offer. Joins that were accepted go on.
func (l *JoinListener) Close() error {
	l.once.Do(func() {
		l.e.mu.Lock()
		l.e.joining = false
		close(l.done)
		l.e.mu.Unlock()
	})
	return nil
}

func (e *Endpoint) newJoin(conn *quic.Conn, st *quic.Stream, dialled bool) (*JoinConn, error) {
	cs := conn.ConnectionState().TLS
	key, err := e.deps.Identity.Peer(cs)
	if err != nil {
		return nil, err
	}
	exporter, err := cs.ExportKeyingMaterial(exporterLabel, nil, 32)
	if err != nil {
		return nil, fmt.Errorf("export keying material: %w", err)
	}
	j := &JoinConn{
		Stream: st, conn: conn, Key: key, Addr: addrOf(conn), Exporter: exporter,
		dialled: dialled, lifetime: e.cfg.JoinLifetime, closed: make(chan struct{}),
	}
	if !e.spawn(j.attend) {
		return nil, ErrClosed
	}
	return j, nil
}

func addrOf(conn *quic.Conn) netip.AddrPort {
	a, ok := conn.RemoteAddr().(*net.UDPAddr)
	if !ok {
		return netip.AddrPort{}
	}
	ap := a.AddrPort()
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
}

func (e *Endpoint) acceptJoin(ctx context.Context, conn *quic.Conn) {
	from := addrOf(conn).Addr()
	if !e.joinGate.enter(time.Now(), from, e.cfg.Joins) {
		conn.CloseWithError(codeTooMany, "too many nodes want to join: try again in a minute")
		return
	}
	defer e.joinGate.leave(from)
	j, err := e.firstJoinBytes(ctx, conn)
	if err != nil {
		e.log.Info("join refused", "addr", from.String(), "err", err)
		conn.CloseWithError(codeProtocol, "no proper join")
		return
	}
	// There is room for as many as the gate lets in.
	select {
	case e.joins <- j:
		<-j.closed
	default:
		j.Close()
	}
}

func (e *Endpoint) firstJoinBytes(ctx context.Context, conn *quic.Conn) (*JoinConn, error) {
	ctx, cancel := context.WithTimeout(ctx, e.cfg.HandshakeTimeout)
	defer cancel()
	st, err := conn.AcceptStream(ctx)
	if err != nil {
		return nil, fmt.Errorf("wait for join: %w", err)
	}
	st.SetReadDeadline(time.Now().Add(e.cfg.HandshakeTimeout))
	var version [1]byte
	if _, err := st.Read(version[:]); err != nil {
		return nil, fmt.Errorf("read join: %w", err)
	}
	if version[0] != joinVersion {
		return nil, fmt.Errorf("read join: version %d", version[0])
	}
	st.SetReadDeadline(time.Time{})
	if _, err := st.Write([]byte{joinVersion}); err != nil {
		return nil, fmt.Errorf("answer join: %w", err)
	}
	return e.newJoin(conn, st, false)
}

// DialJoin connects to a node that may admit this one. expect judges its key in the
// handshake; for one that is not expected, the error is expect's. Run must be in
// progress; peers are not needed.
func (e *Endpoint) DialJoin(ctx context.Context, addr netip.AddrPort, expect func(mesh.KeyHash) error) (*JoinConn, error) {
	e.mu.Lock()
	tr, running := e.tr, e.ctx != nil && e.ctx.Err() == nil
	e.mu.Unlock()
	if !running {
		return nil, ErrClosed
	}
	ctx, cancel := context.WithTimeout(ctx, dialRound)
	defer cancel()
	conn, err := tr.Dial(ctx, net.UDPAddrFromAddrPort(addr), e.deps.Identity.ClientTLS(alpnJoin, expect), e.quicConfig())
	if err != nil {
		return nil, fmt.Errorf("join at %v: %w", addr, wireError(err))
	}
	st, err := conn.OpenStream()
	if err == nil {
		_, err = st.Write([]byte{joinVersion})
	}
	if err == nil {
		// In TLS 1.3 our handshake ends before the other side has judged us: only its
		// answer says that we are let in.
		var version [1]byte
		st.SetReadDeadline(time.Now().Add(e.cfg.HandshakeTimeout))
		if _, err = io.ReadFull(st, version[:]); err == nil && version[0] != joinVersion {
			err = fmt.Errorf("it answers in version %d", version[0])
		}
		st.SetReadDeadline(time.Time{})
	}
	var j *JoinConn
	if err == nil {
		j, err = e.newJoin(conn, st, true)
	}
	if err != nil {
		conn.CloseWithError(codeProtocol, "")
		return nil, fmt.Errorf("join at %v: %w", addr, wireError(err))
	}
	return j, nil
}
