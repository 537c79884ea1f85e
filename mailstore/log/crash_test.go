package log_test

import (
	"errors"
	"fmt"
	"slices"
	"syscall"
	"testing"

	"posthouse/mailstore/log"
	"posthouse/mailstore/log/simfs"
	"posthouse/transport"
)

// fate is what is known of an Append.
type fate int

const (
	open_  fate = iota // nobody was answered: all of it or nothing
	kept               // answered, or seen after an open: there for ever
	refuse             // refused for want of space: never there
)

type attempt struct {
	first uint64
	seed  int
	sizes []int
	fate  fate
}

// model is what a client of the log knows.
type model struct {
	tries []*attempt
	seed  int
}

func (m *model) append(l *log.Log, sizes ...int) (*attempt, *log.Ticket, error) {
	a := &attempt{seed: m.seed, sizes: sizes}
	m.seed += len(sizes)
	var es []log.Entry
	for i, n := range sizes {
		e, err := entry(l, a.seed+i, n)
		if err != nil {
			for _, e := range es {
				if e.Body != nil {
					e.Body.Discard()
				}
			}
			return nil, nil, err
		}
		es = append(es, e)
	}
	tk := l.Append(es...)
	a.first = tk.First()
	m.tries = append(m.tries, a)
	return a, tk, nil
}

func (a *attempt) wait(tk *log.Ticket) error {
	<-tk.Done()
	switch err := tk.Err(); {
	case err == nil:
		a.fate = kept
	case errors.Is(err, log.ErrClosed):
		return err
	case errors.Is(err, transport.ErrNoSpace):
		a.fate = refuse
		return err
	default:
		return fmt.Errorf("unexpected: %w", err)
	}
	return nil
}

// try appends and waits.
func (m *model) try(l *log.Log, sizes ...int) error {
	a, tk, err := m.append(l, sizes...)
	if err != nil {
		return err
	}
	return a.wait(tk)
}

// last returns the highest sequence that was acknowledged.
func (m *model) last() (n uint64) {
	for _, a := range m.tries {
		if a.fate == kept {
			n = max(n, a.first+uint64(len(a.sizes))-1)
		}
	}
	return n
}

// check compares what the log holds with what is known, and learns from it.
func (m *model) check(t testing.TB, l *log.Log) {
	t.Helper()
	got := map[uint64]log.Record{}
	var before uint64
	for _, r := range replay(t, l, 1) {
		if r.Seq <= before {
			t.Errorf("record %d after record %d", r.Seq, before)
		}
		before = r.Seq
		got[r.Seq] = r
	}
	if l.End() < before {
		t.Errorf("end %d, but record %d is there", l.End(), before)
	}
	owner := map[uint64]*attempt{}
	for _, a := range m.tries {
		if a.fate == refuse {
			continue
		}
		there := 0
		for i := range a.sizes {
			r, ok := got[a.first+uint64(i)]
			if !ok {
				continue
			}
			if err := holds(l, r, a.seed+i, a.sizes[i]); err == nil {
				there++
				owner[r.Seq] = a
			} else if a.fate == kept {
				t.Error(err)
			}
		}
		switch {
		case a.fate == kept && there < len(a.sizes):
			t.Errorf("acknowledged at %d: %d of %d records are there", a.first, there, len(a.sizes))
		case a.fate == open_ && there > 0 && there < len(a.sizes):
			t.Errorf("appended at %d: %d of %d records are there", a.first, there, len(a.sizes))
		}
	}
	for seq := range got {
		if owner[seq] == nil {
			t.Errorf("record %d was never appended, or refused, or is not what was appended", seq)
		}
	}
	// From here on it was shown to the view.
	m.tries = slices.DeleteFunc(m.tries, func(a *attempt) bool { return a.fate != kept && owner[a.first] != a })
	for _, a := range m.tries {
		a.fate = kept
	}
	if rep := l.Report(); len(rep.Damage) > 0 || rep.LostEnd {
		t.Errorf("a crash is not damage: %+v", rep)
	}
}

func (m *model) clone() *model {
	n := &model{seed: m.seed}
	for _, a := range m.tries {
		c := *a
		n.tries = append(n.tries, &c)
	}
	return n
}

