package processes

import (
	"encoding/base64"
	"errors"
	"fmt"
	"net"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"posthouse/appliance/admin"
)

// TestTheDoorsForMailKeepTheirRules asks the real ports what MAIL.md promises
// of them: who may send what as whom, to whom, and by which door.
func TestTheDoorsForMailKeepTheirRules(t *testing.T) {
	m := Up(t, "hq", "plzen")
	t.Run("no open relay", func(t *testing.T) { relayMatrix(t, m) })
	t.Run("log-in only under TLS, and never on 25", func(t *testing.T) { authOnlyUnderTLS(t, m) })
	t.Run("submission", func(t *testing.T) { submissionRules(t, m) })
	t.Run("a real client", func(t *testing.T) { realClient(t, m) })
	t.Run("a wrong name takes as long as a wrong password", func(t *testing.T) { enumeration(t, m) })
}

// relayMatrix is A13: 4 senders × 13 forms of a recipient elsewhere, none of
// which an unauthenticated client may reach, at both offices.
func relayMatrix(t *testing.T, m *Mesh) {
	local := m.User("hq", 0).Address
	froms := []string{"", "someone@example.net", local, "postmaster@company.test"}
	tos := []string{
		"friend@example.net", `"friend@example.net"`, "friend%example.net@company.test", "friend%example.net@[127.0.0.1]", "example.net!friend@company.test", "example.net!friend",
		`"friend@example.net"@company.test`, "friend@example.net@company.test", "@company.test:friend@example.net", "@company.test,@example.net:friend@example.net",
		"friend@[192.0.2.1]", "friend@company.test.example.net", "friend@example.net> <" + local,
	}
	const closed = "closed@company.test"
	if _, err := m.API("hq").PutGroup(t.Context(), admin.Group{Address: closed, Members: []string{local}}); err != nil {
		t.Fatal(err)
	}
	m.WaitFor("the group is known everywhere", 5*time.Second, func() bool {
		gs, err := m.API("plzen").Groups(t.Context())
		return err == nil && len(gs) == 2
	})
	tried := 0
	for _, office := range []string{"hq", "plzen"} {
		for _, from := range froms {
			for _, to := range tos {
				w := m.mx(office)
				if got := w.ask("MAIL FROM:<%s>", from); !strings.HasPrefix(got, "250") && !strings.HasPrefix(got, "5") {
					t.Errorf("MAIL FROM:<%s> at %s: %q", from, office, got)
				}
				if got := w.ask("RCPT TO:<%s>", to); !strings.HasPrefix(got, "5") {
					t.Errorf("%s relays from <%s> to <%s>: %q", office, from, to, got)
				}
				if got := w.ask("DATA"); strings.HasPrefix(got, "354") {
					t.Errorf("%s takes a text from <%s> for <%s>", office, from, to)
				}
				w.Close()
				tried++
			}
		}
		// The same door is open for our own people, and for our own postmaster.
		for _, to := range []string{local, "postmaster@company.test", "Postmaster", m.State().Alias, strings.Replace(local, "@", "+tag@", 1), strings.ToUpper(local), "@relay.example:" + local} {
			w := m.mx(office)
			w.ask("MAIL FROM:<someone@example.net>")
			if got := w.ask("RCPT TO:<%s>", to); !strings.HasPrefix(got, "250") {
				t.Errorf("%s refuses <%s>: %q", office, to, got)
			}
			w.Close()
		}
		w := m.mx(office)
		w.ask("MAIL FROM:<someone@example.net>")
		if got := w.ask("RCPT TO:<nobody@company.test>"); !strings.HasPrefix(got, "550 5.1.1") {
			t.Errorf("%s and an unknown recipient: %q", office, got)
		}
		if got := w.ask("RCPT TO:<" + closed + ">"); !strings.HasPrefix(got, "550 5.7.1") {
			t.Errorf("%s and a group that is closed to strangers: %q", office, got)
		}
		w.Close()
	}
	t.Logf("%d ways to relay, all refused", tried)
}

