// Package journal keeps log and view in step. Engines that keep things (the
// mailboxes, the queue) write records through it and get every record back, in
// the log's order, to apply: the same code whether the record was just written
// or is replayed at start.
//
// Rules for an engine:
//   - Choose ids and UIDs before Append, under the engine's own lock, and call
//     Append while holding it: order of UIDs is then order in the log.
//   - Change state, in memory and by the batch, only in Apply.
//   - Apply never waits for Append or Admit, never does I/O beyond reading the
//     view, and gives the same result for the same record and state.
//
// The journal does not know what a record means. DESIGN.md beside this file
// has the order of opening, the order of locks, and what each disagreement
// between log and view leads to.
package journal

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"posthouse/mailstore/kv"
	"posthouse/mailstore/log"
	"posthouse/transport"
)

// Engine applies records. Apply is called by one goroutine, in log order, once
// per record; live tells a record just written from a replayed one. An error
// stops the journal: it means a bug or a damaged record, never a full disk.
type Engine interface {
	Apply(rec log.Record, b *kv.Batch, live bool) error
}

// Renewer is an Engine that is told when the log has lost records that clients
// may have seen: it renews what they rely on, such as UIDVALIDITY. Renew is
// called by Start after the replay; it may Append and wait.
type Renewer interface {
	Renew(ctx context.Context) error
}

// ErrClosed is returned by a journal that was closed.
var ErrClosed = errors.New("journal closed")

// Journal ties a log and a view together. It is safe for concurrent use once
// started.
type Journal struct {
	lg   *log.Log
	view *kv.View
	slog *slog.Logger

	hand bool // Options.ByHand

	engines map[log.Kind][]Engine
	all     []Engine // each once, in order of registration
	renew   bool     // the log lost its end
	started atomic.Bool

	applied atomic.Uint64
	waiting atomic.Int32 // waiters, so that nobody locks when there are none

	// Of the applying goroutine alone.
	marked  uint64
	unnoted int64 // bytes of records since the last mark

	// Of the one Tidy that may be under way.
	tidying  atomic.Bool
	segment  int64            // size of a segment
	proven   map[uint64]bool  // checkpoints that were read back
	stubborn map[uint64]int64 // segments that compaction did not make smaller, and what of them was needed then; -1: damaged

	space    func(full bool)
	refusals atomic.Uint64 // groups that a full disk kept out of the log
	short    chan struct{} // a token: something was refused for want of space
	full     atomic.Bool   // as space was told last

	done  chan struct{} // closed by fail and by Close
	watch sync.WaitGroup
	once  sync.Once
	err2  error // of Close

	mu         sync.Mutex
	waiters    []waiter
	failed     error
	conditions []Condition
	fullSince  time.Time
	disk       Disk
}

type waiter struct {
	seq uint64
	ch  chan error // holds one
}

// Options configure a Journal.
type Options struct {
	Log  log.Options // Synced, Refused and Position are the journal's own
	View kv.Options  // Damaged and Rebuilding are the journal's own
	// Space is called, from one goroutine, when the first thing was refused for
	// want of space, and when there is room again. Nil: nobody is told.
	Space func(full bool)
	// Logger is also the log's and the view's where they have none. Nil: none.
	Logger *slog.Logger
	// ByHand: no goroutine runs. Turn writes and applies, Commit brings the view
	// up to date, and whoever waits for a Ticket does both parts of Turn's work
	// itself. One goroutine uses the journal then. For the simulator of the
	// deciders (simtest/deciders).
	ByHand bool
}

// Open opens view and log, in this order, and settles what they disagree
// about. Register the engines next, then Start.
func Open(ctx context.Context, opt Options) (*Journal, error) {
	if opt.Logger == nil {
		opt.Logger = slog.New(slog.DiscardHandler)
	}
	if opt.Log.Logger == nil {
		opt.Log.Logger = opt.Logger
	}
	if opt.View.Logger == nil {
		opt.View.Logger = opt.Logger
	}
	j := &Journal{
		slog: opt.Logger, engines: map[log.Kind][]Engine{}, done: make(chan struct{}), short: make(chan struct{}, 1), space: opt.Space,
		hand: opt.ByHand, segment: opt.Log.SegmentSize, proven: map[uint64]bool{}, stubborn: map[uint64]int64{},
	}
	if j.segment <= 0 {
		j.segment = 64 << 20
	}
	opt.View.Damaged = func(err error) {
		j.note(CondViewDamaged, fmt.Sprintf("the index of the mail store is damaged and will be rebuilt at the next start: %v", err))
	}
	opt.View.Rebuilding = func(why string) {
		j.note(CondViewRebuilt, "the index of the mail store was set aside and rebuilt from the log: "+why)
	}
	opt.Log.ByHand, opt.View.ByHand = opt.ByHand, opt.ByHand
	var err error
	if j.view, err = kv.Open(ctx, opt.View); err != nil {
		return nil, err
	}
	opt.Log.Synced, opt.Log.Refused, opt.Log.Position = j.synced, j.refusedByLog, j.view.Durable()
	if j.lg, err = log.Open(ctx, opt.Log); err != nil {
		j.view.Close()
		return nil, err
	}
	if err := j.settle(ctx); err != nil {
		j.lg.Close()
		j.view.Close()
		return nil, err
	}
	return j, nil
}

