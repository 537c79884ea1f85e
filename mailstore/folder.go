package mailstore

import (
	"encoding/binary"
	"fmt"
	"slices"
	"sync/atomic"
	"time"

	"posthouse/mailstore/log"
	"posthouse/transport"
)

// Folder is one folder of a mailbox. It stays usable after a rename; after its
// removal every call returns ErrNoFolder. Safe for concurrent use.
type Folder struct {
	mb   *Mailbox
	id   uint32 // within the mailbox, and what its UIDVALIDITY is made of
	used atomic.Uint64

	// mb.mu guards what follows. Only Apply changes it, but for the reservations.
	gone      bool
	name      string
	use       SpecialUse
	uidNext   UID
	mod       ModSeq // HIGHESTMODSEQ
	floor     ModSeq // expunges up to here are forgotten
	messages  uint32
	unseen    uint32
	deleted   uint32
	size      int64
	keywords  keywordTable
	touchedAt uint64 // sequence number of the last record that changed it

	// Reservations run ahead of the state by the records under way.
	nextUID UID
	nextMod ModSeq
	pending int      // records under way, and callers that need the messages loaded
	words   []string // keywords that records under way may add

	// The messages, while loaded.
	loaded  bool
	loading chan struct{} // closed when a load ends
	loadErr error
	young   []msg // added by the last record while not loaded: the view may lack them
	late    []msg // added since a load began
	msgs    []msg // by UID
	tombs   []tomb
	runs    int      // in tombs
	recent  []change // since the load or since base, by ModSeq; may be outdated
	base    ModSeq   // recent is complete after it

	sets     map[bits][]Flag // what keywords.flags gave
	watchers map[*watcher]struct{}
}

// change says that a message got a ModSeq.
type change struct {
	mod ModSeq
	uid UID
}

func (f *Folder) validity() uint32 { return f.id + (f.mb.base+f.mb.s.epoch.Load())*renewStep }

func (f *Folder) status() Status {
	return Status{
		Name: f.name, UIDValidity: f.validity(), UIDNext: f.uidNext,
		Messages: f.messages, Unseen: f.unseen, Deleted: f.deleted, Size: f.size, HighestModSeq: f.mod,
	}
}

func (f *Folder) info(m *msg) Info {
	return Info{UID: m.uid, ModSeq: m.mod, Flags: f.flags(m.flags), Size: m.size, Received: time.Unix(m.received, 0).UTC()}
}

func (f *Folder) flags(b bits) []Flag {
	if b == 0 {
		return nil
	}
	fs, ok := f.sets[b]
	if !ok {
		if f.sets == nil || len(f.sets) >= 1024 {
			f.sets = map[bits][]Flag{}
		}
		fs = f.keywords.flags(b)
		f.sets[b] = fs
	}
	return fs
}

// find returns the index of a UID; f is loaded.
func (f *Folder) find(uid UID) (int, bool) {
	// UIDs mostly are dense at the end: try the place counted from there.
	n := len(f.msgs)
	if n == 0 || uid > f.msgs[n-1].uid {
		return n, false
	}
	if i := n - 1 - int(f.msgs[n-1].uid-uid); i >= 0 && f.msgs[i].uid == uid {
		return i, true
	}
	return slices.BinarySearchFunc(f.msgs, uid, func(m msg, u UID) int {
		if m.uid < u {
			return -1
		}
		if m.uid > u {
			return 1
		}
		return 0
	})
}

func (f *Folder) uids() []UID {
	us := make([]UID, len(f.msgs))
	for i := range f.msgs {
		us[i] = f.msgs[i].uid
	}
	return us
}

// lock takes mb.mu; not taken with an error.
func (f *Folder) lock() error {
	f.mb.mu.Lock()
	if f.gone {
		f.mb.mu.Unlock()
		return ErrNoFolder
	}
	return nil
}

// lockLoaded takes mb.mu with the messages loaded; not taken with an error.
func (f *Folder) lockLoaded() error {
	f.used.Store(f.mb.s.tick.Add(1))
	if err := f.lock(); err != nil {
		return err
	}
	if err := f.load(); err != nil {
		f.mb.mu.Unlock()
		return err
	}
	if f.gone {
		f.mb.mu.Unlock()
		return ErrNoFolder
	}
	return nil
}

