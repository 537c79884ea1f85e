// Package bench measures the program that ships: real nodes started by its own
// demo, real sockets, real disks, on whatever machine it runs. `make bench`
// prints its table; the engines' own benchmarks stand beside their code.
//
// It only loads and reads clocks: what is right is proven in simtest/processes.
// The load generator shares the machine with the nodes, so rates are those of
// both together; the processor time a message costs the nodes stands beside
// them and hardly moves with other load. mailbench-up.sh prepares a comparison
// with other servers.
package bench

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// load is mail to be sent.
type load struct {
	address  string // of the SMTP port
	sessions int
	messages int
	size     int // bytes of each
	to       []string
}

// outcome is what became of a load.
type outcome struct {
	messages int
	took     time.Duration
	waits    []time.Duration // of each message, from its first command to its 250
}

func (o *outcome) rate() float64 { return float64(o.messages) / o.took.Seconds() }

// quantile returns the q-th part of the waits.
func quantile(waits []time.Duration, q float64) time.Duration {
	if len(waits) == 0 {
		return 0
	}
	s := slices.Clone(waits)
	slices.Sort(s)
	return s[min(int(q*float64(len(s))), len(s)-1)]
}

// ioLimit bounds each step of a session: a node that hangs is an error, not a
// benchmark without end.
const ioLimit = time.Minute

// run sends the load: each session sends its next message when the last was
// answered, recipients in turn.
func (l *load) run(ctx context.Context) (*outcome, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	conns := make([]*client, l.sessions)
	for i := range conns {
		c, err := dialSMTP(l.address)
		if err != nil {
			return nil, err
		}
		defer c.Close()
		conns[i] = c
	}
	var next atomic.Int64
	waits := make([][]time.Duration, l.sessions)
	var wg sync.WaitGroup
	began := time.Now()
	for i, c := range conns {
		wg.Go(func() {
			text := newText(l.size)
			for ctx.Err() == nil {
				n := int(next.Add(1)) - 1
				if n >= l.messages {
					return
				}
				start := time.Now()
				if err := c.mail(l.to[n%len(l.to)], text.next()); err != nil {
					cancel(err)
					return
				}
				waits[i] = append(waits[i], time.Since(start))
			}
		})
	}
	wg.Wait()
	o := &outcome{messages: l.messages, took: time.Since(began), waits: slices.Concat(waits...)}
	return o, context.Cause(ctx)
}

// text is a message of which each copy differs in its id.
type text struct {
	b  []byte
	at int // of the number
}

var texts atomic.Uint64

func newText(size int) *text {
	t := &text{}
	t.b = append(t.b, "From: Bench <bench@example.net>\r\nTo: Somebody <somebody@company.test>\r\nSubject: measured number "...)
	t.at = len(t.b)
	t.b = fmt.Appendf(t.b, "%012d\r\nDate: Mon, 02 Nov 2026 10:00:00 +0100\r\nMessage-ID: <%012d.bench@example.net>\r\nMIME-Version: 1.0\r\nContent-Type: text/plain; charset=utf-8\r\n\r\n", 0, 0)
	const line = "the quick brown fox jumps over the lazy dog and reads its mail every day\r\n"
	for len(t.b)+len(line) < size {
		t.b = append(t.b, line...)
	}
	t.b = append(t.b, ".\r\n"...)
	return t
}

func (t *text) next() []byte {
	n := fmt.Appendf(nil, "%012d", texts.Add(1))
	copy(t.b[t.at:], n)
	copy(t.b[t.at+bytes.Index(t.b[t.at:], []byte("Message-ID: <"))+13:], n)
	return t.b
}

// client is a connection that speaks lines.
type client struct {
	net.Conn
	r   *bufio.Reader
	out []byte
	tag int
}

func newClient(c net.Conn) *client { return &client{Conn: c, r: bufio.NewReaderSize(c, 64<<10)} }

func dialSMTP(address string) (*client, error) {
	conn, err := net.DialTimeout("tcp", address, 5*time.Second)
	if err != nil {
		return nil, err
	}
	c := newClient(conn)
	c.SetDeadline(time.Now().Add(ioLimit))
	if err := c.expect("220"); err != nil {
		return nil, err
	}
	io.WriteString(c, "EHLO bench.example.net\r\n")
	return c, c.expect("250")
}

// expect reads one reply, of several lines perhaps.
func (c *client) expect(code string) error {
	for {
		line, err := c.r.ReadSlice('\n')
		if err != nil {
			return err
		}
		if len(line) < 4 || string(line[:3]) != code {
			return fmt.Errorf("wanted %s: %s", code, strings.TrimSpace(string(line)))
		}
		if line[3] == ' ' {
			return nil
		}
	}
}

