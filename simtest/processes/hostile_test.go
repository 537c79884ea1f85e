package processes

import (
	"bufio"
	"context"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// wire is one raw connection: it says exactly the bytes that it is told to.
type wire struct {
	net.Conn
	r *bufio.Reader
}

func wireTLS(c net.Conn, cfg *tls.Config) *wire { return rawWire(tls.Client(c, cfg)) }

func rawWire(c net.Conn) *wire { return &wire{c, bufio.NewReader(c)} }

// dial opens a raw connection to a port of an office, by TLS when secure.
func (m *Mesh) dial(office string, port int, secure bool) (*wire, error) {
	n := m.Node(office)
	c, err := net.DialTimeout("tcp", net.JoinHostPort(n.Address, strconv.Itoa(port)), 5*time.Second)
	if err != nil {
		return nil, err
	}
	c.SetDeadline(time.Now().Add(45 * time.Second))
	if secure {
		return wireTLS(c, m.TLS(n.Address)), nil
	}
	return rawWire(c), nil
}

func (m *Mesh) mustDial(office string, port int, secure bool) *wire {
	m.tb.Helper()
	w, err := m.dial(office, port, secure)
	if err != nil {
		m.tb.Fatal(err)
	}
	return w
}

// say writes s; an error is no matter, for a refusal may have closed the line.
func (w *wire) say(s string) { io.WriteString(w, s) }

// line reads one line; "" when the other side has closed.
func (w *wire) line() string {
	s, _ := w.r.ReadString('\n')
	return strings.TrimRight(s, "\r\n")
}

// reply reads one SMTP answer to its last line; "" when the other side has
// closed or said nothing.
func (w *wire) reply() string {
	for {
		s := w.line()
		if len(s) < 4 || s[3] == ' ' {
			return s
		}
	}
}

// ask says one command and returns the answer.
func (w *wire) ask(format string, args ...any) string {
	w.say(fmt.Sprintf(format, args...) + "\r\n")
	return w.reply()
}

// untagged reads IMAP lines until the tagged one, which it returns; "" when the
// connection ended before. A continuation request counts as an answer.
func (w *wire) untagged(tag string) string {
	for {
		s := w.line()
		if s == "" || strings.HasPrefix(s, tag+" ") || strings.HasPrefix(s, "+ ") {
			return s
		}
	}
}

// ended reports whether the other side has closed; it reads what was on its way.
func (w *wire) ended() bool {
	w.SetDeadline(time.Now().Add(20 * time.Second))
	_, err := io.Copy(io.Discard, w.r)
	var n net.Error
	return !(errors.As(err, &n) && n.Timeout())
}

// figures are what a process holds. Of its files those are not counted that it
// keeps open to read mail from, at most 64: they grow with the mail.
type figures struct {
	pid                         int
	goroutines, files, resident float64
}

func (m *Mesh) figures(office string) figures {
	m.tb.Helper()
	n := m.Node(office)
	c := &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", n.Socket)
	}}}
	resp, err := c.Get("http://node/metrics")
	if err != nil {
		m.tb.Fatal(err)
	}
	defer resp.Body.Close()
	f := figures{pid: n.Pid}
	for s := bufio.NewScanner(resp.Body); s.Scan(); {
		name, value, _ := strings.Cut(s.Text(), " ")
		v, _ := strconv.ParseFloat(value, 64)
		switch name {
		case "go_goroutines":
			f.goroutines = v
		case "process_open_fds":
			f.files += v
		case "posthouse_log_open_files":
			f.files -= v
		case "process_resident_memory_bytes":
			f.resident = v / (1 << 20)
		}
	}
	return f
}

// bystander is a person who goes on working while others attack: a message
// from each office to the other, again and again, each timed.
type bystander struct {
	mu    sync.Mutex
	took  []time.Duration
	fails []error
	l     *Ledger
	stop  func()
}

