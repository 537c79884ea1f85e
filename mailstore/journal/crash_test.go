package journal_test

import (
	"encoding/binary"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"posthouse/mailstore/journal"
	"posthouse/mailstore/journal/journaltest"
	"posthouse/mailstore/log"
	"posthouse/mailstore/log/simfs"
)

func TestReplayAfterACrashGivesWhatLiveApplyingGave(t *testing.T) {
	holding(t, 50, func(t *testing.T, d *journaltest.Disk, j *journal.Journal) {
		time.Sleep(time.Second) // the view is on disk up to here
		add(t, j, 50)
		want := state(t, j)
		d.Crash(t)
		if at := d.View.Applied(); at == 0 || at >= 100 {
			t.Fatal("view at", at)
		}
		j, c := started(t, d)
		sameState(t, j, want)
		if len(c.applied) == 0 || c.applied[0] != d.View.Applied()+1 && c.applied[0] < 2 {
			t.Fatal("replayed", c.applied)
		}
		wantConditions(t, j)
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
		wantConditions(t, j)
		sameState(t, j, want)
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
