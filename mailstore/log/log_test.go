package log_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"posthouse/mailstore/log"
	"posthouse/mailstore/log/simfs"
	"posthouse/transport"
)

var ctx = context.Background()

// small makes segments and spool files easy to reach.
func small(fs log.FS) log.Options {
	return log.Options{Dir: "/log", FS: fs, SegmentSize: 8 << 10, SpoolThreshold: 4 << 10}
}

func open(t testing.TB, opt log.Options) *log.Log {
	t.Helper()
	l, err := log.Open(t.Context(), opt)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// content is n bytes that are different for every seed.
func content(seed, n int) []byte {
	b := make([]byte, n, n+8)
	x := uint64(seed)*0x9E3779B97F4A7C15 + 1
	for i := 0; i < n; i += 8 {
		x = x*6364136223846793005 + 1442695040888963407
		binary.LittleEndian.PutUint64(b[i:i+8:cap(b)], x^x>>29)
	}
	return b
}

// entry is a record with meta and, with n > 0, a body of n bytes.
func entry(l *log.Log, seed, n int) (log.Entry, error) {
	e := log.Entry{Kind: log.KindAccept, Meta: fmt.Appendf(nil, "meta %d", seed)}
	if n == 0 {
		return e, nil
	}
	d := l.NewDraft()
	if _, err := d.Write(content(seed, n)); err != nil {
		d.Discard()
		return e, err
	}
	if err := d.Seal(context.Background()); err != nil {
		d.Discard()
		return e, err
	}
	e.Body = d
	return e, nil
}

func mustAppend(t testing.TB, l *log.Log, seed int, sizes ...int) uint64 {
	t.Helper()
	var es []log.Entry
	for i, n := range sizes {
		e, err := entry(l, seed+i, n)
		if err != nil {
			t.Fatal(err)
		}
		es = append(es, e)
	}
	tk := l.Append(es...)
	<-tk.Done()
	if tk.Err() != nil {
		t.Fatal(tk.Err())
	}
	return tk.First()
}

func replay(t testing.TB, l *log.Log, from uint64) []log.Record {
	t.Helper()
	var out []log.Record
	if err := l.Replay(t.Context(), from, func(r log.Record) error { out = append(out, r); return nil }); err != nil {
		t.Fatal(err)
	}
	return out
}

func readBody(b transport.Body) ([]byte, error) {
	r, err := b.Open()
	if err != nil {
		return nil, err
	}
	defer r.Close()
	return io.ReadAll(r)
}

// holds checks that a record is the one that entry(seed, n) made.
func holds(l *log.Log, r log.Record, seed, n int) error {
	if want := fmt.Sprintf("meta %d", seed); string(r.Meta) != want {
		return fmt.Errorf("record %d: meta %q, want %q", r.Seq, r.Meta, want)
	}
	got, err := l.Record(r.Ref)
	if err != nil {
		return err
	}
	if got.Seq != r.Seq || !bytes.Equal(got.Meta, r.Meta) || got.BodySize != int64(n) || got.Kind != r.Kind {
		return fmt.Errorf("record %d read back as %+v", r.Seq, got)
	}
	if n == 0 {
		return nil
	}
	b := l.Body(r.Ref)
	if b.Size() != int64(n) {
		return fmt.Errorf("record %d: body size %d, want %d", r.Seq, b.Size(), n)
	}
	p, err := readBody(b)
	if err != nil {
		return err
	}
	if !bytes.Equal(p, content(seed, n)) {
		return fmt.Errorf("record %d: body differs", r.Seq)
	}
	return nil
}

func seqs(rs []log.Record) (out []uint64) {
	for _, r := range rs {
		out = append(out, r.Seq)
	}
	return out
}

func TestRecordsComeBackAfterAnOrderlyClose(t *testing.T) {
	for name, dir := range map[string]string{"simulated disk": "", "real disk": t.TempDir()} {
		t.Run(name, func(t *testing.T) {
			var got []log.Record
			opt := small(simfs.New())
			if dir != "" {
				opt.Dir, opt.FS = dir, log.Disk{}
			}
			opt.Synced = func(rs []log.Record) { got = append(got, rs...) }
			l := open(t, opt)
			sizes := []int{0, 1, 100, 4096, 4097, 70_000, 200_000, 3}
			for i, n := range sizes {
				mustAppend(t, l, i, n)
			}
			mustAppend(t, l, 8, 10, 0, 5000)
			sizes = append(sizes, 10, 0, 5000)
			live := func(l *log.Log, got []log.Record) {
				t.Helper()
				if len(got) != len(sizes) {
					t.Fatalf("%d records, want %d", len(got), len(sizes))
				}
				for i, r := range got {
					if r.Seq != uint64(i+1) {
						t.Fatalf("sequences %v", seqs(got))
					}
					if err := holds(l, r, i, sizes[i]); err != nil {
						t.Error(err)
					}
				}
			}
			if err := l.Close(); err != nil {
				t.Fatal(err)
			}
			l = open(t, opt)
			live(l, got)
			live(l, replay(t, l, 1))
			if rep := l.Report(); !rep.Sealed || rep.End != 11 || len(rep.Damage)+len(rep.Cut)+rep.Recovered+rep.Orphans+rep.Leftovers != 0 || rep.LostEnd || rep.Bodies != 4 {
				t.Errorf("report %+v", rep)
			}
			if rs := replay(t, l, 7); !slices.Equal(seqs(rs), []uint64{7, 8, 9, 10, 11}) {
				t.Errorf("replay from 7: %v", seqs(rs))
			}
			if first := mustAppend(t, l, 11, 20); first != 12 || l.End() != 12 {
				t.Errorf("next record has sequence %d, end %d", first, l.End())
			}
			if err := l.Close(); err != nil {
				t.Fatal(err)
			}
		})
	}
}

func TestASecondLogOnOneFolderIsRefused(t *testing.T) {
	for name, opt := range map[string]log.Options{"simulated disk": small(simfs.New()), "real disk": {Dir: t.TempDir()}} {
		l := open(t, opt)
		if l2, err := log.Open(t.Context(), opt); err == nil {
			l2.Close()
			t.Errorf("%s: opened twice", name)
		}
		l.Close()
		open(t, opt).Close()
	}
}

func TestOneSyncServesAllThatWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fs := simfs.New()
		fs.SyncTime = time.Millisecond
		var applied int
		l := open(t, log.Options{Dir: "/log", FS: fs, Synced: func(rs []log.Record) { applied += len(rs) }})
		mustAppend(t, l, 0, 0)
		start := time.Now()
		var ts []*log.Ticket
		for i := range 100 {
			e, err := entry(l, i, 100)
			if err != nil {
				t.Fatal(err)
			}
			ts = append(ts, l.Append(e))
		}
		for _, tk := range ts {
			<-tk.Done()
		}
		if d := time.Since(start); d > 3*time.Millisecond { // two syncs, and a wait for more between them
			t.Errorf("100 appends took %v of syncs of 1 ms", d)
		}
		l.Close()
		if s := l.Stats(); applied != 101 || s.Records != 101 || s.Syncs > 3 || s.Waiting != 0 {
			t.Errorf("applied %d, stats %+v", applied, s)
		}
	})
}