// mail sends one message, its commands in one piece (RFC 2920).
func (c *client) mail(to string, text []byte) error {
	if err := c.envelope(to); err != nil {
		return err
	}
	if _, err := c.Write(text); err != nil {
		return err
	}
	return c.expect("250")
}

func (c *client) envelope(to string) error {
	c.SetDeadline(time.Now().Add(ioLimit))
	c.out = append(append(append(c.out[:0], "MAIL FROM:<bench@example.net>\r\nRCPT TO:<"...), to...), ">\r\nDATA\r\n"...)
	if _, err := c.Write(c.out); err != nil {
		return err
	}
	return errors.Join(c.expect("250"), c.expect("250"), c.expect("354"))
}

// large sends one message of size bytes without holding it.
func (c *client) large(to string, size int) error {
	if err := c.envelope(to); err != nil {
		return err
	}
	t := newText(512 << 10).next()
	t = t[:len(t)-3]
	for sent := 0; sent < size; sent += len(t) {
		c.SetDeadline(time.Now().Add(ioLimit))
		if _, err := c.Write(t); err != nil {
			return err
		}
	}
	c.SetDeadline(time.Now().Add(ioLimit))
	if _, err := io.WriteString(c, ".\r\n"); err != nil {
		return err
	}
	return c.expect("250")
}

// dialIMAP logs in, over TLS.
func dialIMAP(address string, trust *tls.Config, user, password string) (*client, error) {
	conn, err := net.DialTimeout("tcp", address, 5*time.Second)
	if err != nil {
		return nil, err
	}
	c := newClient(tls.Client(conn, trust))
	c.SetDeadline(time.Now().Add(ioLimit))
	if _, err := c.r.ReadString('\n'); err != nil {
		return nil, err
	}
	_, err = c.do("LOGIN " + user + " " + password)
	return c, err
}

// do sends a command and reads up to its OK; it returns the untagged text.
func (c *client) do(command string) (string, error) {
	var b strings.Builder
	err := c.each(command, func(line []byte) { b.Write(line) })
	return b.String(), err
}

// each is do for much: f sees each line and keeps nothing.
func (c *client) each(command string, f func(line []byte)) error {
	c.tag++
	tag := fmt.Sprintf("t%d ", c.tag)
	c.SetDeadline(time.Now().Add(ioLimit))
	if _, err := io.WriteString(c, tag+command+"\r\n"); err != nil {
		return err
	}
	for {
		line, err := c.r.ReadSlice('\n')
		if err != nil && !errors.Is(err, bufio.ErrBufferFull) {
			return err
		}
		if bytes.HasPrefix(line, []byte(tag)) {
			if !bytes.HasPrefix(line[len(tag):], []byte("OK")) {
				return fmt.Errorf("%s: %s", command, bytes.TrimSpace(line))
			}
			return nil
		}
		f(line)
	}
}

// messages asks how many messages a folder has.
func (c *client) messages(folder string) (int, error) {
	text, err := c.do("STATUS " + folder + " (MESSAGES)")
	if err != nil {
		return 0, err
	}
	_, n, _ := strings.Cut(text, "(MESSAGES ")
	n, _, _ = strings.Cut(n, ")")
	return strconv.Atoi(n)
}

// process is a node's process as the system sees it.
type process struct {
	pid    int
	socket string
}

// cpu is the processor time used so far, in the system's ticks of 10 ms.
func (p process) cpu() time.Duration {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.pid))
	if err != nil {
		return 0
	}
	f := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+2:]))
	user, _ := strconv.Atoi(f[11])
	system, _ := strconv.Atoi(f[12])
	return time.Duration(user+system) * 10 * time.Millisecond
}

// memory reads a line of the process's status, in bytes.
func (p process) memory(line string) int64 {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.pid))
	if err != nil {
		return 0
	}
	_, rest, _ := strings.Cut(string(b), line+":")
	kb, _ := strconv.ParseInt(strings.Fields(rest)[0], 10, 64)
	return kb << 10
}

// forgetPeak makes VmHWM begin anew.
func (p process) forgetPeak() error {
	return os.WriteFile(fmt.Sprintf("/proc/%d/clear_refs", p.pid), []byte("5"), 0)
}

// figures reads the node's metrics.
func (p process) figures() (map[string]float64, error) {
	client := &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", p.socket)
	}}}
	resp, err := client.Get("http://node/metrics")
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	m := map[string]float64{}
	s := bufio.NewScanner(resp.Body)
	for s.Scan() {
		if name, value, ok := strings.Cut(s.Text(), " "); ok && strings.HasPrefix(name, "posthouse_") {
			m[name], _ = strconv.ParseFloat(value, 64)
		}
	}
	return m, s.Err()
}