func (m *Mesh) bystander(offices ...string) *bystander {
	b := &bystander{l: NewLedger()}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	for i, from := range offices {
		sender, to := m.User(from, 1), m.User(offices[(i+1)%len(offices)], 2).Address
		wg.Go(func() {
			for ctx.Err() == nil {
				began := time.Now()
				id := NewID()
				s, err := m.Submit(sender, from)
				if err == nil {
					err = s.Send(id, to)
					b.l.Sent(id, to, err)
					s.Close()
				}
				b.mu.Lock()
				if b.took = append(b.took, time.Since(began)); err != nil {
					b.fails = append(b.fails, err)
				}
				b.mu.Unlock()
				select {
				case <-ctx.Done():
				case <-time.After(100 * time.Millisecond):
				}
			}
		})
	}
	b.stop = func() { cancel(); wg.Wait() }
	return b
}

// p99 returns the time that all but one in a hundred took less than.
func p99(ds []time.Duration) time.Duration {
	if len(ds) == 0 {
		return 0
	}
	ds = slices.Sorted(slices.Values(ds))
	return ds[min(len(ds)-1, len(ds)*99/100)]
}

// TestBadInputIsRefusedAndDisturbsNobody attacks every port of a node while
// people go on sending through it, and compares what the process holds before
// and afterwards.
func TestBadInputIsRefusedAndDisturbsNobody(t *testing.T) {
	m := Up(t, "hq", "plzen")
	n := m.Node("hq")
	// One of everything first, so that the baseline has what is made once.
	warm := m.bystander("hq", "plzen")
	m.WaitFor("mail flows", 10*time.Second, func() bool { warm.mu.Lock(); defer warm.mu.Unlock(); return len(warm.took) > 20 })
	warm.stop()
	m.Inbox(m.User("hq", 0))
	before := m.figures("hq")
	names := m.tree()

	people := m.bystander("hq", "plzen")
	peak := before
	attacks := []struct {
		name string
		f    func(*testing.T, *Mesh)
	}{
		{"SMTP lines that never end", longSMTPLines},
		{"recipients by the ten thousand", manyRecipients},
		{"chunks that claim 4 GiB", hugeChunks},
		{"commands slipped in before TLS", earlyCommands},
		{"two messages in one", smuggling},
		{"MIME and headers out of all proportion", monsters},
		{"IMAP before login", imapBeforeLogin},
		{"IMAP after login", imapAfterLogin},
		{"mailbox names that look like paths", oddMailboxNames},
		{"garbage on the mesh port", meshGarbage},
		{"garbage on the pages and the control socket", webGarbage},
		{"five hundred who never finish a sentence", slowloris},
		{"handshakes left half open", halfOpenTLS},
	}
	for _, a := range slices.Repeat(attacks, Count(1, 10)) { // again and again, so that a small growth shows
		t.Run(a.name, func(t *testing.T) {
			began := time.Now()
			people.mu.Lock()
			from := len(people.took)
			people.mu.Unlock()
			a.f(t, m)
			now := m.figures("hq")
			peak.resident, peak.goroutines, peak.files = max(peak.resident, now.resident), max(peak.goroutines, now.goroutines), max(peak.files, now.files)
			people.mu.Lock()
			slow := p99(people.took[from:])
			people.mu.Unlock()
			t.Logf("%v; resident %.0f MiB, %.0f goroutines, %.0f files; others' p99 %v", time.Since(began).Round(time.Millisecond), now.resident, now.goroutines, now.files, slow.Round(time.Millisecond))
		})
	}
	people.stop()

	if state := m.State(); state.Nodes[0].Pid != n.Pid {
		t.Errorf("pid %d became %d", n.Pid, state.Nodes[0].Pid)
	}
	if err := errors.Join(people.fails...); err != nil {
		t.Errorf("others were not served: %v", err)
	}
	if slow := p99(people.took); slow > 2*time.Second {
		t.Errorf("p99 of the others' mail %v, want below 2 s", slow)
	}
	settle(t, m, people.l, 20*time.Second)
	var after figures
	m.WaitFor("goroutines and files are back", 20*time.Second, func() bool {
		after = m.figures("hq")
		return after.goroutines <= before.goroutines+8 && after.files <= before.files+6
	})
	if after.resident > before.resident+128 || peak.resident > before.resident+300 {
		t.Errorf("resident %.0f MiB before, %.0f at the most, %.0f after", before.resident, peak.resident, after.resident)
	}
	t.Logf("before %+v, peak %+v, after %+v; %d messages of others, p50 %v, p99 %v", before, peak, after, len(people.took),
		slices.Sorted(slices.Values(people.took))[len(people.took)/2].Round(time.Millisecond), p99(people.took).Round(time.Millisecond))
	for _, name := range m.tree() {
		if !slices.Contains(names, name) {
			t.Errorf("a name that clients chose is on the disk: %s", name)
		}
	}
	m.everyLogLineIsJSON()
}

