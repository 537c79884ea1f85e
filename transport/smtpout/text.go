package smtpout

import (
	"bytes"
	"errors"
	"io"

	"posthouse/transport"
)

// content is what a scan of the text found.
type content struct {
	eightBit   bool // any byte above 127
	headerUTF8 bool // one of them in the header
}

// errBareCRLF: a stored text with a CR or LF that is no line end. Nothing of
// the kind is ever accepted; sending it would let a careless host see two
// messages in it (RFC 5321 section 2.3.8).
var errBareCRLF = errors.New("stored message has a bare CR or LF")

// scan reads a text once, to know what it needs and that it may leave.
func scan(b transport.Body) (c content, err error) {
	rd, err := b.Open()
	if err != nil {
		return c, err
	}
	defer rd.Close()
	buf := make([]byte, 64<<10)
	var last byte = '\n'
	inHeader, lineLen := true, 0
	for {
		n, err := rd.Read(buf)
		for p := buf[:n]; len(p) > 0; {
			i := bytes.IndexByte(p, '\n')
			seg := p
			if i >= 0 {
				seg = p[:i]
			}
			if last == '\r' && len(seg) > 0 { // a CR before something else
				return c, errBareCRLF
			}
			if j := bytes.IndexByte(seg, '\r'); j >= 0 && j != len(seg)-1 {
				return c, errBareCRLF
			}
			if !c.eightBit || inHeader && !c.headerUTF8 {
				for _, x := range seg {
					if x >= 0x80 {
						c.eightBit, c.headerUTF8 = true, c.headerUTF8 || inHeader
						break
					}
				}
			}
			if len(seg) > 0 {
				last = seg[len(seg)-1]
				lineLen += len(seg)
			}
			if i < 0 {
				break
			}
			if last != '\r' {
				return c, errBareCRLF
			}
			if lineLen == 1 { // an empty line: only its CR
				inHeader = false
			}
			last, lineLen = '\n', 0
			p = p[i+1:]
		}
		if err == io.EOF {
			if last == '\r' {
				return c, errBareCRLF
			}
			return c, nil
		}
		if err != nil {
			return c, err
		}
	}
}

// writeText sends a text and its end: RFC 5321 section 4.5.2. Nothing but the
// doubled dots differs from what is stored; a last line without its end gets
// one, since there is no other way to say the dot.
// It says lastWrite before it writes the end.
func writeText(write func([]byte) error, b transport.Body, lastWrite func()) error {
	rd, err := b.Open()
	if err != nil {
		return readError{err}
	}
	defer rd.Close()
	in := make([]byte, 32<<10)
	out := make([]byte, 0, len(in)+len(in)/2)
	last := [2]byte{'\r', '\n'} // the text begins at the beginning of a line
	put := func() error {
		err := write(out)
		out = out[:0]
		return err
	}
	for {
		n, err := rd.Read(in)
		for p := in[:n]; len(p) > 0; {
			if last == [2]byte{'\r', '\n'} && p[0] == '.' {
				out = append(out, '.')
			}
			i := bytes.IndexByte(p, '\n') + 1
			if i == 0 {
				i = len(p)
			}
			out = append(out, p[:i]...)
			if i >= 2 {
				last = [2]byte{p[i-2], p[i-1]}
			} else {
				last = [2]byte{last[1], p[0]}
			}
			p = p[i:]
			if len(out) > len(in) {
				if err := put(); err != nil {
					return err
				}
			}
		}
		if err == io.EOF {
			break
		}
		if err != nil {
			return readError{err}
		}
	}
	if last != [2]byte{'\r', '\n'} {
		out = append(out, '\r', '\n')
	}
	out = append(out, '.', '\r', '\n')
	lastWrite()
	return put()
}

// readError is a text of ours that cannot be read: not the host's fault.
type readError struct{ err error }

func (e readError) Error() string { return "read stored message: " + e.err.Error() }
func (e readError) Unwrap() error { return e.err }
