package mailstore

import (
	"context"
	"encoding/binary"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"
	"weak"

	"posthouse/mailstore/journal"
	"posthouse/mailstore/kv"
	"posthouse/mailstore/log"
	"posthouse/mesh"
)

// Options configure a Store. The zero value is usable.
type Options struct {
	// Quota returns the limit of a mailbox in bytes, 0 for none. Nil: none.
	Quota func(mesh.MailboxID) int64
	// Self is this node, as Home names it.
	Self mesh.NodeID
	// Home returns where this node believes a mailbox to live, and the version
	// of that belief; zero: unknown. What lives elsewhere takes no mail here,
	// although its folders may still be on this disk: the result is Moved. Nil:
	// whatever is here lives here.
	Home func(mesh.MailboxID) (home mesh.NodeID, version uint64)
	// Now is the wall clock. Nil: time.Now.
	Now func() time.Time
	// Fuller is called, and must not block, when Full may give another answer.
	// Nil: nobody is told.
	Fuller func()
	// Cached bounds the folders whose messages are kept in memory without a
	// watcher. Default 256.
	Cached int
}

// Store holds the mailboxes of this node. It is safe for concurrent use.
type Store struct {
	j   *journal.Journal
	opt Options

	epoch atomic.Uint32 // added to every UIDVALIDITY, times renewStep
	tick  atomic.Uint64 // orders uses of folders
	seq   atomic.Uint64 // of the record that is being applied, or was last

	buffers sync.Pool // of *[log.BufferSize]byte, for reading records

	// Only Apply uses these: what the record before has touched stays resident
	// until the view has its rows.
	touched   []*Mailbox
	grown     []*Folder
	forgotten uint32 // no delivery before this day is remembered; 0: not known
	heldBack  uint32 // the day whose records purge nothing
	overdue   uint32 // the day that is being purged

	mu     sync.Mutex
	boxes  map[mesh.MailboxID]weak.Pointer[Mailbox]
	recent [1024]*Mailbox // the newest in memory, to keep them
	next   int
	busy   map[*Mailbox]struct{} // with records under way
	loaded map[*Folder]struct{}  // with messages in memory

	claims  claims
	brim    brim
	signals signals
	wg      sync.WaitGroup // unless's
}

// New registers the store with j, which must be open and not started yet.
func New(j *journal.Journal, opt Options) *Store {
	if opt.Cached <= 0 {
		opt.Cached = 256
	}
	if opt.Now == nil {
		opt.Now = time.Now
	}
	s := &Store{
		j: j, opt: opt,
		boxes:  map[mesh.MailboxID]weak.Pointer[Mailbox]{},
		busy:   map[*Mailbox]struct{}{},
		loaded: map[*Folder]struct{}{},
	}
	s.claims.under = map[claimKey]*claim{}
	s.brim.full = map[mesh.MailboxID]struct{}{}
	if s.opt.Fuller == nil {
		s.opt.Fuller = func() {}
	}
	j.Register(s, log.KindDeliver, log.KindAppend, log.KindFlags, log.KindExpunge, log.KindCopy, log.KindFolder, log.KindMailbox)
	return s
}

// Close waits for the watchers' calls that are under way. Call it after the
// journal was closed.
func (s *Store) Close() {
	s.wg.Wait()
	s.signals.wg.Wait()
}

// unless calls undo when the ticket's records never come into the log. It does
// so before it returns, unless ctx has ended: then nobody waits for it.
func (s *Store) unless(ctx context.Context, t *journal.Ticket, undo func()) {
	wait := func() {
		if t.Synced(context.Background()) != nil {
			undo()
		}
	}
	if ctx.Err() == nil {
		wait()
		return
	}
	s.wg.Go(wait)
}

// Create makes a mailbox with INBOX, Drafts, Sent, Junk, Trash and Archive,
// all subscribed. Making one that exists is harmless. Its UIDVALIDITYs are as
// many epochs later than the store's as is given: a mailbox that lived elsewhere before, and was lost
// there, has to be of a later one than it was.
func (s *Store) Create(ctx context.Context, id mesh.MailboxID, epoch uint32) error {
	if id.IsZero() {
		return ErrNoMailbox
	}
	mb, err := s.resident(id)
	if err != nil {
		return err
	}
	if mb.isThere() {
		return nil
	}
	if err := s.loadEpoch(); err != nil { // what it is made with is shown at once
		return err
	}
	// On top of the store's own: a node that forgot it with an older disk, and was
	// renewed since, makes it again with the same epoch.
	if !epochsAddUp {
		epoch -= min(epoch, s.epoch.Load())
	}
	r := mailboxRecord{Version: recordVersion, Op: opCreate, Mailbox: id, Epoch: epoch}
	for i, f := range standardFolders {
		r.New = append(r.New, newFolder{ID: uint32(i + 1), Name: f.name, Use: f.use})
		r.Subscribe = append(r.Subscribe, f.name)
	}
	meta := encode(r)
	if err := s.j.Admit(ctx, int64(len(meta))); err != nil {
		return err
	}
	return s.j.Append(log.Entry{Kind: log.KindMailbox, Meta: meta}).Applied(ctx)
}

var standardFolders = []struct {
	name string
	use  SpecialUse
}{
	{inbox, ""}, {"Drafts", `\Drafts`}, {"Sent", `\Sent`}, {"Junk", `\Junk`}, {"Trash", `\Trash`}, {"Archive", `\Archive`},
}

const (
	inbox   = "INBOX"
	inboxID = 1 // of each mailbox
)

// Has reports whether the mailbox exists here.
func (s *Store) Has(id mesh.MailboxID) bool {
	mb, err := s.resident(id)
	return err == nil && mb.isThere()
}

