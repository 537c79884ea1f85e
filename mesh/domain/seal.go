package domain

import (
	"fmt"
	"maps"
	"slices"

	"posthouse/mesh"
)

// SetKeyring gives the machine the node's key, before it is used. Without one
// Prepare attaches nothing and nothing can be opened.
func (m *Machine) SetKeyring(k Keyring) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.keyring = k
}

// NewCandidateKey makes the first key of a mesh, for its founder alone.
func NewCandidateKey(k Keyring, founder mesh.SealKey) (*CandidateKey, error) {
	private, public, err := k.NewSealPair()
	if err != nil {
		return nil, err
	}
	box, err := k.Seal(founder, aboutCandidates(1), private)
	if err != nil {
		return nil, err
	}
	return &CandidateKey{Number: 1, Public: public, Wraps: []Wrap{{k.Self(), box}}}, nil
}

// SealVerifier seals a user's verifier for a home and the candidates.
func SealVerifier(k Keyring, user mesh.ID, verifier []byte, home mesh.NodeID, to mesh.SealKey, candidates *CandidateKey) (*Sealed, error) {
	a, err := k.Seal(to, aboutVerifier(user), verifier)
	if err != nil {
		return nil, err
	}
	b, err := k.Seal(candidates.Public, aboutVerifier(user), verifier)
	if err != nil {
		return nil, err
	}
	return &Sealed{Home: a, To: home, Candidates: b, Key: candidates.Number}, nil
}

// SealAuthority seals the client-facing authority for the candidates.
func SealAuthority(k Keyring, certificate, secret []byte, candidates *CandidateKey) (*Authority, error) {
	box, err := k.Seal(candidates.Public, aboutAuthority, secret)
	if err != nil {
		return nil, err
	}
	return &Authority{Certificate: certificate, Secret: Sealed{Candidates: box, Key: candidates.Number}}, nil
}

// SealVerifier is the function of that name, by what holds now.
func (m *Machine) SealVerifier(user mesh.ID, verifier []byte, home mesh.NodeID) (*Sealed, error) {
	m.mu.RLock()
	k, n := m.keyring, m.s.nodes[home]
	var c *CandidateKey
	if len(m.s.candidateKeys) > 0 {
		c = m.s.candidateKey()
	}
	m.mu.RUnlock()
	if k == nil || n == nil || c == nil {
		return nil, fmt.Errorf("seal a password for node %s: %w", home, ErrSealed)
	}
	return SealVerifier(k, user, verifier, home, n.Seal, c)
}

// Verifier opens a user's password verifier: "" when the user has none, and
// ErrSealed on a node that is neither the home nor a candidate.
func (m *Machine) Verifier(u *User) (string, error) {
	if u.Verifier == nil {
		return "", nil
	}
	b, err := m.opener().secret(u.Verifier, aboutVerifier(u.ID))
	return string(b), err
}

// Holds reports whether this node can open the verifiers of all users.
func (m *Machine) Holds() bool {
	o := m.opener()
	return len(o.keys) > 0 && o.number(o.keys[len(o.keys)-1].Number) != nil
}

// Authority returns the client-facing authority's certificate, PEM; nil before
// founding.
func (m *Machine) Authority() []byte {
	m.mu.RLock()
	defer m.mu.RUnlock()
	if m.s.authority == nil {
		return nil
	}
	return m.s.authority.Certificate
}

// AuthoritySecret opens the authority's key; ErrSealed on a node that is no
// candidate.
func (m *Machine) AuthoritySecret() ([]byte, error) {
	m.mu.RLock()
	a := m.s.authority
	m.mu.RUnlock()
	if a == nil {
		return nil, ErrSealed
	}
	return m.opener().secret(&a.Secret, aboutAuthority)
}

// opener opens boxes of one picture of the state. It is for one goroutine.
type opener struct {
	Keyring
	keys   []*CandidateKey
	opened map[uint64][]byte // nil: cannot be
}

func (m *Machine) opener() *opener {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return newOpener(m.keyring, m.s)
}

func newOpener(k Keyring, s *state) *opener {
	return &opener{k, s.candidateKeys, map[uint64][]byte{}}
}

// number returns the private half of a candidates' key, nil if it cannot be had.
func (o *opener) number(n uint64) []byte {
	if o.Keyring == nil {
		return nil
	}
	if p, done := o.opened[n]; done {
		return p
	}
	o.opened[n] = nil
	at := slices.IndexFunc(o.keys, func(k *CandidateKey) bool { return k.Number == n })
	if at < 0 {
		return nil
	}
	k := o.keys[at]
	for _, w := range k.Wraps {
		if w.Node == o.Self() {
			if p, err := o.Open(aboutCandidates(n), w.Box); err == nil {
				o.opened[n] = p
			}
			return o.opened[n]
		}
	}
	if len(k.Next) > 0 && k.NextKey > n {
		if next := o.number(k.NextKey); next != nil {
			if p, err := o.OpenWith(next, aboutCandidates(n), k.Next); err == nil {
				o.opened[n] = p
			}
		}
	}
	return o.opened[n]
}

