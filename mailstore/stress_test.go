package mailstore_test

import (
	"context"
	"errors"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"posthouse/mailstore"
	"posthouse/mailstore/journal"
	"posthouse/mailstore/kv"
	"posthouse/mailstore/log"
	"posthouse/mailstore/log/simfs"
	"posthouse/mesh"
	"posthouse/transport"
)

func TestManyAtOnceLoseNothingAndSessionsKeepUp(t *testing.T) {
	w := newWorld(t, mailstore.Options{Cached: 1})
	w.create(1)
	w.create(2)
	ctx := t.Context()
	const each = 60
	var makers, watchers sync.WaitGroup
	var mu sync.Mutex
	newID := func() transport.MessageID { mu.Lock(); defer mu.Unlock(); return w.newID() }
	for g := range 4 {
		makers.Go(func() {
			rnd := rand.New(rand.NewPCG(uint64(g), 1))
			for i := range each {
				id := newID()
				for range 1 + i%2 { // every second one comes twice, at once
					makers.Go(func() {
						if _, err := w.s.Deliver(ctx, w.delivery(id, text(id.String()), 1, 2)); err != nil {
							t.Error(err)
						}
					})
				}
				f := w.folder(1, "INBOX")
				uids := []mailstore.UID{mailstore.UID(1 + rnd.IntN(i+1)), mailstore.UID(1 + rnd.IntN(i+1))}
				var err error
				switch rnd.IntN(6) {
				case 0:
					_, _, err = f.SetFlags(ctx, uids, mailstore.FlagsAdd, []mailstore.Flag{mailstore.Deleted}, 0)
				case 1:
					_, err = f.Expunge(ctx, nil)
				case 2:
					_, err = f.Move(ctx, uids, "Archive")
				case 3:
					_, err = w.folder(1, "Archive").Copy(ctx, uids, "INBOX")
				case 4:
					_, _, err = f.Append(ctx, []mailstore.AppendMessage{{Draft: w.draft(text("x")), Structure: structure(text("x"))}})
				case 5:
					_, _, err = f.List()
				}
				if err != nil {
					t.Error(err)
				}
			}
		})
	}
	done := make(chan struct{})
	calls := atomic.Int64{}
	for range 3 {
		watchers.Go(func() {
			f := w.folder(1, "INBOX")
			wake := make(chan struct{}, 1)
			stop := f.Watch(func() {
				calls.Add(1)
				select {
				case wake <- struct{}{}:
				default:
				}
			})
			defer stop()
			have, mod := map[mailstore.UID]string{}, mailstore.ModSeq(0)
			for over := false; ; {
				c, err := f.ChangesSince(mod)
				if err != nil {
					t.Error(err)
					return
				}
				if c.Status.HighestModSeq < mod {
					t.Error("HIGHESTMODSEQ fell")
				}
				for _, u := range c.Expunged {
					if _, ok := have[u]; !ok {
						t.Errorf("expunge of %d, unknown here", u)
					}
					delete(have, u)
				}
				for _, i := range c.Changed {
					have[i.UID] = flagString(i.Flags)
				}
				mod = c.Status.HighestModSeq
				if over {
					break
				}
				select {
				case <-wake:
				case <-done:
					over = true
				}
			}
			_, infos, err := f.List()
			if err != nil {
				t.Error(err)
			}
			want := map[mailstore.UID]string{}
			for _, i := range infos {
				want[i.UID] = flagString(i.Flags)
			}
			if diff := cmp.Diff(want, have); diff != "" {
				t.Error(diff)
			}
		})
	}
	makers.Wait()
	close(done)
	watchers.Wait()
	if calls.Load() == 0 {
		t.Error("no watcher was called")
	}
	if st, _ := w.folder(2, "INBOX").Status(); st.Messages != 4*each || st.UIDNext != 4*each+1 {
		t.Errorf("%+v, want %d messages", st, 4*each)
	}
	w.sameAfterReplay(1, 2)
}

