package log_test

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"syscall"
	"testing"

	"posthouse/mailstore/log"
	"posthouse/mailstore/log/simfs"
	"posthouse/transport"
)

// thirds drops every third record and gives the others a new meta.
func thirds(r log.Record) (bool, log.Kind, []byte) {
	return r.Seq%3 != 0, log.KindAppend, append([]byte("now "), bytes.TrimPrefix(r.Meta, []byte("now "))...)
}

// compacted checks that every record is as it was or as thirds made it.
func compacted(t *testing.T, l *log.Log, sizes []int, refs []log.Ref) (rewritten int) {
	t.Helper()
	got := map[uint64]log.Record{}
	last := uint64(0)
	for _, r := range replay(t, l, 1) {
		if r.Seq <= last {
			t.Errorf("record %d after %d", r.Seq, last)
		}
		last, got[r.Seq] = r.Seq, r
	}
	for i, n := range sizes {
		seq := uint64(i + 1)
		r, ok := got[seq]
		if !ok {
			if seq%3 != 0 {
				t.Errorf("record %d is gone", seq)
			}
			if _, err := l.Record(refs[i]); !errors.Is(err, log.ErrGone) {
				t.Errorf("record %d: %v, want ErrGone", seq, err)
			}
			if _, err := l.Body(refs[i]).Open(); !errors.Is(err, log.ErrGone) {
				t.Errorf("body %d: %v, want ErrGone", seq, err)
			}
			rewritten++
			continue
		}
		meta, kind := fmt.Sprintf("meta %d", i), log.KindAccept
		if r.Compacted {
			meta, kind = "now "+meta, log.KindAppend
			rewritten++
		}
		if string(r.Meta) != meta || r.Kind != kind || r.BodySize != int64(n) {
			t.Errorf("record %d: %+v", seq, r)
		}
		for _, ref := range []log.Ref{r.Ref, refs[i]} { // as replayed, and as it was when written
			now, err := l.Record(ref)
			if err != nil || string(now.Meta) != meta {
				t.Errorf("record %d by %v: %v", seq, ref, err)
			}
			b, err := readBody(l.Body(ref))
			if err != nil || !bytes.Equal(b, content(i, n)) || l.Body(ref).Size() != int64(n) {
				t.Errorf("body %d by %v: %v", seq, ref, err)
			}
		}
	}
	return rewritten
}

