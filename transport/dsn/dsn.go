// Package dsn writes delivery reports: the multipart/report of RFC 6522 with
// the fields of RFC 3464, in the UTF-8 forms of RFC 6533 where they are needed,
// and above all a text that its reader understands.
//
// It is pure: a Report in, bytes out. When a report is due, to whom it goes and
// that it goes once is queue's business. Reports of others are never read.
package dsn

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"
	"unicode/utf8"

	"posthouse/transport"
)

// Kind is what is reported: the Action of RFC 3464 section 2.3.3.
type Kind string

// The kinds of reports.
const (
	Failed    Kind = "failed"
	Delayed   Kind = "delayed"
	Delivered Kind = "delivered"
	Relayed   Kind = "relayed"
	Expanded  Kind = "expanded"
)

// Bounds of what is returned of the message, in bytes.
const (
	MaxFull    = 256 << 10 // a larger message comes back as its header alone
	MaxHeaders = 64 << 10
)

// Recipient is one recipient of which something is reported.
type Recipient struct {
	Address string           // final recipient, without brackets
	ORcpt   string           // "type;xtext" as given, or ""
	Result  transport.Result // the last one; foreign words are cleaned here
}

// Report is everything that a report says.
type Report struct {
	Kind       Kind
	To         string // who is told, without brackets
	From       string // our postmaster's address
	Reporter   string // this node's host name
	ID         string // of the report, for Message-ID and boundary: letters and digits, not to be guessed
	Date       time.Time
	Sender     string    // envelope sender of the message
	Arrived    time.Time // when the message was accepted; zero: unknown
	EnvID      string    // xtext as given, or ""
	Ret        string    // "FULL", "HDRS" or ""
	Until      time.Time // for Delayed: how long we go on
	Recipients []Recipient
	SMTPUTF8   bool           // the message was sent with it
	Original   transport.Body // nil: nothing is returned
}

// NeedsUTF8 reports whether the report can only travel by SMTPUTF8: one of its
// addresses is not ASCII (RFC 6533 section 3).
func (r *Report) NeedsUTF8() bool {
	if !ascii(r.To) || !ascii(r.From) {
		return true
	}
	for i := range r.Recipients {
		if !ascii(r.Recipients[i].Address) {
			return true
		}
	}
	return r.SMTPUTF8
}

// Write writes the report with CRLF line ends, every line of it at most 998
// bytes but for what is returned of the message. An error is w's or Original's.
func Write(w io.Writer, r *Report) error {
	p := &printer{w: bufio.NewWriter(w), global: r.NeedsUTF8()}
	part, body, eight, err := r.original(p.global)
	if err != nil {
		return fmt.Errorf("read reported message: %w", err)
	}
	boundary := "=_report_" + clean(r.ID, 70, false)
	for bytes.Contains(body, []byte("--"+boundary)) { // somebody computed the id
		boundary += "_"
	}
	p.line("From: Mail Delivery System <" + address(r.From) + ">")
	p.line("To: <" + address(r.To) + ">")
	p.line("Subject: " + subject(r.Kind))
	p.line("Date: " + r.Date.UTC().Format(dateFormat))
	p.line("Message-ID: <" + clean(r.ID, 70, false) + "@" + clean(r.Reporter, 255, p.global) + ">")
	p.line("Auto-Submitted: auto-replied") // RFC 3834 section 5
	p.line("MIME-Version: 1.0")
	p.line("Content-Type: multipart/report; report-type=delivery-status;")
	p.line("\tboundary=\"" + boundary + "\"")
	if eight || p.global {
		p.line("Content-Transfer-Encoding: 8bit")
	}
	p.line("")

	p.line("--" + boundary)
	if p.global {
		p.line("Content-Type: text/plain; charset=utf-8")
		p.line("Content-Transfer-Encoding: 8bit")
	} else {
		p.line("Content-Type: text/plain; charset=us-ascii")
	}
	p.line("")
	r.text(p)
	p.line("")

	p.line("--" + boundary)
	if p.global {
		p.line("Content-Type: message/global-delivery-status")
		p.line("Content-Transfer-Encoding: 8bit")
	} else {
		p.line("Content-Type: message/delivery-status")
	}
	p.line("")
	r.status(p)

	if part != "" {
		p.line("--" + boundary)
		p.line("Content-Type: " + part)
		if eight {
			p.line("Content-Transfer-Encoding: 8bit")
		}
		p.line("")
		p.raw(body)
		p.line("")
	}
	p.line("--" + boundary + "--")
	if p.err != nil {
		return p.err
	}
	return p.w.Flush()
}

