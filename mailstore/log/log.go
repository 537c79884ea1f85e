// Package log is the message log: the only truth of a node's mail. Every change
// that a client or a peer was told of is a record here first.
//
// It knows segments, groups, sync and recovery; it does not know what a record
// means. Engines do not use it to write: they go through mailstore/journal,
// which keeps the order between log and view. DESIGN.md beside this file has
// the format and the reasons.
package log

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"path/filepath"
	"sync"
	"time"

	"posthouse/transport"
)

// Kind says which engine a record belongs to and what its Meta holds. The
// numbers stand on disk: never reuse one.
type Kind uint8

// The kinds of records.
const (
	KindAccept  Kind = 1  // queue: a message taken into custody, with its legs
	KindLeg     Kind = 2  // queue: what became of recipients of a leg
	KindDeliver Kind = 3  // mailstore: a message into one or more mailboxes; queue ends its local leg by it
	KindAppend  Kind = 4  // mailstore: a message by IMAP APPEND
	KindFlags   Kind = 5  // mailstore
	KindExpunge Kind = 6  // mailstore
	KindCopy    Kind = 7  // mailstore: copy or move between folders
	KindFolder  Kind = 8  // mailstore: folder made, renamed, deleted, subscribed
	KindMailbox Kind = 9  // mailstore: mailbox made or removed
	KindSeen    Kind = 10 // queue: ids that a gateway keeps of outside legs

	KindCheckpoint Kind = 11 // journal: the view's rows at a position
	KindContent    Kind = 12 // made by compaction: only the body counts, other records name it
)

// Ref is where a record stands. Engines keep it in the view and hand it back to
// read; they never compute one.
type Ref struct {
	_       struct{} `cbor:",toarray"`
	Segment uint64
	Offset  int64 // bytes from the segment's start to the record
	Seq     uint64
	CRC     uint32 // CRC32C of the record's header and meta
}

// IsZero reports whether r is "none".
func (r Ref) IsZero() bool { return r.Segment == 0 && r.Offset == 0 && r.Seq == 0 }

// Record is one record as read back or as just synced.
type Record struct {
	// Seq grows from record to record, by one but where an Append failed for
	// want of space, after a log that lost its end, and after compaction.
	Seq      uint64
	Kind     Kind
	Meta     []byte // the engine's own encoding; not to be changed
	BodySize int64  // bytes of the body; 0 for none
	Ref      Ref
	// Compacted says that the record was rewritten: it tells what is, and is
	// never the arrival of anything. Set by Replay only.
	Compacted bool
}

// Entry is a record to be written.
type Entry struct {
	Kind Kind
	Meta []byte // at most MaxMeta; owned by the log from Append on
	Body *Draft // sealed, and in this one entry only; nil for none
	// After are tickets of earlier Appends that this one must not overtake: if a
	// full disk refused one of them it is refused as well, though it might fit.
	After []*Ticket
}

// ErrDamaged is wrapped by every error that says that bytes on disk are not the
// ones that were written; the message names file and offset.
var ErrDamaged = errors.New("damaged")

// ErrClosed is returned after Close, or after a failed write or sync ended the
// log; the cause is in the chain then.
var ErrClosed = errors.New("log closed")

// Options configure a Log.
type Options struct {
	Dir string // folder of the segments, made when absent
	// Synced is called with the records of each group, in order, by one
	// goroutine, after they are on disk and their tickets are answered.
	// The slice is not used by the log afterwards. May block: then Admit
	// does so too. Must not call Admit or Close.
	Synced func([]Record)

	// Refused is called, and must not block, each time a full disk kept a group
	// or a large body out. Nil: nobody is told.
	Refused func()

	FS FS // nil: Disk
	// Position is the sequence up to which the view is durable: damage at or
	// before it is never taken for a torn write. 0 when there is no view.
	Position uint64
	// Epoch of new segments; 0: the highest found, 1 in a new log. A node that
	// was rolled back starts a higher one.
	Epoch uint64

	SegmentSize    int64 // bytes after which a new segment begins; 0: 64 MiB
	SpoolThreshold int64 // largest body kept inside a record, bytes; 0: 256 KiB, at most 64 MiB
	OpenFiles      int   // segments kept open for reading; 0: 64
	// Patience is how long the writer holds back what was appended with
	// AppendBehind while nobody waits; 0: 2 ms, negative: not at all.
	Patience time.Duration
	Rand     io.Reader    // for salts; nil: crypto/rand
	Logger   *slog.Logger // nil: silent

	// ByHand: no goroutine writes, Turn does. For the simulator of the deciders
	// (simtest/deciders), which wants every step in an order of its own.
	ByHand bool
}

