package imapd

import (
	"bufio"
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/emersion/go-imap/v2"
	"github.com/emersion/go-imap/v2/imapclient"
	"github.com/google/go-cmp/cmp"

	"posthouse/mailstore"
	"posthouse/mailstore/log"
	"posthouse/mailstore/mime"
	"posthouse/transport"
)

// secure makes the handshake and goes on in TLS.
func (c *client) secure(cfg *tls.Config) {
	c.t.Helper()
	tc := tls.Client(c.Conn, cfg)
	if err := tc.HandshakeContext(c.t.Context()); err != nil {
		c.t.Fatal(err)
	}
	c.Conn, c.r = tc, bufio.NewReader(tc)
}

func TestThereIsNoLoginWithoutTLS(t *testing.T) {
	w := newWorld(t, Config{})
	c := w.client(w.imap.dial("198.51.100.7:1"))
	if l := c.line(); !strings.Contains(l, "STARTTLS LOGINDISABLED]") {
		t.Error(l)
	}
	c.no(`LOGIN ada "pw of ada"`, "NO [PRIVACYREQUIRED]")
	c.no("AUTHENTICATE PLAIN AGFkYQBwdyBvZiBhZGE=", "NO [PRIVACYREQUIRED]")
	c.no("STARTTLS now", "BAD")
	if l := c.line(); !strings.HasPrefix(l, "* BYE") {
		t.Error(l)
	}
	c = w.client(w.imap.dial("198.51.100.7:1"))
	c.line()
	c.ok("CAPABILITY")
	c.ok("STARTTLS")
	c.secure(w.tls)
	// RFC 9051 section 6.2.1: no greeting follows.
	if u := c.ok("CAPABILITY"); !strings.Contains(u[0], "AUTH=PLAIN") || strings.Contains(u[0], "STARTTLS") || strings.Contains(u[0], "LOGINDISABLED") {
		t.Error(u)
	}
	c.no("STARTTLS", "NO")
	c.ok("AUTHENTICATE PLAIN AGFkYQBwdyBvZiBhZGE=")
	c.ok("SELECT INBOX")
}

func TestNothingCrossesSTARTTLS(t *testing.T) {
	const text = "a STARTTLS\r\nb LOGIN ada \"pw of ada\"\r\nc CREATE pwned\r\n"
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, Config{})
		for cut := range len(text) {
			c := w.client(w.imap.dial("198.51.100.7:1"))
			c.line()
			io.WriteString(c, text[:cut])
			synctest.Wait()
			io.WriteString(c, text[cut:])
			for {
				l := c.line()
				if strings.HasPrefix(l, "b ") || strings.HasPrefix(l, "c ") {
					t.Errorf("cut at %d: %q", cut, l)
				}
				if l == "" || strings.HasPrefix(l, "a OK") {
					break
				}
			}
			c.Close()
		}
	})
}

func TestImplicitTLSAndTheLibrarysOwnClient(t *testing.T) {
	w := newWorld(t, Config{})
	w.put(w.folder("ada", "INBOX"), multipart)
	exists := make(chan uint32, 1)
	ic := imapclient.New(tls.Client(w.imaps.dial("198.51.100.7:1"), w.tls), &imapclient.Options{UnilateralDataHandler: &imapclient.UnilateralDataHandler{
		Mailbox: func(d *imapclient.UnilateralDataMailbox) {
			if d.NumMessages != nil {
				exists <- *d.NumMessages
			}
		}}})
	defer ic.Close()
	if err := ic.Login("ada", "pw of ada").Wait(); err != nil {
		t.Fatal(err)
	}
	sel, err := ic.Select("INBOX", nil).Wait()
	if err != nil || sel.NumMessages != 1 {
		t.Fatal(sel, err)
	}
	msgs, err := ic.Fetch(imap.SeqSetNum(1), &imap.FetchOptions{Envelope: true, BodyStructure: &imap.FetchItemBodyStructure{Extended: true}}).Collect()
	if err != nil || len(msgs) != 1 || msgs[0].Envelope.Subject != "Příloha" || msgs[0].Envelope.From[0].Name != "Eva Nováková" {
		t.Fatal(msgs, err)
	}
	if mp, ok := msgs[0].BodyStructure.(*imap.BodyStructureMultiPart); !ok || len(mp.Children) != 3 {
		t.Error("structure is lost")
	}
	idle, err := ic.Idle()
	if err != nil {
		t.Fatal(err)
	}
	w.put(w.folder("ada", "INBOX"), simple)
	if n := <-exists; n != 2 {
		t.Error(n)
	}
	if err := idle.Close(); err != nil {
		t.Error(err)
	}
	list, err := ic.List("", "*", &imap.ListOptions{ReturnStatus: &imap.StatusOptions{NumMessages: true}}).Collect()
	if err != nil || len(list) != 6 {
		t.Error(list, err)
	}
}

