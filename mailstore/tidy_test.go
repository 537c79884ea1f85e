package mailstore_test

import (
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"posthouse/mailstore"
	"posthouse/mailstore/journal"
	"posthouse/mailstore/journal/journaltest"
	"posthouse/mailstore/kv"
	"posthouse/mailstore/log"
	"posthouse/mailstore/log/simfs"
	"posthouse/transport"
)

func (w *world) tidy() journal.Tidied {
	w.t.Helper()
	got, err := w.j.Tidy(w.t.Context(), journal.TidyOptions{Force: true})
	if err != nil {
		w.t.Fatal(err)
	}
	return got
}

// files returns what the log takes.
func (w *world) files() (n int64) {
	w.t.Helper()
	infos, err := w.disk.FS.ReadDir("log")
	if err != nil {
		w.t.Fatal(err)
	}
	for _, fi := range infos {
		n += fi.Size
	}
	return n
}

func smallWorld(t testing.TB) *world {
	w := &world{t: t, disk: journaltest.NewDisk(t)}
	w.disk.Options.Log.SegmentSize, w.disk.Options.Log.SpoolThreshold = 8<<10, 4<<10
	w.open()
	return w
}

func big(subject string, n int) string {
	return text(subject) + strings.Repeat("0123456789abcde\n", n/16)
}

func TestWhatWasExpungedLeavesTheDiskAndNothingElseChanges(t *testing.T) {
	w := smallWorld(t)
	w.create(1)
	ctx := t.Context()
	var ids []transport.MessageID
	for i := range 60 {
		ids = append(ids, w.newID())
		if _, err := w.s.Deliver(ctx, w.delivery(ids[i], big(fmt.Sprint(i), 1<<10<<(i%5)), 1)); err != nil {
			t.Fatal(err)
		}
	}
	in := w.folder(1, "INBOX")
	if _, err := in.Copy(ctx, []mailstore.UID{3, 9}, "Archive"); err != nil {
		t.Fatal(err)
	}
	var gone []mailstore.UID
	for u := mailstore.UID(1); u <= 60; u++ {
		if u%10 != 0 {
			gone = append(gone, u)
		}
	}
	if _, _, err := in.SetFlags(ctx, gone, mailstore.FlagsAdd, []mailstore.Flag{mailstore.Deleted, "Later"}, 0); err != nil {
		t.Fatal(err)
	}
	if _, err := in.Expunge(ctx, nil); err != nil {
		t.Fatal(err)
	}
	picture, before := w.picture(1), w.files()
	if got := w.tidy(); got.Checkpoints != 2 || got.Segments < 5 {
		t.Fatalf("%+v", got)
	}
	if got := w.picture(1); got != picture {
		t.Fatalf("tidying changed\n%s\ninto\n%s", picture, got)
	}
	if now := w.files(); now > before/2 {
		t.Errorf("%d bytes of %d are left", now, before)
	}
	w.tidy()
	if got := w.tidy(); got.Checkpoints != 0 || got.Segments > 0 {
		t.Errorf("it does not come to rest: %+v", got)
	}
	w.sameAfterReplay(1)
	for _, id := range ids { // all are known still
		if rs, err := w.s.Deliver(ctx, w.delivery(id, text("again"), 1)); err != nil || outcomes(rs) != "delivered" {
			t.Fatal(rs, err)
		}
	}
	if got := w.picture(1); got != picture {
		t.Fatalf("a repeat was stored again:\n%s", got)
	}
	if cs := w.j.Conditions(); len(cs) > 0 {
		t.Errorf("%+v", cs)
	}
}