func TestWhatNobodyWaitsForSharesTheNextSync(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fs := simfs.New()
		fs.SyncTime = 300 * time.Microsecond
		var seqs []uint64
		l := open(t, log.Options{Dir: "/log", FS: fs, Patience: 2 * time.Millisecond, Synced: func(rs []log.Record) {
			for _, r := range rs {
				seqs = append(seqs, r.Seq)
			}
		}})
		mustAppend(t, l, 0, 0)
		record := func() log.Entry {
			e, err := entry(l, 1, 100)
			if err != nil {
				t.Fatal(err)
			}
			return e
		}
		syncs := func() uint64 { return l.Stats().Syncs }

		at, before := time.Now(), syncs()
		behind := l.AppendBehind(record())
		time.Sleep(time.Millisecond)
		<-l.Append(record()).Done()
		if took := time.Since(at); took != time.Millisecond+fs.SyncTime || syncs() != before+1 {
			t.Errorf("answered after %v and %d syncs: who waits does not wait for the patience, and both share a sync", took, syncs()-before)
		}
		select {
		case <-behind.Done():
		default:
			t.Error("a later record is answered before an earlier one")
		}

		at = time.Now()
		<-l.AppendBehind(record()).Done()
		if took := time.Since(at); took != 2*time.Millisecond+fs.SyncTime {
			t.Errorf("alone it was written after %v", took)
		}

		at = time.Now()
		var last *log.Ticket
		for range 16 {
			last = l.AppendBehind(record())
		}
		<-last.Done()
		if took := time.Since(at); took > 2*fs.SyncTime {
			t.Errorf("a crowd of them was held back for %v", took)
		}

		at = time.Now()
		last = l.AppendBehind(record())
		if err := l.Close(); err != nil || time.Since(at) > 4*fs.SyncTime {
			t.Errorf("Close took %v: %v", time.Since(at), err)
		}
		if <-last.Done(); last.Err() != nil || !slices.IsSorted(seqs) || len(seqs) != 21 {
			t.Errorf("%v; applied %v", last.Err(), seqs)
		}
	})
}

