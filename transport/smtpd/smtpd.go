// Package smtpd holds SMTP sessions: port 25 for the world, 587 and 465 for
// our own people. It owns the wire and nothing else: the order of commands,
// their syntax, sizes and time limits, TLS, log-in, and the exact bytes of a
// message's text.
//
// It does not know who a recipient is, who may send as whom, what a password
// is, or where a message is kept: Recipients, Senders, Authenticator and
// Intake, declared here and plugged in by appliance, decide that. It opens no
// sockets and looks no names up. A message counts as taken only when Intake
// has read the text to a clean io.EOF and returned without error.
//
// The session loop is our own, on purpose: the rules of RFC 5321 that an
// attacker leans on (line ends, sequence, what survives STARTTLS) are decided
// here, byte by byte, and DESIGN.md in this folder lists them.
package smtpd

import (
	"context"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"posthouse/mesh"
	"posthouse/transport"
)

// Port says what a listener is for.
type Port uint8

// The kinds of port.
const (
	PortMX          Port = iota + 1 // 25: mail from the world, never a log-in
	PortSubmission                  // 587: our people, after STARTTLS (RFC 6409)
	PortSubmissions                 // 465: our people, TLS from the first byte (RFC 8314)
)

var portNames = [...]string{"", "mx", "submission", "submissions"}

func (p Port) String() string {
	if int(p) < len(portNames) {
		return portNames[p]
	}
	return "port?"
}

// Login is who logged in.
type Login struct {
	User    mesh.ID
	Address string // primary address, for the Received line and the envelope
}

// Session is what the deciders may know of a session. They only read it, and
// only until they return.
type Session struct {
	ID      string     // names the session in the logs
	Port    Port       // which door
	Remote  netip.Addr // unmapped, without zone
	Trusted bool       // loopback or in Config.Trusted
	Helo    string     // as the client gave it, syntax checked
	ESMTP   bool       // EHLO rather than HELO
	TLS     string     // "TLS1.3 TLS_AES_128_GCM_SHA256", or "" for plain text
	Login   *Login     // nil before a log-in
	// Origin and From are set once MAIL was accepted; a zero From is the null
	// sender.
	Origin transport.Origin
	From   mesh.Address

	reverse *reverse
}

// ClientName returns the verified reverse name of the client, "" if it has
// none. It waits for the look-up that the connection started, at most for
// Config.ReverseTimeout.
func (s *Session) ClientName(ctx context.Context) string { return s.reverse.wait(ctx) }

// MailParams are the parameters of MAIL FROM.
type MailParams struct {
	Size     int64 // RFC 1870; 0 when not given
	Body     transport.BodyType
	Ret      string // RFC 3461 section 4.3
	EnvID    string // RFC 3461 section 4.4, xtext as given
	SMTPUTF8 bool
}

// Rcpt is one recipient that RCPT TO named.
type Rcpt struct {
	Address    mesh.Address
	Notify     transport.Notify
	ORcpt      string // "type;xtext" as given
	Domainless bool   // the bare <Postmaster> of RFC 5321 section 4.1.1.3
}

// Recipients decides on RCPT TO. An error is a *transport.Fault, told to the
// client, or anything else, told as 451.
type Recipients interface {
	Check(ctx context.Context, s *Session, r Rcpt) error
}

// Senders decides on MAIL FROM. It answers by which door the message comes:
// OriginSubmission for a user who logged in and may use that address,
// OriginDevice for a machine let in by rule, OriginOutside otherwise. On the
// submission ports OriginOutside becomes 530 (log in first).
type Senders interface {
	Check(ctx context.Context, s *Session, from mesh.Address, p MailParams) (transport.Origin, error)
}

// Authenticator checks a password. A *transport.Fault with code 535 means
// wrong user or password; every other error means that nobody can tell now
// (454). It must take equal time for unknown users.
type Authenticator interface {
	Authenticate(ctx context.Context, user, password string, remote netip.Addr) (Login, error)
}

// Failures knows who guesses passwords, over all protocols of a node. Failed
// notes a wrong one and returns how long after its question it is answered;
// Succeeded forgets the pair's. The right password is never kept waiting.
type Failures interface {
	Failed(from netip.Addr, user string, now time.Time) time.Duration
	Succeeded(from netip.Addr, user string)
}

// Intake takes a message. env has no ID, EntryNode or EntryTime yet. Accept
// reads body until io.EOF; any other error of body means that the message was
// cut, refused or too large: Accept then keeps nothing and returns an error.
// It returns nil only when the message is safe on disk, with the name that the
// client is told. ctx ends Config.AcceptTimeout after the last byte.
type Intake interface {
	Accept(ctx context.Context, env *transport.Envelope, rcpts []Rcpt, body io.Reader) (queued string, err error)
}

