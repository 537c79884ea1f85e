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

func compact(l *log.Log, decide func(log.Record) (bool, log.Kind, []byte), numbers ...uint64) error {
	_, err := l.Compact(ctx, numbers, 1, decide)
	return err
}

// runs cuts the complete segments into runs of n.
func runs(l *log.Log, n int) (out [][]uint64) {
	var numbers []uint64
	for _, s := range l.Segments() {
		numbers = append(numbers, s.Number)
	}
	return slices.Collect(slices.Chunk(numbers, n))
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
	for _, g := range [][]int{{10}, {100, 5000, 6000}, {3000}, {3000}, {3000, 7000}, {70_000}, {0}, {100, 9000, 0}, {3000}, {2000}, {10, 20}, {3000}, {3000, 1}, {9000, 3000}, {3000, 3000, 8000}, {2000}} {
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
			if err := compact(l, again, s.Number); err != nil {
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
	for _, n := range []int{1, 2} {
		t.Run(fmt.Sprintf("%d at once", n), func(t *testing.T) { crashCompaction(t, n) })
	}
}

func crashCompaction(t *testing.T, n int) {
	base, sizes, refs := compactable(t)
	for k := 1; ; k++ {
		fs := base.Copy()
		l := open(t, small(fs))
		start := fs.Ops()
		fs.Hook = func(o simfs.Op) simfs.Fault { return simfs.Fault{Crash: o.N == start+k} }
		var err error
		for _, numbers := range runs(l, n) {
			if err = compact(l, thirds, numbers...); err != nil {
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

func TestSegmentsAreMergedAgainAndAgain(t *testing.T) {
	fs, sizes, refs := compactable(t)
	opt := small(fs)
	opt.Synced = func(rs []log.Record) { refs = append(refs, rs[0].Ref) }
	again := func(r log.Record) (bool, log.Kind, []byte) {
		if r.Compacted {
			return true, r.Kind, r.Meta
		}
		return thirds(r)
	}
	for round := range 60 { // more often than a header has room for numbers
		l := open(t, opt)
		if rep := l.Report(); len(rep.Damage) > 0 || round > 0 && rep.Compacted != 1 {
			t.Fatalf("round %d: %+v", round, rep)
		}
		mustAppend(t, l, len(sizes), 10)
		sizes = append(sizes, 10)
		for _, numbers := range runs(l, 2+round%4) {
			if err := compact(l, again, numbers...); err != nil {
				t.Fatal(err)
			}
		}
		if round%10 == 0 {
			for seq, ref := range refs {
				if _, err := l.Record(ref); (seq+1)%3 != 0 && err != nil {
					t.Fatalf("round %d: record %d: %v", round, seq+1, err)
				}
			}
		}
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if n := len(names(t, fs, "/log", ".seg")); n > 5 {
		t.Errorf("%d segments are left", n)
	}
	sum, err := log.Verify(ctx, fs, "/log", func(d log.Damage) { t.Error(d) })
	if err != nil || sum.Orphans > 0 {
		t.Error(sum, err)
	}
	l := open(t, small(fs))
	compacted(t, l, sizes, refs)
	var latest []uint64
	l.Latest(ctx, log.KindAppend, func(r log.Record) bool { latest = append(latest, r.Seq); return len(latest) < 3 })
	if len(latest) != 3 || latest[0] <= latest[1] || latest[1] <= latest[2] {
		t.Error(latest)
	}
	u, err := l.Usage()
	if err != nil || u.Bytes == 0 || len(u.Segments) != len(l.Segments()) {
		t.Errorf("%+v %v", u, err)
	}
	l.Close()
}

func TestRollEndsASegment(t *testing.T) {
	l := open(t, log.Options{Dir: t.TempDir()})
	defer l.Close()
	l.Roll()
	for i := range 3 {
		mustAppend(t, l, i, 10)
		if n := len(l.Segments()); n != min(i, 1) {
			t.Errorf("%d complete segments after %d", n, i+1)
		}
		if i == 0 {
			l.Roll()
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
		if err := compact(l, thirds, l.Segments()[0].Number); !errors.Is(err, transport.ErrNoSpace) {
			t.Errorf("got %v", err)
		}
		if n := compacted(t, l, sizes, refs); n != 0 {
			t.Errorf("%d records rewritten", n)
		}
		fs.SetFree(-1)
		if err := compact(l, thirds, l.Segments()[0].Number); err != nil {
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
		if err := compact(l, thirds, 1); !errors.Is(err, log.ErrDamaged) {
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
		if err := compact(l, thirds, l.Segments()[0].Number); !errors.Is(err, syscall.EIO) {
			t.Errorf("got %v", err)
		}
		compacted(t, l, sizes, refs)
		l.Close()
	})
	t.Run("segments that are not adjacent", func(t *testing.T) {
		l := open(t, small(base.Copy()))
		defer l.Close()
		segs := l.Segments()
		if compact(l, thirds, segs[1].Number, segs[0].Number) == nil || compact(l, thirds) == nil {
			t.Error("compacted")
		}
	})
	t.Run("the last segment", func(t *testing.T) {
		l := open(t, small(base.Copy()))
		defer l.Close()
		segs := names(t, base, "/log", ".seg")
		var last uint64
		fmt.Sscanf(segs[len(segs)-1], "%d.seg", &last)
		if err := compact(l, thirds, last); err == nil {
			t.Error("compacted")
		}
	})
}

func TestWritersReadersAndCompactionAtOnce(t *testing.T) {
	opt := log.Options{Dir: t.TempDir(), SegmentSize: 64 << 10, SpoolThreshold: 4 << 10, OpenFiles: 4}
	var mu sync.Mutex
	refs := map[uint64]log.Ref{}
	read, more := make(chan struct{}, 1), make(chan struct{}, 1)
	opt.Synced = func(rs []log.Record) {
		for _, c := range []chan struct{}{read, more} {
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
			case <-more:
			}
			for _, s := range l.Segments() {
				if s.Compacted {
					continue
				}
				if err := compact(l, func(r log.Record) (bool, log.Kind, []byte) { return true, r.Kind, r.Meta }, s.Number); err != nil {
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
