// Package log is the message log: the only truth of a node's mail. Every change
// that a client or a peer was told of is a record here first.
//
// It knows segments, groups, sync and recovery; it does not know what a record
// means. Engines do not use it to write: they go through mailstore/journal,
// which keeps the order between log and view.
package log

import (
	"bytes"
	"context"
	"errors"
	"hash/crc32"
	"io"
	"sync"

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
	Seq      uint64 // grows by one from record to record; gaps only after a rebuild
	Kind     Kind
	Meta     []byte // the engine's own encoding; not to be changed
	BodySize int64  // bytes of the body; 0 for none
	Ref      Ref
}

// Entry is a record to be written.
type Entry struct {
	Kind Kind
	Meta []byte // owned by the log from Append on
	Body *Draft // sealed; nil for none
}

// ErrDamaged is wrapped by every error that says that bytes on disk are not the
// ones that were written; the message names file and offset.
var ErrDamaged = errors.New("damaged")

// ErrClosed is returned after Close, or after a failed sync ended the log.
var ErrClosed = errors.New("log closed")

// Options configure a Log.
type Options struct {
	Dir string // folder of the segments, made when absent
	// Synced is called with the records of each group, in order, by one
	// goroutine, after they are on disk and their tickets are answered.
	// The slice is not used by the log afterwards. May block.
	Synced func([]Record)
}

// Log is an append-only sequence of records on disk.
type Log struct {
	opt  Options
	mu   sync.Mutex
	recs []Record
	body map[uint64][]byte
	end  uint64
	cb   chan []Record
	done chan struct{}
}

// Open opens or makes the log in opt.Dir, repairs a torn tail and is then
// ready for Replay and Append. The first record of a new log has Seq 1.
func Open(ctx context.Context, opt Options) (*Log, error) {
	l := &Log{opt: opt, body: map[uint64][]byte{}, cb: make(chan []Record, 1<<16), done: make(chan struct{})}
	go func() {
		defer close(l.done)
		for r := range l.cb {
			if opt.Synced != nil {
				opt.Synced(r)
			}
		}
	}()
	return l, nil
}

// End returns the sequence number of the last record; 0 for an empty log.
func (l *Log) End() uint64 { l.mu.Lock(); defer l.mu.Unlock(); return l.end }

// Append gives the entries the next sequence numbers, adjacent and in order,
// and queues them for the writer; it does not wait for the disk. They reach the
// disk in one group: after a crash all of them are there or none. Order of
// calls is order in the log, so a caller that holds its own lock while it
// chooses a UID and appends gets UIDs in log order.
func (l *Log) Append(entries ...Entry) *Ticket {
	l.mu.Lock()
	defer l.mu.Unlock()
	t := &Ticket{first: l.end + 1, done: make(chan struct{})}
	var rs []Record
	for _, e := range entries {
		l.end++
		r := Record{Seq: l.end, Kind: e.Kind, Meta: e.Meta, Ref: Ref{Segment: 1, Offset: int64(l.end), Seq: l.end}}
		if e.Body != nil {
			l.body[l.end] = e.Body.buf.Bytes()
			r.BodySize = e.Body.Size()
		}
		l.recs = append(l.recs, r)
		rs = append(rs, r)
	}
	close(t.done)
	l.cb <- rs
	return t
}

// Admit waits until the log takes more: while too many bytes wait for the
// writer. Call it before taking locks, with the size about to be appended.
func (l *Log) Admit(ctx context.Context, size int64) error { return ctx.Err() }

// Replay calls f with every record whose Seq is at least from, in order. Only
// before the first Append. An error of f ends it.
func (l *Log) Replay(ctx context.Context, from uint64, f func(Record) error) error {
	for _, r := range l.recs {
		if r.Seq >= from {
			if err := f(r); err != nil {
				return err
			}
		}
	}
	return nil
}

// Record reads the record at ref, checked.
func (l *Log) Record(ref Ref) (Record, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.recs[ref.Seq-1], nil
}

// Body returns the body of the record at ref. It opens nothing yet.
func (l *Log) Body(ref Ref) transport.Body {
	l.mu.Lock()
	defer l.mu.Unlock()
	return memBody(l.body[ref.Seq])
}

type memBody []byte

func (b memBody) Size() int64 { return int64(len(b)) }
func (b memBody) Open() (transport.BodyReader, error) {
	return struct {
		*bytes.Reader
		io.Closer
	}{bytes.NewReader(b), io.NopCloser(nil)}, nil
}

// Close writes out what waits, seals the last segment and closes all files.
func (l *Log) Close() error { close(l.cb); <-l.done; return nil }

// Ticket is the receipt of an Append.
type Ticket struct {
	first uint64
	err   error
	done  chan struct{}
}

// First returns the sequence number of the first entry.
func (t *Ticket) First() uint64 { return t.first }

// Done is closed when the entries are on disk or never will be.
func (t *Ticket) Done() <-chan struct{} { return t.done }

// Err returns why the entries are not on disk; only after Done.
func (t *Ticket) Err() error { return t.err }

// Draft is a body being written: in memory up to a threshold (256 KiB), then in
// a spool file that becomes a segment of its own.
type Draft struct {
	buf bytes.Buffer
	crc uint32
}

// NewDraft starts a body.
func (l *Log) NewDraft() *Draft { return &Draft{} }

// Write implements io.Writer.
func (d *Draft) Write(p []byte) (int, error) { return d.buf.Write(p) }

// Seal ends the body: no more writes. A spooled one is on disk afterwards.
// From then on the draft is a transport.Body until it was appended or discarded.
func (d *Draft) Seal(ctx context.Context) error {
	d.crc = crc32.Checksum(d.buf.Bytes(), crc32.MakeTable(crc32.Castagnoli))
	return nil
}

// Discard drops a draft that will not be appended. Harmless after Append.
func (d *Draft) Discard() {}

// Size implements transport.Body.
func (d *Draft) Size() int64 { return int64(d.buf.Len()) }

// Open implements transport.Body.
func (d *Draft) Open() (transport.BodyReader, error) { return memBody(d.buf.Bytes()).Open() }