// hold keeps the messages loaded until release.
func (f *Folder) hold() error {
	if err := f.lockLoaded(); err != nil {
		return err
	}
	f.pending++
	f.mb.mu.Unlock()
	return nil
}

func (f *Folder) release() { f.mb.mu.Lock(); f.pending--; f.mb.mu.Unlock() }

// load reads the messages from the view. mb.mu is held at call and return, not
// in between. See Store.resident for why that is right beside Apply: what a
// load could miss stands in young or comes into late.
func (f *Folder) load() error {
	mb := f.mb
	for !f.loaded && !f.gone {
		if ch := f.loading; ch != nil {
			mb.mu.Unlock()
			<-ch
			mb.mu.Lock()
			if f.loading == nil && !f.loaded && f.loadErr != nil {
				return f.loadErr
			}
			continue
		}
		done := make(chan struct{})
		f.loading, f.loadErr = done, nil
		f.late = slices.Clone(f.young)
		n := int(f.messages)
		mb.mu.Unlock()
		msgs, tombs, err := mb.s.readFolder(mb, f.id, n)
		mb.mu.Lock()
		f.loading = nil
		if err != nil {
			f.loadErr, f.late = fmt.Errorf("read folder %s of %s: %w", f.name, mb.id, err), nil
			close(done)
			return f.loadErr
		}
		for _, m := range f.late {
			if len(msgs) == 0 || msgs[len(msgs)-1].uid < m.uid {
				msgs = append(msgs, m)
			}
		}
		f.late, f.young = nil, nil
		f.msgs, f.tombs, f.runs = msgs, nil, 0
		for _, t := range tombs {
			if t.mod > f.floor {
				f.tombs = append(f.tombs, t)
				f.runs += len(t.runs)
			}
		}
		f.recent, f.base = nil, f.mod
		f.loaded = true
		close(done)
		mb.mu.Unlock()
		mb.s.cache(f)
		mb.mu.Lock()
	}
	return nil
}

func (f *Folder) unload() {
	f.loaded, f.msgs, f.tombs, f.runs, f.recent = false, nil, nil, 0, nil
}

func (s *Store) readFolder(mb *Mailbox, id uint32, n int) (msgs []msg, tombs []tomb, err error) {
	var bad error
	if n > 0 {
		msgs = make([]msg, 0, n+n/16+8)
	}
	prefix := messagePrefix(mb.id, id)
	if err := s.j.View().Scan(prefix, nil, func(k, row []byte) bool {
		msgs = append(msgs, msg{})
		bad = msgs[len(msgs)-1].parse(UID(binary.BigEndian.Uint32(k[len(prefix):])), row)
		return bad == nil
	}); err != nil {
		return nil, nil, err
	}
	if bad != nil {
		return nil, nil, bad
	}
	prefix = tombPrefix(mb.id, id)
	if err := s.j.View().Scan(prefix, nil, func(k, row []byte) bool {
		var t tomb
		bad = t.parse(ModSeq(binary.BigEndian.Uint64(k[len(prefix):])), row)
		tombs = append(tombs, t)
		return bad == nil
	}); err != nil {
		return nil, nil, err
	}
	return msgs, tombs, bad
}

// Status returns the state now. It costs no scan.
func (f *Folder) Status() (Status, error) {
	if err := f.lock(); err != nil {
		return Status{}, err
	}
	defer f.mb.mu.Unlock()
	return f.status(), nil
}

// List returns all messages by growing UID, with the status of that instant.
func (f *Folder) List() (Status, []Info, error) {
	if err := f.lockLoaded(); err != nil {
		return Status{}, nil, err
	}
	defer f.mb.mu.Unlock()
	infos := make([]Info, len(f.msgs))
	for i := range f.msgs {
		infos[i] = f.info(&f.msgs[i])
	}
	return f.status(), infos, nil
}

