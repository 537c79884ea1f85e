package election

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"posthouse/mesh"
)

// ledger is a small machine: a command is "id text"; "admit NODE PRIORITY" and
// "revoke NODE" change the members.
type ledger struct {
	mu   sync.Mutex
	v    ledgerState
	f    func()
	know bool          // what "future" means
	slow time.Duration // a command takes so long
}

type ledgerState struct {
	Index, Term uint64
	Lines       []Command
	Members     map[string]Member
}

var errFuture = errors.New("it was made by version 2")

func newLedger() *ledger { return &ledger{v: ledgerState{Members: map[string]Member{}}} }

func (m *ledger) Prepare(c []byte, _ mesh.NodeID, _ time.Time) ([]byte, error) {
	if !strings.Contains(string(c), " ") {
		return nil, errors.New("that is no command")
	}
	return c, nil
}

func (m *ledger) Apply(index, term uint64, c []byte) ([]byte, error) {
	id, text, _ := strings.Cut(string(c), " ")
	time.Sleep(m.slow)
	m.mu.Lock()
	defer m.mu.Unlock()
	if index <= m.v.Index {
		return nil, fmt.Errorf("index %d after %d", index, m.v.Index)
	}
	if text == "future" && !m.know {
		return nil, errFuture
	}
	m.v.Index, m.v.Term = index, term
	for _, l := range m.v.Lines {
		if l.Actor == id {
			return []byte(fmt.Sprint("again ", l.Index)), nil
		}
	}
	m.v.Lines = append(m.v.Lines, Command{Index: index, Actor: id, Text: text})
	var who string
	var prio int
	if n, _ := fmt.Sscanf(text, "admit %s %d", &who, &prio); n == 2 {
		id, _ := mesh.ParseNodeID(who)
		m.v.Members[who] = Member{ID: id, Name: "n" + strings.TrimLeft(who, "0"), Voter: prio >= 0, Priority: prio}
	}
	if n, _ := fmt.Sscanf(text, "revoke %s", &who); n == 1 {
		delete(m.v.Members, who)
	}
	if m.f != nil {
		m.f()
	}
	return []byte(fmt.Sprint("line ", len(m.v.Lines))), nil
}

func (m *ledger) Applied() (uint64, uint64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.v.Index, m.v.Term
}

type blob []byte

func (b blob) WriteTo(w io.Writer) (int64, error) { n, err := w.Write(b); return int64(n), err }

func (m *ledger) Snapshot() io.WriterTo {
	m.mu.Lock()
	defer m.mu.Unlock()
	b, _ := json.Marshal(m.v)
	return blob(b)
}

func (m *ledger) Restore(r io.Reader) error {
	var v ledgerState
	if err := json.NewDecoder(r).Decode(&v); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.v = v
	return nil
}

func (m *ledger) members() []Member {
	m.mu.Lock()
	defer m.mu.Unlock()
	out := slices.Collect(maps.Values(m.v.Members))
	slices.SortFunc(out, func(a, b Member) int { return strings.Compare(a.Name, b.Name) })
	return out
}

func (m *ledger) since(i uint64) (out []Command) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, l := range m.v.Lines {
		if l.Index > i {
			out = append(out, l)
		}
	}
	return out
}

func (m *ledger) text() string {
	m.mu.Lock()
	defer m.mu.Unlock()
	var b strings.Builder
	for _, l := range m.v.Lines {
		fmt.Fprintf(&b, "%d %s %s\n", l.Index, l.Actor, l.Text)
	}
	return b.String()
}

// world is a mesh of nodes in a bubble.
type world struct {
	t     *testing.T
	net   *simNet
	nodes map[mesh.NodeID]*node
	n     int
	// vetted is what nodes are started with.
	vetted chan struct{}
}

type node struct {
	*Election
	w     *world
	id    mesh.NodeID
	host  *simHost
	m     *ledger
	store Storage
	stop  context.CancelFunc
	ended chan error
}

func newWorld(t *testing.T) *world {
	return &world{t: t, net: newSimNet(), nodes: map[mesh.NodeID]*node{}}
}

