package mime

import (
	"bytes"
	"io"
	"iter"
)

// Field is one field of a header block, with its place in it.
type Field struct {
	Name  []byte // as written, without blanks before the colon
	Value []byte // behind the colon, folded as written, without the last line end
	Start int    // of the field in the block
	End   int    // behind its last line end
}

// Is reports whether the field has that name; case does not count.
func (f *Field) Is(name string) bool { return equalFold(f.Name, name) }

// Fields iterates over the fields of a header block (with or without its empty
// line) from the top, as the walk sees them. Lines that are no field, and all
// from the empty line on, are left out. The slices point into block.
func Fields(block []byte) iter.Seq[Field] {
	return func(yield func(Field) bool) {
		for pos := 0; pos < len(block); {
			end := lineEnd(block, pos)
			line := block[pos:end]
			if isBlank(line) {
				return
			}
			n := fieldName(line)
			if n <= 0 {
				if pos > 0 || !isMboxFrom(line) {
					return
				}
				pos = end
				continue
			}
			for end < len(block) && (block[end] == ' ' || block[end] == '\t') {
				end = lineEnd(block, end)
			}
			f := Field{Name: bytes.TrimRight(block[pos:pos+n], " \t"), Value: trimEnd(block[pos+n+1 : end]), Start: pos, End: end}
			if !yield(f) {
				return
			}
			pos = end
		}
	}
}

// ReadHeader returns the header block at the start of r, with its empty line if
// it has one: at most MaxHeaderSize bytes of it, cut when there is more.
func ReadHeader(r io.ReaderAt, size int64) (block []byte, cut bool, err error) {
	w := walk{s: newScanner(r, min(size, MaxHeaderSize+bufferSize)), out: &Structure{}}
	p := w.open(0, "text", "plain")
	for {
		line, start, first := w.s.next()
		if line == nil {
			if w.s.err != nil {
				return nil, false, w.s.err
			}
			return w.hdr, w.full || w.s.size < size, nil
		}
		if first && isBlank(line) {
			return append(w.hdr, line...), w.full, nil
		}
		if first && !w.headerStays(line, start, p) {
			return w.hdr, w.full, nil
		}
		if w.full || len(w.hdr)+len(line) > MaxHeaderSize {
			return w.hdr, true, nil
		}
		w.hdr = append(w.hdr, line...)
	}
}

func (w *walk) headerStays(line []byte, start int64, p *Part) bool {
	if line[0] == ' ' || line[0] == '\t' {
		return len(w.hdr) > 0
	}
	return fieldName(line) > 0 || isMboxFrom(line) && start == p.Header
}

// AppendFields appends to dst those fields of block whose name is in names, or
// with not those whose name is not, byte for byte and in their order, and the
// empty line that ends a header (RFC 9051 section 6.4.5.1, HEADER.FIELDS).
func AppendFields(dst, block []byte, names []string, not bool) []byte {
	for f := range Fields(block) {
		in := false
		for _, n := range names {
			if in = f.Is(n); in {
				break
			}
		}
		if in == not {
			continue
		}
		dst = append(dst, block[f.Start:f.End]...)
		if n := len(dst); dst[n-1] != '\n' {
			dst = append(dst, '\r', '\n')
		}
	}
	return append(dst, '\r', '\n')
}

// fieldName returns the place of the colon if the line starts a field, else 0.
// RFC 5322 section 4.5 allows blanks before the colon.
func fieldName(line []byte) int {
	n := 0
	for n < len(line) && line[n] > ' ' && line[n] != ':' && line[n] != 0x7f {
		n++
	}
	if n == 0 {
		return 0
	}
	for n < len(line) && (line[n] == ' ' || line[n] == '\t') {
		n++
	}
	if n == len(line) || line[n] != ':' {
		return 0
	}
	return n
}

func lineEnd(b []byte, from int) int {
	if i := bytes.IndexByte(b[from:], '\n'); i >= 0 {
		return from + i + 1
	}
	return len(b)
}

func trimEnd(b []byte) []byte {
	if n := len(b); n > 0 && b[n-1] == '\n' {
		b = b[:n-1]
	}
	if n := len(b); n > 0 && b[n-1] == '\r' {
		b = b[:n-1]
	}
	return b
}

func equalFold(b []byte, s string) bool {
	if len(b) != len(s) {
		return false
	}
	for i := range b {
		x, y := b[i], s[i]
		if 'A' <= x && x <= 'Z' {
			x += 'a' - 'A'
		}
		if 'A' <= y && y <= 'Z' {
			y += 'a' - 'A'
		}
		if x != y {
			return false
		}
	}
	return true
}

// field is one of the fields that the walk reads. Those before fieldTo count once;
// those from fieldContentType up to fieldTo are MIME fields.
type field uint8

const (
	fieldNone field = iota
	fieldDate
	fieldSubject
	fieldFrom
	fieldSender
	fieldReplyTo
	fieldMessageID
	fieldInReplyTo
	fieldContentType
	fieldEncoding
	fieldDisposition
	fieldContentID
	fieldDescription
	fieldLanguage
	fieldLocation
	fieldMD5
	fieldTo
	fieldCc
	fieldBcc
	fieldReceived
)

var fieldNames = [...]string{"", "date", "subject", "from", "sender", "reply-to", "message-id", "in-reply-to", "content-type",
	"content-transfer-encoding", "content-disposition", "content-id", "content-description", "content-language",
	"content-location", "content-md5", "to", "cc", "bcc", "received"}

func lookup(name []byte) field {
	for i := 1; i < len(fieldNames); i++ {
		if len(name) == len(fieldNames[i]) && equalFold(name, fieldNames[i]) {
			return field(i)
		}
	}
	return fieldNone
}

type seenFields uint32

func (s *seenFields) again(k field) bool {
	bit := seenFields(1) << k
	was := *s&bit != 0
	*s |= bit
	return was
}
