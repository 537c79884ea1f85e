package processes

import (
	"strings"
	"testing"
)

// imap opens a session by TLS, logged in when k is not negative.
func (m *Mesh) imap(office string, k int) *wire {
	m.tb.Helper()
	w := m.mustDial(office, m.Node(office).Ports.IMAPS, true)
	if got := w.line(); !strings.HasPrefix(got, "* OK") {
		m.tb.Fatalf("greeting %q", got)
	}
	if k >= 0 {
		u := m.User(office, k)
		w.say("in LOGIN " + u.Address + " " + u.Password + "\r\n")
		if got := w.untagged("in"); !strings.HasPrefix(got, "in OK") {
			m.tb.Fatalf("login: %q", got)
		}
	}
	return w
}

// refusedOrEnded says one command and wants NO, BAD or the end; in any case
// what stands behind it in the same breath, a command that would delete or make
// a folder, must not be done.
func refusedOrEnded(t *testing.T, w *wire, what, command string) {
	t.Helper()
	go w.say(command)
	for {
		s := w.line()
		switch {
		case s == "":
			return // closed
		case strings.HasPrefix(s, "+ "):
			t.Errorf("%s: the server asks for more: %q", what, s)
			return
		case strings.HasPrefix(s, "x NO"), strings.HasPrefix(s, "x BAD"), strings.HasPrefix(s, "* BYE"):
			return
		case strings.HasPrefix(s, "x OK"), strings.HasPrefix(s, "z OK"):
			t.Errorf("%s: %q", what, s)
			return
		}
	}
}

func imapBeforeLogin(t *testing.T, m *Mesh) {
	tail := "z CREATE pwned\r\nz DELETE INBOX\r\n"
	for _, port := range []bool{true, false} {
		for _, c := range []struct{ name, say string }{
			{"a literal of 4 GiB", "x LOGIN {4294967295}\r\n"},
			{"a literal of 4 GiB that does not wait", "x LOGIN {4294967295+}\r\n" + strings.Repeat(tail, 1000)},
			{"a literal beyond 64 bits", "x LOGIN {18446744073709551616}\r\n"},
			{"a literal of 1 MiB that does not wait", "x LOGIN {1048576+}\r\n" + strings.Repeat(tail, 1000)},
			{"APPEND before login", "x APPEND INBOX {4294967295+}\r\n" + strings.Repeat(tail, 1000)},
			{"10 MiB without a line end", "x LOGIN " + strings.Repeat("a", 10<<20)},
			{"a million braces", "x LOGIN " + strings.Repeat("{", 1_000_000) + "\r\n"},
			{"a million brackets", "x LIST " + strings.Repeat("(", 1_000_000) + "\r\n"},
			{"a tag of 1 MiB", strings.Repeat("t", 1<<20) + " NOOP\r\n"},
			{"NUL and high bytes", "x \x00\xff\xfe LOGIN\x00 a b\r\nz CREATE pwned\r\n"},
		} {
			n := m.Node("hq")
			p := n.Ports.IMAP
			if port {
				p = n.Ports.IMAPS
			}
			w := m.mustDial("hq", p, port)
			w.line()
			refusedOrEnded(t, w, c.name, c.say)
			w.Close()
		}
	}
}

func imapAfterLogin(t *testing.T, m *Mesh) {
	tail := "z CREATE pwned\r\nz DELETE INBOX\r\n"
	for _, c := range []struct{ name, say string }{
		{"APPEND of 4 GiB", "x APPEND INBOX {4294967295}\r\n"},
		{"APPEND of 4 GiB that does not wait", "x APPEND INBOX {4294967295+}\r\n" + strings.Repeat(tail, 10_000)},
		{"APPEND beyond 64 bits", "x APPEND INBOX {99999999999999999999+}\r\n" + strings.Repeat(tail, 100)},
		{"a mailbox name of 1 GiB", "x SELECT {1073741824+}\r\n" + strings.Repeat(tail, 1000)},
		{"a command of 10 MiB", "x SEARCH " + strings.Repeat("SEEN ", 2<<20) + "\r\n" + tail},
		{"brackets 100,000 deep", "x SEARCH " + strings.Repeat("(", 100_000) + "ALL" + strings.Repeat(")", 100_000) + "\r\n"},
		{"brackets 20,000 deep in one command", "x SEARCH " + strings.Repeat("(", 20_000) + "ALL" + strings.Repeat(")", 20_000) + "\r\n"},
		{"OR 8,000 deep", "x SEARCH " + strings.Repeat("OR SEEN ", 5_000) + "ALL\r\n"},
		{"NOT 10,000 deep", "x SEARCH " + strings.Repeat("NOT ", 10_000) + "ALL\r\n"},
		{"a million literals", "x SEARCH " + strings.Repeat("SUBJECT {1+}\r\na ", 100_000) + "\r\n" + tail},
		{"FETCH of a million sections", "x FETCH 1 (" + strings.Repeat("BODY[1] ", 200_000) + ")\r\n"},
		{"numbers that overflow", "x FETCH 99999999999999999999 FLAGS\r\n"},
		{"sets by the thousand", "x UID FETCH " + strings.Repeat("1:*,", 20_000) + "1 FLAGS\r\n"},
	} {
		w := m.imap("hq", 0)
		w.say("s EXAMINE INBOX\r\n")
		w.untagged("s")
		refusedOrEnded(t, w, c.name, c.say)
		w.Close()
	}
	w := m.imap("hq", 0)
	defer w.Close()
	w.say("l LIST \"\" *\r\n")
	for {
		s := w.line()
		if strings.Contains(s, "pwned") {
			t.Errorf("a folder was made from the text of a refused command: %q", s)
		}
		if s == "" || strings.HasPrefix(s, "l ") {
			break
		}
	}
}

// oddMailboxNames is A27: names are keys, never paths. What a name makes is in
// the list again, byte for byte, or it was refused; the caller looks at the disk.
func oddMailboxNames(t *testing.T, m *Mesh) {
	w := m.imap("hq", 0)
	defer w.Close()
	made := 0
	for _, name := range []string{
		"../pwned", "../../../../../../tmp/pwned", "/tmp/pwned", "..", ".", "a/../../pwned", "%2e%2e/pwned", "&AC4ALg-/pwned", "a\\b", "C:\\pwned", "pwned.log", "adm", "admin", "adm/x",
		"-rf", "$(touch pwned)", "`id`", "pwned;id", "pwned|id", "con", strings.Repeat("n", 64<<10), strings.Repeat("d/", 5000) + "x", "con\u202efdp", "&&", "&ZZZZ-",
	} {
		quoted := `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`).Replace(name) + `"`
		w.say("x CREATE " + quoted + "\r\n")
		switch got := w.untagged("x"); {
		case strings.HasPrefix(got, "x OK"):
			made++
			w.say("y DELETE " + quoted + "\r\n")
			if got := w.untagged("y"); !strings.HasPrefix(got, "y OK") {
				t.Errorf("%.30q was made but cannot be removed: %q", name, got)
			}
		case got == "":
			w.Close()
			w = m.imap("hq", 0)
		}
	}
	t.Logf("%d odd names are folders like others", made)
}
