package journal_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"posthouse/mailstore/journal"
	"posthouse/mailstore/journal/journaltest"
	"posthouse/mailstore/kv"
	"posthouse/mailstore/log"
	"posthouse/mailstore/log/simfs"
	"posthouse/transport"
)

// counter is an engine that cannot hide a record that is applied twice, not at
// all, or out of order: the view holds a running sum over all records.
type counter struct {
	j       *journal.Journal
	applied []uint64
	renewed int
	bad     uint64 // the record whose Apply fails
	block   chan struct{}
}

func (c *counter) Apply(r log.Record, b *kv.Batch, live bool) error {
	if c.block != nil {
		<-c.block
	}
	if r.Seq == c.bad {
		return errors.New("bad record")
	}
	c.applied = append(c.applied, r.Seq)
	old, _, err := c.j.View().Get([]byte("sum"))
	if err != nil {
		return err
	}
	sum := uint64(7)
	if old != nil {
		sum = binary.BigEndian.Uint64(old)
	}
	for _, x := range r.Meta {
		sum = sum*31 + uint64(x) + r.Seq
	}
	b.Put([]byte("sum"), binary.BigEndian.AppendUint64(nil, sum))
	b.Put(fmt.Appendf(nil, "row/%06d", r.Seq), r.Meta)
	return nil
}

func (c *counter) Renew(ctx context.Context) error { c.renewed++; return nil }

func open(t testing.TB, d *journaltest.Disk) (*journal.Journal, *counter) {
	t.Helper()
	j := d.Open(t)
	c := &counter{j: j}
	j.Register(c, log.KindAppend, log.KindFlags)
	return j, c
}

func started(t testing.TB, d *journaltest.Disk) (*journal.Journal, *counter) {
	t.Helper()
	j, c := open(t, d)
	if err := j.Start(context.Background()); err != nil {
		t.Fatal(err)
	}
	return j, c
}

func add(t testing.TB, j *journal.Journal, n int) {
	t.Helper()
	for range n {
		if err := j.Append(log.Entry{Kind: log.KindAppend, Meta: []byte("meta")}).Applied(context.Background()); err != nil {
			t.Fatal(err)
		}
	}
}

// state is all that the view holds.
func state(t testing.TB, j *journal.Journal) string {
	t.Helper()
	var b strings.Builder
	if err := j.View().Scan(nil, nil, func(k, v []byte) bool {
		fmt.Fprintf(&b, "%s=%x\n", k, v)
		return true
	}); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

func names(j *journal.Journal) (ns []string) {
	for _, c := range j.Conditions() {
		ns = append(ns, c.Name)
	}
	return ns
}

func TestReplayAfterACrashGivesWhatLiveApplyingGave(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := journaltest.NewDisk(t)
		j, _ := started(t, d)
		add(t, j, 50)
		time.Sleep(time.Second) // the view is on disk up to here
		add(t, j, 50)
		want := state(t, j)
		d.Crash(t)
		if at := d.View.Applied(); at == 0 || at >= 100 {
			t.Fatal("view at", at)
		}
		j, c := started(t, d)
		if got := state(t, j); got != want {
			t.Fatalf("got\n%s\nwant\n%s", got, want)
		}
		if len(c.applied) == 0 || c.applied[0] != d.View.Applied()+1 && c.applied[0] < 2 {
			t.Fatal("replayed", c.applied)
		}
		if ns := names(j); len(ns) != 0 {
			t.Fatal(ns)
		}
	})
}

func TestAWaiterForAppliedSeesItsRows(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := journaltest.NewDisk(t)
		d.FS.SyncTime = time.Millisecond
		j, _ := started(t, d)
		var wg sync.WaitGroup
		for range 200 {
			wg.Go(func() {
				k := j.Append(log.Entry{Kind: log.KindAppend, Meta: []byte("a")}, log.Entry{Kind: log.KindFlags, Meta: []byte("b")})
				if err := k.Applied(t.Context()); err != nil {
					t.Error(err)
				}
				for i := range uint64(2) {
					if _, ok, err := j.View().Get(fmt.Appendf(nil, "row/%06d", k.First()+i)); !ok || err != nil {
						t.Error("row is missing", k.First()+i, err)
					}
				}
			})
		}
		wg.Wait()
	})
}

