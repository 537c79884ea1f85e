package kv

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"
)

// View is an ordered map of rows with a position in the log. Reads may come
// from any goroutine; Apply from one at a time.
type View struct {
	opt   Options
	st    store
	files *files // nil in memory
	space *space // nil when there is no Statfs

	opened time.Time // of the files

	work     chan struct{} // a token: the committer has something to look at
	stop     chan struct{} // closed by Close and Abort
	stopOnce sync.Once
	done     chan struct{} // closed by the committer's end
	closeErr error
	live     sync.WaitGroup // snapshots: the store is closed after the last reader

	damaged atomic.Bool

	mu       sync.RWMutex
	gens     []*generation // oldest first; the last one is open for Apply
	base     *shared       // the committed rows below the overlay; nil: closed
	meta     meta
	applied  uint64
	durable  uint64
	bytes    int // of the overlay
	ops      int
	urgent   bool  // the committer shall not wait for more
	full     bool  // the committer waits for space
	abort    bool  // leave without another commit
	failed   error // a commit failed: nothing is written any more
	closed   bool
	unbound  bool          // Apply does not wait
	changed  chan struct{} // closed and renewed when one of the fields above changes for waiters
	flushing int
}

// shared is a snapshot that ends with its last reader.
type shared struct {
	snapshot
	refs atomic.Int64
	live *sync.WaitGroup
}

func (s *shared) acquire() *shared { s.refs.Add(1); return s }
func (s *shared) drop() {
	if s.refs.Add(-1) == 0 {
		s.release()
		s.live.Done()
	}
}

func (v *View) share(s snapshot) *shared {
	sh := &shared{snapshot: s, live: &v.live}
	sh.refs.Store(1)
	v.live.Add(1)
	return sh
}

// wake tells waiters that something changed. Called with v.mu held.
func (v *View) wake() {
	close(v.changed)
	v.changed = make(chan struct{})
}

func (v *View) kick() {
	select {
	case v.work <- struct{}{}:
	default:
	}
}