// FAULTS I3, with housekeeping: every disk operation of it, and of what is
// written after it, is a crash point; the view is there or not.
func TestACrashAtAnyDiskOperationOfTidyingLosesNothing(t *testing.T) {
	var pictures []string
	first, ops := 0, 0
	run := func(t *testing.T, crashAt int, mode simfs.Mode, rebuild bool) {
		w := &world{t: t, disk: journaltest.NewDisk(t)}
		w.disk.Options.Log.SegmentSize, w.disk.Options.Log.SpoolThreshold = 2<<10, 1<<10
		w.disk.Mode, w.disk.Seed = mode, uint64(crashAt)
		w.disk.FS.Hook = func(o simfs.Op) simfs.Fault { return simfs.Fault{Crash: crashAt > 0 && o.N == first+crashAt} }
		defer func() { w.disk.Close(t); w.s.Close() }()
		w.open()
		ctx := t.Context()
		w.create(1)
		for i := range 8 {
			w.deliver(big(fmt.Sprint(i), 200<<(i%4)), 1)
		}
		in := w.folder(1, "INBOX")
		if _, err := in.Copy(ctx, []mailstore.UID{2}, "Archive"); err != nil {
			t.Fatal(err)
		}
		expunge := func(uids ...mailstore.UID) error {
			if _, _, err := in.SetFlags(ctx, uids, mailstore.FlagsAdd, []mailstore.Flag{mailstore.Deleted}, 0); err != nil {
				return err
			}
			_, err := in.Expunge(ctx, uids)
			return err
		}
		if err := expunge(1, 2, 3, 4, 6); err != nil {
			t.Fatal(err)
		}
		if crashAt == 0 {
			first = w.disk.FS.Ops()
		}
		done := 0
		note := func() {
			done++
			if crashAt == 0 {
				pictures = append(pictures, w.picture(1))
			}
		}
		tidy := func() error { _, err := w.j.Tidy(ctx, journal.TidyOptions{Force: true}); return err }
		note()
		for _, step := range []func() error{
			tidy,
			func() error { return expunge(7) },
			func() error {
				text := big("new", 3000)
				draft := w.j.NewDraft()
				io.WriteString(draft, text)
				if err := draft.Seal(ctx); err != nil {
					return err
				}
				_, err := w.s.Deliver(ctx, &mailstore.Delivery{Envelope: transport.Envelope{ID: transport.MessageID{5}, From: "ada@example.net"},
					Rcpts: []transport.Recipient{{Mailbox: boxID(1)}}, Draft: draft, Structure: structure(text)})
				return err
			},
			tidy,
			func() error { _, err := in.Move(ctx, []mailstore.UID{5}, "Archive"); return err },
			tidy,
		} {
			if step() != nil {
				break
			}
			note()
		}
		if crashAt == 0 {
			ops = w.disk.FS.Ops() - first
			return
		}
		w.disk.Crash(t)
		w.s.Close()
		if rebuild {
			w.disk.DropView(t)
		}
		w.open()
		got := w.picture(1)
		// A step of two records may have come half way: the expunge's flags.
		half := false
		if done == 2 {
			half = strings.Contains(got, `\Deleted`)
		}
		if got != pictures[done-1] && (done == len(pictures) || got != pictures[done]) && !half {
			t.Fatalf("crash at operation %d (%s), rebuilt %v, after %d steps:\n%s\nwant this or the next:\n%s", crashAt, mode, rebuild, done, got, pictures[done-1])
		}
		for _, c := range w.j.Conditions() {
			if !(rebuild && c.Name == journal.CondViewOld) {
				t.Fatalf("crash at operation %d (%s): %+v", crashAt, mode, c)
			}
		}
		w.tidy()
		if now := w.picture(1); now != got {
			t.Fatalf("crash at operation %d (%s), then tidied:\n%s\nwant\n%s", crashAt, mode, now, got)
		}
		if crashAt%7 == 0 {
			w.sameAfterReplay(1)
		}
		w.disk.Close(t)
		sum, err := log.Verify(ctx, w.disk.FS, "log", func(d log.Damage) { t.Error(d) })
		if err != nil || sum.Orphans > 0 {
			t.Fatalf("crash at operation %d (%s): %+v %v", crashAt, mode, sum, err)
		}
	}
	synctest.Test(t, func(t *testing.T) { run(t, 0, simfs.LoseAll, false) })
	if ops < 60 {
		t.Fatalf("%d operations", ops)
	}
	for _, mode := range []simfs.Mode{simfs.LoseAll, simfs.KeepAll, simfs.Random, simfs.Torn} {
		for _, rebuild := range []bool{false, true} {
			t.Run(fmt.Sprint(mode, " rebuild ", rebuild), func(t *testing.T) {
				for k := 1; k <= ops; k++ {
					synctest.Test(t, func(t *testing.T) { run(t, k, mode, rebuild) })
				}
			})
		}
	}
}