// Access may refuse a connection before the greeting (client access rules, DNS
// lists). An error is a fault, told as the greeting (RFC 5321 section 3.1).
type Access interface {
	Connect(ctx context.Context, s *Session) error
}

// Deps are what a Server is given.
type Deps struct {
	Recipients    Recipients
	Senders       Senders
	Authenticator Authenticator // nil: AUTH is never offered
	Failures      Failures      // required with an Authenticator
	Intake        Intake
	Access        Access // nil: everybody may connect
	// TLS returns the configuration in force; nil, or a nil result: no TLS now.
	TLS func() *tls.Config
	// MaxSize returns the largest message in bytes, as the domain state has it.
	MaxSize func() int64
	// Reverse returns the verified name of an address (PTR whose A/AAAA leads
	// back), or "". It obeys ctx. nil: no names.
	Reverse func(ctx context.Context, a netip.Addr) string
	// Hostname returns the name in force when a rename may change it; nil:
	// Config.Hostname.
	Hostname func() string
	// Trusts adds to Config.Trusted what the domain state says; nil: nothing.
	Trusts func(a netip.Addr) bool
	Logger *slog.Logger
	Rand   io.Reader // crypto/rand.Reader
}

// Config has the limits. The zero value of each field means its default.
type Config struct {
	Hostname string         // first word of greeting and EHLO answer; required
	Trusted  []netip.Prefix // no connection limits; loopback is always trusted

	ConnsPerAddr    int // port 25, an address (an IPv6 /64); 50
	PendingPerAddr  int // submission, not yet logged in, an address; 20
	MaxConns        int // all ports together; 10,000
	MaxRecipients   int // a message; 1,000
	MaxBadCommands  int // then 421; 10
	MaxIdleCommands int // NOOP, RSET, VRFY, EHLO… without a message; 100
	MaxRefusedRcpts int // refused recipients in a row; 50
	MaxAuthFailures int // a session; 5

	CommandTimeout   time.Duration // 5 min, RFC 5321 section 4.5.3.2.7
	DataTimeout      time.Duration // between two reads in a text; 5 min
	AcceptTimeout    time.Duration // from the last byte to our answer; 9 min, as a client waits 10 (4.5.3.2.6)
	DataMinRate      int64         // bytes/s over a whole text, after DataTimeout; 1,024
	DataTime         time.Duration // one text at most; 2 h
	WriteTimeout     time.Duration // one flush; 2 min
	HandshakeTimeout time.Duration // TLS; 1 min
	SessionTime      time.Duration // then 421 between two transactions; 4 h
	ReverseTimeout   time.Duration // look-up of the reverse name; 5 s
	GreetingDelay    time.Duration // port 25, strangers; who speaks before it ends is refused; 0
}

// Limits that nobody needs to configure, in bytes.
const (
	maxCommandLine = 4 << 10 // RFC 5321 section 4.5.3.1.4 asks for 512; parameters need more
	maxAuthLine    = 12288   // RFC 4954 section 4
	maxDiscard     = 64 << 10
	maxRefused     = 1 << 20 // BDAT bytes read and thrown away before we close
	maxReplyText   = 400     // RFC 5321 section 4.5.3.1.5: 512 with the codes
)

func (c *Config) defaults() error {
	if c.Hostname == "" {
		return errors.New("smtpd: Config.Hostname is empty")
	}
	def(&c.ConnsPerAddr, 50)
	def(&c.PendingPerAddr, 20)
	def(&c.MaxConns, 10000)
	def(&c.MaxRecipients, 1000)
	def(&c.MaxBadCommands, 10)
	def(&c.MaxIdleCommands, 100)
	def(&c.MaxRefusedRcpts, 50)
	def(&c.MaxAuthFailures, 5)
	def(&c.CommandTimeout, 5*time.Minute)
	def(&c.DataTimeout, 5*time.Minute)
	def(&c.AcceptTimeout, 9*time.Minute)
	def(&c.DataMinRate, 1024)
	def(&c.DataTime, 2*time.Hour)
	def(&c.WriteTimeout, 2*time.Minute)
	def(&c.HandshakeTimeout, time.Minute)
	def(&c.SessionTime, 4*time.Hour)
	def(&c.ReverseTimeout, 5*time.Second)
	return nil
}

func def[T ~int | ~int64](v *T, d T) {
	if *v <= 0 {
		*v = d
	}
}

// Server serves any number of listeners with one set of limits.
type Server struct {
	cfg    Config
	deps   Deps
	limits *limits
	pool   buffers
	idBase string
	idNext atomic.Uint64

	draining atomic.Bool
	down     chan struct{} // closed when draining is set

	mu        sync.Mutex
	sessions  map[*session]struct{}
	listeners map[net.Listener]struct{}
	changed   chan struct{} // closed when the last session has ended and someone waits
}

