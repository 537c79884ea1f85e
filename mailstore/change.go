package mailstore

import (
	"context"
	"fmt"
	"slices"

	"posthouse/mailstore/log"
)

// What sessions change. Each call looks at the state under the mailbox's lock,
// reserves what it needs, writes its records and waits for their application,
// which decides: a message that was expunged in between is left alone.

// commit writes the entries and waits until they are applied. mb.mu is held at
// the call and free at the return.
func (mb *Mailbox) commit(ctx context.Context, entries []log.Entry, acts []*act) error {
	t := mb.s.j.Append(entries...)
	for i, a := range acts {
		mb.began(t.First()+uint64(i), a)
	}
	mb.mu.Unlock()
	err := t.Applied(ctx)
	if err != nil {
		mb.s.unless(ctx, t, func() {
			mb.mu.Lock()
			defer mb.mu.Unlock()
			for i, a := range acts {
				mb.forgetAct(t.First()+uint64(i), a)
			}
		})
	}
	return err
}

// reserveUIDs takes n UIDs; mb.mu is held.
func (f *Folder) reserveUIDs(n int) (first UID, err error) {
	if uint64(f.nextUID)+uint64(n) >= 1<<32-1 {
		return 0, ErrTooMany
	}
	first = f.nextUID
	f.nextUID += UID(n)
	return first, nil
}

func (f *Folder) reserveMod() ModSeq { f.nextMod++; return f.nextMod - 1 }

// reserveWords checks that the keywords fit beside those that records under way
// may add; mb.mu is held.
func (f *Folder) reserveWords(words []string) error {
	if f.pending == 0 {
		f.words = nil
	}
	t := append(slices.Clone(f.keywords), f.words...)
	have := len(t)
	for _, w := range words {
		if _, ok := t.find(w); !ok {
			t = append(t, w)
		}
	}
	if len(t) > MaxKeywords {
		return ErrTooMany
	}
	f.words = append(f.words, t[have:]...)
	return nil
}

// Append adds messages by client's command; returns their UIDs once on disk
// and visible. All come in or none.
func (f *Folder) Append(ctx context.Context, msgs []AppendMessage) (uidValidity uint32, uids []UID, err error) {
	size, quota := int64(0), f.mb.quota()
	recs := make([]appendRecord, len(msgs))
	var words []string
	for i, m := range msgs {
		sys, ws, err := splitFlags(m.Flags)
		if err != nil {
			return 0, nil, err
		}
		words = append(words, ws...)
		structure, err := m.Structure.MarshalBinary()
		if err != nil {
			return 0, nil, fmt.Errorf("structure of a message to append: %w", err)
		}
		if m.Received.IsZero() {
			m.Received = f.mb.s.opt.Now()
		}
		recs[i] = appendRecord{
			Version: recordVersion, Mailbox: f.mb.id, Folder: f.id,
			System: sys, Keywords: ws, Size: m.Draft.Size(), Time: m.Received.Unix(), Structure: structure,
		}
		size += m.Draft.Size() + int64(len(recs[i].Structure))
	}
	if err := f.mb.s.j.Admit(ctx, size); err != nil {
		return 0, nil, err
	}
	if err := f.lock(); err != nil {
		return 0, nil, err
	}
	if !f.mb.room(size, quota) {
		f.mb.mu.Unlock()
		return 0, nil, ErrQuota
	}
	if err := f.reserveWords(words); err != nil {
		f.mb.mu.Unlock()
		return 0, nil, err
	}
	first, err := f.reserveUIDs(len(msgs))
	if err != nil || len(msgs) == 0 {
		uidValidity = f.validity()
		f.mb.mu.Unlock()
		return uidValidity, nil, err
	}
	res := &result{}
	entries := make([]log.Entry, len(msgs))
	acts := make([]*act, len(msgs))
	for i := range recs {
		recs[i].UID, recs[i].ModSeq = first+UID(i), f.reserveMod()
		uids = append(uids, recs[i].UID)
		entries[i] = log.Entry{Kind: log.KindAppend, Meta: encode(&recs[i]), Body: msgs[i].Draft}
		acts[i] = &act{reserved: recs[i].Size, folders: [2]*Folder{f}, result: res}
	}
	if err := f.mb.commit(ctx, entries, acts); err != nil {
		return 0, nil, fmt.Errorf("append to %s: %w", f.mb.id, err)
	}
	if res.gone {
		return 0, nil, ErrNoFolder
	}
	return res.validity, uids, nil
}

