package domain

import (
	"fmt"
	"slices"
	"strings"

	"posthouse/mesh"
)

// Found makes the state of a new mesh: its lineage, its first node, its first
// domain and its first administrator, who is also its postmaster.
type Found struct {
	Lineage  mesh.ID   `cbor:"1,keyasint"`
	Node     AdmitNode `cbor:"2,keyasint"` // Token and Pending are zero
	Domain   Domain    `cbor:"3,keyasint"`
	Admin    User      `cbor:"4,keyasint"` // Home is Node
	MeshName string    `cbor:"5,keyasint,omitempty"`
	Client   string    `cbor:"6,keyasint,omitempty"` // Settings.ClientName
	// Key is the first key of the candidates, wrapped for the founder.
	Key       CandidateKey `cbor:"7,keyasint"`
	Authority *Authority   `cbor:"8,keyasint,omitempty"` // of client certificates
}

func (*Found) kind() Kind { return KindFound }

func (b *Found) check() Result {
	if a := b.Authority; a != nil {
		if len(a.Certificate) > maxAuthority {
			return no(Invalid, "the authority's certificate is longer than %d bytes", maxAuthority)
		}
		if r := a.Secret.check("the authority", maxAuthority, false); r.Code != OK {
			return r
		}
	}
	return first(b.Key.check(), checkID("the lineage", b.Lineage), b.Node.check(), checkID("the domain", b.Domain.ID), checkHost("domain", b.Domain.Name),
		checkUser(&b.Admin), checkText("mesh name", b.MeshName, 200), checkHost("client name", b.Client))
}

func (b *Found) apply(s *state, c *Command) (Result, string) {
	if len(s.lineages) > 0 {
		return no(Founded, "this mesh was founded before"), ""
	}
	if b.Domain.Name == "" || b.Admin.Home != b.Node.ID || !b.Node.Token.IsZero() || !b.Node.Pending.IsZero() {
		return no(Invalid, "founding needs a domain, and its administrator at the first node"), ""
	}
	at := strings.LastIndexByte(b.Admin.Address, '@')
	if mesh.DomainKey(b.Admin.Address[at+1:]) != mesh.DomainKey(b.Domain.Name) || len(b.Admin.Aliases) > 0 || len(b.Domain.Aliases) > 0 {
		return no(Invalid, "the administrator's address has to be in the first domain"), ""
	}
	if b.Key.Number != 1 || len(b.Key.Wraps) != 1 || b.Key.Wraps[0].Node != b.Node.ID || !b.Node.Voter {
		return no(Invalid, "the founder holds the first key of the candidates, alone"), ""
	}
	if v := b.Admin.Verifier; v != nil && (v.Key != 1 || v.To != b.Node.ID) {
		return no(Invalid, "the administrator's password is not sealed as it has to be"), ""
	}
	key := b.Key
	s.candidateKeys, s.authority = []*CandidateKey{&key}, b.Authority
	s.lineages = []Lineage{{ID: b.Lineage, Generation: 1, Since: c.At}}
	s.settings = Settings{MaxMessage: DefaultMaxMessage, Postmaster: b.Admin.ID, MeshName: b.MeshName, ClientName: b.Client}
	d := b.Domain
	d.Postmaster = mesh.ID{}
	s.domains[d.ID] = &d
	s.admit(&b.Node, c)
	u := b.Admin
	u.HomeVersion, u.Role, u.Created = 1, RoleMeshAdmin, c.At
	if u.Verifier != nil {
		u.CredVersion = 1
	}
	s.users[u.ID] = &u
	s.rebuild()
	s.changed = AllParts
	return Result{Node: b.Node.ID}, fmt.Sprintf("founded the mesh with %s at node %s", d.Name, b.Node.Name)
}