// Each of n writers appends and waits, with a little work between: as sessions do.
func writers(t *testing.T, n, each int) (s log.Stats, took time.Duration) {
	synctest.Test(t, func(t *testing.T) {
		fs := simfs.New()
		fs.SyncTime = 300 * time.Microsecond
		l := open(t, log.Options{Dir: "/log", FS: fs})
		mustAppend(t, l, 0, 0)
		before, start := l.Stats(), time.Now()
		var wg sync.WaitGroup
		for w := range n {
			wg.Go(func() {
				for i := range each {
					time.Sleep(time.Duration(1+(w*7+i*3)%20) * 100 * time.Microsecond)
					e, err := entry(l, w*each+i, 100)
					if err != nil {
						t.Error(err)
						return
					}
					tk := l.Append(e)
					<-tk.Done()
				}
			})
		}
		wg.Wait()
		took = time.Since(start)
		l.Close()
		s = l.Stats()
		s.Records -= before.Records
		s.Syncs -= before.Syncs
	})
	return s, took
}

func TestACrowdSharesItsSyncs(t *testing.T) {
	s, took := writers(t, 128, 50)
	if per := float64(s.Records) / float64(s.Syncs); per < 32 {
		t.Errorf("%.1f records a sync", per)
	}
	if took > 50*6*time.Millisecond { // work 1 ms, waiting 3 ms, two syncs
		t.Errorf("took %v", took)
	}
}

func TestAFewWritersWaitForNobody(t *testing.T) {
	_, took := writers(t, 8, 50)
	if took > 50*1700*time.Microsecond { // work 1 ms, two syncs
		t.Errorf("took %v", took)
	}
}

func TestAdmitHoldsBackWhileTheWriterOrSyncedIsBehind(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fs := simfs.New()
		fs.SyncTime = time.Second
		release := make(chan struct{})
		l := open(t, log.Options{Dir: "/log", FS: fs, Synced: func(rs []log.Record) { <-release }})
		for range 20 {
			l.Append(log.Entry{Kind: log.KindLeg, Meta: make([]byte, 1<<20)})
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		if err := l.Admit(ctx, 100); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("admitted with 20 MiB not applied: %v", err)
		}
		cancel()
		// Append never waits, and tickets are answered all the same.
		mustAppend(t, l, 1, 100)
		close(release)
		if err := l.Admit(t.Context(), 100); err != nil {
			t.Error(err)
		}
		l.Close()
		if err := l.Admit(t.Context(), 1); !errors.Is(err, log.ErrClosed) {
			t.Errorf("admitted after Close: %v", err)
		}
		tk := l.Append(log.Entry{Kind: log.KindLeg})
		<-tk.Done()
		if !errors.Is(tk.Err(), log.ErrClosed) {
			t.Errorf("appended after Close: %v", tk.Err())
		}
	})
}