func TestFailedLoginsWaitAndTheRightPasswordDoesNot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, Config{LoginTries: 8})
		c := w.dial()
		for _, want := range []time.Duration{1, 2, 3, 4, 5, 6} {
			start := time.Now()
			c.no("LOGIN ada wrong", "NO [AUTHENTICATIONFAILED]")
			if got := time.Since(start); got != want*time.Second {
				t.Errorf("answered after %v, want %v s", got, want)
			}
		}
		start := time.Now()
		c.ok(`LOGIN ada "pw of ada"`)
		if got := time.Since(start); got != 0 {
			t.Errorf("the right password waited %v", got)
		}
		d := w.dial()
		d.no("LOGIN ada wrong", "NO")
		if got := time.Since(start); got != time.Second {
			t.Errorf("after a success the count starts at %v", got)
		}
		for range 7 {
			d.do("LOGIN nobody x")
		}
		if l := d.line(); l != "" {
			t.Errorf("still there after eight tries: %q", l)
		}
	})
}

func TestConnectionsAreLimited(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, Config{PerAddress: 3, PerUser: 2})
		var open []*client
		for range 3 {
			c := w.client(w.imap.dial("198.51.100.7:1"))
			c.line()
			open = append(open, c)
		}
		c := w.client(w.imap.dial("198.51.100.7:2"))
		if l := c.line(); !strings.HasPrefix(l, "* BYE Too many connections") {
			t.Error(l)
		}
		if c = w.client(w.imap.dial("127.0.0.1:2")); !strings.HasPrefix(c.line(), "* OK") {
			t.Error("loopback is not exempt")
		}
		if c = w.client(w.imap.dial("198.51.100.8:2")); !strings.HasPrefix(c.line(), "* OK") {
			t.Error("another address pays")
		}
		open[0].ok("STARTTLS")
		open[0].secure(w.tls)
		open[0].ok(`LOGIN ada "pw of ada"`)
		c = w.client(w.imap.dial("198.51.100.7:3"))
		if !strings.HasPrefix(c.line(), "* OK") {
			t.Error("who has logged in still counts")
		}
		w.login("ada")
		d := w.dial()
		d.no(`LOGIN ada "pw of ada"`, "NO [LIMIT]")
		open[0].Close()
		synctest.Wait()
		d.ok(`LOGIN ada "pw of ada"`)
	})
}

func TestDrainLetsCommandsFinish(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, Config{})
		idle, busy, fresh, raw, stuck := w.login("ada"), w.login("ada"), w.dial(), w.client(w.imap.dial("198.51.100.7:1")), w.login("bob")
		raw.line()
		idle.ok("SELECT INBOX")
		idle.say("i IDLE\r\n")
		idle.line()
		secure := w.client(w.imaps.dial("198.51.100.7:1"))
		secure.secure(w.tls)
		secure.line()
		busy.say("a APPEND Drafts {3}\r\n")
		busy.line()
		stuck.say("a APPEND Drafts {3}\r\n")
		stuck.line()
		synctest.Wait()
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		start := time.Now()
		done := make(chan time.Duration)
		go func() { w.srv.Drain(ctx); done <- time.Since(start) }()
		synctest.Wait()
		for name, c := range map[string]*client{"idle": idle, "fresh": fresh, "secure": secure} {
			if l := c.line(); !strings.HasPrefix(l, "* BYE Server is going down") {
				t.Errorf("%s: %q", name, l)
			}
		}
		if l := raw.line(); l != "" {
			t.Error(l)
		}
		time.Sleep(time.Second)
		busy.say("x\r\n\r\n")
		if l := busy.line(); !strings.HasPrefix(l, "a OK [APPENDUID") {
			t.Error(l)
		}
		if l := busy.line(); !strings.HasPrefix(l, "* BYE") {
			t.Error(l)
		}
		if took := <-done; took != 10*time.Second {
			t.Errorf("drained after %v", took)
		}
		if st, _ := w.folder("bob", "Drafts").Status(); st.Messages != 0 {
			t.Error("half a message was kept")
		}
	})
}

func TestAnIdleClientIsSentAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, Config{})
		for name, c := range map[string]*client{"not logged in": w.dial(), "no TLS": func() *client { c := w.client(w.imap.dial("198.51.100.7:1")); c.line(); return c }()} {
			start := time.Now()
			c.line()
			if d := time.Since(start); d > time.Minute {
				t.Errorf("%s: %v", name, d)
			}
		}
		c := w.login("ada")
		start := time.Now()
		c.ok("SELECT INBOX")
		if l := c.line(); !strings.HasPrefix(l, "* BYE") || time.Since(start) < 30*time.Minute {
			t.Errorf("%q after %v", l, time.Since(start))
		}
	})
}

func TestASlowUploadIsNotCutWhileItMoves(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, Config{})
		c := w.login("ada")
		c.say("a APPEND Drafts {100}\r\n")
		c.line()
		for range 100 {
			time.Sleep(30 * time.Second)
			c.say("x")
		}
		c.say("\r\n")
		if l := c.line(); !strings.HasPrefix(l, "a OK") {
			t.Error(l)
		}
	})
}

func TestARemovedFolderEndsItsSessions(t *testing.T) {
	w := newWorld(t, Config{})
	a, b := w.login("ada"), w.login("ada")
	a.ok("CREATE x")
	b.ok("SELECT x")
	a.ok("DELETE x")
	if u, _ := b.do("NOOP"); len(u) != 1 || !strings.HasPrefix(u[0], "* BYE") {
		t.Error(u)
	}
}

func TestIdleEndsByDoneAlone(t *testing.T) {
	w := newWorld(t, Config{})
	c := w.login("ada")
	c.say("a IDLE\r\n")
	c.line()
	c.say("done\r\n")
	if l := c.line(); l != "a OK IDLE completed" {
		t.Error(l)
	}
	c.no("IDLE now", "BAD")
	c.ok("NOOP")
	c.say("b IDLE\r\nDONE\r\n") // without waiting
	c.line()
	if l := c.line(); l != "b OK IDLE completed" {
		t.Error(l)
	}
	c.say("c IDLE\r\nd CREATE x\r\n")
	c.line()
	if l := c.line(); !strings.HasPrefix(l, "* BYE DONE was expected") {
		t.Error(l)
	}
}

func TestAStopDoesNotWaitForTheAnswerToAWrongPassword(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, Config{})
		c := w.dial()
		c.do("LOGIN ada x")
		c.do("LOGIN ada x")
		c.do("LOGIN ada x")
		c.say("a LOGIN ada x\r\n") // answered after four seconds
		synctest.Wait()
		start := time.Now()
		w.srv.Drain(t.Context())
		if d := time.Since(start); d != 0 {
			t.Errorf("ended after %v", d)
		}
		if l := c.line(); !strings.HasPrefix(l, "a NO [UNAVAILABLE]") && !strings.HasPrefix(l, "* BYE") {
			t.Error(l)
		}
	})
}

