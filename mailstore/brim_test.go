package mailstore_test

import (
	"strings"
	"sync/atomic"
	"testing"

	"posthouse/mailstore"
	"posthouse/mesh"
)

func TestAMailboxIsCalledFullFromTheFirstRefusalUntilThereIsRoom(t *testing.T) {
	var told atomic.Int32
	quota := int64(80 << 10)
	w := newWorld(t, mailstore.Options{Quota: func(mesh.MailboxID) int64 { return quota }, Fuller: func() { told.Add(1) }})
	w.create(1)
	w.create(2)
	deliver := func(size int, box byte) string {
		rs, err := w.s.Deliver(t.Context(), w.delivery(w.newID(), text(strings.Repeat("0123456\r\n", size/18)), box))
		if err != nil {
			t.Fatal(err)
		}
		return outcomes(rs)
	}
	one := boxID(1)
	for range 3 {
		if o := deliver(20<<10, 1); o != "delivered" {
			t.Fatal(o)
		}
	}
	if o := deliver(60<<10, 1); o != "deferred" {
		t.Fatal(o)
	}
	if w.s.IsFull(one) || len(w.s.Full()) > 0 || told.Load() > 0 {
		t.Fatal("a mailbox that has no room for one large message is called full")
	}
	for deliver(4<<10, 1) == "delivered" {
	}
	if full := w.s.Full(); !w.s.IsFull(one) || len(full) != 1 || full[0] != one || told.Load() != 1 {
		t.Fatalf("full: %v, told %d times", full, told.Load())
	}
	if o := deliver(4<<10, 2); o != "delivered" || w.s.IsFull(boxID(2)) {
		t.Fatal("the other mailbox is concerned")
	}
	quota += 1 << 10
	if len(w.s.Full()) != 1 {
		t.Fatal("a little more room ends it")
	}
	was := told.Load()
	f := w.folder(1, "INBOX")
	if _, _, err := f.SetFlags(t.Context(), []mailstore.UID{1}, mailstore.FlagsAdd, []mailstore.Flag{`\Deleted`}, 0); err != nil {
		t.Fatal(err)
	}
	if _, err := f.Expunge(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	if told.Load() == was {
		t.Fatal("nobody was told of the room")
	}
	if len(w.s.Full()) != 0 || w.s.IsFull(one) {
		t.Fatal("full, and there is room")
	}
}