// SetFlags changes flags of those messages that exist, and returns their new
// Infos by growing UID once on disk. With unchangedSince > 0, messages with a
// larger ModSeq are left alone and returned in modified (RFC 7162 section 3.1.3).
// A message whose flags are so already keeps its ModSeq.
func (f *Folder) SetFlags(ctx context.Context, uids []UID, op FlagOp, flags []Flag, unchangedSince ModSeq) (changed []Info, modified []UID, err error) {
	if op < FlagsSet || op > FlagsRemove {
		return nil, nil, fmt.Errorf("flag operation %d is unknown", op)
	}
	sys, words, err := splitFlags(flags)
	if err != nil {
		return nil, nil, err
	}
	uids = growing(uids)
	if err := f.mb.s.j.Admit(ctx, 256); err != nil {
		return nil, nil, err
	}
	if err := f.lockLoaded(); err != nil {
		return nil, nil, err
	}
	var there []UID
	idle := true // nothing to change
	arg := sys | f.keywords.known(words)
	fresh := op != FlagsRemove && len(f.keywords.words(arg)) < len(words)
	for _, u := range uids {
		i, ok := f.find(u)
		if !ok {
			continue
		}
		there = append(there, u)
		m := &f.msgs[i]
		late := unchangedSince > 0 && m.mod > unchangedSince
		idle = idle && (late || !fresh && op.combine(m.flags, arg) == m.flags)
	}
	if len(there) == 0 || idle && f.pending == 0 {
		res := &result{}
		f.applyFlags(&flagsRecord{UnchangedSince: unchangedSince}, there, 0, res, nil)
		f.mb.mu.Unlock()
		return res.changed, res.modified, nil
	}
	if op != FlagsRemove {
		if err := f.reserveWords(words); err != nil {
			f.mb.mu.Unlock()
			return nil, nil, err
		}
	}
	res := &result{changed: make([]Info, 0, len(there))}
	var entries []log.Entry
	var acts []*act
	for part := range slices.Chunk(there, perRecord) {
		entries = append(entries, log.Entry{Kind: log.KindFlags, Meta: encode(&flagsRecord{
			Version: recordVersion, Mailbox: f.mb.id, Folder: f.id, ModSeq: f.reserveMod(),
			Op: op, System: sys, Keywords: words, UIDs: packUIDs(part), UnchangedSince: unchangedSince,
		})})
		acts = append(acts, &act{folders: [2]*Folder{f}, result: res})
	}
	if err := f.mb.commit(ctx, entries, acts); err != nil {
		return nil, nil, fmt.Errorf("set flags in %s: %w", f.mb.id, err)
	}
	if res.gone {
		return nil, nil, ErrNoFolder
	}
	return res.changed, res.modified, nil
}

// Expunge removes those of the messages that carry \Deleted; uids nil means all
// of the folder. It returns the removed UIDs.
func (f *Folder) Expunge(ctx context.Context, uids []UID) ([]UID, error) {
	if err := f.mb.s.j.Admit(ctx, 256); err != nil {
		return nil, err
	}
	uids = growing(uids)
	if err := f.lockLoaded(); err != nil {
		return nil, err
	}
	var out []UID
	if uids == nil {
		for i := range f.msgs {
			if f.msgs[i].flags&bitDeleted != 0 {
				out = append(out, f.msgs[i].uid)
			}
		}
	} else {
		for _, u := range uids {
			if i, ok := f.find(u); ok && f.msgs[i].flags&bitDeleted != 0 {
				out = append(out, u)
			}
		}
	}
	if len(out) == 0 {
		f.mb.mu.Unlock()
		return nil, nil
	}
	res := &result{}
	entries, acts := f.expunge(out, false, res)
	if err := f.mb.commit(ctx, entries, acts); err != nil {
		return nil, fmt.Errorf("expunge in %s: %w", f.mb.id, err)
	}
	if res.gone {
		return nil, ErrNoFolder
	}
	return res.removed, nil
}

