// Package clientca is the certificate authority that clients of a mesh trust
// until ACME takes over: it signs what IMAP, submission and the pages show.
// Nodes do not use it among themselves (see mesh/identity).
//
// The authority's key stands in the domain state, sealed to the nodes that may
// lead the mesh; others ask one of them for a certificate over the link.
package clientca

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/netip"
	"slices"
	"time"
)

// Lifetimes. Clients refuse server certificates of more than 825 days.
const (
	authorityLife = 10 * 365 * 24 * time.Hour
	serverLife    = 800 * 24 * time.Hour
	// RenewBefore is how long before its end a certificate is replaced.
	RenewBefore = 60 * 24 * time.Hour
)

// Authority signs server certificates for the mesh's own names.
type Authority struct {
	cert    *x509.Certificate
	certPEM []byte
	key     *ecdsa.PrivateKey
}

// New makes an authority that can sign only for names at or under domains and
// for addresses in nets (RFC 5280 section 4.2.1.10).
func New(domains []string, nets []netip.Prefix, now time.Time, random io.Reader) (*Authority, error) {
	if len(domains) == 0 {
		return nil, errors.New("an authority needs a domain")
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), random)
	if err != nil {
		return nil, fmt.Errorf("make authority key: %w", err)
	}
	tmpl := &x509.Certificate{
		Subject:   pkix.Name{CommonName: "Posthouse authority of " + domains[0], Organization: []string{domains[0]}},
		NotBefore: now.Add(-time.Hour), NotAfter: now.Add(authorityLife),
		IsCA: true, BasicConstraintsValid: true, MaxPathLenZero: true,
		KeyUsage:                    x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		PermittedDNSDomainsCritical: true, PermittedDNSDomains: domains,
	}
	for _, n := range nets {
		tmpl.PermittedIPRanges = append(tmpl.PermittedIPRanges, &net.IPNet{IP: n.Masked().Addr().AsSlice(), Mask: net.CIDRMask(n.Bits(), n.Addr().BitLen())})
	}
	if len(nets) == 0 { // no address at all
		tmpl.ExcludedIPRanges = []*net.IPNet{
			{IP: net.IPv4zero.To4(), Mask: net.CIDRMask(0, 32)}, {IP: net.IPv6zero, Mask: net.CIDRMask(0, 128)}}
	}
	der, err := sign(tmpl, tmpl, &key.PublicKey, key, random)
	if err != nil {
		return nil, err
	}
	return load(der, key)
}

func load(der []byte, key *ecdsa.PrivateKey) (*Authority, error) {
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("authority certificate: %w", err)
	}
	if !cert.IsCA || !cert.PublicKey.(*ecdsa.PublicKey).Equal(&key.PublicKey) {
		return nil, errors.New("authority certificate and key do not belong together")
	}
	return &Authority{cert: cert, key: key, certPEM: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})}, nil
}

func sign(tmpl, parent *x509.Certificate, pub any, key *ecdsa.PrivateKey, random io.Reader) ([]byte, error) {
	serial := make([]byte, 16)
	if _, err := io.ReadFull(random, serial); err != nil {
		return nil, fmt.Errorf("make serial number: %w", err)
	}
	serial[0] &= 0x7f
	tmpl.SerialNumber = new(big.Int).SetBytes(serial)
	der, err := x509.CreateCertificate(random, tmpl, parent, pub, key)
	if err != nil {
		return nil, fmt.Errorf("sign certificate: %w", err)
	}
	return der, nil
}

// Certificate returns the authority's certificate, PEM: what clients trust.
func (a *Authority) Certificate() []byte { return a.certPEM }

// Marshal returns certificate and private key, PEM: a secret.
func (a *Authority) Marshal() ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(a.key)
	if err != nil {
		return nil, fmt.Errorf("encode authority key: %w", err)
	}
	return slices.Concat(a.certPEM, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})), nil
}

// Parse reads what Marshal wrote.
func Parse(text []byte) (*Authority, error) {
	pair, err := tls.X509KeyPair(text, text)
	if err != nil {
		return nil, fmt.Errorf("authority file: %w", err)
	}
	key, ok := pair.PrivateKey.(*ecdsa.PrivateKey)
	if !ok {
		return nil, errors.New("authority file: not an ECDSA key")
	}
	return load(pair.Certificate[0], key)
}

// Request makes a key and a signing request for a node's client-facing names.
// The key is PEM and never leaves the node.
func Request(hosts []string, addrs []netip.Addr, random io.Reader) (csr, keyPEM []byte, err error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), random)
	if err != nil {
		return nil, nil, fmt.Errorf("make server key: %w", err)
	}
	tmpl := &x509.CertificateRequest{Subject: pkix.Name{CommonName: hosts[0]}, DNSNames: hosts}
	for _, a := range addrs {
		tmpl.IPAddresses = append(tmpl.IPAddresses, a.AsSlice())
	}
	if csr, err = x509.CreateCertificateRequest(random, tmpl, key); err != nil {
		return nil, nil, fmt.Errorf("make signing request: %w", err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, nil, fmt.Errorf("encode server key: %w", err)
	}
	return csr, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), nil
}

// Issue signs a request after allowed agreed to each of its host names, and
// returns the chain, PEM. Names outside the authority's domains are refused by
// every client anyway; they are refused here with a clear error. Addresses
// outside its networks are left out: clients use names.
func (a *Authority) Issue(csr []byte, allowed func(host string) bool, now time.Time, random io.Reader) ([]byte, error) {
	req, err := x509.ParseCertificateRequest(csr)
	if err != nil {
		return nil, fmt.Errorf("signing request: %w", err)
	}
	if err := req.CheckSignature(); err != nil {
		return nil, fmt.Errorf("signing request: %w", err)
	}
	for _, h := range req.DNSNames {
		if !allowed(h) {
			return nil, fmt.Errorf("signing request: %s is not a name of this node", h)
		}
	}
	addrs := slices.DeleteFunc(req.IPAddresses, func(ip net.IP) bool {
		return !slices.ContainsFunc(a.cert.PermittedIPRanges, func(n *net.IPNet) bool { return n.Contains(ip) })
	})
	tmpl := &x509.Certificate{
		Subject: req.Subject, DNSNames: req.DNSNames, IPAddresses: addrs,
		NotBefore: now.Add(-time.Hour), NotAfter: now.Add(serverLife),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	der, err := sign(tmpl, a.cert, req.PublicKey, a.key, random)
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	pool.AddCert(a.cert)
	cert, err := x509.ParseCertificate(der)
	if err == nil {
		_, err = cert.Verify(x509.VerifyOptions{Roots: pool, CurrentTime: now})
	}
	if err != nil {
		return nil, fmt.Errorf("clients would refuse this certificate: %w", err)
	}
	return slices.Concat(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), a.certPEM), nil
}

// SelfSigned returns a certificate that no client trusts, for the pages of a
// node that belongs to no mesh yet.
func SelfSigned(host string, now time.Time, random io.Reader) (tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), random)
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("make server key: %w", err)
	}
	tmpl := &x509.Certificate{
		Subject: pkix.Name{CommonName: host}, DNSNames: []string{host},
		NotBefore: now.Add(-time.Hour), NotAfter: now.Add(serverLife),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	der, err := sign(tmpl, tmpl, &key.PublicKey, key, random)
	if err != nil {
		return tls.Certificate{}, err
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, nil
}