// settle decides what a disagreement of log and view means.
func (j *Journal) settle(ctx context.Context) error {
	r, at := j.lg.Report(), j.view.Applied()
	j.noteDamage(r)
	var why string
	switch {
	case r.LostEnd || at > r.End:
		// The log lost records that were synced: numbers that clients saw may be
		// given again.
		j.renew = true
		why = fmt.Sprintf("the message log ends at record %d, but record %d had been stored", r.End, max(at, r.Mark))
		j.note(CondLogLostEnd, why+"; mail of the last moments before the stop may be missing")
	case at > 0 && (at < r.Mark && !j.view.Building() || at < r.Compacted):
		why = fmt.Sprintf("the index ends at record %d, but had been stored up to %d", at, r.Mark)
		j.note(CondViewOld, why+"; it is rebuilt from the log, no mail is missing")
	default:
		return nil
	}
	j.slog.Warn("log and view disagree: the view is rebuilt", "reason", why)
	if at == 0 {
		return nil
	}
	if err := j.view.Reset(ctx, why, true); err != nil {
		return fmt.Errorf("set view aside: %w", err)
	}
	return nil
}

// Register makes e apply the records of those kinds. Several engines may apply
// one kind, in the order of registration. Only before Start.
func (j *Journal) Register(e Engine, kinds ...log.Kind) {
	for _, k := range kinds {
		j.engines[k] = append(j.engines[k], e)
	}
	for _, had := range j.all {
		if had == e {
			return
		}
	}
	j.all = append(j.all, e)
}

// Start applies what the log has beyond the view, then takes new records.
func (j *Journal) Start(ctx context.Context) error {
	return j.start(ctx, func(uint64, uint64) {})
}

// Rebuild is Start with the view set aside first: every record is applied
// again. progress is called now and then with the records done and the last
// one's number, and once at the end.
func (j *Journal) Rebuild(ctx context.Context, progress func(done, total uint64)) error {
	if err := j.view.Reset(ctx, "asked for", true); err != nil {
		return fmt.Errorf("set view aside: %w", err)
	}
	return j.start(ctx, progress)
}

// progressEvery is the number of records between two calls of progress.
const progressEvery = 1 << 13

func (j *Journal) start(ctx context.Context, progress func(done, total uint64)) error {
	from, end := j.view.Applied(), j.lg.Report().End
	if from == 0 {
		var err error
		if from, err = j.restore(ctx); err != nil {
			return err
		}
	}
	if from == 0 {
		j.view.Target(end)
	}
	n, last, begun, whole := uint64(0), from, time.Now(), j.lg.Report().Compacted
	err := j.lg.Replay(ctx, from+1, func(r log.Record) error {
		if n++; n%progressEvery == 0 {
			progress(r.Seq, end)
		}
		if err := j.room(ctx); err != nil {
			return err
		}
		last = r.Seq
		// What followed it may have been dropped, also where it stands as it was.
		r.Compacted = r.Compacted || r.Seq <= whole
		return j.apply(r, false)
	})
	if err != nil {
		return fmt.Errorf("replay after record %d: %w", last, err)
	}
	progress(max(last, end), end)
	j.noteDamage(j.lg.Report())
	j.applied.Store(last)
	j.marked = max(j.lg.Report().Mark, j.view.Durable())
	if n > 0 {
		j.slog.Info("log replayed", "records", n, "took", time.Since(begun))
	}
	j.started.Store(true)
	if !j.hand {
		j.watch.Go(func() {
			select {
			case <-j.lg.Failed():
				j.fail(fmt.Errorf("message log: %w", j.lg.Err()))
			case <-j.done:
			}
		})
		j.watch.Go(j.watchSpace)
	}
	if !j.renew {
		return nil
	}
	for _, e := range j.all {
		if r, ok := e.(Renewer); ok {
			if err := r.Renew(ctx); err != nil {
				return fmt.Errorf("renew after lost records: %w", err)
			}
		}
	}
	return nil
}

