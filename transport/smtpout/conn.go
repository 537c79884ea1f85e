package smtpout

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"posthouse/transport"
)

// conn is a connection to a host that has said yes to EHLO.
type conn struct {
	run     *run
	cfg     *Config
	c       net.Conn
	rd      reader
	host    string
	stop    func() bool // ends the watch over ctx
	ctx     context.Context
	dotSent *atomic.Bool // the host may have the whole message

	ext      map[string]string // EHLO keywords in upper case, with their parameters
	secure   bool
	verified bool // the certificate is good for host
	closing  bool // the host said 421: nothing more goes here
}

// errInjected: bytes in the clear behind the answer to STARTTLS. Somebody in
// the middle wants us to take them for the first answers under TLS.
var errInjected = errors.New("unexpected bytes before TLS")

// connect opens a connection to the first host that takes one. A temporary
// fault means that none did; a permanent one that none will.
func (r *run) connect(ctx context.Context, requireTLS bool) (*conn, error) {
	hosts, err := r.route(ctx)
	if err != nil {
		return nil, err
	}
	var last error
	permanent := true
	for _, h := range hosts {
		cn, err := r.c.dial(ctx, h, requireTLS)
		if err == nil {
			cn.run = r
			r.mu.Lock()
			r.open++
			r.mu.Unlock()
			return cn, nil
		}
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		f := lost(err)
		permanent = permanent && !f.Temporary()
		if last == nil || !f.Temporary() || transport.AsFault(last).Temporary() {
			last = &transport.Fault{Code: f.Code, Enhanced: f.Enhanced, Text: h.label() + ": " + f.Text, Cause: err}
		}
		r.c.deps.Logger.Info("host did not take the connection", "dest", r.dest.String(), "host", h.label(), "addr", h.addr.String(), "err", printable(err.Error()))
	}
	if permanent {
		r.mu.Lock()
		r.fatal = transport.AsFault(last)
		r.mu.Unlock()
		return nil, last
	}
	f := transport.AsFault(last)
	if !f.Temporary() { // some other host may take it later
		f = &transport.Fault{Code: 451, Enhanced: "4.4.1", Text: f.Text, Cause: f.Cause}
	}
	return nil, f
}

