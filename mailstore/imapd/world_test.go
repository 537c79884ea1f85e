package imapd

import (
	"bufio"
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"posthouse/mailstore"
	"posthouse/mailstore/journal"
	"posthouse/mailstore/journal/journaltest"
	"posthouse/mailstore/mime"
	"posthouse/mesh"
	"posthouse/simtest/testcert"
)

// world is a store with the mailboxes of ada and bob, a server on it, and its
// listeners.
type world struct {
	t     testing.TB
	store *mailstore.Store
	j     *journal.Journal
	srv   *Server
	imap  *pipeListener // port 143
	imaps *pipeListener // port 993
	plain *pipeListener // secured already: tests without the cost of TLS
	tls   *tls.Config
}

var users = map[string]byte{"ada": 1, "bob": 2}

func boxID(user string) mesh.MailboxID { return mesh.MailboxID{0: users[user], 15: 1} }

func newWorld(t testing.TB, cfg Config) *world {
	w := &world{t: t, imap: newPipeListener(), imaps: newPipeListener(), plain: newPipeListener()}
	w.j = journaltest.NewDisk(t).Open(t)
	w.store = mailstore.New(w.j, mailstore.Options{})
	ctx, cancel := context.WithCancel(context.Background())
	if err := w.j.Start(ctx); err != nil {
		t.Fatal(err)
	}
	for u := range users {
		if err := w.store.Create(ctx, boxID(u), 0); err != nil {
			t.Fatal(err)
		}
	}
	server, client := certificates()
	w.tls = client
	w.srv = New(cfg, Deps{
		Failures: new(failures), Login: func(_ context.Context, user, password string, _ netip.Addr) (Account, error) {
			if users[user] == 0 || password != "pw of "+user {
				return Account{}, fmt.Errorf("%s: %w", user, ErrCredentials)
			}
			return Account{User: user, Mailbox: boxID(user)}, nil
		},
		Mailbox: w.store.Mailbox, NewDraft: w.j.NewDraft, Admit: w.j.Admit, TLS: server,
	})
	var wg sync.WaitGroup
	wg.Go(func() { w.check(w.srv.Serve(ctx, w.imap, false)) })
	wg.Go(func() { w.check(w.srv.Serve(ctx, w.imaps, true)) })
	wg.Go(func() { w.servePlain(ctx) })
	t.Cleanup(func() {
		cancel()
		w.plain.Close()
		w.srv.cut()
		wg.Wait()
		w.srv.sessions.Wait()
		w.store.Close()
	})
	return w
}

// servePlain is Serve without TLS.
func (w *world) servePlain(ctx context.Context) {
	ready := newReadyListener(w.plain.Addr())
	var wg sync.WaitGroup
	wg.Go(func() { w.check(w.srv.lib.Serve(ready)) })
	for {
		c, err := w.plain.Accept()
		if err != nil {
			break
		}
		if !w.srv.enter(c) {
			c.Close()
			continue
		}
		w.srv.limits.arrive(addressOf(c), 1<<20)
		w.srv.admit(c, c, addressOf(c), ready, false)
	}
	w.srv.sessions.Wait()
	ready.Close()
	wg.Wait()
}

// failures has each wrong password of a pair wait a second longer.
type failures struct{ of sync.Map }

func (f *failures) Failed(from netip.Addr, user string, _ time.Time) time.Duration {
	n, _ := f.of.LoadOrStore(from.String()+user, new(atomic.Int64))
	return time.Duration(n.(*atomic.Int64).Add(1)) * time.Second
}

func (f *failures) Succeeded(from netip.Addr, user string) { f.of.Delete(from.String() + user) }

func (w *world) check(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Error(err)
	}
}

func (w *world) folder(user, name string) *mailstore.Folder {
	w.t.Helper()
	mb, err := w.store.Mailbox(boxID(user))
	if err != nil {
		w.t.Fatal(err)
	}
	f, err := mb.Folder(name)
	if err != nil {
		w.t.Fatal(err)
	}
	return f
}