func (o *Options) defaults() error {
	if o.Dir == "" {
		return errors.New("no folder for the log")
	}
	if o.FS == nil {
		o.FS = Disk{}
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.Rand == nil {
		o.Rand = rand.Reader
	}
	if o.Synced == nil {
		o.Synced = func([]Record) {}
	}
	if o.Patience == 0 {
		o.Patience = patience
	}
	if o.Refused == nil {
		o.Refused = func() {}
	}
	if o.SegmentSize <= 0 {
		o.SegmentSize = 64 << 20
	}
	if o.SpoolThreshold <= 0 {
		o.SpoolThreshold = 256 << 10
	}
	o.SpoolThreshold = min(o.SpoolThreshold, 64<<20)
	if o.OpenFiles <= 0 {
		o.OpenFiles = 64
	}
	return nil
}

// Log is an append-only sequence of records on disk.
type Log struct {
	opt   Options
	fs    FS
	lock  io.Closer
	epoch uint64
	files *files

	buffers sync.Pool // of *[speculative]byte, for headers of records

	mu         sync.Mutex
	segs       []*segment // log segments in order
	lost       []uint64   // log segments without a header
	holes      bool       // segments were missing or without a header at open
	compacting bool
	stuck      bool                // a replaced segment could not be removed
	rolling    bool                // the next group begins a segment
	pending    []batch             // appended, not yet taken by the writer
	urgent     int                 // how many of them somebody waits for
	spare      []batch             // what the writer took last, to be used again
	waiting    int64               // bytes of pending, of the group being written, and of metas handed on
	handed     [][]Record          // synced, not yet taken by the applier
	next       uint64              // sequence of the next record
	number     uint64              // of the next segment
	live       map[uint64]struct{} // body segments whose draft has no synced record yet
	room       chan struct{}       // closed when waiting shrinks; nil when nobody waits
	mark       uint64              // view position for the next group
	marked     bool                // mark waits for the writer
	closing    bool
	dead       error
	report     Report
	stats      Stats

	chunks  chan struct{} // holds one: who writes to a spool file
	spools  chan struct{} // holds one: who syncs a spool file
	wake    chan struct{} // to the writer; holds one
	apply   chan struct{} // to the applier; holds one
	written chan struct{} // closed when the writer is gone
	applied chan struct{} // closed when the applier is gone
	failed  chan struct{}
	closed  sync.Once
	w       writer // of the writer goroutine
}

// Open opens or makes the log in opt.Dir, repairs a torn tail and is then
// ready for Replay and Append. The first record of a new log has Seq 1.
// Damage does not keep it from opening: see Report. On a disk without room for
// the repair it fails with transport.ErrNoSpace and has changed nothing that
// counts.
func Open(ctx context.Context, opt Options) (*Log, error) {
	if err := opt.defaults(); err != nil {
		return nil, err
	}
	l := &Log{
		opt: opt, fs: opt.FS, live: map[uint64]struct{}{},
		chunks: make(chan struct{}, 1), spools: make(chan struct{}, 1),
		wake: make(chan struct{}, 1), apply: make(chan struct{}, 1),
		written: make(chan struct{}), applied: make(chan struct{}), failed: make(chan struct{}),
	}
	if err := l.open(ctx); err != nil {
		return nil, fmt.Errorf("open log %s: %w", opt.Dir, noSpace(err))
	}
	if !opt.ByHand {
		go l.write()
		go l.handOn()
	}
	return l, nil
}

func (l *Log) open(ctx context.Context) (err error) {
	if err := l.fs.MkdirAll(l.opt.Dir); err != nil {
		return err
	}
	if l.lock, err = l.fs.Lock(l.opt.Dir); err != nil {
		return err
	}
	l.files = newFiles(l)
	if err := l.recover(ctx); err != nil {
		l.files.close()
		l.lock.Close()
		return err
	}
	return nil
}

func (l *Log) path(number uint64, ext string) string {
	return filepath.Join(l.opt.Dir, fileName(number, ext))
}

func (l *Log) syncDir() error {
	if noDirSync {
		return nil
	}
	return l.fs.SyncDir(l.opt.Dir)
}

// End returns the sequence number of the last record appended; 0 for an empty
// log.
func (l *Log) End() uint64 { l.mu.Lock(); defer l.mu.Unlock(); return l.next - 1 }

// Report returns what Open, and Replay since then, found.
func (l *Log) Report() Report {
	l.mu.Lock()
	defer l.mu.Unlock()
	r := l.report
	r.Damage = append([]Damage(nil), r.Damage...)
	r.Cut = append([]Cut(nil), r.Cut...)
	return r
}

// Append gives the entries the next sequence numbers, adjacent and in order,
// and queues them for the writer; it does not wait for the disk. They reach the
// disk in one group: after a crash all of them are there or none. Order of
// calls is order in the log, so a caller that holds its own lock while it
// chooses a UID and appends gets UIDs in log order.
//
// When the disk is full the ticket fails with transport.ErrNoSpace, the log
// goes on and the numbers are never used again: whoever appended must not have
// shown anything of the records, and later ones must not build on them.
func (l *Log) Append(entries ...Entry) *Ticket { return l.append(true, entries) }

// AppendBehind is Append for what no client and no peer waits for, such as the
// record that ends a leg: the writer may hold it back a moment, so that it
// shares the sync of what somebody does wait for.
func (l *Log) AppendBehind(entries ...Entry) *Ticket { return l.append(false, entries) }

func (l *Log) append(urgent bool, entries []Entry) *Ticket {
	b := batch{t: &Ticket{done: make(chan struct{})}, entries: entries, urgent: urgent}
	err := b.check()
	l.mu.Lock()
	b.t.first = l.next
	switch {
	case l.dead != nil:
		err = l.dead
	case l.closing:
		err = ErrClosed
	}
	if err == nil {
		l.next += uint64(len(entries))
		l.pending = append(l.pending, b)
		l.waiting += b.size
		if urgent {
			l.urgent++
		}
	}
	l.mu.Unlock()
	if err != nil {
		b.t.answer(err)
		return b.t
	}
	poke(l.wake)
	return b.t
}

func poke(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// admitted is how many bytes may wait for the writer and the applier before
// Admit holds callers back.
const admitted = 16 << 20

// Admit waits until the log takes more: while too many bytes wait for the
// writer, or synced records for Synced. Call it before taking locks, with the
// size about to be appended. It reserves nothing.
func (l *Log) Admit(ctx context.Context, size int64) error {
	for {
		l.mu.Lock()
		if l.dead != nil || l.closing {
			err := l.dead
			l.mu.Unlock()
			if err == nil {
				err = ErrClosed
			}
			return err
		}
		if l.waiting == 0 || l.waiting+min(size, l.opt.SpoolThreshold) <= admitted {
			l.mu.Unlock()
			return ctx.Err()
		}
		if l.room == nil {
			l.room = make(chan struct{})
		}
		room := l.room
		l.mu.Unlock()
		select {
		case <-room:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// release takes n bytes off what waits; l.mu is held.
func (l *Log) release(n int64) {
	l.waiting -= n
	if l.room != nil {
		close(l.room)
		l.room = nil
	}
}

// Mark notes in the log that the view is durable up to n, so that a view from
// before can be told at the next start. It stands in the next group; without
// other work one is written for it. It does not wait.
func (l *Log) Mark(n uint64) {
	l.mu.Lock()
	more := n > l.mark
	if more {
		l.mark, l.marked = n, true
	}
	l.mu.Unlock()
	if more {
		poke(l.wake)
	}
}

// Failed is closed when a failed write or sync has ended the log. Nothing is
// known of what was not acknowledged: the process should exit and open anew.
func (l *Log) Failed() <-chan struct{} { return l.failed }

// Err returns what ended the log, nil while it lives.
func (l *Log) Err() error { l.mu.Lock(); defer l.mu.Unlock(); return l.dead }

// Close writes out what waits, hands it to Synced, seals the last segment and
// closes all files. It returns what ended the log before, if anything did.
func (l *Log) Close() error {
	l.closed.Do(func() {
		l.mu.Lock()
		l.closing = true
		l.release(0)
		l.mu.Unlock()
		if l.opt.ByHand {
			for l.Turn() {
			}
			l.end()
		} else {
			poke(l.wake)
			<-l.written
			poke(l.apply)
			<-l.applied
		}
		l.files.close()
		l.lock.Close()
	})
	return l.Err()
}

// noRoom is noSpace for a body that is written beside the log's end. Whoever sent
// it waits for news of room like all others, so it counts as refused.
func (l *Log) noRoom(err error) error {
	err = noSpace(err)
	if errors.Is(err, transport.ErrNoSpace) && bodiesCount {
		l.opt.Refused()
	}
	return err
}

// noSpace makes err a transport.ErrNoSpace when the disk is full.
func noSpace(err error) error {
	if err != nil && full(err) && !errors.Is(err, transport.ErrNoSpace) {
		return fmt.Errorf("%w: %w", transport.ErrNoSpace, err)
	}
	return err
}

// Ticket is the receipt of an Append.
type Ticket struct {
	first uint64
	err   error
	done  chan struct{}
}

func (t *Ticket) answer(err error) {
	t.err = err
	close(t.done)
}

// First returns the sequence number of the first entry.
func (t *Ticket) First() uint64 { return t.first }

// Done is closed when the entries are on disk or never will be.
func (t *Ticket) Done() <-chan struct{} { return t.done }

// Err returns why the entries are not on disk; only after Done. With
// transport.ErrNoSpace in the chain they will never be, and the log goes on.
// With ErrClosed they may be found at the next open, whole or not at all.
func (t *Ticket) Err() error { return t.err }
