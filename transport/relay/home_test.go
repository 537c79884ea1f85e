package relay

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"posthouse/mailstore"
	"posthouse/mailstore/log"
	"posthouse/mailstore/log/simfs"
	"posthouse/mailstore/mime"
	"posthouse/mesh"
	"posthouse/transport"
	"posthouse/transport/queue"
)

var toHome = transport.Destination{Scope: transport.ScopeNode, Node: gw1}

func TestMessagesToOneMailboxShareTheWaitAndAreAnsweredInOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var got []byte
		w, o := homes(t, func(env transport.Envelope, _ transport.Recipient, _ string) transport.Result {
			got = append(got, env.ID[0])
			return transport.Result{Outcome: transport.Delivered}
		})
		w.nodes[gw1].syncTime = time.Second
		src := &legs{}
		for i := range byte(window) {
			src.legs = append(src.legs, &transport.Leg{Seq: uint64(i), Envelope: transport.Envelope{ID: transport.MessageID{i + 1}, EntryNode: origin, Origin: transport.OriginSubmission},
				Rcpts: []transport.Recipient{user("bob@ours.example")}, Body: text("Subject: x\r\n\r\nbody\r\n")})
		}
		at := time.Now()
		if err := o.r.Carry(t.Context(), toHome, src); err != nil {
			t.Fatal(err)
		}
		if d := time.Since(at); d != time.Second {
			t.Errorf("%v for %d messages, with a second for a sync", d, window)
		}
		if !slices.IsSorted(got) || len(got) != window || !slices.IsSorted(src.done) || len(src.done) != window {
			t.Errorf("started %v, answered %v", got, src.done)
		}
		o.kill()
		w.nodes[gw1].kill()
	})
}

// legs is a Source of legs that nobody defers.
type legs struct {
	legs []*transport.Leg
	done []uint64
}

func (l *legs) Next(context.Context) (*transport.Leg, error) {
	if len(l.legs) == 0 {
		return nil, io.EOF
	}
	x := l.legs[0]
	l.legs = l.legs[1:]
	return x, nil
}

func (l *legs) Finish(x *transport.Leg, _ []transport.Result) { l.done = append(l.done, x.Seq) }

// homeRun sends mail of three people to two mailboxes of one home, whose power
// fails or whose disk is full at a moment of the seed's choice, and checks that
// each message arrives once and in order.
func homeRun(t *testing.T, seed uint64) (refused bool) {
	dice := rand.New(rand.NewPCG(seed, 1))
	const each = 12
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, origin, gw1)
		h := w.nodes[gw1]
		h.store = new(mailstore.Store) // made by start
		h.disk.Mode, h.disk.Seed = simfs.Mode(dice.IntN(4)), seed
		h.disk.FS.SyncTime = time.Duration(dice.IntN(30)) * time.Millisecond
		for _, n := range []mesh.NodeID{origin, gw1} {
			w.nodes[n].start()
		}
		boxes := []string{"bob@ours.example", "cyril@ours.example"}
		for _, b := range boxes {
			if err := h.store.Create(t.Context(), user(b).Mailbox, 0); err != nil {
				t.Fatal(err)
			}
		}
		fault, at := dice.IntN(3), dice.IntN(60)
		if fault == 2 { // so much fits, with what the log has reserved: then no more
			h.disk.FS.SetFree(int64(dice.IntN(3000)))
			size := 1 + dice.IntN(40) // of the messages, in KiB
			w.pad = size << 10
		}
		sent := map[string][]string{} // by sender and mailbox, in order
		for i := range byte(3 * each) {
			from := fmt.Sprintf("s%d@ours.example", i%3)
			to := []transport.Recipient{user(boxes[dice.IntN(2)])}
			if dice.IntN(4) == 0 {
				to = []transport.Recipient{user(boxes[0]), user(boxes[1])}
			}
			w.nodes[origin].acceptFrom(i, from, toHome, to...)
			for _, r := range to {
				k := from + " " + r.Address
				sent[k] = append(sent[k], fmt.Sprint(i))
			}
			if int(i) == at%30 {
				switch fault {
				case 0:
					w.nodes[gw1].kill()
					time.Sleep(time.Duration(dice.IntN(5)) * time.Second)
					h.start()
				case 1:
					w.nodes[origin].kill()
					time.Sleep(time.Duration(dice.IntN(5)) * time.Second)
					w.nodes[origin].start()
				}
			}
			time.Sleep(time.Duration(dice.IntN(20)) * time.Millisecond)
		}
		time.Sleep(5 * time.Second)
		refused = h.j.Stats().NoSpace > 0
		h.disk.FS.SetFree(-1)
		w.nodes[origin].q.Room(toHome)
		time.Sleep(time.Hour)
		synctest.Wait()
		got := map[string][]string{}
		for _, b := range boxes {
			for _, l := range inbox(t, h.store, b) {
				got[l.from+" "+b] = append(got[l.from+" "+b], l.id)
			}
		}
		for k, want := range sent {
			if !slices.Equal(got[k], want) {
				t.Errorf("seed %d, fault %d: %s got %v, sent were %v", seed, fault, k, got[k], want)
			}
		}
		for _, bad := range w.quiet() {
			t.Errorf("seed %d, fault %d: %s", seed, fault, bad)
		}
		for _, n := range w.nodes {
			n.kill()
		}
	})
	return refused
}

