// Package imapd serves mailboxes by IMAP (RFC 3501, RFC 9051): sessions over
// the API of mailstore, on go-imap's server for now. What it adds to the
// library: a guard in front of its parser, EXAMINE enforced, views of its own
// that follow a folder's changes, structure served from the store, and limits.
//
// It does not read configuration, open sockets, or know passwords: appliance
// gives it listeners, a login function and the mailboxes. No IMAP type leaves
// it, so that an engine of our own can take its place.
package imapd

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/emersion/go-imap/v2"
	"github.com/emersion/go-imap/v2/imapserver"

	"posthouse/mailstore"
	"posthouse/mailstore/log"
	"posthouse/mesh"
)

// ErrCredentials is what Deps.Login returns, wrapped or not, for a wrong name
// or password. Such failures are counted and slowed down; others are not.
var ErrCredentials = errors.New("wrong user name or password")

// Account is who logged in.
type Account struct {
	User    string // key of the user for limits and logs, whatever alias was typed
	Mailbox mesh.MailboxID
}

// Failures knows who guesses passwords, over all protocols of a node. Failed
// notes a wrong one and returns how long after its question it is answered;
// Succeeded forgets the pair's. The right password is never kept waiting.
type Failures interface {
	Failed(from netip.Addr, user string, now time.Time) time.Duration
	Succeeded(from netip.Addr, user string)
}

// Deps is what a Server stands on. All but MaxMessage and Log are needed.
type Deps struct {
	// Login checks a password. It may block, within ctx. from is the client's
	// address, an IPv6 /64 as one.
	Login    func(ctx context.Context, user, password string, from netip.Addr) (Account, error)
	Failures Failures
	// Mailbox opens a mailbox homed here; see mailstore.Store.Mailbox.
	Mailbox func(mesh.MailboxID) (*mailstore.Mailbox, error)
	// NewDraft and Admit are the journal's.
	NewDraft func() *log.Draft
	Admit    func(ctx context.Context, size int64) error
	// MaxMessage is asked for the bytes of an APPEND; nil: Config.MaxMessage.
	MaxMessage func() int64
	// TLS is the certificate to show; there is no login without TLS.
	TLS *tls.Config
	// Log gets what operators need; nil drops it.
	Log *slog.Logger
}

// Config holds limits. The zero value of a field means its default.
type Config struct {
	MaxMessage int64 // bytes of an APPEND; default 72 MiB, at most 4 GiB − 1
	PerAddress int   // connections not yet logged in from one address (IPv6: one /64), loopback exempt; default 20
	PerUser    int   // connections of one user; default 50
	LoginTries int   // failed logins before a connection ends; default 5
}

const (
	goingDown        = "Server is going down, connect again"
	handshakeTimeout = 10 * time.Second // a client that cannot shake hands by then never will
	acceptPause      = 100 * time.Millisecond
)

// Server holds the sessions of all listeners.
type Server struct {
	cfg  Config
	deps Deps
	log  *slog.Logger
	lib  *imapserver.Server

	limits limits
	base   context.Context // of all sessions, ended by cut
	end    context.CancelFunc
	up     context.Context // ended by Drain, too
	goDown context.CancelFunc

	mu        sync.Mutex
	guards    map[*guard]string     // the user who is logged in, or ""
	raw       map[net.Conn]struct{} // before their guard
	listeners map[net.Listener]struct{}
	draining  bool
	sessions  sync.WaitGroup // one for each connection, until its session is closed
}

