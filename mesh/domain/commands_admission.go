package domain

import (
	"crypto/ed25519"
	"fmt"
	"net/netip"
	"strings"

	"posthouse/mesh"
)

// CreateToken makes a join token known. Its seed never comes here.
type CreateToken struct {
	ID       mesh.ID `cbor:"1,keyasint"`
	Public   []byte  `cbor:"2,keyasint"`           // Ed25519
	Lifetime int64   `cbor:"3,keyasint,omitempty"` // milliseconds from the command's time; 0 means 24 h
	Reusable bool    `cbor:"4,keyasint,omitempty"`
	Note     string  `cbor:"5,keyasint,omitempty"`
	Plain    bool    `cbor:"6,keyasint,omitempty"` // who joins with it is no candidate
}

const (
	defaultTokenLife = 24 * 3600 * 1000
	maxTokenLife     = 366 * defaultTokenLife
	// An application waits for its answer a week; decided ones stay a month.
	pendingLife = 7 * defaultTokenLife
	decidedLife = 30 * defaultTokenLife
)

func (*CreateToken) kind() Kind { return KindCreateToken }

func (b *CreateToken) check() Result {
	if len(b.Public) != ed25519.PublicKeySize || b.Lifetime < 0 || b.Lifetime > maxTokenLife {
		return no(Invalid, "a join token needs a public key and lives a year at most")
	}
	return first(checkID("the token", b.ID), checkText("note", b.Note, 200))
}

func (b *CreateToken) apply(s *state, c *Command) (Result, string) {
	if s.tokens[b.ID] != nil {
		return no(Conflict, "that token exists"), ""
	}
	if len(s.tokens) >= MaxTokens { // room is made by those that nobody can use again
		for id, t := range s.tokens {
			if t.Expires < c.At || t.Revoked != 0 {
				delete(s.tokens, id)
			}
		}
		if len(s.tokens) >= MaxTokens {
			return no(Limit, "more than %d join tokens in force; revoke some", MaxTokens), ""
		}
	}
	life := b.Lifetime
	if life == 0 {
		life = defaultTokenLife
	}
	s.tokens[b.ID] = &Token{ID: b.ID, Public: b.Public, Created: c.At, By: c.Actor, Expires: c.At + Time(life), Reusable: b.Reusable, Note: b.Note, Plain: b.Plain}
	s.changed |= Tokens
	return Result{}, fmt.Sprintf("made a %s join token", yesNo(b.Reusable, "reusable", "single-use"))
}

// RevokeToken takes a join token back.
type RevokeToken struct {
	ID mesh.ID `cbor:"1,keyasint"`
}

func (*RevokeToken) kind() Kind    { return KindRevokeToken }
func (*RevokeToken) check() Result { return Result{} }

func (b *RevokeToken) apply(s *state, c *Command) (Result, string) {
	old := s.tokens[b.ID]
	if old == nil {
		return no(TokenUnknown, "no such join token"), ""
	}
	if old.Revoked == 0 {
		t := *old
		t.Revoked, t.RevokedB = max(c.At, 1), c.Actor
		s.tokens[t.ID] = &t
		s.changed |= Tokens
	}
	return Result{}, "revoked a join token"
}

// AskAdmission notes a node that waits for approval. The same key asks again
// without making a second application.
type AskAdmission struct {
	ID        mesh.ID      `cbor:"1,keyasint"`
	Key       mesh.KeyHash `cbor:"2,keyasint"`
	Name      string       `cbor:"3,keyasint"`
	Host      string       `cbor:"4,keyasint,omitempty"`
	Addresses []string     `cbor:"5,keyasint,omitempty"`
	Code      string       `cbor:"6,keyasint,omitempty"`
	Node      mesh.NodeID  `cbor:"7,keyasint,omitempty"` // what it calls itself already, and will be called
	Seal      mesh.SealKey `cbor:"8,keyasint"`
	Plain     bool         `cbor:"9,keyasint,omitempty"` // wants to be no candidate
}

func (*AskAdmission) kind() Kind { return KindAskAdmission }

func (b *AskAdmission) check() Result {
	if b.Key.IsZero() || b.Seal.IsZero() {
		return no(Invalid, "an application needs a key, and one to seal to")
	}
	return first(checkID("the application", b.ID), checkNodeName(b.Name), checkHost("host name", b.Host), checkEndpoints(b.Addresses), checkText("code", b.Code, 40))
}

func (b *AskAdmission) apply(s *state, c *Command) (Result, string) {
	open, again := 0, false
	for _, p := range s.pending {
		if p.StateAt(c.At) == PendingOpen {
			open++
			again = again || p.Key == b.Key
		}
	}
	if again {
		return Result{}, fmt.Sprintf("%s asks to be admitted, again", b.Name)
	}
	for id, p := range s.pending {
		if c.At > p.Expires+decidedLife {
			delete(s.pending, id)
		}
	}
	if open >= MaxPending || len(s.pending) >= 10*MaxPending {
		return no(Limit, "too many nodes wait for approval; decide about some first"), ""
	}
	if s.pending[b.ID] != nil {
		return no(Conflict, "that application exists"), ""
	}
	s.pending[b.ID] = &Pending{ID: b.ID, Key: b.Key, Name: b.Name, Host: b.Host, Addresses: b.Addresses, Code: b.Code, Node: b.Node, Seal: b.Seal, Plain: b.Plain, Asked: c.At, Expires: c.At + pendingLife}
	s.changed |= Applications
	return Result{}, fmt.Sprintf("%s asks to be admitted", b.Name)
}