// A large message that was looked at and then refused, or was a duplicate, takes
// no room: a file that is removed and still open does.
func TestALargeDraftThatWasReadAndIsDiscardedLeavesNoFileOpen(t *testing.T) {
	fs := simfs.New()
	l := open(t, log.Options{Dir: "/log", FS: fs})
	defer l.Close()
	before := fs.Handles()
	for range 3 {
		d := l.NewDraft()
		if _, err := d.Write(content(1, 300<<10)); err != nil {
			t.Fatal(err)
		}
		if err := d.Seal(t.Context()); err != nil {
			t.Fatal(err)
		}
		r, err := d.Open()
		if err != nil {
			t.Fatal(err)
		}
		r.Close()
		d.Discard()
	}
	if n := fs.Handles(); n != before {
		t.Errorf("%d files are open, %d were", n, before)
	}
}

func TestDraftsAreBodiesUntilAppendedOrDiscarded(t *testing.T) {
	fs := simfs.New()
	l := open(t, small(fs))
	defer l.Close()
	for _, n := range []int{0, 10, 4096, 4097, 64 << 10, 64<<10 + 1, 200_000} {
		d := l.NewDraft()
		for p := content(n, n); len(p) > 0; {
			k := min(len(p), 1000)
			if _, err := d.Write(p[:k]); err != nil {
				t.Fatal(err)
			}
			p = p[k:]
		}
		if _, err := d.Open(); err == nil {
			t.Error("opened before Seal")
		}
		if err := d.Seal(t.Context()); err != nil {
			t.Fatal(err)
		}
		if _, err := d.Write([]byte("x")); err == nil {
			t.Error("written after Seal")
		}
		got, err := readBody(d)
		if err != nil || !bytes.Equal(got, content(n, n)) || d.Size() != int64(n) {
			t.Errorf("%d bytes: read %d, %v", n, len(got), err)
		}
		r, err := d.Open()
		if err != nil {
			t.Fatal(err)
		}
		for _, at := range []int{0, 1, n / 2, n - 1, n, n + 1} {
			p := make([]byte, 100)
			k, err := r.ReadAt(p, int64(max(at, 0)))
			want := content(n, n)[min(max(at, 0), n):]
			if !bytes.Equal(p[:k], want[:min(100, len(want))]) || k < 100 != (err == io.EOF) {
				t.Errorf("%d bytes: ReadAt %d: %d, %v", n, at, k, err)
			}
		}
		r.Close()
		d.Discard()
		tk := l.Append(log.Entry{Kind: log.KindAccept, Body: d})
		if <-tk.Done(); tk.Err() == nil {
			t.Error("appended after Discard")
		}
	}
	if es, _ := fs.ReadDir("/log"); len(es) != 0 {
		t.Errorf("left over: %v", es)
	}
}

func TestAnEntryThatCannotBeWrittenFailsAlone(t *testing.T) {
	l := open(t, small(simfs.New()))
	defer l.Close()
	d := l.NewDraft()
	for name, es := range map[string][]log.Entry{
		"nothing":         {},
		"unsealed draft":  {{Kind: 1, Body: d}},
		"meta over limit": {{Kind: 1, Meta: make([]byte, log.MaxMeta+1)}},
	} {
		tk := l.Append(es...)
		if <-tk.Done(); tk.Err() == nil {
			t.Errorf("%s: appended", name)
		}
	}
	if err := d.Seal(t.Context()); err != nil {
		t.Fatal(err)
	}
	tk := l.Append(log.Entry{Kind: 1, Body: d}, log.Entry{Kind: 1, Body: d})
	if <-tk.Done(); tk.Err() == nil {
		t.Error("one draft in two entries: appended")
	}
	if first := mustAppend(t, l, 1, 1); first != 1 {
		t.Errorf("first record is %d: refused entries took numbers", first)
	}
}

