// Package processes proves what the product promises on real processes, real
// sockets and real disks: it drives the program that ships, by its demo, with
// the clients that people would use, and counts every message.
//
// Only its own tests use it. A test that would take long does a part of its
// work in `make test` and all of it in `make prove` (PROVE=full). With
// PROVE_KEEP set, the folder of a failed test's mesh stays for a look.
package processes

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/smtp"
	"os"
	"os/exec"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/emersion/go-imap/v2"
	"github.com/emersion/go-imap/v2/imapclient"

	"posthouse/appliance/admin"
	"posthouse/appliance/api"
	"posthouse/appliance/demo"
)

// Full reports whether everything is to be proven, however long it takes.
func Full() bool { return os.Getenv("PROVE") == "full" }

// Count returns full or the smaller part, as Full says.
func Count(part, full int) int {
	if Full() {
		return full
	}
	return part
}

var build = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "posthouse-bin-")
	if err != nil {
		return "", err
	}
	return buildTo(dir, ownTags())
})

// ownTags are the build tags of this test binary: `go test -tags mutant_x`
// proves the program with that mutant in it.
func ownTags() string {
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, s := range info.Settings {
			if s.Key == "-tags" {
				return s.Value
			}
		}
	}
	return ""
}

func buildTo(dir, tags string) (string, error) {
	bin := filepath.Join(dir, "posthouse")
	out, err := exec.Command("go", "build", "-tags", tags, "-o", bin, "posthouse/cmd/posthouse").CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("build: %w\n%s", err, out)
	}
	return bin, nil
}

// Mutant builds the program with a mutant in it, to show that a test can fail.
func Mutant(tb testing.TB, tag string) string {
	tb.Helper()
	bin, err := buildTo(tb.TempDir(), tag)
	if err != nil {
		tb.Fatal(err)
	}
	return bin
}

// Binary builds the program once and returns its path. Clean removes it.
func Binary(tb testing.TB) string {
	tb.Helper()
	bin, err := build()
	if err != nil {
		tb.Fatal(err)
	}
	return bin
}

// Clean removes what Binary made; TestMain calls it at the end.
func Clean() {
	if bin, err := build(); err == nil {
		os.RemoveAll(filepath.Dir(bin))
	}
}

// Mesh is a running demo.
type Mesh struct {
	tb  testing.TB
	Dir string
	bin string
	// Nodes beside the demo's, by name.
	spares map[string]demo.Node
}

var networks atomic.Uint32

// network returns a loopback network that no other mesh of this process has:
// several may start at once, when none of them has a port open yet.
func network(tb testing.TB) string {
	tb.Helper()
	for range 200 {
		k := 20 + (uint32(os.Getpid())*7+networks.Add(1))%230
		l, err := net.Listen("tcp", fmt.Sprintf("127.0.%d.11:2525", k))
		if err != nil {
			continue
		}
		l.Close()
		return fmt.Sprintf("127.0.%d.0/24", k)
	}
	tb.Fatal("no loopback network is free")
	return ""
}

// Up starts a demo of these offices and ends it with the test. What its nodes
// logged is printed when the test has failed.
func Up(tb testing.TB, offices ...string) *Mesh {
	tb.Helper()
	return UpOf(tb, Binary(tb), offices...)
}

// UpOf is Up with another build of the program.
func UpOf(tb testing.TB, bin string, offices ...string) *Mesh {
	tb.Helper()
	dir, err := os.MkdirTemp("", "posthouse-mesh-")
	if err != nil {
		tb.Fatal(err)
	}
	m := &Mesh{tb: tb, Dir: dir, bin: bin}
	tb.Cleanup(func() {
		m.Command("demo", "down", "--dir", dir)
		if tb.Failed() {
			m.printLogs()
			if os.Getenv("PROVE_KEEP") != "" {
				tb.Logf("kept in %s", dir)
				return
			}
		}
		os.RemoveAll(dir)
	})
	if out, err := m.Command("demo", "up", "--detach", "--dir", dir, "--offices", strings.Join(offices, ","), "--net", network(tb)); err != nil {
		tb.Fatalf("demo up: %v\n%s", err, out)
	}
	return m
}

func (m *Mesh) printLogs() {
	logs, _ := filepath.Glob(filepath.Join(m.Dir, "*.log"))
	for _, name := range logs {
		text, _ := os.ReadFile(name)
		var lines [][]byte
		for _, l := range bytes.Split(text, []byte("\n")) {
			if bytes.Contains(l, []byte(`"WARN"`)) || bytes.Contains(l, []byte(`"ERROR"`)) || bytes.Contains(l, []byte("panic")) || bytes.Contains(l, []byte("goroutine")) {
				lines = append(lines, l)
			}
		}
		m.tb.Logf("%s: %d lines, the last that matter:\n%s", filepath.Base(name), bytes.Count(text, []byte("\n")), bytes.Join(lines[max(0, len(lines)-20):], []byte("\n")))
	}
}

// Command runs the program and returns what it printed.
func (m *Mesh) Command(args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	out, err := exec.CommandContext(ctx, m.bin, args...).CombinedOutput()
	return string(out), err
}

