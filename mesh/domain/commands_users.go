package domain

import (
	"fmt"
	"slices"
	"strings"

	"posthouse/mesh"
)

func checkUser(u *User) Result {
	if u.Mailbox.IsZero() || u.Home == 0 {
		return no(Invalid, "a user needs a mailbox id and a home")
	}
	if u.Role >= roleEnd || u.Quota < 0 {
		return no(Invalid, "user %.80q: role or quota out of range", u.Address)
	}
	if u.Verifier != nil {
		if r := u.Verifier.check("the password", maxVerifier, true); r.Code != OK {
			return r
		}
	}
	return first(checkID("the user", u.ID), checkAddress("address", u.Address), checkAddresses("aliases", u.Aliases),
		checkText("name", u.Name, 200), checkAddresses("send-as addresses", u.SendAs))
}

// CreateUser makes a user with an empty mailbox at User.Home. HomeVersion,
// CredVersion and Created are set by the machine.
type CreateUser struct {
	User User `cbor:"1,keyasint"`
}

func (*CreateUser) kind() Kind      { return KindCreateUser }
func (b *CreateUser) check() Result { return checkUser(&b.User) }

func (b *CreateUser) apply(s *state, c *Command) (Result, string) {
	u := b.User
	if s.known(u.ID) {
		return no(Conflict, "that id is in use"), ""
	}
	if _, taken := s.mailboxes[u.Mailbox]; taken {
		return no(Conflict, "that mailbox is somebody else's"), ""
	}
	if len(s.users) >= MaxUsers {
		return no(Limit, "more than %d users", MaxUsers), ""
	}
	if n := s.nodes[u.Home]; n == nil || !n.Member() {
		return no(NotFound, "node %s is not a member that could be home", u.Home), ""
	}
	r := ref{refUser, u.ID}
	if res := s.claim(r, u.Address, u.Aliases); res.Code != OK {
		return res, ""
	}
	u.HomeVersion, u.CredVersion, u.Created = 1, 0, c.At
	if u.Verifier != nil {
		if res := s.fits(u.Verifier, u.Home); res.Code != OK {
			return res, ""
		}
		u.CredVersion = 1
	}
	s.users[u.ID] = &u
	s.mailboxes[u.Mailbox] = u.ID
	s.enter(r, u.Address, u.Aliases)
	s.changed |= Users
	return Result{}, fmt.Sprintf("created user %s at %s", u.Address, s.nodes[u.Home].Name)
}

func (s *state) known(id mesh.ID) bool {
	return s.users[id] != nil || s.groups[id] != nil || s.aliases[id] != nil || s.domains[id] != nil
}

// UpdateUser changes what is not nil. Mailbox, home and password have their
// own commands or never change.
type UpdateUser struct {
	User     mesh.ID   `cbor:"1,keyasint"`
	Address  *string   `cbor:"2,keyasint,omitempty"`
	Aliases  *[]string `cbor:"3,keyasint,omitempty"`
	Name     *string   `cbor:"4,keyasint,omitempty"`
	Role     *Role     `cbor:"5,keyasint,omitempty"`
	SendAs   *[]string `cbor:"6,keyasint,omitempty"`
	Disabled *bool     `cbor:"7,keyasint,omitempty"`
	Quota    *int64    `cbor:"8,keyasint,omitempty"`
}

func (*UpdateUser) kind() Kind { return KindUpdateUser }

func (b *UpdateUser) check() (r Result) {
	if b.Address != nil {
		r = first(r, checkAddress("address", *b.Address))
	}
	if b.Aliases != nil {
		r = first(r, checkAddresses("aliases", *b.Aliases))
	}
	if b.Name != nil {
		r = first(r, checkText("name", *b.Name, 200))
	}
	if b.SendAs != nil {
		r = first(r, checkAddresses("send-as addresses", *b.SendAs))
	}
	if b.Role != nil && *b.Role >= roleEnd || b.Quota != nil && *b.Quota < 0 {
		r = first(r, no(Invalid, "role or quota out of range"))
	}
	return r
}