func TestAWaiterThatGivesUpIsForgotten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := journaltest.NewDisk(t)
		j, c := open(t, d)
		c.block = make(chan struct{})
		if err := j.Start(t.Context()); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		k := j.Append(log.Entry{Kind: log.KindAppend, Meta: []byte("a")})
		if err := k.Applied(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Fatal(err)
		}
		close(c.block)
		if err := k.Applied(t.Context()); err != nil {
			t.Fatal(err)
		}
	})
}

func TestAFailedApplyStopsTheJournalAndAnswersAll(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := journaltest.NewDisk(t)
		j, c := open(t, d)
		c.bad = 3
		if err := j.Start(t.Context()); err != nil {
			t.Fatal(err)
		}
		add(t, j, 2)
		for range 3 {
			k := j.Append(log.Entry{Kind: log.KindAppend, Meta: []byte("a")})
			if err := k.Synced(t.Context()); err != nil {
				t.Fatal(err) // it is on disk, whatever the engine thinks of it
			}
			if err := k.Applied(t.Context()); err == nil || !strings.Contains(err.Error(), "bad record") {
				t.Fatal(err)
			}
		}
		<-j.Done()
		if err := j.Admit(t.Context(), 1); err == nil || j.Err() == nil {
			t.Fatal("admitted")
		}
		if ns := names(j); !slices.Contains(ns, journal.CondStopped) {
			t.Fatal(ns)
		}
	})
}

func TestADeadLogStopsTheJournal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := journaltest.NewDisk(t)
		j, _ := started(t, d)
		add(t, j, 2)
		d.FS.Crash()
		if err := j.Append(log.Entry{Kind: log.KindAppend, Meta: []byte("a")}).Applied(t.Context()); err == nil {
			t.Fatal("no error")
		}
		<-j.Done()
		d.Crash(t)
	})
}

func TestBelowTheFloorNothingIsAdmittedUntilThereIsSpace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := journaltest.NewDisk(t)
		var free atomic.Int64
		free.Store(1 << 30)
		d.Options.View.Floor = 256 << 20
		d.Options.View.OverlayOps = 100
		d.Options.View.Statfs = func(string) (kv.FS, error) { return kv.FS{Total: 8 << 30, Free: free.Load()}, nil }
		j, _ := started(t, d)
		add(t, j, 10)
		free.Store(1 << 20)
		time.Sleep(time.Second)
		if err := j.Admit(t.Context(), 1); err != transport.ErrNoSpace {
			t.Fatal(err)
		}
		add(t, j, 20) // what was admitted before is still taken
		time.Sleep(time.Minute)
		if ns := names(j); !slices.Contains(ns, journal.CondNoSpace) {
			t.Fatal(ns)
		}
		free.Store(1 << 30)
		time.Sleep(2 * time.Second)
		if err := j.Admit(t.Context(), 1); err != nil {
			t.Fatal(err)
		}
		if j.View().Durable() != 30 || len(j.Conditions()) != 0 {
			t.Fatal(j.View().Durable(), j.Conditions())
		}
		free.Store(1 << 20) // and closing does not wait for space
		add(t, j, 70)
		for range 100 {
			j.Append(log.Entry{Kind: log.KindAppend, Meta: []byte("meta")})
		}
		d.Close(t)
		free.Store(1 << 30)
		j, _ = started(t, d)
		if j.Applied() != 200 {
			t.Fatal(j.Applied())
		}
	})
}

// told collects what Options.Space was called with.
type told struct {
	mu   sync.Mutex
	said []bool
}

func (x *told) space(full bool) { x.mu.Lock(); x.said = append(x.said, full); x.mu.Unlock() }

func (x *told) take() []bool {
	synctest.Wait()
	x.mu.Lock()
	defer x.mu.Unlock()
	s := x.said
	x.said = nil
	return s
}