// workload runs everything that the log does, until it fails or ends.
func workload(m *model, fs log.FS) error {
	opt := small(fs)
	l, err := log.Open(ctx, opt)
	if err != nil {
		return err
	}
	run := func() error {
		for _, sizes := range [][]int{{10}, {100, 0, 700}, {3000}, {3000}, {3000, 2500}, {5000}, {0}} {
			if err := m.try(l, sizes...); err != nil {
				return err
			}
		}
		l.Mark(3)
		if err := m.try(l, 100, 9000, 0); err != nil {
			return err
		}
		d := l.NewDraft()
		d.Write(content(1, 6000))
		err := d.Seal(ctx)
		d.Discard()
		if err != nil {
			return err
		}
		if err := m.try(l, 70_000); err != nil {
			return err
		}
		a, ta, err := m.append(l, 2000)
		if err != nil {
			return err
		}
		b, tb, err := m.append(l, 10, 20)
		if err != nil {
			return err
		}
		if err := errors.Join(a.wait(ta), b.wait(tb)); err != nil {
			return err
		}
		l.Mark(m.last())
		return nil
	}
	err = run()
	if e := l.Close(); err == nil {
		err = e
	}
	if err != nil {
		return err
	}
	opt.Position = m.last()
	if l, err = log.Open(ctx, opt); err != nil {
		return err
	}
	err = errors.Join(m.try(l, 300), m.try(l, 4500, 1))
	if e := l.Close(); err == nil {
		err = e
	}
	return err
}

// outcome is one way in which a crash may leave the disk.
type outcome struct {
	mode simfs.Mode
	seed uint64
}

var outcomes = []outcome{{simfs.LoseAll, 0}, {simfs.KeepAll, 0}, {simfs.Torn, 0},
	{simfs.Random, 1}, {simfs.Random, 2}, {simfs.Random, 3}, {simfs.Random, 4}, {simfs.Random, 5}}

func crashAt(k int) func(simfs.Op) simfs.Fault {
	return func(o simfs.Op) simfs.Fault { return simfs.Fault{Crash: o.N == k} }
}

// restarts opens, checks, appends, closes, opens and checks again.
func restarts(t testing.TB, m *model, fs *simfs.FS, position uint64) {
	t.Helper()
	opt := small(fs)
	opt.Position = position
	for range 2 {
		l, err := log.Open(ctx, opt)
		if err != nil {
			t.Errorf("open: %v", err)
			return
		}
		m.check(t, l)
		if err := m.try(l, 50, 4300); err != nil {
			t.Error(err)
		}
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	}
	_, err := log.Verify(ctx, fs, "/log", func(d log.Damage) { t.Errorf("verify: %v", d) })
	if err != nil {
		t.Error(err)
	}
}

func TestACrashAtAnyOperationLosesNothingAcknowledged(t *testing.T) {
	clean := simfs.New()
	if err := workload(&model{}, clean); err != nil {
		t.Fatal(err)
	}
	t.Logf("%d operations", clean.Ops())
	for k := 1; k <= clean.Ops()+3; k++ {
		fs := simfs.New()
		fs.Hook = crashAt(k)
		m := &model{}
		workload(m, fs)
		for _, o := range outcomes {
			for _, position := range []uint64{0, m.last() / 2, m.last()} {
				restarts(t, m.clone(), fs.After(o.mode, o.seed), position)
				if t.Failed() {
					t.Fatalf("crash at operation %d, %v %d, view at %d", k, o.mode, o.seed, position)
				}
			}
		}
	}
}