func TestBodiesReadTheSameWhileTheLogIsTidied(t *testing.T) {
	w := smallWorld(t)
	w.create(1)
	ctx := t.Context()
	for i := range 40 {
		w.deliver(big(fmt.Sprint(i), 512<<(i%5)), 1)
	}
	in := w.folder(1, "INBOX")
	var readers sync.WaitGroup
	stop := make(chan struct{})
	for range 3 {
		readers.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				_, infos, err := in.List()
				if err != nil {
					t.Error(err)
					return
				}
				for _, i := range infos {
					m, err := in.Message(i.UID)
					if errors.Is(err, mailstore.ErrExpunged) || errors.Is(err, log.ErrGone) {
						continue
					}
					if err != nil {
						t.Error(err)
						return
					}
					r, err := m.Body.Open()
					if errors.Is(err, log.ErrGone) { // expunged since
						continue
					}
					if err != nil {
						t.Error(err)
						return
					}
					b, err := io.ReadAll(r)
					r.Close()
					if err != nil || int64(len(b)) != i.Size || !strings.Contains(string(b), "Subject: "+m.Structure.Envelope.Subject) {
						t.Errorf("message %d: %d bytes of %d, %v", i.UID, len(b), i.Size, err)
						return
					}
				}
			}
		})
	}
	for n := range 12 {
		for i := range 6 {
			w.deliver(big(fmt.Sprint("new ", n, i), 512<<(i%5)), 1)
		}
		_, infos, _ := in.List()
		var uids []mailstore.UID
		for _, i := range infos[:6] {
			uids = append(uids, i.UID)
		}
		if _, _, err := in.SetFlags(ctx, uids, mailstore.FlagsAdd, []mailstore.Flag{mailstore.Deleted}, 0); err != nil {
			t.Fatal(err)
		}
		if _, err := in.Expunge(ctx, uids); err != nil {
			t.Fatal(err)
		}
		w.tidy()
	}
	close(stop)
	readers.Wait()
	w.sameAfterReplay(1)
}

// A mailbox through which mail passes for weeks of virtual time: everything is
// expunged a little after it came.
func TestTheDiskStaysBoundedWhileMailComesAndGoes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := &world{t: t, disk: journaltest.NewDisk(t)}
		w.disk.Options.Log.SegmentSize, w.disk.Options.Log.SpoolThreshold = 64<<10, 16<<10
		w.open()
		defer func() { w.disk.Close(t); w.s.Close() }()
		w.create(1)
		ctx := t.Context()
		most, came := int64(0), int64(0)
		for n := range 400 {
			in := w.folder(1, "INBOX")
			for i := range 10 {
				body := big(fmt.Sprint(n, i), 1<<10<<(i%6))
				came += int64(len(body))
				if _, err := w.s.Deliver(ctx, w.delivery(w.newID(), body, 1)); err != nil {
					t.Fatal(err)
				}
			}
			if _, infos, _ := in.List(); len(infos) > 20 {
				var uids []mailstore.UID
				for _, i := range infos[:len(infos)-20] {
					uids = append(uids, i.UID)
				}
				in.SetFlags(ctx, uids, mailstore.FlagsAdd, []mailstore.Flag{mailstore.Deleted}, 0)
				if _, err := in.Expunge(ctx, uids); err != nil {
					t.Fatal(err)
				}
			}
			if _, err := w.j.Tidy(ctx, journal.TidyOptions{Growth: 256 << 10}); err != nil {
				t.Fatal(err)
			}
			if n%50 == 49 {
				w.crash(n%100 == 99)
			}
			if n > 100 {
				most = max(most, w.files())
			}
			time.Sleep(time.Hour)
		}
		t.Logf("%d KiB came, at most %d KiB on disk after the start", came>>10, most>>10)
		if most > 4<<20 || came < 10*most {
			t.Errorf("%d KiB came, %d KiB on disk", came>>10, most>>10)
		}
		w.sameAfterReplay(1)
	})
}

