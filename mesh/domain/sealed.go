package domain

import (
	"errors"
	"fmt"
	"slices"

	"posthouse/mesh"
)

// Secrets stand in the state as boxes that few nodes can open; DESIGN.md has the
// whole of it. Whoever makes a secret seals it (SealFor). The master attaches to
// each command that changes a home or the candidates what has to be sealed anew
// (Prepare); Apply only puts boxes in their places.

// Keyring is a node's key and the art of sealing; mesh/identity has one. Its
// methods are safe for concurrent use.
type Keyring interface {
	Self() mesh.NodeID
	// Open opens a box sealed to this node, OpenWith one sealed to the public
	// half of private. about has to be what it was sealed with.
	Open(about string, box []byte) ([]byte, error)
	OpenWith(private []byte, about string, box []byte) ([]byte, error)
	Seal(to mesh.SealKey, about string, secret []byte) ([]byte, error)
	// NewSealPair makes a key pair to be shared.
	NewSealPair() (private []byte, public mesh.SealKey, err error)
}

// ErrSealed means that this node holds no key to a secret.
var ErrSealed = errors.New("this node cannot open the secret")

// Sealed is a secret, sealed twice: to a user's home and to the candidates'
// common key. The node at which a secret is made can seal it without being able
// to open it again.
type Sealed struct {
	Home       []byte      `cbor:"1,keyasint,omitempty"` // sealed to the node To
	To         mesh.NodeID `cbor:"2,keyasint,omitempty"`
	Candidates []byte      `cbor:"3,keyasint,omitempty"` // sealed to the candidates' key
	Key        uint64      `cbor:"4,keyasint,omitempty"` // that key's number
}

// CandidateKey is a key pair that all candidates share. The last one of the
// state is in use; older ones stay as long as a secret is sealed to them.
type CandidateKey struct {
	Number uint64       `cbor:"1,keyasint"` // from 1; only grows
	Public mesh.SealKey `cbor:"2,keyasint"`
	// Wraps have the private half, sealed to each candidate, by node. An older
	// key has none when it has Next.
	Wraps []Wrap `cbor:"3,keyasint,omitempty"`
	// Next is the private half sealed to the later key NextKey: who holds that
	// one can open what this one sealed.
	Next    []byte `cbor:"4,keyasint,omitempty"`
	NextKey uint64 `cbor:"5,keyasint,omitempty"`
}

// Wrap is a private key sealed to a node.
type Wrap struct {
	Node mesh.NodeID `cbor:"1,keyasint"`
	Box  []byte      `cbor:"2,keyasint"`
}

// Authority is what signs the certificates that mail clients see. Its key is
// sealed to the candidates: any of them can sign.
type Authority struct {
	Certificate []byte `cbor:"1,keyasint"` // PEM; what clients trust
	Secret      Sealed `cbor:"2,keyasint"` // certificate and private key, PEM
}

const (
	maxAuthority = 16 << 10
	maxBox       = 256 // a wrapped key; 80 bytes today
	// resealAtOnce bounds the users of one Reseal, so that a command stays well
	// below MaxCommand: what is left follows in further ones.
	resealAtOnce = 2000

	aboutAuthority = "authority"
)

func aboutVerifier(user mesh.ID) string    { return "verifier " + user.String() }
func aboutCandidates(number uint64) string { return fmt.Sprintf("candidates %d", number) }

// check refuses what is no sealed secret of at most max bytes; both says that
// the home's copy has to be there.
func (v *Sealed) check(what string, max int, both bool) Result {
	if len(v.Candidates) == 0 || v.Key == 0 || len(v.Candidates) > max || len(v.Home) > max ||
		(len(v.Home) == 0) != (v.To == 0) || both != (v.To != 0) {
		return no(Invalid, "%s is not sealed as it has to be", what)
	}
	return Result{}
}

