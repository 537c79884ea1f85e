package smtpout

import (
	"context"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"

	"github.com/emersion/go-smtp"

	"posthouse/simtest/bufpipe"
	"posthouse/transport"
)

// foreign is a go-smtp backend that keeps what it gets.
type foreign struct {
	mu    sync.Mutex
	texts []string
	rcpts []string
}

func (f *foreign) NewSession(*smtp.Conn) (smtp.Session, error) { return f, nil }
func (f *foreign) Mail(string, *smtp.MailOptions) error        { return nil }
func (f *foreign) Reset()                                      {}
func (f *foreign) Logout() error                               { return nil }
func (f *foreign) Rcpt(to string, _ *smtp.RcptOptions) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.rcpts = append(f.rcpts, to)
	return nil
}
func (f *foreign) Data(r io.Reader) error {
	b, err := io.ReadAll(r)
	f.mu.Lock()
	defer f.mu.Unlock()
	f.texts = append(f.texts, string(b))
	return err
}

// TestForeignServer: a server written by others, with TLS.
func TestForeignServer(t *testing.T) {
	f := &foreign{}
	srv := smtp.NewServer(f)
	srv.Domain, srv.TLSConfig, srv.EnableDSN, srv.EnableSMTPUTF8 = "mx.away.test", serverTLS(), true, true
	at := net.TCPAddrFromAddrPort(netip.MustParseAddrPort("192.0.2.1:25"))
	ln := bufpipe.Listen(at)
	done := make(chan error, 1)
	go func() { done <- srv.Serve(ln) }()
	w := one(nil)
	const text = "Subject: x\r\n\r\n.dot\r\n..\r\nř\r\n"
	src := &source{legs: []*transport.Leg{leg(text, "a@away.test", "b@away.test"), leg(text, "ž@away.test")}}
	legs := src.legs
	c := carrier(t, w, func(_ *Config, d *Deps) {
		d.Dial = func(context.Context, string, string) (net.Conn, error) { return ln.Dial(at) }
	})
	if err := c.Carry(context.Background(), legs[0].Dest, src); err != nil {
		t.Fatal(err)
	}
	for _, l := range legs {
		for _, r := range src.results[l] {
			if r.Outcome != transport.Relayed || !r.DSN {
				t.Errorf("%+v", r)
			}
		}
	}
	srv.Close()
	<-done
	if len(f.texts) != 2 || f.texts[0] != text || f.texts[1] != text || !strings.Contains(strings.Join(f.rcpts, " "), "ž@away.test") {
		t.Errorf("%q %q", f.texts, f.rcpts)
	}
}
