package mailstore

import (
	"weak"

	"posthouse/mailstore/journal"
	"posthouse/mesh"
)

// Reader is a second Store on a journal, for reading only: nothing that is
// written reaches it.
func Reader(j *journal.Journal) *Store {
	return &Store{
		j: j, opt: Options{Cached: 1},
		boxes: map[mesh.MailboxID]weak.Pointer[Mailbox]{}, busy: map[*Mailbox]struct{}{}, loaded: map[*Folder]struct{}{},
	}
}