// Promote notes that a new lineage began on the node that a person promoted.
type Promote struct {
	Lineage    mesh.ID       `cbor:"1,keyasint"`
	Generation uint64        `cbor:"2,keyasint"`           // above the present one, by more than one after deciding against a rival
	Fork       uint64        `cbor:"3,keyasint"`           // last index that both sides surely share
	Revoke     []mesh.NodeID `cbor:"4,keyasint,omitempty"` // stolen nodes
	Forget     []mesh.NodeID `cbor:"5,keyasint,omitempty"` // nodes that will not come back
}

func (*Promote) kind() Kind      { return KindPromote }
func (b *Promote) check() Result { return checkID("the lineage", b.Lineage) }

func (b *Promote) apply(s *state, c *Command) (Result, string) {
	last := s.lineages[len(s.lineages)-1]
	if b.Generation <= last.Generation || b.Lineage == last.ID {
		return no(WrongLineage, "generation %d does not follow %d", b.Generation, last.Generation), ""
	}
	self := s.nodes[c.Via]
	if self == nil || !self.Member() || slices.Contains(b.Revoke, c.Via) || slices.Contains(b.Forget, c.Via) {
		return no(NotFound, "node %s is not a member that could lead", c.Via), ""
	}
	gone := map[mesh.NodeID]bool{}
	for _, id := range slices.Concat(b.Revoke, b.Forget) {
		if n := s.nodes[id]; n == nil || !n.Member() {
			return no(NotFound, "node %s is not a member", id), ""
		}
		gone[id] = true
	}
	if len(gone) >= s.members() {
		return no(InUse, "no node would be left"), ""
	}
	for _, id := range b.Revoke {
		s.remove(id, true, c)
	}
	for _, id := range b.Forget {
		if s.nodes[id].Member() {
			s.remove(id, false, c)
		}
	}
	if !self.Voter { // a person has made it lead: it may from now on
		n := *self
		n.Voter = true
		s.nodes[n.ID] = &n
		s.changed |= Nodes
	}
	s.lineages = append(s.lineages, Lineage{ID: b.Lineage, Generation: b.Generation, Fork: b.Fork, Since: c.At})
	s.changed |= Lineages
	return Result{}, fmt.Sprintf("promoted: lineage %d began after command %d", b.Generation, b.Fork)
}

// AdmitNode makes a node a member: key, name and NodeID in one command. By a
// token, by approving an application, or (both zero) by an administrator's own
// word. The same key may repeat it and gets the same NodeID.
type AdmitNode struct {
	ID         mesh.NodeID  `cbor:"1,keyasint"`
	Name       string       `cbor:"2,keyasint"`
	Host       string       `cbor:"3,keyasint,omitempty"`
	Key        mesh.KeyHash `cbor:"4,keyasint"`
	Addresses  []string     `cbor:"5,keyasint,omitempty"`
	Voter      bool         `cbor:"6,keyasint,omitempty"`
	Gateway    bool         `cbor:"7,keyasint,omitempty"`
	Priority   int          `cbor:"8,keyasint,omitempty"`
	ClientName string       `cbor:"9,keyasint,omitempty"`
	Version    string       `cbor:"10,keyasint,omitempty"`
	Level      uint32       `cbor:"11,keyasint,omitempty"` // 0 counts as 1
	Token      mesh.ID      `cbor:"12,keyasint"`
	Pending    mesh.ID      `cbor:"13,keyasint"`
	Seal       mesh.SealKey `cbor:"14,keyasint"`
}

func (*AdmitNode) kind() Kind { return KindAdmitNode }

func (b *AdmitNode) check() Result {
	if b.ID == 0 || b.Key.IsZero() || b.Seal.IsZero() {
		return no(Invalid, "a node needs an id, a key, and one to seal to")
	}
	return first(checkNodeName(b.Name), checkHost("host name", b.Host), checkHost("client name", b.ClientName),
		checkEndpoints(b.Addresses), checkText("version", b.Version, 100))
}

