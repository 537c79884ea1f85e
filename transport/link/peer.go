package link

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"sync/atomic"
	"time"

	"github.com/quic-go/quic-go"

	"posthouse/mesh"
)

const (
	// settle: two connections that come up within it were dialled at the same time,
	// and the smaller node's is kept. A later one means that the other side has
	// lost the first (nobody dials a peer to whom he is connected), so it is used.
	settle = 10 * time.Second
	// linger is how long a connection that is not used any more is kept, so that
	// both sides have moved to the other; then it ends with its last stream.
	linger = 15 * time.Second
	// bulkIdle closes a bulk connection without streams.
	bulkIdle = time.Minute
	// maxSessions bounds what one peer may hold open in one class; beyond, the
	// least preferred is closed.
	maxSessions = 4
	// maxLearned is how many addresses are kept beside the configured ones.
	maxLearned = 3
)

// peer is a node that may be talked to. Its fields but id, key, wake, bulkDial are
// guarded by Endpoint.mu.
type peer struct {
	id  mesh.NodeID
	key mesh.KeyHash

	wake     chan struct{} // of its dial loop; one token
	bulkDial chan struct{} // one token: who holds it may dial bulk

	addrs    []netip.AddrPort
	learned  []netip.AddrPort // last met first
	removed  bool
	stop     context.CancelFunc
	kicked   bool          // dial now
	lastDial time.Time     // start of the last round of attempts
	tried    chan struct{} // closed when a round has failed, or the peer is up; new when it goes down
	up       bool
	since    time.Time
	nonce    [16]byte
	sessions [3][]*session // by class; the first is the one in use
	err      error         // of the last round
	via      mesh.NodeID   // last node that carried a stream
	viaAt    time.Time
	doubtful time.Time          // until when its own connection is not trusted
	spliced  map[*Conn]struct{} // streams with it through others
	rate     float64            // bytes/s that its last bulk connection carried, 0: not known
}

func newPeer(n Peer) *peer {
	p := &peer{
		id: n.ID, key: n.Key, since: time.Now(), stop: func() {},
		wake: make(chan struct{}, 1), bulkDial: make(chan struct{}, 1), tried: make(chan struct{}),
		spliced: map[*Conn]struct{}{},
	}
	p.setAddrs(n.Addrs, n.Learned)
	return p
}

// setAddrs reports whether there is one that was not known.
func (p *peer) setAddrs(addrs, learned []netip.AddrPort) bool {
	before := p.candidates()
	p.addrs = slices.Clone(addrs)
	for _, a := range learned {
		if !slices.Contains(p.learned, a) && len(p.learned) < maxLearned {
			p.learned = append(p.learned, a)
		}
	}
	for _, a := range p.candidates() {
		if !slices.Contains(before, a) {
			return true
		}
	}
	return false
}

// candidates are the addresses to dial: where it was met last, then the configured
// ones, then older ones.
func (p *peer) candidates() []netip.AddrPort {
	var all []netip.AddrPort
	add := func(addrs ...netip.AddrPort) {
		for _, a := range addrs {
			if a = netip.AddrPortFrom(a.Addr().Unmap(), a.Port()); a.IsValid() && a.Port() != 0 && !slices.Contains(all, a) {
				all = append(all, a)
			}
		}
	}
	add(p.learned[:min(1, len(p.learned))]...)
	add(p.addrs...)
	add(p.learned...)
	return all
}

func (p *peer) lastAddr() netip.AddrPort {
	if s := p.current(Control); s != nil {
		return s.addr
	}
	if all := p.candidates(); len(all) > 0 {
		return all[0]
	}
	return netip.AddrPort{}
}

func (p *peer) current(c Class) *session {
	for _, s := range p.sessions[c] {
		if s.conn.Context().Err() == nil {
			return s
		}
	}
	return nil
}

func (p *peer) all() []*session {
	return slices.Concat(p.sessions[Control], p.sessions[Bulk])
}

// poke lets the dial loop look again.
func (p *peer) poke() {
	select {
	case p.wake <- struct{}{}:
	default:
	}
}

// kick asks for a round of attempts now, unless one began within gap.
func (p *peer) kick(gap time.Duration) {
	if time.Since(p.lastDial) >= gap {
		p.kicked = true
		p.poke()
	}
}

