package processes

import (
	"encoding/base64"
	"fmt"
	"strings"
	"testing"
	"time"
)

// mx opens a session on port 25 and greets.
func (m *Mesh) mx(office string) *wire {
	m.tb.Helper()
	w := m.mustDial(office, m.Node(office).Ports.SMTP, false)
	if got := w.reply(); !strings.HasPrefix(got, "220 ") {
		m.tb.Fatalf("greeting %q", got)
	}
	if got := w.ask("EHLO mail.example.net"); !strings.HasPrefix(got, "250 ") {
		m.tb.Fatalf("EHLO: %q", got)
	}
	return w
}

// submission opens a session on port 465 and logs in.
func (m *Mesh) submission(office string, k int) *wire {
	m.tb.Helper()
	u := m.User(office, k)
	w := m.mustDial(office, m.Node(office).Ports.Submissions, true)
	w.reply()
	w.ask("EHLO client.invalid")
	if got := w.ask("AUTH PLAIN %s", base64.StdEncoding.EncodeToString([]byte("\x00"+u.Address+"\x00"+u.Password))); !strings.HasPrefix(got, "235") {
		m.tb.Fatalf("AUTH: %q", got)
	}
	return w
}

// deliver hands over one text from outside and returns the last answer.
func (w *wire) deliver(to, text string) string {
	for _, c := range []string{"RSET", "MAIL FROM:<bad@example.net>", "RCPT TO:<" + to + ">"} {
		if got := w.ask("%s", c); !strings.HasPrefix(got, "250") {
			return got
		}
	}
	if got := w.ask("DATA"); !strings.HasPrefix(got, "354") {
		return got
	}
	w.say(text)
	return w.reply()
}

func longSMTPLines(t *testing.T, m *Mesh) {
	w := m.mx("hq")
	go w.say(strings.Repeat("A", 10<<20))
	if got := w.reply(); !strings.HasPrefix(got, "500") {
		t.Errorf("10 MiB without a line end: %q", got)
	}
	if !w.ended() {
		t.Error("the session goes on after 10 MiB without a line end")
	}
	w.Close()

	w = m.mx("hq")
	defer w.Close()
	for _, c := range []struct{ say, want string }{
		{"NOOP " + strings.Repeat("x", 5000), "500"},
		{"MAIL FROM:<" + strings.Repeat("a", 3000) + "@example.net>", "5"},
		{"MAIL FROM:<a@" + strings.Repeat("b.", 1000) + "net>", "5"},
		{"EHLO " + strings.Repeat("c", 2000), "5"},
		{"VRFY anna", "252"},
		{"EHLO x\x1b[2J\x07", "5"},
	} {
		if got := w.ask("%s", c.say); !strings.HasPrefix(got, c.want) {
			t.Errorf("%.20s…: %q, want %s", c.say, got, c.want)
		}
	}
	w = m.mx("hq")
	defer w.Close()
	got := w.deliver(m.User("hq", 0).Address, "Subject: long\r\n\r\n"+strings.Repeat("x", 8<<20)+"\r\n.\r\n")
	if !strings.HasPrefix(got, "250") && !strings.HasPrefix(got, "5") {
		t.Errorf("a text line of 8 MiB: %q", got)
	}
	t.Logf("a text line of 8 MiB: %s", got)
}

func manyRecipients(t *testing.T, m *Mesh) {
	u := m.User("hq", 0).Address
	local, domain, _ := strings.Cut(u, "@")
	w := m.mx("hq")
	defer w.Close()
	w.ask("MAIL FROM:<bad@example.net>")
	var b strings.Builder
	for i := range 10_000 {
		fmt.Fprintf(&b, "RCPT TO:<%s+%d@%s>\r\n", local, i, domain)
	}
	go w.say(b.String())
	count := map[string]int{}
	for range 10_000 {
		got := w.reply()
		if count[got[:min(3, len(got))]]++; got == "" {
			break
		}
	}
	if count["250"] != 1000 || count["452"] == 0 || count["250"]+count["452"]+count["421"]+count[""] != count["250"]+count["452"]+1 && count["452"] != 9000 {
		t.Errorf("10,000 recipients: %v; want 1,000 taken and 452 for the rest", count)
	}
	t.Logf("10,000 recipients: %v", count)

	w = m.mx("hq")
	defer w.Close()
	w.ask("MAIL FROM:<bad@example.net>")
	b.Reset()
	for i := range 10_000 {
		fmt.Fprintf(&b, "RCPT TO:<nobody%d@%s>\r\n", i, domain)
	}
	go w.say(b.String())
	clear(count)
	for range 10_000 {
		got := w.reply()
		if count[got[:min(3, len(got))]]++; got == "" {
			break
		}
	}
	// Strangers are cut off after 100 in succession; loopback is trusted.
	if count["550"] != 10_000 {
		t.Errorf("10,000 guesses at names: %v; want all of them refused", count)
	}
	t.Logf("10,000 guesses at names: %v", count)
}