func (b *AdmitNode) apply(s *state, c *Command) (Result, string) {
	for _, id := range s.keys[b.Key] {
		switch n := s.nodes[id]; {
		case n.Member():
			// The joiner lost our answer and asks again: the answer is the same.
			return Result{Node: n.ID}, fmt.Sprintf("admitted %s again: it was a member already", n.Name)
		case n.Revoked:
			return no(KeyRevoked, "the key of %s was revoked; make a new one to join again", n.Name), ""
		}
	}
	var token *Token
	if !b.Token.IsZero() {
		if token = s.tokens[b.Token]; token == nil {
			return no(TokenUnknown, "no such join token"), ""
		}
		switch {
		case token.Revoked != 0:
			return no(TokenRevoked, "the join token was revoked by %s", token.RevokedB), ""
		case tokensOnce && !token.Reusable && len(token.UsedBy) > 0:
			return no(TokenUsed, "the join token was used by %s", s.nodes[token.UsedBy[0]].Name), ""
		case c.At >= token.Expires:
			return no(TokenExpired, "the join token has expired; ask for a new one"), ""
		}
	}
	var asked *Pending
	if !b.Pending.IsZero() {
		asked = s.pending[b.Pending]
		if asked == nil || asked.Key != b.Key || asked.Seal != b.Seal {
			return no(NotFound, "no such application"), ""
		}
		if st := asked.StateAt(c.At); st != PendingOpen {
			return no(NotPending, "the application was %s", yesNo(st == PendingRefused, "refused", "decided, or has expired")), ""
		}
	}
	if id, taken := s.nodeNames[foldName(b.Name)]; taken {
		return no(NameTaken, "there is a node called %s already; choose another name", s.nodes[id].Name), ""
	}
	if s.nodes[b.ID] != nil {
		return no(Conflict, "that node id was used before"), ""
	}
	if len(s.nodes) >= MaxNodes {
		return no(Limit, "more than %d nodes", MaxNodes), ""
	}
	as := *b
	as.Voter = b.Voter && (token == nil || !token.Plain)
	s.admit(&as, c)
	s.changed |= Nodes
	by := "by " + c.Actor
	if token != nil {
		t := *token
		t.UsedBy = append(slices.Clone(t.UsedBy), b.ID)
		t.UsedAt = c.At
		s.tokens[t.ID] = &t
		s.changed |= Tokens
		by = "with a token"
	}
	if asked != nil {
		p := *asked
		p.State, p.Decided, p.By, p.Node = PendingApproved, c.At, c.Actor, b.ID
		s.pending[p.ID] = &p
		s.changed |= Applications
	}
	return Result{Node: b.ID}, fmt.Sprintf("admitted node %s %s", b.Name, by)
}

func (s *state) admit(b *AdmitNode, c *Command) {
	n := &Node{ID: b.ID, Name: b.Name, Host: b.Host, Key: b.Key, Addresses: b.Addresses, Voter: b.Voter, Gateway: b.Gateway,
		Priority: b.Priority, ClientName: b.ClientName, Admitted: c.At, AdmittedBy: c.Actor, Version: b.Version, Level: max(b.Level, 1), Seal: b.Seal}
	s.nodes[n.ID] = n
	s.keys[n.Key] = append(s.keys[n.Key], n.ID)
	slices.Sort(s.keys[n.Key])
	s.nodeNames[foldName(n.Name)] = n.ID
}

func (s *state) members() int { return len(s.nodeNames) }

// RevokeNode ends a membership. Left says that the node took its leave in
// good order and its key is not tainted; otherwise the key never comes back.
type RevokeNode struct {
	Node   mesh.NodeID `cbor:"1,keyasint"`
	Left   bool        `cbor:"2,keyasint,omitempty"`
	Rehome mesh.NodeID `cbor:"3,keyasint,omitempty"` // gets the homes; 0 leaves them
}

func (*RevokeNode) kind() Kind    { return KindRevokeNode }
func (*RevokeNode) check() Result { return Result{} }