const dateFormat = "Mon, 02 Jan 2006 15:04:05 -0700"

// original reads what is returned of the message. RFC 3461 section 4.3: RET
// concerns failures only; other reports return the header.
func (r *Report) original(global bool) (contentType string, b []byte, eight bool, err error) {
	if r.Original == nil {
		return "", nil, false, nil
	}
	br, err := r.Original.Open()
	if err != nil {
		return "", nil, false, err
	}
	defer br.Close()
	if full := r.Kind == Failed && r.Ret == "FULL" && r.Original.Size() <= MaxFull; full {
		if b, err = io.ReadAll(io.LimitReader(br, MaxFull)); err != nil {
			return "", nil, false, err
		}
		contentType = "message/rfc822"
		if global {
			contentType = "message/global"
		}
	} else {
		if b, err = io.ReadAll(io.LimitReader(br, MaxHeaders)); err != nil {
			return "", nil, false, err
		}
		if i := bytes.Index(b, []byte("\r\n\r\n")); i >= 0 {
			b = b[:i+2]
		} else if i := bytes.LastIndex(b, []byte("\r\n")); i >= 0 {
			b = b[:i+2] // a header longer than we return
		}
		contentType = "text/rfc822-headers"
		if global {
			contentType = "message/global-headers"
		}
	}
	return contentType, b, !ascii(string(b)), nil
}

// status writes the machine's part. RFC 3464 section 2.1: groups of fields with
// empty lines between them.
func (r *Report) status(p *printer) {
	if id := xtext(r.EnvID, 100); id != "" {
		p.field("Original-Envelope-Id", id)
	}
	p.field("Reporting-MTA", "dns; "+clean(r.Reporter, 255, p.global)) // RFC 3464 section 2.2.2: required
	if !r.Arrived.IsZero() {
		p.field("Arrival-Date", r.Arrived.UTC().Format(dateFormat))
	}
	for i := range r.Recipients {
		x := &r.Recipients[i]
		p.line("")
		if kind, addr, ok := strings.Cut(x.ORcpt, ";"); ok {
			p.field("Original-Recipient", clean(kind, 20, false)+";"+xtextClean(addr, 500, p.global))
		}
		kind := "rfc822"
		if !ascii(x.Address) {
			kind = "utf-8" // RFC 6533 section 3
		}
		p.field("Final-Recipient", kind+";"+address(x.Address))
		p.field("Action", string(r.Kind))            // RFC 3464 section 2.3.3: required
		p.field("Status", status(r.Kind, &x.Result)) // RFC 3464 section 2.3.4: required
		if by := clean(x.Result.By, 255, false); by != "" && by != r.Reporter && !strings.ContainsAny(by, " ;") {
			p.field("Remote-MTA", "dns; "+by)
		}
		if x.Result.Code != 0 {
			words := clean(x.Result.Text, 800, p.global)
			if e := x.Result.Enhanced; e != "" && !strings.HasPrefix(words, e) {
				words = clean(e, 12, false) + " " + words
			}
			p.field("Diagnostic-Code", fmt.Sprintf("smtp; %03d %s", x.Result.Code%1000, words))
		}
		if r.Kind == Delayed && !r.Until.IsZero() {
			p.field("Will-Retry-Until", r.Until.UTC().Format(dateFormat))
		}
	}
	p.line("")
}

