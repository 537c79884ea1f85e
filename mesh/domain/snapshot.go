package domain

import (
	"bufio"
	"bytes"
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"io"
	"slices"

	"posthouse/mesh"
)

// A snapshot is (all numbers big endian; DESIGN.md has the bytes):
//
//	"PHDS" version(1 byte)
//	{ length(4) kind(1) CBOR record(length) }…   canonical order
//	0(4)                                         end mark
//	SHA-256 of everything before it(32)
//
// Records of one kind follow each other ordered by identity, so that equal
// states have equal snapshots.
const (
	snapMagic   = "PHDS"
	snapVersion = 1
	maxRecord   = 2 * MaxCommand
)

type recordKind uint8

const (
	recHead recordKind = iota + 1
	recLineage
	recSettings
	recDomain
	recNode
	recUser
	recGroup
	recAlias
	recRule
	recToken
	recPending
	recEntry
	recCandidateKey
	recAuthority
)

type head struct {
	Index uint64 `cbor:"1,keyasint"`
	Term  uint64 `cbor:"2,keyasint"`
}

// ErrSnapshot means that a snapshot's bytes are damaged.
var ErrSnapshot = errors.New("the snapshot of the domain state is damaged")

// frozen is a consistent picture of the state: its own slices over immutable
// records.
type frozen struct {
	head     head
	lineages []Lineage
	settings Settings
	domains  []*Domain
	nodes    []*Node
	users    []*User
	groups   []*Group
	aliases  []*Alias
	rules    []*DeviceRule
	tokens   []*Token
	pending  []*Pending
	journal  []Entry
	keys     []*CandidateKey
	issuer   *Authority
}

// Snapshot takes a picture of the state, quickly; WriteTo of the result may
// run later, while the machine goes on.
func (m *Machine) Snapshot() io.WriterTo {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return m.s.freeze()
}

func (s *state) freeze() *frozen {
	f := &frozen{head: head{s.index, s.term}, lineages: slices.Clone(s.lineages), settings: s.settings,
		domains: values(s.domains), nodes: values(s.nodes), users: values(s.users), groups: values(s.groups), aliases: values(s.aliases),
		rules: values(s.rules), tokens: values(s.tokens), pending: values(s.pending), journal: make([]Entry, 0, len(s.journal)),
		keys: slices.Clone(s.candidateKeys), issuer: s.authority}
	f.journal = append(append(f.journal, s.journal[s.oldest:]...), s.journal[:s.oldest]...)
	return f
}

func values[K comparable, T any](m map[K]*T) []*T {
	out := make([]*T, 0, len(m))
	for _, v := range m {
		out = append(out, v)
	}
	return out
}

// WriteTo writes the snapshot.
func (f *frozen) WriteTo(w io.Writer) (int64, error) {
	b := bufio.NewWriterSize(w, 64<<10)
	sum := sha256.New()
	e := &snapWriter{w: b, sum: sum}
	e.write(append([]byte(snapMagic), snapVersion))
	e.record(recHead, f.head)
	for i := range f.lineages {
		e.record(recLineage, &f.lineages[i])
	}
	e.record(recSettings, &f.settings)
	sorted(e, recDomain, f.domains, func(a, b *Domain) int { return compareID(a.ID, b.ID) })
	sorted(e, recNode, f.nodes, func(a, b *Node) int { return cmp.Compare(a.ID, b.ID) })
	sorted(e, recUser, f.users, func(a, b *User) int { return compareID(a.ID, b.ID) })
	sorted(e, recGroup, f.groups, func(a, b *Group) int { return compareID(a.ID, b.ID) })
	sorted(e, recAlias, f.aliases, func(a, b *Alias) int { return compareID(a.ID, b.ID) })
	sorted(e, recRule, f.rules, func(a, b *DeviceRule) int { return compareID(a.ID, b.ID) })
	sorted(e, recToken, f.tokens, func(a, b *Token) int { return compareID(a.ID, b.ID) })
	sorted(e, recPending, f.pending, func(a, b *Pending) int { return compareID(a.ID, b.ID) })
	for i := range f.journal {
		e.record(recEntry, &f.journal[i])
	}
	for _, k := range f.keys {
		e.record(recCandidateKey, k)
	}
	if f.issuer != nil {
		e.record(recAuthority, f.issuer)
	}
	e.write([]byte{0, 0, 0, 0})
	e.sum = nil
	e.write(sum.Sum(nil))
	if e.err == nil {
		e.err = b.Flush()
	}
	if e.err != nil {
		return e.n, fmt.Errorf("write the snapshot of the domain state: %w", e.err)
	}
	return e.n, nil
}

func sorted[T any](e *snapWriter, kind recordKind, list []*T, less func(a, b *T) int) {
	slices.SortFunc(list, less)
	for _, v := range list {
		e.record(kind, v)
	}
}

type snapWriter struct {
	w   *bufio.Writer
	sum hash.Hash
	n   int64
	err error
	buf bytes.Buffer
}

func (e *snapWriter) write(b []byte) {
	if e.err != nil {
		return
	}
	if e.sum != nil {
		e.sum.Write(b)
	}
	n, err := e.w.Write(b)
	e.n += int64(n)
	e.err = err
}

func (e *snapWriter) record(kind recordKind, v any) {
	if e.err != nil {
		return
	}
	e.buf.Reset()
	e.buf.Write([]byte{0, 0, 0, 0, byte(kind)})
	if err := encMode.NewEncoder(&e.buf).Encode(v); err != nil {
		e.err = err
		return
	}
	b := e.buf.Bytes()
	binary.BigEndian.PutUint32(b, uint32(len(b)-5))
	e.write(b)
}