func (b *UpdateUser) apply(s *state, c *Command) (Result, string) {
	old := s.users[b.User]
	if old == nil {
		return no(NotFound, "no such user"), ""
	}
	u := *old
	set(&u.Address, b.Address)
	set(&u.Aliases, b.Aliases)
	set(&u.Name, b.Name)
	set(&u.Role, b.Role)
	set(&u.SendAs, b.SendAs)
	set(&u.Disabled, b.Disabled)
	set(&u.Quota, b.Quota)
	r := ref{refUser, u.ID}
	if res := s.claim(r, u.Address, u.Aliases); res.Code != OK {
		return res, ""
	}
	if s.lastAdmin(old) && (u.Role != RoleMeshAdmin || u.Disabled) {
		return no(InUse, "%s is the last mesh administrator", u.Address), ""
	}
	s.leave(old.Address, old.Aliases)
	s.enter(r, u.Address, u.Aliases)
	s.users[u.ID] = &u
	s.changed |= Users
	return Result{}, "changed user " + u.Address
}

// lastAdmin reports whether u is the only one left who may change the mesh.
func (s *state) lastAdmin(u *User) bool {
	if u.Role != RoleMeshAdmin || u.Disabled {
		return false
	}
	for _, o := range s.users {
		if o.ID != u.ID && o.Role == RoleMeshAdmin && !o.Disabled {
			return false
		}
	}
	return true
}

// DeleteUser removes a user from the state; what becomes of the mailbox is its
// home's affair. Groups and aliases forget the user.
type DeleteUser struct {
	User mesh.ID `cbor:"1,keyasint"`
}

func (*DeleteUser) kind() Kind    { return KindDeleteUser }
func (*DeleteUser) check() Result { return Result{} }

func (b *DeleteUser) apply(s *state, c *Command) (Result, string) {
	u := s.users[b.User]
	if u == nil {
		return no(NotFound, "no such user"), ""
	}
	if s.lastAdmin(u) {
		return no(InUse, "%s is the last mesh administrator", u.Address), ""
	}
	if by := s.used(u.ID); by != "" {
		return no(InUse, "%s is %s; name another one first", u.Address, by), ""
	}
	s.forget(u.ID)
	s.leave(u.Address, u.Aliases)
	delete(s.mailboxes, u.Mailbox)
	delete(s.users, u.ID)
	s.changed |= Users | Homes
	return Result{}, "deleted user " + u.Address
}

// SetPassword replaces the verifier; a nil one locks password login.
type SetPassword struct {
	User     mesh.ID `cbor:"1,keyasint"`
	Verifier *Sealed `cbor:"2,keyasint,omitempty"`
	// IfVersion, when not 0, is the CredVersion that is to be replaced.
	IfVersion uint64 `cbor:"4,keyasint,omitempty"`
}

func (*SetPassword) kind() Kind { return KindSetPassword }

func (b *SetPassword) check() Result {
	if b.Verifier == nil {
		return Result{}
	}
	return b.Verifier.check("the password", maxVerifier, true)
}

func (b *SetPassword) apply(s *state, c *Command) (Result, string) {
	old := s.users[b.User]
	if old == nil {
		return no(NotFound, "no such user"), ""
	}
	if b.IfVersion != 0 && b.IfVersion != old.CredVersion {
		return no(Conflict, "the password of %s was changed meanwhile", old.Address), ""
	}
	if b.Verifier != nil {
		if r := s.fits(b.Verifier, old.Home); r.Code != OK {
			return r, ""
		}
	}
	u := *old
	u.Verifier = b.Verifier
	u.CredVersion++
	s.users[u.ID] = &u
	s.changed |= Users
	return Result{}, "set the password of " + u.Address
}