// put appends messages behind the server's back.
func (w *world) put(f *mailstore.Folder, texts ...string) []mailstore.UID {
	w.t.Helper()
	var msgs []mailstore.AppendMessage
	for _, text := range texts {
		d := w.j.NewDraft()
		io.WriteString(d, text)
		if err := d.Seal(context.Background()); err != nil {
			w.t.Fatal(err)
		}
		st, err := mime.Parse(strings.NewReader(text), int64(len(text)))
		if err != nil {
			w.t.Fatal(err)
		}
		msgs = append(msgs, mailstore.AppendMessage{Draft: d, Structure: st, Received: time.Date(2026, 2, 3, 4, 5, 6, 0, time.UTC)})
	}
	_, uids, err := f.Append(context.Background(), msgs)
	if err != nil {
		w.t.Fatal(err)
	}
	return uids
}

func certificates() (server, client *tls.Config) {
	server, roots := testcert.For("imap.company.com")
	return server, &tls.Config{RootCAs: roots, ServerName: "imap.company.com"}
}

// client speaks IMAP line by line.
type client struct {
	t testing.TB
	net.Conn
	r   *bufio.Reader
	tag int
}

func (w *world) client(c net.Conn) *client {
	cl := &client{t: w.t, Conn: c, r: bufio.NewReader(c)}
	w.t.Cleanup(func() { c.Close() })
	return cl
}

// dial connects without TLS and reads the greeting.
func (w *world) dial() *client {
	w.t.Helper()
	c := w.client(w.plain.dial("198.51.100.7:5000"))
	if l := c.line(); !strings.HasPrefix(l, "* OK ") {
		w.t.Fatalf("greeting %q", l)
	}
	return c
}

func (w *world) login(user string) *client {
	w.t.Helper()
	c := w.dial()
	c.ok("LOGIN " + user + ` "pw of ` + user + `"`)
	return c
}

// line reads a line with the literals in it; "" at the end.
func (c *client) line() string {
	var b strings.Builder
	for {
		l, err := c.r.ReadString('\n')
		b.WriteString(l)
		if err != nil {
			return b.String()
		}
		var n int
		if i := strings.LastIndexByte(l, '{'); i < 0 || !strings.HasSuffix(l, "}\r\n") {
			return strings.TrimSuffix(b.String(), "\r\n")
		} else if _, err := fmt.Sscanf(l[i:], "{%d}", &n); err != nil {
			return strings.TrimSuffix(b.String(), "\r\n")
		}
		lit := make([]byte, n)
		if _, err := io.ReadFull(c.r, lit); err != nil {
			return b.String()
		}
		b.Write(lit)
	}
}

func (c *client) say(s string) {
	c.t.Helper()
	if _, err := io.WriteString(c, s); err != nil {
		c.t.Errorf("send %.40q: %v", s, err)
	}
}

// do sends a command and returns its untagged responses and its answer without
// the tag.
func (c *client) do(cmd string) (untagged []string, answer string) {
	c.t.Helper()
	c.tag++
	tag := fmt.Sprintf("t%d ", c.tag)
	c.say(tag + cmd + "\r\n")
	for {
		l := c.line()
		if l == "" {
			return untagged, ""
		}
		if a, ok := strings.CutPrefix(l, tag); ok {
			return untagged, a
		}
		untagged = append(untagged, l)
	}
}

func (c *client) ok(cmd string) []string {
	c.t.Helper()
	u, a := c.do(cmd)
	if !strings.HasPrefix(a, "OK") {
		c.t.Fatalf("%.60s: %s %q", cmd, a, u)
	}
	return u
}

func (c *client) no(cmd, want string) {
	c.t.Helper()
	if _, a := c.do(cmd); !strings.HasPrefix(a, want) {
		c.t.Errorf("%.60s: %q, want %s", cmd, a, want)
	}
}