func TestAFullDiskTakesNothingAndHoldsNothing(t *testing.T) {
	fs := simfs.New()
	j, err := journal.Open(t.Context(), journal.Options{
		Log:  log.Options{Dir: "log", FS: fs, SegmentSize: 1 << 16},
		View: kv.Options{Memory: true},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer j.Close()
	quota := int64(0)
	w := &world{t: t, j: j, s: mailstore.New(j, mailstore.Options{Quota: func(mesh.MailboxID) int64 { return quota }})}
	if err := j.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	mb := w.create(1)
	w.deliver("before", 1)
	fs.SetFree(0)
	id := w.newID()
	failed := false
	for i := 0; i < 200 && !failed; i++ {
		if _, err := w.s.Deliver(t.Context(), w.delivery(w.newID(), text("fills"), 1)); err != nil {
			failed = true
			if !errors.Is(err, transport.ErrNoSpace) {
				t.Fatal(err)
			}
		}
	}
	if !failed {
		t.Fatal("the disk never was full")
	}
	if _, err := w.s.Deliver(t.Context(), w.delivery(id, text("full"), 1)); !errors.Is(err, transport.ErrNoSpace) {
		t.Fatal(err)
	}
	if err := mb.CreateFolder(t.Context(), "x", ""); !errors.Is(err, transport.ErrNoSpace) {
		t.Fatal(err)
	}
	if is, _ := w.s.Delivered(id, boxID(1)); is {
		t.Fatal("remembers what it did not take")
	}
	fs.SetFree(-1)
	_, used := mb.Usage()
	quota = used + 200 // nothing may still be reserved
	if rs, err := w.s.Deliver(t.Context(), w.delivery(id, text("after"), 1)); err != nil || outcomes(rs) != "delivered" {
		t.Fatal(rs, err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if err := mb.CreateFolder(ctx, "x", ""); err != nil {
		t.Fatal(err)
	}
}

func TestALargeFolderIsCheapToOpen(t *testing.T) {
	w, _ := largeFolder(t, 20000)
	w.crash(false)
	f := w.folder(1, "INBOX")
	st, infos, err := f.List()
	if err != nil || len(infos) != 20000 || st.Messages != 20000 {
		t.Fatal(len(infos), err)
	}
	uids := make([]mailstore.UID, len(infos))
	for i := range infos {
		uids[i] = infos[i].UID
	}
	before := st.HighestModSeq
	if _, _, err := f.SetFlags(t.Context(), uids, mailstore.FlagsAdd, []mailstore.Flag{mailstore.Deleted}, 0); err != nil {
		t.Fatal(err)
	}
	if gone, err := f.Expunge(t.Context(), uids[:15000]); err != nil || len(gone) != 15000 {
		t.Fatal(len(gone), err)
	}
	c, err := f.ChangesSince(before)
	if err != nil || len(c.Expunged) != 15000 || len(c.Changed) != 5000 {
		t.Fatal(len(c.Expunged), len(c.Changed), err)
	}
	if err := w.box(1).RenameFolder(t.Context(), "INBOX", "old"); err != nil {
		t.Fatal(err)
	}
	if err := w.box(1).DeleteFolder(t.Context(), "old"); err != nil {
		t.Fatal(err)
	}
	if n, size := w.box(1).Usage(); n != 0 || size != 0 {
		t.Fatal(n, size)
	}
}

// largeFolder fills an INBOX by copies of copies.
func largeFolder(t testing.TB, n int) (*world, *mailstore.Folder) {
	w := newWorld(t, mailstore.Options{})
	w.create(1)
	w.deliver("one", 1)
	f := w.folder(1, "INBOX")
	for have := 1; have < n; {
		uids := make([]mailstore.UID, min(have, n-have))
		for i := range uids {
			uids[i] = mailstore.UID(i + 1)
		}
		if _, err := f.Copy(t.Context(), uids, "INBOX"); err != nil {
			t.Fatal(err)
		}
		have += len(uids)
	}
	return w, f
}

func TestManyExpungesAreForgottenInOrder(t *testing.T) {
	w, f := largeFolder(t, 18000)
	var odd []mailstore.UID
	for u := mailstore.UID(1); u < 18000; u += 2 {
		odd = append(odd, u)
	}
	st, _ := f.Status()
	if _, _, err := f.SetFlags(t.Context(), odd, mailstore.FlagsAdd, []mailstore.Flag{mailstore.Deleted}, 0); err != nil {
		t.Fatal(err)
	}
	mid, _ := f.Status()
	if _, err := f.Expunge(t.Context(), odd); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		c, err := f.ChangesSince(st.HighestModSeq)
		if err != nil || !c.Forgotten || len(c.Expunged) != 0 {
			t.Fatal(c.Forgotten, len(c.Expunged), err)
		}
		if c, err = f.ChangesSince(mid.HighestModSeq + 2); err != nil || c.Forgotten || len(c.Expunged) == 0 {
			t.Fatal(c.Forgotten, len(c.Expunged), err)
		}
		if c, err = f.ChangesSince(0); err != nil || c.Forgotten || len(c.Changed) != 9000 {
			t.Fatal(c.Forgotten, len(c.Changed), err)
		}
		w.crash(true)
		f = w.folder(1, "INBOX")
	}
}
