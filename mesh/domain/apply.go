package domain

import (
	"cmp"
	"errors"
	"fmt"
	"strings"

	"golang.org/x/text/unicode/norm"

	"posthouse/mesh"
)

func isMalformed(err error) bool { return errors.Is(err, ErrMalformed) }

// run applies one decoded command, or notes a malformed one.
func (s *state) run(c *Command, malformed error) Result {
	if malformed != nil {
		// The master never proposes one: but if it stands in the log, every
		// node must answer it alike.
		return Result{Code: Invalid, Text: "the command is malformed", Index: s.index}
	}
	if i, ok := s.results[c.ID]; ok {
		return s.journal[i].Res
	}
	r := c.Body.check()
	if c.Seal != nil {
		r = first(r, c.Seal.check())
	}
	var line string
	if r.Code == OK {
		if _, founding := c.Body.(*Found); len(s.lineages) == 0 && !founding {
			r = no(NotFounded, "this mesh has not been founded yet")
		} else {
			r, line = c.Body.apply(s, c)
		}
	}
	switch {
	case r.Code != OK:
		s.changed = 0
		line = c.Body.kind().String()
	case c.Seal != nil:
		s.reseal(c.Seal)
	}
	r.Index = s.index
	s.note(Entry{Index: s.index, Term: s.term, At: c.At, ID: c.ID, Actor: c.Actor, Via: c.Via, Kind: c.Body.kind(), Text: line, Res: r})
	return r
}

// note adds a line to the journal, dropping the oldest when it is full.
func (s *state) note(e Entry) {
	if len(s.journal) < JournalSize {
		s.results[e.ID] = len(s.journal)
		s.journal = append(s.journal, e)
		return
	}
	delete(s.results, s.journal[s.oldest].ID)
	s.results[e.ID] = s.oldest
	s.journal[s.oldest] = e
	s.oldest = (s.oldest + 1) % len(s.journal)
}

// canonical returns the key under which an address is looked up: its Key with
// the domain's first name in place of any other name of that domain.
func (s *state) canonical(address string) string {
	a, err := mesh.ParseAddress(address)
	if err != nil {
		return ""
	}
	return s.canonicalKey(a.Key())
}

func (s *state) canonicalKey(key string) string {
	at := strings.LastIndexByte(key, '@')
	if d := s.domainNames[key[at+1:]]; d != nil {
		if first := mesh.DomainKey(d.Name); first != key[at+1:] {
			return key[:at+1] + first
		}
	}
	return key
}

// local reports whether the address is in one of our domains.
func (s *state) local(address string) bool {
	at := strings.LastIndexByte(address, '@')
	return at >= 0 && s.domainNames[mesh.DomainKey(address[at+1:])] != nil
}

// claim checks that every address is a local one that nobody but owner has.
func (s *state) claim(owner ref, address string, more []string) Result {
	seen := make(map[string]bool, 1+len(more))
	for i := -1; i < len(more); i++ {
		a := address
		if i >= 0 {
			a = more[i]
		}
		if !s.local(a) {
			return no(Invalid, "%s is not in a domain of this mesh", a)
		}
		k := s.canonical(a)
		if seen[k] {
			return no(Invalid, "%s is given twice", a)
		}
		seen[k] = true
		if r, ok := s.names[k]; ok && r != owner {
			return no(NameTaken, "%s is taken by %s", a, s.describe(r))
		}
	}
	return Result{}
}

func (s *state) describe(r ref) string {
	switch r.what {
	case refUser:
		return "user " + cmp.Or(s.users[r.id].Name, s.users[r.id].Address)
	case refGroup:
		return "group " + s.groups[r.id].Address
	default:
		return "alias " + s.aliases[r.id].Address
	}
}

// target reports whether t leads to something: a user or group that exists, or
// any address.
func (s *state) target(t Target) Result {
	if !t.ID.IsZero() && s.users[t.ID] == nil && s.groups[t.ID] == nil {
		return no(NotFound, "member %s is neither a user nor a group", t.ID)
	}
	return Result{}
}

// used names something that points to the user or group id, or returns "".
func (s *state) used(id mesh.ID) string {
	if s.settings.Postmaster == id {
		return "the postmaster of the mesh"
	}
	name := "" // the first by name: the sentence is part of the state
	for _, d := range s.domains {
		if d.Postmaster == id && (name == "" || d.Name < name) {
			name = d.Name
		}
	}
	if name == "" {
		return ""
	}
	return "the postmaster of " + name
}

