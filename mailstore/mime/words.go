package mime

import (
	"strings"
	"unicode/utf8"

	"golang.org/x/text/encoding"
	"golang.org/x/text/encoding/htmlindex"
	"golang.org/x/text/encoding/simplifiedchinese"
	"golang.org/x/text/encoding/unicode"
)

// rawFactor is how many raw bytes are read for each byte of a decoded value.
const rawFactor = 4

// DecodeText returns the text of an unstructured field value as a person reads
// it: unfolded, encoded words (RFC 2047) decoded, valid UTF-8 without control
// characters, at most MaxValue bytes.
func DecodeText(value []byte) string {
	return clean(truncate(decodeWords(unfold(value, rawFactor*MaxValue)), MaxValue))
}

// unfold drops the line ends of folding (RFC 5322 section 2.2.3), and blanks at
// both ends, from the first limit bytes of a value.
func unfold(v []byte, limit int) string {
	v = v[:min(len(v), limit)]
	plain := true
	for _, c := range v {
		if c == '\r' || c == '\n' {
			plain = false
			break
		}
	}
	if plain {
		return strings.Trim(string(v), " \t")
	}
	b := make([]byte, 0, len(v))
	for _, c := range v {
		if c != '\r' && c != '\n' {
			b = append(b, c)
		}
	}
	return strings.Trim(string(b), " \t")
}

// truncate cuts s to at most n bytes, at a character.
func truncate(s string, n int) string {
	if len(s) <= n {
		return s
	}
	for n > 0 && !utf8.RuneStart(s[n]) {
		n--
	}
	return s[:n]
}

// clean makes s valid UTF-8 without control characters, which become blanks.
// Bytes that are no UTF-8 are read as windows-1252.
func clean(s string) string {
	ok := true
	for i := range len(s) {
		if c := s[i]; c < ' ' || c >= 0x7f {
			ok = false
			break
		}
	}
	if ok {
		return s
	}
	s = toUTF8("", s)
	return strings.Map(func(r rune) rune {
		switch {
		case r < ' ' || r == 0x7f || 0x80 <= r && r < 0xa0, r == 0x2028, r == 0x2029:
			return ' '
		}
		return r
	}, s)
}

// decodeWords replaces the encoded words in s. Neighbours of one charset are
// joined before decoding, since senders split characters between them
// (RFC 2047 section 5 forbids it, and section 6.2 drops the blanks between).
func decodeWords(s string) string {
	if !strings.Contains(s, "=?") {
		return s
	}
	var out strings.Builder
	var charset string
	var pending []byte // decoded bytes in charset, not yet written
	flush := func() {
		if len(pending) > 0 {
			out.WriteString(toUTF8(charset, string(pending)))
			pending = pending[:0]
		}
	}
	from, after := 0, -1 // after: where the last word ended, -1 for none
	for i := 0; i < len(s); {
		j := strings.Index(s[i:], "=?")
		if j < 0 {
			break
		}
		i += j
		cs, text, n := encodedWord(s[i:])
		if n == 0 {
			i += 2
			continue
		}
		gap := s[from:i]
		if after < 0 || strings.Trim(gap, " \t") != "" {
			flush()
			out.WriteString(gap)
		} else if cs != charset {
			flush()
		}
		charset = cs
		pending = append(pending, text...)
		i += n
		from, after = i, i
	}
	flush()
	out.WriteString(s[from:])
	return out.String()
}

// encodedWord decodes the encoded word at the start of s, which starts with
// "=?", and returns its length, 0 when it is none. It looks no further than the
// fourth question mark.
func encodedWord(s string) (charset string, text []byte, n int) {
	cs, rest, ok := cutByte(s[2:], 64)
	if !ok || cs == "" {
		return "", nil, 0
	}
	enc, rest, ok := cutByte(rest, 1)
	if !ok || len(enc) != 1 {
		return "", nil, 0
	}
	body, rest, ok := cutByte(rest, len(rest))
	if !ok || rest == "" || rest[0] != '=' {
		return "", nil, 0
	}
	switch enc[0] {
	case 'q', 'Q':
		text = decodeQ(body)
	case 'b', 'B':
		text = decodeB(body)
	default:
		return "", nil, 0
	}
	cs, _, _ = strings.Cut(cs, "*") // RFC 2231 section 5: language
	return strings.ToLower(cs), text, len(s) - len(rest) + 1
}