func TestWantOfSpaceAndRoomAreToldOnceEach(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d, x := journaltest.NewDisk(t), &told{}
		var free atomic.Int64
		free.Store(1 << 30)
		d.Options.View.Floor = 256 << 20
		d.Options.View.Statfs = func(string) (kv.FS, error) { return kv.FS{Total: 8 << 30, Free: free.Load()}, nil }
		d.Options.Space = x.space
		j, _ := started(t, d)
		free.Store(1 << 20)
		time.Sleep(time.Hour)
		if s := x.take(); len(s) != 0 {
			t.Fatalf("%v though nobody was refused", s)
		}
		for range 20 {
			if err := j.Admit(t.Context(), 1); err != transport.ErrNoSpace {
				t.Fatal(err)
			}
			time.Sleep(time.Second)
		}
		if s := x.take(); !slices.Equal(s, []bool{true}) || !j.Full() {
			t.Fatal(s)
		}
		free.Store(1 << 30)
		time.Sleep(time.Second)
		if s := x.take(); !slices.Equal(s, []bool{false}) || j.Full() {
			t.Fatal(s)
		}
		free.Store(1 << 20)
		time.Sleep(time.Second)
		if s := x.take(); !j.Full() || len(s) != 0 { // who asks waits for room as well
			t.Fatal(s)
		}
		time.Sleep(time.Minute)
		free.Store(1 << 30)
		time.Sleep(time.Second)
		if s := x.take(); !slices.Equal(s, []bool{true, false}) || j.Full() {
			t.Fatal(s)
		}
		d.Close(t)
	})
}

// A quota of the file system refuses writes while statfs still promises room.
func TestADiskThatPromisesRoomAndHasNoneIsBelievedLessAndLess(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d, x := journaltest.NewDisk(t), &told{}
		d.Options.Space = x.space
		j, _ := started(t, d)
		d.FS.SetFree(0)
		refused := 0
		for range 600 {
			if j.Append(log.Entry{Kind: log.KindAppend, Meta: make([]byte, 1<<16)}).Synced(t.Context()) != nil {
				refused++
			}
			time.Sleep(10 * time.Second)
		}
		if s := x.take(); refused < 590 || len(s) > 2*refused {
			t.Fatalf("%d told of %d refusals", len(s), refused)
		}
		for range 100 { // refused all the time: never believed
			j.Append(log.Entry{Kind: log.KindAppend, Meta: make([]byte, 1<<16)})
			time.Sleep(500 * time.Millisecond)
		}
		if s := x.take(); len(s) > 1 || !j.Full() {
			t.Fatalf("told %v while everything was refused", s)
		}
		d.FS.SetFree(-1)
		time.Sleep(11 * time.Second)
		if s := x.take(); !slices.Equal(s, []bool{false}) || j.Full() {
			t.Fatal(s)
		}
		d.Close(t)
	})
}

func TestAViewAheadOfTheLogIsRebuiltAndEnginesRenew(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := journaltest.NewDisk(t)
		j, _ := started(t, d)
		add(t, j, 5)
		d.Close(t)
		short := d.FS.After(simfs.KeepAll, 0) // an image of the log, to be put back
		d.FS = d.FS.After(simfs.KeepAll, 0)
		j, _ = started(t, d)
		add(t, j, 5)
		d.Close(t)
		d.FS = short
		j, c := started(t, d)
		if ns := names(j); !slices.Contains(ns, journal.CondLogLostEnd) || c.renewed != 1 {
			t.Fatal(ns, c.renewed)
		}
		if got := c.applied; !slices.Equal(got, []uint64{1, 2, 3, 4, 5}) {
			t.Fatal(got)
		}
		k := j.Append(log.Entry{Kind: log.KindAppend, Meta: []byte("after")})
		if err := k.Applied(t.Context()); err != nil || k.First() <= 10 {
			t.Fatal("number", k.First(), "may have been given before;", err)
		}
	})
}