// SetHome points a mailbox to another node: HomeVersion + 1.
type SetHome struct {
	User      mesh.ID     `cbor:"1,keyasint"`
	Home      mesh.NodeID `cbor:"2,keyasint"`
	IfVersion uint64      `cbor:"3,keyasint,omitempty"` // 0: whatever it is now
}

func (*SetHome) kind() Kind    { return KindSetHome }
func (*SetHome) check() Result { return Result{} }

func (b *SetHome) apply(s *state, c *Command) (Result, string) {
	old := s.users[b.User]
	if old == nil {
		return no(NotFound, "no such user"), ""
	}
	if b.IfVersion != 0 && b.IfVersion != old.HomeVersion {
		return no(Conflict, "%s was moved meanwhile", old.Address), ""
	}
	n := s.nodes[b.Home]
	if n == nil || !n.Member() {
		return no(NotFound, "node %s is not a member that could be home", b.Home), ""
	}
	u := *old
	u.Home, u.HomeVersion = b.Home, old.HomeVersion+1
	s.users[u.ID] = &u
	s.changed |= Users | Homes
	return Result{}, fmt.Sprintf("%s is at home at %s", u.Address, n.Name)
}

// PutGroup makes a group or replaces it as a whole.
type PutGroup struct {
	Group Group `cbor:"1,keyasint"`
}

func (*PutGroup) kind() Kind { return KindPutGroup }

func (b *PutGroup) check() Result {
	g := &b.Group
	r := first(checkID("the group", g.ID), checkAddress("address", g.Address), checkAddresses("aliases", g.Aliases),
		checkText("name", g.Name, 200), checkTargets(g.Members))
	if g.Owner != "" {
		r = first(r, checkAddress("owner", g.Owner))
	}
	return r
}

func (b *PutGroup) apply(s *state, c *Command) (Result, string) {
	g := b.Group
	old := s.groups[g.ID]
	if old == nil && s.known(g.ID) {
		return no(Conflict, "that id is in use"), ""
	}
	if old == nil && len(s.groups) >= MaxGroups {
		return no(Limit, "more than %d groups", MaxGroups), ""
	}
	r := ref{refGroup, g.ID}
	if res := s.claim(r, g.Address, g.Aliases); res.Code != OK {
		return res, ""
	}
	for _, t := range g.Members {
		if t.ID == g.ID {
			return no(Invalid, "group %s cannot be its own member", g.Address), ""
		}
		if res := s.target(t); res.Code != OK {
			return res, ""
		}
	}
	if old != nil {
		s.leave(old.Address, old.Aliases)
	}
	s.enter(r, g.Address, g.Aliases)
	s.groups[g.ID] = &g
	s.changed |= Groups
	return Result{}, fmt.Sprintf("%s group %s, %s", yesNo(old == nil, "made", "changed"), g.Address, plural(len(g.Members), "member"))
}

// DeleteGroup removes a group; other groups and aliases forget it.
type DeleteGroup struct {
	ID mesh.ID `cbor:"1,keyasint"`
}

func (*DeleteGroup) kind() Kind    { return KindDeleteGroup }
func (*DeleteGroup) check() Result { return Result{} }

func (b *DeleteGroup) apply(s *state, c *Command) (Result, string) {
	g := s.groups[b.ID]
	if g == nil {
		return no(NotFound, "no such group"), ""
	}
	if by := s.used(g.ID); by != "" {
		return no(InUse, "%s is %s; name another one first", g.Address, by), ""
	}
	s.forget(g.ID)
	s.leave(g.Address, g.Aliases)
	delete(s.groups, g.ID)
	s.changed |= Groups
	return Result{}, "deleted group " + g.Address
}

// PutAlias makes an alias or replaces it as a whole.
type PutAlias struct {
	Alias Alias `cbor:"1,keyasint"`
}

func (*PutAlias) kind() Kind { return KindPutAlias }

