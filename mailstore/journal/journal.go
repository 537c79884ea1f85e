// Package journal keeps log and view in step. Engines that keep things (the
// mailboxes, the queue) write records through it and get every record back, in
// the log's order, to apply: the same code whether the record was just written
// or is replayed at start.
//
// Rules for an engine:
//   - Choose ids and UIDs before Append, under the engine's own lock, and call
//     Append while holding it: order of UIDs is then order in the log.
//   - Change state, in memory and by the batch, only in Apply.
//   - Apply never waits for Append, never does I/O beyond reading the view, and
//     gives the same result for the same record and state.
package journal

import (
	"context"
	"fmt"
	"sync"

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

// Journal ties a log and a view together.
type Journal struct {
	lg   *log.Log
	view *kv.View

	engines map[log.Kind][]Engine
	live    chan struct{} // closed by Start, or by Close
	once    sync.Once

	mu      sync.Mutex
	applied uint64
	waiters map[uint64][]chan error
	failed  error
}

// Options configure a Journal.
type Options struct {
	Log  log.Options // Synced is the journal's own
	View kv.Options
}

// Open opens log and view. Register the engines next, then Start.
func Open(ctx context.Context, opt Options) (*Journal, error) {
	j := &Journal{engines: map[log.Kind][]Engine{}, waiters: map[uint64][]chan error{}, live: make(chan struct{})}
	opt.Log.Synced = j.synced
	var err error
	if j.lg, err = log.Open(ctx, opt.Log); err != nil {
		return nil, err
	}
	if j.view, err = kv.Open(ctx, opt.View); err != nil {
		j.lg.Close()
		return nil, err
	}
	return j, nil
}

// Register makes e apply the records of those kinds. Several engines may apply
// one kind, in the order of registration. Only before Start.
func (j *Journal) Register(e Engine, kinds ...log.Kind) {
	for _, k := range kinds {
		j.engines[k] = append(j.engines[k], e)
	}
}

// Start applies what the log has beyond the view, then takes new records.
func (j *Journal) Start(ctx context.Context) error {
	j.applied = j.view.Applied()
	if err := j.lg.Replay(ctx, j.applied+1, func(r log.Record) error { return j.apply(r, false) }); err != nil {
		return err
	}
	j.once.Do(func() { close(j.live) })
	return nil
}

func (j *Journal) apply(r log.Record, live bool) error {
	var b kv.Batch
	for _, e := range j.engines[r.Kind] {
		if err := e.Apply(r, &b, live); err != nil {
			return fmt.Errorf("apply record %d: %w", r.Seq, err)
		}
	}
	if err := j.view.Apply(r.Seq, &b); err != nil {
		return err
	}
	j.mu.Lock()
	j.applied = r.Seq
	ws := j.waiters[r.Seq]
	delete(j.waiters, r.Seq)
	j.mu.Unlock()
	for _, w := range ws {
		w <- nil
	}
	return nil
}

func (j *Journal) synced(rs []log.Record) {
	<-j.live
	for _, r := range rs {
		if r.Seq <= j.applied { // replay had it already
			continue
		}
		if err := j.apply(r, true); err != nil {
			j.mu.Lock()
			j.failed = err
			j.mu.Unlock()
			return
		}
	}
}

// Admit waits until log and view take size more bytes, and fails with
// transport.ErrNoSpace below the free-space floor. Call it before taking locks.
func (j *Journal) Admit(ctx context.Context, size int64) error { return j.lg.Admit(ctx, size) }

// Append writes entries as one group; see log.Log.Append. It does not wait.
func (j *Journal) Append(entries ...log.Entry) *Ticket {
	t := j.lg.Append(entries...)
	return &Ticket{j: j, t: t, last: t.First() + uint64(len(entries)) - 1}
}

// NewDraft starts a body; see log.Draft.
func (j *Journal) NewDraft() *log.Draft { return j.lg.NewDraft() }

// Body returns the body of a record.
func (j *Journal) Body(ref log.Ref) transport.Body { return j.lg.Body(ref) }

// Record reads a record back.
func (j *Journal) Record(ref log.Ref) (log.Record, error) { return j.lg.Record(ref) }

// View returns the view, for reading.
func (j *Journal) View() *kv.View { return j.view }

// Close flushes and closes both.
func (j *Journal) Close() error {
	j.once.Do(func() { close(j.live) })
	err := j.lg.Close()
	if e := j.view.Close(); err == nil {
		err = e
	}
	return err
}

// Ticket is the receipt of an Append.
type Ticket struct {
	j    *Journal
	t    *log.Ticket
	last uint64
}

// First returns the sequence number of the first entry.
func (t *Ticket) First() uint64 { return t.t.First() }

// Synced waits until the entries are on disk: from then on they may be
// answered for. An end of ctx says nothing about whether they will be.
func (t *Ticket) Synced(ctx context.Context) error {
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
	t.j.mu.Lock()
	if t.j.failed != nil {
		defer t.j.mu.Unlock()
		return t.j.failed
	}
	if t.j.applied >= t.last {
		t.j.mu.Unlock()
		return nil
	}
	ch := make(chan error, 1)
	t.j.waiters[t.last] = append(t.j.waiters[t.last], ch)
	t.j.mu.Unlock()
	select {
	case err := <-ch:
		return err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
