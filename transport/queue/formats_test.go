package queue

import (
	"context"
	"flag"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"posthouse/mailstore/log"
	"posthouse/transport"
)

var update = flag.Bool("update", false, "rewrite testdata; never for a version that was shipped")

// What version 1 wrote must open for ever.
func TestFormatsOfVersion1Open(t *testing.T) {
	res := transport.Result{Outcome: transport.Deferred, Code: 452, Enhanced: "4.2.2", Text: "full", By: "plzen"}
	at := stamp{Q: 5 * time.Minute, W: 1795000000}
	accept := &acceptMeta{V: 1, Envelope: transport.Envelope{ID: msgID(7), From: anna, Origin: transport.OriginSubmission, EntryNode: self,
		EntryTime: time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC)},
		Legs:  []acceptLeg{{Dest: local, Rcpts: []transport.Recipient{user(bob)}}, {Dest: toFar, Rcpts: []transport.Recipient{far("x@far.example")}}},
		Stamp: at, Once: true, Keeper: plzen, Expands: []notice{{Rcpt: far("all@ours.example"), List: true}}}
	leg := &legMeta{V: 1, Seq: 9, Dest: toPlzen, Stamp: at, Changes: []change{
		{N: 1, State: Waiting, Due: time.Hour, Attempts: 2, Moved: 1, Delayed: true, Last: &res, To: &toBrno},
		{N: 2, State: Released, Node: brno, Add: owesFinal, Clear: owesDelayed, Forget: true}}}
	legRow := &row{Ref: log.Ref{Segment: 1, Offset: 2, Seq: 3, CRC: 4}, ID: msgID(7), From: anna, Origin: transport.OriginSubmission, Size: 5,
		Accepted: at.Q, Wall: at.W, Keeper: plzen, Rcpts: []rcpt{{N: 1, R: user(bob), State: Kept, Due: time.Hour, Last: res}}}
	q := &Queue{policy: Policy{}.withDefaults()}
	for name, x := range map[string]struct {
		want, got any
		encode    func() ([]byte, error)
		decode    func(b []byte, v any) error
	}{
		"accept": {accept, &acceptMeta{}, func() ([]byte, error) { return encMode.Marshal(accept) }, decMode.Unmarshal},
		"leg":    {leg, &legMeta{}, func() ([]byte, error) { return encMode.Marshal(leg) }, decMode.Unmarshal},
		"row": {legRow, &row{}, func() ([]byte, error) { return q.encodeRow(local, legRow) }, func(b []byte, v any) error {
			r, err := q.readRow(local, 1, b)
			if err == nil {
				*v.(*row) = *r
			}
			return err
		}},
	} {
		t.Run(name, func(t *testing.T) {
			file := filepath.Join("testdata", "v1", name)
			if *update {
				b, err := x.encode()
				if err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(file, b, 0o644); err != nil {
					t.Fatal(err)
				}
			}
			b, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if err := x.decode(b, x.got); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(x.want, x.got, cmp.AllowUnexported(row{}), cmpopts.EquateEmpty(), cmpopts.IgnoreUnexported(log.Ref{}),
				cmpopts.IgnoreFields(log.Ref{}, "_")); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestALegWithThousandsOfRecipientsFitsTheView(t *testing.T) {
	w := newWorld(t)
	w.start()
	var rs []transport.Recipient
	for i := range 10000 {
		r := user(anna)
		r.Mailbox[14], r.Mailbox[15] = byte(i>>8), byte(i)
		rs = append(rs, r)
	}
	id := w.accept(1, anna, transport.OriginSubmission, one(local, rs...))
	// What comes after it in the log is applied after it.
	if err := w.j.Append(log.Entry{Kind: log.KindSeen}).Applied(t.Context()); err != nil {
		t.Fatal(err)
	}
	w.crash()
	w.start() // and comes back from it
	done := make(chan struct{})
	w.carry(local, carrier(func(ctx context.Context, d transport.Destination, src transport.Source) error {
		l, err := src.Next(ctx)
		if err != nil {
			return err
		}
		if len(l.Rcpts) != len(rs) {
			t.Errorf("%d recipients", len(l.Rcpts))
		}
		src.Finish(l, all(len(l.Rcpts), transport.Result{Outcome: transport.Delivered}))
		close(done)
		return nil
	}))
	<-done
	if err := w.q.applied(t.Context(), legName{local, uint64(id)}); err != nil {
		t.Fatal(err)
	}
	w.crash()
	w.start()
	want(t, w.left(), "")
	w.stop()
}