// expunge makes the records that remove uids; mb.mu is held.
func (f *Folder) expunge(uids []UID, force bool, res *result) (entries []log.Entry, acts []*act) {
	for part := range slices.Chunk(uids, perRecord) {
		entries = append(entries, log.Entry{Kind: log.KindExpunge, Meta: encode(&expungeRecord{
			Version: recordVersion, Mailbox: f.mb.id, Folder: f.id, ModSeq: f.reserveMod(), UIDs: packUIDs(part), Force: force,
		})})
		acts = append(acts, &act{folders: [2]*Folder{f}, result: res})
	}
	return entries, acts
}

// Copy copies messages, flags and internal date into a folder of the same
// mailbox. All or none; messages that are gone are left out. Keywords for which
// that folder has no room are left out too.
func (f *Folder) Copy(ctx context.Context, uids []UID, to string) (CopyResult, error) {
	return f.transfer(ctx, uids, to, false)
}

// Move is Copy and removal in one record (RFC 6851).
func (f *Folder) Move(ctx context.Context, uids []UID, to string) (CopyResult, error) {
	return f.transfer(ctx, uids, to, true)
}

func (f *Folder) transfer(ctx context.Context, uids []UID, to string, move bool) (CopyResult, error) {
	dest, err := f.mb.Folder(to)
	if err != nil {
		return CopyResult{}, err
	}
	if err := f.mb.s.j.Admit(ctx, 256); err != nil {
		return CopyResult{}, err
	}
	quota := f.mb.quota()
	uids = growing(uids)
	if err := f.lockLoaded(); err != nil {
		return CopyResult{}, err
	}
	if dest.gone {
		f.mb.mu.Unlock()
		return CopyResult{}, ErrNoFolder
	}
	var there []UID
	size := int64(0)
	for _, u := range uids {
		if i, ok := f.find(u); ok {
			there = append(there, u)
			size += f.msgs[i].size
		}
	}
	if len(there) == 0 {
		v := dest.validity()
		f.mb.mu.Unlock()
		return CopyResult{UIDValidity: v}, nil
	}
	if !move && !f.mb.room(size, quota) {
		f.mb.mu.Unlock()
		return CopyResult{}, ErrQuota
	}
	if uint64(dest.nextUID)+uint64(len(there)) >= 1<<32-1 {
		f.mb.mu.Unlock()
		return CopyResult{}, ErrTooMany
	}
	res := &result{}
	entries, acts := f.copy(there, &target{id: dest.id, folder: dest, next: dest.nextUID, mod: dest.nextMod}, move, res)
	if !move {
		acts[0].reserved = size
	}
	if err := f.mb.commit(ctx, entries, acts); err != nil {
		return CopyResult{}, fmt.Errorf("copy in %s: %w", f.mb.id, err)
	}
	if res.gone {
		return CopyResult{}, ErrNoFolder
	}
	return CopyResult{UIDValidity: res.validity, Source: res.source, Dest: res.dest}, nil
}

// target is where a copy goes: a folder, or one that a record before it makes.
type target struct {
	id     uint32
	folder *Folder // nil: not made yet
	next   UID
	mod    ModSeq
}

// copy makes the records that copy or move uids; mb.mu is held. It leaves in
// dest what is reserved next there.
func (f *Folder) copy(uids []UID, dest *target, move bool, res *result) (entries []log.Entry, acts []*act) {
	for part := range slices.Chunk(uids, perRecord) {
		r := copyRecord{
			Version: recordVersion, Mailbox: f.mb.id, From: f.id, To: dest.id,
			First: dest.next, ToModSeq: dest.mod, UIDs: packUIDs(part), Move: move,
		}
		dest.next += UID(len(part))
		dest.mod++
		if dest.folder != nil {
			dest.folder.nextUID, dest.folder.nextMod = dest.next, dest.mod
		}
		if move {
			r.FromModSeq = f.reserveMod()
			if dest.folder == f {
				dest.mod = f.nextMod
			}
		}
		entries = append(entries, log.Entry{Kind: log.KindCopy, Meta: encode(&r)})
		acts = append(acts, &act{folders: [2]*Folder{f, dest.folder}, result: res})
	}
	return entries, acts
}
