package mime

import (
	"slices"
	"strconv"
	"strings"
)

// parseParams reads a value with parameters: Content-Type, Content-Disposition.
// The value comes back in lower case.
func parseParams(v []byte) (value string, params []Param, cut bool) {
	s := unfold(v, rawFactor*MaxValue)
	cut = len(v) > rawFactor*MaxValue
	var pos int
	skipBlanks := func() {
		for pos < len(s) {
			switch s[pos] {
			case ' ', '\t':
				pos++
			case '(':
				c := addressParser{s: s, pos: pos}
				c.readComment()
				pos = c.pos
			default:
				return
			}
		}
	}
	word := func(stop string) string {
		skipBlanks()
		if pos < len(s) && s[pos] == '"' {
			q := addressParser{s: s, pos: pos}
			w := q.readQuoted()
			pos = q.pos
			return w
		}
		start := pos
		for pos < len(s) && strings.IndexByte(stop, s[pos]) < 0 {
			pos++
		}
		return strings.Trim(s[start:pos], " \t")
	}
	value = strings.ToLower(strings.ReplaceAll(word("; \t("), " ", ""))
	skipBlanks()
	if pos < len(s) && (s[pos] == '/' || strings.HasSuffix(value, "/")) { // "text / plain"
		value = strings.ToLower(value + word("; \t("))
		skipBlanks()
		if strings.HasSuffix(value, "/") {
			value += strings.ToLower(word("; \t("))
		}
	}
	var pieces []piece
	for pos < len(s) {
		if i := strings.IndexByte(s[pos:], ';'); i < 0 {
			break
		} else {
			pos += i + 1
		}
		skipBlanks()
		name := strings.ToLower(word("=;"))
		if pos >= len(s) || s[pos] != '=' || !isToken(name) {
			continue
		}
		pos++
		val := word(";") // blanks in an unquoted value: what senders mean is the whole
		if len(pieces) >= MaxParams {
			return value, joinPieces(pieces), true
		}
		pieces = append(pieces, newPiece(name, val))
	}
	return value, joinPieces(pieces), cut
}

func isToken(s string) bool {
	for i := range len(s) {
		if s[i] <= ' ' || s[i] >= 0x7f || strings.IndexByte("()<>@,;:\\\"/[]?=", s[i]) >= 0 {
			return false
		}
	}
	return s != ""
}

// piece is one parameter as written: perhaps one of several of a long value
// (RFC 2231 section 3), perhaps percent-encoded (section 4).
type piece struct {
	name    string
	n       int // place in the value, -1 when the value is whole
	encoded bool
	value   string
}

func newPiece(name, value string) piece {
	p := piece{name: name, n: -1, value: value}
	if base, ok := strings.CutSuffix(p.name, "*"); ok && base != "" {
		p.name, p.encoded = base, true
	}
	if base, num, ok := strings.Cut(p.name, "*"); ok && base != "" {
		if n, err := strconv.ParseUint(num, 10, 16); err == nil {
			p.name, p.n = base, int(n)
		}
	}
	return p
}

// joinPieces puts the parameters together. A value in the extended form is
// preferred to a plain one of that name, which is there for old readers.
func joinPieces(ps []piece) []Param {
	var out []Param
	for i, p := range ps {
		if slices.ContainsFunc(ps[:i], func(q piece) bool { return q.name == p.name }) {
			continue
		}
		var whole, rest []piece
		for _, q := range ps[i:] {
			switch {
			case q.name != p.name:
			case q.n >= 0:
				rest = append(rest, q)
			case len(whole) == 0 || q.encoded && !whole[0].encoded:
				whole = []piece{q}
			}
		}
		if len(rest) > 0 && (len(whole) == 0 || !whole[0].encoded) {
			slices.SortStableFunc(rest, func(a, b piece) int { return a.n - b.n })
			whole = rest
		}
		out = append(out, Param{Name: p.name, Value: joinValue(whole)})
	}
	return out
}

func joinValue(ps []piece) string {
	var charset string
	extended := ps[0].encoded
	if extended {
		// RFC 2231 section 4: charset'language'value, in the first piece.
		if c, rest, ok := strings.Cut(ps[0].value, "'"); ok {
			if _, v, ok := strings.Cut(rest, "'"); ok {
				charset, ps[0].value = strings.ToLower(c), v
			}
		}
	}
	var b []byte
	next := 0
	for i, p := range ps {
		if i > 0 && p.n != next { // a piece is missing or comes twice
			if p.n < next {
				continue
			}
			break
		}
		next = p.n + 1
		if p.encoded {
			b = append(b, percent(p.value)...)
		} else {
			b = append(b, p.value...)
		}
	}
	s := string(b)
	if extended {
		s = toUTF8(charset, s)
	} else {
		s = decodeWords(s) // not allowed, widely sent
	}
	return clean(truncate(s, MaxValue))
}

func percent(s string) []byte {
	b := make([]byte, 0, len(s))
	for i := 0; i < len(s); i++ {
		if s[i] == '%' && i+2 < len(s) && unhex(s[i+1]) >= 0 && unhex(s[i+2]) >= 0 {
			b = append(b, byte(unhex(s[i+1])<<4|unhex(s[i+2])))
			i += 2
			continue
		}
		b = append(b, s[i])
	}
	return b
}
