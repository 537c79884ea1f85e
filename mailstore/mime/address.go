package mime

import (
	"strings"
)

// ParseAddresses reads the address list of a field value as the world writes
// it: groups, comments, routes and obsolete forms of RFC 5322 included. It
// returns at most limit entries; cut says that there were more.
func ParseAddresses(value []byte, limit int) (list []Address, cut bool) {
	p := addressParser{s: unfold(value, len(value)), limit: limit}
	p.run()
	return p.list, p.cut
}

// addressParser goes over the value once. What it has seen of the current
// entry stands in words, local and domain.
type addressParser struct {
	s     string
	pos   int
	limit int
	list  []Address
	cut   bool

	group   bool
	words   strings.Builder // display name, or an address without brackets
	local   strings.Builder
	domain  strings.Builder
	at      bool // an @ was seen outside of brackets
	any     bool // the entry has something
	comment string
}

const addressSpecials = "()<>[]:;@\\,\" \t"

func (p *addressParser) run() {
	for p.pos < len(p.s) {
		if len(p.list) >= p.limit {
			p.cut = true
			return
		}
		switch c := p.s[p.pos]; c {
		case ' ', '\t':
			p.pos++
		case '(':
			p.comment = p.readComment()
		case ',':
			p.pos++
			p.plain()
		case ';':
			p.pos++
			p.plain()
			p.endGroup()
		case ':':
			p.pos++
			if !p.group && !p.at {
				p.group = true
				p.add(Address{Mailbox: p.name()})
			}
			p.reset()
		case '<':
			p.pos++
			p.angle()
		case '@':
			p.pos++
			if p.any && !p.at {
				p.at = true
			} else {
				p.domain.WriteByte('@')
			}
		case '"':
			p.token(p.readQuoted())
		case '[':
			p.token(p.readLiteral())
		case '>', ')', ']', '\\':
			p.pos++
		default:
			p.token(p.readAtom())
		}
	}
	p.plain()
	if p.group {
		p.endGroup()
	}
}

func (p *addressParser) endGroup() {
	if p.group {
		p.group = false
		p.add(Address{})
	}
}

func (p *addressParser) add(a Address) {
	if len(p.list) >= p.limit {
		p.cut = true
		return
	}
	a.Name = clean(truncate(a.Name, MaxValue))
	a.Mailbox = clean(truncate(a.Mailbox, MaxValue))
	a.Host = clean(truncate(a.Host, MaxValue))
	p.list = append(p.list, a)
}

func (p *addressParser) reset() {
	p.words.Reset()
	p.local.Reset()
	p.domain.Reset()
	p.at, p.any, p.comment = false, false, ""
}

// token takes a word of the current entry.
func (p *addressParser) token(t string) {
	p.any = true
	if p.at {
		p.domain.WriteString(t)
		return
	}
	if p.words.Len() > 0 {
		p.words.WriteByte(' ')
	}
	p.words.WriteString(t)
	p.local.WriteString(t)
}

func (p *addressParser) name() string {
	return decodeWords(p.words.String())
}

// plain ends an entry without brackets: "a@b", or words alone.
func (p *addressParser) plain() {
	switch {
	case p.at:
		p.add(Address{Name: decodeWords(p.comment), Mailbox: p.local.String(), Host: orMissing(p.domain.String())})
	case p.any:
		p.add(Address{Name: decodeWords(p.comment), Mailbox: p.name(), Host: MissingDomain})
	}
	p.reset()
}

func orMissing(host string) string {
	if host == "" {
		return MissingDomain
	}
	return host
}

