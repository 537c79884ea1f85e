package identity

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"posthouse/mesh"
)

// counting is a source of "random" bytes that are the same in every run.
type counting byte

func (c *counting) Read(p []byte) (int, error) {
	for i := range p {
		p[i] = byte(*c)
		*c++
	}
	return len(p), nil
}

func testKey(t testing.TB, start byte) *Key {
	t.Helper()
	c := counting(start)
	k, err := Generate(&c)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func TestKeySurvivesARestart(t *testing.T) {
	path := filepath.Join(t.TempDir(), "node.key")
	c := counting(1)
	first, created, err := LoadOrCreate(path, &c)
	if err != nil || !created {
		t.Fatalf("first start: created %v, %v", created, err)
	}
	second, created, err := LoadOrCreate(path, &c)
	if err != nil || created {
		t.Fatalf("second start: created %v, %v", created, err)
	}
	if first.Hash() != second.Hash() || first.StatelessResetKey() != second.StatelessResetKey() {
		t.Error("the second start is another node")
	}
	if !bytes.Equal(first.cert.Certificate[0], second.cert.Certificate[0]) {
		t.Error("one key gave two certificates")
	}
	info, err := os.Stat(path)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v; want 0600", info.Mode(), err)
	}
	if left, _ := filepath.Glob(path + ".*"); len(left) != 1 || left[0] != path+copySuffix {
		t.Errorf("left behind: %v", left)
	}
	if err := second.Save(path); !errors.Is(err, fs.ErrExist) {
		t.Errorf("a key was written over: %v", err)
	}
}

func TestAKeyIsMadeWholeFromItsCopy(t *testing.T) {
	for _, tt := range []struct {
		name  string
		spoil func(path string) error
	}{
		{"the file is damaged", func(path string) error { return os.WriteFile(path, []byte("posthouse node kfy 1\n"), 0o600) }},
		{"the file says another version", func(path string) error { return os.WriteFile(path, []byte("posthouse node key 3\n"), 0o600) }},
		{"the file is gone", os.Remove},
		{"the copy is damaged", func(path string) error { return os.WriteFile(path+copySuffix, []byte("x"), 0o600) }},
		{"the copy is gone", func(path string) error { return os.Remove(path + copySuffix) }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "node.key")
			c := counting(1)
			first, _, err := LoadOrCreate(path, &c)
			if err != nil {
				t.Fatal(err)
			}
			if err := tt.spoil(path); err != nil {
				t.Fatal(err)
			}
			again, created, err := LoadOrCreate(path, &c)
			if err != nil || created || again.Hash() != first.Hash() {
				t.Fatalf("created %v, %v", created, err)
			}
			if a, b := Check(path); a != nil || b != nil {
				t.Errorf("not made whole: %v, %v", a, b)
			}
		})
	}
}

func TestTwoDamagedCopiesOfAKeyAreNotANewNode(t *testing.T) {
	path := filepath.Join(t.TempDir(), "node.key")
	for _, name := range []string{path, path + copySuffix} {
		if err := os.WriteFile(name, []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	c := counting(1)
	if _, _, err := LoadOrCreate(path, &c); !errors.Is(err, ErrDamaged) {
		t.Errorf("got %v", err)
	}
	if a, b := Check(path); a == nil || b == nil {
		t.Errorf("not named: %v, %v", a, b)
	}
}

func TestACrashInMidWriteLeavesNoKeyAndTheNextStartMakesOne(t *testing.T) {
	path := filepath.Join(t.TempDir(), "node.key")
	if err := os.WriteFile(path+".new", []byte("posthouse no"), 0o600); err != nil {
		t.Fatal(err)
	}
	c := counting(1)
	if _, created, err := LoadOrCreate(path, &c); err != nil || !created {
		t.Fatalf("created %v, %v", created, err)
	}
}

func TestVersion1KeyFileStillOpens(t *testing.T) {
	data, err := os.ReadFile("testdata/v1/node.key")
	if err != nil {
		t.Fatal(err)
	}
	k, err := decode(data)
	if err != nil {
		t.Fatal(err)
	}
	if k.Hash() != testKey(t, 1).Hash() {
		t.Errorf("opened as %v", k.Hash())
	}
}

func TestUnusableKeyFilesAreNamed(t *testing.T) {
	seed := bytes.Repeat([]byte{7}, 32)
	good := string(encode(seed))
	for _, tt := range []struct {
		name, content string
		mode          os.FileMode
		damaged       bool
		says          string
	}{
		{"empty", "", 0o600, true, "does not begin as a node key"},
		{"cut after the header", fileHeader, 0o600, true, "cut short"},
		{"cut in the seed", good[:40], 0o600, true, "cut short or altered"},
		{"cut in the checksum", good[:len(good)-3], 0o600, true, "checksum"},
		{"one digit altered", strings.Replace(good, "0707", "0706", 1), 0o600, true, "checksum"},
		{"something appended", good + "\n", 0o600, true, "checksum"},
		{"a page of zeros, as after a power cut", strings.Repeat("\x00", 4096), 0o600, true, "restore it from a backup"},
		{"of a later version", strings.Replace(good, "key 1", "key 2", 1), 0o600, false, `version "2"`},
		{"readable by others", good, 0o644, false, "chmod 600"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "node.key")
			if err := os.WriteFile(path, []byte(tt.content), tt.mode); err != nil {
				t.Fatal(err)
			}
			c := counting(1)
			_, created, err := LoadOrCreate(path, &c)
			if err == nil || created {
				t.Fatalf("created %v, %v", created, err)
			}
			if errors.Is(err, ErrDamaged) != tt.damaged || !strings.Contains(err.Error(), tt.says) || !strings.Contains(err.Error(), path) {
				t.Errorf("got %q", err)
			}
			if after, _ := os.ReadFile(path); string(after) != tt.content {
				t.Error("the file was changed")
			}
		})
	}
}