// Hash returns the SHA-256 of the canonical snapshot: equal on all nodes at
// equal index. It costs a walk over the state once after each change.
func (m *Machine) Hash() [32]byte {
	m.hashMu.Lock()
	defer m.hashMu.Unlock()
	s, index := m.at()
	if m.hashedState == s && m.hashedIndex == index {
		return m.hashed
	}
	h := sha256.New()
	m.Snapshot().WriteTo(h) // a hash takes every byte
	sum := [32]byte(h.Sum(nil))
	if s2, i2 := m.at(); s2 == s && i2 == index { // nothing changed in between
		m.hashedState, m.hashedIndex, m.hashed = s, index, sum
	}
	return sum
}

// at names the state of this instant: a change moves the index, a restore makes
// another state.
func (m *Machine) at() (*state, uint64) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return m.s, m.s.index
}

// Restore replaces the whole state by a snapshot. On any error the state stays
// as it was.
func (m *Machine) Restore(r io.Reader) error {
	s, err := readSnapshot(r)
	if err != nil {
		return err
	}
	m.mu.Lock()
	m.s = s
	m.mu.Unlock()
	m.notify(Change{s.index, AllParts})
	return nil
}

func readSnapshot(from io.Reader) (*state, error) {
	r := bufio.NewReaderSize(from, 64<<10)
	sum := sha256.New()
	t := io.TeeReader(r, sum)
	hdr := make([]byte, 5)
	if _, err := io.ReadFull(t, hdr); err != nil || string(hdr[:4]) != snapMagic {
		return nil, fmt.Errorf("%w: no header", ErrSnapshot)
	}
	if hdr[4] > snapVersion {
		return nil, fmt.Errorf("%w: snapshot format %d", ErrUnknownCommand, hdr[4])
	}
	s := newState()
	var buf []byte
	at := recHead
	for {
		if _, err := io.ReadFull(t, hdr[:4]); err != nil {
			return nil, fmt.Errorf("%w: cut off", ErrSnapshot)
		}
		n := binary.BigEndian.Uint32(hdr)
		if n == 0 {
			break
		}
		if _, err := io.ReadFull(t, hdr[:1]); err != nil || n > maxRecord {
			return nil, fmt.Errorf("%w: record of %d bytes", ErrSnapshot, n)
		}
		kind := recordKind(hdr[0])
		if kind < at || kind == recHead && s.index != 0 {
			return nil, fmt.Errorf("%w: records out of order", ErrSnapshot)
		}
		at = kind
		buf = slices.Grow(buf[:0], int(n))[:n]
		if _, err := io.ReadFull(t, buf); err != nil {
			return nil, fmt.Errorf("%w: cut off", ErrSnapshot)
		}
		if err := s.take(kind, buf); err != nil {
			return nil, err
		}
	}
	want := sum.Sum(nil)
	got := make([]byte, sha256.Size)
	if _, err := io.ReadFull(r, got); err != nil || !bytes.Equal(got, want) {
		return nil, fmt.Errorf("%w: checksum", ErrSnapshot)
	}
	if len(s.lineages) > 0 && len(s.candidateKeys) == 0 {
		return nil, fmt.Errorf("%w: it has no key of the candidates", ErrSnapshot)
	}
	s.rebuild()
	return s, nil
}

// take adds one record. A record of a kind or with a field that this version
// does not know is refused: dropping it would make another state of it.
func (s *state) take(kind recordKind, b []byte) (err error) {
	switch kind {
	case recHead:
		var h head
		err = decStrict.Unmarshal(b, &h)
		s.index, s.term = h.Index, h.Term
	case recLineage:
		var v Lineage
		err = decStrict.Unmarshal(b, &v)
		s.lineages = append(s.lineages, v)
	case recSettings:
		err = decStrict.Unmarshal(b, &s.settings)
	case recDomain:
		err = into(s.domains, b, func(v *Domain) mesh.ID { return v.ID })
	case recNode:
		err = into(s.nodes, b, func(v *Node) mesh.NodeID { return v.ID })
	case recUser:
		err = into(s.users, b, func(v *User) mesh.ID { return v.ID })
	case recGroup:
		err = into(s.groups, b, func(v *Group) mesh.ID { return v.ID })
	case recAlias:
		err = into(s.aliases, b, func(v *Alias) mesh.ID { return v.ID })
	case recRule:
		err = into(s.rules, b, func(v *DeviceRule) mesh.ID { return v.ID })
	case recToken:
		err = into(s.tokens, b, func(v *Token) mesh.ID { return v.ID })
	case recPending:
		err = into(s.pending, b, func(v *Pending) mesh.ID { return v.ID })
	case recEntry:
		var v Entry
		if err = decStrict.Unmarshal(b, &v); err == nil {
			if len(s.journal) == JournalSize {
				return fmt.Errorf("%w: more than %d journal entries", ErrSnapshot, JournalSize)
			}
			s.journal = append(s.journal, v)
		}
	case recCandidateKey:
		k := new(CandidateKey)
		err = decStrict.Unmarshal(b, k)
		s.candidateKeys = append(s.candidateKeys, k)
	case recAuthority:
		s.authority = new(Authority)
		err = decStrict.Unmarshal(b, s.authority)
	default:
		return fmt.Errorf("%w: record kind %d in the snapshot", ErrUnknownCommand, kind)
	}
	if err != nil {
		return fmt.Errorf("%w: record kind %d: %w", ErrSnapshot, kind, err)
	}
	return nil
}

func into[K comparable, T any](m map[K]*T, b []byte, id func(*T) K) error {
	v := new(T)
	if err := decStrict.Unmarshal(b, v); err != nil {
		return err
	}
	m[id(v)] = v
	return nil
}
