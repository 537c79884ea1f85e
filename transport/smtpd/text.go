package smtpd

import (
	"bytes"
	"errors"
	"fmt"
	"io"

	"posthouse/transport"
)

// Faults of a text.
var (
	faultBareCRLF = &transport.Fault{Code: 550, Enhanced: "5.6.11", Text: "Message has a CR or LF that is not part of a CRLF line end; send it through a client that ends lines properly"}
	faultNUL      = &transport.Fault{Code: 550, Enhanced: "5.6.0", Text: "Message has a NUL byte; encode binary content"}
	faultTooLarge = &transport.Fault{Code: 552, Enhanced: "5.3.4", Text: "Message is larger than the limit that EHLO named"}
)

// errAborted ends a text that the client gave up by RSET, QUIT and the like.
var errAborted = errors.New("message abandoned by the client")

// errTail is a text whose refused rest is too long to be read to its end.
var errTail = errors.New("refused text goes on for too long")

// cutError wraps what cut a text, so that io.EOF of the connection can never
// be taken for the end of the message.
type cutError struct{ err error }

func cut(err error) error {
	if !wholeTextsOnly {
		return io.EOF
	}
	return cutError{err}
}

func (e cutError) Error() string { return "message cut: " + e.err.Error() }

func (e cutError) Unwrap() error {
	if e.err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return e.err
}

// text checks the bytes of one message as they come, by DATA or BDAT.
type text struct {
	w     *wire
	limit int64
	onEnd func() // called once, when the last byte has been read

	size  int64 // content bytes so far
	fault *transport.Fault
	err   error // what ended it: io.EOF is the clean end, else a cutError
}

// refuse keeps the first fault.
func (t *text) refuse(f *transport.Fault) {
	if t.fault == nil {
		t.fault = f
	}
}

func (t *text) count(p []byte) {
	t.size += int64(len(p))
	if t.size > t.limit {
		t.refuse(faultTooLarge)
	}
	if bytes.IndexByte(p, 0) >= 0 {
		// RFC 2045 sections 2.7 and 2.8: neither 7bit nor 8bit data has NULs, and
		// no IMAP client could be given them (RFC 9051 section 4.3).
		t.refuse(faultNUL)
	}
}

// dotText reads the text after DATA: RFC 5321 section 4.5.2, where only
// CRLF "." CRLF ends it and only CRLF ends a line. A bare CR or LF refuses the
// message (the smuggling of CVE-2023-51764 and its kin) and reading goes on to
// the true end.
type dotText struct {
	text
	inLine    bool  // not at the first byte of a line
	emittedCR bool  // the last byte given out is the CR of a CRLF
	read      int64 // wire bytes consumed
	lastBad   int64 // where the last bare CR or LF, or NUL, was
}

// Read gives content out, unstuffed. It returns io.EOF after the true end of a
// text that is in order, the fault of one that is not, or a cutError.
func (d *dotText) Read(p []byte) (int, error) {
	if d.fault != nil {
		return 0, d.fault
	}
	n, err := d.next(p)
	if d.fault != nil {
		return 0, d.fault
	}
	return n, err
}

// next is Read without regard to faults.
func (d *dotText) next(p []byte) (n int, err error) {
	if d.err != nil || len(p) == 0 {
		return 0, d.err
	}
	for n < len(p) {
		b := d.w.buf[d.w.r:d.w.w]
		if !d.inLine && d.isEnd(b) {
			d.w.r += 3
			d.read += 3
			d.err = io.EOF
			if d.onEnd != nil {
				d.onEnd()
			}
			break
		}
		if len(b) == 0 || !d.inLine && d.maybeEnd(b) || len(b) == 1 && b[0] == '\r' {
			if n > 0 {
				break // give out what there is before waiting
			}
			if err := d.w.fill(); err != nil {
				d.err = cut(err)
				break
			}
			continue
		}
		if !d.inLine {
			d.inLine = true
			if b[0] == '.' {
				d.w.r++
				d.read++
				continue
			}
		}
		n += d.copyLine(p[n:], b)
	}
	d.count(p[:n])
	if d.fault == faultNUL {
		if i := bytes.LastIndexByte(p[:n], 0); i >= 0 {
			d.lastBad = max(d.lastBad, d.read-int64(n-i))
		}
	}
	if n > 0 {
		return n, nil
	}
	return 0, d.err
}

func (d *dotText) isEnd(b []byte) bool {
	return len(b) >= 3 && b[0] == '.' && b[1] == '\r' && b[2] == '\n'
}

func (d *dotText) maybeEnd(b []byte) bool {
	return len(b) == 1 && b[0] == '.' || len(b) == 2 && b[0] == '.' && b[1] == '\r'
}

