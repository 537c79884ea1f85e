package mailstore

import (
	"slices"
	"sync"
	"sync/atomic"

	"posthouse/mesh"
)

// brimRoom is how little room makes a mailbox full in others' eyes, or an eighth
// of its quota where that is less. One that merely had no room for a very large
// message goes on taking small ones.
const brimRoom = 64 << 10

// brim are the mailboxes that a delivery found full: what others are told of, so
// that they need not try. It is a hint in memory; the delivery decides.
type brim struct {
	n atomic.Int32 // of full

	mu   sync.Mutex
	full map[mesh.MailboxID]struct{}
}

func (b *brim) add(id mesh.MailboxID) (isNew bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if _, had := b.full[id]; had {
		return false
	}
	b.full[id] = struct{}{}
	b.n.Store(int32(len(b.full)))
	return true
}

func (b *brim) drop(id mesh.MailboxID) {
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.full, id)
	b.n.Store(int32(len(b.full)))
}

func (b *brim) has(id mesh.MailboxID) bool {
	if b.n.Load() == 0 {
		return false
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	_, ok := b.full[id]
	return ok
}

// IsFull reports whether a mailbox was found full by a delivery, and Full has not
// found room in it since.
func (s *Store) IsFull(id mesh.MailboxID) bool { return s.brim.has(id) }

// Full returns the mailboxes that were found full and are so still, ordered.
// Those that have room by now are forgotten.
func (s *Store) Full() []mesh.MailboxID {
	s.brim.mu.Lock()
	ids := make([]mesh.MailboxID, 0, len(s.brim.full))
	for id := range s.brim.full {
		ids = append(ids, id)
	}
	s.brim.mu.Unlock()
	ids = slices.DeleteFunc(ids, func(id mesh.MailboxID) bool {
		if mb, err := s.resident(id); err != nil || mb.brimful() {
			return false // what cannot be read now stays as it was found
		}
		s.brim.drop(id)
		return true
	})
	slices.SortFunc(ids, func(a, b mesh.MailboxID) int { return slices.Compare(a[:], b[:]) })
	return ids
}

// brimful reports whether next to nothing fits.
func (mb *Mailbox) brimful() bool {
	quota := mb.quota()
	mb.mu.Lock()
	defer mb.mu.Unlock()
	return mb.there && mb.isBrimful(quota)
}

// isBrimful is brimful with mb.mu held.
func (mb *Mailbox) isBrimful(quota int64) bool { return !mb.room(min(brimRoom, quota/8), quota) }