func (b *PutAlias) check() Result {
	if len(b.Alias.Targets) == 0 {
		return no(Invalid, "an alias needs a target")
	}
	return first(checkID("the alias", b.Alias.ID), checkAddress("address", b.Alias.Address), checkTargets(b.Alias.Targets))
}

func (b *PutAlias) apply(s *state, c *Command) (Result, string) {
	a := b.Alias
	old := s.aliases[a.ID]
	if old == nil && s.known(a.ID) {
		return no(Conflict, "that id is in use"), ""
	}
	if old == nil && len(s.aliases) >= MaxAliases {
		return no(Limit, "more than %d aliases", MaxAliases), ""
	}
	r := ref{refAlias, a.ID}
	if res := s.claim(r, a.Address, nil); res.Code != OK {
		return res, ""
	}
	for _, t := range a.Targets {
		if res := s.target(t); res.Code != OK {
			return res, ""
		}
	}
	if old != nil {
		s.leave(old.Address, nil)
	}
	s.enter(r, a.Address, nil)
	s.aliases[a.ID] = &a
	s.changed |= Aliases
	return Result{}, fmt.Sprintf("%s alias %s", yesNo(old == nil, "made", "changed"), a.Address)
}

// DeleteAlias removes an alias.
type DeleteAlias struct {
	ID mesh.ID `cbor:"1,keyasint"`
}

func (*DeleteAlias) kind() Kind    { return KindDeleteAlias }
func (*DeleteAlias) check() Result { return Result{} }

func (b *DeleteAlias) apply(s *state, c *Command) (Result, string) {
	a := s.aliases[b.ID]
	if a == nil {
		return no(NotFound, "no such alias"), ""
	}
	s.leave(a.Address, nil)
	delete(s.aliases, a.ID)
	s.changed |= Aliases
	return Result{}, "deleted alias " + a.Address
}

// PutDomain makes a domain, or changes one: another Name is a rename, which
// rewrites the addresses under the old name and keeps the old name as an alias.
type PutDomain struct {
	Domain Domain `cbor:"1,keyasint"`
}

func (*PutDomain) kind() Kind { return KindPutDomain }

func (b *PutDomain) check() (r Result) {
	d := &b.Domain
	r = first(checkID("the domain", d.ID), checkHost("domain", d.Name))
	if d.Name == "" || len(d.Aliases) > maxPerObject {
		r = first(r, no(Invalid, "a domain needs a name, and at most %d others", maxPerObject))
	}
	for _, a := range d.Aliases {
		if r = first(r, checkHost("domain", a)); a == "" {
			r = first(r, no(Invalid, "a domain's other name is empty"))
		}
	}
	return r
}

func (b *PutDomain) apply(s *state, c *Command) (Result, string) {
	d := b.Domain
	d.Aliases = slices.Clone(d.Aliases)
	old := s.domains[d.ID]
	if old == nil && s.known(d.ID) {
		return no(Conflict, "that id is in use"), ""
	}
	if old == nil && len(s.domains) >= MaxDomains {
		return no(Limit, "more than %d domains", MaxDomains), ""
	}
	if res := s.target(Target{ID: d.Postmaster}); res.Code != OK {
		return res, ""
	}
	renamed := old != nil && mesh.DomainKey(old.Name) != mesh.DomainKey(d.Name)
	if renamed { // the old name keeps working
		key := mesh.DomainKey(old.Name)
		if !slices.ContainsFunc(d.Aliases, func(a string) bool { return mesh.DomainKey(a) == key }) {
			d.Aliases = append(d.Aliases, old.Name)
		}
	}
	keys := map[string]bool{mesh.DomainKey(d.Name): true}
	for _, a := range d.Aliases {
		k := mesh.DomainKey(a)
		if keys[k] {
			return no(Invalid, "%s is named twice", a), ""
		}
		keys[k] = true
	}
	for k := range keys {
		if o := s.domainNames[k]; o != nil && o.ID != d.ID {
			return no(NameTaken, "a name is taken by domain %s", s.lowestTaken(keys, d.ID)), ""
		}
	}
	if old != nil {
		for k, o := range s.domainNames {
			if o.ID == d.ID && !keys[k] && s.addressUnder(k) {
				return no(InUse, "addresses still end in a name that would go"), ""
			}
		}
	}
	s.domains[d.ID] = &d
	if renamed {
		s.rename(mesh.DomainKey(old.Name), d.Name)
	}
	if old == nil && len(s.domainNames) > 0 {
		for k := range keys { // a new domain moves nobody's look-up key
			s.domainNames[k] = &d
		}
	} else {
		s.rebuild()
	}
	s.changed |= Domains
	return Result{}, fmt.Sprintf("%s domain %s", yesNo(old == nil, "made", yesNo(renamed, "renamed to", "changed")), d.Name)
}

