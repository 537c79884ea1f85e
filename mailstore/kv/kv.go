// Package kv is the only door to Badger. It holds the view: rows that engines
// derive from the message log, written behind, in the log's order, by one
// committer. The view may be deleted at any time; the log rebuilds it.
//
// What was applied but not yet committed is held in an overlay, so that every
// read sees everything applied so far. DESIGN.md beside this file has the data
// path, the rows on disk and the rules of free space.
//
// It does not know what a row means, and nothing that a client was promised
// may rest on it alone. Only mailstore/journal writes; engines read.
package kv

import (
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"time"
)

// Batch collects the rows that one record changes. The zero value is empty and
// ready. Keys and values belong to the batch from the call on.
type Batch struct{ ops []op }

type op struct {
	key, value []byte
	del        bool
}

// Put sets a row. Values are bounded: MaxValue.
func (b *Batch) Put(key, value []byte) { b.ops = append(b.ops, op{key: key, value: value}) }

// Delete removes a row; harmless when there is none.
func (b *Batch) Delete(key []byte) { b.ops = append(b.ops, op{key: key, del: true}) }

// Len returns the number of operations.
func (b *Batch) Len() int { return len(b.ops) }

// MaxValue is the largest value a row may have, in bytes: below Badger's
// ValueThreshold, so that nothing ever reaches its value log.
const MaxValue = 512 << 10

// MaxKey is the longest key a row may have, in bytes.
const MaxKey = 4 << 10

// Errors of a view.
var (
	ErrClosed  = errors.New("view closed")
	ErrDamaged = errors.New("view damaged")
	ErrLocked  = errors.New("view is open in another process; stop the other one first")
	ErrNoSpace = errors.New("not enough free disk space for the view; free some")
	ErrFS      = errors.New("the view needs a local file system (ext4, XFS); network file systems lose its locks and syncs")
)

// Options configure a View. The zero value of each field but Dir is a default.
type Options struct {
	Dir    string // folder of the view, made when absent
	Memory bool   // keep everything in memory, for the simulator
	// Kept is what survives between two opens with Memory; nil for a new one.
	Kept *Memory

	Logger *slog.Logger // nil: none

	// Delay is how long the committer waits for more after the first record
	// that is not on disk. Default 250 ms; negative: none.
	Delay time.Duration
	// OverlayBytes and OverlayOps bound what is applied but not on disk;
	// Apply waits beyond. Default 32 MiB and 50,000 rows.
	OverlayBytes int
	OverlayOps   int

	// MemTable is the size of Badger's write buffer in bytes. Default 16 MiB,
	// 4 MiB on a disk smaller than 4 GiB. At least 4 MiB.
	MemTable int64
	// Floor is the free space in bytes below which nothing is written. Default
	// a sixteenth of the disk, at least 32 MiB, at most 256 MiB.
	Floor int64
	// Ballast is the size in bytes of a file that is given up below the floor,
	// so that what Badger has begun can end. Default 4 x MemTable + 64 MiB; on a
	// disk smaller than 4 GiB 4 x MemTable + 16 MiB. Negative: none.
	Ballast int64
	// Statfs describes the file system that holds a folder. Default: the real.
	Statfs func(dir string) (FS, error)

	// Damaged is called, at most once an open, when a read meets bytes that
	// were not written so. The view is set aside at the next open.
	Damaged func(error)
	// Rebuilding is called at open when a view was set aside, with the reason.
	Rebuilding func(reason string)
	// ID gives the random id of a new view. Default math/rand/v2: the id only
	// tells two views of one log apart.
	ID func() uint64
	// ByHand: no committer runs, Commit does its work. For the simulator of the
	// deciders (simtest/deciders).
	ByHand bool

	standing time.Duration // after which a view is proven; tests have less time
}

// FS is what Statfs says.
type FS struct {
	Total int64 // bytes
	Free  int64 // bytes that this process may still take
	Type  int64 // f_type of statfs(2); 0 for unknown
}

func (o *Options) defaults() {
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.Delay == 0 {
		o.Delay = 250 * time.Millisecond
	}
	if o.standing == 0 {
		o.standing = standing
	}
	if o.OverlayBytes <= 0 {
		o.OverlayBytes = 32 << 20
	}
	if o.OverlayOps <= 0 {
		o.OverlayOps = 50_000
	}
	if o.Statfs == nil && !o.Memory {
		o.Statfs = statfs
	}
	if o.Damaged == nil {
		o.Damaged = func(error) {}
	}
	if o.Rebuilding == nil {
		o.Rebuilding = func(string) {}
	}
	if o.ID == nil {
		o.ID = rand.Uint64
	}
}

// meta is what the view says about itself; it is written with every
// transaction, so it always fits the rows.
type meta struct {
	ID      uint64 // random, made with the view
	Applied uint64 // every record up to here is in the rows, none beyond
	// Target is where the log ended when the view was made: while Applied is
	// below, the view is being built and its being old means nothing.
	Target uint64
}

// store is what holds the committed rows: Badger or memory.
type store interface {
	// meta returns what was stored last; ok is false in a new store.
	meta() (m meta, ok bool, err error)
	// commit writes the rows, in key order, and m, all or none, synced.
	commit(rows []row, m meta) error
	// snapshot returns the committed rows as they are now.
	snapshot() (snapshot, error)
	// prepare is called before each commit: it makes room, or returns
	// errFull when nothing may be written now.
	prepare() error
	close() error
	// limits returns how many bytes and rows one commit should hold.
	limits() (bytes, ops int)
}

// snapshot reads committed rows. Safe for concurrent use until release.
type snapshot interface {
	get(key []byte) (value []byte, ok bool, err error)
	// iter returns the rows of prefix from the first key that is at least from.
	iter(prefix, from []byte) iterator
	// verify checks all that is on disk.
	verify() error
	release()
}

// iterator walks rows in key order; key and value are valid until next.
type iterator interface {
	valid() bool
	key() []byte
	value() ([]byte, error)
	next()
	err() error
	close()
}

var errFull = errors.New("disk below its floor")

// Open opens or makes the view in opt.Dir. A view that cannot be read, whose
// trial (files.go) went against it, that was found damaged the last time, or of
// a format that this version does not know, is set aside and a new one begun:
// Applied is then 0 and the log has to be replayed.
func Open(ctx context.Context, opt Options) (*View, error) {
	opt.defaults()
	if err := ctx.Err(); err != nil {
		return nil, context.Cause(ctx)
	}
	v := &View{opt: opt, work: make(chan struct{}, 1), stop: make(chan struct{}), done: make(chan struct{})}
	if err := v.openStore(); err != nil {
		return nil, err
	}
	v.changed = make(chan struct{})
	v.launch()
	return v, nil
}
