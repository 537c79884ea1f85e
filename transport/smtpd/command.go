package smtpd

import (
	"strings"

	"posthouse/mesh"
	"posthouse/transport"
)

// verb is a command that we know.
type verb uint8

const (
	verbUnknown verb = iota
	verbHELO
	verbEHLO
	verbMAIL
	verbRCPT
	verbDATA
	verbBDAT
	verbRSET
	verbNOOP
	verbQUIT
	verbVRFY
	verbHELP
	verbSTARTTLS
	verbAUTH
	verbRefused // known and deliberately not implemented
)

// lookup finds the verb; RFC 5321 section 2.4: in any case.
func lookup(word []byte) verb {
	if len(word) > 8 {
		return verbUnknown
	}
	var up [8]byte
	for i, c := range word {
		if c >= 'a' && c <= 'z' {
			c -= 'a' - 'A'
		}
		up[i] = c
	}
	switch string(up[:len(word)]) {
	case "HELO":
		return verbHELO
	case "EHLO":
		return verbEHLO
	case "MAIL":
		return verbMAIL
	case "RCPT":
		return verbRCPT
	case "DATA":
		return verbDATA
	case "BDAT":
		return verbBDAT
	case "RSET":
		return verbRSET
	case "NOOP":
		return verbNOOP
	case "QUIT":
		return verbQUIT
	case "VRFY":
		return verbVRFY
	case "HELP":
		return verbHELP
	case "STARTTLS":
		return verbSTARTTLS
	case "AUTH":
		return verbAUTH
	case "EXPN", "TURN", "ETRN", "ATRN", "SEND", "SOML", "SAML":
		return verbRefused
	}
	return verbUnknown
}

// parseLine splits a command line, without its CRLF, into verb and argument.
// The argument keeps no leading or trailing blanks (RFC 5321 section 4.1.1:
// tolerate trailing white space). It points into line.
func parseLine(line []byte) (verb, []byte) {
	end := len(line)
	for end > 0 && (line[end-1] == ' ' || line[end-1] == '\t') {
		end--
	}
	line = line[:end]
	i := 0
	for i < len(line) && line[i] != ' ' {
		i++
	}
	v := lookup(line[:i])
	for i < len(line) && line[i] == ' ' {
		i++
	}
	return v, line[i:]
}

// Faults of the parser. They are told to the client as they stand.
var (
	faultSenderSyntax = &transport.Fault{Code: 501, Enhanced: "5.1.7", Text: "Bad sender address syntax, use MAIL FROM:<user@example.com>"}
	faultRcptSyntax   = &transport.Fault{Code: 501, Enhanced: "5.1.3", Text: "Bad recipient address syntax, use RCPT TO:<user@example.com>"}
	faultSenderBare   = &transport.Fault{Code: 553, Enhanced: "5.1.7", Text: "Sender address needs a domain"}
	faultRcptBare     = &transport.Fault{Code: 553, Enhanced: "5.1.3", Text: "Recipient address needs a domain"}
	faultTooLongPath  = &transport.Fault{Code: 501, Enhanced: "5.1.3", Text: "Address too long"} // RFC 5321 section 4.5.3.1.10
	faultUTF8         = &transport.Fault{Code: 553, Enhanced: "5.6.7", Text: "Address needs SMTPUTF8; say so in MAIL FROM"}
	faultParamSyntax  = &transport.Fault{Code: 501, Enhanced: "5.5.4", Text: "Bad parameter syntax"}
	faultParamTwice   = &transport.Fault{Code: 501, Enhanced: "5.5.4", Text: "Parameter given twice"}
	faultParamUnknown = &transport.Fault{Code: 555, Enhanced: "5.5.4", Text: "Parameter not recognized or not implemented"}
	faultParamValue   = &transport.Fault{Code: 501, Enhanced: "5.5.4", Text: "Bad parameter value"}
	faultTooBig       = &transport.Fault{Code: 552, Enhanced: "5.3.4", Text: "Message is larger than the limit that EHLO named"}
)

// cutPrefixFold cuts "FROM:" or "TO:" in any case, and blanks after it. RFC
// 5321 section 3.3 forbids these blanks; many scanners and scripts send them,
// and they are harmless.
func cutPrefixFold(arg []byte, prefix string) ([]byte, bool) {
	if len(arg) < len(prefix) || !strings.EqualFold(string(arg[:len(prefix)]), prefix) {
		return nil, false
	}
	arg = arg[len(prefix):]
	for len(arg) > 0 && arg[0] == ' ' {
		arg = arg[1:]
	}
	return arg, true
}

