package smtpd

import (
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"
)

// enhancedFor returns an enhanced code whose class fits the reply code (RFC
// 2034 section 4).
func enhancedFor(code int, enhanced string) string {
	if len(enhanced) >= 5 && int(enhanced[0]-'0') == code/100 && enhanced[1] == '.' {
		return enhanced
	}
	if code >= 500 {
		return "5.0.0"
	}
	return "4.0.0"
}

// publicText makes one printable line of bounded length: RFC 5321 section
// 4.2's textstring, with UTF-8 only where SMTPUTF8 was agreed (RFC 6531
// section 3.5).
func publicText(s string, utf8ok bool) string {
	ok := s != "" && len(s) <= maxReplyText
	for i := 0; ok && i < len(s); i++ {
		ok = s[i] >= 32 && s[i] < 127
	}
	if ok {
		return s
	}
	var b strings.Builder
	for _, r := range s {
		if b.Len() >= maxReplyText {
			break
		}
		switch {
		case r >= 32 && r < 127, utf8ok && r >= 0xA0 && unicode.IsPrint(r):
			b.WriteRune(r)
		case r == '\n' || r == '\r' || r == '\t':
			b.WriteByte(' ')
		default:
			b.WriteByte('?')
		}
	}
	if b.Len() == 0 {
		return "No reason given"
	}
	return b.String()
}

// clean makes foreign bytes safe to log with any handler: control characters,
// escapes, bidirectional overrides and broken UTF-8 become escapes.
func clean(s string) string {
	for i := 0; i < len(s); i++ {
		if s[i] < 32 || s[i] > 126 {
			return cleanSlow(s)
		}
	}
	if len(s) > 1024 {
		return s[:1024]
	}
	return s
}

func cleanSlow(s string) string {
	var b strings.Builder
	for i := 0; i < len(s) && b.Len() < 1024; {
		r, n := utf8.DecodeRuneInString(s[i:])
		switch {
		case r == utf8.RuneError && n == 1:
			b.WriteString(`\x` + strconv.FormatUint(uint64(s[i])|0x100, 16)[1:])
		case !unicode.IsPrint(r): // also the bidirectional and zero-width ones
			q := strconv.QuoteRuneToASCII(r)
			b.WriteString(q[1 : len(q)-1])
		default:
			b.WriteRune(r)
		}
		i += n
	}
	return b.String()
}
