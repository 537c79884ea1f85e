package appliance

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"path/filepath"
	"slices"
	"sync/atomic"

	"posthouse/appliance/clientca"
	"posthouse/appliance/health"
	"posthouse/mesh"
	"posthouse/mesh/domain"
)

// certificates is what the node shows to clients: from files that the admin
// named, from the mesh's own authority, or self-signed until either is there.
type certificates struct {
	n       *Node
	current atomic.Pointer[tls.Certificate]
}

func (c *certificates) path(name string) string { return filepath.Join(c.n.cfg.Data, name) }

// open loads what is there. What is damaged is said, and got anew where it can
// be: mail goes on without.
func (c *certificates) open() error {
	n := c.n
	if n.cfg.TLS.Certificate != "" {
		pair, err := tls.LoadX509KeyPair(n.cfg.TLS.Certificate, n.cfg.TLS.Key)
		if err != nil {
			return fmt.Errorf("load the certificate for clients: %w", err)
		}
		c.current.Store(&pair)
		return nil
	}
	text, err := n.env.Files.Read(c.path("tls.pem"))
	if err == nil {
		var pair tls.Certificate
		if pair, err = tls.X509KeyPair(text, text); err == nil {
			c.current.Store(&pair)
			return nil
		}
	}
	if !errors.Is(err, fs.ErrNotExist) {
		n.log.Error("the certificate for clients cannot be read; a new one is asked for", "err", err)
		n.board.Set(health.Condition{Name: "tls.damaged", Severity: health.Notice, Text: sentence("the certificate for mail clients could not be read and is got anew: " + err.Error())})
	}
	own, err := clientca.SelfSigned(n.cfg.Host, n.now(), n.env.Random)
	if err != nil {
		return err
	}
	c.current.Store(&own)
	return nil
}

// config returns TLS settings that always show the certificate of now.
func (c *certificates) config(protocols ...string) *tls.Config {
	return &tls.Config{MinVersion: tls.VersionTLS12, Time: c.n.now, NextProtos: protocols, GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return c.current.Load(), nil }}
}

// found makes the authority of a new mesh: its certificate, and both certificate
// and key, PEM, which are a secret for the domain state alone.
func (c *certificates) found(domain string, networks []netip.Prefix) (certificate, secret []byte, err error) {
	a, err := clientca.New([]string{domain}, networks, c.n.now(), c.n.env.Random)
	if err != nil {
		return nil, nil, err
	}
	if secret, err = a.Marshal(); err != nil {
		return nil, nil, err
	}
	return a.Certificate(), secret, c.n.env.Files.Write(c.path("ca.pem"), a.Certificate(), 0o644)
}

// ca returns the authority's certificate that clients trust, PEM; nil if this
// node has none. Before it has the domain state it has what the join told.
func (c *certificates) ca() []byte {
	if a := c.n.state.Authority(); a != nil {
		return a
	}
	b, err := c.n.env.Files.Read(c.path("ca.pem"))
	if err != nil {
		return nil
	}
	return b
}

// names lists what this node's certificate should say.
func (c *certificates) names() (hosts []string, addrs []netip.Addr) {
	n := c.n
	hosts = []string{n.cfg.Host}
	if s := n.state.Settings().ClientName; s != "" && !slices.Contains(hosts, s) {
		hosts = append(hosts, s)
	}
	if a, err := netip.ParseAddrPort(n.cfg.Listen.IMAPS); err == nil && a.Addr().IsLoopback() {
		addrs = append(addrs, a.Addr()) // the demo: people reach it by address
	}
	return hosts, addrs
}

// due reports whether the node needs a (new) certificate from the authority.
func (c *certificates) due() bool {
	if c.n.cfg.TLS.Certificate != "" {
		return false
	}
	leaf, err := x509.ParseCertificate(c.current.Load().Certificate[0])
	if err != nil || leaf.Issuer.String() == leaf.Subject.String() || leaf.NotAfter.Sub(c.n.now()) < clientca.RenewBefore || c.n.now().Before(leaf.NotBefore) {
		return true
	}
	hosts, _ := c.names()
	for _, h := range hosts {
		if leaf.VerifyHostname(h) != nil {
			return true
		}
	}
	return false
}

// sign issues a certificate for a member's request; only candidates can.
func (c *certificates) sign(peer mesh.NodeID, csr []byte) ([]byte, error) {
	secret, err := c.n.state.AuthoritySecret()
	if err != nil {
		return nil, fmt.Errorf("the authority's key: %w", err)
	}
	a, err := clientca.Parse(secret)
	if err != nil {
		return nil, err
	}
	x, ok := c.n.state.Node(peer)
	if !ok || !x.Member() {
		return nil, errors.New("not a member")
	}
	return a.Issue(csr, func(h string) bool { return h == x.Host || h == x.ClientName || h == c.n.state.Settings().ClientName }, c.n.now(), c.n.env.Random)
}

// renew gets a certificate when one is due: signed here by a candidate, asked
// for elsewhere.
func (c *certificates) renew(ctx context.Context, ask func(ctx context.Context, csr []byte) ([]byte, error)) error {
	if !c.due() {
		return nil
	}
	hosts, addrs := c.names()
	csr, key, err := clientca.Request(hosts, addrs, c.n.env.Random)
	if err != nil {
		return err
	}
	var chain []byte
	if chain, err = c.sign(c.n.id, csr); errors.Is(err, domain.ErrSealed) {
		chain, err = ask(ctx, csr)
	}
	if err != nil {
		return err
	}
	text := slices.Concat(chain, key)
	pair, err := tls.X509KeyPair(text, text)
	if err != nil {
		return fmt.Errorf("the authority's answer: %w", err)
	}
	if err := c.n.env.Files.Write(c.path("tls.pem"), text, 0o600); err != nil {
		return err
	}
	c.current.Store(&pair)
	return nil
}