// tree lists the folders of the demo and the files beside them: what grows
// within the store's own folders is not listed.
func (m *Mesh) tree() (names []string) {
	m.tb.Helper()
	err := filepath.WalkDir(m.Dir, func(path string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() || strings.Count(strings.TrimPrefix(path, m.Dir), "/") <= 2 {
			if d != nil && !strings.Contains(path, "/outside/") {
				names = append(names, path)
			}
			return nil
		}
		return nil
	})
	if err != nil {
		m.tb.Fatal(err)
	}
	return names
}

// everyLogLineIsJSON is A31: what strangers say never makes a line of its own.
func (m *Mesh) everyLogLineIsJSON() {
	m.tb.Helper()
	for _, n := range m.State().Nodes {
		text, err := os.ReadFile(n.Log)
		if err != nil {
			m.tb.Fatal(err)
		}
		for line := range strings.Lines(string(text)) {
			if len(line) > 16<<10 {
				m.tb.Errorf("%s: a line of %d bytes", n.Name, len(line))
			}
			if strings.ContainsFunc(strings.TrimSuffix(line, "\n"), func(r rune) bool { return r < 32 || r == 127 }) {
				m.tb.Errorf("%s: a control character in %q", n.Name, line)
			}
			JSON[map[string]any](m.tb, line)
		}
	}
}

// ---- not mail at all ----

// meshGarbage sends 100,000 packets of chance and cut-off QUIC Initials.
func meshGarbage(t *testing.T, m *Mesh) {
	n := m.Node("hq")
	c, err := net.Dial("udp", net.JoinHostPort(n.Address, strconv.Itoa(n.Ports.Mesh)))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	b := make([]byte, 1452)
	for i := range 100_000 {
		rand.Read(b[:64])
		size := 1 + int(b[1])<<8>>2 + int(b[2])
		if i%2 == 0 {
			// A long header, type Initial, version 1 (RFC 9000 section 17.2.2).
			b[0] = 0xC0 | b[0]&0x0F
			copy(b[1:], []byte{0, 0, 0, 1, 8})
			b[14], b[23] = 8, 0
			size = 1 + i%1300
		}
		if i%97 == 0 {
			copy(b[1:], []byte{0xFA, 0xCE, 0xB0, 0x0C, 255}) // an unknown version: asks for negotiation
			size = 1200
		}
		c.Write(b[:min(size, len(b))]) // a refused packet is none of our business
	}
	s, err := m.Status("hq")
	if err != nil || len(s.Members) != 2 || s.Master == "" {
		t.Errorf("after the garbage: %+v, %v", s, err)
	}
	for _, x := range s.Members {
		if x.State != "serving" {
			t.Errorf("%s is %s", x.Name, x.State)
		}
	}
}