func (b *RevokeNode) apply(s *state, c *Command) (Result, string) {
	n := s.nodes[b.Node]
	if n == nil {
		return no(NotFound, "no such node"), ""
	}
	if !n.Member() {
		if !b.Left && !n.Revoked { // a node that left is found to be stolen later
			s.remove(b.Node, true, c)
		}
		return Result{Node: n.ID}, fmt.Sprintf("revoked node %s, which had left", n.Name)
	}
	if s.members() == 1 {
		return no(InUse, "%s is the last node", n.Name), ""
	}
	if r := first(s.rehomeTarget(b.Rehome, b.Node), s.leadable(b.Node)); r.Code != OK {
		return r, ""
	}
	moved := 0
	if b.Rehome != 0 {
		moved = s.rehome(b.Node, b.Rehome)
	}
	s.remove(b.Node, !b.Left, c)
	return Result{Node: n.ID}, fmt.Sprintf("%s node %s, %s re-homed; it knows the verifiers of %s", yesNo(b.Left, "let go of", "revoked"), n.Name, plural(moved, "user"),
		yesNo(n.Candidate(), "all passwords", "its own people's passwords"))
}

func (s *state) rehomeTarget(to, from mesh.NodeID) Result {
	if to == 0 {
		return Result{}
	}
	if n := s.nodes[to]; n == nil || !n.Member() || to == from {
		return no(NotFound, "node %s is not a member that could take the mailboxes", to)
	}
	return Result{}
}

func (s *state) remove(id mesh.NodeID, revoked bool, c *Command) {
	n := *s.nodes[id]
	if n.Member() {
		delete(s.nodeNames, foldName(n.Name))
		n.Removed = max(c.At, 1)
	}
	n.Revoked = n.Revoked || revoked
	n.Voter, n.Gateway = false, false
	s.nodes[id] = &n
	s.changed |= Nodes
}

func (s *state) rehome(from, to mesh.NodeID) (moved int) {
	for _, u := range s.users {
		if u.Home == from {
			n := *u
			n.Home, n.HomeVersion = to, u.HomeVersion+1
			s.users[u.ID] = &n
			moved++
		}
	}
	if moved > 0 {
		s.changed |= Users | Homes
	}
	return moved
}

// UpdateNode changes what is not nil.
type UpdateNode struct {
	Node       mesh.NodeID `cbor:"1,keyasint"`
	Name       *string     `cbor:"2,keyasint,omitempty"`
	Host       *string     `cbor:"3,keyasint,omitempty"`
	ClientName *string     `cbor:"4,keyasint,omitempty"`
	Addresses  *[]string   `cbor:"5,keyasint,omitempty"`
	Voter      *bool       `cbor:"6,keyasint,omitempty"`
	Gateway    *bool       `cbor:"7,keyasint,omitempty"`
	Priority   *int        `cbor:"8,keyasint,omitempty"`
}

func (*UpdateNode) kind() Kind { return KindUpdateNode }

func (b *UpdateNode) check() (r Result) {
	if b.Name != nil {
		r = first(r, checkNodeName(*b.Name))
	}
	if b.Host != nil {
		r = first(r, checkHost("host name", *b.Host))
	}
	if b.ClientName != nil {
		r = first(r, checkHost("client name", *b.ClientName))
	}
	if b.Addresses != nil {
		r = first(r, checkEndpoints(*b.Addresses))
	}
	return r
}

