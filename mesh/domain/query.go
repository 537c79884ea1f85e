package domain

import (
	"cmp"
	"slices"
	"strings"

	"posthouse/mesh"
)

// Lineages returns the present lineage last, its ancestors before it; empty
// before founding.
func (m *Machine) Lineages() []Lineage {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return slices.Clone(m.s.lineages)
}

// Founded reports whether there is a mesh at all.
func (m *Machine) Founded() bool {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return len(m.s.lineages) > 0
}

// Settings returns the values of the whole mesh.
func (m *Machine) Settings() Settings {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return m.s.settings
}

// Node returns a node, also one that was removed.
func (m *Machine) Node(id mesh.NodeID) (*Node, bool) {
	return get(m, func(s *state) *Node { return s.nodes[id] })
}

// User returns a user.
func (m *Machine) User(id mesh.ID) (*User, bool) {
	return get(m, func(s *state) *User { return s.users[id] })
}

// Group returns a group.
func (m *Machine) Group(id mesh.ID) (*Group, bool) {
	return get(m, func(s *state) *Group { return s.groups[id] })
}

// Alias returns an alias.
func (m *Machine) Alias(id mesh.ID) (*Alias, bool) {
	return get(m, func(s *state) *Alias { return s.aliases[id] })
}

// Domain returns a domain.
func (m *Machine) Domain(id mesh.ID) (*Domain, bool) {
	return get(m, func(s *state) *Domain { return s.domains[id] })
}

// Token returns a join token.
func (m *Machine) Token(id mesh.ID) (*Token, bool) {
	return get(m, func(s *state) *Token { return s.tokens[id] })
}

// Pending returns an application.
func (m *Machine) Pending(id mesh.ID) (*Pending, bool) {
	return get(m, func(s *state) *Pending { return s.pending[id] })
}

func get[T any](m *Machine, find func(*state) *T) (*T, bool) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	v := find(m.s)
	return v, v != nil
}

// list copies the values of a map out of the state and sorts them.
func list[K comparable, T any](m *Machine, of func(*state) map[K]*T, less func(a, b *T) int) []*T {
	m.mu.RLock()
	from := of(m.s)
	out := make([]*T, 0, len(from))
	for _, v := range from {
		out = append(out, v)
	}
	m.mu.RUnlock()
	slices.SortFunc(out, less)
	return out
}

// Nodes returns all nodes, removed ones too, by name and then id.
func (m *Machine) Nodes() []*Node {
	return list(m, func(s *state) map[mesh.NodeID]*Node { return s.nodes }, func(a, b *Node) int {
		return cmp.Or(strings.Compare(foldName(a.Name), foldName(b.Name)), cmp.Compare(a.ID, b.ID))
	})
}

// Members returns the admitted nodes, by name.
func (m *Machine) Members() []*Node {
	return slices.DeleteFunc(m.Nodes(), func(n *Node) bool { return !n.Member() })
}

// NodeByKey returns the admitted node with that key. It is the one authority
// on who may connect.
func (m *Machine) NodeByKey(k mesh.KeyHash) (*Node, bool) {
	return get(m, func(s *state) *Node {
		for _, id := range s.keys[k] {
			if n := s.nodes[id]; n.Member() {
				return n
			}
		}
		return nil
	})
}

// NodeByName returns the admitted node with that name, in any case.
func (m *Machine) NodeByName(name string) (*Node, bool) {
	return get(m, func(s *state) *Node { return s.nodes[s.nodeNames[foldName(name)]] })
}

// Users returns all users, by address.
func (m *Machine) Users() []*User {
	return list(m, func(s *state) map[mesh.ID]*User { return s.users }, func(a, b *User) int {
		return cmp.Or(strings.Compare(a.Address, b.Address), compareID(a.ID, b.ID))
	})
}

// UserByMailbox returns the user whose mailbox it is.
func (m *Machine) UserByMailbox(id mesh.MailboxID) (*User, bool) {
	return get(m, func(s *state) *User { return s.users[s.mailboxes[id]] })
}

// UserCount returns how many users there are, and how many are at home at node.
func (m *Machine) UserCount(node mesh.NodeID) (all, home int) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	for _, u := range m.s.users {
		if u.Home == node {
			home++
		}
	}
	return len(m.s.users), home
}

// Groups returns all groups, by address.
func (m *Machine) Groups() []*Group {
	return list(m, func(s *state) map[mesh.ID]*Group { return s.groups }, func(a, b *Group) int {
		return cmp.Or(strings.Compare(a.Address, b.Address), compareID(a.ID, b.ID))
	})
}

// Aliases returns all aliases, by address.
func (m *Machine) Aliases() []*Alias {
	return list(m, func(s *state) map[mesh.ID]*Alias { return s.aliases }, func(a, b *Alias) int {
		return cmp.Or(strings.Compare(a.Address, b.Address), compareID(a.ID, b.ID))
	})
}

// LocalDomains returns all domains, by name.
func (m *Machine) LocalDomains() []*Domain {
	return list(m, func(s *state) map[mesh.ID]*Domain { return s.domains }, func(a, b *Domain) int {
		return cmp.Or(strings.Compare(a.Name, b.Name), compareID(a.ID, b.ID))
	})
}

// Rules returns the device rules in force at node: its own and the general ones.
func (m *Machine) Rules(node mesh.NodeID) []*DeviceRule {
	all := list(m, func(s *state) map[mesh.ID]*DeviceRule { return s.rules }, func(a, b *DeviceRule) int { return compareID(a.ID, b.ID) })
	return slices.DeleteFunc(all, func(r *DeviceRule) bool { return r.Node != 0 && r.Node != node })
}

// Tokens returns all join tokens, the newest first.
func (m *Machine) Tokens() []*Token {
	return list(m, func(s *state) map[mesh.ID]*Token { return s.tokens }, func(a, b *Token) int {
		return cmp.Or(cmp.Compare(b.Created, a.Created), compareID(a.ID, b.ID))
	})
}

// Applications returns all applications for admission, the newest first.
func (m *Machine) Applications() []*Pending {
	return list(m, func(s *state) map[mesh.ID]*Pending { return s.pending }, func(a, b *Pending) int {
		return cmp.Or(cmp.Compare(b.Asked, a.Asked), compareID(a.ID, b.ID))
	})
}

// CommandsSince returns the journal's entries with an index above index, in
// order. complete is false when older ones that should be among them were
// dropped.
func (m *Machine) CommandsSince(index uint64) (entries []Entry, complete bool) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	s := m.s
	complete = len(s.journal) < JournalSize
	for i := range s.journal {
		e := s.journal[(s.oldest+i)%len(s.journal)]
		if e.Index > index {
			entries = append(entries, e)
		} else {
			complete = true
		}
	}
	return entries, complete
}

// Known returns the result of a command that was applied before.
func (m *Machine) Known(command mesh.ID) (Result, bool) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	if i, ok := m.s.results[command]; ok {
		return m.s.journal[i].Res, true
	}
	return Result{}, false
}

func compareID(a, b mesh.ID) int { return strings.Compare(string(a[:]), string(b[:])) }