// lowestTaken names the domain that holds the first of the keys in their order.
func (s *state) lowestTaken(keys map[string]bool, except mesh.ID) string {
	sorted := make([]string, 0, len(keys))
	for k := range keys {
		sorted = append(sorted, k)
	}
	slices.Sort(sorted)
	for _, k := range sorted {
		if o := s.domainNames[k]; o != nil && o.ID != except {
			return o.Name
		}
	}
	return ""
}

// addressUnder reports whether any address of ours ends in the domain key.
func (s *state) addressUnder(key string) bool {
	under := func(a string) bool { return mesh.DomainKey(a[strings.LastIndexByte(a, '@')+1:]) == key }
	for _, u := range s.users {
		if under(u.Address) || slices.ContainsFunc(u.Aliases, under) {
			return true
		}
	}
	for _, g := range s.groups {
		if under(g.Address) || slices.ContainsFunc(g.Aliases, under) {
			return true
		}
	}
	for _, a := range s.aliases {
		if under(a.Address) {
			return true
		}
	}
	return false
}

// rename rewrites the addresses that end in the domain key from.
func (s *state) rename(from, to string) {
	one := func(a string) string {
		at := strings.LastIndexByte(a, '@')
		if mesh.DomainKey(a[at+1:]) != from {
			return a
		}
		if n := a[:at+1] + to; len(n) <= mesh.MaxPathLen {
			return n
		}
		return a
	}
	all := func(list []string) []string {
		n := slices.Clone(list)
		for i := range n {
			n[i] = one(n[i])
		}
		return n
	}
	for _, u := range s.users {
		n := *u
		n.Address, n.Aliases = one(u.Address), all(u.Aliases)
		s.users[u.ID] = &n
	}
	for _, g := range s.groups {
		n := *g
		n.Address, n.Aliases = one(g.Address), all(g.Aliases)
		s.groups[g.ID] = &n
	}
	for _, a := range s.aliases {
		n := *a
		n.Address = one(a.Address)
		s.aliases[a.ID] = &n
	}
	s.changed |= Users | Groups | Aliases
}

// DeleteDomain removes a domain in which no address is left.
type DeleteDomain struct {
	ID mesh.ID `cbor:"1,keyasint"`
}

func (*DeleteDomain) kind() Kind    { return KindDeleteDomain }
func (*DeleteDomain) check() Result { return Result{} }

func (b *DeleteDomain) apply(s *state, c *Command) (Result, string) {
	d := s.domains[b.ID]
	if d == nil {
		return no(NotFound, "no such domain"), ""
	}
	if len(s.domains) == 1 {
		return no(InUse, "%s is the last domain", d.Name), ""
	}
	for _, name := range append([]string{d.Name}, d.Aliases...) {
		if s.addressUnder(mesh.DomainKey(name)) {
			return no(InUse, "there are still addresses in %s", name), ""
		}
	}
	delete(s.domains, d.ID)
	s.rebuild()
	s.changed |= Domains
	return Result{}, "deleted domain " + d.Name
}
