package mailstore_test

import (
	"context"
	"testing"
	"time"

	"posthouse/mailstore"
	"posthouse/transport"
)

func TestACrashWithWorkUnderWayKeepsWhatWasToldAndDoublesNothing(t *testing.T) {
	w := newWorld(t, mailstore.Options{})
	w.create(1)
	w.create(2)
	var all []transport.MessageID
	told := map[transport.MessageID]bool{}
	shown := mailstore.UID(0)
	for round := range 12 {
		var last *mailstore.Pending
		for range 20 {
			id := w.newID()
			all = append(all, id)
			p, err := w.s.StartDelivery(t.Context(), w.delivery(id, text(id.String()), 1, 2))
			if err != nil {
				t.Fatal(err)
			}
			last = p
			if len(all)%3 == 0 {
				if _, err := p.Synced(t.Context()); err != nil {
					t.Fatal(err)
				}
				told[id] = true
			}
		}
		if round%4 == 0 {
			if _, err := last.Applied(t.Context()); err != nil {
				t.Fatal(err)
			}
			st, _ := w.folder(1, "INBOX").Status()
			shown = st.UIDNext - 1
		}
		w.crash(round%3 == 0)
		for id := range told {
			for n := byte(1); n <= 2; n++ {
				if is, err := w.s.Delivered(id, boxID(n)); err != nil || !is {
					t.Fatalf("round %d: %s was told to be in %d: %v %v", round, id, n, is, err)
				}
			}
		}
		st, _ := w.folder(1, "INBOX").Status()
		if st.UIDNext <= shown {
			t.Fatalf("UIDNEXT %d after UID %d was shown", st.UIDNext, shown)
		}
		one, _ := w.folder(2, "INBOX").Status()
		if one.Messages != st.Messages {
			t.Fatalf("one record, but %d and %d copies", st.Messages, one.Messages)
		}
	}
	for _, id := range all { // the senders try everything again
		rs, err := w.s.Deliver(t.Context(), w.delivery(id, text(id.String()), 2, 1))
		if err != nil || outcomes(rs) != "delivered delivered" {
			t.Fatal(rs, err)
		}
	}
	seen := map[string]int{}
	f := w.folder(1, "INBOX")
	_, infos, err := f.List()
	if err != nil {
		t.Fatal(err)
	}
	for _, i := range infos {
		m, err := f.Message(i.UID)
		if err != nil {
			t.Fatal(err)
		}
		seen[m.Structure.Envelope.Subject]++
	}
	for _, id := range all {
		if seen[id.String()] != 1 {
			t.Errorf("%d copies of %s", seen[id.String()], id)
		}
	}
	w.sameAfterReplay(1, 2)
}

func TestACallerThatLeavesDoesNotHoldOthersUp(t *testing.T) {
	w := newWorld(t, mailstore.Options{})
	mb := w.create(1)
	for i := range 20 {
		ctx, cancel := context.WithTimeout(t.Context(), time.Duration(i)*10*time.Microsecond)
		mb.CreateFolder(ctx, "a", "")
		w.folder(1, "INBOX").Append(ctx, []mailstore.AppendMessage{{Draft: w.draft(text("x")), Structure: structure(text("x"))}})
		mb.DeleteFolder(ctx, "a")
		cancel()
	}
	if err := mb.CreateFolder(t.Context(), "b", ""); err != nil {
		t.Fatal(err)
	}
	w.sameAfterReplay(1)
}

func TestADeliveryThatMakesNoSenseIsRefused(t *testing.T) {
	w := newWorld(t, mailstore.Options{})
	w.create(1)
	for name, spoil := range map[string]func(*mailstore.Delivery){
		"no id":           func(d *mailstore.Delivery) { d.Envelope.ID = transport.MessageID{} },
		"no body":         func(d *mailstore.Delivery) { d.Draft = nil },
		"no structure":    func(d *mailstore.Delivery) { d.Structure = nil },
		"an open trace":   func(d *mailstore.Delivery) { d.Trace = []byte("Received: x") },
		"a trace and end": func(d *mailstore.Delivery) { d.Trace = []byte("Received: x\r\n\r\n") },
	} {
		d := w.delivery(w.newID(), text("x"), 1)
		spoil(d)
		if _, err := w.s.Deliver(t.Context(), d); err == nil {
			t.Errorf("%s: taken", name)
		}
	}
}
