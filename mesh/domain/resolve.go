package domain

import (
	"strings"

	"posthouse/mesh"
)

// Resolved says what an address is to this mesh.
type Resolved uint8

// The kinds of Resolution.
const (
	Unknown Resolved = iota // in a domain of ours, but nobody
	Inside                  // leads to one or more recipients
	Outside                 // not in a domain of ours
	TooMany                 // expands deeper than 10 or to more than 10,000
)

// Recipient is one final recipient that an address leads to.
type Recipient struct {
	User        mesh.ID        // zero for one outside
	Mailbox     mesh.MailboxID // zero for one outside
	Home        mesh.NodeID
	HomeVersion uint64
	Address     string // forward-path: the primary address, or the one outside
	// Bounces is the owner of the nearest group on the way that has one, or "".
	Bounces string
	// MembersOnly says that the way leads through a group that takes no mail
	// from senders outside the mesh.
	MembersOnly bool
}

// Resolution is the answer to: where does mail for this address go.
type Resolution struct {
	Kind Resolved
	// Recipients has each mailbox, and each outside address, once. Empty for an
	// empty group.
	Recipients []Recipient
	// Detail is the "+tag" that was cut to find the address, without the plus.
	Detail string
	// Expanded is true when the address is a group, or an alias of more than one
	// recipient: RFC 3461 section 5.2.7 has rules of its own for those.
	Expanded bool
	// Owner is the owner of the addressed group, or "". Groups further in may
	// have others: Recipient.Bounces has the nearest.
	Owner string
	// MembersOnly is true when no recipient may be reached by a sender from
	// outside the mesh: refuse such a one with 550 5.7.1.
	MembersOnly bool
}

// MaxDepth is how many aliases and groups may stand inside one another;
// MaxMembers bounds the recipients of an expansion too.
const MaxDepth = 10

// Resolve answers by the order of the domain state: user, alias, group, the
// same without tag, postmaster and abuse, unknown. Names are unique over users,
// aliases and groups, so that the first three are one look-up. There is no
// catch-all. The bare <Postmaster> (empty Domain) resolves too (RFC 5321
// section 4.5.1). An address outside of our domains is Outside.
func (m *Machine) Resolve(a mesh.Address) Resolution {
	m.mu.RLock()
	defer m.mu.RUnlock()
	s := m.s
	if a.Domain == "" {
		if strings.EqualFold(a.Local, "postmaster") {
			return s.postmaster(nil)
		}
		return Resolution{Kind: Unknown}
	}
	key := a.Key()
	at := strings.LastIndexByte(key, '@')
	d := s.domainNames[key[at+1:]]
	if d == nil {
		return Resolution{Kind: Outside}
	}
	key = s.canonicalKey(key)
	if r, ok := s.names[key]; ok {
		return s.expand(r)
	}
	if base, tagged := a.BaseKey(); tagged {
		if r, ok := s.names[s.canonicalKey(base)]; ok {
			res := s.expand(r)
			res.Detail = a.Local[strings.IndexByte(a.Local, '+')+1:]
			return res
		}
		key = s.canonicalKey(base)
	}
	switch key[:strings.LastIndexByte(key, '@')] {
	case "postmaster", "abuse": // RFC 5321 section 4.5.1, RFC 2142 section 2
		return s.postmaster(d)
	}
	return Resolution{Kind: Unknown}
}

// postmaster resolves to the first of: the domain's, the mesh's, the
// administrator with the lowest id. A founded mesh has one of them.
func (s *state) postmaster(d *Domain) Resolution {
	ids := []mesh.ID{s.settings.Postmaster}
	if d != nil {
		ids = []mesh.ID{d.Postmaster, s.settings.Postmaster}
	}
	for _, id := range ids {
		if s.users[id] != nil {
			return s.expand(ref{refUser, id})
		}
		if s.groups[id] != nil {
			// Its own rules are not asked: a postmaster hears everybody.
			r := s.expand(ref{refGroup, id})
			r.MembersOnly = false
			for i := range r.Recipients {
				r.Recipients[i].MembersOnly = false
			}
			if r.Kind == Inside && len(r.Recipients) > 0 {
				return r
			}
		}
	}
	var admin *User
	for _, u := range s.users {
		if u.Role == RoleMeshAdmin && (admin == nil || string(u.ID[:]) < string(admin.ID[:])) {
			admin = u
		}
	}
	if admin == nil {
		return Resolution{Kind: Unknown}
	}
	return s.expand(ref{refUser, admin.ID})
}

func (u *User) recipient() Recipient {
	return Recipient{User: u.ID, Mailbox: u.Mailbox, Home: u.Home, HomeVersion: u.HomeVersion, Address: u.Address}
}

func (s *state) expand(r ref) Resolution {
	if r.what == refUser {
		return Resolution{Kind: Inside, Recipients: []Recipient{s.users[r.id].recipient()}}
	}
	x := expansion{s: s, seen: map[visit]bool{}, places: map[string]int{}}
	x.follow(r, 0, way{})
	if x.over {
		return Resolution{Kind: TooMany, Expanded: true}
	}
	res := Resolution{Kind: Inside, Recipients: x.out, Expanded: r.what == refGroup || len(x.out) != 1, MembersOnly: x.closed && len(x.out) == 0}
	if r.what == refGroup {
		res.Owner = s.groups[r.id].Owner
	}
	for i := range x.out {
		if res.MembersOnly = x.out[i].MembersOnly; !res.MembersOnly {
			break
		}
	}
	return res
}