// angle reads what stands between "<" and ">" and then ends the entry.
func (p *addressParser) angle() {
	name := p.name()
	if p.at { // "a@b <c@d>": the display name is an address
		name = p.local.String() + "@" + p.domain.String()
	}
	p.reset()
	for done := false; p.pos < len(p.s) && !done; {
		switch c := p.s[p.pos]; c {
		case '>':
			p.pos++
			done = true
		case ' ', '\t':
			p.pos++
		case '(':
			p.comment = p.readComment()
		case '@':
			p.pos++
			p.at = true
			p.any = true
		case ':', ',':
			p.pos++ // RFC 5322 section 4.4: a route is read and ignored
			if c == ':' || p.at && p.local.Len() == 0 {
				p.reset()
			} else {
				p.token(string(c))
			}
		case '"':
			p.token(p.readQuoted())
		case '[':
			p.token(p.readLiteral())
		case '<', ')', ']', '\\', ';':
			p.pos++
		default:
			p.token(p.readAtom())
		}
	}
	comment := p.comment
	local, domain, any := p.local.String(), p.domain.String(), p.any
	// What follows up to the comma is a comment, or rubbish.
	for p.pos < len(p.s) && p.s[p.pos] != ',' && p.s[p.pos] != ';' {
		switch p.s[p.pos] {
		case '(':
			if c := p.readComment(); comment == "" {
				comment = c
			}
		case '"':
			p.readQuoted()
		default:
			p.pos++
		}
	}
	p.reset()
	if name == "" {
		name = decodeWords(comment)
	}
	if any || name != "" {
		p.add(Address{Name: name, Mailbox: local, Host: orMissing(domain)})
	}
	if p.pos < len(p.s) && p.s[p.pos] == ',' {
		p.pos++
	}
}

// readAtom reads to the next special. An encoded word is taken whole even if
// its sender left specials in it.
func (p *addressParser) readAtom() string {
	start := p.pos
	if strings.HasPrefix(p.s[p.pos:], "=?") {
		if _, _, n := encodedWord(p.s[p.pos:min(len(p.s), p.pos+1024)]); n > 0 {
			p.pos += n
			return p.s[start:p.pos]
		}
	}
	for p.pos < len(p.s) && strings.IndexByte(addressSpecials, p.s[p.pos]) < 0 {
		p.pos++
	}
	return p.s[start:p.pos]
}

func (p *addressParser) readQuoted() string {
	p.pos++
	start := p.pos
	var b []byte // set once something was escaped
	for p.pos < len(p.s) {
		c := p.s[p.pos]
		p.pos++
		switch {
		case c == '"':
			if b != nil {
				return string(b)
			}
			return p.s[start : p.pos-1]
		case c == '\\' && p.pos < len(p.s):
			if b == nil {
				b = append(make([]byte, 0, 64), p.s[start:p.pos-1]...)
			}
			b = append(b, p.s[p.pos])
			p.pos++
		case b != nil:
			b = append(b, c)
		}
	}
	if b != nil {
		return string(b)
	}
	return p.s[start:]
}

func (p *addressParser) readLiteral() string {
	start := p.pos
	for p.pos < len(p.s) {
		p.pos++
		if p.s[p.pos-1] == ']' {
			break
		}
	}
	return p.s[start:p.pos]
}

// readComment reads a comment, which may hold others, and returns its text.
func (p *addressParser) readComment() string {
	depth := 0
	var b strings.Builder
	for p.pos < len(p.s) {
		c := p.s[p.pos]
		p.pos++
		switch {
		case c == '(':
			if depth++; depth == 1 {
				continue
			}
		case c == ')':
			if depth--; depth == 0 {
				return strings.TrimSpace(b.String())
			}
		case c == '\\' && p.pos < len(p.s):
			c = p.s[p.pos]
			p.pos++
		}
		if b.Len() < MaxValue {
			b.WriteByte(c)
		}
	}
	return strings.TrimSpace(b.String())
}

// MessageIDs returns up to limit msg-ids of a Message-ID, In-Reply-To or
// References value, without brackets. Phrases between (RFC 5322 section 4.5.4)
// are left out; a value without any bracket is one id.
func MessageIDs(value []byte, limit int) []string {
	s := unfold(value, rawFactor*MaxValue)
	var ids []string
	for len(ids) < limit {
		i := strings.IndexByte(s, '<')
		if i < 0 {
			break
		}
		j := strings.IndexByte(s[i:], '>')
		if j < 0 {
			break
		}
		if id := clean(strings.TrimSpace(s[i+1 : i+j])); id != "" && len(id) <= 998 {
			ids = append(ids, id)
		}
		s = s[i+j+1:]
	}
	if len(ids) == 0 && limit > 0 {
		if id := clean(strings.Trim(s, "<> \t")); id != "" && len(id) <= 998 && !strings.Contains(id, " ") {
			ids = append(ids, id)
		}
	}
	return ids
}