func TestAViewFromAnOldImageIsRebuilt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := journaltest.NewDisk(t)
		d.View.KeepHistory()
		j, _ := started(t, d)
		add(t, j, 5)
		time.Sleep(time.Second)
		add(t, j, 5)
		want := state(t, j)
		d.Close(t) // marks 10
		if at := d.View.Rewind(7); at != 5 {
			t.Fatal(at)
		}
		j, c := started(t, d)
		if ns := names(j); !slices.Equal(ns, []string{journal.CondViewOld}) || c.renewed != 0 || len(c.applied) != 10 {
			t.Fatal(ns, c.renewed, c.applied)
		}
		if got := state(t, j); got != want {
			t.Fatal(got)
		}
	})
}

func TestACrashInARebuildIsNoOldView(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := journaltest.NewDisk(t)
		d.Options.View.Delay = -1
		j, _ := started(t, d)
		add(t, j, 50)
		want := state(t, j)
		d.Close(t)
		d.DropView(t)
		d.View.KeepHistory()
		j, c := open(t, d)
		c.bad = 30
		if err := j.Start(t.Context()); err == nil {
			t.Fatal("no error")
		}
		j.View().Flush(t.Context())
		d.Crash(t)
		if at := d.View.Applied(); at == 0 || at >= 30 {
			t.Fatal("view at", at)
		}
		j, _ = started(t, d)
		if ns := names(j); len(ns) != 0 {
			t.Fatal(ns)
		}
		if got := state(t, j); got != want {
			t.Fatal(got)
		}
	})
}

func TestADamagedViewIsRebuilt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := journaltest.NewDisk(t)
		j, _ := started(t, d)
		add(t, j, 5)
		want := state(t, j)
		if err := j.View().Flush(t.Context()); err != nil {
			t.Fatal(err)
		}
		d.View.Damage()
		if _, _, err := j.View().Get([]byte("row/000001")); !errors.Is(err, kv.ErrDamaged) {
			t.Fatal(err)
		}
		if ns := names(j); !slices.Equal(ns, []string{journal.CondViewDamaged}) {
			t.Fatal(ns)
		}
		d.Close(t)
		j, _ = started(t, d)
		if ns := names(j); !slices.Equal(ns, []string{journal.CondViewRebuilt}) {
			t.Fatal(ns)
		}
		if got := state(t, j); got != want {
			t.Fatal(got)
		}
	})
}

func TestDamageInTheLogIsNamed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := journaltest.NewDisk(t)
		j, _ := started(t, d)
		add(t, j, 20)
		d.Close(t)
		infos, err := d.FS.ReadDir("log")
		if err != nil {
			t.Fatal(err)
		}
		for _, i := range infos {
			b := d.FS.Peek("log/" + i.Name)
			if at := bytes.Index(b, []byte("meta")); at >= 0 {
				b[at] ^= 0xff
				d.FS.Poke("log/"+i.Name, b)
			}
		}
		d.DropView(t)
		j, _ = started(t, d)
		cs := j.Conditions()
		if len(cs) == 0 || cs[0].Name != journal.CondDamaged || !strings.Contains(cs[0].Text, ".seg at ") {
			t.Fatal(cs)
		}
		t.Log(cs[0].Text)
	})
}

func TestRebuildAppliesEverythingAgainAndTellsHowFar(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := journaltest.NewDisk(t)
		j, _ := started(t, d)
		for range 20_000 {
			j.Append(log.Entry{Kind: log.KindAppend, Meta: []byte("x")})
		}
		add(t, j, 1)
		want := state(t, j)
		d.Close(t)
		j, c := open(t, d)
		var last, calls uint64
		if err := j.Rebuild(t.Context(), func(done, total uint64) {
			if calls++; done < last || total != 20_001 {
				t.Error(done, total)
			}
			last = done
		}); err != nil {
			t.Fatal(err)
		}
		if last != 20_001 || calls < 3 || len(c.applied) != 20_001 {
			t.Fatal(last, calls, len(c.applied))
		}
		if got := state(t, j); got != want {
			t.Fatal("the rebuilt view differs")
		}
		d.Close(t)
		_, c = started(t, d)
		if len(c.applied) != 0 {
			t.Fatal("replayed again:", len(c.applied))
		}
	})
}

func TestAnIdleJournalDoesNotWakeUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := journaltest.NewDisk(t)
		j, _ := started(t, d)
		add(t, j, 5)
		time.Sleep(time.Minute)
		ops := d.FS.Ops()
		time.Sleep(1000 * time.Hour) // with a timer anywhere this would take its time
		if d.FS.Ops() != ops || j.View().Durable() != 5 {
			t.Fatal(d.FS.Ops()-ops, j.View().Durable())
		}
	})
}

// Every operation of the log x a view anywhere at or before what it had x
// {view as it was, absent, damaged}: after the crash each acknowledged record
// is applied once, in order, and nothing else is unless it was written.
func TestEveryCrashPointTimesEveryViewPosition(t *testing.T) {
	ops := 0
	for crash := 1; ; crash++ {
		reached := false
		for _, mode := range []simfs.Mode{simfs.LoseAll, simfs.KeepAll, simfs.Torn} {
			for _, view := range []string{"whole", "behind", "first", "absent", "damaged"} {
				ops++
				synctest.Test(t, func(t *testing.T) {
					if crashAt(t, crash, mode, view) {
						reached = true
					}
				})
				if t.Failed() {
					t.Fatalf("crash at operation %d, %v, view %s", crash, mode, view)
				}
			}
		}
		if !reached {
			break
		}
	}
	t.Log(ops, "cases")
}

// crashAt runs one case; false when the run is over before the crash.
func crashAt(t *testing.T, at int, mode simfs.Mode, view string) (crashed bool) {
	d := journaltest.NewDisk(t)
	d.Mode, d.Seed = mode, uint64(at)
	d.View.KeepHistory()
	d.Options.View.Delay = -1
	d.Options.Log.SegmentSize = 4096
	d.FS.Hook = func(o simfs.Op) simfs.Fault {
		crashed = crashed || o.N == at
		return simfs.Fault{Crash: o.N == at}
	}
	acked := uint64(0)
	run := func() {
		j, err := d.TryOpen()
		if err != nil {
			return
		}
		c := &counter{j: j}
		j.Register(c, log.KindAppend)
		if j.Start(t.Context()) != nil {
			return
		}
		for range 6 {
			k := j.Append(log.Entry{Kind: log.KindAppend, Meta: make([]byte, 300)})
			if k.Applied(t.Context()) != nil {
				return
			}
			acked = k.First()
			if j.View().Flush(t.Context()) != nil {
				return
			}
		}
	}
	run()
	if !crashed {
		d.TryClose()
		run()
	}
	d.Crash(t)
	switch view {
	case "behind":
		d.View.Rewind(acked / 2)
	case "first":
		d.View.Rewind(1)
	case "absent":
		d.DropView(t)
	case "damaged":
		d.View.Damage()
	}
	pos := d.View.Applied()
	j, c := started(t, d)
	if view == "damaged" {
		pos = 0
	}
	for i, seq := range c.applied {
		if i > 0 && seq <= c.applied[i-1] {
			t.Error("applied out of order:", c.applied)
		}
	}
	rows := 0
	var sum uint64 = 7
	if err := j.View().Scan([]byte("row/"), nil, func(k, v []byte) bool {
		rows++
		var seq uint64
		fmt.Sscanf(string(k), "row/%d", &seq)
		for _, x := range v {
			sum = sum*31 + uint64(x) + seq
		}
		return true
	}); err != nil {
		t.Error(err)
	}
	if uint64(rows) < acked {
		t.Errorf("%d rows after %d acknowledged records", rows, acked)
	}
	if got, ok, _ := j.View().Get([]byte("sum")); rows > 0 && (!ok || binary.BigEndian.Uint64(got) != sum) {
		t.Error("a record was applied twice or in another order")
	}
	for _, n := range names(j) {
		if n == journal.CondLogLostEnd || n == journal.CondDamaged {
			t.Errorf("condition %s after a mere crash; view at %d, %d acknowledged", n, pos, acked)
		}
	}
	add(t, j, 1)
	return crashed
}