// begin sets the view to what its store holds.
func (v *View) begin(m meta) error {
	s, err := v.st.snapshot()
	if err != nil {
		return err
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	v.base, v.meta = v.share(s), m
	v.applied, v.durable = m.Applied, m.Applied
	v.gens, v.bytes, v.ops = []*generation{newGeneration()}, 0, 0
	return nil
}

// Apply puts b into the overlay and queues it for the committer. seq is the
// record's and grows from call to call; one caller at a time. It waits only
// while the overlay is over its bound. An error means that the view will take
// nothing more.
func (v *View) Apply(seq uint64, b *Batch) error {
	size := 0
	for _, o := range b.ops {
		if len(o.value) > MaxValue || len(o.key) > MaxKey || len(o.key) == 0 {
			return fmt.Errorf("record %d: row with a key of %d and a value of %d bytes is out of bounds", seq, len(o.key), len(o.value))
		}
		size += len(o.key) + len(o.value) + rowCost
	}
	maxBytes, maxOps := v.st.limits()
	v.mu.Lock()
	for v.ops > 0 && (v.bytes+size > v.opt.OverlayBytes || v.ops+len(b.ops) > v.opt.OverlayOps) && v.failed == nil && !v.closed && !v.unbound {
		v.urgent = true
		ch := v.changed
		v.mu.Unlock()
		v.kick()
		<-ch
		v.mu.Lock()
	}
	defer v.mu.Unlock()
	switch {
	case v.failed != nil:
		return v.failed
	case v.closed:
		return ErrClosed
	case seq <= v.applied:
		return fmt.Errorf("record %d applied after %d", seq, v.applied)
	}
	g := v.gens[len(v.gens)-1]
	if g.seq != 0 && (g.bytes+size > maxBytes || g.rows.Len()+len(b.ops) > maxOps) {
		g = newGeneration()
		v.gens = append(v.gens, g)
		v.urgent = true
	}
	for _, o := range b.ops {
		n, rows := g.put(o)
		v.bytes += n
		v.ops += rows
	}
	first := g.seq == 0
	g.seq, v.applied = seq, seq
	if first || v.urgent {
		v.kick()
	}
	return nil
}

// Applied returns the sequence number that reads see: of the last Apply, or of
// the position on disk at open.
func (v *View) Applied() uint64 { v.mu.RLock(); defer v.mu.RUnlock(); return v.applied }

// Durable returns the sequence number up to which rows are on disk.
func (v *View) Durable() uint64 { v.mu.RLock(); defer v.mu.RUnlock(); return v.durable }

// Pending returns how much the overlay holds, in bytes and rows.
func (v *View) Pending() (bytes, rows int) {
	v.mu.RLock()
	defer v.mu.RUnlock()
	return v.bytes, v.ops
}

// Room waits until the overlay is at most half full, and fails with ErrNoSpace
// when it is fuller than that and the disk is below its floor.
func (v *View) Room(ctx context.Context) error {
	for {
		v.mu.RLock()
		over := v.bytes > v.opt.OverlayBytes/2 || v.ops > v.opt.OverlayOps/2
		err, ch := v.failed, v.changed
		switch {
		case err != nil:
		case v.closed:
			err = ErrClosed
		case over && v.full:
			err = ErrNoSpace
		}
		v.mu.RUnlock()
		if err != nil || !over {
			return err
		}
		select {
		case <-ch:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// Full reports whether the disk is below its floor: nothing should be accepted
// and nothing is written until there is space again.
func (v *View) Full() bool {
	v.mu.RLock()
	full := v.full
	v.mu.RUnlock()
	return full || v.space != nil && v.space.low()
}

// Get returns the value of a row, not to be changed, and whether it exists.
func (v *View) Get(key []byte) (value []byte, ok bool, err error) {
	v.mu.RLock()
	for i := len(v.gens) - 1; i >= 0; i-- {
		if r, ok := v.gens[i].get(key); ok {
			v.mu.RUnlock()
			return r.value, !r.del, nil
		}
	}
	if v.base == nil {
		v.mu.RUnlock()
		return nil, false, ErrClosed
	}
	s := v.base.acquire()
	v.mu.RUnlock()
	defer s.drop()
	value, ok, err = s.get(key)
	return value, ok, v.checked(err)
}

// Scan calls f with the rows whose key starts with prefix and is at least from
// (nil: all of them), in key order, until f returns false. It shows the rows of
// one instant. Key and value are valid during the call only. f must not call
// Apply.
func (v *View) Scan(prefix, from []byte, f func(key, value []byte) bool) error {
	return v.scan(prefix, from, nil, f)
}

// Dump is Scan of all rows; at is the position that they show: what a view is
// that holds exactly these and whose Applied is at.
func (v *View) Dump(f func(key, value []byte) bool) (at uint64, err error) {
	err = v.scan(nil, nil, &at, f)
	return at, err
}

func (v *View) scan(prefix, from []byte, at *uint64, f func(key, value []byte) bool) error {
	end := prefixEnd(prefix)
	if bytes.Compare(from, prefix) < 0 {
		from = prefix
	}
	if end != nil && bytes.Compare(from, end) >= 0 {
		return nil
	}
	v.mu.RLock()
	if n := len(v.gens); n > 0 && v.gens[n-1].shot == nil && v.gens[n-1].touches(from, end) {
		v.mu.RUnlock() // a clone is a change of the tree
		v.mu.Lock()
		if g := v.gens; len(g) > 0 && g[len(g)-1].shot == nil {
			g[len(g)-1].shot = g[len(g)-1].rows.Clone()
		}
		v.mu.Unlock()
		v.mu.RLock()
	}
	if v.base == nil {
		v.mu.RUnlock()
		return ErrClosed
	}
	var layers []*treeIter
	for i := len(v.gens) - 1; i >= 0; i-- {
		g := v.gens[i]
		if !g.touches(from, end) {
			continue
		}
		tree := g.rows
		if i == len(v.gens)-1 {
			if tree = g.shot; tree == nil { // written between the two locks
				v.mu.RUnlock()
				return v.scan(prefix, from, at, f)
			}
		}
		layers = append(layers, newTreeIter(tree, from, end))
	}
	if at != nil {
		*at = v.applied
	}
	s := v.base.acquire()
	v.mu.RUnlock()
	defer s.drop()
	it := s.iter(prefix, from)
	defer it.close()
	return v.checked(merge(layers, it, f))
}

// Verify reads all that is on disk and checks it, which a read does only in
// part: Badger takes a table that turns bad after the open for one without the
// rows. Call it now and then, when there is little else to do. Damage is told to
// Options.Damaged too.
func (v *View) Verify() error {
	v.mu.RLock()
	if v.base == nil {
		v.mu.RUnlock()
		return ErrClosed
	}
	s := v.base.acquire()
	v.mu.RUnlock()
	defer s.drop()
	return v.checked(s.verify())
}

// checked tells the owner once when a read met damage.
func (v *View) checked(err error) error {
	if err != nil && errors.Is(err, ErrDamaged) && v.damaged.CompareAndSwap(false, true) {
		if v.files != nil {
			v.files.noteDamage(err)
		}
		v.opt.Logger.Error("view damaged", "err", err)
		v.opt.Damaged(err)
	}
	return err
}

// Unbound lets Apply pass without waiting, whatever the overlay holds: the
// owner is about to close.
func (v *View) Unbound() {
	v.mu.Lock()
	v.unbound = true
	v.wake()
	v.mu.Unlock()
}

// Flush waits until everything applied before the call is on disk. While the
// disk is below its floor it fails with ErrNoSpace.
func (v *View) Flush(ctx context.Context) error {
	if v.opt.ByHand {
		return v.Commit()
	}
	v.mu.Lock()
	target := v.applied
	v.flushing++
	defer func() { v.mu.Lock(); v.flushing--; v.mu.Unlock() }()
	for {
		err, ch, ok := v.failed, v.changed, v.durable >= target
		switch {
		case err != nil:
		case v.closed:
			err = ErrClosed
		case v.full:
			err = ErrNoSpace
		}
		v.mu.Unlock()
		if ok || err != nil {
			if ok {
				err = nil
			}
			return err
		}
		v.kick()
		select {
		case <-ch:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		v.mu.Lock()
	}
}

// Target notes where the log ends, when the view is new: until it is applied,
// the view counts as being built. Before the first Apply.
func (v *View) Target(seq uint64) { v.mu.Lock(); v.meta.Target = seq; v.mu.Unlock() }

// Building reports whether the view has not yet reached its Target on disk.
func (v *View) Building() bool {
	v.mu.RLock()
	defer v.mu.RUnlock()
	return v.durable < v.meta.Target
}

// ID tells this view from others that were built from the same log.
func (v *View) ID() uint64 { v.mu.RLock(); defer v.mu.RUnlock(); return v.meta.ID }

// Close flushes and closes, after the reads under way. What the disk has no
// space for is left to the log; when there is not even room to close Badger it
// is left open, which loses nothing, and the error is ErrNoSpace.
func (v *View) Close() error {
	v.halt()
	return v.closeErr
}

// Abort closes without another commit: what is then on disk is what a crash
// would leave. The simulator and the crash tests call it.
func (v *View) Abort() error {
	v.mu.Lock()
	v.abort = true
	v.mu.Unlock()
	return v.Close()
}