func hugeChunks(t *testing.T, m *Mesh) {
	to := m.User("hq", 0).Address
	for _, claim := range []string{"4294967295", "4294967296", "18446744073709551615", "18446744073709551616", strings.Repeat("9", 300), "-1", "1e9", "0x10"} {
		w := m.mx("hq")
		w.ask("MAIL FROM:<bad@example.net>")
		w.ask("RCPT TO:<%s>", to)
		got := w.ask("BDAT %s LAST\r\n%s", claim, strings.Repeat("QUIT\r\n", 1000))
		if !strings.HasPrefix(got, "5") {
			t.Errorf("BDAT %.30s: %q", claim, got)
		}
		w.Close()
	}
	// Many who claim much hold nothing while they wait.
	before := m.figures("hq").resident
	var held []*wire
	for range 100 {
		w := m.mx("hq")
		w.ask("MAIL FROM:<bad@example.net>")
		w.ask("RCPT TO:<%s>", to)
		w.say("BDAT 70000000\r\nx")
		held = append(held, w)
	}
	if now := m.figures("hq").resident; now > before+100 {
		t.Errorf("100 claims of 70 MB: resident %.0f MiB, %.0f before", now, before)
	}
	for _, w := range held {
		w.Close()
	}
	w := m.mx("hq")
	defer w.Close()
	w.ask("MAIL FROM:<bad@example.net> SIZE=99999999999999999999")
	if got := w.ask("MAIL FROM:<bad@example.net> SIZE=4294967296"); !strings.HasPrefix(got, "552") {
		t.Errorf("SIZE of 4 GiB: %q", got)
	}
	w.ask("MAIL FROM:<bad@example.net>")
	w.ask("RCPT TO:<%s>", to)
	go w.say(strings.Repeat("BDAT 0\r\n", 200_000))
	empty := 0
	for ; empty < 200_000; empty++ {
		if got := w.reply(); !strings.HasPrefix(got, "250") {
			break
		}
	}
	if empty > 10_000 {
		t.Errorf("%d empty chunks were taken", empty)
	}
	t.Logf("%d empty chunks until cut off", empty)
}

func earlyCommands(t *testing.T, m *Mesh) {
	n := m.Node("hq")
	for _, port := range []int{n.Ports.SMTP, n.Ports.Submission} {
		w := m.mustDial("hq", port, false)
		w.reply()
		w.ask("EHLO x.example.net")
		w.say("STARTTLS\r\nMAIL FROM:<bad@example.net>\r\nRCPT TO:<" + m.User("hq", 0).Address + ">\r\n")
		if got := w.reply(); !strings.HasPrefix(got, "501") && !strings.HasPrefix(got, "5") {
			t.Errorf("port %d: commands behind STARTTLS: %q", port, got)
		}
		if !w.ended() {
			t.Errorf("port %d: the session goes on", port)
		}
		w.Close()
	}
	w := m.mustDial("hq", n.Ports.IMAP, false)
	defer w.Close()
	w.line()
	w.say("a STARTTLS\r\nb LOGIN x y\r\nc LIST \"\" *\r\n")
	for range 5 {
		if s := w.line(); strings.HasPrefix(s, "b ") || strings.HasPrefix(s, "c ") {
			t.Errorf("IMAP before TLS: %q", s)
		}
	}
}

// smuggling is A1: every pair of line ends around a dot makes one message or
// none, by DATA.
func smuggling(t *testing.T, m *Mesh) {
	victim := m.User("hq", 0)
	ends := []string{"\r\n", "\n", "\r", "\r\r\n", "\n\r", "\r\n\x00", "\x00\r\n", "\r\x00\n"}
	tried := 0
	for _, before := range ends {
		for _, after := range ends {
			if before == "\r\n" && after == "\r\n" {
				continue
			}
			tried++
			w := m.mx("hq")
			w.ask("MAIL FROM:<bad@example.net>")
			w.ask("RCPT TO:<%s>", victim.Address)
			w.ask("DATA")
			w.say("Subject: outer\r\n\r\nfirst" + before + "." + after +
				"MAIL FROM:<admin@company.test>\r\nRCPT TO:<" + victim.Address + ">\r\nDATA\r\nSubject: smuggled\r\n\r\nsecond\r\n.\r\n")
			w.SetDeadline(time.Now().Add(10 * time.Second))
			if got := w.reply(); !strings.HasPrefix(got, "5") && !strings.HasPrefix(got, "250") {
				t.Errorf("%q.%q: %q", before, after, got)
			}
			w.Close()
		}
	}
	there, err := m.Inbox(victim)
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range there {
		if s == "smuggled" {
			t.Error("a second message came through")
		}
	}
	t.Logf("%d pairs of line ends", tried)
}