func authOnlyUnderTLS(t *testing.T, m *Mesh) {
	u, n := m.User("hq", 0), m.Node("hq")
	plain := base64.StdEncoding.EncodeToString([]byte("\x00" + u.Address + "\x00" + u.Password))
	for _, port := range []int{n.Ports.SMTP, n.Ports.Submission} {
		w := m.mustDial("hq", port, false)
		w.reply()
		w.say("EHLO x.example.net\r\n")
		for {
			s := w.line()
			if strings.Contains(s, "AUTH") {
				t.Errorf("port %d offers %q without TLS", port, s)
			}
			if len(s) < 4 || s[3] == ' ' {
				break
			}
		}
		for _, c := range []string{"AUTH PLAIN " + plain, "AUTH LOGIN"} {
			if got := w.ask("%s", c); !strings.HasPrefix(got, "5") {
				t.Errorf("port %d: %s: %q", port, c[:10], got)
			}
		}
		if got := w.ask("MAIL FROM:<%s>", u.Address); port == n.Ports.Submission && !strings.HasPrefix(got, "530") {
			t.Errorf("submission without log-in: %q", got)
		}
		w.Close()
	}
	w := m.mustDial("hq", n.Ports.IMAP, false)
	defer w.Close()
	if s := w.line(); !strings.Contains(s, "LOGINDISABLED") {
		w.say("a CAPABILITY\r\n")
		if s := w.line(); !strings.Contains(s, "LOGINDISABLED") {
			t.Errorf("IMAP without TLS says %q", s)
		}
	}
	w.say("b LOGIN " + u.Address + " " + u.Password + "\r\n")
	if got := w.untagged("b"); !strings.HasPrefix(got, "b NO") && !strings.HasPrefix(got, "b BAD") {
		t.Errorf("IMAP log-in without TLS: %q", got)
	}
}

// newest returns the text of the newest message of a person that has the word
// in its subject, as IMAP serves it.
func (m *Mesh) newest(office string, k int, word string) string {
	m.tb.Helper()
	var text strings.Builder
	m.WaitFor("the message "+word, 10*time.Second, func() bool {
		text.Reset()
		w := m.imap(office, k)
		defer w.Close()
		w.say("a EXAMINE INBOX\r\n")
		w.untagged("a")
		w.say("b SEARCH SUBJECT " + word + "\r\n")
		found := w.line()
		w.untagged("b")
		f := strings.Fields(found)
		if len(f) < 3 {
			return false
		}
		w.say("c FETCH " + f[len(f)-1] + " BODY.PEEK[]\r\n")
		for {
			s := w.line()
			if s == "" && text.Len() > 1<<20 || strings.HasPrefix(s, "c ") {
				break
			}
			text.WriteString(s + "\n")
		}
		return true
	})
	return text.String()
}

