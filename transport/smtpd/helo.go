package smtpd

import (
	"net/netip"
	"strings"
)

// validHelo checks the argument of HELO and EHLO. RFC 5321 section 4.1.1.1
// wants a domain or an address literal; we also take the underscores and bare
// addresses that real clients send (section 4.1.4: a name that does not fit is
// no reason to refuse mail), but nothing that could be mistaken for anything
// else in a header or a log.
func validHelo(s string) bool {
	if s == "" || len(s) > 255 {
		return false
	}
	if s[0] == '[' {
		return validLiteral(s)
	}
	for i := 0; i < len(s); i++ {
		c := s[i]
		if c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '-' || c == '.' || c == '_' || c == ':' {
			continue
		}
		return false
	}
	return s[0] != '.' && !strings.Contains(s, "..")
}

// validLiteral checks an address literal with its brackets, RFC 5321 section
// 4.1.3. General literals of other standards are not known to exist.
func validLiteral(s string) bool {
	if len(s) < 3 || s[len(s)-1] != ']' {
		return false
	}
	in := s[1 : len(s)-1]
	if len(in) > 5 && strings.EqualFold(in[:5], "IPv6:") {
		a, err := netip.ParseAddr(in[5:])
		return err == nil && a.Is6() && a.Zone() == ""
	}
	a, err := netip.ParseAddr(in)
	return err == nil && a.Is4()
}