func (k *CandidateKey) check() Result {
	if k.Number == 0 || k.Public.IsZero() || len(k.Wraps) > MaxNodes || len(k.Next) > 0 || k.NextKey != 0 {
		return no(Invalid, "the candidates' key is incomplete")
	}
	return checkWraps(k.Wraps)
}

func checkWraps(ws []Wrap) Result {
	for i, w := range ws {
		if w.Node == 0 || len(w.Box) == 0 || len(w.Box) > maxBox || i > 0 && ws[i-1].Node >= w.Node {
			return no(Invalid, "the candidates' key is wrapped wrongly")
		}
	}
	return Result{}
}

// fits reports whether a new secret is sealed to whom it has to be now.
func (s *state) fits(v *Sealed, home mesh.NodeID) Result {
	if v.Key != s.candidateKey().Number || v.To != home {
		return no(Resealed, "the nodes that may open the password have changed meanwhile; try again")
	}
	return Result{}
}

// candidateKey is the one in use.
func (s *state) candidateKey() *CandidateKey { return s.candidateKeys[len(s.candidateKeys)-1] }

func (s *state) numbered(number uint64) *CandidateKey {
	for _, k := range s.candidateKeys {
		if k.Number == number {
			return k
		}
	}
	return nil
}

// Candidate reports whether the node may become master, and so holds secrets.
func (n *Node) Candidate() bool { return n.Member() && n.Voter }

// candidates are in order of their ids.
func (s *state) candidates() (out []*Node) {
	for _, n := range s.nodes {
		if n.Candidate() {
			out = append(out, n)
		}
	}
	slices.SortFunc(out, func(a, b *Node) int { return compareNode(a.ID, b.ID) })
	return out
}

// leadable refuses a change after which nobody could lead; without is the node
// that would not be a candidate any more.
func (s *state) leadable(without mesh.NodeID) Result {
	for _, n := range s.nodes {
		if n.Candidate() && n.ID != without {
			return Result{}
		}
	}
	return no(InUse, "no other node may lead the mesh: give another one the right first")
}

// Reseal changes how secrets are sealed, never the secrets. As a command it
// comes from a node that found something sealed to the wrong ones; mostly it is
// a part of the command that changed a home or the candidates (Command.Seal).
type Reseal struct {
	// Key is the number of the candidates' key that all of it was made for: it
	// does nothing when another one is in use.
	Key uint64 `cbor:"1,keyasint"`
	// New replaces that key; the rest is sealed to New then.
	New *CandidateKey `cbor:"2,keyasint,omitempty"`
	// Wraps let further candidates open the key in use.
	Wraps []Wrap `cbor:"3,keyasint,omitempty"`
	// Links seal older keys to the one in use.
	Links     []Link       `cbor:"4,keyasint,omitempty"`
	Users     []ResealUser `cbor:"5,keyasint,omitempty"`
	Authority []byte       `cbor:"6,keyasint,omitempty"`
}

// Link is the private half of an older candidates' key, sealed to the one in use.
type Link struct {
	Number uint64 `cbor:"1,keyasint"`
	Box    []byte `cbor:"2,keyasint"`
}

// ResealUser has the boxes of a user's verifier that change.
type ResealUser struct {
	User       mesh.ID     `cbor:"1,keyasint"`
	Version    uint64      `cbor:"2,keyasint"` // CredVersion that it was made for
	Candidates []byte      `cbor:"3,keyasint,omitempty"`
	Home       []byte      `cbor:"4,keyasint,omitempty"`
	To         mesh.NodeID `cbor:"5,keyasint,omitempty"`
}

func (*Reseal) kind() Kind { return KindReseal }

