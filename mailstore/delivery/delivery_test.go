package delivery_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"posthouse/mailstore"
	"posthouse/mailstore/delivery"
	"posthouse/mailstore/journal"
	"posthouse/mailstore/journal/journaltest"
	"posthouse/mailstore/kv"
	"posthouse/mailstore/log"
	"posthouse/mailstore/mime"
	"posthouse/mesh"
	"posthouse/transport"
)

// accepts stands for the queue: it writes ACCEPT records and hands them out.
type accepts struct {
	j *journal.Journal

	mu      sync.Mutex
	refs    map[uint64]log.Ref
	legs    []*transport.Leg
	next    int
	results map[uint64][]transport.Result
	order   []uint64
	open    chan struct{} // nil: Next gives io.EOF at the end; else it waits
}

func (a *accepts) Apply(r log.Record, _ *kv.Batch, _ bool) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.refs[r.Seq] = r.Ref
	return nil
}

func (a *accepts) Next(ctx context.Context) (*transport.Leg, error) {
	a.mu.Lock()
	if a.next < len(a.legs) {
		defer a.mu.Unlock()
		a.next++
		return a.legs[a.next-1], nil
	}
	open := a.open
	a.mu.Unlock()
	if open == nil {
		return nil, io.EOF
	}
	select {
	case <-open:
		return nil, io.EOF
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

func (a *accepts) Finish(leg *transport.Leg, rs []transport.Result) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.results[leg.Seq] = rs
	a.order = append(a.order, leg.Seq)
}

type stored struct {
	transport.Body
	ref log.Ref
	st  *mime.Structure
}

func (s *stored) Ref() log.Ref               { return s.ref }
func (s *stored) Structure() *mime.Structure { return s.st }

func (a *accepts) accept(t *testing.T, n int, from string, boxes ...byte) *transport.Leg {
	t.Helper()
	text := fmt.Sprintf("Subject: %d\r\n\r\nbody\r\n", n)
	d := a.j.NewDraft()
	io.WriteString(d, text)
	if err := d.Seal(t.Context()); err != nil {
		t.Fatal(err)
	}
	st, err := mime.Parse(strings.NewReader(text), int64(len(text)))
	if err != nil {
		t.Fatal(err)
	}
	tk := a.j.Append(log.Entry{Kind: log.KindAccept, Meta: []byte{1}, Body: d})
	if err := tk.Applied(t.Context()); err != nil {
		t.Fatal(err)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	ref := a.refs[tk.First()]
	leg := &transport.Leg{
		Seq: tk.First(), Dest: local,
		Envelope: transport.Envelope{ID: transport.MessageID{0: byte(n), 1: byte(n >> 8), 15: 1}, From: from},
		Body:     &stored{a.j.Body(ref), ref, st},
	}
	for _, b := range boxes {
		leg.Rcpts = append(leg.Rcpts, transport.Recipient{Mailbox: mesh.MailboxID{0: b}})
	}
	a.legs = append(a.legs, leg)
	return leg
}

var local = transport.Destination{Scope: transport.ScopeLocal}

func setUp(t *testing.T, opt mailstore.Options, boxes ...byte) (*accepts, *mailstore.Store) {
	t.Helper()
	j := journaltest.NewDisk(t).Open(t)
	s := mailstore.New(j, opt)
	a := &accepts{j: j, refs: map[uint64]log.Ref{}, results: map[uint64][]transport.Result{}}
	j.Register(a, log.KindAccept)
	if err := j.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, b := range boxes {
		if err := s.Create(t.Context(), mesh.MailboxID{0: b}, 0); err != nil {
			t.Fatal(err)
		}
	}
	return a, s
}

func subjects(t *testing.T, s *mailstore.Store, box byte) (out []string) {
	t.Helper()
	mb, err := s.Mailbox(mesh.MailboxID{0: box})
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
		out = append(out, m.Structure.Envelope.Subject)
	}
	return out
}

func TestEachMailboxGetsItsMailInTheOrderOfTheQueue(t *testing.T) {
	a, s := setUp(t, mailstore.Options{}, 1, 2)
	var want []string
	for n := range 500 {
		a.accept(t, n, "ada@example.net", byte(1+n%2), 1, 9)
		want = append(want, fmt.Sprint(n))
	}
	c := delivery.New(delivery.Config{Window: 32, Name: func() string { return "plzen" }}, s)
	for range 2 { // the second time everything is a repeat
		a.next = 0
		if err := c.Carry(t.Context(), local, a); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, subjects(t, s, 1)); diff != "" {
			t.Fatal(diff)
		}
	}
	if n := len(subjects(t, s, 2)); n != 250 {
		t.Fatal(n)
	}
	for seq, rs := range a.results {
		if rs[0].Outcome != transport.Delivered || rs[0].By != "plzen" || rs[1].Outcome != transport.Delivered || rs[2].Outcome != transport.Moved {
			t.Fatal(seq, rs)
		}
	}
}

func TestTheRecordNamesTheLegThatItEnds(t *testing.T) {
	a, s := setUp(t, mailstore.Options{}, 1, 2)
	var got []mailstore.Delivered
	watch := engine(func(r log.Record) error {
		d, err := mailstore.DecodeDelivered(r.Meta)
		got = append(got, d)
		return err
	})
	a.j.Register(watch, log.KindDeliver)
	leg := a.accept(t, 7, "ada@example.net", 2, 9, 1)
	if err := delivery.New(delivery.Config{}, s).Carry(t.Context(), local, a); err != nil {
		t.Fatal(err)
	}
	want := []mailstore.Delivered{{ID: leg.Envelope.ID, LegSeq: leg.Seq, Mailboxes: []mesh.MailboxID{{0: 1}, {0: 2}}}}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Fatal(diff)
	}
}