// way is what a path through aliases and groups hands down to its recipients.
type way struct {
	bounces string
	// decided: the first group on the path said whom it takes mail from; a group
	// inside it gets mail from that group, not from the sender.
	decided, closed bool
}

// visit is a group or alias reached by a way of that kind.
type visit struct {
	ref             ref
	decided, closed bool
}

type expansion struct {
	s      *state
	seen   map[visit]bool
	places map[string]int // recipient key → place in out
	out    []Recipient
	closed bool
	over   bool
}

func (x *expansion) follow(r ref, depth int, w way) {
	if x.over {
		return
	}
	if r.what == refUser {
		x.add(x.s.users[r.id].recipient(), x.s.users[r.id].Mailbox.String(), w)
		return
	}
	if v := (visit{r, w.decided, w.closed}); x.seen[v] {
		return // a loop, or a second way to the same members
	} else {
		x.seen[v] = true
	}
	if depth >= MaxDepth {
		x.over = true
		return
	}
	var targets []Target
	if r.what == refGroup {
		g := x.s.groups[r.id]
		targets = g.Members
		if g.Owner != "" {
			w.bounces = g.Owner
		}
		if !w.decided {
			w.decided, w.closed = true, !g.Outside
			x.closed = x.closed || w.closed
		}
	} else {
		targets = x.s.aliases[r.id].Targets
	}
	for _, t := range targets {
		switch {
		case t.Address != "":
			x.address(t.Address, depth+1, w)
		case x.s.users[t.ID] != nil:
			x.follow(ref{refUser, t.ID}, depth+1, w)
		case x.s.groups[t.ID] != nil:
			x.follow(ref{refGroup, t.ID}, depth+1, w)
		}
	}
}

// address follows a target that was given as an address: one of ours, or one
// outside. One of ours that is nobody by now is left out.
func (x *expansion) address(address string, depth int, w way) {
	a, err := mesh.ParseAddress(address)
	if err != nil {
		return
	}
	key := a.Key()
	if x.s.domainNames[a.DomainKey()] == nil {
		x.add(Recipient{Address: address}, key, w)
		return
	}
	if r, ok := x.s.names[x.s.canonicalKey(key)]; ok {
		x.follow(r, depth, w)
		return
	}
	if base, tagged := a.BaseKey(); tagged {
		if r, ok := x.s.names[x.s.canonicalKey(base)]; ok {
			x.follow(r, depth, w)
		}
	}
}

func (x *expansion) add(r Recipient, key string, w way) {
	r.Bounces, r.MembersOnly = w.bounces, w.closed
	if i, ok := x.places[key]; ok {
		if !r.MembersOnly { // reached by an open way too
			x.out[i].MembersOnly = false
		}
		return
	}
	if len(x.out) >= MaxMembers {
		x.over = true
		return
	}
	x.places[key] = len(x.out)
	x.out = append(x.out, r)
}

// MaySend reports whether a user may use address as envelope sender or in From
// and Sender: a primary address, an alias, a sub-address of these, an address
// under another name of the domain, or a send-as right.
func (m *Machine) MaySend(user mesh.ID, a mesh.Address) bool {
	m.mu.RLock()
	defer m.mu.RUnlock()
	u := m.s.users[user]
	if u == nil || a.Domain == "" {
		return false
	}
	if m.s.maySend(u, m.s.canonicalKey(a.Key())) {
		return true
	}
	base, tagged := a.BaseKey()
	return tagged && m.s.maySend(u, m.s.canonicalKey(base))
}

func (s *state) maySend(u *User, key string) bool {
	mine := ref{refUser, u.ID}
	switch r := s.names[key]; {
	case r == mine:
		return true
	case r.what == refAlias:
		// An alias that stands for this user alone is as good as an address of
		// the user's own; one that others read too needs a send-as right.
		if t := s.aliases[r.id].Targets; len(t) == 1 && (t[0].ID == u.ID || t[0].Address != "" && s.names[s.canonical(t[0].Address)] == mine) {
			return true
		}
	}
	for _, a := range u.SendAs {
		if s.canonical(a) == key {
			return true
		}
	}
	return false
}

// Home returns where a mailbox lives, and the version of that belief.
func (m *Machine) Home(id mesh.MailboxID) (home mesh.NodeID, version uint64, ok bool) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	u := m.s.users[m.s.mailboxes[id]]
	if u == nil {
		return 0, 0, false
	}
	return u.Home, u.HomeVersion, true
}

// IsLocalDomain reports whether name is one of our domains, under any of their
// names.
func (m *Machine) IsLocalDomain(name string) bool {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return m.s.domainNames[mesh.DomainKey(name)] != nil
}

// Login finds the user that a client means by name: any address of a user, or
// a bare local part if it names one user over all domains.
func (m *Machine) Login(name string) (*User, bool) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	s := m.s
	if strings.IndexByte(name, '@') >= 0 {
		return s.userAt(s.canonical(name))
	}
	var found *User
	for _, d := range s.domains {
		if u, ok := s.userAt(s.canonical(name + "@" + d.Name)); ok {
			if found != nil && found != u {
				return nil, false
			}
			found = u
		}
	}
	return found, found != nil
}

func (s *state) userAt(key string) (*User, bool) {
	r, ok := s.names[key]
	if !ok || r.what != refUser {
		return nil, false
	}
	return s.users[r.id], true
}
