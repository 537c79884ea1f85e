package smtpd

import (
	"crypto/tls"
	stdsmtp "net/smtp"
	"strings"
	"testing"

	"github.com/emersion/go-sasl"
	"github.com/emersion/go-smtp"
)

// TestForeignClients: two clients written by others.
func TestForeignClients(t *testing.T) {
	const text = "From: joe@here.test\r\nSubject: x\r\n\r\n.dot\r\n..\r\nend\r\n"
	t.Run("go-smtp", func(t *testing.T) {
		bubble(t, func(t *testing.T) {
			g := newRig(t, PortSubmission, nil)
			defer g.close()
			raw, err := g.ln.Dial(addr("198.51.100.7:1"))
			if err != nil {
				t.Fatal(err)
			}
			c, err := smtp.NewClientStartTLS(raw, &tls.Config{InsecureSkipVerify: true})
			if err != nil {
				t.Fatal(err)
			}
			if err := c.Auth(sasl.NewPlainClient("", "joe", "secret")); err != nil {
				t.Fatal(err)
			}
			for range 3 {
				if err := c.SendMail("joe@here.test", []string{"ann@away.test", "jane@here.test"}, strings.NewReader(text)); err != nil {
					t.Fatal(err)
				}
			}
			c.Quit() // writes to a connection that the server has closed
			if m := g.accepted(); len(m) != 3 || m[2].body != text || len(m[2].rcpts) != 2 {
				t.Fatal(m)
			}
		})
	})
	t.Run("net/smtp", func(t *testing.T) {
		bubble(t, func(t *testing.T) {
			g := newRig(t, PortSubmissions, nil)
			defer g.close()
			raw, err := g.ln.Dial(addr("198.51.100.7:1"))
			if err != nil {
				t.Fatal(err)
			}
			c, err := stdsmtp.NewClient(tls.Client(raw, &tls.Config{InsecureSkipVerify: true}), "mx.here.test")
			if err != nil {
				t.Fatal(err)
			}
			step := func(err error) {
				t.Helper()
				if err != nil {
					t.Fatal(err)
				}
			}
			step(c.Hello("client.test"))
			step(c.Auth(stdsmtp.PlainAuth("", "joe", "secret", "mx.here.test")))
			step(c.Mail("joe@here.test"))
			step(c.Rcpt("ann@away.test"))
			w, err := c.Data()
			step(err)
			_, err = w.Write([]byte(text))
			step(err)
			step(w.Close())
			c.Quit()
			if m := g.accepted(); len(m) != 1 || m[0].body != text {
				t.Fatal(m)
			}
		})
	})
}
