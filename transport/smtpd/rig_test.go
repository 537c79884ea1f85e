package smtpd

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"posthouse/mesh"
	"posthouse/simtest/bufpipe"
	"posthouse/simtest/testcert"
	"posthouse/transport"
)

// rig is a server with deciders that know the domain here.test with joe and
// jane (passwords "secret"), in a bubble or not.
type rig struct {
	t    testing.TB
	srv  *Server
	ln   *bufpipe.Listener
	logs *lockedBuffer
	done chan error
	stop context.CancelFunc

	mu       sync.Mutex
	messages []message
	partial  int // texts that ended without a clean end
	maxSize  int64
	hold     chan struct{} // Intake waits for it when not nil
	fail     error
}

type message struct {
	env   transport.Envelope
	rcpts []Rcpt
	body  string
}

func (m message) to() (out []string) {
	for _, r := range m.rcpts {
		out = append(out, r.Address.String())
	}
	return out
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

type sendersFunc func(ctx context.Context, s *Session, from mesh.Address, p MailParams) (transport.Origin, error)

func (f sendersFunc) Check(ctx context.Context, s *Session, from mesh.Address, p MailParams) (transport.Origin, error) {
	return f(ctx, s, from, p)
}

func (g *rig) Check(_ context.Context, s *Session, r Rcpt) error {
	switch {
	case r.Domainless:
		return nil
	case r.Address.DomainKey() != "here.test":
		if s.Origin == transport.OriginOutside {
			return transport.Faultf(550, "5.7.1", "No relaying for you")
		}
		return nil
	case strings.HasPrefix(r.Address.Key(), "full@"):
		return transport.Faultf(452, "4.2.2", "Mailbox full")
	case strings.HasPrefix(r.Address.Key(), "joe"), strings.HasPrefix(r.Address.Key(), "jane"), strings.HasPrefix(r.Address.Key(), "j"), strings.HasPrefix(r.Address.Key(), "ž"):
		return nil
	}
	return transport.Faultf(550, "5.1.1", "Nobody here by that name")
}

func senders(_ context.Context, s *Session, from mesh.Address, _ MailParams) (transport.Origin, error) {
	switch {
	case s.Login != nil && (from == mesh.Address{} || from.Key() == s.Login.Address):
		return transport.OriginSubmission, nil
	case s.Login != nil:
		return 0, transport.Faultf(553, "5.7.1", "That is not your address")
	case from.Local == "scanner":
		return transport.OriginDevice, nil
	case from.Local == "broken":
		return 0, errors.New("secret \x1b[31m cause\r\nwith lines")
	}
	return transport.OriginOutside, nil
}

func (g *rig) Authenticate(_ context.Context, user, password string, _ netip.Addr) (Login, error) {
	switch {
	case user == "down":
		return Login{}, errors.New("directory unreachable")
	case (user == "joe" || user == "jane") && password == "secret":
		return Login{Address: user + "@here.test"}, nil
	}
	return Login{}, transport.Faultf(535, "5.7.8", "wrong")
}

func (g *rig) Accept(ctx context.Context, env *transport.Envelope, rcpts []Rcpt, body io.Reader) (string, error) {
	b, err := io.ReadAll(body)
	if err != nil {
		g.mu.Lock()
		g.partial++
		g.mu.Unlock()
		return "", err
	}
	if g.hold != nil {
		select {
		case <-g.hold:
		case <-ctx.Done():
			return "", context.Cause(ctx)
		}
	}
	if g.fail != nil {
		return "", g.fail
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.messages = append(g.messages, message{*env, append([]Rcpt(nil), rcpts...), string(b)})
	return fmt.Sprintf("q%d", len(g.messages)), nil
}

func (g *rig) accepted() []message {
	g.mu.Lock()
	defer g.mu.Unlock()
	return append([]message(nil), g.messages...)
}

var testTLS = sync.OnceValue(func() *tls.Config { c, _ := testcert.For("mx.here.test"); return c })

// newRig starts a server on port; change may set limits and deps.
func newRig(t testing.TB, port Port, change func(*rig, *Config, *Deps)) *rig {
	g := &rig{t: t, logs: &lockedBuffer{}, done: make(chan error, 1), maxSize: 1 << 20}
	cfg := Config{Hostname: "mx.here.test"}
	deps := Deps{
		Recipients: g, Senders: sendersFunc(senders), Authenticator: g, Failures: new(failures), Intake: g,
		TLS: testTLS, MaxSize: func() int64 { return g.maxSize },
		Logger: slog.New(slog.NewJSONHandler(g.logs, nil)), Rand: rand.Reader,
	}
	if change != nil {
		change(g, &cfg, &deps)
	}
	var err error
	if g.srv, err = New(cfg, deps); err != nil {
		t.Fatal(err)
	}
	g.ln = bufpipe.Listen(addr("192.0.2.1:25"))
	ctx, cancel := context.WithCancel(context.Background())
	g.stop = cancel
	go func() { g.done <- g.srv.Serve(ctx, g.ln, port) }()
	return g
}

// failures has each wrong password of a pair wait a second longer.
type failures struct{ of sync.Map }

func (f *failures) Failed(from netip.Addr, user string, _ time.Time) time.Duration {
	n, _ := f.of.LoadOrStore(from.String()+user, new(atomic.Int64))
	return time.Duration(n.(*atomic.Int64).Add(1)) * time.Second
}

func (f *failures) Succeeded(from netip.Addr, user string) { f.of.Delete(from.String() + user) }

// close ends everything and waits.
func (g *rig) close() {
	g.stop()
	<-g.done
}

func addr(s string) net.Addr { return net.TCPAddrFromAddrPort(netip.MustParseAddrPort(s)) }

// client speaks to a rig.
type client struct {
	t    testing.TB
	raw  *bufpipe.Conn
	conn net.Conn
	r    *bufio.Reader
}

func (g *rig) dial() *client { return g.dialFrom("198.51.100.7:4711") }

func (g *rig) dialFrom(from string) *client {
	g.t.Helper()
	c, err := g.ln.Dial(addr(from))
	if err != nil {
		g.t.Fatal(err)
	}
	return newClient(g.t, c)
}

func newClient(t testing.TB, c *bufpipe.Conn) *client {
	return &client{t: t, raw: c, conn: c, r: bufio.NewReader(c)}
}

func (c *client) send(s string) {
	c.t.Helper()
	if _, err := io.WriteString(c.conn, s); err != nil {
		c.t.Fatalf("send %q: %v", s, err)
	}
}

// reply reads a whole reply; "EOF" when the server has closed.
func (c *client) reply() string {
	var b strings.Builder
	for {
		line, err := c.r.ReadString('\n')
		if err != nil {
			return b.String() + "EOF"
		}
		if !strings.HasSuffix(line, "\r\n") {
			return b.String() + "BAD LINE END " + line
		}
		b.WriteString(strings.TrimSuffix(line, "\r\n"))
		if len(line) < 4 || line[3] != '-' {
			return b.String()
		}
		b.WriteByte('\n')
	}
}

// do sends a command and wants a reply that begins so.
func (c *client) do(line, want string) string {
	c.t.Helper()
	c.send(line + "\r\n")
	return c.want(want, line)
}

func (c *client) want(want, after string) string {
	c.t.Helper()
	got := c.reply()
	if !strings.HasPrefix(got, want) {
		c.t.Fatalf("after %.80q: got %q, want %q…", after, got, want)
	}
	return got
}

func (c *client) startTLS() {
	c.t.Helper()
	t := tls.Client(c.conn, &tls.Config{InsecureSkipVerify: true})
	if err := t.Handshake(); err != nil {
		c.t.Fatal(err)
	}
	c.conn, c.r = t, bufio.NewReader(t)
}

func (c *client) close() { c.conn.Close() }

// greet reads the greeting and says EHLO.
func (c *client) greet(ehlo string) {
	c.t.Helper()
	c.want("220", "connect")
	c.do("EHLO "+ehlo, "250")
}

// ready brings a session to where DATA may follow.
func (c *client) ready() {
	c.t.Helper()
	c.want("220 mx.here.test ", "connect")
	c.do("EHLO client.test", "250-mx.here.test\n")
	c.do("MAIL FROM:<a@b.test>", "250 2.1.0")
	c.do("RCPT TO:<joe@here.test>", "250 2.1.5")
}

func bubble(t *testing.T, f func(t *testing.T)) { t.Helper(); synctest.Test(t, f) }

// talk runs f in a bubble with a server and a client that has just
// connected.
func talk(t *testing.T, port Port, change func(*rig, *Config, *Deps), f func(t *testing.T, g *rig, c *client)) {
	t.Helper()
	bubble(t, func(t *testing.T) {
		g := newRig(t, port, change)
		defer g.close()
		c := g.dial()
		defer c.close()
		f(t, g, c)
	})
}
