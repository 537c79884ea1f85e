package demo

import (
	"crypto/rand"
	"crypto/tls"
	"fmt"
	"net"
	"net/smtp"
	"strconv"
	"strings"
	"time"
)

// Send sends one short message. A sender of the demo's domain submits with its
// password, at its home or at the office via; anybody else comes from outside
// to port 25 of via, or of the first office.
func Send(dir, from, to, via, subject string) error {
	s, err := Load(dir)
	if err != nil {
		return err
	}
	var login *User
	for i := range s.Users {
		if strings.EqualFold(s.Users[i].Address, from) {
			login = &s.Users[i]
		}
	}
	if strings.EqualFold(s.Admin.Name, from) {
		login = &User{Address: s.Admin.Name, Password: s.Admin.Password, Home: s.Nodes[0].Name}
	}
	office := via
	if office == "" && login != nil {
		office = login.Home
	}
	if office == "" {
		office = s.Nodes[0].Name
	}
	n, err := s.node(office)
	if err != nil {
		return err
	}
	port := n.Ports.SMTP
	if login != nil {
		port = n.Ports.Submission
	}
	pool, err := s.roots()
	if err != nil {
		return err
	}
	c, err := smtp.Dial(net.JoinHostPort(n.Address, strconv.Itoa(port)))
	if err != nil {
		return fmt.Errorf("reach %s: %w", n.Name, err)
	}
	defer c.Close()
	if login != nil {
		if err := c.StartTLS(&tls.Config{RootCAs: pool, ServerName: n.Address}); err != nil {
			return fmt.Errorf("start TLS with %s: %w", n.Name, err)
		}
		if err := c.Auth(smtp.PlainAuth("", login.Address, login.Password, n.Address)); err != nil {
			return fmt.Errorf("log in at %s: %w", n.Name, err)
		}
	}
	if err := c.Mail(from); err != nil {
		return fmt.Errorf("sender %s: %w", from, err)
	}
	if err := c.Rcpt(to); err != nil {
		return fmt.Errorf("recipient %s: %w", to, err)
	}
	w, err := c.Data()
	if err != nil {
		return fmt.Errorf("send: %w", err)
	}
	if subject == "" {
		subject = "A message of the demo"
	}
	fmt.Fprintf(w, "From: <%s>\r\nTo: <%s>\r\nSubject: %s\r\nDate: %s\r\nMessage-ID: <%s@%s>\r\nMIME-Version: 1.0\r\nContent-Type: text/plain; charset=utf-8\r\n\r\nSent at %s by way of %s.\r\n",
		from, to, subject, time.Now().Format(time.RFC1123Z), strings.ToLower(rand.Text()), s.Domain, time.Now().Format(time.TimeOnly), n.Name)
	if err := w.Close(); err != nil {
		return fmt.Errorf("send: %w", err)
	}
	return c.Quit()
}

// FirstMail puts some messages on their way, so that there is something to see.
func FirstMail(dir string) error {
	s, err := Load(dir)
	if err != nil {
		return err
	}
	if len(s.Users) == 0 {
		return nil
	}
	for i, u := range s.Users {
		next := s.Users[(i+1)%len(s.Users)]
		if err := Send(dir, u.Address, next.Address, "", "Welcome, "+next.Address); err != nil {
			return err
		}
	}
	if err := Send(dir, "someone@"+s.Outside.Domain, s.Users[len(s.Users)-1].Address, "", "Hello from outside"); err != nil {
		return err
	}
	return Send(dir, s.Users[0].Address, "friend@"+s.Outside.Domain, "", "Hello to the outside")
}
