// Package journaltest gives the tests of engines a disk that outlives the
// journal on it: open, append, crash, open again, and see whether what the
// engine applies on replay is what it had applied live.
//
// Only tests import it. Everything is in memory, so it runs in a synctest
// bubble.
package journaltest

import (
	"context"
	"testing"

	"posthouse/mailstore/journal"
	"posthouse/mailstore/kv"
	"posthouse/mailstore/log"
	"posthouse/mailstore/log/simfs"
)

// Disk holds what log and view have on disk. One journal at a time is open.
type Disk struct {
	fs   *simfs.FS
	view *kv.Memory
	open *journal.Journal
}

// NewDisk returns an empty disk. A journal that is still open when tb ends is
// closed.
func NewDisk(tb testing.TB) *Disk {
	d := &Disk{fs: simfs.New(), view: newView()}
	tb.Cleanup(func() { d.Close(tb) })
	return d
}

func newView() *kv.Memory {
	v := &kv.Memory{}
	v.KeepHistory()
	return v
}

// Open returns a journal on what the disk holds. It is not started: register
// the engines, then call its Start.
func (d *Disk) Open(tb testing.TB) *journal.Journal {
	tb.Helper()
	if d.open != nil {
		tb.Fatal("journaltest: the disk is open; Close or Crash it first")
	}
	j, err := journal.Open(context.Background(), journal.Options{
		Log:  log.Options{Dir: "log", FS: d.fs},
		View: kv.Options{Memory: true, Kept: d.view},
	})
	if err != nil {
		tb.Fatal("journaltest: open:", err)
	}
	d.open = j
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
	if d.open == nil {
		return
	}
	after := d.fs.After(simfs.LoseAll, 0)
	d.open.View().Abort()
	d.open.Close() // of a disk that is gone: it fails
	d.open, d.fs = nil, after
}

// Rewind takes the view of a closed disk back to the last commit at or before
// that record: the next Start replays the rest. 0 is an absent view.
func (d *Disk) Rewind(tb testing.TB, seq uint64) {
	tb.Helper()
	if d.open != nil {
		tb.Fatal("journaltest: the disk is open; Close or Crash it first")
	}
	d.view.Rewind(seq)
}

// DropView removes the view of a closed disk: the next Start replays the whole
// log, as `posthouse store rebuild` does.
func (d *Disk) DropView(tb testing.TB) {
	tb.Helper()
	if d.open != nil {
		tb.Fatal("journaltest: the disk is open; Close or Crash it first")
	}
	d.view = newView()
}
