package simtest

import (
	"bufio"
	"crypto/tls"
	"fmt"
	"net"
	"net/netip"
	"strings"

	"github.com/emersion/go-imap/v2"
	"github.com/emersion/go-imap/v2/imapclient"
)

// Inbox logs in as an office's user at the office and returns the subjects in
// INBOX, in order.
func (w *World) Inbox(office string) ([]string, error) {
	o := w.Office(office)
	conn, err := w.dial(netip.AddrPortFrom(o.Addr, 50000), netip.AddrPortFrom(o.Addr, 143).String())
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	c, err := imapclient.NewStartTLS(conn, &imapclient.Options{TLSConfig: &tls.Config{InsecureSkipVerify: true}})
	if err != nil {
		return nil, err
	}
	defer c.Close()
	if err := c.Login(office+"@"+Domain, "secret").Wait(); err != nil {
		return nil, err
	}
	box, err := c.Select("INBOX", &imap.SelectOptions{ReadOnly: true}).Wait()
	if err != nil || box.NumMessages == 0 {
		return nil, err
	}
	var all imap.SeqSet
	all.AddRange(1, 0)
	msgs, err := c.Fetch(all, &imap.FetchOptions{Envelope: true}).Collect()
	if err != nil {
		return nil, err
	}
	out := make([]string, len(msgs))
	for _, m := range msgs {
		out[m.SeqNum-1] = m.Envelope.Subject
	}
	return out, nil
}

// converse is the simplest SMTP client: one message, one recipient, each answer
// read before the next command.
func converse(c net.Conn, from, to, text string) error {
	r := bufio.NewReader(c)
	say := func(line, want string) error {
		if line != "" {
			if _, err := fmt.Fprintf(c, "%s\r\n", line); err != nil {
				return err
			}
		}
		for {
			answer, err := r.ReadString('\n')
			if err != nil {
				return err
			}
			if len(answer) > 3 && answer[3] == '-' {
				continue
			}
			if !strings.HasPrefix(answer, want) {
				return fmt.Errorf("%s: %s", line, strings.TrimSpace(answer))
			}
			return nil
		}
	}
	for _, step := range [][2]string{{"", "220"}, {"EHLO client.example.net", "250"}, {"MAIL FROM:<" + from + ">", "250"}, {"RCPT TO:<" + to + ">", "250"}, {"DATA", "354"}, {text + ".", "250"}, {"QUIT", "221"}} {
		if err := say(step[0], step[1]); err != nil {
			return err
		}
	}
	return nil
}