// secret opens a secret by whichever key this node has.
func (o *opener) secret(v *Sealed, about string) ([]byte, error) {
	if o.Keyring == nil {
		return nil, ErrSealed
	}
	if v.To == o.Self() {
		if b, err := o.Open(about, v.Home); err == nil {
			return b, nil
		}
	}
	p := o.number(v.Key)
	if p == nil {
		return nil, ErrSealed
	}
	b, err := o.OpenWith(p, about, v.Candidates)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrSealed, err)
	}
	return b, nil
}

// opens reports whether a node should be able to open a key, by what stands in
// the state.
func (s *state) opens(node mesh.NodeID, number uint64) bool {
	for k := s.numbered(number); k != nil; k = s.numbered(k.NextKey) {
		if k.wrapped(node) {
			return true
		}
		if k.NextKey <= k.Number {
			return false
		}
	}
	return false
}

// Mend returns what is sealed to the wrong nodes and this one can put right; nil
// for nothing. The master (by its id, 0 for none) puts right whatever it can;
// others only what it cannot: after a promotion on a node that was no candidate,
// each home and each older candidate gives what it has.
func (m *Machine) Mend(master mesh.NodeID) (*Reseal, error) {
	m.mu.RLock()
	k := m.keyring
	if k == nil || len(m.s.candidateKeys) == 0 || m.s.wellSealed() {
		m.mu.RUnlock()
		return nil, nil
	}
	s := m.s.light()
	m.mu.RUnlock()
	return s.mend(k, master, false)
}

// wellSealed reports whether every secret is sealed to whom it has to be.
func (s *state) wellSealed() bool {
	key, cands := s.candidateKey(), 0
	for _, n := range s.nodes {
		if n.Candidate() {
			cands++
			if !key.wrapped(n.ID) {
				return false
			}
		}
	}
	if cands != len(key.Wraps) || len(s.candidateKeys) > 1 {
		return false
	}
	for _, u := range s.users {
		if u.Verifier != nil && u.Verifier.To != u.Home {
			return false
		}
	}
	return true
}

// light is enough of the state for mend: its own maps over immutable records.
func (s *state) light() *state {
	return &state{nodes: maps.Clone(s.nodes), users: maps.Clone(s.users), candidateKeys: s.candidateKeys, authority: s.authority}
}

// mend computes a Reseal; fresh lets it begin a new key where the one in use
// cannot be opened.
func (s *state) mend(k Keyring, master mesh.NodeID, fresh bool) (*Reseal, error) {
	o, leads := newOpener(k, s), k.Self() == master
	key := s.candidateKey()
	r := &Reseal{Key: key.Number}
	if leads {
		next, err := s.mendKey(o, r, fresh)
		if err != nil {
			return nil, err
		}
		key = next
	}
	for _, old := range s.candidateKeys[:len(s.candidateKeys)-1] {
		if len(old.Next) > 0 || !leads && s.opens(master, old.Number) {
			continue
		}
		if err := r.link(o, old.Number, key.Public); err != nil {
			return nil, err
		}
	}
	if s.authority != nil && s.authority.Secret.Key != key.Number && (leads || !s.opens(master, s.authority.Secret.Key)) {
		if b, err := o.secret(&s.authority.Secret, aboutAuthority); err == nil {
			if r.Authority, err = k.Seal(key.Public, aboutAuthority, b); err != nil {
				return nil, err
			}
		}
	}
	if err := s.mendUsers(o, r, key, master); err != nil {
		return nil, err
	}
	if r.New == nil && len(r.Wraps)+len(r.Links)+len(r.Users)+len(r.Authority) == 0 {
		return nil, nil
	}
	return r, nil
}

// mendKey has the candidates' key held by exactly the candidates, and returns
// the one that will be in use.
func (s *state) mendKey(o *opener, r *Reseal, fresh bool) (*CandidateKey, error) {
	key, cands := s.candidateKey(), s.candidates()
	private := o.number(key.Number)
	if private == nil && !fresh || len(cands) == 0 {
		return key, nil
	}
	strange := rotating && slices.ContainsFunc(key.Wraps, func(w Wrap) bool { n := s.nodes[w.Node]; return n == nil || !n.Candidate() })
	if private != nil && !strange {
		for _, n := range cands {
			if key.wrapped(n.ID) {
				continue
			}
			box, err := o.Seal(n.Seal, aboutCandidates(key.Number), private)
			if err != nil {
				return nil, err
			}
			r.Wraps = append(r.Wraps, Wrap{n.ID, box})
		}
		return key, nil
	}
	secret, public, err := o.NewSealPair()
	if err != nil {
		return nil, err
	}
	r.New = &CandidateKey{Number: key.Number + 1, Public: public}
	for _, n := range cands {
		box, err := o.Seal(n.Seal, aboutCandidates(r.New.Number), secret)
		if err != nil {
			return nil, err
		}
		r.New.Wraps = append(r.New.Wraps, Wrap{n.ID, box})
	}
	return r.New, r.link(o, key.Number, public)
}