func webGarbage(t *testing.T, m *Mesh) {
	n := m.Node("hq")
	b := make([]byte, 8<<10)
	rand.Read(b)
	for _, secure := range []bool{true, false} {
		for _, text := range []string{
			string(b), "GET / HTTP/9.9\r\n\r\n", "GET " + strings.Repeat("/a", 1<<20) + " HTTP/1.1\r\n\r\n",
			"GET / HTTP/1.1\r\nHost: x\r\nX: " + strings.Repeat("y", 4<<20) + "\r\n\r\n",
			"POST /api/v1/users/create HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n{",
			"POST /login HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\nFFFFFFFFFFFFFFFFF\r\n",
			"POST /login HTTP/1.1\r\nHost: x\r\nContent-Type: application/x-www-form-urlencoded\r\nContent-Length: 4194304\r\n\r\n" + strings.Repeat("a=b&", 1<<20),
			"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + string(b),
		} {
			w, err := m.dial("hq", n.Ports.HTTPS, secure)
			if err != nil {
				t.Fatal(err)
			}
			w.say(text)
			if c, ok := w.Conn.(interface{ CloseWrite() error }); ok {
				c.CloseWrite()
			}
			if answer := w.line(); strings.Contains(answer, " 200 ") {
				t.Errorf("%.40q got %q", text, answer)
			}
			w.Close()
		}
	}
	for _, text := range []string{string(b), "POST /api/v1/init HTTP/1.1\r\nHost: x\r\nContent-Length: 8192\r\n\r\n" + string(b),
		"POST /api/v1/groups/put HTTP/1.1\r\nHost: x\r\nContent-Length: 20000000\r\n\r\n" + strings.Repeat("[", 20_000_000),
		"POST /api/v1/users/create HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n" + strings.Repeat(`{"a":`, 200_000)} {
		c, err := net.Dial("unix", n.Socket)
		if err != nil {
			t.Fatal(err)
		}
		w := rawWire(c)
		w.SetDeadline(time.Now().Add(10 * time.Second))
		go w.say(text)
		if answer := w.line(); strings.Contains(answer, " 200 ") || strings.Contains(answer, " 500 ") {
			t.Errorf("control socket: %.40q got %q", text, answer)
		}
		w.Close()
	}
	if got := m.loginStatus("hq", "anna@company.test", "x", "cross-site"); got != http.StatusForbidden {
		t.Errorf("a foreign page could log somebody in: %d", got)
	}
}

// loginStatus posts the login form as a page of that site would.
func (m *Mesh) loginStatus(office, name, password, site string) int {
	m.tb.Helper()
	n := m.Node(office)
	c := &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{TLSClientConfig: m.TLS(n.Address), DisableKeepAlives: true},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	r, err := http.NewRequest("POST", fmt.Sprintf("https://%s:%d/login", n.Address, n.Ports.HTTPS), strings.NewReader("name="+name+"&password="+password))
	if err != nil {
		m.tb.Fatal(err)
	}
	r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	r.Header.Set("Sec-Fetch-Site", site)
	resp, err := c.Do(r)
	if err != nil {
		m.tb.Fatal(err)
	}
	resp.Body.Close()
	return resp.StatusCode
}

// slowloris holds connections on every port that never finish what they say.
func slowloris(t *testing.T, m *Mesh) {
	n := m.Node("hq")
	var held []*wire
	defer func() {
		for _, w := range held {
			w.Close()
		}
	}()
	ports := []int{n.Ports.SMTP, n.Ports.SMTP, n.Ports.Submission, n.Ports.IMAP, n.Ports.HTTPS}
	for i := range 500 {
		w, err := m.dial("hq", ports[i%len(ports)], false)
		if err != nil {
			t.Fatal(err)
		}
		held = append(held, w)
	}
	for _, b := range []string{"E", "H", "L", "O", " ", "x"} {
		for _, w := range held {
			w.say(b)
		}
		<-time.After(200 * time.Millisecond)
	}
	if there, err := m.Inbox(m.User("hq", 0)); err != nil {
		t.Errorf("nobody can read mail meanwhile: %v (%d)", err, len(there))
	}
	if got := m.figures("hq"); got.goroutines > 3000 {
		t.Errorf("%.0f goroutines for 500 connections", got.goroutines)
	}
}

// halfOpenTLS begins handshakes and stops in the middle of the ClientHello.
func halfOpenTLS(t *testing.T, m *Mesh) {
	n := m.Node("hq")
	hello := append([]byte{22, 3, 1, 2, 0, 1, 0, 1, 252, 3, 3}, make([]byte, 200)...) // RFC 8446 section 4.1.2, cut off
	var held []*wire
	for i := range 200 {
		w, err := m.dial("hq", []int{n.Ports.Submissions, n.Ports.IMAPS, n.Ports.HTTPS}[i%3], false)
		if err != nil {
			t.Fatal(err)
		}
		w.Write(hello[:1+i])
		held = append(held, w)
	}
	if _, err := m.Inbox(m.User("hq", 0)); err != nil {
		t.Errorf("nobody can read mail meanwhile: %v", err)
	}
	for _, w := range held {
		w.Close()
	}
}