// desk is a queue as far as the log knows one: it accepts, and names what waits.
type desk struct {
	waits   map[uint64]bool
	refs    map[uint64]log.Ref
	applied []string
}

func (d *desk) Apply(r log.Record, b *kv.Batch, live bool) error {
	d.refs[r.Seq] = r.Ref
	d.applied = append(d.applied, fmt.Sprintf("%d %v", r.Seq, live))
	return nil
}
func (d *desk) Lasting(log.Kind) bool { return false }
func (d *desk) Live(mark func(uint64, int64)) error {
	for seq := range d.waits {
		mark(seq, 0)
	}
	return nil
}

func TestABodyThatADeliveryNamesStaysAndIsNeverAcceptedAgain(t *testing.T) {
	disk := journaltest.NewDisk(t)
	disk.Options.Log.SegmentSize, disk.Options.Log.SpoolThreshold = 4<<10, 2<<10
	d := &desk{waits: map[uint64]bool{}, refs: map[uint64]log.Ref{}}
	w := &world{t: t, disk: disk}
	open := func() {
		w.j = disk.Open(t)
		w.s = mailstore.New(w.j, mailstore.Options{})
		w.j.Register(d, log.KindAccept) // after the store
		if err := w.j.Start(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	open()
	w.create(1)
	ctx := t.Context()
	var refs []log.Ref
	var metas []string
	for i := range 12 {
		body := big(fmt.Sprint(i), 300<<(i%5))
		tk := w.j.Append(log.Entry{Kind: log.KindAccept, Meta: []byte("an envelope"), Body: w.draft(body)})
		if err := tk.Applied(ctx); err != nil {
			t.Fatal(err)
		}
		rec := d.refs[tk.First()]
		refs, metas = append(refs, rec), append(metas, body)
		if i == 11 {
			d.waits[tk.First()] = true
			continue
		}
		if _, err := w.s.Deliver(ctx, &mailstore.Delivery{Envelope: transport.Envelope{ID: w.newID(), From: "ada@example.net"},
			Rcpts: []transport.Recipient{{Mailbox: boxID(1)}}, Source: rec, Structure: structure(body), LegSeq: tk.First()}); err != nil {
			t.Fatal(err)
		}
	}
	in := w.folder(1, "INBOX")
	in.SetFlags(ctx, []mailstore.UID{1, 2, 3, 4, 5, 6, 8, 9, 10}, mailstore.FlagsAdd, []mailstore.Flag{mailstore.Deleted}, 0)
	if _, err := in.Expunge(ctx, nil); err != nil {
		t.Fatal(err)
	}
	picture := w.picture(1)
	w.tidy()
	for range 2 {
		if got := w.picture(1); got != picture {
			t.Fatalf("got\n%s\nwant\n%s", got, picture)
		}
		gone, content := 0, 0
		for i, r := range refs {
			rec, err := w.j.Record(r)
			expunged := i != 6 && i < 10
			switch {
			case errors.Is(err, log.ErrGone) && expunged:
				gone++
				continue
			case err != nil:
				t.Fatalf("acceptance %d: %v", i, err)
			case rec.Kind == log.KindContent && len(rec.Meta) == 0 && i < 11:
				content++
			case rec.Kind != log.KindAccept || string(rec.Meta) != "an envelope":
				t.Errorf("acceptance %d has become %+v", i, rec)
			}
			b, err := w.j.Body(r).Open()
			if err != nil {
				t.Fatal(err)
			}
			text, err := io.ReadAll(b)
			b.Close()
			if err != nil || string(text) != metas[i] {
				t.Errorf("body %d: %d bytes, %v", i, len(text), err)
			}
		}
		if gone < 7 || content == 0 {
			t.Errorf("%d are gone, of %d the content is left", gone, content)
		}
		d.applied = nil
		disk.Crash(t)
		w.s.Close()
		disk.DropView(t)
		open()
		if len(d.applied) > 0 {
			t.Errorf("accepted again: %v", d.applied)
		}
	}
}