// Infos returns the messages with these UIDs, growing; the missing are left out.
func (f *Folder) Infos(uids []UID) ([]Info, error) {
	uids = growing(uids)
	if err := f.lockLoaded(); err != nil {
		return nil, err
	}
	defer f.mb.mu.Unlock()
	infos := make([]Info, 0, len(uids))
	for _, u := range uids {
		if i, ok := f.find(u); ok {
			infos = append(infos, f.info(&f.msgs[i]))
		}
	}
	return infos, nil
}

// ChangesSince returns what happened after since, expunges included. A new
// message that is gone again stands in neither list. It costs what has changed
// while the folder is in memory, a scan of memory for an older since.
func (f *Folder) ChangesSince(since ModSeq) (Changes, error) {
	if err := f.lockLoaded(); err != nil {
		return Changes{}, err
	}
	defer f.mb.mu.Unlock()
	c := Changes{Status: f.status()}
	if since >= f.mod {
		return c, nil
	}
	if since > 0 && since < f.floor {
		c.Forgotten = true
	} else {
		first := len(f.tombs)
		for first > 0 && f.tombs[first-1].mod > since {
			first--
		}
		for i := first; i < len(f.tombs); i++ {
			c.Expunged = f.tombs[i].since(since, c.Expunged)
		}
		slices.Sort(c.Expunged)
	}
	if since < f.base {
		for i := range f.msgs {
			if f.msgs[i].mod > since {
				c.Changed = append(c.Changed, f.info(&f.msgs[i]))
			}
		}
		return c, nil
	}
	var uids []UID
	for i := len(f.recent) - 1; i >= 0 && f.recent[i].mod > since; i-- {
		uids = append(uids, f.recent[i].uid)
	}
	slices.Sort(uids)
	for _, u := range slices.Compact(uids) {
		if i, ok := f.find(u); ok {
			c.Changed = append(c.Changed, f.info(&f.msgs[i]))
		}
	}
	return c, nil
}

// Message reads a message's structure from its log record; ErrExpunged.
func (f *Folder) Message(uid UID) (*Message, error) {
	if err := f.lockLoaded(); err != nil {
		return nil, err
	}
	i, ok := f.find(uid)
	if !ok {
		f.mb.mu.Unlock()
		return nil, ErrExpunged
	}
	m := f.msgs[i]
	info := f.info(&m)
	f.mb.mu.Unlock()
	msg, err := f.mb.s.content(m.ref())
	if err != nil {
		return nil, fmt.Errorf("read message %d of %s: %w", uid, f.mb.id, err)
	}
	msg.Info = info
	return msg, nil
}

// content reads what the record at ref says of its message.
func (s *Store) content(ref log.Ref) (*Message, error) {
	// What is decoded below is copied, so one buffer serves many messages.
	buf, ok := s.buffers.Get().(*[log.BufferSize]byte)
	if !ok {
		buf = new([log.BufferSize]byte)
	}
	defer s.buffers.Put(buf)
	rec, err := s.j.RecordInto(ref, buf[:])
	if err != nil {
		return nil, err
	}
	switch rec.Kind {
	case log.KindAppend:
		var r appendRecord
		if err := decode(rec.Meta, &r); err != nil {
			return nil, err
		}
		st, err := decodeStructure(r.Structure)
		return &Message{Structure: st, Body: s.j.BodyOfSize(ref, rec.BodySize)}, err
	case log.KindDeliver:
		var r deliverRecord
		if err := decode(rec.Meta, &r); err != nil {
			return nil, err
		}
		st, err := decodeStructure(r.Structure)
		if err != nil {
			return nil, err
		}
		size := r.Size - int64(len(r.Prefix))
		for _, c := range r.Cuts {
			size += c.To - c.From
		}
		if r.Source != nil {
			ref = *r.Source
		}
		shift := int64(len(r.Prefix))
		for _, c := range r.Cuts {
			shift -= c.To - c.From
		}
		shiftStructure(st, shift, r.Trace)
		return &Message{Structure: st, Body: compose(s.j.BodyOfSize(ref, size), r.Prefix, r.Cuts)}, nil
	}
	return nil, fmt.Errorf("record %d is of kind %d: %w", ref.Seq, rec.Kind, log.ErrDamaged)
}

var _ transport.Body = (*composed)(nil)