// New makes a Server; it starts nothing.
func New(cfg Config, deps Deps) *Server {
	if cfg.MaxMessage <= 0 {
		cfg.MaxMessage = 72 << 20
	}
	if cfg.PerAddress <= 0 {
		cfg.PerAddress = 20
	}
	if cfg.PerUser <= 0 {
		cfg.PerUser = 50
	}
	if cfg.LoginTries <= 0 {
		cfg.LoginTries = 5
	}
	s := &Server{cfg: cfg, deps: deps, log: deps.Log, guards: map[*guard]string{}, raw: map[net.Conn]struct{}{}, listeners: map[net.Listener]struct{}{}}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	s.base, s.end = context.WithCancel(context.Background())
	s.up, s.goDown = context.WithCancel(s.base)
	s.limits.init()
	s.lib = imapserver.New(&imapserver.Options{
		NewSession: s.newSession,
		Caps: imap.CapSet{
			imap.CapIMAP4rev1: {}, imap.CapIMAP4rev2: {}, imap.CapNamespace: {}, imap.CapUIDPlus: {}, imap.CapESearch: {},
			imap.CapSearchRes: {}, imap.CapListExtended: {}, imap.CapListStatus: {}, imap.CapMove: {}, imap.CapStatusSize: {},
			imap.CapBinary: {}, imap.CapChildren: {}, imap.CapSpecialUse: {}, imap.CapCreateSpecialUse: {}, imap.CapLiteralPlus: {},
		},
		Logger:       libraryLog{s.log},
		InsecureAuth: true, // the library sees connections only after their TLS handshake
	})
	return s
}

// libraryLog takes what the library says about its connections. Most of it is
// about clients that went away.
type libraryLog struct{ log *slog.Logger }

func (l libraryLog) Printf(format string, args ...any) {
	l.log.Debug("imap library", "text", fmt.Sprintf(format, args...))
}

// Serve serves the connections of ln until ctx ends or Drain, then closes ln and
// returns once the sessions of this listener have ended: at the end of ctx they
// are cut off. implicitTLS says that TLS begins at once (port 993); else only
// STARTTLS leads anywhere (port 143).
func (s *Server) Serve(ctx context.Context, ln net.Listener, implicitTLS bool) error {
	s.mu.Lock()
	if s.draining {
		s.mu.Unlock()
		ln.Close()
		return nil
	}
	s.listeners[ln] = struct{}{}
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		delete(s.listeners, ln)
		s.mu.Unlock()
		ln.Close()
	}()
	var mine sync.WaitGroup // handshakes, and the library's loop
	ready := newReadyListener(ln.Addr())
	mine.Go(func() {
		if err := s.lib.Serve(ready); err != nil {
			s.log.Error("imap library stopped", "err", err)
		}
	})
	stop := context.AfterFunc(ctx, func() { ln.Close(); s.cut() })
	defer stop()
	err := s.accept(ctx, ln, &mine, ready, implicitTLS)
	s.sessions.Wait()
	ready.Close()
	mine.Wait()
	return err
}

func (s *Server) accept(ctx context.Context, ln net.Listener, mine *sync.WaitGroup, ready *readyListener, implicitTLS bool) error {
	for {
		c, err := ln.Accept()
		if err != nil {
			s.mu.Lock()
			over := s.draining
			s.mu.Unlock()
			if over || ctx.Err() != nil {
				return nil
			}
			if errors.Is(err, net.ErrClosed) {
				return fmt.Errorf("accept: %w", err)
			}
			s.log.Warn("accept", "err", err) // out of files, or a client that is gone already
			select {
			case <-ctx.Done():
				return nil
			case <-time.After(acceptPause):
			}
			continue
		}
		if !s.enter(c) {
			c.Close()
			continue
		}
		mine.Go(func() { s.welcome(ctx, c, ready, implicitTLS) })
	}
}

// enter counts a connection in, unless the server is going down.
func (s *Server) enter(c net.Conn) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.draining {
		return false
	}
	s.raw[c] = struct{}{}
	s.sessions.Add(1)
	return true
}

// leave counts a connection out that never got a session.
func (s *Server) leave(c net.Conn) {
	s.mu.Lock()
	delete(s.raw, c)
	s.mu.Unlock()
	c.Close()
	s.sessions.Done()
}

// welcome brings a connection to the end of its TLS handshake and hands it to
// the library.
func (s *Server) welcome(ctx context.Context, c net.Conn, ready *readyListener, implicitTLS bool) {
	addr := addressOf(c)
	if !s.limits.arrive(addr, s.cfg.PerAddress) {
		if !implicitTLS {
			c.SetWriteDeadline(time.Now().Add(handshakeTimeout))
			c.Write([]byte("* BYE Too many connections from your address, close some\r\n"))
		}
		s.log.Warn("too many connections", "addr", addr)
		s.leave(c)
		return
	}
	if !implicitTLS && !s.plaintext(c) {
		s.limits.depart(addr)
		s.leave(c)
		return
	}
	tc := tls.Server(c, s.deps.TLS)
	hctx, cancel := context.WithTimeout(ctx, handshakeTimeout)
	err := tc.HandshakeContext(hctx)
	cancel()
	if err != nil {
		s.log.Debug("tls handshake", "addr", addr, "err", err)
		s.limits.depart(addr)
		s.leave(c)
		return
	}
	s.admit(c, tc, addr, ready, !implicitTLS)
}