// monsters is A9 and A10: messages within the size limit whose parts, depth or
// headers are out of all proportion. Each is taken or refused, soon.
func monsters(t *testing.T, m *Mesh) {
	u := m.User("hq", 0)
	const head = "From: <bad@example.net>\r\nTo: <x@company.test>\r\nDate: Thu, 1 Jan 2026 00:00:00 +0000\r\nMessage-ID: <x@example.net>\r\n"
	deep := func(levels int) string {
		var b strings.Builder
		b.WriteString(head + "Subject: deep\r\n")
		for i := range levels {
			fmt.Fprintf(&b, "Content-Type: multipart/mixed; boundary=b%d\r\n\r\n--b%d\r\n", i, i)
		}
		return b.String() + "\r\nx\r\n"
	}
	for _, c := range []struct{ name, text string }{
		{"10,000 deep", deep(10_000)},
		{"100,000 parts", head + "Subject: wide\r\nContent-Type: multipart/mixed; boundary=b\r\n\r\n" + strings.Repeat("--b\r\n\r\nx\r\n", 100_000) + "--b--\r\n"},
		{"message in message, 10,000 times", head + "Subject: rfc822\r\n" + strings.Repeat("Content-Type: message/rfc822\r\n\r\n", 10_000) + "x\r\n"},
		{"a header of 30 MiB in one line", head + "Subject: big\r\nX-Big: " + strings.Repeat("y", 30<<20) + "\r\n\r\nx\r\n"},
		{"a header of 30 MiB in many lines", head + "Subject: many\r\n" + strings.Repeat("X-Many: "+strings.Repeat("z", 60)+"\r\n", 30<<20/70) + "\r\nx\r\n"},
		{"100,000 addresses", head + "Subject: to\r\nCc: " + strings.Repeat("a@b.example,\r\n ", 100_000) + "z@b.example\r\n\r\nx\r\n"},
		{"50,000 nested comments", head + "Subject: comments\r\nSender: " + strings.Repeat("(", 50_000) + "a@b.example\r\n\r\nx\r\n"},
		{"100,000 pieces of one parameter", head + "Subject: rfc2231\r\nContent-Type: text/plain;\r\n" + func() string {
			var b strings.Builder
			for i := range 100_000 {
				fmt.Fprintf(&b, " name*%d*=a;\r\n", i)
			}
			return b.String()
		}() + " x=y\r\n\r\nx\r\n"},
		{"500,000 Received", head + "Subject: received\r\n" + strings.Repeat("Received: from a by b\r\n", 500_000) + "\r\nx\r\n"},
		{"a million encoded words", head + "Subject: " + strings.Repeat("=?utf-8?q?a?= ", 1_000_000) + "\r\n\r\nx\r\n"},
		{"boundaries that begin alike", head + "Subject: alike\r\nContent-Type: multipart/mixed; boundary=" + strings.Repeat("-", 60) + "\r\n\r\n" + strings.Repeat(strings.Repeat("-", 61)+"\r\n", 200_000) + "\r\nx\r\n"},
		{"escape codes and paths in the subject", head + "Subject: \x1b[2J\u202e<script>alert(1)</script>../../etc/passwd\r\n\r\nx\r\n"},
	} {
		w := m.mx("hq")
		began := time.Now()
		got := w.deliver(u.Address, c.text+".\r\n")
		took := time.Since(began)
		if !strings.HasPrefix(got, "250") && !strings.HasPrefix(got, "552") && !strings.HasPrefix(got, "554") && !strings.HasPrefix(got, "550") {
			t.Errorf("%s: %q", c.name, got)
		}
		if took > 4*time.Second {
			t.Errorf("%s took %v", c.name, took)
		}
		t.Logf("%-40s %6d ms  %.60s", c.name, took.Milliseconds(), got)
		w.Close()
	}
	// What was taken can be listed, soon.
	began := time.Now()
	there, err := m.Inbox(u)
	if err != nil {
		t.Errorf("list them: %v", err)
	}
	if d := time.Since(began); d > 3*time.Second {
		t.Errorf("listing them took %v", d)
	}
	t.Logf("%d listed in %v", len(there), time.Since(began).Round(time.Millisecond))
}
