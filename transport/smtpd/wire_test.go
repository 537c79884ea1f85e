package smtpd

import (
	"io"
	"net"
	"strings"
	"testing"
	"time"
)

// scripted is a net.Conn that reads from a string in steps and forgets writes.
type scripted struct {
	net.Conn
	wire
	r    io.Reader
	step int
}

func (s *scripted) Read(p []byte) (int, error)         { return s.r.Read(p[:min(len(p), s.step)]) }
func (s *scripted) Write(p []byte) (int, error)        { return len(p), nil }
func (s *scripted) SetReadDeadline(t time.Time) error  { return nil }
func (s *scripted) SetWriteDeadline(t time.Time) error { return nil }

func wireOf(in string, step int) *scripted {
	s := &scripted{r: strings.NewReader(in), step: step}
	s.wire = wire{conn: s, pool: &buffers{}, deadline: func() time.Time { return time.Time{} }}
	s.buf = s.pool.getSmall()
	return s
}

func TestReadLine(t *testing.T) {
	long := strings.Repeat("x", maxCommandLine)
	for _, c := range []struct {
		name, in string
		want     []string
	}{
		{"lines", "a\r\n\r\nb c \r\n", []string{"a", "", "b c ", "EOF"}},
		{"bare LF ends it", "a\nb\r\n", []string{errLineEnd.Error()}},
		{"CR within is consumed whole", "a\rb\r\nc\r\n", []string{errLineBytes.Error(), "c", "EOF"}},
		{"NUL within is consumed whole", "a\x00b\r\nc\r\n", []string{errLineBytes.Error(), "c", "EOF"}},
		{"too long is consumed whole", long + "\r\nc\r\n", []string{errLineTooLong.Error(), "c", "EOF"}},
		{"as long as may be", long[2:] + "\r\nc\r\n", []string{long[2:], "c", "EOF"}},
		{"one too long", long[1:] + "\r\nc\r\n", []string{errLineTooLong.Error(), "c", "EOF"}},
		{"too long and bare LF", long + "\nc\r\n", []string{errLineEnd.Error()}},
		{"flood", strings.Repeat(long, 40), []string{errFlood.Error()}},
		{"cut", "a\r", []string{"EOF"}},
	} {
		for _, step := range []int{1, 7, 1 << 20} {
			w := wireOf(c.in, step)
			for i, want := range c.want {
				line, err := w.readLine(maxCommandLine)
				got := string(line)
				if err != nil {
					got = err.Error()
				}
				if got != want {
					t.Fatalf("%s by %d, line %d: %.60q, want %.60q", c.name, step, i, got, want)
				}
			}
		}
	}
}
