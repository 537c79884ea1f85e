package journal_test

import (
	"bytes"
	"errors"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"posthouse/mailstore/journal"
	"posthouse/mailstore/journal/journaltest"
	"posthouse/mailstore/kv"
	"posthouse/mailstore/log"
	"posthouse/mailstore/log/simfs"
)

func TestAViewAheadOfTheLogIsRebuiltAndEnginesRenew(t *testing.T) {
	holding(t, 5, func(t *testing.T, d *journaltest.Disk, _ *journal.Journal) {
		d.Close(t)
		short := d.FS.After(simfs.KeepAll, 0) // an image of the log, to be put back
		d.FS = d.FS.After(simfs.KeepAll, 0)
		j, _ := started(t, d)
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
		sameState(t, j, want)
	})
}

func TestADamagedViewIsRebuilt(t *testing.T) {
	holding(t, 5, func(t *testing.T, d *journaltest.Disk, j *journal.Journal) {
		want := state(t, j)
		if err := j.View().Flush(t.Context()); err != nil {
			t.Fatal(err)
		}
		d.View.Damage()
		if _, _, err := j.View().Get([]byte("row/000001")); !errors.Is(err, kv.ErrDamaged) {
			t.Fatal(err)
		}
		wantConditions(t, j, journal.CondViewDamaged)
		d.Close(t)
		j, _ = started(t, d)
		wantConditions(t, j, journal.CondViewRebuilt)
		sameState(t, j, want)
	})
}

func TestDamageInTheLogIsNamed(t *testing.T) {
	holding(t, 20, func(t *testing.T, d *journaltest.Disk, _ *journal.Journal) {
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
		j, _ := started(t, d)
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
		sameState(t, j, want)
		d.Close(t)
		_, c = started(t, d)
		if len(c.applied) != 0 {
			t.Fatal("replayed again:", len(c.applied))
		}
	})
}
