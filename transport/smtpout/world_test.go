package smtpout

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"

	"posthouse/simtest/bufpipe"
	"posthouse/simtest/testcert"
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

var certs = sync.OnceValues(func() (*tls.Config, *x509.CertPool) { return testcert.For("mx.away.test") })

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