func submissionRules(t *testing.T, m *Mesh) {
	me, colleague := m.User("hq", 0), m.User("hq", 1)
	alias := m.State().Alias // of the first person
	id := 0
	send := func(w *wire, from, header string) string {
		id++
		w.ask("RSET")
		if got := w.ask("MAIL FROM:<%s>", from); !strings.HasPrefix(got, "250") {
			return got
		}
		w.ask("RCPT TO:<%s>", colleague.Address)
		if got := w.ask("DATA"); !strings.HasPrefix(got, "354") {
			return got
		}
		w.say(header + fmt.Sprintf("Subject: rule%dx\r\n\r\nx\r\n.\r\n", id))
		return w.reply()
	}
	w := m.submission("hq", 0)
	defer w.Close()
	tagged := strings.Replace(me.Address, "@", "+tag@", 1)
	for _, c := range []struct{ name, from, header, want string }{
		{"as oneself", me.Address, "From: <" + me.Address + ">\r\n", "250"},
		{"as one's alias", alias, "From: Info <" + alias + ">\r\n", "250"},
		{"as one's sub-address", tagged, "From: <" + tagged + ">\r\n", "250"},
		{"in capitals", strings.ToUpper(me.Address), "From: <" + strings.ToUpper(me.Address) + ">\r\n", "250"},
		{"a receipt, by nobody", "", "From: <" + me.Address + ">\r\n", "250"},
		{"with another's envelope", colleague.Address, "From: <" + me.Address + ">\r\n", "553 5.7.1"},
		{"with an envelope from outside", "ceo@example.net", "From: <" + me.Address + ">\r\n", "553 5.7.1"},
		{"with another's From", me.Address, "From: <" + colleague.Address + ">\r\n", "55"},
		{"with another's From, folded", me.Address, "From:\r\n <" + colleague.Address + ">\r\n", "55"},
		{"with another's From in odd case", me.Address, "fRoM : <" + colleague.Address + ">\r\n", "55"},
		{"with one's own name around another's address", me.Address, "From: \"" + me.Address + "\" <" + colleague.Address + ">\r\n", "55"},
		{"with two From fields", me.Address, "From: <" + me.Address + ">\r\nFrom: <" + colleague.Address + ">\r\n", "55"},
		{"with two addresses in From", me.Address, "From: <" + me.Address + ">, <" + colleague.Address + ">\r\n", "55"},
		{"with a comment that hides", me.Address, "From: (" + me.Address + ") <" + colleague.Address + ">\r\n", "55"},
		{"with a group in From", me.Address, "From: us: <" + colleague.Address + ">;\r\n", "55"},
		{"with another's Sender", me.Address, "From: <" + me.Address + ">\r\nSender: <" + colleague.Address + ">\r\n", "55"},
		{"a receipt as somebody else", "", "From: <" + colleague.Address + ">\r\n", "55"},
		{"with a source route in From", me.Address, "From: <@" + "example.net:" + colleague.Address + ">\r\n", "55"},
	} {
		if got := send(w, c.from, c.header); !strings.HasPrefix(got, c.want) {
			t.Errorf("%s: %q, want %s", c.name, got, c.want)
		}
	}

	w.ask("RSET")
	w.ask("MAIL FROM:<%s>", me.Address)
	w.ask("RCPT TO:<%s>", colleague.Address)
	w.ask("DATA")
	w.say("From: <" + me.Address + ">\r\nTo: <" + colleague.Address + ">\r\nBCC: <secret@example.net>,\r\n <secret2@example.net>\r\nX-Kept: as  it\tis\r\nSubject: filledin\r\n\r\nx\r\n.\r\n")
	if got := w.reply(); !strings.HasPrefix(got, "250") {
		t.Fatal(got)
	}
	text := m.newest("hq", 1, "filledin")
	for _, want := range []string{"\nDate: ", "\nMessage-ID: <", "\nX-Kept: as  it\tis\n", "Return-Path: <" + me.Address + ">"} {
		if strings.Count(text, want) != 1 {
			t.Errorf("%d times %q in\n%s", strings.Count(text, want), want, text)
		}
	}
	if strings.Contains(strings.ToLower(text), "\nbcc:") || strings.Contains(text, "secret") {
		t.Errorf("Bcc was not removed:\n%s", text)
	}
	if got := w.ask("MAIL FROM:<%s>", me.Address); strings.HasPrefix(got, "250") {
		if got := w.ask("RCPT TO:<nobody@company.test>"); !strings.HasPrefix(got, "550") {
			t.Errorf("an unknown colleague: %q", got)
		}
		if got := w.ask("RCPT TO:<friend@example.net>"); !strings.HasPrefix(got, "250") {
			t.Errorf("a friend outside: %q", got)
		}
		if got := w.ask("RCPT TO:<%s>", m.State().Group); !strings.HasPrefix(got, "250") {
			t.Errorf("the group: %q", got)
		}
	}
}