func (p *peer) markTried() {
	select {
	case <-p.tried:
	default:
		close(p.tried)
	}
}

// session is one connection after the hello. Fields above the line never change.
type session struct {
	e      *Endpoint
	peer   *peer
	conn   *quic.Conn
	class  Class
	dialer mesh.NodeID
	seq    uint64
	since  time.Time
	addr   netip.AddrPort
	out    *datagramQueue // control only
	pace   *pacer         // bulk only
	// --
	streams atomic.Int64
	poke    chan struct{} // look whether it may end
	retired bool          // another is used; guarded by Endpoint.mu
	doubts  int           // bulk: streams made no progress in it, one after the other; guarded by Endpoint.mu
	heard   uint64        // bytes that had come by then
	doubted bool          // it takes no new streams of ours
}

// better says which of two connections that came up at the same time is used. Both
// sides decide alike.
func better(a, b *session) bool {
	if a.dialer != b.dialer {
		return a.dialer < b.dialer
	}
	return a.seq > b.seq
}

func (s *session) used(delta int64) {
	if s.streams.Add(delta) == 0 && delta < 0 {
		select {
		case s.poke <- struct{}{}:
		default:
		}
	}
}

// ourHello says who we are on a connection of that class.
func (e *Endpoint) ourHello(class Class, seq uint64) ([]byte, error) {
	e.mu.Lock()
	h := hello{Version: helloVersion, Node: e.self, Class: class, Nonce: e.nonce[:], Seq: seq}
	e.mu.Unlock()
	if e.deps.Facts != nil {
		f := e.deps.Facts()
		h.BootCount, h.LogEnd, h.Lineage = f.BootCount, f.LogEnd, f.Lineage
	}
	return h.encode()
}

// refusal is an error whose text the peer is told.
type refusal struct{ error }

// meet judges a peer's hello.
func (e *Endpoint) meet(p *peer, h *hello) error {
	if h.Node != p.id {
		return refusal{fmt.Errorf("this key belongs to node %v, not %v", p.id, h.Node)}
	}
	if e.deps.Meet != nil {
		if err := e.deps.Meet(p.id, Facts{BootCount: h.BootCount, LogEnd: h.LogEnd, Lineage: h.Lineage, Boot: [16]byte(h.Nonce)}); err != nil {
			return refusal{err}
		}
	}
	return nil
}

