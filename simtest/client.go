package simtest

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/base64"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"github.com/emersion/go-imap/v2"
	"github.com/emersion/go-imap/v2/imapclient"
)

// client is an SMTP session; each answer is read before the next command.
type client struct {
	c net.Conn
	r *bufio.Reader
}

const clientLimit = 3 * time.Minute // for one answer

var clientTLS = &tls.Config{InsecureSkipVerify: true}

// smtp opens a session at an office. With a user it logs in, after STARTTLS.
func (w *World) smtp(office string, port int, user, password string) (*client, error) {
	return w.smtpFrom(netip.MustParseAddr("192.0.2.1"), office, port, user, password)
}

// smtpFrom is smtp from some address.
func (w *World) smtpFrom(from netip.Addr, office string, port int, user, password string) (*client, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	c, err := w.dial(ctx, netip.AddrPortFrom(from, 40000), netip.AddrPortFrom(w.Office(office).Addr, uint16(port)).String())
	if err != nil {
		return nil, err
	}
	s := &client{c, bufio.NewReader(c)}
	steps := [][2]string{{"", "220"}, {"EHLO client.example.net", "250"}}
	if user != "" {
		steps = append(steps, [2]string{"STARTTLS", "220"})
	}
	for _, x := range steps {
		if err := s.must(x[0], x[1]); err != nil {
			s.close()
			return nil, err
		}
	}
	if user == "" {
		return s, nil
	}
	t := tls.Client(c, clientTLS)
	s.c, s.r = t, bufio.NewReader(t)
	secret := base64.StdEncoding.EncodeToString([]byte("\x00" + user + "\x00" + password))
	for _, x := range [][2]string{{"EHLO client.example.net", "250"}, {"AUTH PLAIN " + secret, "235"}} {
		if err := s.must(x[0], x[1]); err != nil {
			s.close()
			return nil, err
		}
	}
	return s, nil
}

func (s *client) close() { s.c.Close() }

func (s *client) must(line, want string) error {
	code, said, err := s.say(line)
	if err == nil && fmt.Sprint(code) != want {
		err = fmt.Errorf("%s: %s", line, said)
	}
	return err
}

// say sends a command and reads its whole answer.
func (s *client) say(line string) (code int, said string, err error) {
	s.c.SetDeadline(time.Now().Add(clientLimit))
	if line != "" {
		if _, err := fmt.Fprintf(s.c, "%s\r\n", line); err != nil {
			return 0, "", err
		}
	}
	for {
		answer, err := s.r.ReadString('\n')
		if err != nil {
			return 0, "", err
		}
		if len(answer) > 3 && answer[3] == '-' {
			continue
		}
		if _, err := fmt.Sscanf(answer, "%d", &code); err != nil {
			return 0, "", fmt.Errorf("not an answer: %q", answer)
		}
		return code, strings.TrimSpace(answer), nil
	}
}

// send hands one message in. It returns an answer for each recipient, that to
// the text where the recipient was taken; an error means that no final answer
// was read, and after it the session is of no use.
func (s *client) send(from string, to []string, text string) (answers []int, err error) {
	answers = make([]int, len(to))
	refuse := func(code int) []int {
		for i := range answers {
			if answers[i] < 300 {
				answers[i] = code
			}
		}
		return answers
	}
	code, _, err := s.say("MAIL FROM:<" + from + ">")
	if err != nil || code != 250 {
		return refuse(code), err
	}
	taken := 0
	for i, r := range to {
		if answers[i], _, err = s.say("RCPT TO:<" + r + ">"); err != nil {
			return answers, err
		}
		if answers[i] < 300 {
			taken++
		}
	}
	if taken == 0 {
		_, _, err := s.say("RSET")
		return answers, err
	}
	if code, _, err = s.say("DATA"); err != nil {
		return answers, err
	}
	if code != 354 {
		return refuse(code), nil
	}
	code, _, err = s.say(text + ".")
	if err != nil {
		return answers, err
	}
	if code >= 300 {
		return refuse(code), nil
	}
	return answers, nil
}

// text is a small message as a client writes it.
func text(from, to, subject string) string { return sizedText(from, to, subject, 0) }

// sizedText is a message with a body of some size, as body has it.
func sizedText(from, to, subject string, size int) string {
	return "From: <" + from + ">\r\nTo: <" + to + ">\r\nDate: Mon, 23 Nov 2026 09:00:00 +0000\r\nMessage-ID: <" + subject + "@client>\r\nSubject: " + subject + "\r\n\r\n" + body(subject, size)
}

