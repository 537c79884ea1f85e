package smtpd

import (
	"bytes"
	"errors"
	"io"
	"net"
	"strconv"
	"sync"
	"time"
)

// Buffers. An idle session holds a small one; a text is read through a large
// one that goes back to the pool at its end.
const (
	smallBuf = maxCommandLine
	largeBuf = 32 << 10
)

type buffers struct{ small, large sync.Pool }

func (p *buffers) getLarge() []byte {
	if b, ok := p.large.Get().(*[largeBuf]byte); ok {
		return b[:]
	}
	return make([]byte, largeBuf)
}

func (p *buffers) getSmall() []byte {
	if b, ok := p.small.Get().(*[smallBuf]byte); ok {
		return b[:]
	}
	return make([]byte, smallBuf)
}

func (p *buffers) put(b []byte) {
	switch cap(b) {
	case largeBuf:
		p.large.Put((*[largeBuf]byte)(b[:largeBuf]))
	case smallBuf:
		p.small.Put((*[smallBuf]byte)(b[:smallBuf]))
	}
}

// Errors of the reader.
var (
	errLineTooLong = errors.New("line too long")
	errLineEnd     = errors.New("bare LF ends a line")
	errLineBytes   = errors.New("CR or NUL within a line")
	errFlood       = errors.New("line without end")
)

// wire is the buffered two-way connection of a session. What the client sent
// before we asked lies in buf[r:w]; what we have to say waits in out and is
// written when we are about to wait for the client: a whole pipelined group
// gets one write (RFC 2920 section 3.2).
type wire struct {
	conn  net.Conn
	pool  *buffers
	buf   []byte
	r, w  int
	out   []byte
	wtime time.Duration
	werr  error // of a write: nothing more is said
	// waited is the time spent in reads; the owner resets it.
	waited time.Duration

	// deadline is when the read that comes next must end. before runs with the
	// deadline already set, and may refuse to wait at all.
	deadline func() time.Time
	before   func() error
}

func (w *wire) buffered() int { return w.w - w.r }

// fill reads more into buf. It never returns without a byte or an error.
func (w *wire) fill() error {
	if err := w.flush(); err != nil {
		return err
	}
	if w.r == w.w {
		w.r, w.w = 0, 0
	} else if w.w == len(w.buf) {
		copy(w.buf, w.buf[w.r:w.w])
		w.w -= w.r
		w.r = 0
	}
	if w.w == len(w.buf) {
		return io.ErrShortBuffer // callers leave room
	}
	if err := w.conn.SetReadDeadline(w.deadline()); err != nil {
		return err
	}
	if w.before != nil {
		if err := w.before(); err != nil {
			return err
		}
	}
	start := time.Now()
	defer func() { w.waited += time.Since(start) }()
	for range 100 {
		n, err := w.conn.Read(w.buf[w.w:])
		w.w += n
		if n > 0 {
			return nil
		}
		if err != nil {
			return err
		}
	}
	return io.ErrNoProgress
}

// flush writes what waits.
func (w *wire) flush() error {
	if w.werr != nil || len(w.out) == 0 {
		return w.werr
	}
	if err := w.conn.SetWriteDeadline(time.Now().Add(w.wtime)); err != nil {
		w.werr = err
		return err
	}
	_, w.werr = w.conn.Write(w.out)
	w.out = w.out[:0]
	if cap(w.out) > smallBuf {
		w.out = nil
	}
	return w.werr
}

// grow swaps buf for one of at least n bytes.
func (w *wire) grow(n int) {
	if len(w.buf) >= n {
		return
	}
	var b []byte
	if n <= largeBuf {
		b = w.pool.getLarge()
	} else {
		b = make([]byte, n)
	}
	m := copy(b, w.buf[w.r:w.w])
	w.pool.put(w.buf)
	w.buf, w.r, w.w = b, 0, m
}

// shrink goes back to the small buffer if what is in buf fits.
func (w *wire) shrink() {
	if len(w.buf) == smallBuf || w.buffered() > smallBuf {
		return
	}
	b := w.pool.getSmall()
	m := copy(b, w.buf[w.r:w.w])
	w.pool.put(w.buf)
	w.buf, w.r, w.w = b, 0, m
}

// readLine returns the next line without its CRLF; it is valid until the next
// read. limit counts the CRLF.
//
// RFC 5321 section 2.3.8: only CRLF ends a line. A bare LF is errLineEnd, after
// which nobody can know where the client believes its commands to begin: the
// session must end. A CR or NUL inside a line, and a line longer than limit,
// are consumed whole, so that what follows is in step.
func (w *wire) readLine(limit int) ([]byte, error) {
	seen := 0
	for {
		if i := bytes.IndexByte(w.buf[w.r+seen:w.w], '\n'); i >= 0 {
			end := w.r + seen + i
			line := w.buf[w.r:end]
			w.r = end + 1
			switch {
			case len(line) == 0 || line[len(line)-1] != '\r':
				return nil, errLineEnd
			case len(line)+1 > limit:
				return nil, errLineTooLong
			}
			line = line[:len(line)-1]
			if bytes.IndexByte(line, '\r') >= 0 || bytes.IndexByte(line, 0) >= 0 {
				return nil, errLineBytes
			}
			return line, nil
		}
		seen = w.buffered()
		if seen >= limit {
			return nil, w.discardLine()
		}
		if seen == len(w.buf) {
			w.grow(limit)
		}
		if err := w.fill(); err != nil {
			return nil, err
		}
	}
}

// discardLine throws an over-long line away, up to its end.
func (w *wire) discardLine() error {
	var last byte
	for total := 0; ; {
		b := w.buf[w.r:w.w]
		if i := bytes.IndexByte(b, '\n'); i >= 0 {
			if i > 0 {
				last = b[i-1]
			}
			w.r += i + 1
			if last != '\r' {
				return errLineEnd
			}
			return errLineTooLong
		}
		if len(b) > 0 {
			last = b[len(b)-1]
		}
		total += len(b)
		w.r = w.w
		if total > maxDiscard {
			return errFlood
		}
		if err := w.fill(); err != nil {
			return err
		}
	}
}

// reply queues "code enhanced text". enhanced may be "" (greeting, EHLO, 354).
func (w *wire) reply(code int, enhanced, text string) {
	w.out = strconv.AppendInt(w.out, int64(code), 10)
	w.out = append(w.out, ' ')
	if enhanced != "" {
		w.out = append(w.out, enhanced...)
		w.out = append(w.out, ' ')
	}
	w.out = append(w.out, text...)
	w.out = append(w.out, '\r', '\n')
	if len(w.out) > smallBuf { // a client that pipelines and does not read
		w.flush()
	}
}

// replyPart queues a line that more lines follow.
func (w *wire) replyPart(code int, text string) {
	w.out = strconv.AppendInt(w.out, int64(code), 10)
	w.out = append(w.out, '-')
	w.out = append(w.out, text...)
	w.out = append(w.out, '\r', '\n')
}
