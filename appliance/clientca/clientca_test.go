package clientca

import (
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"net/netip"
	"strings"
	"testing"
	"time"
)

func TestAClientTrustsOnlyTheMeshesOwnNames(t *testing.T) {
	now := time.Now()
	a, err := New([]string{"company.test"}, []netip.Prefix{netip.MustParsePrefix("127.0.5.0/24")}, now, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	text, err := a.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	if a, err = Parse(text); err != nil {
		t.Fatal(err)
	}
	any := func(string) bool { return true }
	for _, tc := range []struct {
		name, host, addr, wrong string
		allowed                 func(string) bool
	}{
		{"its host name and address", "hq.company.test", "127.0.5.11", "", any},
		{"a foreign name", "www.example.net", "127.0.5.11", "clients would refuse", any},
		{"a foreign address, which is left out", "hq.company.test", "127.0.6.11", "", any},
		{"another node's name", "plzen.company.test", "127.0.5.11", "not a name of this node", func(h string) bool { return h == "hq.company.test" }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			csr, key, err := Request([]string{tc.host}, []netip.Addr{netip.MustParseAddr(tc.addr)}, rand.Reader)
			if err != nil {
				t.Fatal(err)
			}
			chain, err := a.Issue(csr, tc.allowed, now, rand.Reader)
			if tc.wrong != "" {
				if err == nil || !strings.Contains(err.Error(), tc.wrong) {
					t.Errorf("got %v, want %q", err, tc.wrong)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			pair, err := tls.X509KeyPair(chain, key)
			if err != nil {
				t.Fatal(err)
			}
			pool := x509.NewCertPool()
			pool.AppendCertsFromPEM(a.Certificate())
			leaf, _ := x509.ParseCertificate(pair.Certificate[0])
			for _, name := range []string{tc.host, tc.addr} {
				if name == "127.0.6.11" {
					if leaf.VerifyHostname(name) == nil {
						t.Errorf("%s stands in the certificate", name)
					}
					continue
				}
				if _, err := leaf.Verify(x509.VerifyOptions{Roots: pool, DNSName: name}); err != nil {
					t.Errorf("%s: %v", name, err)
				}
			}
		})
	}
}

func TestAFreshNodeHasACertificateToShow(t *testing.T) {
	c, err := SelfSigned("new.company.test", time.Now(), rand.Reader)
	if err != nil || len(c.Certificate) != 1 {
		t.Error(c, err)
	}
}