// roomPoll is how often a replay looks for space on a full disk.
const roomPoll = time.Second

// room waits until the view takes more, also through a full disk: while
// nothing is served yet there is nobody to refuse.
func (j *Journal) room(ctx context.Context) error {
	for {
		err := j.view.Room(ctx)
		if !errors.Is(err, kv.ErrNoSpace) {
			return err
		}
		t := time.NewTimer(roomPoll)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return context.Cause(ctx)
		}
	}
}

func (j *Journal) apply(r log.Record, live bool) error {
	var b kv.Batch
	if r.Kind == log.KindCheckpoint {
		if err := j.applyCheckpoint(r, &b); err != nil {
			return fmt.Errorf("apply record %d: %w", r.Seq, err)
		}
	}
	for _, e := range j.engines[r.Kind] {
		if err := e.Apply(r, &b, live); err != nil {
			return fmt.Errorf("apply record %d: %w", r.Seq, err)
		}
	}
	return j.view.Apply(r.Seq, &b)
}

// synced applies a group that is on disk.
func (j *Journal) synced(rs []log.Record) {
	if len(rs) == 0 || j.Err() != nil {
		return
	}
	for _, r := range rs {
		if err := j.apply(r, true); err != nil {
			j.fail(err)
			return
		}
		j.unnoted += int64(len(r.Meta)) + r.BodySize
	}
	j.applied.Store(rs[len(rs)-1].Seq)
	if j.waiting.Load() > 0 {
		j.answer()
	}
	j.mark()
}

// Turn writes what was appended as one group, syncs it, answers its tickets and
// applies it. It reports whether there was anything. Only with Options.ByHand.
func (j *Journal) Turn() bool {
	did := j.lg.Turn()
	if err := j.lg.Err(); err != nil && j.Err() == nil {
		j.fail(fmt.Errorf("message log: %w", err))
	}
	return did
}

// Commit brings the view on disk up to what was applied. Only with
// Options.ByHand.
func (j *Journal) Commit() error { return j.view.Commit() }

// ByHand reports whether nothing happens here but by Turn and Commit: who would
// wait for others has to give up instead.
func (j *Journal) ByHand() bool { return j.hand }

// A mark is written when the view has come that far since the last one. It
// costs a share of the next group's sync, nothing when nothing is written.
const (
	markRecords = 1024
	markBytes   = 8 << 20
)

func (j *Journal) mark() {
	d := j.view.Durable()
	if d >= j.marked+markRecords || d > j.marked && j.unnoted >= markBytes {
		j.marked, j.unnoted = d, 0
		j.lg.Mark(d)
	}
}

// answer tells the waiters whose records are applied.
func (j *Journal) answer() {
	j.mu.Lock()
	defer j.mu.Unlock()
	at, left := j.applied.Load(), j.waiters[:0]
	for _, w := range j.waiters {
		if w.seq <= at {
			w.ch <- nil
		} else {
			left = append(left, w)
		}
	}
	clear(j.waiters[len(left):])
	j.waiters = left
	j.waiting.Store(int32(len(left)))
}

// fail stops the journal; the first cause stays.
func (j *Journal) fail(err error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.failed != nil {
		return
	}
	j.failed = err
	for _, w := range j.waiters {
		w.ch <- err
	}
	j.waiters = nil
	j.waiting.Store(0)
	close(j.done)
	if !errors.Is(err, ErrClosed) {
		j.slog.Error("journal stopped", "err", err)
	}
}

// Done is closed when the journal has stopped: it was closed, a record could
// not be applied, the view not written or the log not synced. The process
// should end then; what was acknowledged is on disk.
func (j *Journal) Done() <-chan struct{} { return j.done }

// Err returns why the journal stopped, nil while it works.
func (j *Journal) Err() error { j.mu.Lock(); defer j.mu.Unlock(); return j.failed }

// Admit waits until log and view take size more bytes, and fails with
// transport.ErrNoSpace below the free-space floor. Call it before taking locks.
func (j *Journal) Admit(ctx context.Context, size int64) error {
	if err := j.Err(); err != nil {
		return err
	}
	if j.view.Full() {
		return j.refuse()
	}
	if err := j.view.Room(ctx); errors.Is(err, kv.ErrNoSpace) {
		return j.refuse()
	} else if err != nil {
		return err
	}
	return j.lg.Admit(ctx, size)
}

// Append writes entries as one group; see log.Log.Append. It does not wait.
func (j *Journal) Append(entries ...log.Entry) *Ticket {
	return j.ticket(j.lg.Append(entries...), len(entries))
}