// cutPath cuts "<…>" off s, minding quoted strings, and returns the inside and
// what follows. Nothing but a blank may follow.
func cutPath(s []byte) (inside, rest []byte, ok bool) {
	if len(s) == 0 || s[0] != '<' {
		return nil, nil, false
	}
	quoted := false
	for i := 1; i < len(s); i++ {
		switch c := s[i]; {
		case c < 32 || c == 127:
			return nil, nil, false
		case quoted && c == '\\':
			i++
		case c == '"':
			quoted = !quoted
		case !quoted && c == '<':
			return nil, nil, false
		case !quoted && c == '>':
			rest = s[i+1:]
			if len(rest) > 0 && rest[0] != ' ' {
				return nil, nil, false
			}
			return s[1:i], rest, true
		}
	}
	return nil, nil, false
}

// stripRoute drops a source route. RFC 5321 section 4.1.1.3 and appendix C:
// ignore it, deliver to what follows. What follows is then judged like any
// other address, so that a route never opens a relay.
func stripRoute(path string) (string, bool) {
	if path == "" || path[0] != '@' {
		return path, true
	}
	route, rest, ok := strings.Cut(path, ":")
	if !ok {
		return "", false
	}
	for hop := range strings.SplitSeq(route, ",") {
		if len(hop) < 2 || hop[0] != '@' {
			return "", false
		}
		if _, err := mesh.ParseAddress("x" + hop); err != nil {
			return "", false
		}
	}
	return rest, rest != ""
}

// parseReverse reads the argument of MAIL after "FROM:". A zero address is the
// null sender.
func parseReverse(arg []byte) (a mesh.Address, params []byte, f *transport.Fault) {
	arg, ok := cutPrefixFold(arg, "FROM:")
	if !ok {
		return a, nil, faultSenderSyntax
	}
	inside, params, ok := cutPath(arg)
	if !ok {
		return a, nil, faultSenderSyntax
	}
	if len(inside) == 0 {
		return a, params, nil
	}
	path, ok := stripRoute(string(inside))
	if !ok {
		return a, nil, faultSenderSyntax
	}
	if a, f = parsePath(path, faultSenderSyntax, faultSenderBare); f != nil {
		return mesh.Address{}, nil, f
	}
	return a, params, nil
}

// parseForward reads the argument of RCPT after "TO:".
func parseForward(arg []byte) (a mesh.Address, domainless bool, params []byte, f *transport.Fault) {
	arg, ok := cutPrefixFold(arg, "TO:")
	if !ok {
		return a, false, nil, faultRcptSyntax
	}
	inside, params, ok := cutPath(arg)
	if !ok || len(inside) == 0 {
		return a, false, nil, faultRcptSyntax
	}
	path, ok := stripRoute(string(inside))
	if !ok {
		return a, false, nil, faultRcptSyntax
	}
	// RFC 5321 section 4.1.1.3: <Postmaster>, in any case, without a domain.
	if strings.EqualFold(path, "postmaster") {
		return mesh.Address{Local: path}, true, params, nil
	}
	if a, f = parsePath(path, faultRcptSyntax, faultRcptBare); f != nil {
		return mesh.Address{}, false, nil, f
	}
	return a, false, params, nil
}

func parsePath(path string, syntax, bare *transport.Fault) (mesh.Address, *transport.Fault) {
	a, err := mesh.ParseAddress(path)
	switch {
	case err == nil && a.Domain[0] == '[' && !validLiteral(a.Domain):
		return mesh.Address{}, syntax
	case err == nil:
		return a, nil
	case err == mesh.ErrAddressLength:
		return a, faultTooLongPath
	case strings.IndexByte(path, '@') < 0:
		if _, err := mesh.ParseAddress(path + "@x"); err == nil {
			return a, bare
		}
	}
	return a, syntax
}

// eachParam calls fn for every " KEYWORD[=value]" of RFC 5321 section 4.1.2,
// keyword in upper case. utf8 allows UTF-8 in values (RFC 6531 section 3.3).
func eachParam(params []byte, fn func(key, value string, has bool) *transport.Fault) *transport.Fault {
	var seen [16]string
	n := 0
	for len(params) > 0 {
		if params[0] == ' ' {
			params = params[1:]
			continue
		}
		end := 0
		for end < len(params) && params[end] != ' ' {
			end++
		}
		key, value, has := strings.Cut(string(params[:end]), "=")
		params = params[end:]
		if !validKeyword(key) || has && !validValue(value) {
			return faultParamSyntax
		}
		key = strings.ToUpper(key)
		for _, k := range seen[:n] {
			if k == key {
				return faultParamTwice
			}
		}
		if n == len(seen) {
			return faultParamUnknown // more than there are parameters
		}
		seen[n] = key
		n++
		if f := fn(key, value, has); f != nil {
			return f
		}
	}
	return nil
}

func validKeyword(s string) bool {
	for i := 0; i < len(s); i++ {
		c := s[i]
		alnum := c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9'
		if !alnum && (c != '-' || i == 0) {
			return false
		}
	}
	return s != ""
}

func validValue(s string) bool {
	for i := 0; i < len(s); i++ {
		if c := s[i]; c < 33 || c == '=' || c == 127 {
			return false
		}
	}
	return s != ""
}