func (b *Reseal) check() Result {
	if b.Key == 0 || len(b.Wraps) > MaxNodes || len(b.Users) > resealAtOnce || len(b.Authority) > maxAuthority {
		return no(Invalid, "nothing says what is to be sealed anew")
	}
	r := checkWraps(b.Wraps)
	if b.New != nil {
		r = first(r, b.New.check())
		if b.New.Number != b.Key+1 || len(b.Wraps) > 0 {
			r = first(r, no(Invalid, "a new key of the candidates follows the one before it"))
		}
	}
	for _, l := range b.Links {
		if l.Number == 0 || len(l.Box) == 0 || len(l.Box) > maxBox {
			r = first(r, no(Invalid, "an older key is linked wrongly"))
		}
	}
	for _, u := range b.Users {
		if len(u.Candidates) > maxVerifier || len(u.Home) > maxVerifier || (len(u.Home) == 0) != (u.To == 0) {
			r = first(r, no(Invalid, "a password is sealed wrongly"))
		}
	}
	return r
}

func (b *Reseal) apply(s *state, _ *Command) (Result, string) {
	if b.Key != s.candidateKey().Number {
		return no(Resealed, "the candidates' key was changed meanwhile"), ""
	}
	s.reseal(b)
	return Result{}, fmt.Sprintf("sealed secrets anew: %s%s", plural(len(b.Users), "password"), yesNo(b.New != nil, ", under a new key of the candidates", ""))
}

// reseal puts the boxes in their places. What does not fit any more is left out:
// Mend finds it again.
func (s *state) reseal(b *Reseal) {
	if len(s.candidateKeys) == 0 || b.Key != s.candidateKey().Number {
		return
	}
	s.changed |= Secrets
	keys := slices.Clone(s.candidateKeys)
	if b.New != nil {
		n := *b.New
		keys = append(keys, &n)
	} else if len(b.Wraps) > 0 {
		k := *s.candidateKey()
		k.Wraps = slices.Clone(k.Wraps)
		for _, w := range b.Wraps {
			if n := s.nodes[w.Node]; n != nil && n.Candidate() && !k.wrapped(w.Node) {
				k.Wraps = append(k.Wraps, w)
			}
		}
		slices.SortFunc(k.Wraps, func(a, b Wrap) int { return compareNode(a.Node, b.Node) })
		keys[len(keys)-1] = &k
	}
	now := keys[len(keys)-1].Number
	for _, l := range b.Links {
		for i, old := range keys {
			if old.Number == l.Number && old.Number < now && len(old.Next) == 0 {
				keys[i] = &CandidateKey{Number: old.Number, Public: old.Public, Next: l.Box, NextKey: now}
			}
		}
	}
	s.candidateKeys = keys
	for _, x := range b.Users {
		old := s.users[x.User]
		if old == nil || old.Verifier == nil || old.CredVersion != x.Version {
			continue
		}
		u, v := *old, *old.Verifier
		if len(x.Candidates) > 0 {
			v.Candidates, v.Key = x.Candidates, now
		}
		if len(x.Home) > 0 && x.To == old.Home {
			v.Home, v.To = x.Home, x.To
		}
		u.Verifier = &v
		s.users[u.ID] = &u
		s.changed |= Users
	}
	if len(b.Authority) > 0 && s.authority != nil {
		a := *s.authority
		a.Secret.Candidates, a.Secret.Key = b.Authority, now
		s.authority = &a
	}
	s.dropKeys()
}

func (k *CandidateKey) wrapped(id mesh.NodeID) bool {
	return slices.ContainsFunc(k.Wraps, func(w Wrap) bool { return w.Node == id })
}

// dropKeys forgets the oldest keys while nothing is sealed to them.
func (s *state) dropKeys() {
	if len(s.candidateKeys) == 1 {
		return
	}
	lowest := s.candidateKey().Number
	if s.authority != nil {
		lowest = min(lowest, s.authority.Secret.Key)
	}
	for _, u := range s.users {
		if u.Verifier != nil {
			lowest = min(lowest, u.Verifier.Key)
		}
	}
	s.candidateKeys = slices.DeleteFunc(s.candidateKeys, func(k *CandidateKey) bool { return k.Number < lowest })
}

func compareNode(a, b mesh.NodeID) int {
	switch {
	case a < b:
		return -1
	case a > b:
		return 1
	}
	return 0
}
