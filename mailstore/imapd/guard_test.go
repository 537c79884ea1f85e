package imapd

import (
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// canaries returns the folders that only an injected command makes.
func (w *world) canaries() (names []string) {
	mb, err := w.store.Mailbox(boxID("ada"))
	if err != nil {
		w.t.Fatal(err)
	}
	for _, f := range mb.Folders() {
		names = append(names, f.Name)
	}
	return names
}

// TestNoBodyIsReadAsACommand is ATTACKS.md A8b: a client that keeps to the rules
// sends text made of commands in literals of all sizes around all limits, in
// every kind of command, also in wrong ones. Exactly the commands that it sent
// are executed, or the connection ends.
func TestNoBodyIsReadAsACommand(t *testing.T) {
	synctest.Test(t, noBodyIsReadAsACommand) // failed logins take their time
}

func noBodyIsReadAsACommand(t *testing.T) {
	const limit = 200_000
	w := newWorld(t, Config{MaxMessage: limit, PerUser: 1 << 20})
	rnd := rand.New(rand.NewPCG(1, 2))
	evil := func(n int) string {
		line := "\r\nz CREATE pwned\r\nz DELETE Trash\r\nz LOGOUT\r\n"
		return strings.Repeat(line, n/len(line)+1)[:n]
	}
	sizes := []int{0, 1, 2, 1023, 1024, 1025, 4095, 4096, 4097, 49 << 10, 64<<10 - 1, 64 << 10, 64<<10 + 1, limit - 1, limit, limit + 1, 300_000}
	shapes := []string{
		"APPEND Drafts %s", "APPEND Nowhere %s", "APPEND Drafts (\\Seen) %s", "APPEND Drafts (bad flag %s", "APPEND %s x", "SEARCH TEXT %s", "SEARCH NOSUCHKEY %s",
		"SEARCH HEADER %s x", "NOOP %s", "FETCH 1 (%s)", "FETCH 1 BODY[HEADER.FIELDS (%s)]", "SELECT %s", "LIST \"\" %s", "STATUS %s (MESSAGES)", "STATUS INBOX %s", "CREATE %s",
		"RENAME %s other", "RENAME INBOX/x %s", "SUBSCRIBE %s", "LOGIN %s x", "LOGIN x %s", "AUTHENTICATE PLAIN %s", "UNKNOWN %s", "STORE 1 FLAGS %s", "COPY 1 %s", "ENABLE %s",
		"IDLE %s", "EXPUNGE %s", "UID %s", "%s", "SEARCH CHARSET %s ALL", "SEARCH (TEXT %s", "SEARCH OR TEXT %s", "GETQUOTA %s",
	}
	ended, went := 0, 0
	try := func(pre bool, shape string, n int, plus bool) {
		var c *client
		if pre {
			c = w.dial()
		} else {
			c = w.login("ada")
			c.ok("SELECT INBOX")
		}
		defer c.Close()
		before := w.canaries()
		name := fmt.Sprintf("pre-login %v, %q, %d bytes, non-synchronizing %v", pre, shape, n, plus)
		head, rest, _ := strings.Cut("a "+shape, "%s")
		mark := map[bool]string{true: "+"}[plus]
		out := fmt.Sprintf("%s{%d%s}\r\n", head, n, mark)
		c.SetReadDeadline(time.Now().Add(20 * time.Second))
		if plus {
			// The client sends all at once, and does not care for errors.
			io.WriteString(c, out+evil(n)+rest+"\r\nb CREATE after\r\n")
		} else {
			io.WriteString(c, out)
			l := c.line()
			if strings.HasPrefix(l, "+") {
				io.WriteString(c, evil(n)+rest+"\r\nb CREATE after\r\n")
			} else {
				io.WriteString(c, "b CREATE after\r\n")
			}
		}
		answered := false
		for {
			l := c.line()
			if strings.HasPrefix(l, "z ") {
				t.Errorf("%s: the text got the answer %q", name, l)
			}
			if l == "" || strings.HasPrefix(l, "* BYE") {
				ended++
				break
			}
			if strings.HasPrefix(l, "b ") {
				answered = true
				went++
				break
			}
		}
		after := w.canaries()
		made := len(after) - len(before)
		for _, f := range after {
			if f == "pwned" {
				t.Fatalf("%s: the text was executed", name)
			}
		}
		if !strings.Contains(strings.Join(after, " "), "Trash") {
			t.Fatalf("%s: the text was executed", name)
		}
		mb, _ := w.store.Mailbox(boxID("ada"))
		if made > 0 && answered {
			mb.DeleteFolder(t.Context(), "after")
		}
		for _, f := range after { // names made of evil text by CREATE and SUBSCRIBE
			if f != "INBOX" && f != "Archive" && f != "Drafts" && f != "Junk" && f != "Sent" && f != "Trash" && f != "after" {
				mb.Subscribe(t.Context(), f, false)
				mb.DeleteFolder(t.Context(), f)
			}
		}
	}
	for _, shape := range shapes {
		for _, n := range sizes {
			if n > 70_000 && !strings.HasPrefix(shape, "APPEND") && rnd.IntN(4) > 0 {
				continue
			}
			try(false, shape, n, true)
			try(false, shape, n, false)
		}
		for _, n := range []int{0, 5, 1024, 1025, 5000} {
			try(true, shape, n, true)
			try(true, shape, n, false)
		}
	}
	if ended == 0 || went == 0 {
		t.Errorf("%d connections ended, %d went on: both should happen", ended, went)
	}
}

func TestBrokenFramingEndsTheConnection(t *testing.T) {
	w := newWorld(t, Config{PerUser: 1000})
	for name, text := range map[string]string{
		"an over-long command":                  "a SEARCH TEXT " + strings.Repeat("x", 60<<10) + "\r\nz CREATE pwned\r\n",
		"one of exactly the library's limit":    "a NOOP" + strings.Repeat(" ", 50<<10-6) + "z CREATE pwned\r\n",
		"an open quote":                         "a SEARCH TEXT \"x\r\nz CREATE pwned\r\n\"\r\n",
		"a bare CR":                             "a NOSUCH x\rz CREATE pwned\r\n",
		"a NUL":                                 "a NOOP \x00\r\nz CREATE pwned\r\n",
		"a literal of 4 GiB":                    "a SEARCH TEXT {4294967295+}\r\nz CREATE pwned\r\n",
		"a literal beyond 64 bits":              "a SEARCH TEXT {99999999999999999999+}\r\nz CREATE pwned\r\n",
		"a literal of far too many digits":      "a SEARCH TEXT {" + strings.Repeat("9", 50) + "}\r\nz CREATE pwned\r\n",
		"a literal with a minus":                "a SEARCH TEXT {5-}\r\nz CREATE pwned\r\n",
		"a literal in the middle":               "a SEARCH TEXT {5} x\r\nz CREATE pwned\r\n",
		"an unknown form":                       "a SEARCH TEXT {x}\r\nz CREATE pwned\r\n",
		"a tag that looks like a continuation":  "+ SEARCH TEXT {5}\r\nz CREATE pwned\r\n",
		"many literals":                         "a SEARCH" + strings.Repeat(" TEXT {1+}\r\nx", 300) + "\r\nz CREATE pwned\r\n",
		"large literals, all of them":           "a SEARCH" + strings.Repeat(" TEXT {4096+}\r\n"+strings.Repeat("x", 4096), 17) + "\r\nz CREATE pwned\r\n",
		"a million braces":                      strings.Repeat("{", 1e6),
		"a refused command with another behind": "a SELECT {4+}\r\n&bad {30+}\r\nz CREATE pwned\r\n",
	} {
		c := w.login("ada")
		io.WriteString(c, text)
		bye := false
		for {
			l := c.line()
			if strings.HasPrefix(l, "z ") {
				t.Errorf("%s: %s", name, l)
			}
			bye = bye || strings.HasPrefix(l, "* BYE")
			if l == "" {
				break
			}
		}
		if !bye {
			t.Errorf("%s: ended without BYE", name)
		}
	}
	if got := strings.Join(w.canaries(), " "); strings.Contains(got, "pwned") {
		t.Error(got)
	}
}

func TestARefusedCommandDoesNotEndTheConnectionWithoutNeed(t *testing.T) {
	w := newWorld(t, Config{MaxMessage: 1000})
	c := w.login("ada")
	c.no("APPEND Drafts {1001}", "NO [TOOBIG]")
	c.ok("NOOP")
	c.say("x SELECT {4}\r\n")
	if l := c.line(); !strings.HasPrefix(l, "+") {
		t.Fatal(l)
	}
	c.say("&bad extra words\r\n")
	if l := c.line(); !strings.HasPrefix(l, "x ") {
		t.Fatal(l)
	}
	c.ok("NOOP")
	c.no("SEARCH NOSUCHKEY", "")
	c.ok("NOOP")
	if u := c.ok("LIST {0+}\r\n {4+}\r\nTra%"); len(u) != 1 {
		t.Error(u)
	}
	if u := c.ok("LIST \"\" {4+}\r\nTra%"); len(u) != 1 {
		t.Error(u)
	}
	c.ok("SELECT {5+} \r\nINBOX")
}

func TestPipelinedCommandsAreAnsweredInOrder(t *testing.T) {
	w := newWorld(t, Config{})
	c := w.login("ada")
	var all strings.Builder
	for i := range 300 {
		fmt.Fprintf(&all, "p%d NOOP\r\n", i)
	}
	c.say(all.String())
	for i := range 300 {
		if l := c.line(); l != fmt.Sprintf("p%d OK NOOP completed", i) {
			t.Fatal(l)
		}
	}
}

// FuzzGuard compares the guard, fed in pieces, with what an unlimited reader of
// the same grammar would hand out: complete lines and accepted literals, a
// prefix of the input, in order.
func FuzzGuard(f *testing.F) {
	f.Add([]byte("a LOGIN {3+}\r\nfoo {3}\r\nbar\r\nb NOOP\r\n"), uint64(1))
	f.Add([]byte("a X \"q\\\"{\"\r\nb {0}\r\n\r\n"), uint64(2))
	f.Fuzz(func(t *testing.T, in []byte, seed uint64) {
		rnd := rand.New(rand.NewPCG(seed, 0))
		a, b := pipe("198.51.100.7:1", "192.0.2.1:143")
		for rest := in; len(rest) > 0; {
			n := 1 + rnd.IntN(len(rest))
			a.Write(rest[:n])
			rest = rest[n:]
		}
		a.(*pipeEnd).w.close()
		g := newGuard(b, func() int64 { return 1000 }, func() {})
		g.early = seed%2 == 0
		var got []byte
		buf := make([]byte, 64)
		for {
			n, err := g.Read(buf[:1+rnd.IntN(len(buf))])
			got = append(got, buf[:n]...)
			if g.pending >= 0 && g.ready == 0 && n > 0 { // the library has the announcement
				switch rnd.IntN(3) {
				case 0:
					g.Write([]byte("+ go on\r\n"))
				case 1:
					g.mu.Lock()
					tag := g.tag
					g.mu.Unlock()
					g.Write([]byte(tag + " NO refused\r\n"))
					if got := refusedGoesOn(g); got {
						return // what follows is dropped or ends; nothing to compare
					}
				}
			}
			if err != nil {
				break
			}
		}
		if !strings.HasPrefix(string(in), string(got)) {
			t.Errorf("%q became %q", in, got)
		}
	})
}

func refusedGoesOn(g *guard) bool {
	buf := make([]byte, 4096)
	for {
		if _, err := g.Read(buf); err != nil {
			return true
		}
	}
}

func TestAReaderThatFailsEndsTheGuard(t *testing.T) {
	a, b := pipe("198.51.100.7:1", "192.0.2.1:143")
	closed := 0
	g := newGuard(b, func() int64 { return 10 }, func() { closed++ })
	a.Close()
	if _, err := g.Read(make([]byte, 10)); err == nil {
		t.Error("reads from a closed connection")
	}
	g.Close()
	g.Close()
	if closed != 1 {
		t.Errorf("told of its end %d times", closed)
	}
	if err := (&guard{Conn: b, write: make(chan struct{}, 1), onClose: func() {}, pending: -1}).violation("x"); !errors.Is(err, net.ErrClosed) {
		t.Error(err)
	}
}