// realClient sends by swaks, as an admin would to try the server: STARTTLS,
// log-in, a UTF-8 header; then a message to an address that needs SMTPUTF8.
func realClient(t *testing.T, m *Mesh) {
	swaks, err := exec.LookPath("swaks")
	if err != nil {
		t.Fatal("this test sends with swaks: apt-get install swaks, or run make test as root")
	}
	from, n := m.User("hq", 0), m.Node("hq")
	for _, mech := range []string{"PLAIN", "LOGIN"} {
		out, err := exec.Command(swaks, "--server", n.Address, "--port", strconv.Itoa(n.Ports.Submission), "--tls", "--tls-verify", "--tls-ca-path", m.State().CAFile, "--auth", mech, "--auth-user", from.Address, "--auth-password", from.Password,
			"--from", from.Address, "--to", m.User("plzen", 0).Address, "--header", "Subject: swaks"+mech+" Příliš žluťoučký", "--body", "Dobrý den", "--attach-type", "text/plain", "--attach", "@"+filepath.Join(m.Dir, "demo.json"), "--pipeline").CombinedOutput()
		if err != nil {
			t.Fatalf("swaks %s: %v\n%s", mech, err, out)
		}
		if text := m.newest("plzen", 0, "swaks"+mech); !strings.Contains(text, "žluťoučký") || !strings.Contains(text, "Dobrý den") {
			t.Errorf("what swaks sent has changed:\n%s", text)
		}
	}
	out, err := exec.Command(swaks, "--server", n.Address, "--port", strconv.Itoa(n.Ports.Submission), "--tls", "--auth", "PLAIN", "--auth-user", from.Address, "--auth-password", "wrong", "--from", from.Address, "--to", from.Address).CombinedOutput()
	if err == nil || !strings.Contains(string(out), "535") {
		t.Errorf("swaks with a wrong password: %v\n%s", err, out)
	}

	w := m.submission("hq", 0)
	defer w.Close()
	if got := w.ask("MAIL FROM:<%s>", from.Address); !strings.HasPrefix(got, "250") {
		t.Fatal(got)
	}
	if got := w.ask("RCPT TO:<přítel@example.net>"); !strings.HasPrefix(got, "5") {
		t.Errorf("a UTF-8 recipient without SMTPUTF8: %q", got)
	}
	w.ask("RSET")
	if got := w.ask("MAIL FROM:<%s> SMTPUTF8 BODY=8BITMIME", from.Address); !strings.HasPrefix(got, "250") {
		t.Errorf("SMTPUTF8: %q", got)
	}
	if got := w.ask("RCPT TO:<přítel@example.net>"); !strings.HasPrefix(got, "250") {
		t.Errorf("a UTF-8 recipient with SMTPUTF8: %q", got)
	}
	w.ask("DATA")
	w.say("From: <" + from.Address + ">\r\nTo: <přítel@example.net>\r\nSubject: utf8 přítel\r\n\r\nx\r\n.\r\n")
	if got := w.reply(); !strings.HasPrefix(got, "250") {
		t.Errorf("a UTF-8 message: %q", got)
	}
}

// enumeration is A14: the median answer to a wrong password of somebody who
// exists differs from that to a name that does not by less than 5 ms. Each try
// comes from an address of its own, so that the delay of repeated failures is
// the same for all; they run side by side, in several rounds, because a busy
// machine adds more than that to any of them: a real difference is there in
// every round.
func enumeration(t *testing.T, m *Mesh) {
	n, cfg := m.Node("hq"), m.TLS(m.Node("hq").Address)
	try := func(user string, at int) (time.Duration, error) {
		d := net.Dialer{Timeout: 5 * time.Second, LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 99, byte(at>>8), byte(at))}}
		c, err := d.Dial("tcp", net.JoinHostPort(n.Address, strconv.Itoa(n.Ports.Submissions)))
		if err != nil {
			return 0, err
		}
		w := wireTLS(c, cfg)
		defer w.Close()
		w.SetDeadline(time.Now().Add(20 * time.Second))
		w.reply()
		w.ask("EHLO x.example.net")
		began := time.Now()
		got := w.ask("AUTH PLAIN %s", base64.StdEncoding.EncodeToString([]byte("\x00"+user+"\x00wrong")))
		if !strings.HasPrefix(got, "535") {
			return 0, fmt.Errorf("%s: %q", user, got)
		}
		return time.Since(began), nil
	}
	names := []string{m.User("hq", 2).Address, "nobody@company.test", m.User("plzen", 2).Address}
	const each = 9
	var differ time.Duration
	for round := range 8 {
		took := make([][each]time.Duration, len(names))
		errs := make([]error, each*len(names))
		var wg sync.WaitGroup
		for i := range errs {
			wg.Go(func() {
				k := i % len(names)
				took[k][i/len(names)], errs[i] = try(names[k], 1+round*len(errs)+i)
			})
		}
		wg.Wait()
		if err := errors.Join(errs...); err != nil {
			t.Fatal(err)
		}
		var mid [3]time.Duration
		for k := range took {
			slices.Sort(took[k][:])
			mid[k] = took[k][each/2]
		}
		t.Logf("median of %d: known %v, unknown %v, at home elsewhere %v", each, mid[0], mid[1], mid[2])
		if differ = max((mid[0] - mid[1]).Abs(), (mid[2] - mid[1]).Abs()); differ < 5*time.Millisecond {
			return
		}
	}
	t.Errorf("a known name takes %v longer or shorter than an unknown one", differ)
}
