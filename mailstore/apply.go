package mailstore

import (
	"slices"

	"posthouse/mailstore/kv"
	"posthouse/mailstore/log"
	"posthouse/mesh"
)

// Apply implements journal.Engine: the only place where mailboxes change.
func (s *Store) Apply(rec log.Record, kb *kv.Batch, live bool) error {
	s.settle(rec.Seq)
	b := &batch{Batch: kb, seq: rec.Seq}
	switch rec.Kind {
	case log.KindDeliver:
		var r deliverRecord
		if err := decode(rec.Meta, &r); err != nil {
			return err
		}
		return s.applyDeliver(rec, &r, b)
	case log.KindAppend:
		return inMailbox(s, rec, b, func(mb *Mailbox, r *appendRecord, res *result, b *batch) error {
			return mb.applyAppend(rec.Ref, r, res, b)
		})
	case log.KindFlags:
		return inMailbox(s, rec, b, (*Mailbox).applyFlags)
	case log.KindExpunge:
		return inMailbox(s, rec, b, (*Mailbox).applyExpunge)
	case log.KindCopy:
		return inMailbox(s, rec, b, (*Mailbox).applyCopy)
	case log.KindFolder:
		return inMailbox(s, rec, b, (*Mailbox).applyFolder)
	case log.KindMailbox:
		var r mailboxRecord
		if err := decode(rec.Meta, &r); err != nil {
			return err
		}
		if r.Op == opRenew {
			s.epoch.Store(max(s.epoch.Load(), r.Epoch))
			b.Put(epochKey, epochRow(s.epoch.Load()))
			return nil
		}
		return s.with(r.Mailbox, b, func(mb *Mailbox, res *result) error { return mb.applyMade(&r, res, b) })
	}
	return nil
}

// inMailbox decodes a record that concerns one mailbox and has f apply it there.
func inMailbox[R any, P interface {
	*R
	record
	mailbox() mesh.MailboxID
}](s *Store, rec log.Record, b *batch, f func(*Mailbox, P, *result, *batch) error) error {
	r := P(new(R))
	if err := decode(rec.Meta, r); err != nil {
		return err
	}
	return s.with(r.mailbox(), b, func(mb *Mailbox, res *result) error { return f(mb, r, res, b) })
}

// with runs f on a mailbox with its lock held and writes the rows of the
// folders that f has touched.
func (s *Store) with(id mesh.MailboxID, b *batch, f func(*Mailbox, *result) error) error {
	mb, err := s.touch(id)
	if err != nil {
		return err
	}
	mb.mu.Lock()
	defer mb.mu.Unlock()
	b.folders = b.folders[:0]
	if err := f(mb, mb.ended(b.seq)); err != nil {
		return err
	}
	for _, f := range b.folders {
		f.touchedAt = b.seq
		f.signal()
		if !f.gone {
			b.Put(folderKey(mb.id, f.id), f.row())
		}
	}
	if s.brim.has(mb.id) {
		s.opt.Fuller() // there may be room now
	}
	return nil
}

// loadedFolder returns a folder with its messages, nil when it is gone.
func (mb *Mailbox) loadedFolder(id uint32) (*Folder, error) {
	f := mb.folders[id]
	if f == nil {
		return nil, nil
	}
	f.used.Store(mb.s.tick.Add(1))
	return f, f.load()
}

// named returns a loaded folder, and the messages of it that a record names;
// nil, noted in res, when it is gone.
func (mb *Mailbox) named(id uint32, packed []byte, res *result) (f *Folder, uids []UID, err error) {
	if uids, err = unpackUIDs(packed); err != nil {
		return nil, nil, err
	}
	if f, err = mb.loadedFolder(id); err != nil {
		return nil, nil, err
	}
	res.gone = f == nil
	return f, uids, nil
}

func (mb *Mailbox) applyMade(r *mailboxRecord, res *result, b *batch) error {
	if mb.there {
		return nil
	}
	mb.there, mb.base = true, r.Epoch
	for _, n := range r.Subscribe {
		mb.subscribed[n] = struct{}{}
	}
	mb.make(r.New, res, b)
	b.Put(boxKey(mb.id), mb.row())
	return nil
}

func (mb *Mailbox) applyAppend(ref log.Ref, r *appendRecord, res *result, b *batch) error {
	f := mb.folders[r.Folder]
	if f == nil {
		res.gone = true
		return nil
	}
	m := msg{uid: r.UID, mod: r.ModSeq, created: r.ModSeq, flags: r.System&systemMask | f.addWords(r.Keywords), size: r.Size, received: r.Time}
	m.setRef(ref)
	res.validity = f.validity()
	f.add(&m, b)
	return nil
}