// State reads demo.json.
func (m *Mesh) State() *demo.State {
	m.tb.Helper()
	s, err := demo.Load(m.Dir)
	if err != nil {
		m.tb.Fatal(err)
	}
	return s
}

// Node returns an office's entry in demo.json.
func (m *Mesh) Node(office string) demo.Node {
	m.tb.Helper()
	for _, n := range m.State().Nodes {
		if n.Name == office {
			return n
		}
	}
	if n, ok := m.spares[office]; ok {
		return n
	}
	m.tb.Fatalf("no office %s", office)
	return demo.Node{}
}

// API returns the operations of an office's node.
func (m *Mesh) API(office string) *api.Client { return api.Local(m.Node(office).Socket) }

// Kill ends an office by SIGKILL.
func (m *Mesh) Kill(office string) {
	m.tb.Helper()
	if out, err := m.Command("demo", "kill", "--dir", m.Dir, office); err != nil {
		m.tb.Fatalf("kill %s: %v\n%s", office, err, out)
	}
}

// Start starts an office and returns how long that took.
func (m *Mesh) Start(office string) time.Duration {
	m.tb.Helper()
	began := time.Now()
	if out, err := m.Command("demo", "start", "--dir", m.Dir, office); err != nil {
		m.tb.Fatalf("start %s: %v\n%s", office, err, out)
	}
	return time.Since(began)
}

// Status asks an office's node.
func (m *Mesh) Status(office string) (admin.Status, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	return m.API(office).Status(ctx)
}

// WaitFor polls until f is true, and fails the test after limit. It returns how
// long it took.
func (m *Mesh) WaitFor(what string, limit time.Duration, f func() bool) time.Duration {
	m.tb.Helper()
	began := time.Now()
	for !f() {
		if time.Since(began) > limit {
			m.explain()
			m.tb.Fatalf("%s: not within %v", what, limit)
		}
		<-time.After(20 * time.Millisecond)
	}
	return time.Since(began)
}

// explain logs how each office sees itself.
func (m *Mesh) explain() {
	m.tb.Helper()
	for _, n := range m.State().Nodes {
		st, err := m.Status(n.Name)
		m.tb.Logf("%s: master %q, term %d, %+v %+v %v", n.Name, st.Master, st.Term, st.Health, st.Conditions, err)
	}
}

// User returns the k-th person of an office.
func (m *Mesh) User(office string, k int) demo.User {
	m.tb.Helper()
	for _, u := range m.State().Users {
		if u.Home == office {
			if k == 0 {
				return u
			}
			k--
		}
	}
	m.tb.Fatalf("no such user at %s", office)
	return demo.User{}
}