// route looks the hosts up once in a Carry.
func (r *run) route(ctx context.Context) ([]host, error) {
	select {
	case r.gate <- struct{}{}:
		defer func() { <-r.gate }()
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	r.mu.Lock()
	hosts, fatal := r.hosts, r.fatal
	r.mu.Unlock()
	if fatal != nil {
		return nil, fatal
	}
	if hosts != nil {
		return hosts, nil
	}
	hosts, err := r.c.route(ctx, r.dest.Domain)
	r.mu.Lock()
	defer r.mu.Unlock()
	if err == nil {
		r.hosts = hosts
	} else if f := transport.AsFault(err); !f.Temporary() {
		r.fatal = f
	}
	return hosts, err
}

// dial connects, says EHLO and starts TLS where it is offered. Opportunistic
// TLS that fails is left out in a second try (RFC 7435); where TLS is asked
// for, never.
func (c *Carrier) dial(ctx context.Context, h host, requireTLS bool) (*conn, error) {
	strict := requireTLS || c.cfg.Smarthost != nil && c.cfg.Smarthost.User != ""
	cn, err := c.open(ctx, h, true, strict)
	var te tlsError
	if errors.As(err, &te) && !strict && ctx.Err() == nil && (c.cfg.Smarthost == nil || !c.cfg.Smarthost.ImplicitTLS) {
		c.deps.Logger.Info("no TLS with this host, going on in the clear", "host", h.label(), "err", printable(te.err.Error()))
		cn, err = c.open(ctx, h, false, false)
	}
	return cn, err
}

// tlsError is a failed handshake.
type tlsError struct{ err error }

func (e tlsError) Error() string { return "TLS: " + e.err.Error() }
func (e tlsError) Unwrap() error { return e.err }

func (c *Carrier) open(ctx context.Context, h host, useTLS, strict bool) (*conn, error) {
	dctx, cancel := context.WithTimeout(ctx, c.cfg.DialTimeout)
	raw, err := c.deps.Dial(dctx, "tcp", netip.AddrPortFrom(h.addr, h.port).String())
	cancel()
	if err != nil {
		return nil, &transport.Fault{Code: 451, Enhanced: "4.4.1", Text: "No connection", Cause: err}
	}
	var dotSent atomic.Bool
	cn := &conn{cfg: &c.cfg, c: raw, host: h.label(), ctx: ctx, dotSent: &dotSent}
	cn.rd = reader{conn: raw}
	cn.stop = context.AfterFunc(ctx, func() {
		// After the final dot the host may have the message already: wait a
		// moment for its word rather than send it twice.
		at := time.Unix(1, 0)
		if dotSent.Load() {
			at = time.Now().Add(dotGrace)
		}
		raw.SetDeadline(at)
	})
	if err := c.greet(ctx, cn, h, useTLS, strict); err != nil {
		cn.close()
		return nil, err
	}
	return cn, nil
}

// greet does all that goes before the first MAIL.
func (c *Carrier) greet(ctx context.Context, cn *conn, h host, useTLS, strict bool) error {
	s := c.cfg.Smarthost
	if s != nil && s.ImplicitTLS {
		if err := cn.handshake(ctx, c.deps.TLS, h, strict); err != nil {
			return err
		}
	}
	rp, err := cn.read(c.cfg.GreetingTimeout)
	if err != nil {
		return err
	}
	if rp.code != 220 {
		return rp.fault("the connection")
	}
	if err := cn.ehlo(); err != nil {
		return err
	}
	if cn.has("STARTTLS") && useTLS && !cn.secure {
		if err := cn.startTLS(ctx, c.deps.TLS, h, strict); err != nil {
			return err
		}
	}
	if strict && !cn.verified {
		return &transport.Fault{Code: 451, Enhanced: "4.7.10", Text: "TLS is required, and the host does not offer it"}
	}
	if s != nil && s.User != "" {
		if err := cn.auth(s.User, s.Password); err != nil {
			return err
		}
	}
	c.deps.Logger.Debug("connected", "host", cn.host, "addr", h.addr.String(), "tls", cn.secure, "verified", cn.verified)
	return nil
}

// ehlo introduces us and learns the extensions; HELO where EHLO is not known.
func (cn *conn) ehlo() error {
	cn.ext = map[string]string{}
	rp, err := cn.do(cn.cfg.CommandTimeout, "EHLO "+cn.cfg.Hostname)
	if err != nil {
		return err
	}
	if rp.code/100 == 5 && rp.code != 521 && rp.code != 554 { // RFC 5321 section 3.2
		if rp, err = cn.do(cn.cfg.CommandTimeout, "HELO "+cn.cfg.Hostname); err != nil {
			return err
		}
		if !rp.ok() {
			return rp.fault("HELO")
		}
		return nil
	}
	if !rp.ok() {
		return rp.fault("EHLO")
	}
	for _, l := range rp.lines[1:] {
		word, rest, _ := strings.Cut(l, " ")
		if w, r, ok := strings.Cut(word, "="); ok && strings.EqualFold(w, "AUTH") { // an old dialect
			word, rest = w, r+" "+rest
		}
		cn.ext[strings.ToUpper(word)] = rest
	}
	return nil
}

func (cn *conn) has(ext string) bool { _, ok := cn.ext[ext]; return ok }

// startTLS obeys RFC 3207. A refusal leaves the connection in the clear.
func (cn *conn) startTLS(ctx context.Context, base *tls.Config, h host, strict bool) error {
	rp, err := cn.do(cn.cfg.CommandTimeout, "STARTTLS")
	if err != nil {
		return err
	}
	if rp.code != 220 {
		if strict {
			return &transport.Fault{Code: 451, Enhanced: "4.7.10", Text: "TLS is required, and the host refuses it"}
		}
		if rp.code == 421 {
			return rp.fault("STARTTLS")
		}
		return nil
	}
	if cn.rd.buffered() > 0 {
		return &transport.Fault{Code: 451, Enhanced: "4.7.0", Text: "Somebody speaks between this host and us", Cause: errInjected}
	}
	if err := cn.handshake(ctx, base, h, strict); err != nil {
		return err
	}
	return cn.ehlo() // RFC 3207 section 4.2: all that was said before is void
}

// handshake starts TLS. Unless strict, the certificate is looked at but not
// insisted upon: without DANE or MTA-STS nobody promised one.
func (cn *conn) handshake(ctx context.Context, base *tls.Config, h host, strict bool) error {
	cfg := base.Clone()
	if cfg.MinVersion < tls.VersionTLS12 {
		cfg.MinVersion = tls.VersionTLS12
	}
	cfg.ServerName = h.name
	if h.name == "" {
		cfg.ServerName = h.addr.String()
	}
	cfg.InsecureSkipVerify = true // decided below
	verified := false
	cfg.VerifyConnection = func(st tls.ConnectionState) error {
		err := verify(st, base, cfg.ServerName)
		verified = err == nil
		if strict {
			return err
		}
		return nil
	}
	t := tls.Client(cn.c, cfg)
	hctx, cancel := context.WithTimeout(ctx, cn.cfg.TLSTimeout)
	defer cancel()
	if err := cn.c.SetDeadline(time.Now().Add(cn.cfg.TLSTimeout)); err != nil {
		return err
	}
	if err := t.HandshakeContext(hctx); err != nil {
		if strict {
			return &transport.Fault{Code: 451, Enhanced: "4.7.5", Text: "TLS is required, and the host's certificate or handshake is not good", Cause: err}
		}
		return tlsError{err}
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	cn.c = t
	cn.rd = reader{conn: t}
	cn.secure, cn.verified = true, verified
	return nil
}

func verify(st tls.ConnectionState, base *tls.Config, name string) error {
	if len(st.PeerCertificates) == 0 {
		return errors.New("no certificate")
	}
	opts := x509.VerifyOptions{DNSName: name, Roots: base.RootCAs, Intermediates: x509.NewCertPool()}
	if base.Time != nil {
		opts.CurrentTime = base.Time()
	}
	for _, c := range st.PeerCertificates[1:] {
		opts.Intermediates.AddCert(c)
	}
	_, err := st.PeerCertificates[0].Verify(opts)
	return err
}

// auth logs in at a smarthost; a refusal concerns the destination, not a leg.
func (cn *conn) auth(user, password string) error {
	mechs := " " + strings.ToUpper(cn.ext["AUTH"]) + " "
	b64 := func(s string) string { return base64.StdEncoding.EncodeToString([]byte(s)) }
	var rp reply
	var err error
	switch {
	case strings.Contains(mechs, " PLAIN "):
		rp, err = cn.do(cn.cfg.CommandTimeout, "AUTH PLAIN "+b64("\x00"+user+"\x00"+password))
	case strings.Contains(mechs, " LOGIN "):
		if rp, err = cn.do(cn.cfg.CommandTimeout, "AUTH LOGIN"); err == nil && rp.code == 334 {
			if rp, err = cn.do(cn.cfg.CommandTimeout, b64(user)); err == nil && rp.code == 334 {
				rp, err = cn.do(cn.cfg.CommandTimeout, b64(password))
			}
		}
	default:
		return &transport.Fault{Code: 451, Enhanced: "4.7.0", Text: "The smarthost offers no log-in that we know"}
	}
	if err != nil {
		return err
	}
	if rp.code != 235 {
		_, text := rp.words()
		return &transport.Fault{Code: 451, Enhanced: "4.7.8", Text: "The smarthost refuses our log-in: " + text}
	}
	return nil
}

// do sends one command and reads its answer.
func (cn *conn) do(timeout time.Duration, line string) (reply, error) {
	if err := cn.write(timeout, []byte(line+"\r\n")); err != nil {
		return reply{}, err
	}
	return cn.read(timeout)
}

func (cn *conn) write(timeout time.Duration, b []byte) error {
	if err := cn.arm(cn.c.SetWriteDeadline, timeout); err != nil {
		return err
	}
	_, err := cn.c.Write(b)
	return err
}

// dotGrace is how long the answer to a text is waited for after ctx's end.
const dotGrace = 10 * time.Second

// arm sets a deadline without undoing what the end of ctx did.
func (cn *conn) arm(set func(time.Time) error, timeout time.Duration) error {
	if err := set(time.Now().Add(timeout)); err != nil {
		return err
	}
	switch {
	case cn.ctx.Err() == nil:
		return nil
	case cn.dotSent.Load():
		return set(time.Now().Add(min(timeout, dotGrace)))
	}
	return context.Cause(cn.ctx)
}

func (cn *conn) read(timeout time.Duration) (reply, error) {
	if err := cn.arm(cn.c.SetReadDeadline, timeout); err != nil {
		return reply{}, err
	}
	rp, err := cn.rd.read()
	if err != nil {
		return rp, fmt.Errorf("read reply of %s: %w", cn.host, err)
	}
	if rp.code == 421 {
		cn.closing = true
	}
	return rp, nil
}

// quit says goodbye; the answer is not worth more than a moment.
func (cn *conn) quit() {
	if !cn.closing {
		cn.do(5*time.Second, "QUIT")
	}
	cn.close()
}

// close ends the connection.
func (cn *conn) close() {
	cn.stop()
	if connectionsEnd {
		cn.c.Close()
	}
	if r := cn.run; r != nil {
		cn.run = nil
		r.mu.Lock()
		r.open--
		r.mu.Unlock()
	}
}

// size returns what SIZE named: RFC 1870 section 4; 0 is "no limit known".
func (cn *conn) size() int64 {
	n, err := strconv.ParseInt(strings.TrimSpace(cn.ext["SIZE"]), 10, 64)
	if err != nil || n < 0 {
		return 0
	}
	return n
}