// forget takes id out of every group and alias that lists it. An alias that
// would be left without a target goes too.
func (s *state) forget(id mesh.ID) {
	for _, g := range s.groups {
		if rest, had := without(g.Members, id); had {
			n := *g
			n.Members = rest
			s.groups[g.ID] = &n
			s.changed |= Groups
		}
	}
	for _, a := range s.aliases {
		rest, had := without(a.Targets, id)
		switch {
		case !had:
			continue
		case len(rest) == 0:
			s.leave(a.Address, nil)
			delete(s.aliases, a.ID)
		default:
			n := *a
			n.Targets = rest
			s.aliases[a.ID] = &n
		}
		s.changed |= Aliases
	}
}

func without(ts []Target, id mesh.ID) (rest []Target, had bool) {
	for i, t := range ts {
		if t.ID == id {
			if !had {
				rest, had = append(rest, ts[:i]...), true
			}
		} else if had {
			rest = append(rest, t)
		}
	}
	return rest, had
}

// Checks of single values.

// Limits of what the state takes, so that one careless command cannot fill it.
const (
	MaxUsers     = 100_000
	MaxGroups    = 20_000
	MaxAliases   = 50_000
	MaxDomains   = 1_000
	MaxNodes     = 1_000
	MaxTokens    = 1_000
	MaxPending   = 100
	MaxRules     = 1_000
	MaxMembers   = 10_000
	maxPerObject = 200 // aliases of a user, senders of a rule, addresses of a node
	maxVerifier  = 4096
)

func checkText(what, s string, max int) Result {
	if len(s) > max {
		return no(Invalid, "%s is longer than %d bytes", what, max)
	}
	for _, r := range s {
		if r < 32 || r >= 0x7f && r < 0xa0 || r == 0x2028 || r == 0x2029 {
			return no(Invalid, "%s holds control characters", what)
		}
	}
	return Result{}
}

func checkAddress(what, s string) Result {
	a, err := mesh.ParseAddress(s)
	if err != nil || strings.HasPrefix(a.Domain, "[") {
		return no(Invalid, "%s %.80q is not a mail address", what, s)
	}
	return Result{}
}

func checkAddresses(what string, list []string) Result {
	if len(list) > maxPerObject {
		return no(Invalid, "more than %d of %s", maxPerObject, what)
	}
	for _, s := range list {
		if r := checkAddress(what, s); r.Code != OK {
			return r
		}
	}
	return Result{}
}

func checkTargets(list []Target) Result {
	if len(list) > MaxMembers {
		return no(Invalid, "more than %d members", MaxMembers)
	}
	for _, t := range list {
		if t.ID.IsZero() == (t.Address == "") {
			return no(Invalid, "a member is either a user or group, or an address")
		}
		if t.Address != "" {
			if r := checkAddress("member", t.Address); r.Code != OK {
				return r
			}
		}
	}
	return Result{}
}

func checkID(what string, id mesh.ID) Result {
	if id.IsZero() {
		return no(Invalid, "%s has no id", what)
	}
	return Result{}
}

// checkNodeName takes a DNS label: names stand in Received lines and folders.
func checkNodeName(s string) Result {
	if s == "" || len(s) > 63 || s[0] == '-' || s[len(s)-1] == '-' {
		return no(Invalid, "node name %.80q: use letters, digits and inner hyphens, at most 63", s)
	}
	for i := 0; i < len(s); i++ {
		if c := s[i]; c != '-' && (c < '0' || c > '9') && (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') {
			return no(Invalid, "node name %.80q: use letters, digits and inner hyphens, at most 63", s)
		}
	}
	return Result{}
}

func checkEndpoints(list []string) Result {
	if len(list) > maxPerObject {
		return no(Invalid, "more than %d addresses of a node", maxPerObject)
	}
	for _, s := range list {
		i := strings.LastIndexByte(s, ':')
		if i < 1 || i == len(s)-1 || strings.ContainsAny(s, " /@") {
			return no(Invalid, "node address %.80q: want host:port", s)
		}
		if r := checkText("node address", s, 300); r.Code != OK {
			return r
		}
	}
	return Result{}
}

func checkHost(what, s string) Result {
	if s == "" {
		return Result{}
	}
	if _, err := mesh.ParseAddress("x@" + s); err != nil || strings.HasPrefix(s, "[") {
		return no(Invalid, "%s %.80q is not a host name", what, s)
	}
	return Result{}
}

// first returns the first of the results that is not OK.
func first(rs ...Result) Result {
	for _, r := range rs {
		if r.Code != OK {
			return r
		}
	}
	return Result{}
}

func foldName(s string) string { return strings.ToLower(norm.NFC.String(s)) }

func yesNo(b bool, yes, no string) string {
	if b {
		return yes
	}
	return no
}

func plural(n int, one string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %ss", n, one)
}
