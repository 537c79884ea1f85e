package journal_test

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"posthouse/mailstore/journal"
	"posthouse/mailstore/journal/journaltest"
	"posthouse/mailstore/kv"
	"posthouse/mailstore/log"
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

// holding runs f in a bubble with a started journal of n records.
func holding(t *testing.T, n int, f func(*testing.T, *journaltest.Disk, *journal.Journal)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		d := journaltest.NewDisk(t)
		j, _ := started(t, d)
		add(t, j, n)
		f(t, d, j)
	})
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

func sameState(t testing.TB, j *journal.Journal, want string) {
	t.Helper()
	if got := state(t, j); got != want {
		t.Fatalf("the view holds\n%.4000s\nwant\n%.4000s", got, want)
	}
}

func wantConditions(t testing.TB, j *journal.Journal, want ...string) {
	t.Helper()
	if got := names(j); !slices.Equal(got, want) {
		t.Fatalf("conditions %q, want %q", got, want)
	}
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
	holding(t, 2, func(t *testing.T, d *journaltest.Disk, j *journal.Journal) {
		d.FS.Crash()
		if err := j.Append(log.Entry{Kind: log.KindAppend, Meta: []byte("a")}).Applied(t.Context()); err == nil {
			t.Fatal("no error")
		}
		<-j.Done()
		d.Crash(t)
	})
}

func TestAnIdleJournalDoesNotWakeUp(t *testing.T) {
	holding(t, 5, func(t *testing.T, d *journaltest.Disk, j *journal.Journal) {
		time.Sleep(time.Minute)
		ops := d.FS.Ops()
		time.Sleep(1000 * time.Hour) // with a timer anywhere this would take its time
		if d.FS.Ops() != ops || j.View().Durable() != 5 {
			t.Fatal(d.FS.Ops()-ops, j.View().Durable())
		}
	})
}
