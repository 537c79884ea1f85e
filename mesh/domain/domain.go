// Package domain is the domain state: what all nodes of a mesh must agree on.
// Domains, nodes and their keys, users and their homes, groups, aliases, device
// rules, settings, join tokens and applications live here, together with the
// commands that change them and the queries that read them.
//
// It is a deterministic state machine and nothing else: the same commands at
// the same indexes give the same state, bit for bit, on every node. It knows no
// Raft, reads no clock, opens no file and starts no goroutine. mesh/election
// feeds it (Apply, Snapshot, Restore); everybody else asks it.
//
// A refused command (a taken name, an expired token) is a result like any
// other, decided here and the same everywhere. Only what this version cannot
// understand is an error: then the caller must stop feeding the machine, and
// the state stays readable as it was.
//
// Resources come with bookings; Resolve has their place in its order.
package domain

import (
	"fmt"
	"slices"
	"sync"

	"posthouse/mesh"
)

// Part is a set of parts of the state.
type Part uint16

// The parts.
const (
	Lineages Part = 1 << iota
	Domains
	Nodes
	Users
	Homes // some user's home; Users is set too
	Groups
	Aliases
	Rules
	Values // settings
	Tokens
	Applications
	Secrets       // the candidates' key, or the client-facing authority
	AllParts Part = 1<<iota - 1
)

// Change says what a command, or a restored snapshot, has changed.
type Change struct {
	Index uint64
	Parts Part
}

// Machine holds the domain state. All methods are safe for concurrent use;
// Apply and Restore are called by one goroutine.
type Machine struct {
	mu      sync.RWMutex // guards s and what it points to, but for the immutable records
	s       *state
	keyring Keyring // nil: nothing can be opened here

	hashMu      sync.Mutex // guards the last Hash and what it was of
	hashedState *state
	hashedIndex uint64
	hashed      [32]byte

	watchMu  sync.Mutex
	watchers map[int]func(Change)
	nextID   int
}

// NewMachine returns a machine with the empty state, at index 0.
func NewMachine() *Machine {
	return &Machine{s: newState(), watchers: map[int]func(Change){}}
}

// Watch calls f after every change, in order, from the goroutine that applied
// it, until cancel is called. f must not block and may read the machine.
func (m *Machine) Watch(f func(Change)) (cancel func()) {
	m.watchMu.Lock()
	defer m.watchMu.Unlock()
	id := m.nextID
	m.nextID++
	m.watchers[id] = f
	return func() {
		m.watchMu.Lock()
		defer m.watchMu.Unlock()
		delete(m.watchers, id)
	}
}

func (m *Machine) notify(c Change) {
	m.watchMu.Lock()
	ids := make([]int, 0, len(m.watchers))
	for id := range m.watchers {
		ids = append(ids, id)
	}
	slices.Sort(ids)
	fs := make([]func(Change), len(ids))
	for i, id := range ids {
		fs[i] = m.watchers[id]
	}
	m.watchMu.Unlock()
	for _, f := range fs {
		f(c)
	}
}

// Apply applies the command at index and returns its encoded Result (see
// DecodeResult). An error means that this build cannot go on: ErrUnknownCommand
// or ErrIndex; nothing was changed then and nothing later may be applied.
func (m *Machine) Apply(index, term uint64, command []byte) ([]byte, error) {
	r, err := m.ApplyResult(index, term, command)
	if err != nil {
		return nil, err
	}
	return EncodeResult(r), nil
}

// ApplyResult is Apply with the result decoded.
func (m *Machine) ApplyResult(index, term uint64, command []byte) (Result, error) {
	c, err := Decode(command)
	m.mu.Lock()
	s := m.s
	if index <= s.index {
		m.mu.Unlock()
		return Result{}, fmt.Errorf("%w: %d, applied %d", ErrIndex, index, s.index)
	}
	if err != nil && !isMalformed(err) {
		m.mu.Unlock()
		return Result{}, err
	}
	s.index, s.term, s.changed = index, term, 0
	r := s.run(c, err)
	parts := s.changed
	m.mu.Unlock()
	if parts != 0 {
		m.notify(Change{index, parts})
	}
	return r, nil
}