// Mailbox opens a mailbox; ErrNoMailbox when it is not here.
func (s *Store) Mailbox(id mesh.MailboxID) (*Mailbox, error) {
	mb, err := s.resident(id)
	if err != nil {
		return nil, err
	}
	if !mb.isThere() {
		return nil, ErrNoMailbox
	}
	return mb, nil
}

// Mailboxes calls f with each mailbox of this node until it returns false.
func (s *Store) Mailboxes(f func(mesh.MailboxID) bool) error {
	prefix := []byte("mB")
	return s.j.View().Scan(prefix, nil, func(k, _ []byte) bool {
		var id mesh.MailboxID
		copy(id[:], k[len(prefix):])
		return f(id)
	})
}

// Renew gives every folder of every mailbox a new UIDVALIDITY, larger than any
// that it had, even one that a lost end of the log gave it. Whoever finds that
// the log lost its end calls it before clients are served.
func (s *Store) Renew(ctx context.Context) error { return s.RenewAt(ctx, 0) }

// RenewAt is Renew for a store that may have been renewed before and forgotten
// it: the epoch, of which Renew takes the next, is at least the given one.
func (s *Store) RenewAt(ctx context.Context, epoch uint32) error {
	if err := s.loadEpoch(); err != nil {
		return err
	}
	meta := encode(mailboxRecord{Version: recordVersion, Op: opRenew, Epoch: max(s.epoch.Load()+1, epoch)})
	return s.j.Append(log.Entry{Kind: log.KindMailbox, Meta: meta}).Applied(ctx)
}

func (s *Store) loadEpoch() error {
	row, ok, err := s.j.View().Get(epochKey)
	if err != nil || !ok {
		return err
	}
	r := rowReader{b: row}
	r.version()
	e := uint32(r.uint())
	if r.bad {
		return fmt.Errorf("epoch row: %w", errRow)
	}
	if e > s.epoch.Load() {
		s.epoch.Store(e)
	}
	return nil
}

func epochRow(e uint32) []byte { return binary.AppendUvarint([]byte{rowVersion}, uint64(e)) }

// resident returns the mailbox's state, read from the view when it is not in
// memory; also of one that does not exist.
//
// What makes this right beside Apply: Apply changes only resident mailboxes and
// keeps those that it touched until the next record, when the view has the rows.
// So whoever reads a mailbox from the view reads one that no record under way
// has touched, and Apply waits for a reading that is under way.
func (s *Store) resident(id mesh.MailboxID) (*Mailbox, error) {
	s.mu.Lock()
	mb := s.boxes[id].Value()
	mine := mb == nil
	if mine {
		mb = newMailbox(s, id)
		s.boxes[id] = weak.Make(mb)
	}
	if s.recent[mb.slot] != mb {
		mb.slot = s.next
		s.recent[s.next] = mb
		s.next = (s.next + 1) % len(s.recent)
	}
	s.mu.Unlock()
	if !mine {
		<-mb.ready
		return mb, mb.err
	}
	if mb.err = mb.load(); mb.err != nil {
		mb.err = fmt.Errorf("read mailbox %s: %w", id, mb.err)
		s.mu.Lock()
		delete(s.boxes, id)
		s.mu.Unlock()
	}
	close(mb.ready)
	return mb, mb.err
}

// settle forgets what was held for the record before seq: the view has it now.
func (s *Store) settle(seq uint64) {
	s.seq.Store(seq)
	s.claims.settle()
	for _, f := range s.grown {
		f.mb.mu.Lock()
		f.young = nil
		f.mb.mu.Unlock()
	}
	s.grown = s.grown[:0]
	clear(s.touched)
	s.touched = s.touched[:0]
}

// touch makes a mailbox resident for Apply.
func (s *Store) touch(id mesh.MailboxID) (*Mailbox, error) {
	mb, err := s.resident(id)
	if err == nil {
		s.touched = append(s.touched, mb)
	}
	return mb, err
}

// pin keeps a mailbox in memory while it has records under way. The caller
// holds mb.mu, here and in unpin.
func (s *Store) pin(mb *Mailbox) { s.mu.Lock(); s.busy[mb] = struct{}{}; s.mu.Unlock() }

func (s *Store) unpin(mb *Mailbox) { s.mu.Lock(); delete(s.busy, mb); s.mu.Unlock() }

// cache notes that f's messages are in memory and drops those of the folders
// that were used least when there are too many. No lock is held.
func (s *Store) cache(f *Folder) {
	s.mu.Lock()
	s.loaded[f] = struct{}{}
	var old []*Folder
	if over := len(s.loaded) - s.opt.Cached; over > 0 {
		for g := range s.loaded {
			if g != f {
				old = append(old, g)
			}
		}
		slices.SortFunc(old, func(a, b *Folder) int {
			if a.used.Load() < b.used.Load() {
				return -1
			}
			return 1
		})
		old = old[:min(len(old), over+s.opt.Cached/8)]
	}
	s.mu.Unlock()
	for _, g := range old {
		g.mb.mu.Lock()
		idle := g.loaded && g.loading == nil && g.pending == 0 && len(g.watchers) == 0 && g.touchedAt != s.seq.Load()
		if idle {
			g.unload()
		}
		g.mb.mu.Unlock()
		if idle {
			s.mu.Lock()
			delete(s.loaded, g)
			s.mu.Unlock()
		}
	}
}

func (s *Store) uncache(f *Folder) { s.mu.Lock(); delete(s.loaded, f); s.mu.Unlock() }

// batch collects a record's rows; a folder's own row is written once, last.
type batch struct {
	*kv.Batch
	seq     uint64
	folders []*Folder
}

func (b *batch) folder(f *Folder) {
	if !slices.Contains(b.folders, f) {
		b.folders = append(b.folders, f)
	}
}
