package journal_test

import (
	"errors"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"posthouse/mailstore/journal"
	"posthouse/mailstore/journal/journaltest"
	"posthouse/mailstore/kv"
	"posthouse/mailstore/log"
	"posthouse/transport"
)

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

// Small mail may still fit where a large body does not: who sent that hears of room
// as well.
func TestALargeBodyThatFoundNoRoomIsFollowedByNewsOfRoom(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d, x := journaltest.NewDisk(t), &told{}
		d.Options.Space = x.space
		j, _ := started(t, d)
		d.FS.SetFree(100 << 10)
		body := j.NewDraft()
		if _, err := body.Write(make([]byte, 2<<20)); !errors.Is(err, transport.ErrNoSpace) {
			t.Fatal(err)
		}
		body.Discard()
		d.FS.SetFree(-1)
		time.Sleep(2 * time.Second)
		if s := x.take(); !slices.Equal(s, []bool{true, false}) {
			t.Errorf("%v was told", s)
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