type engine func(log.Record) error

func (e engine) Apply(r log.Record, _ *kv.Batch, _ bool) error { return e(r) }

func TestAFullMailboxHoldsOnlyItsOwnMail(t *testing.T) {
	full := mesh.MailboxID{0: 1}
	a, s := setUp(t, mailstore.Options{Quota: func(m mesh.MailboxID) int64 {
		if m == full {
			return 10
		}
		return 0
	}}, 1, 2)
	first := a.accept(t, 1, "ada@example.net", 1, 2)
	second := a.accept(t, 2, "ada@example.net", 2, 1)
	if err := delivery.New(delivery.Config{}, s).Carry(t.Context(), local, a); err != nil {
		t.Fatal(err)
	}
	if r := a.results[first.Seq]; r[0].Enhanced != "4.2.2" || r[1].Outcome != transport.Delivered {
		t.Fatal(r)
	}
	if r := a.results[second.Seq]; r[0].Outcome != transport.Delivered || r[1].Outcome != transport.Deferred {
		t.Fatal(r)
	}
}

func TestAMessageThatCannotBeReadDoesNotStopTheOthers(t *testing.T) {
	a, s := setUp(t, mailstore.Options{}, 1)
	bad := a.accept(t, 1, "ada@example.net", 1)
	bad.Body.(*stored).ref.CRC++
	bad.Body.(*stored).st.Clean = false // so that its header has to be read
	good := a.accept(t, 2, "ada@example.net", 1)
	if err := delivery.New(delivery.Config{}, s).Carry(t.Context(), local, a); err != nil {
		t.Fatal(err)
	}
	if r := a.results[bad.Seq]; len(r) != 1 || r[0].Outcome != transport.Deferred {
		t.Fatal(r)
	}
	if r := a.results[good.Seq]; len(r) != 1 || r[0].Outcome != transport.Delivered {
		t.Fatal(r)
	}
}

func TestResultsComeWhileTheQueueStaysOpen(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, s := setUp(t, mailstore.Options{}, 1)
		a.open = make(chan struct{})
		leg := a.accept(t, 1, "ada@example.net", 1)
		ctx, cancel := context.WithCancelCause(t.Context())
		done := make(chan error)
		go func() { done <- delivery.New(delivery.Config{}, s).Carry(ctx, local, a) }()
		time.Sleep(10 * time.Millisecond) // the log holds the record back for company
		a.mu.Lock()
		if len(a.results[leg.Seq]) != 1 {
			t.Error("the result waits for the next leg")
		}
		a.mu.Unlock()
		cause := errors.New("drain")
		cancel(cause)
		if err := <-done; !errors.Is(err, cause) {
			t.Error(err)
		}
	})
}

func TestOtherDestinationsAreRefused(t *testing.T) {
	a, s := setUp(t, mailstore.Options{})
	if err := delivery.New(delivery.Config{}, s).Carry(t.Context(), transport.Destination{Scope: transport.ScopeGateway}, a); err == nil {
		t.Fatal("carried")
	}
}

func BenchmarkCarry4KiB(b *testing.B) {
	dir := b.TempDir()
	j, err := journal.Open(context.Background(), journal.Options{Log: log.Options{Dir: dir + "/log"}, View: kv.Options{Dir: dir + "/view"}})
	if err != nil {
		b.Fatal(err)
	}
	defer j.Close()
	s := mailstore.New(j, mailstore.Options{})
	a := &accepts{j: j, refs: map[uint64]log.Ref{}, results: map[uint64][]transport.Result{}}
	j.Register(a, log.KindAccept)
	if err := j.Start(context.Background()); err != nil {
		b.Fatal(err)
	}
	for n := range 32 {
		if err := s.Create(context.Background(), mesh.MailboxID{0: byte(n + 1)}, 0); err != nil {
			b.Fatal(err)
		}
	}
	text := "Subject: s\r\n\r\n" + strings.Repeat(strings.Repeat("y", 70)+"\r\n", 56)
	st, err := mime.Parse(strings.NewReader(text), int64(len(text)))
	if err != nil {
		b.Fatal(err)
	}
	d := j.NewDraft()
	io.WriteString(d, text)
	d.Seal(context.Background())
	tk := j.Append(log.Entry{Kind: log.KindAccept, Meta: []byte{1}, Body: d})
	if err := tk.Applied(context.Background()); err != nil {
		b.Fatal(err)
	}
	ref := a.refs[tk.First()]
	body := &stored{j.Body(ref), ref, st}
	b.ReportAllocs()
	b.ResetTimer()
	for n := range b.N {
		a.legs = append(a.legs, &transport.Leg{
			Seq: uint64(n + 1), Dest: local, Body: body,
			Envelope: transport.Envelope{ID: transport.MessageID{0: byte(n), 1: byte(n >> 8), 2: byte(n >> 16), 15: 1}, From: "ada@example.net"},
			Rcpts:    []transport.Recipient{{Mailbox: mesh.MailboxID{0: byte(1 + n%32)}}},
		})
	}
	if err := delivery.New(delivery.Config{}, s).Carry(context.Background(), local, a); err != nil {
		b.Fatal(err)
	}
}
