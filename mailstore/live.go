package mailstore

import (
	"encoding/binary"
	"errors"
	"fmt"

	"posthouse/mailstore/journal"
	"posthouse/mailstore/log"
	"posthouse/mesh"
)

var (
	_ journal.Keeper  = (*Store)(nil)
	_ journal.Checker = (*Store)(nil)
)

// Live implements journal.Keeper: a message needs the record with its structure
// and the one with its body. It reads the rows of all messages.
func (s *Store) Live(mark func(seq uint64, size int64)) error {
	var bad error
	err := s.j.View().Scan([]byte("mM"), nil, func(k, v []byte) bool {
		var m msg
		if bad = m.parse(UID(binary.BigEndian.Uint32(k[len(k)-4:])), v); bad != nil {
			return false
		}
		if m.source == 0 {
			mark(m.seq, m.size)
		} else {
			mark(m.seq, 0)
			mark(m.source, m.size)
		}
		return true
	})
	return errors.Join(err, bad)
}

// Lasting implements journal.Keeper: without them messages would have no
// mailbox and no folder to be in.
func (s *Store) Lasting(k log.Kind) bool { return k == log.KindMailbox || k == log.KindFolder }

// Check implements journal.Checker: it compares each folder's counters with its
// messages, of one instant, and so finds rows that got lost. It keeps about 100
// bytes a folder in memory.
func (s *Store) Check() error {
	type count struct {
		messages, unseen, deleted uint32
		size                      int64
		next                      UID
		mod                       ModSeq
	}
	const prefix, number = 2, 2 + 16 + 4 // "mF" or "mM", mailbox, folder
	folders := map[string]*count{}
	boxes := map[mesh.MailboxID]bool{}
	var bad error
	wrong := func(format string, args ...any) bool {
		bad = fmt.Errorf(format+": %w", append(args, errRow)...)
		return false
	}
	err := s.j.View().Scan([]byte("m"), nil, func(k, v []byte) bool {
		if len(k) < prefix+16 {
			return true
		}
		box := mesh.MailboxID(k[prefix : prefix+16])
		switch string(k[:prefix]) {
		case "mB": // comes before all of the others
			boxes[box] = true
		case "mF":
			var f Folder
			if err := f.parse(v); err != nil || !boxes[box] {
				return wrong("folder %x of mailbox %s", k[prefix+16:], box)
			}
			folders[string(k[prefix:number])] = &count{f.messages, f.unseen, f.deleted, f.size, f.uidNext, f.mod}
		case "mM":
			var m msg
			uid := UID(binary.BigEndian.Uint32(k[number:]))
			c := folders[string(k[prefix:number])]
			if err := m.parse(uid, v); err != nil || c == nil || uid >= c.next || m.mod > c.mod {
				return wrong("message %d of mailbox %s", uid, box)
			}
			c.messages--
			c.size -= m.size
			if m.flags&bitSeen == 0 {
				c.unseen--
			}
			if m.flags&bitDeleted != 0 {
				c.deleted--
			}
		}
		return true
	})
	if err != nil || bad != nil {
		return errors.Join(err, bad)
	}
	for k, c := range folders {
		if c.messages != 0 || c.unseen != 0 || c.deleted != 0 || c.size != 0 {
			wrong("counters of folder %x of mailbox %s", k[16:], mesh.MailboxID([]byte(k[:16])))
			return bad
		}
	}
	return nil
}
