package smtpout

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"posthouse/simtest/bufpipe"
	"posthouse/transport"
)

// world is a resolver and a network of fake hosts.
type world struct {
	mx    map[string][]*net.MX
	mxErr map[string]error
	addrs map[string][]string
	hosts map[string]*fakeHost // by address:port

	mu    sync.Mutex
	dials []string
	open  int
	most  int
	wg    sync.WaitGroup
}

func (w *world) LookupMX(_ context.Context, d string) ([]*net.MX, error) {
	if err := w.mxErr[d]; err != nil {
		return nil, err
	}
	if m, ok := w.mx[d]; ok {
		return m, nil
	}
	return nil, &net.DNSError{Err: "no such host", Name: d, IsNotFound: true}
}

func (w *world) LookupNetIP(ctx context.Context, _, h string) ([]netip.Addr, error) {
	var out []netip.Addr
	for _, a := range w.addrs[h] {
		if a == "hang" {
			<-ctx.Done()
			return nil, &net.DNSError{Err: "timeout", Name: h, IsTimeout: true}
		}
		out = append(out, netip.MustParseAddr(a))
	}
	if out == nil {
		return nil, &net.DNSError{Err: "no such host", Name: h, IsNotFound: true}
	}
	return out, nil
}

func (w *world) dial(ctx context.Context, _, address string) (net.Conn, error) {
	w.mu.Lock()
	w.dials = append(w.dials, address)
	h := w.hosts[address]
	w.mu.Unlock()
	if h == nil {
		return nil, errors.New("connection refused")
	}
	if h.unreachable {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	a := net.TCPAddrFromAddrPort(netip.MustParseAddrPort(address))
	c, s := bufpipe.New(a, a)
	w.mu.Lock()
	w.open++
	w.most = max(w.most, w.open)
	w.mu.Unlock()
	w.wg.Go(func() {
		h.serve(s)
		w.mu.Lock()
		w.open--
		w.mu.Unlock()
	})
	return c, nil
}

func (w *world) openNow() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.open
}

// fakeHost is a scripted SMTP server. answers maps the beginning of a command
// ("", the greeting; "." the text) to its answer; the longest match wins.
// "close" closes, "hang" says nothing more. {n} in a key counts: "MAIL{2}" is
// the second MAIL of the connection.
type fakeHost struct {
	ehlo        []string
	answers     map[string]string
	unreachable bool
	badTLS      bool
	limitConns  int

	mu    sync.Mutex
	said  []string // commands
	texts []string // raw, as on the wire, with the end
	conns int
	now   int
}

func (h *fakeHost) answer(cmd string, n int) string {
	best, ans := -1, ""
	for k, v := range h.answers {
		key := k
		if i := strings.Index(k, "{"); i >= 0 {
			var want int
			fmt.Sscanf(k[i:], "{%d}", &want)
			if want != n {
				continue
			}
			key = k[:i]
		}
		if key == "" && cmd != "" || !strings.HasPrefix(cmd, key) {
			continue
		}
		if len(k) > best {
			best, ans = len(k), v
		}
	}
	return ans
}

func (h *fakeHost) serve(c net.Conn) {
	defer c.Close()
	h.mu.Lock()
	h.conns++
	h.now++
	over := h.limitConns > 0 && h.now > h.limitConns
	h.mu.Unlock()
	defer func() { h.mu.Lock(); h.now--; h.mu.Unlock() }()
	r := bufio.NewReader(c)
	counts := map[string]int{}
	say := func(cmd, def string) bool {
		verb, _, _ := strings.Cut(cmd, " ")
		counts[verb]++
		ans := h.answer(cmd, counts[verb])
		switch ans {
		case "":
			ans = def
		case "close":
			return false
		case "hang":
			io.Copy(io.Discard, r)
			return false
		}
		_, err := io.WriteString(c, strings.ReplaceAll(ans, "\n", "\r\n")+"\r\n")
		return err == nil && !strings.HasPrefix(ans, "421")
	}
	if over {
		io.WriteString(c, "421 4.7.0 too many connections\r\n")
		return
	}
	if !say("", "220 fake ESMTP") {
		return
	}
	for {
		line, err := r.ReadString('\n')
		if err != nil {
			return
		}
		line = strings.TrimSuffix(line, "\r\n")
		h.mu.Lock()
		h.said = append(h.said, line)
		h.mu.Unlock()
		verb, _, _ := strings.Cut(line, " ")
		def := "250 ok"
		switch verb {
		case "EHLO":
			def = "250-fake\n"
			for _, e := range h.ehlo {
				if _, isTLS := c.(*tls.Conn); e != "STARTTLS" || !isTLS {
					def += "250-" + e + "\n"
				}
			}
			def += "250 HELP"
		case "QUIT":
			say(line, "221 bye")
			return
		case "DATA":
			def = "354 go"
		case "STARTTLS":
			def = "220 go"
		case "AUTH":
			def = "235 ok"
		}
		if !say(line, def) {
			return
		}
		ans := h.answer(line, counts[verb])
		switch {
		case verb == "DATA" && (ans == "" || strings.HasPrefix(ans, "354")):
			var text strings.Builder
			for !strings.HasSuffix(text.String(), "\r\n.\r\n") && text.String() != ".\r\n" {
				l, err := r.ReadString('\n')
				if err != nil {
					return
				}
				text.WriteString(l)
			}
			h.mu.Lock()
			h.texts = append(h.texts, text.String())
			h.mu.Unlock()
			if !say(".", "250 2.0.0 stored as F1") {
				return
			}
		case verb == "STARTTLS" && (ans == "" || strings.HasPrefix(ans, "220")):
			if h.badTLS {
				r.Peek(1)
				io.WriteString(c, "this is not TLS at all, sorry")
				return
			}
			t := tls.Server(c, serverTLS())
			if t.Handshake() != nil {
				return
			}
			c, r = t, bufio.NewReader(t)
		}
	}
}

