package queue

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/fxamacker/cbor/v2"

	"posthouse/mailstore/journal"
	"posthouse/mailstore/journal/journaltest"
	"posthouse/mailstore/log"
	"posthouse/mailstore/mime"
	"posthouse/mesh"
	"posthouse/transport"
)

const (
	self  mesh.NodeID = 1
	plzen mesh.NodeID = 2
	brno  mesh.NodeID = 3
)

var (
	local   = transport.Destination{Scope: transport.ScopeLocal}
	toPlzen = transport.Destination{Scope: transport.ScopeNode, Node: plzen}
	toBrno  = transport.Destination{Scope: transport.ScopeNode, Node: brno}
	toFar   = transport.Destination{Scope: transport.ScopeOutside, Domain: "far.example"}
	gateway = transport.Destination{Scope: transport.ScopeGateway}
)

// deliverMeta is the DELIVER record of the tests' mailstore.
type deliverMeta struct {
	ID        transport.MessageID
	LegSeq    uint64
	Mailboxes []mesh.MailboxID
}

// carrier is a transport.Carrier made of a function for each leg.
type carrier func(ctx context.Context, dest transport.Destination, src transport.Source) error

func (c carrier) Carry(ctx context.Context, d transport.Destination, s transport.Source) error {
	return c(ctx, d, s)
}

// eachLeg makes a carrier that answers legs one at a time; a nil answer drops
// the connection.
func eachLeg(f func(l *transport.Leg) []transport.Result) carrier {
	return func(ctx context.Context, _ transport.Destination, src transport.Source) error {
		for {
			l, err := src.Next(ctx)
			if err == io.EOF {
				return nil
			}
			if err != nil {
				return err
			}
			rs := f(l)
			if rs == nil {
				return fmt.Errorf("connection lost")
			}
			src.Finish(l, rs)
		}
	}
}

func all(n int, r transport.Result) []transport.Result {
	rs := make([]transport.Result, n)
	for i := range rs {
		rs[i] = r
	}
	return rs
}

// world is one node's queue on a disk that survives.
type world struct {
	t    testing.TB
	disk *journaltest.Disk
	j    *journal.Journal
	q    *Queue
	stop func()

	mu       sync.Mutex
	carriers map[transport.Destination]carrier
	routes   map[string]transport.Destination
	members  map[mesh.NodeID]bool
	events   []string
	policy   Policy
	full     func(transport.Destination, mesh.MailboxID) bool
	seen     atomic.Bool
	nobody   string   // an address that leads nowhere
	inbox    []string // what the fake mailstore has: "mailbox id"
}

func newWorld(t testing.TB) *world {
	disk := journaltest.NewDisk(t)
	disk.Options.Log.Patience = -1 // what these tests do takes no time
	return &world{t: t, disk: disk, carriers: map[transport.Destination]carrier{},
		routes: map[string]transport.Destination{}, members: map[mesh.NodeID]bool{self: true, plzen: true, brno: true}}
}

type seeded struct{ r *rand.ChaCha8 }

func (s seeded) Read(p []byte) (int, error) { return s.r.Read(p) }

func (w *world) deps() Deps {
	return Deps{
		Self: self,
		Seen: func(transport.Destination) bool { return w.seen.Load() },
		Carrier: func(d transport.Destination) transport.Carrier {
			w.mu.Lock()
			defer w.mu.Unlock()
			if c := w.carriers[d]; c != nil {
				return c
			}
			return nil
		},
		Route: func(r *transport.Recipient) (transport.Destination, bool) {
			w.mu.Lock()
			defer w.mu.Unlock()
			d, ok := w.routes[r.Address]
			return d, ok && d.Scope == 0
		},
		Resolve: func(_ *transport.Envelope, a string) []Leg {
			w.mu.Lock()
			defer w.mu.Unlock()
			if a == w.nobody {
				return nil
			}
			if !strings.HasSuffix(a, "@ours.example") {
				return []Leg{{Dest: toFar, Rcpts: []transport.Recipient{{Address: a}}}}
			}
			return []Leg{{Dest: local, Rcpts: []transport.Recipient{user(a)}}}
		},
		Domain: func(a string) transport.Destination {
			return transport.Destination{Scope: transport.ScopeOutside, Domain: a[strings.LastIndexByte(a, '@')+1:]}
		},
		Member: func(n mesh.NodeID) bool { w.mu.Lock(); defer w.mu.Unlock(); return w.members[n] },
		Decode: func(meta []byte) (d Delivered, err error) {
			var m deliverMeta
			err = cbor.Unmarshal(meta, &m)
			return Delivered(m), err
		},
		Host:       func() string { return "praha.ours.example" },
		Postmaster: func() string { return "postmaster@ours.example" },
		Event: func(e Event) {
			w.mu.Lock()
			defer w.mu.Unlock()
			w.events = append(w.events, fmt.Sprintf("%s %s %s", e.What, e.Recipient, e.Result.Text))
		},
		Full:   w.full,
		Rand:   seeded{rand.NewChaCha8([32]byte{1})},
		Policy: w.policy,
	}
}