func TestACrashDuringRecoveryLosesNothing(t *testing.T) {
	clean := simfs.New()
	if err := workload(&model{}, clean); err != nil {
		t.Fatal(err)
	}
	modes := []outcome{{simfs.LoseAll, 0}, {simfs.KeepAll, 0}, {simfs.Torn, 0}, {simfs.Random, 7}}
	var deepest int
	var recoverFrom func(m *model, fs *simfs.FS, depth, depths int)
	recoverFrom = func(m *model, fs *simfs.FS, depth, depths int) {
		deepest = max(deepest, depth)
		before := fs.After(simfs.KeepAll, 0)
		for j := 1; ; j++ {
			again := before.After(simfs.KeepAll, 0)
			again.Hook = crashAt(j)
			m := m.clone()
			opt := small(again)
			l, err := log.Open(ctx, opt)
			if err == nil {
				m.check(t, l)
				again.Crash()
				l.Close()
			}
			for _, o := range modes {
				after := again.After(o.mode, o.seed+uint64(j))
				if depth > 1 && o.mode != simfs.Random && o.mode != simfs.LoseAll {
					continue
				}
				if err != nil && depth < depths && o.mode == simfs.Random {
					recoverFrom(m, again.After(o.mode, o.seed+uint64(j)), depth+1, depths)
				}
				restarts(t, m.clone(), after, 0)
				if t.Failed() {
					t.Logf("crash at operation %d of recovery %d, %v", j, depth, o.mode)
					return
				}
			}
			if err == nil {
				return
			}
		}
	}
	for k := 1; k <= clean.Ops(); k++ {
		fs := simfs.New()
		fs.Hook = crashAt(k)
		m := &model{}
		workload(m, fs)
		depths := 1 // crashes in a row; more where the numbers allow
		if k%5 == 0 {
			depths = 2
		}
		if k%15 == 0 {
			depths = 3
		}
		for _, o := range modes[2:] {
			recoverFrom(m.clone(), fs.After(o.mode, o.seed), 1, depths)
			if t.Failed() {
				t.Fatalf("after a crash at operation %d, %v", k, o.mode)
			}
		}
	}
	if deepest != 3 {
		t.Errorf("crashed %d recoveries in a row, want 3", deepest)
	}
}

func TestAFailedSyncEndsTheLogAndLosesNothing(t *testing.T) {
	clean := simfs.New()
	if err := workload(&model{}, clean); err != nil {
		t.Fatal(err)
	}
	failures := 0
	for k := 1; k <= clean.Ops(); k++ {
		for i, o := range append(outcomes, outcome{}) {
			fs := simfs.New()
			hit := false
			fs.Hook = func(o simfs.Op) simfs.Fault {
				if o.N == k && (o.Name == "sync" || o.Name == "syncdir") {
					hit = true
					return simfs.Fault{Err: syscall.EIO}
				}
				return simfs.Fault{}
			}
			m := &model{}
			err := workload(m, fs)
			if !hit {
				break
			}
			failures++
			if err == nil {
				t.Fatalf("sync at operation %d failed, and nobody was told", k)
			}
			fs.Hook = nil
			// The last round is a process that comes back at once: it sees the
			// cache. What it shows must stand, whatever a power cut takes then.
			if i < len(outcomes) {
				fs = fs.After(o.mode, o.seed)
			}
			l, err := log.Open(ctx, small(fs))
			if err != nil {
				t.Fatalf("after the failed sync at %d: open: %v", k, err)
			}
			m.check(t, l)
			later := fs.After(simfs.LoseAll, 0)
			l.Close()
			restarts(t, m, later, 0)
			if t.Failed() {
				t.Fatalf("failed sync at operation %d, %v %d", k, o.mode, o.seed)
			}
		}
	}
	if failures < 15*len(outcomes) {
		t.Errorf("only %d syncs failed", failures)
	}
}

func TestAfterAFailedSyncTheLogSaysSo(t *testing.T) {
	fs := simfs.New()
	l := open(t, small(fs))
	mustAppend(t, l, 1, 10)
	fs.Hook = func(o simfs.Op) simfs.Fault {
		if o.Name == "sync" {
			return simfs.Fault{Err: syscall.EIO}
		}
		return simfs.Fault{}
	}
	select {
	case <-l.Failed():
		t.Fatal("failed before")
	default:
	}
	tk := l.Append(log.Entry{Kind: 1})
	<-tk.Done()
	<-l.Failed()
	fs.Hook = nil
	later := l.Append(log.Entry{Kind: 1})
	<-later.Done()
	for _, err := range []error{tk.Err(), later.Err(), l.Err(), l.Admit(ctx, 1), l.Close()} {
		if !errors.Is(err, log.ErrClosed) || !errors.Is(err, syscall.EIO) {
			t.Errorf("got %v, want ErrClosed with its cause", err)
		}
	}
	if tk.Err().Error() != later.Err().Error() {
		t.Errorf("%v, then %v", tk.Err(), later.Err())
	}
}