func (w *world) start(id mesh.NodeID, store Storage) *node {
	w.t.Helper()
	n := &node{w: w, id: id, m: newLedger(), store: store, ended: make(chan error, 1)}
	n.host = w.net.host(id)
	log := slog.New(slog.DiscardHandler)
	if testing.Verbose() {
		log = slog.New(slog.NewTextHandler(w.t.Output(), &slog.HandlerOptions{Level: slog.LevelInfo})).With("node", id)
	}
	e, err := New(Config{Self: id, TakeBack: 10 * time.Second}, Deps{Machine: n.m, Storage: store, Network: n.host, Forward: n.host, Members: n.m.members,
		Reached: func(to mesh.NodeID) bool { return w.net.open(id, to) }, Since: n.m.since, Vetted: w.vetted, Blank: func() Machine { return newLedger() }, Rand: rand.Reader, Logger: log})
	if err != nil {
		w.t.Fatal(err)
	}
	n.Election = e
	n.m.f = e.Kick
	w.net.mu.Lock()
	n.host.e = e
	w.net.mu.Unlock()
	ctx, stop := context.WithCancel(context.Background())
	n.stop = stop
	go func() { n.ended <- e.Run(ctx) }()
	w.nodes[id] = n
	return n
}

// shut ends a node's election in good order.
func (n *node) shut() {
	n.w.t.Helper()
	n.stop()
	if err := <-n.ended; err != nil {
		n.w.t.Errorf("node %s ended: %v", n.id, err)
	}
	n.host.down()
	delete(n.w.nodes, n.id)
}

func (w *world) end() {
	for _, id := range slices.Sorted(maps.Keys(w.nodes)) {
		w.nodes[id].shut()
	}
	time.Sleep(time.Minute) // what dies of silence has gone
}

func (n *node) say(format string, args ...any) string {
	n.w.t.Helper()
	r, err := n.attempt(format, args...)
	if err != nil {
		n.w.t.Fatalf("at %s: %v", n.id, err)
	}
	return r
}

func (n *node) attempt(format string, args ...any) (string, error) {
	n.w.n++
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	r, err := n.Propose(ctx, fmt.Appendf(nil, "c%d %s", n.w.n, fmt.Sprintf(format, args...)))
	return string(r), err
}

// found starts a mesh of count nodes with equal priority, node 1 founding it.
func (w *world) found(count int, store func(mesh.NodeID) Storage) *node {
	w.t.Helper()
	first := w.start(1, store(1))
	if _, err := first.Bootstrap(context.Background()); err != nil {
		w.t.Fatal(err)
	}
	first.say("admit %s 0", first.id)
	for i := 2; i <= count; i++ {
		n := w.start(mesh.NodeID(i), store(mesh.NodeID(i)))
		first.say("admit %s 0", n.id)
	}
	ids := slices.Sorted(maps.Keys(w.nodes))
	w.until(time.Minute, "all votes are given", func() bool {
		for _, n := range w.nodes {
			if s := n.State(); len(s.Voters) != target(count) || len(s.Others) != count-target(count) {
				return false
			}
		}
		return w.equal(ids...)
	})
	return first
}

func inMemory(mesh.NodeID) Storage { return NewMemStorage() }

// until waits in virtual time for what must come true.
func (w *world) until(limit time.Duration, what string, f func() bool) time.Duration {
	w.t.Helper()
	from := time.Now()
	for !f() {
		if time.Since(from) > limit {
			for _, n := range w.nodes {
				s := n.State()
				w.t.Logf("%s: master %s term %d gen %d role %s voters %v others %v applied %d stopped %q", n.id, s.Master, s.Authority.Term, s.Authority.Generation, s.Role, s.Voters, s.Others, s.Applied, s.Stopped)
			}
			w.t.Fatalf("not within %v: %s", limit, what)
		}
		time.Sleep(50 * time.Millisecond)
	}
	return time.Since(from)
}

func (w *world) master(among ...mesh.NodeID) *node {
	for _, id := range among {
		if n := w.nodes[id]; n != nil {
			if _, ok := n.Acting(); ok {
				return n
			}
		}
	}
	return nil
}

func (w *world) equal(ids ...mesh.NodeID) bool {
	first := w.nodes[ids[0]].m.text()
	for _, id := range ids[1:] {
		if w.nodes[id].m.text() != first {
			return false
		}
	}
	return true
}

func bubble(t *testing.T, f func(t *testing.T, w *world)) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.end()
		f(t, w)
	})
}

func (w *world) isolate(id mesh.NodeID, cut bool) {
	for other := range w.nodes {
		if other != id {
			w.net.cut(id, other, cut)
		}
	}
}
