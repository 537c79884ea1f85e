package mime

import (
	"bytes"
	"strings"
)

// level is one open part on the way from the root to where the walk stands.
type level struct {
	part     *Part
	boundary string // of an open multipart with parts to come, else ""
	digest   bool
	bodyLF   int64 // line ends before the body
}

// walk is the state of one Parse. Depth is the length of stack: nothing here
// calls itself for a part within a part.
type walk struct {
	s     *scanner
	out   *Structure
	room  int // bytes of text that the Structure may still take
	parts int
	stack []level

	inHeader bool
	hdr      []byte // the header block so far
	full     bool   // the block is longer than what is read of it
	lf       int64  // line ends passed
	lastEnd  int    // bytes of the line end before the current line: 0, 1, 2
	lastByte byte   // before the current piece
}

// open starts a part at the given place, as a child of the innermost one, with
// the type it has unless its header says otherwise (RFC 2046 section 5.1.5).
func (w *walk) open(at int64, typ, subtype string) *Part {
	p := &Part{Header: at, Type: typ, Subtype: subtype, Encoding: "7BIT"}
	if n := len(w.stack); n > 0 {
		parent := w.stack[n-1].part
		parent.Children = append(parent.Children, p)
	}
	w.stack = append(w.stack, level{part: p})
	w.parts++
	w.inHeader, w.full, w.hdr = true, false, w.hdr[:0]
	return p
}

func (w *walk) run() error {
	for {
		line, start, first := w.s.next()
		if line == nil {
			break
		}
		ended := line[len(line)-1] == '\n'
		if !first || !w.delimiter(line, start) {
			// A header that ends before this line may open an inner message,
			// to whose header the line then belongs: at most MaxDepth times.
			for w.inHeader && !w.headerLine(line, start, first) {
			}
		}
		if ended {
			w.lf++
			w.lastEnd = 1
			if len(line) > 1 && line[len(line)-2] == '\r' || len(line) == 1 && !first && w.lastByte == '\r' {
				w.lastEnd = 2
			}
		} else {
			w.lastEnd = 0
		}
		w.lastByte = line[len(line)-1]
	}
	if w.s.err != nil {
		return w.s.err
	}
	for w.inHeader {
		w.endHeader(w.s.size, w.lf)
	}
	w.closeTo(0, w.s.size, w.lf)
	return nil
}

// delimiter handles the line if it is one of the open multiparts' delimiters.
func (w *walk) delimiter(line []byte, start int64) bool {
	if len(line) < 3 || line[0] != '-' || line[1] != '-' {
		return false
	}
	text := line[2:]
	for len(text) > 0 && (text[len(text)-1] <= ' ') {
		text = text[:len(text)-1]
	}
	for i := len(w.stack) - 1; i >= 0; i-- {
		b := w.stack[i].boundary
		if b == "" || len(text) < len(b) || string(text[:len(b)]) != b {
			continue
		}
		switch rest := string(text[len(b):]); {
		case rest == "" && w.parts >= MaxParts:
			w.out.Cut = true
			return false
		case rest == "":
			w.closeTo(i+1, start, w.lf)
			if w.stack[i].digest {
				w.open(start+int64(len(line)), "message", "rfc822")
			} else {
				w.open(start+int64(len(line)), "text", "plain")
			}
			return true
		case rest == "--":
			w.closeTo(i+1, start, w.lf)
			w.stack[i].boundary = "" // the rest is epilogue
			return true
		}
	}
	return false
}