// parseMailParams reads the parameters of MAIL. limit is the largest message.
func parseMailParams(params []byte, limit int64, auth bool) (p MailParams, f *transport.Fault) {
	f = eachParam(params, func(key, value string, has bool) *transport.Fault {
		switch key {
		case "SIZE": // RFC 1870
			n, ok := parseSize(value)
			if !ok {
				return faultParamValue
			}
			if n < 0 || n > limit {
				return faultTooBig
			}
			p.Size = n
		case "BODY": // RFC 6152; BINARYMIME is not offered, see DESIGN.md
			switch strings.ToUpper(value) {
			case string(transport.Body7Bit):
				p.Body = transport.Body7Bit
			case string(transport.Body8Bit):
				p.Body = transport.Body8Bit
			default:
				return faultParamUnknown
			}
		case "SMTPUTF8": // RFC 6531 section 3.4: takes no value
			if has {
				return faultParamValue
			}
			p.SMTPUTF8 = true
		case "RET": // RFC 3461 section 4.3
			p.Ret = strings.ToUpper(value)
			if p.Ret != "FULL" && p.Ret != "HDRS" {
				return faultParamValue
			}
		case "ENVID": // RFC 3461 section 4.4
			if len(value) > 100 || !validXtext(value, false) {
				return faultParamValue
			}
			p.EnvID = value
		case "AUTH": // RFC 4954 section 5: accepted where AUTH is, never believed
			if !auth {
				return faultParamUnknown
			}
			if value != "<>" && !validXtext(value, false) {
				return faultParamValue
			}
		default:
			return faultParamUnknown
		}
		return nil
	})
	return p, f
}

// parseSize reads digits of any number; more than an int64 holds is -1.
func parseSize(s string) (int64, bool) {
	if s == "" {
		return 0, false
	}
	var n int64
	for i := 0; i < len(s); i++ {
		c := s[i]
		if c < '0' || c > '9' {
			return 0, false
		}
		if n >= 0 {
			if n > (1<<63-1-9)/10 {
				n = -1
				continue
			}
			n = n*10 + int64(c-'0')
		}
	}
	return n, true
}

// parseRcptParams reads the parameters of RCPT.
func parseRcptParams(params []byte, utf8 bool, r *Rcpt) *transport.Fault {
	return eachParam(params, func(key, value string, has bool) *transport.Fault {
		switch key {
		case "NOTIFY": // RFC 3461 section 4.1
			for word := range strings.SplitSeq(strings.ToUpper(value), ",") {
				var n transport.Notify
				switch word {
				case "NEVER":
					n = transport.NotifyNever
				case "SUCCESS":
					n = transport.NotifySuccess
				case "FAILURE":
					n = transport.NotifyFailure
				case "DELAY":
					n = transport.NotifyDelay
				}
				if n == 0 || r.Notify&n != 0 || r.Notify&transport.NotifyNever != 0 || n == transport.NotifyNever && r.Notify != 0 {
					return faultParamValue
				}
				r.Notify |= n
			}
		case "ORCPT": // RFC 3461 section 4.2
			kind, addr, ok := strings.Cut(value, ";")
			if !ok || len(value) > 500 || !validKeyword(kind) || addr == "" || !validXtext(addr, utf8) {
				return faultParamValue
			}
			r.ORcpt = value
		default:
			return faultParamUnknown
		}
		return nil
	})
}

// validXtext checks RFC 3461 section 4 xtext. A decoded character must be
// printable: what is decoded ends in reports. RFC 6533 section 3 allows UTF-8
// and \x{…} (which is ASCII) where SMTPUTF8 was agreed.
func validXtext(s string, utf8 bool) bool {
	for i := 0; i < len(s); i++ {
		c := s[i]
		switch {
		case c == '+':
			if i+2 >= len(s) {
				return false
			}
			hi, lo := upperHex(s[i+1]), upperHex(s[i+2])
			if hi < 0 || lo < 0 {
				return false
			}
			if v := hi<<4 | lo; v < 32 || v == 127 || v > 127 && !utf8 {
				return false
			}
			i += 2
		case c < 33 || c == '=' || c == 127:
			return false
		case c >= 128 && !utf8:
			return false
		}
	}
	return s != ""
}

// RFC 3461 section 4: hexchar is upper case only.
func upperHex(c byte) int {
	switch {
	case c >= '0' && c <= '9':
		return int(c - '0')
	case c >= 'A' && c <= 'F':
		return int(c-'A') + 10
	}
	return -1
}

// parseBDAT reads "size [LAST]" of RFC 3030 section 2. A size beyond an int64
// is -1.
func parseBDAT(arg []byte) (size int64, last, ok bool) {
	word, rest, more := strings.Cut(string(arg), " ")
	if more {
		if !strings.EqualFold(strings.TrimLeft(rest, " "), "LAST") {
			return 0, false, false
		}
		last = true
	}
	size, ok = parseSize(word)
	return size, last, ok
}