// admit puts the guard in front of a secured connection and passes it on. c is
// what enter was called with; addr was counted by arrive.
func (s *Server) admit(c, secured net.Conn, addr netip.Addr, ready *readyListener, greeted bool) {
	g := newGuard(secured, s.maxMessage, nil)
	g.swallow = greeted // RFC 9051 section 6.2.1: no greeting after STARTTLS
	g.onClose = func() {
		s.mu.Lock()
		delete(s.guards, g)
		s.mu.Unlock()
	}
	s.mu.Lock()
	delete(s.raw, c)
	s.guards[g] = ""
	draining := s.draining
	s.mu.Unlock()
	if draining {
		g.drain(goingDown)
	}
	if !ready.put(g) {
		g.Close()
		s.limits.depart(addr)
		s.sessions.Done()
	}
}

// maxMessage is the limit of an APPEND now.
func (s *Server) maxMessage() int64 {
	n := s.cfg.MaxMessage
	if s.deps.MaxMessage != nil {
		n = s.deps.MaxMessage()
	}
	return min(n, 1<<32-1)
}

// EndUser ends the connections of a user (Account.User) when their commands in
// hand are done: the password was changed, the user removed, the mailbox moves.
// It does not wait. reason is for people, one line of ASCII.
func (s *Server) EndUser(user, reason string) {
	s.mu.Lock()
	var his []*guard
	for g, u := range s.guards {
		if u == user && user != "" {
			his = append(his, g)
		}
	}
	s.mu.Unlock()
	for _, g := range his {
		g.drain(reason)
	}
}

// loggedIn notes whose connection g is.
func (s *Server) loggedIn(g *guard, user string) {
	s.mu.Lock()
	if _, there := s.guards[g]; there {
		s.guards[g] = user
	}
	s.mu.Unlock()
	g.loggedIn()
}

// Drain takes no more connections, says BYE to each client when its command in
// hand is done, and returns when all have ended; what is left at the end of ctx
// is cut off. Serve returns then.
func (s *Server) Drain(ctx context.Context) {
	s.goDown()
	s.mu.Lock()
	s.draining = true
	for ln := range s.listeners {
		ln.Close()
	}
	for c := range s.raw {
		c.SetDeadline(time.Unix(1, 0))
	}
	guards := make([]*guard, 0, len(s.guards))
	for g := range s.guards {
		guards = append(guards, g)
	}
	s.mu.Unlock()
	for _, g := range guards {
		g.drain(goingDown)
	}
	stop := context.AfterFunc(ctx, s.cut)
	defer stop()
	s.sessions.Wait()
}

// cut closes every connection, and ends what sessions wait for.
func (s *Server) cut() {
	s.end()
	s.mu.Lock()
	s.draining = true
	var all []net.Conn
	for c := range s.raw {
		all = append(all, c)
	}
	for g := range s.guards {
		all = append(all, g.Conn)
	}
	s.mu.Unlock()
	for _, c := range all {
		c.SetDeadline(time.Unix(1, 0))
		if tc, ok := c.(*tls.Conn); ok {
			c = tc.NetConn()
		}
		c.Close()
	}
}

// readyListener hands secured connections to the library.
type readyListener struct {
	addr  net.Addr
	conns chan net.Conn
	once  sync.Once
	done  chan struct{}
}

func newReadyListener(addr net.Addr) *readyListener {
	return &readyListener{addr: addr, conns: make(chan net.Conn), done: make(chan struct{})}
}

func (l *readyListener) put(c net.Conn) bool {
	select {
	case l.conns <- c:
		return true
	case <-l.done:
		return false
	}
}

func (l *readyListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}

func (l *readyListener) Close() error   { l.once.Do(func() { close(l.done) }); return nil }
func (l *readyListener) Addr() net.Addr { return l.addr }