// letter is a message that stands in a mailbox.
type letter struct {
	uid  mailstore.UID
	from string // the sender of its envelope
	id   string
}

// inbox returns what stands in the INBOX of an address, in order of the UIDs.
func inbox(t *testing.T, s *mailstore.Store, address string) (out []letter) {
	t.Helper()
	mb, err := s.Mailbox(user(address).Mailbox)
	if err != nil {
		t.Fatal(err)
	}
	f, err := mb.Folder("INBOX")
	if err != nil {
		t.Fatal(err)
	}
	_, infos, err := f.List()
	if err != nil {
		t.Fatal(err)
	}
	for _, i := range infos {
		m, err := f.Message(i.UID)
		if err != nil {
			t.Fatal(err)
		}
		r, err := m.Body.Open()
		if err != nil {
			t.Fatal(err)
		}
		text, err := io.ReadAll(r)
		r.Close()
		if err != nil {
			t.Fatal(err)
		}
		l := letter{uid: i.UID}
		_, rest, _ := strings.Cut(string(text), "Return-Path: <")
		l.from, rest, _ = strings.Cut(rest, ">")
		_, rest, _ = strings.Cut(rest, "Subject: ")
		l.id, _, _ = strings.Cut(rest, "\r\n")
		out = append(out, l)
	}
	return out
}

// acceptFrom is accept with a sender, and with text of the world's choice.
func (n *node) acceptFrom(id byte, from string, dest transport.Destination, rcpts ...transport.Recipient) {
	n.w.t.Helper()
	if err := n.tryAccept(id, from, dest, rcpts...); err != nil {
		n.w.t.Fatal(err)
	}
}

// tryAccept is acceptFrom at a node whose disk may fail.
func (n *node) tryAccept(id byte, from string, dest transport.Destination, rcpts ...transport.Recipient) error {
	d := n.j.NewDraft()
	fmt.Fprintf(d, "Subject: %d\r\n\r\n", id)
	d.Write(bytes.Repeat([]byte("0123456789abcd\r\n"), 1+n.w.pad/16))
	if err := d.Seal(context.Background()); err != nil {
		d.Discard()
		return err
	}
	_, err := n.q.Accept(context.Background(), &queue.Message{
		Envelope: transport.Envelope{ID: transport.MessageID{id, 1}, From: from, Origin: transport.OriginSubmission, EntryNode: n.id, EntryTime: time.Now()},
		Body:     d, Structure: walk(n.w.t, d)}, []queue.Leg{{Dest: dest, Rcpts: rcpts}})
	return err
}

func walk(t testing.TB, d *log.Draft) *mime.Structure {
	br, err := d.Open()
	if err != nil {
		t.Fatal(err)
	}
	defer br.Close()
	s, err := mime.Parse(br, d.Size())
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestMailToAHomeArrivesOnceAndInOrderWhateverFails(t *testing.T) {
	refused := 0
	for seed := range uint64(60) {
		if homeRun(t, seed) {
			refused++
		}
		if t.Failed() {
			return
		}
	}
	if refused < 5 {
		t.Errorf("the log refused something in %d runs only", refused)
	}
}