// AppendBehind is Append for what no client and no peer waits for; see
// log.Log.AppendBehind.
func (j *Journal) AppendBehind(entries ...log.Entry) *Ticket {
	return j.ticket(j.lg.AppendBehind(entries...), len(entries))
}

func (j *Journal) ticket(t *log.Ticket, entries int) *Ticket {
	return &Ticket{j: j, t: t, last: t.First() + uint64(entries) - 1}
}

// NewDraft starts a body; see log.Draft.
func (j *Journal) NewDraft() *log.Draft { return j.lg.NewDraft() }

// Body returns the body of a record.
func (j *Journal) Body(ref log.Ref) transport.Body { return j.lg.Body(ref) }

// BodyOfSize returns the body of a record, whose size is known.
func (j *Journal) BodyOfSize(ref log.Ref, size int64) transport.Body {
	return j.lg.BodyOfSize(ref, size)
}

// Record reads a record back.
func (j *Journal) Record(ref log.Ref) (log.Record, error) { return j.lg.Record(ref) }

// RecordInto reads a record back, its meta into buf; see log.Log.RecordInto.
func (j *Journal) RecordInto(ref log.Ref, buf []byte) (log.Record, error) {
	return j.lg.RecordInto(ref, buf)
}

// Stats returns the log's counts.
func (j *Journal) Stats() log.Stats { return j.lg.Stats() }

// View returns the view, for reading.
func (j *Journal) View() *kv.View { return j.view }

// Applied returns the sequence of the last record that was applied.
func (j *Journal) Applied() uint64 { return j.applied.Load() }

// Close writes out what waits, applies it, and closes both. It waits.
func (j *Journal) Close() error {
	return j.close(func() error {
		if j.hand {
			for j.Turn() {
			}
			if err := j.view.Commit(); err == nil {
				j.lg.Mark(j.view.Durable())
			}
		} else if j.started.Load() {
			if err := j.view.Flush(context.Background()); err == nil {
				j.lg.Mark(j.view.Durable())
			}
		}
		j.view.Unbound()
		err := j.lg.Close()
		return errors.Join(err, j.view.Close())
	})
}

// Abort closes without bringing the view up to the log: with a log on a
// crashed file system it leaves what a power cut would. Only for tests.
func (j *Journal) Abort() {
	j.close(func() error {
		j.view.Unbound()
		j.view.Abort()
		j.lg.Close()
		return nil
	})
}

func (j *Journal) close(f func() error) error {
	j.once.Do(func() {
		j.err2 = f()
		j.fail(ErrClosed)
		j.watch.Wait()
	})
	return j.err2
}

// Ticket is the receipt of an Append.
type Ticket struct {
	j    *Journal
	t    *log.Ticket
	last uint64
}

// Done is closed when the entries are on disk or never will be.
func (t *Ticket) Done() <-chan struct{} { return t.t.Done() }

// Log returns the log's own receipt, for log.Entry.After.
func (t *Ticket) Log() *log.Ticket { return t.t }

// First returns the sequence number of the first entry.
func (t *Ticket) First() uint64 { return t.t.First() }

// Synced waits until the entries are on disk: from then on they may be
// answered for. An end of ctx says nothing about whether they will be.
func (t *Ticket) Synced(ctx context.Context) error {
	select {
	case <-t.t.Done():
		return t.t.Err()
	default:
	}
	for t.j.hand && t.j.Turn() {
		select {
		case <-t.t.Done():
			return t.t.Err()
		default:
		}
	}
	select {
	case <-t.t.Done():
		return t.t.Err()
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// Applied waits until the entries are on disk and every read sees them.
func (t *Ticket) Applied(ctx context.Context) error {
	if err := t.Synced(ctx); err != nil {
		return err
	}
	j := t.j
	if j.applied.Load() >= t.last {
		return nil
	}
	ch := make(chan error, 1)
	j.mu.Lock()
	j.waiting.Add(1) // before the second look, so that synced sees it or we see its record
	switch {
	case j.applied.Load() >= t.last:
		j.waiting.Add(-1)
		j.mu.Unlock()
		return nil
	case j.failed != nil:
		j.waiting.Add(-1)
		defer j.mu.Unlock()
		return j.failed
	}
	j.waiters = append(j.waiters, waiter{t.last, ch})
	j.mu.Unlock()
	select {
	case err := <-ch:
		return err
	case <-ctx.Done():
		j.forget(ch)
		return context.Cause(ctx)
	}
}

// forget takes a waiter off the list that does not wait any more.
func (j *Journal) forget(ch chan error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	for i, w := range j.waiters {
		if w.ch == ch {
			j.waiters = append(j.waiters[:i], j.waiters[i+1:]...)
			j.waiting.Add(-1)
			return
		}
	}
}