// status returns the code of RFC 3463, of the class that the action demands.
func status(k Kind, res *transport.Result) string {
	class := byte('2')
	switch k {
	case Failed:
		class = '5'
	case Delayed:
		class = '4'
	}
	if e := res.Enhanced; wellFormed(e) {
		return string(class) + e[1:]
	}
	return string(class) + ".0.0"
}

// wellFormed reports whether s is class "." subject "." detail.
func wellFormed(s string) bool {
	f := strings.Split(s, ".")
	if len(f) != 3 || len(f[0]) != 1 {
		return false
	}
	for _, n := range f {
		if len(n) < 1 || len(n) > 3 || strings.Trim(n, "0123456789") != "" {
			return false
		}
	}
	return true
}

// printer writes lines and remembers the first error.
type printer struct {
	w      *bufio.Writer
	global bool
	err    error
}

func (p *printer) raw(b []byte) {
	if p.err == nil {
		_, p.err = p.w.Write(b)
	}
}

func (p *printer) line(s string) { p.raw([]byte(s + "\r\n")) }

// field writes a header field, folded at spaces (RFC 5322 section 2.2.3).
func (p *printer) field(name, value string) {
	s := name + ": " + value
	for len(s) > 76 {
		i := strings.LastIndexByte(s[:76], ' ')
		if i <= len(name)+1 {
			if i = strings.IndexByte(s[76:], ' '); i < 0 {
				break
			}
			i += 76
		}
		p.line(s[:i])
		s = " " + s[i+1:]
		name = ""
	}
	p.line(s)
}

// clean makes foreign words harmless: one line, printable, bounded. Without
// utf8 everything beyond ASCII becomes "?".
func clean(s string, most int, utf bool) string {
	var b strings.Builder
	space := true // also drops leading ones
	for _, c := range s {
		switch {
		case c == ' ' || c == '\t' || c == '\r' || c == '\n':
			if !space {
				b.WriteByte(' ')
			}
			space = true
			continue
		case c < 0x20 || c == 0x7f || c == utf8.RuneError || c >= 0x80 && !utf,
			c >= 0x80 && c < 0xa0, c >= 0x200b && c <= 0x200f, c >= 0x2028 && c <= 0x202e, c >= 0x2060 && c <= 0x2069, c == 0xfeff:
			b.WriteByte('?') // controls, and what turns the direction of text
		default:
			b.WriteRune(c)
		}
		space = false
		if b.Len() > most {
			break
		}
	}
	out := strings.TrimRight(b.String(), " ")
	for len(out) > most {
		_, n := utf8.DecodeLastRuneInString(out)
		out = out[:len(out)-n]
	}
	return strings.TrimRight(out, " ")
}

// address cleans an address that was parsed long ago; it stays as it was.
func address(s string) string { return clean(s, 320, true) }

var errXtext = errors.New("not xtext")

// xtext decodes RFC 3461 section 4 and cleans the result; what is no xtext is
// cleaned as it stands.
func xtext(s string, most int) string { return xtextClean(s, most, false) }

func xtextClean(s string, most int, utf bool) string {
	if d, err := decodeXtext(s); err == nil {
		s = d
	}
	return clean(s, most, utf)
}

func decodeXtext(s string) (string, error) {
	if !strings.Contains(s, "+") {
		return s, nil
	}
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] != '+' {
			b.WriteByte(s[i])
			continue
		}
		if i+2 >= len(s) {
			return "", errXtext
		}
		hi, lo := strings.IndexByte(hexDigits, s[i+1]), strings.IndexByte(hexDigits, s[i+2])
		if hi < 0 || lo < 0 {
			return "", errXtext
		}
		b.WriteByte(byte(hi<<4 | lo))
		i += 2
	}
	return b.String(), nil
}

const hexDigits = "0123456789ABCDEF"

func ascii(s string) bool {
	for i := 0; i < len(s); i++ {
		if s[i] >= 0x80 {
			return false
		}
	}
	return true
}
