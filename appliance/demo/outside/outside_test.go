package outside

import (
	"context"
	"crypto/rand"
	"net"
	"net/smtp"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"posthouse/appliance/clientca"
)

func freePort(t *testing.T, network string) string {
	t.Helper()
	if network == "udp" {
		c, err := net.ListenPacket("udp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		return c.LocalAddr().String()
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

func TestMailToTheOutsideIsKeptAndNamesAreFound(t *testing.T) {
	cert, err := clientca.SelfSigned("mail.example.net", time.Now(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	cfg := Config{SMTP: freePort(t, "tcp"), DNS: freePort(t, "udp"), Host: "mail.example.net", Folder: filepath.Join(t.TempDir(), "mail"), Records: []string{
		"example.net. 60 IN MX 10 mail.example.net.", "mail.example.net. 60 IN A 127.0.0.1", "_posthouse._udp.company.test. 60 IN SRV 0 0 44337 hq.company.test."}}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- Run(ctx, cfg, cert) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	r := &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, network, cfg.DNS)
	}}
	var mx []*net.MX
	for range 100 { // the servers come up beside us; each look-up waits for its answer
		if mx, err = r.LookupMX(ctx, "example.net."); err == nil {
			break
		}
	}
	if err != nil || len(mx) != 1 || mx[0].Host != "mail.example.net." {
		t.Fatalf("MX %v, %v", mx, err)
	}
	if _, srv, err := r.LookupSRV(ctx, "posthouse", "udp", "company.test."); err != nil || srv[0].Port != 44337 {
		t.Errorf("SRV %v, %v", srv, err)
	}
	if _, err := r.LookupHost(ctx, "nobody.example.net."); err == nil || !err.(*net.DNSError).IsNotFound {
		t.Errorf("an unknown name gives %v", err)
	}
	if err := smtp.SendMail(cfg.SMTP, nil, "a@company.test", []string{"b@example.net"}, []byte("Subject: x\r\n\r\nhello\r\n")); err == nil {
		t.Error("the test client should refuse the self-signed certificate")
	}
	c, err := smtp.Dial(cfg.SMTP)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := c.Mail("a@company.test"); err != nil {
		t.Fatal(err)
	}
	if err := c.Rcpt("refuse@example.net"); err == nil || !strings.HasPrefix(err.Error(), "550") {
		t.Errorf("refuse@ gives %v", err)
	}
	if err := c.Rcpt("b@example.net"); err != nil {
		t.Fatal(err)
	}
	w, err := c.Data()
	if err != nil {
		t.Fatal(err)
	}
	w.Write([]byte("Subject: x\r\n\r\nhello\r\n"))
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	got, _ := filepath.Glob(filepath.Join(cfg.Folder, "*.eml"))
	if len(got) != 1 {
		t.Fatal(got)
	}
	if text, _ := os.ReadFile(got[0]); string(text) != "Subject: x\r\n\r\nhello\r\n" {
		t.Errorf("kept %q", text)
	}
}
