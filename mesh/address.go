package mesh

import (
	"errors"
	"strings"

	"golang.org/x/net/idna"
	"golang.org/x/text/unicode/norm"
)

// Address is a mail address as somebody wrote it: the local part with its
// quotes if it has them, the domain in whatever case and alphabet. Compare
// addresses by Key, never by the value itself.
type Address struct {
	Local  string // as given, quoted form kept; RFC 5321 section 4.1.2 Local-part
	Domain string // as given; "" only for the bare <Postmaster> of RFC 5321 section 4.1.1.3
}

// Limits of RFC 5321 section 4.5.3.1, in bytes.
const (
	MaxLocalLen  = 64
	MaxDomainLen = 255
	MaxPathLen   = 254 // RFC 3696 erratum 1690: the path is 256 with its brackets
)

// Errors of ParseAddress.
var (
	ErrAddressSyntax = errors.New("address syntax")
	ErrAddressLength = errors.New("address too long")
)

// ParseAddress reads local@domain, splitting at the last "@" outside of the
// domain (RFC 5321 section 4.1.2). It accepts dot-string and quoted-string
// local parts, UTF-8 in both halves (RFC 6531 section 3.3), domain names and
// address literals. Anything that could be taken for a second parameter, a
// source route or a control character is refused.
func ParseAddress(s string) (Address, error) {
	at := strings.LastIndexByte(s, '@')
	if at < 1 || at == len(s)-1 {
		return Address{}, ErrAddressSyntax
	}
	a := Address{Local: s[:at], Domain: s[at+1:]}
	if len(a.Local) > MaxLocalLen || len(a.Domain) > MaxDomainLen || len(s) > MaxPathLen {
		return Address{}, ErrAddressLength
	}
	if !validLocal(a.Local) || !validDomain(a.Domain) {
		return Address{}, ErrAddressSyntax
	}
	return a, nil
}

func validLocal(s string) bool {
	if len(s) >= 2 && s[0] == '"' && s[len(s)-1] == '"' {
		in := s[1 : len(s)-1]
		for i := 0; i < len(in); i++ {
			switch c := in[i]; {
			case c == '\\': // quoted-pairSMTP: any printable ASCII
				i++
				if i == len(in) || in[i] < 32 || in[i] > 126 {
					return false
				}
			case c == '"' || c < 32 || c == 127:
				return false
			}
		}
		return validUTF8(in)
	}
	for _, atom := range strings.Split(s, ".") {
		if atom == "" {
			return false
		}
		for i := 0; i < len(atom); i++ {
			c := atom[i]
			if c >= 0x80 || c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' ||
				strings.IndexByte("!#$%&'*+-/=?^_`{|}~", c) >= 0 {
				continue
			}
			return false
		}
	}
	return validUTF8(s)
}

// validUTF8 also refuses the C1 control characters and the Unicode line and
// paragraph separators, which some readers take for line ends.
func validUTF8(s string) bool {
	for _, r := range s {
		if r == '\uFFFD' || r >= 0x80 && r < 0xA0 || r == 0x2028 || r == 0x2029 {
			return false
		}
	}
	return true
}

func validDomain(s string) bool {
	if s[0] == '[' {
		if len(s) < 3 || s[len(s)-1] != ']' {
			return false
		}
		for i := 1; i < len(s)-1; i++ {
			if c := s[i]; c < 33 || c > 126 || c == '[' || c == ']' || c == '\\' {
				return false
			}
		}
		return true
	}
	for _, label := range strings.Split(s, ".") {
		if label == "" || len(label) > 63 && isASCII(label) || label[0] == '-' || label[len(label)-1] == '-' {
			return false
		}
		for i := 0; i < len(label); i++ {
			c := label[i]
			if c >= 0x80 || c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '-' || c == '_' {
				continue
			}
			return false
		}
	}
	if isASCII(s) {
		return true
	}
	_, err := idna.Lookup.ToASCII(s)
	return err == nil && validUTF8(s)
}

func isASCII(s string) bool {
	for i := 0; i < len(s); i++ {
		if s[i] >= 0x80 {
			return false
		}
	}
	return true
}

// IsASCII reports whether the address needs no SMTPUTF8 (RFC 6531).
func (a Address) IsASCII() bool { return isASCII(a.Local) && isASCII(a.Domain) }

// String returns the address as it was given.
func (a Address) String() string {
	if a.Domain == "" {
		return a.Local
	}
	return a.Local + "@" + a.Domain
}

// DomainKey returns the domain for comparison: a lower-case A-label form.
func (a Address) DomainKey() string { return DomainKey(a.Domain) }

// DomainKey returns a domain name for comparison: lower case, A-labels, no
// trailing dot. A name that has no A-label form is only lowered.
func DomainKey(d string) string {
	d = strings.TrimSuffix(d, ".")
	if !isASCII(d) {
		if a, err := idna.Lookup.ToASCII(d); err == nil {
			return strings.ToLower(a)
		}
	}
	return strings.ToLower(d)
}

// Key returns the address for comparison: local part in NFC and lower case,
// unquoted where the quotes say nothing, and DomainKey.
func (a Address) Key() string { return a.localKey() + "@" + a.DomainKey() }

// BaseKey returns Key without the "+tag" of a sub-address (RFC 5233), and
// whether there was one.
func (a Address) BaseKey() (key string, tagged bool) {
	l := a.localKey()
	if strings.HasPrefix(l, `"`) {
		return a.Key(), false
	}
	if i := strings.IndexByte(l, '+'); i > 0 {
		return l[:i] + "@" + a.DomainKey(), true
	}
	return a.Key(), false
}

func (a Address) localKey() string {
	l := norm.NFC.String(a.Local)
	if len(l) > 2 && l[0] == '"' {
		if in := l[1 : len(l)-1]; !strings.ContainsAny(in, `\"`) && validLocal(in) {
			l = in
		}
	}
	return strings.ToLower(l)
}