func (mb *Mailbox) applyFlags(r *flagsRecord, res *result, b *batch) error {
	f, uids, err := mb.named(r.Folder, r.UIDs, res)
	if f == nil {
		return err
	}
	arg := r.System & systemMask
	if r.Op == FlagsRemove {
		arg |= f.keywords.known(r.Keywords)
	} else {
		arg |= f.addWords(r.Keywords)
	}
	f.applyFlags(r, uids, arg, res, b)
	return nil
}

func (mb *Mailbox) applyExpunge(r *expungeRecord, res *result, b *batch) error {
	f, uids, err := mb.named(r.Folder, r.UIDs, res)
	if f == nil {
		return err
	}
	if !r.Force {
		uids = slices.DeleteFunc(uids, func(u UID) bool {
			i, ok := f.find(u)
			return !ok || f.msgs[i].flags&bitDeleted == 0
		})
	}
	res.removed = append(res.removed, f.remove(uids, r.ModSeq, b)...)
	return nil
}

// addWords returns the bits of keywords, making the new ones known.
func (f *Folder) addWords(words []string) bits { return f.keywords.add(words) }

// advance takes a change's ModSeq.
func (f *Folder) advance(mod ModSeq) {
	f.mod = max(f.mod, mod)
	f.nextMod = max(f.nextMod, f.mod+1)
}

// count adds a message to the counters, or takes one from them.
func (f *Folder) count(m *msg, by int) {
	f.messages += uint32(by)
	f.size += int64(by) * m.size
	if m.flags&bitSeen == 0 {
		f.unseen += uint32(by)
	}
	if m.flags&bitDeleted != 0 {
		f.deleted += uint32(by)
	}
}

// add puts a new message at the end. It needs no messages loaded.
func (f *Folder) add(m *msg, b *batch) {
	f.uidNext = max(f.uidNext, m.uid+1)
	f.nextUID = max(f.nextUID, f.uidNext)
	f.advance(m.mod)
	f.count(m, 1)
	switch {
	case f.loaded:
		f.msgs = append(f.msgs, *m)
		f.note(m)
	default:
		if len(f.young) == 0 {
			f.mb.s.grown = append(f.mb.s.grown, f)
		}
		f.young = append(f.young, *m)
		if f.loading != nil {
			f.late = append(f.late, *m)
		}
	}
	b.Put(messageKey(f.mb.id, f.id, m.uid), m.row())
	b.folder(f)
}

// note adds to recent, which is complete after base.
func (f *Folder) note(m *msg) {
	if len(f.recent) > 256 && len(f.recent) > len(f.msgs)/4 {
		// Forget the older half; cut between two ModSeqs.
		half := len(f.recent) / 2
		f.base = f.recent[half-1].mod
		for half < len(f.recent) && f.recent[half].mod == f.base {
			half++
		}
		f.recent = append(f.recent[:0], f.recent[half:]...)
	}
	f.recent = append(f.recent, change{m.mod, m.uid})
}

// applyFlags changes those of uids that exist and fills in res. Without b it
// only fills in res.
func (f *Folder) applyFlags(r *flagsRecord, uids []UID, arg bits, res *result, b *batch) {
	for _, u := range uids {
		i, ok := f.find(u)
		if !ok {
			continue
		}
		m := &f.msgs[i]
		if r.UnchangedSince > 0 && m.mod > r.UnchangedSince {
			res.modified = append(res.modified, u)
			continue
		}
		if flags := r.Op.combine(m.flags, arg); flags != m.flags && b != nil {
			f.count(m, -1)
			m.flags, m.mod = flags, r.ModSeq
			f.count(m, 1)
			f.note(m)
			b.Put(messageKey(f.mb.id, f.id, u), m.row())
		}
		res.changed = append(res.changed, f.info(m))
	}
	if b != nil {
		f.advance(r.ModSeq)
		b.folder(f)
	}
}