func TestAViewIsRightAfterTheStoreForgotItsExpunges(t *testing.T) {
	w := newWorld(t, Config{})
	f := w.folder("ada", "INBOX")
	w.put(f, simple, simple, simple, simple)
	o, err := openView(f, false)
	if err != nil {
		t.Fatal(err)
	}
	defer o.close()
	o.fresh = []mailstore.UID{7, 8} // arrived, and gone before it was told
	if _, _, err := f.SetFlags(t.Context(), []mailstore.UID{2, 3}, mailstore.FlagsAdd, []mailstore.Flag{mailstore.Deleted}, 0); err != nil {
		t.Fatal(err)
	}
	if _, err := f.Expunge(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	ch := mailstore.Changes{Forgotten: true}
	if err := o.compare(&ch); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff([]mailstore.UID{2, 3, 7, 8}, ch.Expunged); d != "" {
		t.Error(d)
	}
}

func TestTheConnectionsOfOneUserCanBeEnded(t *testing.T) {
	w := newWorld(t, Config{})
	ada, bob := w.login("ada"), w.login("bob")
	ada.ok("SELECT INBOX")
	ada.say("a IDLE\r\n")
	ada.line()
	w.srv.EndUser("ada", "Password was changed, log in again")
	if l := ada.line(); l != "* BYE Password was changed, log in again" {
		t.Error(l)
	}
	bob.ok("NOOP")
}

func TestOverRealSockets(t *testing.T) {
	w := newWorld(t, Config{})
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- w.srv.Serve(context.Background(), ln, false) }()
	dial := func() *client {
		raw, err := net.Dial("tcp", ln.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		c := w.client(raw)
		c.line()
		c.ok("STARTTLS")
		c.secure(w.tls)
		c.ok(`LOGIN ada "pw of ada"`)
		c.ok("SELECT INBOX")
		return c
	}
	a, b := dial(), dial()
	a.say("a IDLE\r\n")
	a.line()
	big := strings.Repeat("Subject: x\r\n", 100_000)
	b.ok(fmt.Sprintf("APPEND INBOX {%d+}\r\n%s", len(big), big))
	if l := a.line(); l != "* 1 EXISTS" {
		t.Error(l)
	}
	if u := b.ok("FETCH 1 BODY.PEEK[]"); !strings.Contains(u[len(u)-1], big) && !strings.Contains(u[0], big) {
		t.Error("the message came back different")
	}
	w.srv.Drain(t.Context())
	if l := a.line(); !strings.HasPrefix(l, "* BYE") {
		t.Error(l)
	}
	if err := <-served; err != nil {
		t.Error(err)
	}
}

func TestAuthenticatePlainInTwoSteps(t *testing.T) {
	w := newWorld(t, Config{})
	c := w.dial()
	c.say("a AUTHENTICATE PLAIN\r\n")
	if l := c.line(); !strings.HasPrefix(l, "+") {
		t.Fatal(l)
	}
	c.say("*\r\n")
	if l := c.line(); !strings.HasPrefix(l, "a BAD") {
		t.Error(l)
	}
	c.say("b AUTHENTICATE PLAIN\r\n")
	c.line()
	c.say("AGFkYQBwdyBvZiBhZGE=\r\n")
	if l := c.line(); !strings.HasPrefix(l, "b OK") {
		t.Error(l)
	}
	c.ok("SELECT INBOX")
}

// TestADamagedBodyIsNeverPassedOff lets reading fail at the start, and in the
// middle of a long body.
func TestADamagedBodyIsNeverPassedOff(t *testing.T) {
	for _, c := range []struct {
		name  string
		size  int64
		fails int64
	}{{"a small one is left out", 1000, 500}, {"a large one cuts the connection", 1 << 20, 1 << 19}} {
		f := fetch{opt: &imap.FetchOptions{BodySection: []*imap.FetchItemBodySection{{}}}}
		msg := &mailstore.Message{Structure: &mime.Structure{Root: &mime.Part{End: c.size, Type: "text", Subtype: "plain"}}, Body: sizedBody(c.size)}
		items, err := f.items(msg, damaged(c.fails))
		if c.size <= wholeSection {
			if err == nil {
				t.Errorf("%s: read without an error", c.name)
			}
			continue
		}
		if err != nil || len(items) != 1 || items[0].open == nil {
			t.Fatalf("%s: %v", c.name, err)
		}
		if n, err := io.Copy(io.Discard, items[0].open()); err == nil || n > c.fails {
			t.Errorf("%s: %d bytes, %v", c.name, n, err)
		}
	}
}

type sizedBody int64

func (b sizedBody) Size() int64                         { return int64(b) }
func (b sizedBody) Open() (transport.BodyReader, error) { return nil, io.ErrUnexpectedEOF }

type damaged int64

func (d damaged) ReadAt(p []byte, off int64) (int, error) {
	if n := int64(d) - off; n < int64(len(p)) {
		return int(max(n, 0)), log.ErrDamaged
	}
	return len(p), nil
}