func compactable(t *testing.T) (fs *simfs.FS, sizes []int, refs []log.Ref) {
	fs = simfs.New()
	opt := small(fs)
	opt.Synced = func(rs []log.Record) {
		for _, r := range rs {
			refs = append(refs, r.Ref)
		}
	}
	l := open(t, opt)
	for _, g := range [][]int{{10}, {100, 5000, 6000}, {3000}, {3000}, {3000, 7000}, {70_000}, {0}, {100, 9000, 0}, {3000}, {2000}, {10, 20}, {3000}, {3000, 1}} {
		mustAppend(t, l, len(sizes), g...)
		sizes = append(sizes, g...)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	return fs, sizes, refs
}

func TestCompactionKeepsWhatIsKept(t *testing.T) {
	fs, sizes, refs := compactable(t)
	bodies := len(names(t, fs, "/log", ".body"))
	opt := small(fs)
	opt.Synced = func(rs []log.Record) { refs = append(refs, rs[0].Ref) }
	l := open(t, opt)
	for round := range 3 {
		segs := l.Segments()
		if len(segs) < 2 {
			t.Fatalf("segments %+v", segs)
		}
		for _, s := range segs {
			if s.Compacted && round == 0 || !s.Compacted && round == 1 {
				t.Errorf("round %d: %+v", round, s)
			}
			again := func(r log.Record) (bool, log.Kind, []byte) {
				if r.Compacted {
					return true, r.Kind, r.Meta
				}
				return thirds(r)
			}
			if err := l.Compact(ctx, s.Number, again); err != nil {
				t.Fatal(err)
			}
		}
		compacted(t, l, sizes, refs)
		if round == 1 {
			mustAppend(t, l, len(sizes), 10)
			sizes = append(sizes, 10)
		}
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		if _, err := log.Verify(ctx, fs, "/log", func(d log.Damage) { t.Error(d) }); err != nil {
			t.Fatal(err)
		}
		l = open(t, opt)
		if n := compacted(t, l, sizes, refs); n < len(sizes)/2 {
			t.Errorf("only %d records were rewritten", n)
		}
		if rep := l.Report(); len(rep.Damage) > 0 {
			t.Errorf("%+v", rep)
		}
	}
	if n := len(names(t, fs, "/log", ".body")); n >= bodies {
		t.Errorf("%d bodies, %d before: none went with its record", n, bodies)
	}
	l.Close()
}

func TestACrashDuringCompactionKeepsOldOrNew(t *testing.T) {
	base, sizes, refs := compactable(t)
	for k := 1; ; k++ {
		fs := base.Copy()
		l := open(t, small(fs))
		start := fs.Ops()
		fs.Hook = func(o simfs.Op) simfs.Fault { return simfs.Fault{Crash: o.N == start+k} }
		var err error
		for _, s := range l.Segments() {
			if err = l.Compact(ctx, s.Number, thirds); err != nil {
				break
			}
		}
		for _, o := range outcomes {
			after := fs.After(o.mode, o.seed)
			l, err := log.Open(ctx, small(after))
			if err != nil {
				t.Fatalf("crash at operation %d, %v: %v", k, o, err)
			}
			compacted(t, l, sizes, refs)
			rep := l.Report()
			l.Close()
			sum, err := log.Verify(ctx, after, "/log", func(d log.Damage) { t.Error(d) })
			if err != nil || sum.Orphans > 0 || len(rep.Damage) > 0 || rep.LostEnd {
				t.Errorf("%+v %+v %v", sum, rep, err)
			}
			if t.Failed() {
				t.Fatalf("crash at operation %d, %v %d", k, o.mode, o.seed)
			}
		}
		l.Close()
		if err == nil {
			if k < 12 {
				t.Errorf("only %d operations", k)
			}
			return
		}
	}
}

func TestCompactionThatCannotIsHarmless(t *testing.T) {
	base, sizes, refs := compactable(t)
	t.Run("the disk is full", func(t *testing.T) {
		fs := base.Copy()
		fs.SetFree(2000)
		l := open(t, small(fs))
		defer l.Close()
		if err := l.Compact(ctx, l.Segments()[0].Number, thirds); !errors.Is(err, transport.ErrNoSpace) {
			t.Errorf("got %v", err)
		}
		if n := compacted(t, l, sizes, refs); n != 0 {
			t.Errorf("%d records rewritten", n)
		}
		fs.SetFree(-1)
		if err := l.Compact(ctx, l.Segments()[0].Number, thirds); err != nil {
			t.Error(err)
		}
		compacted(t, l, sizes, refs)
	})
	t.Run("the segment is damaged", func(t *testing.T) {
		fs := base.Copy()
		name := names(t, fs, "/log", ".seg")[0]
		b := fs.Peek("/log/" + name)
		b[1024+56+48+60] ^= 1
		fs.Poke("/log/"+name, b)
		l := open(t, small(fs))
		defer l.Close()
		if err := l.Compact(ctx, 1, thirds); !errors.Is(err, log.ErrDamaged) {
			t.Errorf("got %v", err)
		}
		if !slices.Contains(names(t, fs, "/log", ".seg"), name) || len(names(t, fs, "/log", ".tmp")) > 0 {
			t.Error("files changed")
		}
	})
	t.Run("the sync fails", func(t *testing.T) {
		fs := base.Copy()
		l := open(t, small(fs))
		fs.Hook = func(o simfs.Op) simfs.Fault {
			if o.Name == "sync" {
				return simfs.Fault{Err: syscall.EIO}
			}
			return simfs.Fault{}
		}
		if err := l.Compact(ctx, l.Segments()[0].Number, thirds); !errors.Is(err, syscall.EIO) {
			t.Errorf("got %v", err)
		}
		compacted(t, l, sizes, refs)
		l.Close()
	})
	t.Run("the last segment", func(t *testing.T) {
		l := open(t, small(base.Copy()))
		defer l.Close()
		segs := names(t, base, "/log", ".seg")
		var last uint64
		fmt.Sscanf(segs[len(segs)-1], "%d.seg", &last)
		if err := l.Compact(ctx, last, thirds); err == nil {
			t.Error("compacted")
		}
	})
}

func TestWritersReadersAndCompactionAtOnce(t *testing.T) {
	opt := log.Options{Dir: t.TempDir(), SegmentSize: 64 << 10, SpoolThreshold: 4 << 10, OpenFiles: 4}
	var mu sync.Mutex
	refs := map[uint64]log.Ref{}
	read, compact := make(chan struct{}, 1), make(chan struct{}, 1)
	opt.Synced = func(rs []log.Record) {
		for _, c := range []chan struct{}{read, compact} {
			select {
			case c <- struct{}{}:
			default:
			}
		}
		mu.Lock()
		defer mu.Unlock()
		for _, r := range rs {
			refs[r.Seq] = r.Ref
		}
	}
	l := open(t, opt)
	seeds := map[uint64]int{}
	var writers, others sync.WaitGroup
	for w := range 6 {
		writers.Go(func() {
			for i := range 60 {
				seed := w*1000 + i
				e, err := entry(l, seed, 100+i*97)
				if err != nil {
					t.Error(err)
					return
				}
				tk := l.Append(e)
				if <-tk.Done(); tk.Err() != nil {
					t.Error(tk.Err())
					return
				}
				mu.Lock()
				seeds[tk.First()] = seed
				mu.Unlock()
			}
		})
	}
	done := make(chan struct{})
	readAll := func() (n int) {
		mu.Lock()
		had, of := maps.Clone(refs), maps.Clone(seeds)
		mu.Unlock()
		for seq, ref := range had {
			seed, ok := of[seq]
			if !ok {
				continue
			}
			b, err := readBody(l.Body(ref))
			if err != nil || !bytes.Equal(b, content(seed, 100+seed%1000*97)) {
				t.Errorf("record %d: %v", seq, err)
			}
			n++
		}
		return n
	}
	others.Go(func() {
		for {
			select {
			case <-done:
				return
			case <-read:
				readAll()
			}
		}
	})
	others.Go(func() {
		for {
			select {
			case <-done:
				return
			case <-compact:
			}
			for _, s := range l.Segments() {
				if s.Compacted {
					continue
				}
				if err := l.Compact(ctx, s.Number, func(r log.Record) (bool, log.Kind, []byte) { return true, r.Kind, r.Meta }); err != nil {
					t.Error(err)
				}
			}
		}
	})
	writers.Wait()
	close(done)
	others.Wait()
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	l = open(t, opt)
	defer l.Close()
	if n := readAll(); n != 360 {
		t.Errorf("%d records, want 360", n)
	}
	if got := replay(t, l, 1); len(got) != 360 || len(l.Report().Damage) > 0 {
		t.Errorf("%d records, %+v", len(got), l.Report())
	}
}
