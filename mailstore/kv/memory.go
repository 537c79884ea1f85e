package kv

import (
	"sync"

	"github.com/google/btree"
)

// Memory is what a View with Options.Memory would have on disk: the simulator
// holds it between a close, or a crash, and the next open. The zero value is
// an absent view. One View at a time.
type Memory struct {
	mu      sync.Mutex
	rows    *btree.BTreeG[row]
	meta    meta
	made    bool
	open    bool
	damaged bool
	history []moment
	keep    bool
}

type moment struct {
	rows *btree.BTreeG[row]
	meta meta
}

// KeepHistory makes Rewind possible. Before the first open.
func (m *Memory) KeepHistory() { m.mu.Lock(); m.keep = true; m.mu.Unlock() }

// Rewind goes back to the last commit at or before seq and returns where that
// was; 0 is an absent view. The view must be closed.
func (m *Memory) Rewind(seq uint64) uint64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	for i := len(m.history) - 1; i >= 0; i-- {
		if h := m.history[i]; h.meta.Applied <= seq {
			m.rows, m.meta = h.rows.Clone(), h.meta
			m.history = m.history[:i+1]
			return m.meta.Applied
		}
	}
	m.rows, m.meta, m.made, m.history = nil, meta{}, false, nil
	return 0
}

// Damage makes every read of committed rows fail from now on, until the view
// is opened again and thereby set aside.
func (m *Memory) Damage() { m.mu.Lock(); m.damaged = true; m.mu.Unlock() }

// Applied returns the position of the last commit; 0 for an absent view.
func (m *Memory) Applied() uint64 { m.mu.Lock(); defer m.mu.Unlock(); return m.meta.Applied }

func (m *Memory) clear() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.rows, m.meta, m.made, m.damaged, m.history = nil, meta{}, false, false, nil
}

// memStore keeps the committed rows in a Memory.
type memStore struct{ m *Memory }

func openMemory(m *Memory) (*memStore, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.open {
		return nil, ErrLocked
	}
	m.open = true
	if m.rows == nil {
		m.rows = btree.NewG(32, rowLess)
	}
	return &memStore{m}, nil
}

func (s *memStore) meta() (meta, bool, error) {
	s.m.mu.Lock()
	defer s.m.mu.Unlock()
	if s.m.damaged {
		return meta{}, false, ErrDamaged
	}
	return s.m.meta, s.m.made, nil
}

func (s *memStore) commit(rows []row, m meta) error {
	s.m.mu.Lock()
	defer s.m.mu.Unlock()
	for _, r := range rows {
		if r.del {
			s.m.rows.Delete(r)
		} else {
			s.m.rows.ReplaceOrInsert(r)
		}
	}
	s.m.meta, s.m.made = m, true
	if s.m.keep {
		s.m.history = append(s.m.history, moment{s.m.rows.Clone(), m})
	}
	return nil
}

func (s *memStore) snapshot() (snapshot, error) {
	s.m.mu.Lock()
	defer s.m.mu.Unlock()
	return &memSnapshot{rows: s.m.rows.Clone(), m: s.m}, nil
}

func (s *memStore) prepare() error { return nil }
func (s *memStore) close() error {
	s.m.mu.Lock()
	s.m.open = false
	s.m.mu.Unlock()
	return nil
}
func (s *memStore) limits() (bytes, ops int) { return 1 << 20, 8 << 10 }

type memSnapshot struct {
	rows *btree.BTreeG[row]
	m    *Memory
}

func (s *memSnapshot) bad() error {
	s.m.mu.Lock()
	defer s.m.mu.Unlock()
	if s.m.damaged {
		return ErrDamaged
	}
	return nil
}

func (s *memSnapshot) get(key []byte) ([]byte, bool, error) {
	if err := s.bad(); err != nil {
		return nil, false, err
	}
	r, ok := s.rows.Get(row{key: key})
	return r.value, ok, nil
}

func (s *memSnapshot) iter(prefix, from []byte) iterator {
	if err := s.bad(); err != nil {
		return badIter{err}
	}
	return newTreeIter(s.rows, from, prefixEnd(prefix))
}

func (s *memSnapshot) verify() error { return s.bad() }
func (s *memSnapshot) release()      {}

// badIter is an iterator that could not start.
type badIter struct{ e error }

func (badIter) valid() bool            { return false }
func (badIter) key() []byte            { return nil }
func (badIter) value() ([]byte, error) { return nil, nil }
func (badIter) next()                  {}
func (b badIter) err() error           { return b.e }
func (badIter) close()                 {}
