package smtpd

import (
	"bufio"
	"context"
	"io"
	"log/slog"
	"net"
	"runtime"
	"strings"
	"testing"
	"time"

	"posthouse/transport"
)

type discardIntake struct{ buf []byte }

func (d *discardIntake) Accept(_ context.Context, _ *transport.Envelope, _ []Rcpt, body io.Reader) (string, error) {
	for {
		if _, err := body.Read(d.buf); err == io.EOF {
			return "0123456789abcdef", nil
		} else if err != nil {
			return "", err
		}
	}
}

// memConn plays one client's bytes for ever and swallows the answers: what is
// measured is the session alone, without a network.
type memConn struct {
	net.Conn
	each string
	n    int
	pos  int
	cur  string
}

func (c *memConn) Read(p []byte) (int, error) {
	if c.pos == len(c.cur) {
		if c.n == 0 {
			return 0, io.EOF
		}
		c.n--
		c.cur, c.pos = c.each, 0
	}
	n := copy(p, c.cur[c.pos:])
	c.pos += n
	return n, nil
}

func benchmarkText(b *testing.B, size int) {
	text := strings.Repeat(strings.Repeat("x", 74)+"\r\n", size/76)
	each := "MAIL FROM:<ann@away.test> SIZE=4096\r\nRCPT TO:<joe@here.test>\r\nDATA\r\n" + text + ".\r\n"
	intake := &discardIntake{buf: make([]byte, 32<<10)}
	g := newRig(b, PortMX, func(g *rig, _ *Config, d *Deps) {
		d.Intake = intake
		d.Logger = slog.New(slog.DiscardHandler)
		g.maxSize = 1 << 30
	})
	defer g.close()
	b.SetBytes(int64(len(each)))
	b.ReportAllocs()
	ss := g.srv.newSession(context.Background(), &memConn{cur: "EHLO x\r\n", each: each, n: b.N}, PortMX)
	b.ResetTimer()
	ss.run()
	b.StopTimer()
	g.srv.forget(ss)
	if ss.accepted != b.N {
		b.Fatal(ss.accepted, b.N)
	}
}

func (c *memConn) Write(p []byte) (int, error)        { return len(p), nil }
func (c *memConn) Close() error                       { return nil }
func (c *memConn) RemoteAddr() net.Addr               { return addr("192.0.2.1:25") }
func (c *memConn) SetDeadline(t time.Time) error      { return nil }
func (c *memConn) SetReadDeadline(t time.Time) error  { return nil }
func (c *memConn) SetWriteDeadline(t time.Time) error { return nil }

// BenchmarkText4KiB is the session's own cost of a message: goal 0.05 ms.
func BenchmarkText4KiB(b *testing.B) { benchmarkText(b, 4<<10) }
func BenchmarkText5MiB(b *testing.B) { benchmarkText(b, 5<<20) }

// BenchmarkTCP4KiB is the same over a loopback socket with one client that
// pipelines as clients do; the client's cost is in it.
func BenchmarkTCP4KiB(b *testing.B) {
	text := strings.Repeat(strings.Repeat("x", 74)+"\r\n", 54) + ".\r\n"
	g := newRig(b, PortMX, func(g *rig, _ *Config, d *Deps) {
		d.Intake = &discardIntake{buf: make([]byte, 32<<10)}
		d.Logger = slog.New(slog.DiscardHandler)
	})
	defer g.close()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- g.srv.Serve(ctx, ln, PortMX) }()
	defer func() { stop(); <-done }()
	c, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		b.Fatal(err)
	}
	defer c.Close()
	r := bufio.NewReader(c)
	lines := func(n int) {
		for range n {
			if _, err := r.ReadSlice('\n'); err != nil {
				b.Fatal(err)
			}
		}
	}
	io.WriteString(c, "HELO x\r\n")
	lines(2)
	b.ReportAllocs()
	for b.Loop() {
		io.WriteString(c, "MAIL FROM:<ann@away.test>\r\nRCPT TO:<joe@here.test>\r\nDATA\r\n")
		lines(3)
		io.WriteString(c, text)
		lines(1)
	}
}

// TestIdleMemory: an idle plain connection costs at most 32 KiB, the test's own
// end of the pipe included.
func TestIdleMemory(t *testing.T) {
	const n = 500
	g := newRig(t, PortMX, func(_ *rig, c *Config, d *Deps) {
		c.ConnsPerAddr = n
		d.Logger = slog.New(slog.DiscardHandler)
	})
	inUse := func() uint64 {
		runtime.GC()
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapInuse + m.StackInuse
	}
	before := inUse()
	var open []net.Conn
	for range n {
		c := g.dial()
		c.want("220", "")
		c.do("HELO x", "250")
		open = append(open, c.raw)
	}
	per := (inUse() - before) / n
	t.Logf("%d bytes an idle connection", per)
	if per > 32<<10 {
		t.Errorf("%d bytes an idle connection", per)
	}
	for _, c := range open {
		c.Close()
	}
	g.close()
}