// body is what a message says; with a size it has about so many bytes, of which
// no two lines are alike: nothing can be lost, doubled or swapped unseen.
func body(subject string, size int) string {
	first := "The body of " + subject + ".\r\n"
	if size == 0 {
		return first + strings.Repeat(subject+"\r\n", len(subject)*7%40)
	}
	b := make([]byte, 0, size+80)
	b = append(b, first...)
	for i := 0; len(b) < size; i++ {
		b = append(append(b, subject...), ' ')
		b = append(strconv.AppendInt(b, int64(i), 10), " seventy-six columns as most of what people attach has them\r\n"...)
	}
	return string(b)
}

// Letter is a message as IMAP shows it.
type Letter struct {
	UID     imap.UID
	Subject string
	Text    string // of everything but plain test messages: header and body
	Whole   bool   // the body is what the client sent
}

// Box is an INBOX as IMAP shows it.
type Box struct {
	UIDValidity uint32
	UIDNext     imap.UID
	Letters     []Letter // by UID
}

// Login opens an IMAP session of an office's user at the office, over TLS. The
// caller closes it.
func (w *World) Login(office, password string) (*imapclient.Client, error) {
	return w.LogInAs(office, office, password)
}

// LogInAs is Login for any office's user.
func (w *World) LogInAs(office, user, password string) (*imapclient.Client, error) {
	o := w.Office(office)
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	conn, err := w.dial(ctx, netip.AddrPortFrom(o.Addr, 50000), netip.AddrPortFrom(o.Addr, 143).String())
	if err != nil {
		return nil, err
	}
	c, err := imapclient.NewStartTLS(conn, &imapclient.Options{TLSConfig: clientTLS})
	if err != nil {
		conn.Close()
		return nil, err
	}
	if err := c.Login(user+"@"+Domain, password).Wait(); err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

// Open reads the INBOX of an office's user at the office. With bodies it
// fetches what was sent, else subjects alone.
func (w *World) Open(office string, bodies bool) (*Box, error) {
	return w.open(office, bodies, nil)
}

// open is Open. Of letters that are known it asks only whether they are there:
// a mailbox that is looked at every half minute is not read again and again.
func (w *World) open(office string, bodies bool, known map[imap.UID]Letter) (*Box, error) {
	c, err := w.Login(office, "secret")
	if err != nil {
		return nil, err
	}
	defer c.Close()
	box, err := c.Select("INBOX", &imap.SelectOptions{ReadOnly: true}).Wait()
	if err != nil {
		return nil, err
	}
	out := &Box{UIDValidity: box.UIDValidity, UIDNext: box.UIDNext}
	found, err := c.UIDSearch(&imap.SearchCriteria{}, nil).Wait()
	if err != nil {
		return nil, err
	}
	var fetch imap.UIDSet
	place := map[imap.UID]int{}
	for _, uid := range found.AllUIDs() {
		if uid >= box.UIDNext {
			break // it arrived meanwhile: UIDNEXT is of before
		}
		l, ok := known[uid]
		if !ok {
			l.UID = uid
			place[uid] = len(out.Letters)
			fetch.AddNum(uid)
		}
		out.Letters = append(out.Letters, l)
	}
	if len(place) == 0 {
		return out, nil
	}
	section := &imap.FetchItemBodySection{Peek: true}
	want := &imap.FetchOptions{Envelope: true, UID: true}
	if bodies {
		want.BodySection = []*imap.FetchItemBodySection{section}
	}
	msgs, err := c.Fetch(fetch, want).Collect()
	if err != nil {
		return nil, err
	}
	for _, m := range msgs {
		l := &out.Letters[place[m.UID]]
		l.Subject = m.Envelope.Subject
		if bodies {
			b := string(m.FindBodySection(section))
			l.Whole = strings.HasSuffix(b, "Subject: "+l.Subject+"\r\n\r\n"+body(l.Subject, w.ledger.size(l.Subject)))
			if !l.Whole {
				l.Text = b
			}
		}
	}
	return out, nil
}

// Inbox returns the subjects in the INBOX of an office's user, in order.
func (w *World) Inbox(office string) ([]string, error) {
	b, err := w.Open(office, false)
	if err != nil {
		return nil, err
	}
	out := make([]string, len(b.Letters))
	for i, l := range b.Letters {
		out[i] = l.Subject
	}
	return out, nil
}