func (b *UpdateNode) apply(s *state, c *Command) (Result, string) {
	old := s.nodes[b.Node]
	if old == nil || !old.Member() {
		return no(NotFound, "node %s is not a member", b.Node), ""
	}
	if b.Voter != nil && !*b.Voter {
		if r := s.leadable(b.Node); r.Code != OK {
			return r, ""
		}
	}
	n := *old
	if b.Name != nil {
		if id, taken := s.nodeNames[foldName(*b.Name)]; taken && id != n.ID {
			return no(NameTaken, "there is a node called %s already", *b.Name), ""
		}
		n.Name = *b.Name
	}
	set(&n.Host, b.Host)
	set(&n.ClientName, b.ClientName)
	set(&n.Addresses, b.Addresses)
	set(&n.Voter, b.Voter)
	set(&n.Gateway, b.Gateway)
	set(&n.Priority, b.Priority)
	delete(s.nodeNames, foldName(old.Name))
	s.nodeNames[foldName(n.Name)] = n.ID
	s.nodes[n.ID] = &n
	s.changed |= Nodes
	return Result{Node: n.ID}, fmt.Sprintf("changed node %s", n.Name)
}

func set[T any](to *T, v *T) {
	if v != nil {
		*to = *v
	}
}

// ReplaceNode points all homes of a lost node to another one and ends the
// lost one's membership.
type ReplaceNode struct {
	Old mesh.NodeID `cbor:"1,keyasint"`
	New mesh.NodeID `cbor:"2,keyasint"`
}

func (*ReplaceNode) kind() Kind    { return KindReplaceNode }
func (*ReplaceNode) check() Result { return Result{} }

func (b *ReplaceNode) apply(s *state, c *Command) (Result, string) {
	old := s.nodes[b.Old]
	if old == nil {
		return no(NotFound, "no such node"), ""
	}
	if b.New == 0 {
		return no(Invalid, "a replacement has to be named"), ""
	}
	if r := first(s.rehomeTarget(b.New, b.Old), s.leadable(b.Old)); r.Code != OK {
		return r, ""
	}
	moved := s.rehome(b.Old, b.New)
	s.remove(b.Old, false, c)
	n := *s.nodes[b.Old]
	n.ReplacedBy = b.New
	s.nodes[b.Old] = &n
	return Result{Node: b.New}, fmt.Sprintf("replaced node %s by %s, %s re-homed", n.Name, s.nodes[b.New].Name, plural(moved, "user"))
}

// ReportVersion is what a node says of itself after each start.
type ReportVersion struct {
	Node    mesh.NodeID `cbor:"1,keyasint"`
	Version string      `cbor:"2,keyasint"`
	Level   uint32      `cbor:"3,keyasint"`
}

func (*ReportVersion) kind() Kind      { return KindReportVersion }
func (b *ReportVersion) check() Result { return checkText("version", b.Version, 100) }

func (b *ReportVersion) apply(s *state, c *Command) (Result, string) {
	old := s.nodes[b.Node]
	if old == nil || !old.Member() {
		return no(NotFound, "node %s is not a member", b.Node), ""
	}
	if old.Version != b.Version || old.Level != max(b.Level, 1) {
		n := *old
		n.Version, n.Level = b.Version, max(b.Level, 1)
		s.nodes[n.ID] = &n
		s.changed |= Nodes
	}
	return Result{Node: b.Node}, fmt.Sprintf("node %s runs %s", old.Name, b.Version)
}

// RenewNode is what a node says that was found to run on an older image of its
// disk, when it has put itself in order.
type RenewNode struct {
	Node        mesh.NodeID `cbor:"1,keyasint"`
	Incarnation uint64      `cbor:"2,keyasint"` // a lower one than the present changes nothing
}

func (*RenewNode) kind() Kind    { return KindRenewNode }
func (*RenewNode) check() Result { return Result{} }

func (b *RenewNode) apply(s *state, c *Command) (Result, string) {
	old := s.nodes[b.Node]
	if old == nil || !old.Member() {
		return no(NotFound, "node %s is not a member", b.Node), ""
	}
	if b.Incarnation > old.Incarnation {
		n := *old
		n.Incarnation = b.Incarnation
		s.nodes[n.ID] = &n
		s.changed |= Nodes
	}
	return Result{Node: b.Node}, fmt.Sprintf("node %s began anew from an older image of its disk", old.Name)
}