// TLS trusts the mesh's authority.
func (m *Mesh) TLS(address string) *tls.Config {
	m.tb.Helper()
	pem, err := os.ReadFile(m.State().CAFile)
	if err != nil {
		m.tb.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(pem)
	return &tls.Config{RootCAs: pool, ServerName: address}
}

// Sender is one SMTP session that sends many messages.
type Sender struct {
	c    *smtp.Client
	conn net.Conn
	from string
}

// Submit opens a session of a person at an office, over TLS.
func (m *Mesh) Submit(u demo.User, office string) (*Sender, error) {
	n := m.Node(office)
	conn, err := net.DialTimeout("tcp", net.JoinHostPort(n.Address, strconv.Itoa(n.Ports.Submissions)), 5*time.Second)
	if err != nil {
		return nil, err
	}
	conn.SetDeadline(time.Now().Add(time.Minute))
	c, err := smtp.NewClient(tls.Client(conn, m.TLS(n.Address)), n.Address)
	if err == nil {
		err = c.Auth(smtp.PlainAuth("", u.Address, u.Password, n.Address))
	}
	if err != nil {
		conn.Close()
		return nil, err
	}
	return &Sender{c, conn, u.Address}, nil
}

// FromOutside opens a session on an office's port 25.
func (m *Mesh) FromOutside(from, office string) (*Sender, error) {
	n := m.Node(office)
	conn, err := net.DialTimeout("tcp", net.JoinHostPort(n.Address, strconv.Itoa(n.Ports.SMTP)), 5*time.Second)
	if err != nil {
		return nil, err
	}
	conn.SetDeadline(time.Now().Add(time.Minute))
	c, err := smtp.NewClient(conn, n.Address)
	if err != nil {
		conn.Close()
		return nil, err
	}
	return &Sender{c, conn, from}, nil
}

// Close ends the session.
func (s *Sender) Close() { s.conn.Close() }

// Send sends one message with that id; nil means that its 250 was read.
// ErrUnsure wraps the error when the answer to the text was not read.
func (s *Sender) Send(id string, to ...string) error {
	return s.SendText(id, Text(id, s.from, to[0]), to...)
}

// SendText is Send of a message of the caller's own, whose subject is id.
func (s *Sender) SendText(_, text string, to ...string) error {
	s.conn.SetDeadline(time.Now().Add(time.Minute))
	if err := s.c.Mail(s.from); err != nil {
		return err
	}
	for _, r := range to {
		if err := s.c.Rcpt(r); err != nil {
			return err
		}
	}
	w, err := s.c.Data()
	if err != nil {
		return err
	}
	if _, err := io.WriteString(w, text); err != nil {
		return errors.Join(ErrUnsure, err)
	}
	if err := w.Close(); err != nil {
		if strings.HasPrefix(err.Error(), "4") || strings.HasPrefix(err.Error(), "5") {
			return err
		}
		return errors.Join(ErrUnsure, err)
	}
	return nil
}

// ErrUnsure says that nobody knows whether the message was taken.
var ErrUnsure = errors.New("the answer was not read")

// Text is a message whose subject is its id.
func Text(id, from, to string) string {
	return fmt.Sprintf("From: <%s>\r\nTo: <%s>\r\nSubject: %s\r\nDate: %s\r\nMessage-ID: <%s@test.invalid>\r\n\r\nThe body of %s.\r\n", from, to, id, time.Now().Format(time.RFC1123Z), id, id)
}

// NewID returns a fresh message id.
func NewID() string { return strings.ToLower(rand.Text()[:idLength]) }

const idLength = 16

// isID reports whether a subject is of NewID's making: base32 in lower case.
func isID(s string) bool {
	return len(s) == idLength && strings.Trim(s, "abcdefghijklmnopqrstuvwxyz234567") == ""
}

// Inbox logs in at the home node and returns the subjects in INBOX, in order of
// their UIDs.
func (m *Mesh) Inbox(u demo.User) ([]string, error) {
	n := m.Node(u.Home)
	c, err := imapclient.DialTLS(net.JoinHostPort(n.Address, strconv.Itoa(n.Ports.IMAPS)), &imapclient.Options{TLSConfig: m.TLS(n.Address)})
	if err != nil {
		return nil, err
	}
	defer c.Close()
	if err := c.Login(u.Address, u.Password).Wait(); err != nil {
		return nil, err
	}
	box, err := c.Select("INBOX", &imap.SelectOptions{ReadOnly: true}).Wait()
	if err != nil || box.NumMessages == 0 {
		return nil, err
	}
	var all imap.SeqSet
	all.AddRange(1, 0)
	msgs, err := c.Fetch(all, &imap.FetchOptions{UID: true, Envelope: true}).Collect()
	if err != nil {
		return nil, err
	}
	slices.SortFunc(msgs, func(a, b *imapclient.FetchMessageBuffer) int { return int(a.UID) - int(b.UID) })
	out := make([]string, len(msgs))
	for i, x := range msgs {
		out[i] = x.Envelope.Subject
	}
	return out, nil
}

// OutsideMail returns the subjects that the outside world has received.
func (m *Mesh) OutsideMail() []string {
	m.tb.Helper()
	names, err := filepath.Glob(filepath.Join(m.State().Outside.Folder, "*.eml"))
	if err != nil {
		m.tb.Fatal(err)
	}
	var out []string
	for _, name := range names {
		text, err := os.ReadFile(name)
		if err != nil {
			m.tb.Fatal(err)
		}
		for line := range strings.Lines(string(text)) {
			if s, ok := strings.CutPrefix(line, "Subject: "); ok {
				out = append(out, strings.TrimSpace(s))
				break
			}
		}
	}
	return out
}

// Ledger counts what was sent to whom and compares it with what is there.
type Ledger struct {
	mu     sync.Mutex
	sent   map[string][]string // by recipient: ids answered with 250, in order of the answers
	unsure map[string]bool     // ids whose answer was not read
}

// NewLedger returns an empty ledger.
func NewLedger() *Ledger { return &Ledger{sent: map[string][]string{}, unsure: map[string]bool{}} }

// Sent notes the outcome of a Send.
func (l *Ledger) Sent(id, to string, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case err == nil:
		l.sent[to] = append(l.sent[to], id)
	case errors.Is(err, ErrUnsure):
		l.unsure[id] = true
	}
}

// Send sends one small message with a fresh id in a session, and notes what came
// of it.
func (l *Ledger) Send(s *Sender, to string) error {
	id := NewID()
	err := s.Send(id, to)
	l.Sent(id, to, err)
	return err
}

// Total returns how many messages were answered with 250.
func (l *Ledger) Total() (n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, ids := range l.sent {
		n += len(ids)
	}
	return n
}

// Missing compares one recipient's mail with the ledger: what is not there yet,
// and what of NewID's is there more than once.
func (l *Ledger) Missing(to string, there []string) (missing, doubled []string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	count := map[string]int{}
	for _, id := range there {
		count[id]++
	}
	for _, id := range l.sent[to] {
		if count[id] == 0 {
			missing = append(missing, id)
		}
	}
	for id, n := range count {
		if n > 1 && isID(id) {
			doubled = append(doubled, id)
		}
	}
	return missing, doubled
}

// JSON decodes what a command printed.
func JSON[T any](tb testing.TB, text string) (v T) {
	tb.Helper()
	if err := json.Unmarshal([]byte(text), &v); err != nil {
		tb.Fatalf("%v in %q", err, text)
	}
	return v
}