// start opens the disk and runs the queue; end it by close, crash or the test.
func (w *world) start() {
	w.t.Helper()
	w.j = w.disk.Open(w.t)
	w.q = New(w.j, w.deps())
	if err := w.j.Start(context.Background()); err != nil {
		w.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	q := w.q
	go func() { defer close(done); q.Run(ctx) }()
	w.stop = func() { cancel(); <-done }
}

func (w *world) crash() {
	w.stop()
	w.disk.Crash(w.t)
}

func user(a string) transport.Recipient {
	r := transport.Recipient{Address: a}
	copy(r.Mailbox[:], a)
	return r
}

func (w *world) carry(d transport.Destination, c carrier) {
	w.mu.Lock()
	w.carriers[d] = c
	w.mu.Unlock()
	w.q.Wake(d)
}

// lives has the directory say where a user is at home; the zero destination:
// nowhere.
func (w *world) lives(a string, at transport.Destination) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.routes[a] = at
}

func (w *world) draft(text string) *log.Draft {
	d := w.j.NewDraft()
	io.WriteString(d, text)
	if err := d.Seal(context.Background()); err != nil {
		w.t.Fatal(err)
	}
	return d
}

func structure(t testing.TB, d *log.Draft) *mime.Structure {
	r, err := d.Open()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	s, err := mime.Parse(r, d.Size())
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func msgID(n int) (id transport.MessageID) {
	binary.BigEndian.PutUint64(id[:], uint64(n))
	return id
}

func (w *world) accept(n int, from string, origin transport.Origin, legs ...Leg) ID {
	w.t.Helper()
	body := w.draft(fmt.Sprintf("Subject: %d\r\n\r\nbody %d\r\n", n, n))
	m := &Message{
		Envelope:  transport.Envelope{ID: msgID(n), From: from, Origin: origin, EntryTime: time.Now()},
		Body:      body,
		Structure: structure(w.t, body),
	}
	id, err := w.q.Accept(context.Background(), m, legs)
	if err != nil {
		w.t.Fatal(err)
	}
	return id
}

// mailstore is a delivery carrier that writes DELIVER records like the real
// one, with its deduplication. answer may be nil.
func (w *world) mailstore(answer func(l *transport.Leg, r *transport.Recipient) *transport.Result) carrier {
	return eachLeg(func(l *transport.Leg) []transport.Result {
		rs := make([]transport.Result, len(l.Rcpts))
		m := deliverMeta{ID: l.Envelope.ID, LegSeq: l.Seq}
		w.mu.Lock()
		for i := range l.Rcpts {
			if answer != nil {
				if r := answer(l, &l.Rcpts[i]); r != nil {
					rs[i] = *r
					continue
				}
			}
			rs[i] = transport.Result{Outcome: transport.Delivered}
			line := l.Rcpts[i].Address + " " + l.Envelope.ID.String()[12:16]
			if l.Envelope.Origin == transport.OriginLocal {
				line = l.Rcpts[i].Address + " report"
			}
			if !slices.Contains(w.inbox, line+" "+l.Envelope.ID.String()) {
				w.inbox = append(w.inbox, line+" "+l.Envelope.ID.String())
				m.Mailboxes = append(m.Mailboxes, l.Rcpts[i].Mailbox)
			}
		}
		w.mu.Unlock()
		if len(m.Mailboxes) > 0 {
			b, _ := cbor.Marshal(m)
			if err := w.j.Append(log.Entry{Kind: log.KindDeliver, Meta: b}).Applied(context.Background()); err != nil {
				return nil
			}
		}
		return rs
	})
}

// boxes returns what the mailboxes hold, without ids.
func (w *world) boxes() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	out := []string{}
	for _, s := range w.inbox {
		out = append(out, s[:strings.LastIndexByte(s, ' ')])
	}
	return out
}

// empty reports whether nothing at all is left, in memory and on disk.
func (w *world) left() string {
	var b strings.Builder
	w.j.View().Scan([]byte("q/"), nil, func(k, v []byte) bool {
		if p := string(k[:3]); p == preLeg || p == preMsg || p == preMore {
			fmt.Fprintf(&b, "%q ", k)
		}
		return true
	})
	w.q.mu.Lock()
	defer w.q.mu.Unlock()
	for k, d := range w.q.dests {
		if d.rows != 0 || d.counts != (Counts{}) || d.bytes != 0 {
			fmt.Fprintf(&b, "%s: %d rows %+v; ", k, d.rows, d.counts)
		}
	}
	if len(w.q.busy)+len(w.q.owed)+len(w.q.fresh)+len(w.q.kept)+len(w.q.finals) > 0 {
		fmt.Fprintf(&b, "busy %v owed %v fresh %d kept %v finals %v", w.q.busy, w.q.owed, len(w.q.fresh), w.q.kept, w.q.finals)
	}
	return b.String()
}