// Applied returns the index and term of the last applied command, or of the
// last snapshot.
func (m *Machine) Applied() (index, term uint64) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return m.s.index, m.s.term
}

// ref is what an address key leads to.
type ref struct {
	what refKind
	id   mesh.ID
}

type refKind uint8

const (
	refUser refKind = iota + 1
	refGroup
	refAlias
)

// state is the data itself with its look-ups. Maps are keyed by identity;
// records in them are immutable.
type state struct {
	index, term uint64
	lineages    []Lineage // the present one last
	settings    Settings
	domains     map[mesh.ID]*Domain
	nodes       map[mesh.NodeID]*Node
	users       map[mesh.ID]*User
	groups      map[mesh.ID]*Group
	aliases     map[mesh.ID]*Alias
	rules       map[mesh.ID]*DeviceRule
	tokens      map[mesh.ID]*Token
	pending     map[mesh.ID]*Pending
	journal     []Entry // ring once full
	oldest      int     // its oldest entry
	// candidateKeys has the one in use last; empty before founding.
	candidateKeys []*CandidateKey
	authority     *Authority

	// look-ups, derived from the above
	domainNames map[string]*Domain             // domain key → domain, aliases too
	names       map[string]ref                 // canonical address key → user, group, alias
	mailboxes   map[mesh.MailboxID]mesh.ID     // → user
	keys        map[mesh.KeyHash][]mesh.NodeID // → nodes that have or had the key
	nodeNames   map[string]mesh.NodeID         // folded name → admitted node
	results     map[mesh.ID]int                // command id → place in journal
	changed     Part                           // by the running command
}

func newState() *state {
	s := &state{
		domains: map[mesh.ID]*Domain{}, nodes: map[mesh.NodeID]*Node{}, users: map[mesh.ID]*User{}, groups: map[mesh.ID]*Group{},
		aliases: map[mesh.ID]*Alias{}, rules: map[mesh.ID]*DeviceRule{}, tokens: map[mesh.ID]*Token{}, pending: map[mesh.ID]*Pending{},
	}
	s.rebuild()
	return s
}

// rebuild makes all look-ups anew from the records.
func (s *state) rebuild() {
	s.domainNames = map[string]*Domain{}
	for _, d := range s.domains {
		s.domainNames[mesh.DomainKey(d.Name)] = d
		for _, a := range d.Aliases {
			s.domainNames[mesh.DomainKey(a)] = d
		}
	}
	s.names = make(map[string]ref, len(s.users)+len(s.groups)+len(s.aliases))
	s.mailboxes = make(map[mesh.MailboxID]mesh.ID, len(s.users))
	for _, u := range s.users {
		s.mailboxes[u.Mailbox] = u.ID
		s.enter(ref{refUser, u.ID}, u.Address, u.Aliases)
	}
	for _, g := range s.groups {
		s.enter(ref{refGroup, g.ID}, g.Address, g.Aliases)
	}
	for _, a := range s.aliases {
		s.enter(ref{refAlias, a.ID}, a.Address, nil)
	}
	s.keys = make(map[mesh.KeyHash][]mesh.NodeID, len(s.nodes))
	s.nodeNames = make(map[string]mesh.NodeID, len(s.nodes))
	for _, n := range s.nodes {
		s.keys[n.Key] = append(s.keys[n.Key], n.ID)
		if n.Member() {
			s.nodeNames[foldName(n.Name)] = n.ID
		}
	}
	for _, ids := range s.keys {
		slices.Sort(ids)
	}
	s.results = make(map[mesh.ID]int, len(s.journal))
	for i := range s.journal {
		s.results[s.journal[i].ID] = i
	}
}

func (s *state) enter(r ref, address string, more []string) {
	s.names[s.canonical(address)] = r
	for _, a := range more {
		s.names[s.canonical(a)] = r
	}
}

func (s *state) leave(address string, more []string) {
	delete(s.names, s.canonical(address))
	for _, a := range more {
		delete(s.names, s.canonical(a))
	}
}