// RefusePending refuses an application. Approving one is AdmitNode.
type RefusePending struct {
	ID mesh.ID `cbor:"1,keyasint"`
}

func (*RefusePending) kind() Kind    { return KindRefusePending }
func (*RefusePending) check() Result { return Result{} }

func (b *RefusePending) apply(s *state, c *Command) (Result, string) {
	old := s.pending[b.ID]
	if old == nil {
		return no(NotFound, "no such application"), ""
	}
	if old.State == PendingApproved {
		return no(NotPending, "%s was approved before; revoke the node instead", old.Name), ""
	}
	p := *old
	p.State, p.Decided, p.By = PendingRefused, c.At, c.Actor
	s.pending[p.ID] = &p
	s.changed |= Applications
	return Result{}, fmt.Sprintf("refused to admit %s", p.Name)
}

// SetSettings changes what is not nil.
type SetSettings struct {
	MaxMessage *int64   `cbor:"1,keyasint,omitempty"`
	Smarthost  *string  `cbor:"2,keyasint,omitempty"`
	ClientName *string  `cbor:"3,keyasint,omitempty"`
	MeshName   *string  `cbor:"4,keyasint,omitempty"`
	Postmaster *mesh.ID `cbor:"5,keyasint,omitempty"`
	Quota      *int64   `cbor:"6,keyasint,omitempty"`
	TakeBack   *int64   `cbor:"7,keyasint,omitempty"`
}

func (*SetSettings) kind() Kind { return KindSetSettings }

func (b *SetSettings) check() (r Result) {
	if b.MaxMessage != nil && (*b.MaxMessage < 64<<10 || *b.MaxMessage > 2<<30) {
		return no(Invalid, "the largest message is between 64 KiB and 2 GiB")
	}
	if b.Smarthost != nil && *b.Smarthost != "" {
		r = first(r, checkEndpoints([]string{*b.Smarthost}))
	}
	if b.ClientName != nil {
		r = first(r, checkHost("client name", *b.ClientName))
	}
	if b.MeshName != nil {
		r = first(r, checkText("mesh name", *b.MeshName, 200))
	}
	if b.Quota != nil && *b.Quota < 0 || b.TakeBack != nil && *b.TakeBack < 0 {
		r = first(r, no(Invalid, "a quota or time is not negative"))
	}
	return r
}

func (b *SetSettings) apply(s *state, c *Command) (Result, string) {
	v := s.settings
	if b.Postmaster != nil {
		if r := s.target(Target{ID: *b.Postmaster}); r.Code != OK || b.Postmaster.IsZero() {
			return no(NotFound, "the postmaster has to be a user or a group"), ""
		}
	}
	set(&v.MaxMessage, b.MaxMessage)
	set(&v.Smarthost, b.Smarthost)
	set(&v.ClientName, b.ClientName)
	set(&v.MeshName, b.MeshName)
	set(&v.Postmaster, b.Postmaster)
	set(&v.Quota, b.Quota)
	set(&v.TakeBack, b.TakeBack)
	s.settings = v
	s.changed |= Values
	return Result{}, "changed the settings"
}

// PutRule makes or replaces a device rule.
type PutRule struct {
	Rule DeviceRule `cbor:"1,keyasint"`
}

func (*PutRule) kind() Kind { return KindPutRule }

func (b *PutRule) check() Result {
	p, err := netip.ParsePrefix(b.Rule.CIDR)
	if err != nil || p.Bits() == 0 {
		return no(Invalid, "device rule: %.80q is not an address range such as 192.168.1.0/24", b.Rule.CIDR)
	}
	return first(checkID("the rule", b.Rule.ID), checkText("rule name", b.Rule.Name, 200), checkAddresses("senders", b.Rule.Senders))
}

func (b *PutRule) apply(s *state, c *Command) (Result, string) {
	if n := s.nodes[b.Rule.Node]; b.Rule.Node != 0 && (n == nil || !n.Member()) {
		return no(NotFound, "node %s is not a member", b.Rule.Node), ""
	}
	for _, a := range b.Rule.Senders {
		if !s.local(a) {
			return no(Invalid, "%s is not in a domain of this mesh", a), ""
		}
	}
	if s.rules[b.Rule.ID] == nil && len(s.rules) >= MaxRules {
		return no(Limit, "more than %d device rules", MaxRules), ""
	}
	r := b.Rule
	s.rules[r.ID] = &r
	s.changed |= Rules
	return Result{}, strings.TrimSpace("set device rule " + r.Name)
}

// DeleteRule removes a device rule.
type DeleteRule struct {
	ID mesh.ID `cbor:"1,keyasint"`
}

func (*DeleteRule) kind() Kind    { return KindDeleteRule }
func (*DeleteRule) check() Result { return Result{} }

func (b *DeleteRule) apply(s *state, c *Command) (Result, string) {
	r := s.rules[b.ID]
	if r == nil {
		return no(NotFound, "no such device rule"), ""
	}
	delete(s.rules, b.ID)
	s.changed |= Rules
	return Result{}, strings.TrimSpace("deleted device rule " + r.Name)
}
