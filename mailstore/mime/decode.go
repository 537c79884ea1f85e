package mime

import (
	"io"
	"unicode/utf8"

	"golang.org/x/text/encoding"
	"golang.org/x/text/encoding/htmlindex"
)

// Decode undoes a Content-Transfer-Encoding (as Part.Encoding has it) while r
// is read. It overlooks what does not belong there; an error is r's own. known
// is false for an encoding that we do not know: r comes back as it is.
func Decode(encoding string, r io.Reader) (dec io.Reader, known bool) {
	switch encoding {
	case "7BIT", "8BIT", "BINARY", "":
		return r, true
	case "BASE64":
		return &transfer{r: r, step: (*transfer).base64}, true
	case "QUOTED-PRINTABLE":
		return &transfer{r: r, step: (*transfer).quoted}, true
	}
	return r, false
}

// Text returns the decoded body of a text part as UTF-8, from a reader of its
// [Body, End).
func (p *Part) Text(r io.Reader) io.Reader {
	r, _ = Decode(p.Encoding, r)
	if e := charsetOf(p.Param("charset")); e != nil {
		return e.NewDecoder().Reader(r)
	}
	return &guess{r: r}
}

// guess hands UTF-8 through and reads other bytes as windows-1252 from the
// first one on that cannot be UTF-8.
type guess struct {
	r    io.Reader
	buf  [4096]byte
	n    int
	err  error
	rest io.Reader // set once it is no UTF-8
}

func (g *guess) Read(p []byte) (int, error) {
	for {
		if g.rest != nil {
			return g.rest.Read(p)
		}
		whole := 0
		for whole < g.n {
			if g.buf[whole] < utf8.RuneSelf {
				whole++
				continue
			}
			if !utf8.FullRune(g.buf[whole:g.n]) && g.err == nil {
				break
			}
			c, size := utf8.DecodeRune(g.buf[whole:g.n])
			if c == utf8.RuneError && size == 1 {
				break
			}
			whole += size
		}
		if whole > 0 {
			n := copy(p, g.buf[:whole])
			g.n = copy(g.buf[:], g.buf[n:g.n])
			return n, nil
		}
		if g.n > 0 && (g.err != nil || utf8.FullRune(g.buf[:g.n])) {
			e, err := htmlindex.Get("windows-1252")
			if err != nil {
				e = encoding.Nop
			}
			g.rest = e.NewDecoder().Reader(io.MultiReader(newBytes(g.buf[:g.n]), g.r))
			continue
		}
		if g.err != nil {
			return 0, g.err
		}
		var n int
		n, g.err = g.r.Read(g.buf[g.n:])
		g.n += n
	}
}

type byteReader struct{ b []byte }

func newBytes(b []byte) io.Reader { return &byteReader{append([]byte(nil), b...)} }

func (r *byteReader) Read(p []byte) (int, error) {
	if len(r.b) == 0 {
		return 0, io.EOF
	}
	n := copy(p, r.b)
	r.b = r.b[n:]
	return n, nil
}

// transfer decodes through two small buffers.
type transfer struct {
	r    io.Reader
	step func(t *transfer, in []byte, end bool) (used int)
	in   [4096]byte
	n    int
	out  []byte // decoded, from taken on
	took int
	err  error

	acc  uint32 // base64
	bits uint
}

func (t *transfer) Read(p []byte) (int, error) {
	for t.took == len(t.out) {
		t.out, t.took = t.out[:0], 0
		if t.err != nil && t.n == 0 {
			return 0, t.err
		}
		if t.err == nil {
			var n int
			n, t.err = t.r.Read(t.in[t.n:])
			t.n += n
		}
		used := t.step(t, t.in[:t.n], t.err != nil)
		t.n = copy(t.in[:], t.in[used:t.n])
	}
	n := copy(p, t.out[t.took:])
	t.took += n
	return n, nil
}

func (t *transfer) base64(in []byte, _ bool) int {
	for _, c := range in {
		v := base64Values[c]
		if v < 0 {
			if c == '=' {
				t.acc, t.bits = 0, 0
			}
			continue
		}
		t.acc = t.acc<<6 | uint32(v)
		if t.bits += 6; t.bits >= 8 {
			t.bits -= 8
			t.out = append(t.out, byte(t.acc>>t.bits))
		}
	}
	return len(in)
}

// quoted decodes quoted-printable (RFC 2045 section 6.7). Blanks before a line
// end are dropped by rule 3 as far as they fit the buffer.
func (t *transfer) quoted(in []byte, end bool) int {
	i := 0
	for i < len(in) {
		c := in[i]
		switch {
		case c == '=':
			j := i + 1
			for j < len(in) && (in[j] == ' ' || in[j] == '\t') {
				j++
			}
			if j < len(in) && in[j] == '\r' {
				j++
			}
			switch {
			case j < len(in) && in[j] == '\n': // soft line break
				i = j + 1
				continue
			case j == len(in) && !end && (i > 0 || len(in) < len(t.in)):
				return i
			case j == len(in) && end && j > i+1:
				i = j
				continue
			}
			if i+2 < len(in) && unhex(in[i+1]) >= 0 && unhex(in[i+2]) >= 0 {
				t.out = append(t.out, byte(unhex(in[i+1])<<4|unhex(in[i+2])))
				i += 3
				continue
			}
			if i+2 >= len(in) && !end && (i > 0 || len(in) < len(t.in)) {
				return i
			}
			t.out = append(t.out, c)
			i++
		case c == ' ' || c == '\t':
			j := i + 1
			for j < len(in) && (in[j] == ' ' || in[j] == '\t') {
				j++
			}
			if j == len(in) && !end && (i > 0 || len(in) < len(t.in)) {
				return i
			}
			if j < len(in) && (in[j] == '\n' || in[j] == '\r') || j == len(in) && end {
				i = j
				continue
			}
			t.out = append(t.out, in[i:j]...)
			i = j
		default:
			t.out = append(t.out, c)
			i++
		}
	}
	return i
}
