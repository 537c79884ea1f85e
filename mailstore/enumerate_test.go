package mailstore_test

import (
	"fmt"
	"testing"
	"testing/synctest"

	"posthouse/mailstore"
	"posthouse/mailstore/journal/journaltest"
	"posthouse/mailstore/log/simfs"
	"posthouse/transport"
)

// steps is one of each operation, in an order in which each has work to do.
func steps(w *world, t *testing.T) []func() error {
	ctx := t.Context()
	in := func(name string) *mailstore.Folder { return w.folder(1, name) }
	id := transport.MessageID{15: 9}
	deliver := func(id transport.MessageID) func() error {
		return func() error {
			_, err := w.s.Deliver(ctx, w.delivery(id, text(id.String()), 1))
			return err
		}
	}
	return []func() error{
		func() error { return w.s.Create(ctx, boxID(1), 0) },
		deliver(id),
		deliver(transport.MessageID{15: 10}),
		deliver(id),
		func() error {
			_, _, err := in("INBOX").Append(ctx, []mailstore.AppendMessage{
				{Draft: w.draft(text("one")), Structure: structure(text("one")), Flags: []mailstore.Flag{"Later"}},
				{Draft: w.draft(text("two")), Structure: structure(text("two"))},
			})
			return err
		},
		func() error {
			_, _, err := in("INBOX").SetFlags(ctx, []mailstore.UID{1, 3}, mailstore.FlagsAdd, []mailstore.Flag{mailstore.Deleted}, 0)
			return err
		},
		func() error { _, err := in("INBOX").Expunge(ctx, []mailstore.UID{1}); return err },
		func() error { return w.box(1).CreateFolder(ctx, "a/b", "") },
		func() error { _, err := in("INBOX").Copy(ctx, []mailstore.UID{2, 3}, "a/b"); return err },
		func() error { _, err := in("INBOX").Move(ctx, []mailstore.UID{2}, "Archive"); return err },
		func() error { return w.box(1).RenameFolder(ctx, "INBOX", "old") },
		func() error { return w.box(1).RenameFolder(ctx, "a", "z") },
		func() error { return w.box(1).DeleteFolder(ctx, "z/b") },
		func() error { return w.box(1).Subscribe(ctx, "z", true) },
		func() error { return w.s.Renew(ctx) },
	}
}

// FAULTS I3: every disk operation of every operation is a crash point.
func TestACrashAtAnyDiskOperationLeavesAllOrNothingOfAStep(t *testing.T) {
	var pictures []string // after each step
	ops := 0
	run := func(t *testing.T, crashAt int, mode simfs.Mode) {
		w := &world{t: t, disk: journaltest.NewDisk(t)}
		w.disk.Mode, w.disk.Seed = mode, uint64(crashAt)
		w.disk.FS.Hook = func(o simfs.Op) simfs.Fault { return simfs.Fault{Crash: o.N == crashAt} }
		defer func() { w.disk.Close(t); w.s.Close() }()
		done := 0
		if j, err := w.disk.TryOpen(); err == nil {
			w.j, w.s = j, mailstore.New(j, mailstore.Options{})
			if w.j.Start(t.Context()) == nil {
				for _, step := range steps(w, t) {
					if step() != nil {
						break
					}
					done++
					if crashAt == 0 {
						pictures = append(pictures, w.picture(1))
					}
				}
			}
		}
		if crashAt == 0 {
			ops = w.disk.FS.Ops()
			return
		}
		w.disk.Crash(t)
		if w.s != nil {
			w.s.Close()
		}
		w.open()
		got := ""
		if w.s.Has(boxID(1)) {
			got = w.picture(1)
		}
		before := ""
		if done > 0 {
			before = pictures[done-1]
		}
		if got != before && (done == len(pictures) || got != pictures[done]) {
			t.Fatalf("crash at operation %d (%s), after %d steps:\n%s\nwant this or the next:\n%s", crashAt, mode, done, got, before)
		}
		// The steps that were not answered are tried again: a repeat is harmless.
		w.deliverAgain(t, done)
	}
	synctest.Test(t, func(t *testing.T) { run(t, 0, simfs.LoseAll) })
	if len(pictures) != 15 || ops < 30 {
		t.Fatalf("%d steps, %d operations", len(pictures), ops)
	}
	for _, mode := range []simfs.Mode{simfs.LoseAll, simfs.KeepAll, simfs.Random, simfs.Torn} {
		t.Run(fmt.Sprint(mode), func(t *testing.T) {
			for k := 1; k <= ops; k++ {
				synctest.Test(t, func(t *testing.T) { run(t, k, mode) })
			}
		})
	}
}

// deliverAgain repeats the first delivery, as its sender would without an
// answer, and wants one copy of it at most.
func (w *world) deliverAgain(t *testing.T, done int) {
	if !w.s.Has(boxID(1)) {
		return
	}
	id := transport.MessageID{15: 9}
	before, _ := w.folder(1, "INBOX").Status()
	was, err := w.s.Delivered(id, boxID(1))
	if err != nil {
		t.Fatal(err)
	}
	if !was && done >= 2 {
		t.Fatal("forgot a delivery that was answered")
	}
	if _, err := w.s.Deliver(t.Context(), w.delivery(id, text(id.String()), 1)); err != nil {
		t.Fatal(err)
	}
	after, _ := w.folder(1, "INBOX").Status()
	if grew := after.Messages - before.Messages; grew > 1 || was && grew != 0 {
		t.Fatalf("delivered before: %v, grew by %d", was, grew)
	}
}
