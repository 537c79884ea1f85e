package smtpout

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"unicode"

	"posthouse/transport"
)

// Limits of what a host may say. RFC 5321 section 4.5.3.1.5 has 512 bytes a
// line; real hosts say more, and no host has a right to our memory.
const (
	maxReplyLine  = 4 << 10
	maxReplyLines = 128
	maxWords      = 512 // bytes of a host's own words that we keep
)

var (
	errReplySyntax  = errors.New("not an SMTP reply")
	errReplyTooLong = errors.New("reply too long")
)

// reply is what a host said.
type reply struct {
	code  int
	lines []string // without code and separator
}

// reader reads replies. Deadlines are the connection's.
type reader struct {
	conn net.Conn
	buf  [maxReplyLine]byte
	r, w int
}

func (rd *reader) buffered() int { return rd.w - rd.r }

// line returns the next line without its end. A bare LF ends a line, too: we
// only listen, and have nothing to lose by it.
func (rd *reader) line() (string, error) {
	for {
		if i := bytes.IndexByte(rd.buf[rd.r:rd.w], '\n'); i >= 0 {
			l := rd.buf[rd.r : rd.r+i]
			rd.r += i + 1
			return string(bytes.TrimSuffix(l, []byte{'\r'})), nil
		}
		if rd.r > 0 {
			copy(rd.buf[:], rd.buf[rd.r:rd.w])
			rd.w -= rd.r
			rd.r = 0
		}
		if rd.w == len(rd.buf) {
			return "", errReplyTooLong
		}
		n, err := rd.conn.Read(rd.buf[rd.w:])
		rd.w += n
		if n == 0 && err != nil {
			if err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			return "", err
		}
	}
}

// read reads one reply: RFC 5321 section 4.2.1, all its lines with one code.
func (rd *reader) read() (reply, error) {
	var rp reply
	for range maxReplyLines {
		l, err := rd.line()
		if err != nil {
			return rp, err
		}
		if len(l) < 3 || len(l) > 3 && l[3] != ' ' && l[3] != '-' {
			return rp, errReplySyntax
		}
		code := 0
		for i := range 3 {
			if l[i] < '0' || l[i] > '9' {
				return rp, errReplySyntax
			}
			code = code*10 + int(l[i]-'0')
		}
		if code < 200 || code > 599 || rp.code != 0 && code != rp.code {
			return rp, errReplySyntax
		}
		rp.code = code
		if len(l) > 3 {
			rp.lines = append(rp.lines, l[4:])
		} else {
			rp.lines = append(rp.lines, "")
		}
		if len(l) == 3 || l[3] == ' ' {
			return rp, nil
		}
	}
	return rp, errReplyTooLong
}

func (rp reply) ok() bool { return rp.code/100 == 2 }

// fault is a refusal as an error; err says what we had asked.
func (rp reply) fault(asked string) *transport.Fault {
	enhanced, text := rp.words()
	code := rp.code
	if code < 400 { // an answer that has no place here
		code, enhanced = 451, "4.5.0"
	}
	return &transport.Fault{Code: code, Enhanced: enhanced, Text: text, Cause: fmt.Errorf("answer to %s", asked)}
}

// words returns the enhanced code, if there is a fitting one, and the host's
// own words as one printable line.
func (rp reply) words() (enhanced, text string) {
	var b strings.Builder
	for i, l := range rp.lines {
		e, rest := cutEnhanced(l)
		if e != "" && int(e[0]-'0') == rp.code/100 {
			if i == 0 {
				enhanced = e
			}
			l = rest
		}
		if l = printable(l); l == "" || b.Len()+len(l)+1 > maxWords {
			continue
		}
		if b.Len() > 0 {
			b.WriteByte(' ')
		}
		b.WriteString(l)
	}
	return enhanced, b.String()
}

// cutEnhanced cuts an RFC 3463 code off a line.
func cutEnhanced(l string) (enhanced, rest string) {
	word, rest, _ := strings.Cut(l, " ")
	parts := strings.Split(word, ".")
	if len(parts) != 3 || len(parts[0]) != 1 || !strings.Contains("245", parts[0]) {
		return "", l
	}
	for _, p := range parts[1:] {
		if len(p) < 1 || len(p) > 3 || strings.Trim(p, "0123456789") != "" {
			return "", l
		}
	}
	return word, rest
}

// printable drops what could harm a terminal, a log or a report, and what is
// too long.
func printable(s string) string {
	s = strings.Map(func(r rune) rune {
		switch {
		case r == '\t':
			return ' '
		case r == unicode.ReplacementChar || !unicode.IsPrint(r):
			return -1
		}
		return r
	}, strings.ToValidUTF8(s, "?"))
	if len(s) > maxWords {
		s = strings.ToValidUTF8(s[:maxWords], "")
	}
	return strings.TrimSpace(s)
}