// cutByte cuts s at the first question mark within its first limit+1 bytes.
func cutByte(s string, limit int) (before, after string, ok bool) {
	i := strings.IndexByte(s[:min(len(s), limit+1)], '?')
	if i < 0 {
		return "", "", false
	}
	return s[:i], s[i+1:], true
}

func decodeQ(s string) []byte {
	b := make([]byte, 0, len(s))
	for i := 0; i < len(s); i++ {
		switch c := s[i]; {
		case c == '_':
			b = append(b, ' ')
		case c == '=' && i+2 < len(s) && unhex(s[i+1]) >= 0 && unhex(s[i+2]) >= 0:
			b = append(b, byte(unhex(s[i+1])<<4|unhex(s[i+2])))
			i += 2
		default:
			b = append(b, c)
		}
	}
	return b
}

// decodeB decodes base64 and overlooks all that is not of its alphabet.
func decodeB(s string) []byte {
	b := make([]byte, 0, len(s)*3/4)
	var acc uint32
	var bits uint
	for i := range len(s) {
		v := base64Values[s[i]]
		if v < 0 {
			if s[i] == '=' { // joined pieces each end on their own
				acc, bits = 0, 0
			}
			continue
		}
		acc = acc<<6 | uint32(v)
		if bits += 6; bits >= 8 {
			bits -= 8
			b = append(b, byte(acc>>bits))
		}
	}
	return b
}

func unhex(c byte) int {
	switch {
	case '0' <= c && c <= '9':
		return int(c - '0')
	case 'a' <= c && c <= 'f':
		return int(c-'a') + 10
	case 'A' <= c && c <= 'F':
		return int(c-'A') + 10
	}
	return -1
}

var base64Values = func() (t [256]int8) {
	for i := range t {
		t[i] = -1
	}
	for i, c := range []byte("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/") {
		t[c] = int8(i)
	}
	t['-'], t['_'] = 62, 63 // RFC 4648 section 5, seen in the wild
	return t
}()

// charsetOf returns the decoder's charset by its label, nil for UTF-8 and for
// what we do not know.
func charsetOf(label string) encoding.Encoding {
	label = strings.ToLower(strings.Trim(label, " \t\"'"))
	switch label {
	case "", "utf-8", "utf8":
		return nil
	case "us-ascii", "ascii", "unknown-8bit", "x-unknown", "default":
		return nil // what is not ASCII in it is guessed
	case "hz-gb-2312":
		return simplifiedchinese.HZGB2312
	case "utf-16":
		return unicode.UTF16(unicode.BigEndian, unicode.UseBOM)
	case "utf-16be":
		return unicode.UTF16(unicode.BigEndian, unicode.IgnoreBOM)
	case "utf-16le":
		return unicode.UTF16(unicode.LittleEndian, unicode.IgnoreBOM)
	}
	if n, ok := strings.CutPrefix(label, "cp"); ok && len(n) == 4 {
		label = "windows-" + n
	}
	e, err := htmlindex.Get(label)
	if err != nil || e == encoding.Replacement {
		return nil
	}
	return e
}

// toUTF8 reads s as text in the charset; it never fails.
func toUTF8(charset, s string) string {
	if e := charsetOf(charset); e != nil {
		if t, err := e.NewDecoder().String(s); err == nil {
			return t
		}
	}
	if utf8.ValidString(s) {
		return s
	}
	e, err := htmlindex.Get("windows-1252")
	if err == nil && charset != "utf-8" && charset != "utf8" {
		if t, err := e.NewDecoder().String(s); err == nil {
			return t
		}
	}
	return strings.ToValidUTF8(s, "\uFFFD")
}