func TestPrintingAKeyOrTokenShowsNoSecret(t *testing.T) {
	k := testKey(t, 1)
	c := counting(65)
	tok, err := NewToken(&c, []mesh.KeyHash{k.Hash()})
	if err != nil {
		t.Fatal(err)
	}
	text := fmt.Sprintf("%v %+v %s %v %+v %#v %s", k, k, k.LogValue(), tok, tok, tok, tok.LogValue())
	for _, secret := range []string{"0102030405", "\x01\x02\x03", "1 2 3", "65 66 67", "ABC", "0x41, 0x42"} {
		if strings.Contains(text, secret) {
			t.Errorf("%q is in %q", secret, text)
		}
	}
}

// shake runs a handshake over loopback (a net.Pipe has no room for an alert that
// crosses the other side's flight).
func shake(t *testing.T, client, server *tls.Config) (cs, ss tls.ConnectionState, clientErr, serverErr error) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	a, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	b, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	c, s := tls.Client(a, client), tls.Server(b, server)
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer b.Close()
		if serverErr = s.Handshake(); serverErr == nil {
			_, serverErr = io.WriteString(s, "x")
		}
		ss = s.ConnectionState()
	}()
	// In TLS 1.3 the client learns of the server's refusal with its first read.
	if clientErr = c.Handshake(); clientErr == nil {
		_, clientErr = io.ReadFull(c, make([]byte, 1))
	}
	cs = c.ConnectionState()
	a.Close()
	<-done
	return
}

// ecdsaCert is a valid certificate, only not of a node's kind.
func ecdsaCert(t *testing.T) tls.Certificate {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

func TestOnlyTheKeyDecidesWhoIsIn(t *testing.T) {
	a, b := testKey(t, 1), testKey(t, 2)
	other := ecdsaCert(t)
	errNo := errors.New("not admitted")
	only := func(want *Key) func(mesh.KeyHash) error {
		return func(h mesh.KeyHash) error {
			if h != want.Hash() {
				return errNo
			}
			return nil
		}
	}
	server := func(want *Key) *tls.Config {
		return b.ServerTLS(func(alpn string, h mesh.KeyHash) error {
			if alpn != "mesh" {
				return fmt.Errorf("asked about %q", alpn)
			}
			return only(want)(h)
		}, "mesh")
	}
	edit := func(c *tls.Config, f func(*tls.Config)) *tls.Config { f(c); return c }
	for _, tt := range []struct {
		name           string
		client, server *tls.Config
		ok             bool
	}{
		{"both are admitted", a.ClientTLS("mesh", only(b)), server(a), true},
		{"the server refuses an unknown key", a.ClientTLS("mesh", only(b)), server(b), false},
		{"the client refuses an unknown key", a.ClientTLS("mesh", only(a)), server(a), false},
		{"another protocol", a.ClientTLS("other", only(b)), server(a), false},
		{"no protocol", edit(a.ClientTLS("mesh", only(b)), func(c *tls.Config) { c.NextProtos = nil }), server(a), false},
		{"TLS 1.2", edit(a.ClientTLS("mesh", only(b)), func(c *tls.Config) { c.MinVersion, c.MaxVersion = tls.VersionTLS12, tls.VersionTLS12 }), server(a), false},
		{"no certificate", edit(a.ClientTLS("mesh", only(b)), func(c *tls.Config) { c.Certificates = nil }), server(a), false},
		{"a key of another kind", edit(a.ClientTLS("mesh", only(b)), func(c *tls.Config) { c.Certificates = []tls.Certificate{other} }), server(a), false},
		{"two certificates", edit(a.ClientTLS("mesh", only(b)), func(c *tls.Config) {
			two := a.cert
			two.Certificate = append(two.Certificate[:1:1], b.cert.Certificate...)
			c.Certificates = []tls.Certificate{two}
		}), server(a), false},
		{"the certificate of a, the key of b", edit(a.ClientTLS("mesh", only(b)), func(c *tls.Config) {
			mixed := a.cert
			mixed.PrivateKey = b.private
			c.Certificates = []tls.Certificate{mixed}
		}), server(a), false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			cs, ss, cerr, serr := shake(t, tt.client, tt.server)
			if ok := cerr == nil && serr == nil; ok != tt.ok {
				t.Fatalf("client %v, server %v", cerr, serr)
			}
			if !tt.ok {
				return
			}
			if h, err := a.Peer(cs); h != b.Hash() || err != nil {
				t.Errorf("client sees %v, %v", h, err)
			}
			if h, err := b.Peer(ss); h != a.Hash() || err != nil {
				t.Errorf("server sees %v, %v", h, err)
			}
		})
	}
}

func TestARefusedNodeCannotComeBackByResumption(t *testing.T) {
	a, b := testKey(t, 1), testKey(t, 2)
	checks := 0
	server := b.ServerTLS(func(string, mesh.KeyHash) error { checks++; return nil }, "mesh")
	client := a.ClientTLS("mesh", func(mesh.KeyHash) error { return nil })
	client.ClientSessionCache = tls.NewLRUClientSessionCache(8)
	for range 2 {
		cs, _, cerr, serr := shake(t, client, server)
		if cerr != nil || serr != nil || cs.DidResume {
			t.Fatalf("client %v, server %v, resumed %v", cerr, serr, cs.DidResume)
		}
	}
	if checks != 2 {
		t.Errorf("asked %d times in 2 handshakes", checks)
	}
}