// copyLine copies from b, which is within a line and more than a lone CR, to
// the line's end at most.
func (d *dotText) copyLine(p, b []byte) int {
	i := bytes.IndexByte(b, '\n')
	seg := b
	ends := false
	switch {
	case i == 0:
		seg = b[:1]
		if ends = d.emittedCR; !ends {
			d.bare(0)
		}
	case i > 0 && b[i-1] == '\r':
		seg, ends = b[:i+1], true
		if j := bytes.LastIndexByte(b[:i-1], '\r'); j >= 0 {
			d.bare(j)
		}
	case i > 0:
		seg = b[:i+1]
		d.bare(i)
	default:
		if b[len(b)-1] == '\r' {
			seg = b[:len(b)-1] // its LF may follow
		}
		if j := bytes.LastIndexByte(seg, '\r'); j >= 0 {
			d.bare(j)
		}
	}
	n := copy(p, seg)
	d.emittedCR = ends && n == len(seg)-1 && len(seg) >= 2
	if n == len(seg) && ends {
		d.inLine = false
	}
	d.w.r += n
	d.read += int64(n)
	return n
}

func (d *dotText) bare(at int) {
	if guardLineEnds {
		d.lastBad = max(d.lastBad, d.read+int64(at))
		d.refuse(faultBareCRLF)
	}
}

// finish reads a text that nobody wants to its end, so that the next command is
// the next command. It gives up after most more bytes.
func (d *dotText) finish(most int64) error {
	scratch := d.w.pool.getLarge()
	defer d.w.pool.put(scratch)
	for d.err == nil {
		n, _ := d.next(scratch)
		if most -= int64(n); most < 0 {
			return errTail
		}
	}
	if d.err == io.EOF {
		return nil
	}
	return d.err
}

// doubtful reports whether sender and we may disagree about where the refused
// text ended: a bare CR or LF (or a NUL, which some drop) close to the end, or
// bytes that were sent right behind it. The session must not read on then.
func (d *dotText) doubtful() bool {
	return (d.fault == faultBareCRLF || d.fault == faultNUL) && (d.read-d.lastBad <= 16 || d.w.buffered() > 0)
}

// chunkText reads the text of a row of BDAT commands, RFC 3030. Between two
// chunks it answers and takes commands through the session.
type chunkText struct {
	text
	left  int64 // of the running chunk
	last  bool  // the running chunk is the last
	wasCR bool
	// more answers the chunk that ended and reads on to the next BDAT. An error
	// ends the text.
	more func() (size int64, last bool, err error)
}

// Read is like dotText.Read.
func (c *chunkText) Read(p []byte) (int, error) {
	switch {
	case c.fault != nil:
		return 0, c.fault
	case c.err != nil || len(p) == 0:
		return 0, c.err
	}
	for c.left == 0 {
		if c.last {
			if c.wasCR {
				c.refuse(faultBareCRLF)
				return 0, c.fault
			}
			c.err = io.EOF
			if c.onEnd != nil {
				c.onEnd()
			}
			return 0, io.EOF
		}
		size, last, err := c.more()
		if err != nil {
			c.err = cut(err)
			return 0, c.err
		}
		c.begin(size, last)
		if c.fault != nil {
			return 0, c.fault
		}
	}
	if c.w.buffered() == 0 {
		if err := c.w.fill(); err != nil {
			c.err = cut(err)
			return 0, c.err
		}
	}
	b := c.w.buf[c.w.r:c.w.w]
	if int64(len(b)) > c.left {
		b = b[:c.left]
	}
	n := copy(p, b)
	c.w.r += n
	c.left -= int64(n)
	c.check(p[:n])
	c.count(p[:n])
	if c.fault != nil {
		return 0, c.fault
	}
	return n, nil
}

// begin starts a chunk. A chunk that goes beyond the limit is refused before
// its first byte; size -1 is more than can be counted.
func (c *chunkText) begin(size int64, last bool) {
	c.left, c.last = size, last
	if size < 0 || size > c.limit-c.size {
		c.refuse(faultTooLarge)
	}
}

// check refuses a bare CR or LF. BINARYMIME is not offered, so that the
// content is text here too (RFC 3030 section 3).
func (c *chunkText) check(p []byte) {
	for len(p) > 0 {
		if c.wasCR {
			c.wasCR = false
			if p[0] != '\n' {
				c.refuse(faultBareCRLF)
				return
			}
			p = p[1:]
			continue
		}
		i := bytes.IndexByte(p, '\n')
		if i < 0 {
			j := bytes.IndexByte(p, '\r')
			if j >= 0 && j < len(p)-1 {
				c.refuse(faultBareCRLF)
			}
			c.wasCR = j == len(p)-1
			return
		}
		if j := bytes.IndexByte(p[:i], '\r'); i == 0 || j != i-1 {
			c.refuse(faultBareCRLF)
			return
		}
		p = p[i+1:]
	}
}

// skip throws n bytes of the wire away; -1 is more than can be counted.
func skip(w *wire, n int64) error {
	if n < 0 || n > maxRefused {
		return errTail
	}
	for n > 0 {
		if w.buffered() == 0 {
			if err := w.fill(); err != nil {
				return fmt.Errorf("skip refused chunk: %w", err)
			}
		}
		m := min(n, int64(w.buffered()))
		w.r += int(m)
		n -= m
	}
	return nil
}