func TestReadingAfterCloseFails(t *testing.T) {
	fs := simfs.New()
	var recs []log.Record
	opt := small(fs)
	opt.Synced = func(rs []log.Record) { recs = append(recs, rs...) }
	l := open(t, opt)
	mustAppend(t, l, 1, 10, 70_000)
	d := l.NewDraft()
	d.Write(content(1, 5000))
	l.Close()
	if _, err := l.Record(recs[0].Ref); !errors.Is(err, log.ErrClosed) {
		t.Errorf("record: %v", err)
	}
	if _, err := l.Body(recs[1].Ref).Open(); !errors.Is(err, log.ErrClosed) {
		t.Errorf("body: %v", err)
	}
	if err := d.Seal(ctx); !errors.Is(err, log.ErrClosed) {
		t.Errorf("draft: %v", err)
	}
	d.Discard()
	if l.Err() != nil {
		t.Error(l.Err())
	}
}

func TestFewFilesAreKeptOpen(t *testing.T) {
	fs := simfs.New()
	var recs []log.Record
	opt := small(fs)
	opt.OpenFiles = 3
	opt.Synced = func(rs []log.Record) { recs = append(recs, rs...) }
	l := open(t, opt)
	for i := range 40 {
		mustAppend(t, l, i, 3000+2000*(i%2))
	}
	l.Close()
	l = open(t, opt)
	defer l.Close()
	for round := range 3 {
		for i, r := range recs {
			if err := holds(l, r, i, 3000+2000*(i%2)); err != nil {
				t.Error(round, err)
			}
			if n := l.Stats().OpenFiles; n > 3 {
				t.Fatalf("%d files open", n)
			}
		}
	}
}

// Whoever starts one thing after the other does not know yet that the disk refused
// the first: the second, though smaller, must not get through.
func TestWhatMustNotOvertakeARefusedRecordIsRefusedWithIt(t *testing.T) {
	fs := simfs.New()
	var full atomic.Bool
	fs.Hook = func(op simfs.Op) simfs.Fault {
		if full.Load() && op.Name == "write" && op.Len > 2500 {
			return simfs.Fault{Err: syscall.ENOSPC}
		}
		return simfs.Fault{}
	}
	l := open(t, small(fs))
	mustAppend(t, l, 1, 100)
	full.Store(true)
	write := func(n int, after ...*log.Ticket) *log.Ticket {
		e, err := entry(l, 2, n)
		if err != nil {
			t.Fatal(err)
		}
		e.After = after
		return l.Append(e)
	}
	large := write(3000)
	second := write(10, large)
	third := write(10, second)
	alone := write(10)
	for what, x := range map[string]*log.Ticket{"the large one": large, "the one behind it": second, "the one behind that": third} {
		if <-x.Done(); !errors.Is(x.Err(), transport.ErrNoSpace) {
			t.Errorf("%s: %v", what, x.Err())
		}
	}
	if <-alone.Done(); alone.Err() != nil && !errors.Is(alone.Err(), transport.ErrNoSpace) {
		t.Error(alone.Err()) // refused if it was in the large one's group
	}
	if x := write(10, third); true { // long after
		if <-x.Done(); !errors.Is(x.Err(), transport.ErrNoSpace) {
			t.Errorf("behind what was refused long ago: %v", x.Err())
		}
	}
	full.Store(false)
	first := write(10)
	<-first.Done()
	a, b := write(10, first), write(10, third)
	c := write(10, a)
	for what, x := range map[string]*log.Ticket{"behind what is there": a, "behind that": c} {
		if <-x.Done(); x.Err() != nil {
			t.Errorf("%s: %v", what, x.Err())
		}
	}
	if <-b.Done(); b.Err() == nil {
		t.Error("between them: not refused")
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	l = open(t, small(fs))
	replay(t, l, 1)
	if r := l.Report(); len(r.Damage) > 0 {
		t.Error(r.Damage)
	}
	l.Close()
}