// peerOf finds whom a connection belongs to, by its key.
func (e *Endpoint) peerOf(conn *quic.Conn) (*peer, error) {
	key, err := e.deps.Identity.Peer(conn.ConnectionState().TLS)
	if err != nil {
		return nil, err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	p := e.byKey[key]
	if p == nil {
		return nil, ErrNotAdmitted // revoked between the handshake and now
	}
	return p, nil
}

// hang up with the code that fits err.
func hangUp(conn *quic.Conn, err error) {
	var r refusal
	switch {
	case errors.As(err, &r):
		text := r.Error()
		conn.CloseWithError(codeRefused, text[:min(len(text), 200)])
	case errors.Is(err, ErrNotAdmitted):
		conn.CloseWithError(codeRevoked, "not admitted")
	case errors.Is(err, errElsewhere):
		conn.CloseWithError(codeDuplicate, "not whom we look for")
	case errors.Is(err, ErrClosed):
		conn.CloseWithError(codeBye, "")
	default:
		conn.CloseWithError(codeProtocol, "no proper hello")
	}
}

// acceptMesh takes an incoming connection through the hello.
func (e *Endpoint) acceptMesh(ctx context.Context, conn *quic.Conn) {
	s, h, st, err := e.greetIncoming(ctx, conn)
	if err == nil {
		err = e.establish(s, h, func() error {
			ours, err := e.ourHello(s.class, 0)
			if err == nil {
				_, err = st.Write(ours)
			}
			st.Close()
			return err
		})
	}
	if err != nil {
		level := slog.LevelDebug // it went away, or was never ours
		if errors.As(err, new(refusal)) || errors.Is(err, ErrNotAdmitted) {
			level = slog.LevelInfo
		}
		e.log.Log(ctx, level, "connection refused", "addr", conn.RemoteAddr().String(), "err", err)
		hangUp(conn, err)
	}
}

func (e *Endpoint) greetIncoming(ctx context.Context, conn *quic.Conn) (*session, *hello, *quic.Stream, error) {
	p, err := e.peerOf(conn)
	if err != nil {
		return nil, nil, nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, e.cfg.HandshakeTimeout)
	defer cancel()
	st, err := conn.AcceptStream(ctx)
	if err != nil {
		return nil, nil, nil, fmt.Errorf("wait for hello: %w", err)
	}
	st.SetDeadline(time.Now().Add(e.cfg.HandshakeTimeout))
	h, err := readHello(st)
	if err != nil {
		return nil, nil, nil, err
	}
	if err := e.meet(p, h); err != nil {
		return nil, nil, nil, err
	}
	return e.newSession(p, conn, h.Class, p.id, h.Seq), h, st, nil
}

// greet takes a connection that we have dialled through the hello.
func (e *Endpoint) greet(ctx context.Context, conn *quic.Conn, want *peer, class Class) (*session, error) {
	s, err := e.tryGreet(ctx, conn, want, class)
	if err != nil {
		hangUp(conn, err)
	}
	return s, wireError(err) // in TLS 1.3 the other side's check says no only now
}

func (e *Endpoint) tryGreet(ctx context.Context, conn *quic.Conn, want *peer, class Class) (*session, error) {
	p, err := e.peerOf(conn)
	if err != nil {
		return nil, err
	}
	e.mu.Lock()
	self := e.self
	useless := p != want && (p.up || class == Bulk)
	e.mu.Unlock()
	if useless {
		return nil, errElsewhere
	}
	seq := e.seq.Add(1)
	ours, err := e.ourHello(class, seq)
	if err != nil {
		return nil, err
	}
	st, err := conn.OpenStream()
	if err != nil {
		return nil, fmt.Errorf("open hello: %w", err)
	}
	st.SetDeadline(time.Now().Add(e.cfg.HandshakeTimeout))
	stop := context.AfterFunc(ctx, func() { st.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	if _, err := st.Write(ours); err != nil {
		return nil, fmt.Errorf("write hello: %w", err)
	}
	st.Close()
	h, err := readHello(st)
	if err != nil {
		return nil, err
	}
	if err := e.meet(p, h); err != nil {
		return nil, err
	}
	if h.Class != class {
		return nil, errors.New("peer answered for another class")
	}
	s := e.newSession(p, conn, class, self, seq)
	return s, e.establish(s, h, nil)
}

func (e *Endpoint) newSession(p *peer, conn *quic.Conn, class Class, dialer mesh.NodeID, seq uint64) *session {
	s := &session{e: e, peer: p, conn: conn, class: class, dialer: dialer, seq: seq, since: time.Now(), addr: addrOf(conn), poke: make(chan struct{}, 1)}
	if class == Control {
		s.out = newDatagramQueue()
	} else {
		e.mu.Lock()
		rate := p.rate
		e.mu.Unlock()
		s.pace = newPacer(e.cfg.QueueDelay, conn, rate)
	}
	return s
}

// establish makes s one of its peer's connections and starts to serve it. answer, if
// any, is sent in between: after it the peer may open streams.
func (e *Endpoint) establish(s *session, h *hello, answer func() error) error {
	if answer != nil {
		// A peer that has our hello uses the connection at once; what it then opens
		// waits inside until it is served.
		if err := answer(); err != nil {
			return fmt.Errorf("answer hello: %w", err)
		}
	}
	p := s.peer
	nonce := [16]byte(h.Nonce)
	e.mu.Lock()
	if p.removed {
		e.mu.Unlock()
		return ErrNotAdmitted
	}
	var old []*session
	if nonce != p.nonce {
		// The peer has started anew: what it had before is dead, though nothing says
		// so yet.
		old = p.all()
		p.sessions = [3][]*session{}
		p.nonce = nonce
	}
	list := p.sessions[s.class]
	at := 0
	for at < len(list) && !list[at].doubted && s.since.Sub(list[at].since) < settle && better(list[at], s) {
		at++
	}
	list = slices.Insert(list, at, s)
	var extra []*session
	if len(list) > maxSessions {
		extra = list[maxSessions:]
		list = list[:maxSessions:maxSessions]
	}
	p.sessions[s.class] = list
	for i, x := range list {
		x.retired = i > 0
		select {
		case x.poke <- struct{}{}:
		default:
		}
	}
	started := e.spawnLocked(func(ctx context.Context) { s.serve(ctx) })
	if started && s.class == Control {
		e.markUp(p, s, len(old) > 0)
	} else if started && len(p.sessions[Control]) == 0 && p.up {
		e.markDown(p, errors.New("it has started anew")) // and its control is still to come
	}
	e.mu.Unlock()
	closeAll(old, codeReplaced, "you have started anew")
	closeAll(extra, codeTooMany, "too many connections")
	if !started {
		return ErrClosed
	}
	return nil
}

// markUp needs e.mu.
func (e *Endpoint) markUp(p *peer, s *session, anew bool) {
	p.err, p.doubtful = nil, time.Time{}
	if !slices.Contains(p.learned[:min(1, len(p.learned))], s.addr) && s.addr.IsValid() {
		p.learned = slices.DeleteFunc(p.learned, func(a netip.AddrPort) bool { return a == s.addr })
		p.learned = slices.Insert(p.learned, 0, s.addr)
		p.learned = p.learned[:min(len(p.learned), maxLearned)]
		e.notify.met(p.id, s.addr)
	}
	p.markTried()
	if !p.up || anew {
		p.up, p.since = true, time.Now()
		e.notify.event(Event{Peer: p.id, Up: true})
		e.log.Info("peer up", "peer", p.id.String(), "addr", s.addr.String(), "anew", anew)
	}
	p.poke()
}

// forget removes a session whose connection has ended.
func (e *Endpoint) forget(s *session) {
	p := s.peer
	rate := 0.0
	if s.pace != nil {
		rate = s.pace.learnt()
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if rate > 0 {
		p.rate = rate
	}
	list := p.sessions[s.class]
	i := slices.Index(list, s)
	if i < 0 {
		return // replaced, or its peer was removed
	}
	list = slices.Delete(list, i, i+1)
	p.sessions[s.class] = list
	if len(list) > 0 {
		list[0].retired = false
	}
	if s.class == Control && len(list) == 0 && p.up && !p.removed {
		e.markDown(p, context.Cause(s.conn.Context()))
	}
}

// markDown needs e.mu.
func (e *Endpoint) markDown(p *peer, why error) {
	p.up, p.since, p.err = false, time.Now(), wireError(why)
	if !errors.As(why, new(*quic.IdleTimeoutError)) {
		p.tried = make(chan struct{}) // it said goodbye, or has started anew: a new attempt may well succeed
	}
	e.notify.event(Event{Peer: p.id})
	e.log.Info("peer down", "peer", p.id.String(), "err", p.err)
	p.poke()
}

// serve runs until the connection has ended and everything that it feeds has too.
func (s *session) serve(ctx context.Context) {
	e := s.e
	e.spawn(func(context.Context) { s.acceptStreams() })
	if s.class == Control {
		e.spawn(func(context.Context) { s.out.run(s.conn) })
		e.spawn(func(context.Context) { s.receiveDatagrams() })
		e.spawn(func(context.Context) { s.receiveLargeDatagrams() })
	}
	s.attend(ctx)
	e.forget(s)
}

// attend ends the connection when it is of no more use, or returns when it has ended.
func (s *session) attend(ctx context.Context) {
	timer := time.NewTimer(time.Hour)
	timer.Stop()
	defer timer.Stop()
	for {
		select {
		case <-s.conn.Context().Done():
			return
		case <-ctx.Done():
			s.conn.CloseWithError(codeBye, "shutting down")
			return
		case <-s.poke:
			if _, wait, may := s.mayEnd(); may {
				timer.Reset(wait)
			} else {
				timer.Stop()
			}
		case <-timer.C:
			if code, _, may := s.mayEnd(); may {
				s.conn.CloseWithError(code, "not needed")
				return
			}
		}
	}
}

// mayEnd reports whether nothing uses the connection now, and how long that must
// last before it ends.
func (s *session) mayEnd() (code quic.ApplicationErrorCode, wait time.Duration, may bool) {
	s.e.mu.Lock()
	retired := s.retired
	s.e.mu.Unlock()
	switch {
	case s.streams.Load() > 0:
		return 0, 0, false
	case retired:
		return codeDuplicate, linger, true
	case s.class == Bulk:
		return codeBye, bulkIdle, true
	}
	return 0, 0, false
}