// closeTo ends all parts above depth n before a delimiter line at place at, or
// at the message's end. The line end before a delimiter belongs to it
// (RFC 2046 section 5.1.1).
func (w *walk) closeTo(n int, at, lf int64) {
	if len(w.stack) <= n {
		return
	}
	if w.inHeader { // the header met its multipart's delimiter
		w.inHeader = false
		l := &w.stack[len(w.stack)-1]
		w.fields(l.part)
		l.part.Body, l.bodyLF = at, lf
	}
	end, endLF := at, lf
	if n > 0 && w.lastEnd > 0 {
		end, endLF = at-int64(w.lastEnd), lf-1
	}
	bound := max(end, w.stack[n].part.Body)
	for i := n; i < len(w.stack); i++ {
		l := &w.stack[i]
		// A part that began with the very line end that belongs to the delimiter
		// is empty, at its parent's end.
		l.part.Header, l.part.Body = min(l.part.Header, bound), min(l.part.Body, bound)
		l.part.End = min(max(end, l.part.Body), bound)
		bound = l.part.End
		if l.part.Type == "text" || l.part.Type == "message" {
			l.part.Lines = max(endLF-l.bodyLF, 0)
		}
	}
	w.stack = w.stack[:n]
}

// headerLine takes a line or piece into the header block. It returns false when
// the header ended before the line.
func (w *walk) headerLine(line []byte, start int64, first bool) bool {
	if first {
		switch {
		case isBlank(line):
			w.endHeader(start+int64(len(line)), w.lf+1)
			return true
		case line[0] == ' ' || line[0] == '\t':
			if len(w.hdr) == 0 {
				w.endHeader(start, w.lf)
				return false
			}
		case fieldName(line) > 0:
		case isMboxFrom(line) && start == w.stack[len(w.stack)-1].part.Header:
		default:
			w.endHeader(start, w.lf)
			return false
		}
	}
	if w.full || len(w.hdr)+len(line) > MaxHeaderSize {
		w.full, w.out.Cut = true, true
		return true
	}
	w.hdr = append(w.hdr, line...)
	return true
}

// mentions reports whether a line of the header block starts with that name, in
// lower case, whatever follows it.
func mentions(hdr []byte, name string) bool {
	for at := 0; at+len(name) <= len(hdr); {
		if equalFold(hdr[at:at+len(name)], name) {
			return true
		}
		i := bytes.IndexByte(hdr[at:], '\n')
		if i < 0 {
			break
		}
		at += i + 1
	}
	return false
}

func isBlank(line []byte) bool {
	return len(line) == 1 && line[0] == '\n' || len(line) == 2 && line[0] == '\r' && line[1] == '\n'
}

func isMboxFrom(line []byte) bool {
	return strings.HasPrefix(string(line[:min(len(line), 6)]), "From ") || strings.HasPrefix(string(line[:min(len(line), 6)]), ">From ")
}

// endHeader ends the innermost part's header at body and decides what its body
// is: parts to come, a message, or opaque bytes.
func (w *walk) endHeader(body, lf int64) {
	w.inHeader = false
	l := &w.stack[len(w.stack)-1]
	p := l.part
	p.Body, l.bodyLF = body, lf
	w.fields(p)
	deep := boundsDepth && len(w.stack) >= MaxDepth || w.parts >= MaxParts
	switch {
	case p.Type == "multipart":
		b := strings.TrimRight(p.Param("boundary"), " \t")
		switch {
		case b == "":
		case deep || len(b) > MaxBoundary:
			w.out.Cut = true
		default:
			l.boundary, l.digest = b, p.Subtype == "digest"
		}
	case p.IsMessage() && (p.Encoding == "7BIT" || p.Encoding == "8BIT" || p.Encoding == "BINARY"):
		if deep {
			w.out.Cut = true
			return
		}
		p.Envelope = &Envelope{}
		w.open(body, "text", "plain")
	}
}

// fields reads the header block of p, and the envelope when p is a message's root.
func (w *walk) fields(p *Part) {
	var env *Envelope
	top := len(w.stack) == 1
	if top {
		env = &w.out.Envelope
	} else if parent := w.stack[len(w.stack)-2].part; parent.IsMessage() {
		env = parent.Envelope
	}
	if top {
		w.out.Clean = !w.full && !mentions(w.hdr, "return-path")
	}
	var seen seenFields
	addresses := MaxAddresses
	for f := range Fields(w.hdr) {
		k := lookup(f.Name)
		if k == fieldReceived && top {
			w.out.Received++
		}
		if k == fieldNone || k < fieldTo && seen.again(k) {
			continue
		}
		if k >= fieldContentType && k < fieldTo {
			w.mimeField(p, k, f.Value)
		} else if env != nil {
			w.envelopeField(env, k, f.Value, &addresses)
		}
	}
}