// TestAFullDiskIsSurvived lets the disk be full at each operation, for one
// operation or for several, and goes on.
func TestAFullDiskIsSurvived(t *testing.T) {
	steps := [][]int{{10}, {100, 0, 700}, {3000}, {5000}, {3000}, {3000, 2500}, {5000, 1}, {0}, {70_000}, {2000}, {10, 20}, {30}, {40}}
	run := func(fs *simfs.FS, m *model) (refused int, died error) {
		l, err := log.Open(ctx, small(fs))
		if err != nil {
			return 0, err
		}
		for i, sizes := range steps {
			switch err := m.try(l, sizes...); {
			case err == nil:
			case errors.Is(err, log.ErrClosed):
				l.Close()
				return refused, err
			case errors.Is(err, transport.ErrNoSpace):
				refused++
			default:
				t.Errorf("step %d: %v", i, err)
			}
		}
		return refused, l.Close()
	}
	clean := simfs.New()
	run(clean, &model{})
	total := 0
	for _, length := range []int{1, 30} {
		for k := 1; k <= clean.Ops(); k++ {
			fs := simfs.New()
			// Writes and new files fail; syncs do not: their space is reserved.
			fs.Hook = func(o simfs.Op) simfs.Fault {
				if o.N >= k && o.N < k+length && (o.Name == "write" || o.Name == "create") {
					return simfs.Fault{Err: syscall.ENOSPC}
				}
				return simfs.Fault{}
			}
			m := &model{}
			refused, died := run(fs, m)
			if died != nil {
				t.Fatalf("full for %d operations from %d: died: %v", length, k, died)
			}
			total += refused
			fs.Hook = nil
			for _, o := range outcomes {
				restarts(t, m.clone(), fs.After(o.mode, o.seed), 0)
				if t.Failed() {
					t.Fatalf("full for %d operations from %d, then %v %d", length, k, o.mode, o.seed)
				}
			}
		}
	}
	if total < 200 {
		t.Errorf("only %d appends were refused", total)
	}
	for free := int64(0); free < 40<<10; free += 1021 {
		fs := simfs.New()
		fs.SetFree(free)
		m := &model{}
		if _, died := run(fs, m); died != nil {
			t.Fatalf("%d bytes free: died: %v", free, died)
		}
		fs.SetFree(-1)
		if refused, died := run(fs, m); died != nil || refused > 0 {
			t.Fatalf("%d bytes free, then more: %d refused, %v", free, refused, died)
		}
		restarts(t, m, fs.After(simfs.LoseAll, 0), 0)
		if t.Failed() {
			t.Fatalf("%d bytes free", free)
		}
	}
}

// TestAFullDiskThenACrash crashes at each operation after the disk was full.
func TestAFullDiskThenACrash(t *testing.T) {
	for full := 5; full <= 30; full++ {
		for k := full + 1; k < full+12; k++ {
			fs := simfs.New()
			fs.Hook = func(o simfs.Op) simfs.Fault {
				if o.N == full && (o.Name == "write" || o.Name == "create") {
					return simfs.Fault{Err: syscall.ENOSPC}
				}
				return simfs.Fault{Crash: o.N == k}
			}
			m := &model{}
			l, err := log.Open(ctx, small(fs))
			if err != nil {
				t.Fatal(err)
			}
			for _, sizes := range [][]int{{10}, {100, 0}, {3000, 1}, {300}, {5000}, {20, 10}, {3000}, {1000}} {
				m.try(l, sizes...)
			}
			l.Close()
			for _, o := range outcomes {
				restarts(t, m.clone(), fs.After(o.mode, o.seed), 0)
				if t.Failed() {
					t.Fatalf("full at operation %d, crash at %d, %v %d", full, k, o.mode, o.seed)
				}
			}
		}
	}
}

func TestABodyOfAnOlderSegmentIsNoOrphanWhileADraftIsSlow(t *testing.T) {
	fs := simfs.New()
	l := open(t, small(fs))
	slow := l.NewDraft()
	slow.Write(content(9, 6000))
	m := &model{}
	for range 4 { // over several segments
		for _, sizes := range [][]int{{5000}, {3000}, {3000, 6000}, {3000}} {
			if err := m.try(l, sizes...); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := slow.Seal(ctx); err != nil { // and never appended
		t.Fatal(err)
	}
	after := fs.After(simfs.KeepAll, 0)
	slow.Discard()
	l.Close()
	l = open(t, small(after))
	if rep := l.Report(); rep.Orphans != 1 || rep.Segments < 4 {
		t.Errorf("%+v", rep)
	}
	m.check(t, l)
	l.Close()
}
