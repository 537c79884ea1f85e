// Package journaltest gives the tests of engines a disk that outlives the
// journal on it: open, append, crash, open again, and see whether what the
// engine applies on replay is what it had applied live.
//
// Only tests import it. Everything is in memory, so it runs in a synctest
// bubble.
package journaltest

import (
	"context"
	"io"
	"sync"
	"testing"

	"posthouse/mailstore/journal"
	"posthouse/mailstore/kv"
	"posthouse/mailstore/log"
)

// Disk holds what log and view have on disk. One journal at a time is open.
type Disk struct {
	mu      sync.Mutex
	records []kept
	view    *kv.Memory
	open    *journal.Journal
}

type kept struct {
	kind log.Kind
	meta []byte
	body []byte // nil for none
}

// NewDisk returns an empty disk. A journal that is still open when tb ends is
// closed.
func NewDisk(tb testing.TB) *Disk {
	d := &Disk{view: &kv.Memory{}}
	tb.Cleanup(func() { d.Close(tb) })
	return d
}

// Open returns a journal on what the disk holds. It is not started: register
// the engines, then call its Start.
func (d *Disk) Open(tb testing.TB) *journal.Journal {
	tb.Helper()
	if d.open != nil {
		tb.Fatal("journaltest: the disk is open; Close or Crash it first")
	}
	ctx := context.Background()
	j, err := journal.Open(ctx, journal.Options{View: kv.Options{Memory: true, Kept: d.view}})
	if err != nil {
		tb.Fatal("journaltest: open:", err)
	}
	for _, k := range d.records {
		e := log.Entry{Kind: k.kind, Meta: append([]byte(nil), k.meta...)}
		if k.body != nil {
			e.Body = j.NewDraft()
			if _, err := e.Body.Write(k.body); err != nil {
				tb.Fatal("journaltest: body:", err)
			}
			if err := e.Body.Seal(ctx); err != nil {
				tb.Fatal("journaltest: body:", err)
			}
		}
		j.Append(e)
	}
	d.open = j
	all := make([]log.Kind, 0, 255)
	for k := 1; k < 256; k++ {
		all = append(all, log.Kind(k))
	}
	j.Register(&recorder{d: d, j: j}, all...)
	return j
}

// Close closes the open journal cleanly. Harmless when none is open.
func (d *Disk) Close(tb testing.TB) {
	tb.Helper()
	if d.open == nil {
		return
	}
	err := d.open.Close()
	d.open = nil
	if err != nil {
		tb.Error("journaltest: close:", err)
	}
}

// Crash ends the open journal as if the power had gone: every record that was
// synced is there at the next Open, the view may be behind. The old journal
// must not be used any more.
func (d *Disk) Crash(tb testing.TB) {
	tb.Helper()
	d.Close(tb)
}

// DropView removes the view of a closed disk: the next Start replays the whole
// log, as `posthouse store rebuild` does.
func (d *Disk) DropView(tb testing.TB) {
	tb.Helper()
	if d.open != nil {
		tb.Fatal("journaltest: the disk is open; Close or Crash it first")
	}
	d.view = &kv.Memory{}
}

// recorder keeps each record the first time that it is applied.
type recorder struct {
	d *Disk
	j *journal.Journal
}

func (r *recorder) Apply(rec log.Record, b *kv.Batch, live bool) error {
	r.d.mu.Lock()
	defer r.d.mu.Unlock()
	if rec.Seq <= uint64(len(r.d.records)) {
		return nil
	}
	k := kept{kind: rec.Kind, meta: append([]byte(nil), rec.Meta...)}
	if rec.BodySize > 0 {
		br, err := r.j.Body(rec.Ref).Open()
		if err != nil {
			return err
		}
		defer br.Close()
		if k.body, err = io.ReadAll(br); err != nil {
			return err
		}
	}
	r.d.records = append(r.d.records, k)
	return nil
}