// New makes a Server. It starts nothing.
func New(cfg Config, deps Deps) (*Server, error) {
	if deps.Hostname == nil {
		name := cfg.Hostname
		deps.Hostname = func() string { return name }
	} else if cfg.Hostname == "" {
		cfg.Hostname = deps.Hostname()
	}
	if err := cfg.defaults(); err != nil {
		return nil, err
	}
	if deps.Recipients == nil || deps.Senders == nil || deps.Intake == nil || deps.MaxSize == nil || deps.Logger == nil || deps.Rand == nil {
		return nil, errors.New("smtpd: Recipients, Senders, Intake, MaxSize, Logger and Rand are required")
	}
	if deps.Authenticator != nil && deps.Failures == nil {
		return nil, errors.New("smtpd: Failures is required with an Authenticator")
	}
	var b [4]byte
	if _, err := io.ReadFull(deps.Rand, b[:]); err != nil {
		return nil, fmt.Errorf("smtpd: random session names: %w", err)
	}
	return &Server{
		cfg: cfg, deps: deps, limits: newLimits(&cfg), idBase: hex.EncodeToString(b[:]),
		sessions: map[*session]struct{}{}, listeners: map[net.Listener]struct{}{}, down: make(chan struct{}),
	}, nil
}

// ErrDraining is returned by Serve once Drain was called.
var ErrDraining = errors.New("smtpd: draining")

// Serve takes connections from ln until ctx ends, Drain is called or ln fails;
// it closes ln. When ctx ends, its sessions are cut; use Drain first to be
// polite. It returns when all its sessions have ended: nil after ctx's end,
// ErrDraining after Drain.
func (s *Server) Serve(ctx context.Context, ln net.Listener, port Port) error {
	s.mu.Lock()
	if s.draining.Load() {
		s.mu.Unlock()
		ln.Close()
		return ErrDraining
	}
	s.listeners[ln] = struct{}{}
	s.mu.Unlock()

	var wg sync.WaitGroup
	sctx, cancel := context.WithCancel(ctx)
	defer func() {
		s.mu.Lock()
		delete(s.listeners, ln)
		s.mu.Unlock()
		ln.Close()
		wg.Wait() // sessions still running end by Drain, by ctx or by themselves
		cancel()
	}()
	stop := context.AfterFunc(ctx, func() { ln.Close() })
	defer stop()

	backoff := 5 * time.Millisecond
	for {
		conn, err := ln.Accept()
		switch {
		case err == nil:
			backoff = 5 * time.Millisecond
		case s.draining.Load():
			return ErrDraining
		case ctx.Err() != nil:
			return nil
		case isTemporary(err): // too many open files: let some end first
			s.deps.Logger.Warn("accept", "port", port.String(), "err", err)
			select {
			case <-time.After(backoff):
			case <-ctx.Done():
				return nil
			}
			backoff = min(2*backoff, time.Second)
			continue
		default:
			cancel()
			return fmt.Errorf("accept on %s: %w", port, err)
		}
		ss := s.newSession(sctx, conn, port)
		wg.Go(func() {
			defer s.forget(ss)
			ss.run()
		})
	}
}

func isTemporary(err error) bool {
	var ne interface{ Temporary() bool }
	return errors.As(err, &ne) && ne.Temporary()
}

func (s *Server) forget(ss *session) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.sessions, ss)
	if len(s.sessions) == 0 && s.changed != nil {
		close(s.changed)
		s.changed = nil
	}
}

// Drain stops taking connections, says 421 to every session without a
// transaction, and waits for the others until ctx ends; then it cuts them. It
// returns nil when every transaction ended by itself, else ctx's error. All
// sessions have ended when it returns.
func (s *Server) Drain(ctx context.Context) error {
	if !s.draining.Swap(true) {
		close(s.down)
	}
	s.mu.Lock()
	for ln := range s.listeners {
		ln.Close()
	}
	for ss := range s.sessions {
		ss.wakeIdle()
	}
	s.mu.Unlock()
	done := s.empty()
	select {
	case <-done:
		return nil
	case <-ctx.Done():
	}
	s.mu.Lock()
	for ss := range s.sessions {
		ss.cut(context.Cause(ctx))
	}
	s.mu.Unlock()
	<-done
	return context.Cause(ctx)
}

// empty returns a channel that is closed when no session is left.
func (s *Server) empty() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.sessions) == 0 {
		c := make(chan struct{})
		close(c)
		return c
	}
	if s.changed == nil {
		s.changed = make(chan struct{})
	}
	return s.changed
}

// Sessions returns the number of open sessions.
func (s *Server) Sessions() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.sessions)
}