func (h *fakeHost) commands() string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return strings.Join(h.said, "\n")
}

func (h *fakeHost) taken() []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return append([]string(nil), h.texts...)
}

var certs = sync.OnceValues(func() (*tls.Config, *x509.CertPool) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		panic(err)
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), DNSNames: []string{"mx.away.test"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Unix(0, 0), NotAfter: time.Unix(1<<33, 0)}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &key.PublicKey, key)
	if err != nil {
		panic(err)
	}
	cert, _ := x509.ParseCertificate(der)
	pool := x509.NewCertPool()
	pool.AddCert(cert)
	return &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}}, pool
})

func serverTLS() *tls.Config { c, _ := certs(); return c }

// one is a world with one exchanger for away.test.
func one(h *fakeHost) *world {
	return &world{
		mx:    map[string][]*net.MX{"away.test": {{Host: "mx.away.test.", Pref: 10}}},
		addrs: map[string][]string{"mx.away.test": {"192.0.2.1"}},
		hosts: map[string]*fakeHost{"192.0.2.1:25": h},
	}
}

type memBody string

func (b memBody) Size() int64 { return int64(len(b)) }
func (b memBody) Open() (transport.BodyReader, error) {
	return struct {
		*bytes.Reader
		io.Closer
	}{bytes.NewReader([]byte(b)), io.NopCloser(nil)}, nil
}

// source hands out legs and keeps their results.
type source struct {
	mu      sync.Mutex
	legs    []*transport.Leg
	wait    bool // wait for ctx when there is none left
	results map[*transport.Leg][]transport.Result
}

func (s *source) Next(ctx context.Context) (*transport.Leg, error) {
	s.mu.Lock()
	if len(s.legs) > 0 {
		l := s.legs[0]
		s.legs = s.legs[1:]
		s.mu.Unlock()
		return l, nil
	}
	s.mu.Unlock()
	if s.wait {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	return nil, io.EOF
}

func (s *source) Finish(l *transport.Leg, r []transport.Result) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.results == nil {
		s.results = map[*transport.Leg][]transport.Result{}
	}
	if s.results[l] != nil || len(r) != len(l.Rcpts) {
		panic("finished twice or with the wrong number of results")
	}
	s.results[l] = r
}

func leg(body string, rcpts ...string) *transport.Leg {
	l := &transport.Leg{Dest: transport.Destination{Scope: transport.ScopeOutside, Domain: "away.test"},
		Envelope: transport.Envelope{From: "joe@here.test"}, Body: memBody(body)}
	for _, r := range rcpts {
		l.Rcpts = append(l.Rcpts, transport.Recipient{Address: r})
	}
	return l
}

// carry runs one Carry over legs and returns results as "outcome code enhanced
// text", a line for each recipient.
func carry(t *testing.T, w *world, change func(*Config, *Deps), legs ...*transport.Leg) (string, error) {
	t.Helper()
	src := &source{legs: legs}
	err := carrier(t, w, change).Carry(context.Background(), legs[0].Dest, src)
	w.wg.Wait()
	var b strings.Builder
	for _, l := range legs {
		for i := range l.Rcpts {
			if src.results[l] == nil {
				b.WriteString("pending\n")
				continue
			}
			r := src.results[l][i]
			fmt.Fprintf(&b, "%s %d %s %s\n", r.Outcome, r.Code, r.Enhanced, r.Text)
		}
	}
	return b.String(), err
}

func carrier(t *testing.T, w *world, change func(*Config, *Deps)) *Carrier {
	t.Helper()
	_, roots := certs()
	cfg := Config{Hostname: "out.here.test"}
	deps := Deps{Resolver: w, Dial: w.dial, Logger: slog.New(slog.DiscardHandler), Rand: rand.Reader, TLS: &tls.Config{RootCAs: roots}}
	if change != nil {
		change(&cfg, &deps)
	}
	c, err := New(cfg, deps)
	if err != nil {
		t.Fatal(err)
	}
	return c
}