// link seals an older key to the one in use, if this node can open it.
func (r *Reseal) link(o *opener, number uint64, to mesh.SealKey) error {
	private := o.number(number)
	if private == nil {
		return nil
	}
	box, err := o.Seal(to, aboutCandidates(number), private)
	if err == nil {
		r.Links = append(r.Links, Link{number, box})
	}
	return err
}

func (s *state) mendUsers(o *opener, r *Reseal, key *CandidateKey, master mesh.NodeID) error {
	var wrong []*User
	for _, u := range s.users {
		if v := u.Verifier; v != nil && (v.Key != key.Number || v.To != u.Home) && (o.Self() == master || v.To != master && !s.opens(master, v.Key)) {
			wrong = append(wrong, u)
		}
	}
	slices.SortFunc(wrong, func(a, b *User) int { return compareID(a.ID, b.ID) })
	for _, u := range wrong {
		v, about := u.Verifier, aboutVerifier(u.ID)
		secret, err := o.secret(v, about)
		if err != nil {
			continue // another node can
		}
		x := ResealUser{User: u.ID, Version: u.CredVersion}
		if v.Key != key.Number {
			if x.Candidates, err = o.Seal(key.Public, about, secret); err != nil {
				return err
			}
		}
		if home := s.nodes[u.Home]; v.To != u.Home && home != nil {
			if x.Home, err = o.Seal(home.Seal, about, secret); err != nil {
				return err
			}
			x.To = u.Home
		}
		if r.Users = append(r.Users, x); len(r.Users) == resealAtOnce {
			return nil
		}
	}
	return nil
}

// attach completes a command that changes a home or the candidates with what has
// to be sealed anew: it tries the command on a copy of the state and mends that.
func (m *Machine) attach(c *Command) error {
	fresh := false
	switch c.Body.(type) {
	case *AdmitNode, *RevokeNode, *ReplaceNode, *UpdateNode, *SetHome:
	case *Promote:
		fresh = true
	default:
		return nil
	}
	m.mu.RLock()
	k := m.keyring
	if k == nil || len(m.s.candidateKeys) == 0 {
		m.mu.RUnlock()
		return nil
	}
	s := m.s.copied()
	m.mu.RUnlock()
	if s.run(c, nil).Code != OK {
		return nil // it will be refused again
	}
	var err error
	c.Seal, err = s.mend(k, k.Self(), fresh)
	return err
}

// copied is a state on which the commands of attach can be tried: what they
// write into is its own. Its journal is empty.
func (s *state) copied() *state {
	c := *s
	c.lineages, c.journal, c.oldest, c.results = slices.Clone(s.lineages), nil, 0, map[mesh.ID]int{}
	c.nodes, c.users, c.tokens, c.pending = maps.Clone(s.nodes), maps.Clone(s.users), maps.Clone(s.tokens), maps.Clone(s.pending)
	c.nodeNames, c.keys = maps.Clone(s.nodeNames), make(map[mesh.KeyHash][]mesh.NodeID, len(s.keys))
	for k, ids := range s.keys {
		c.keys[k] = slices.Clone(ids)
	}
	return &c
}

// mayReseal says which Reseal a node may ask for: the master any; a candidate
// any but a key; others only that of their own people.
func (m *Machine) mayReseal(b *Reseal, from mesh.NodeID) Result {
	m.mu.RLock()
	defer m.mu.RUnlock()
	n := m.s.nodes[from]
	switch {
	case m.keyring != nil && from == m.keyring.Self():
		return Result{}
	case b.New != nil || len(b.Wraps) > 0 || n == nil:
		return no(Invalid, "the master alone changes the candidates' key")
	case n.Candidate():
		return Result{}
	case len(b.Links) > 0 || len(b.Authority) > 0:
		return no(Invalid, "a candidate alone seals what is not its own people's")
	}
	for _, x := range b.Users {
		if u := m.s.users[x.User]; u == nil || u.Verifier == nil || u.Verifier.To != from {
			return no(Invalid, "a node seals the passwords of its own people only")
		}
	}
	return Result{}
}
