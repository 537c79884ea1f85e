// Package outside is the small outside world of the demo: a mail server that
// keeps what it gets, and a DNS server that knows the demo's names. It stands
// on other libraries than the product's own sessions do, so that it is a
// counterpart and not a mirror.
package outside

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/emersion/go-smtp"
	"github.com/miekg/dns"
)

// Config says what the outside world is. It is read as JSON from a file.
type Config struct {
	SMTP    string   `json:"smtp"`    // address:port of the mail server
	DNS     string   `json:"dns"`     // address:port of the DNS server, UDP and TCP
	Host    string   `json:"host"`    // the mail server's host name
	Folder  string   `json:"folder"`  // where received mail is kept, one .eml each
	Records []string `json:"records"` // zone file lines: "example.net. 60 IN MX 10 mail.example.net."
}

// maxMessage bounds one message, in bytes.
const maxMessage = 100 << 20

// Run serves until ctx ends. cert is offered by STARTTLS.
func Run(ctx context.Context, cfg Config, cert tls.Certificate) error {
	if err := os.MkdirAll(cfg.Folder, 0o755); err != nil {
		return fmt.Errorf("make mail folder: %w", err)
	}
	zone, err := newZone(cfg.Records)
	if err != nil {
		return err
	}
	var lc net.ListenConfig
	mail, err := lc.Listen(ctx, "tcp", cfg.SMTP)
	if err != nil {
		return fmt.Errorf("listen for mail: %w", err)
	}
	udp, err := lc.ListenPacket(ctx, "udp", cfg.DNS)
	if err != nil {
		mail.Close()
		return fmt.Errorf("listen for DNS: %w", err)
	}
	tcp, err := lc.Listen(ctx, "tcp", cfg.DNS)
	if err != nil {
		mail.Close()
		udp.Close()
		return fmt.Errorf("listen for DNS: %w", err)
	}
	server := smtp.NewServer(smtp.BackendFunc(func(c *smtp.Conn) (smtp.Session, error) {
		return &session{folder: cfg.Folder, client: c.Conn().RemoteAddr().String(), helo: c.Hostname}, nil
	}))
	server.Domain, server.MaxMessageBytes, server.MaxRecipients = cfg.Host, maxMessage, 1000
	server.MaxLineLength = 1 << 20
	server.ReadTimeout, server.WriteTimeout = 5*time.Minute, time.Minute
	server.EnableSMTPUTF8, server.EnableDSN = true, true
	server.TLSConfig = &tls.Config{Certificates: []tls.Certificate{cert}}

	var wg sync.WaitGroup
	errs := make(chan error, 3)
	names := []*dns.Server{{PacketConn: udp, Handler: zone}, {Listener: tcp, Handler: zone}}
	wg.Go(func() { errs <- server.Serve(mail) })
	for _, s := range names {
		wg.Go(func() { errs <- s.ActivateAndServe() })
	}
	select {
	case <-ctx.Done():
	case err = <-errs:
	}
	server.Close()
	udp.Close()
	tcp.Close()
	wg.Wait()
	if errors.Is(err, smtp.ErrServerClosed) {
		err = nil
	}
	return err
}

// Envelope is kept beside each message as .json.
type Envelope struct {
	From     string    `json:"from"`
	To       []string  `json:"to"`
	Client   string    `json:"client"`
	Helo     string    `json:"helo"`
	TLS      bool      `json:"tls"`
	Received time.Time `json:"received"`
}

type session struct {
	folder, client string
	helo           func() string
	env            Envelope
}

func (s *session) Reset()        { s.env = Envelope{} }
func (s *session) Logout() error { return nil }

func (s *session) Mail(from string, _ *smtp.MailOptions) error {
	s.env = Envelope{From: from, Client: s.client, Helo: s.helo()}
	return nil
}

// Rcpt refuses and defers by the local part, so that a person can try both:
// "refuse@" is unknown, "later@" is deferred.
func (s *session) Rcpt(to string, _ *smtp.RcptOptions) error {
	switch local, _, _ := strings.Cut(to, "@"); strings.ToLower(local) {
	case "refuse":
		return &smtp.SMTPError{Code: 550, EnhancedCode: smtp.EnhancedCode{5, 1, 1}, Message: "There is nobody called refuse"}
	case "later":
		return &smtp.SMTPError{Code: 450, EnhancedCode: smtp.EnhancedCode{4, 2, 0}, Message: "Come back later"}
	}
	s.env.To = append(s.env.To, to)
	return nil
}

// Data keeps the message: envelope first, then the message under its final
// name, so that whoever sees the .eml finds both.
func (s *session) Data(r io.Reader) error {
	text, err := io.ReadAll(r)
	if err != nil {
		return err
	}
	s.env.Received = time.Now().UTC()
	id := make([]byte, 6)
	rand.Read(id)
	base := filepath.Join(s.folder, s.env.Received.Format("20060102T150405.000000000")+"-"+hex.EncodeToString(id))
	env, err := json.Marshal(s.env)
	if err != nil {
		return err
	}
	if err := os.WriteFile(base+".json", env, 0o644); err != nil {
		return err
	}
	if err := os.WriteFile(base+".tmp", text, 0o644); err != nil {
		return err
	}
	return os.Rename(base+".tmp", base+".eml")
}

// zone answers from a fixed set of records.
type zone struct {
	records map[string][]dns.RR // by lower-case name
}

func newZone(lines []string) (*zone, error) {
	z := &zone{records: map[string][]dns.RR{}}
	for _, l := range lines {
		rr, err := dns.NewRR(l)
		if err != nil || rr == nil {
			return nil, fmt.Errorf("record %q: %w", l, err)
		}
		name := strings.ToLower(rr.Header().Name)
		z.records[name] = append(z.records[name], rr)
	}
	return z, nil
}

// ServeDNS implements dns.Handler. A name that exists without the type asked
// for is answered empty, one that does not exist NXDOMAIN.
func (z *zone) ServeDNS(w dns.ResponseWriter, q *dns.Msg) {
	m := new(dns.Msg)
	m.SetReply(q)
	m.Authoritative = true
	if len(q.Question) != 1 {
		m.Rcode = dns.RcodeFormatError
	} else {
		name := strings.ToLower(q.Question[0].Name)
		rrs, known := z.records[name]
		for n := range z.records {
			known = known || strings.HasSuffix(n, "."+name)
		}
		if !known {
			m.Rcode = dns.RcodeNameError
		}
		for _, rr := range rrs {
			if t := rr.Header().Rrtype; t == q.Question[0].Qtype || t == dns.TypeCNAME {
				m.Answer = append(m.Answer, rr)
			}
		}
	}
	w.WriteMsg(m)
}

// PTR returns the reverse record of an address.
func PTR(addr netip.Addr, host string) (string, error) {
	name, err := dns.ReverseAddr(addr.String())
	if err != nil {
		return "", fmt.Errorf("reverse name of %s: %w", addr, err)
	}
	return fmt.Sprintf("%s 60 IN PTR %s.", name, host), nil
}
