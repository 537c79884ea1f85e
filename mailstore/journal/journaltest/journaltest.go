// Package journaltest gives the tests of engines a disk that outlives the
// journal on it: open, append, crash, open again, and see whether what the
// engine applies on replay is what it had applied live.
//
// Only tests import it. Everything is in memory, the log on a simulated file
// system, so it runs in a synctest bubble.
package journaltest

import (
	"context"
	"testing"

	"posthouse/mailstore/journal"
	"posthouse/mailstore/kv"
	"posthouse/mailstore/log/simfs"
)

// Disk holds what log and view have on disk. One journal at a time is open.
// The fields may be changed while none is.
type Disk struct {
	FS   *simfs.FS  // of the log
	View *kv.Memory // the view's rows
	// Options are what Open opens with; FS and View are set by it.
	Options journal.Options
	// Mode and Seed say what Crash does to what was not synced. Zero: all of it
	// is lost.
	Mode simfs.Mode
	Seed uint64

	open *journal.Journal
}

// NewDisk returns an empty disk. A journal that is still open when tb ends is
// closed.
func NewDisk(tb testing.TB) *Disk {
	d := &Disk{FS: simfs.New(), View: new(kv.Memory)}
	d.Options.Log.Dir = "log"
	tb.Cleanup(func() { d.Close(tb) })
	return d
}

// Open returns a journal on what the disk holds. It is not started: register
// the engines, then call its Start.
func (d *Disk) Open(tb testing.TB) *journal.Journal {
	tb.Helper()
	j, err := d.TryOpen()
	if err != nil {
		tb.Fatal("journaltest: open:", err)
	}
	return j
}

// TryOpen is Open for a disk on which it may fail.
func (d *Disk) TryOpen() (*journal.Journal, error) {
	if d.open != nil {
		panic("journaltest: the disk is open; Close or Crash it first")
	}
	opt := d.Options
	opt.Log.FS = d.FS
	opt.View.Memory, opt.View.Kept = true, d.View
	j, err := journal.Open(context.Background(), opt)
	if err == nil {
		d.open = j
	}
	return j, err
}

// Close closes the open journal cleanly. Harmless when none is open.
func (d *Disk) Close(tb testing.TB) {
	tb.Helper()
	if err := d.TryClose(); err != nil {
		tb.Error("journaltest: close:", err)
	}
}

// TryClose is Close for a disk on which it may fail.
func (d *Disk) TryClose() error {
	if d.open == nil {
		return nil
	}
	j := d.open
	d.open = nil
	return j.Close()
}

// Crash ends the open journal as if the power had gone: every record that was
// synced is there at the next Open, and the view is as of its last commit. The
// old journal must not be used any more.
func (d *Disk) Crash(tb testing.TB) {
	tb.Helper()
	d.FS.Crash()
	if d.open != nil {
		d.open.Abort()
		d.open = nil
	}
	d.FS = d.FS.After(d.Mode, d.Seed)
}

// DropView removes the view of a closed disk: the next Start replays the whole
// log, as `posthouse store rebuild` does.
func (d *Disk) DropView(tb testing.TB) {
	tb.Helper()
	if d.open != nil {
		tb.Fatal("journaltest: the disk is open; Close or Crash it first")
	}
	d.View = new(kv.Memory)
}