// remove takes those of uids out that exist and returns them; loaded.
func (f *Folder) remove(uids []UID, mod ModSeq, b *batch) (removed []UID) {
	f.advance(mod)
	b.folder(f)
	t := tomb{mod: mod}
	first := -1
	for _, u := range uids {
		i, ok := f.find(u)
		if !ok {
			continue
		}
		if first < 0 {
			first = i
		}
		m := &f.msgs[i]
		f.count(m, -1)
		t.bury(u, m.created)
		removed = append(removed, u)
		b.Delete(messageKey(f.mb.id, f.id, u))
	}
	if len(removed) == 0 {
		return nil
	}
	kept, k := f.msgs[:first], 0
	for _, m := range f.msgs[first:] {
		if k < len(removed) && m.uid == removed[k] {
			k++
			continue
		}
		kept = append(kept, m)
	}
	f.msgs = kept
	b.Put(tombKey(f.mb.id, f.id, mod), t.row())
	f.tombs = append(f.tombs, t)
	f.runs += len(t.runs)
	if f.runs > maxRuns {
		f.forget(b)
	}
	return removed
}

// forget drops the oldest expunges until three quarters of the room are used.
func (f *Folder) forget(b *batch) {
	n := 0
	for n < len(f.tombs) && f.runs > maxRuns*3/4 {
		f.runs -= len(f.tombs[n].runs)
		f.floor = f.tombs[n].mod
		b.Delete(tombKey(f.mb.id, f.id, f.floor))
		n++
	}
	f.tombs = append(f.tombs[:0:0], f.tombs[n:]...)
}

func (mb *Mailbox) applyCopy(r *copyRecord, res *result, b *batch) error {
	from, uids, err := mb.named(r.From, r.UIDs, res)
	if err != nil {
		return err
	}
	to := mb.folders[r.To]
	if from == nil || to == nil {
		res.gone = true
		return nil
	}
	res.validity = to.validity()
	var copied []UID
	for n, u := range uids {
		i, ok := from.find(u)
		if !ok {
			continue
		}
		m := from.msgs[i]
		if to != from {
			m.flags = m.flags&systemMask | to.addWords(from.keywords.words(m.flags))
		}
		m.uid, m.mod, m.created = r.First+UID(n), r.ToModSeq, r.ToModSeq
		to.add(&m, b)
		copied = append(copied, u)
		res.source = append(res.source, u)
		res.dest = append(res.dest, m.uid)
	}
	// What was reserved is used up, also by messages that were gone.
	to.uidNext = max(to.uidNext, r.First+UID(len(uids)))
	to.nextUID = max(to.nextUID, to.uidNext)
	to.advance(r.ToModSeq)
	b.folder(to)
	if r.Move {
		from.remove(copied, r.FromModSeq, b)
	}
	return nil
}

// make adds folders.
func (mb *Mailbox) make(nf []newFolder, res *result, b *batch) {
	for _, n := range nf {
		mb.counter = max(mb.counter, n.ID)
		if mb.names[n.Name] != nil {
			continue
		}
		f := &Folder{mb: mb, id: n.ID, name: n.Name, use: n.Use, uidNext: 1, nextUID: 1, mod: 1, nextMod: 2}
		if r := res.made; r != nil && r.id == n.ID {
			f.nextUID, f.nextMod = r.next, r.mod
		}
		mb.put(f)
		b.folder(f)
	}
}

func (mb *Mailbox) applyFolder(r *folderRecord, res *result, b *batch) error {
	mb.make(r.New, res, b)
	switch r.Op {
	case opDelete:
		f, err := mb.loadedFolder(r.Folder)
		if f == nil || err != nil {
			return err
		}
		for i := range f.msgs { // came in while the removal was under way
			b.Delete(messageKey(mb.id, f.id, f.msgs[i].uid))
		}
		for _, t := range f.tombs {
			b.Delete(tombKey(mb.id, f.id, t.mod))
		}
		b.Delete(folderKey(mb.id, f.id))
		delete(mb.folders, f.id)
		delete(mb.names, f.name)
		f.gone = true
		f.unload()
		mb.s.uncache(f)
		b.folder(f)
	case opRename:
		var moved []*Folder
		for n, f := range mb.names {
			if n == r.From || len(n) > len(r.From) && n[:len(r.From)+1] == r.From+"/" {
				moved = append(moved, f)
			}
		}
		slices.SortFunc(moved, func(a, b *Folder) int { return int(a.id) - int(b.id) })
		for _, f := range moved {
			delete(mb.names, f.name)
		}
		for _, f := range moved {
			f.name = r.Name + f.name[len(r.From):]
			mb.names[f.name] = f
			b.folder(f)
		}
	case opSubscribe:
		mb.subscribed[r.Name] = struct{}{}
	case opUnsubscribe:
		delete(mb.subscribed, r.Name)
	}
	b.Put(boxKey(mb.id), mb.row())
	return nil
}