func (w *walk) envelopeField(e *Envelope, k field, v []byte, addresses *int) {
	list := func(dst *[]Address) {
		got, cut := ParseAddresses(v, *addresses)
		*addresses -= len(got)
		for _, a := range got {
			if w.room < len(a.Name)+len(a.Mailbox)+len(a.Host) {
				cut = true
				break
			}
			w.room -= len(a.Name) + len(a.Mailbox) + len(a.Host)
			*dst = append(*dst, a)
		}
		w.out.Cut = w.out.Cut || cut
	}
	switch k {
	case fieldDate:
		e.Date, _ = ParseDate(v)
	case fieldSubject:
		e.Subject = w.keep(DecodeText(v))
	case fieldFrom:
		list(&e.From)
	case fieldSender:
		list(&e.Sender)
	case fieldReplyTo:
		list(&e.ReplyTo)
	case fieldTo:
		list(&e.To)
	case fieldCc:
		list(&e.Cc)
	case fieldBcc:
		list(&e.Bcc)
	case fieldMessageID:
		if ids := MessageIDs(v, 1); len(ids) > 0 {
			e.MessageID = w.keep(ids[0])
		}
	case fieldInReplyTo:
		for _, id := range MessageIDs(v, 64) {
			if id = w.keep(id); id != "" {
				e.InReplyTo = append(e.InReplyTo, id)
			}
		}
	}
}

func (w *walk) mimeField(p *Part, k field, v []byte) {
	switch k {
	case fieldContentType:
		value, params, cut := parseParams(v)
		w.out.Cut = w.out.Cut || cut
		typ, sub, ok := strings.Cut(value, "/")
		if !ok || !isToken(typ) || !isToken(sub) {
			return // RFC 2045 section 5.2: what cannot be read is the default
		}
		p.Type, p.Subtype, p.Params = w.keep(typ), w.keep(sub), w.keepParams(params)
		if p.Type == "" || p.Subtype == "" {
			p.Type, p.Subtype = "application", "octet-stream"
		}
	case fieldDisposition:
		value, params, cut := parseParams(v)
		w.out.Cut = w.out.Cut || cut
		if isToken(value) {
			p.Disposition, p.DispParams = w.keep(value), w.keepParams(params)
		}
	case fieldEncoding:
		value, _, _ := parseParams(v)
		if isToken(value) && len(value) <= 64 {
			if value = w.keep(strings.ToUpper(value)); value != "" {
				p.Encoding = value
			}
		}
	case fieldContentID:
		p.ID = w.keep(clean(unfold(v, 998)))
	case fieldDescription:
		p.Description = w.keep(DecodeText(v))
	case fieldLocation:
		p.Location = w.keep(strings.ReplaceAll(clean(unfold(v, MaxValue)), " ", ""))
	case fieldMD5:
		p.MD5 = w.keep(clean(unfold(v, 64)))
	case fieldLanguage:
		for _, t := range strings.Split(clean(unfold(v, 998)), ",") {
			if t = w.keep(strings.TrimSpace(t)); t != "" {
				p.Language = append(p.Language, t)
			}
		}
	}
}

// keep returns s if the Structure has room for it, else "".
func (w *walk) keep(s string) string {
	if len(s) > w.room {
		w.out.Cut = true
		return ""
	}
	w.room -= len(s)
	return s
}

func (w *walk) keepParams(ps []Param) []Param {
	for i := range ps {
		n := len(ps[i].Name) + len(ps[i].Value)
		if n > w.room {
			w.out.Cut = true
			return ps[:i]
		}
		w.room -= n
	}
	return ps
}
