package relay

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"posthouse/mailstore"
	"posthouse/mailstore/journal"
	"posthouse/mailstore/journal/journaltest"
	"posthouse/mailstore/log"
	"posthouse/mailstore/mime"
	"posthouse/mesh"
	"posthouse/transport"
	"posthouse/transport/queue"
)

// half is one direction of a buffered pipe with a bound.
type half struct {
	mu     sync.Mutex
	buf    []byte
	closed bool
	change chan struct{}
}

func (h *half) signal() { close(h.change); h.change = make(chan struct{}) }

type pipe struct {
	r, w     *half
	rate     int // bytes a second that Write takes; 0: no limit
	arrives  int // and that Read gives, with a deep buffer between
	mu       sync.Mutex
	rd, wd   time.Time
	closed   bool
	deadline chan struct{}
}

func newPipe() (*pipe, *pipe) {
	a, b := &half{change: make(chan struct{})}, &half{change: make(chan struct{})}
	return &pipe{r: a, w: b, deadline: make(chan struct{})}, &pipe{r: b, w: a, deadline: make(chan struct{})}
}

func (p *pipe) wait(h *half, read bool, ok func() bool) error {
	for {
		p.mu.Lock()
		closed, at, moved := p.closed, p.wd, p.deadline
		if read {
			at = p.rd
		}
		p.mu.Unlock()
		h.mu.Lock()
		good, change := ok(), h.change
		h.mu.Unlock()
		switch {
		case closed:
			return net.ErrClosed
		case good:
			return nil
		}
		var timer <-chan time.Time
		if !at.IsZero() {
			t := time.NewTimer(time.Until(at))
			defer t.Stop()
			timer = t.C
		}
		select {
		case <-change:
		case <-moved:
		case <-timer:
			return os.ErrDeadlineExceeded
		}
	}
}

func (p *pipe) Read(b []byte) (int, error) {
	if err := p.wait(p.r, true, func() bool { return len(p.r.buf) > 0 || p.r.closed }); err != nil {
		return 0, err
	}
	if p.arrives > 0 {
		time.Sleep(512 * time.Second / time.Duration(p.arrives))
	}
	p.r.mu.Lock()
	defer p.r.mu.Unlock()
	if len(p.r.buf) == 0 {
		return 0, io.EOF
	}
	if p.arrives > 0 {
		b = b[:min(len(b), 512)]
	}
	n := copy(b, p.r.buf)
	p.r.buf = p.r.buf[n:]
	p.r.signal()
	return n, nil
}

// Write takes bytes as fast as the line carries them.
func (p *pipe) Write(b []byte) (n int, err error) {
	for p.rate > 0 && n < len(b) {
		part := b[n:min(n+512, len(b))]
		takes := time.Duration(len(part)) * time.Second / time.Duration(p.rate)
		p.mu.Lock()
		left := time.Until(p.wd)
		if p.wd.IsZero() {
			left = takes
		}
		p.mu.Unlock()
		time.Sleep(min(takes, left))
		if left < takes {
			return n, os.ErrDeadlineExceeded
		}
		m, err := p.put(part)
		if n += m; err != nil {
			return n, err
		}
	}
	if p.rate > 0 {
		return n, nil
	}
	return p.put(b)
}

func (p *pipe) put(b []byte) (int, error) {
	if err := p.wait(p.w, false, func() bool { return len(p.w.buf) < 1<<20 || p.w.closed }); err != nil {
		return 0, err
	}
	p.w.mu.Lock()
	defer p.w.mu.Unlock()
	if p.w.closed {
		return 0, net.ErrClosed
	}
	p.w.buf = append(p.w.buf, b...)
	p.w.signal()
	return len(b), nil
}

func (p *pipe) Close() error {
	p.mu.Lock()
	if !p.closed {
		p.closed = true
		close(p.deadline)
		p.deadline = make(chan struct{})
	}
	p.mu.Unlock()
	for _, h := range []*half{p.r, p.w} {
		h.mu.Lock()
		h.closed = true
		h.signal()
		h.mu.Unlock()
	}
	return nil
}

func (p *pipe) set(t *time.Time, v time.Time) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	*t = v
	close(p.deadline)
	p.deadline = make(chan struct{})
	return nil
}

func (p *pipe) SetReadDeadline(t time.Time) error  { return p.set(&p.rd, t) }
func (p *pipe) SetWriteDeadline(t time.Time) error { return p.set(&p.wd, t) }
func (p *pipe) SetDeadline(t time.Time) error      { return errors.Join(p.set(&p.rd, t), p.set(&p.wd, t)) }
func (p *pipe) LocalAddr() net.Addr                { return nil }
func (p *pipe) RemoteAddr() net.Addr               { return nil }

// world is a few nodes with links between them.
type world struct {
	t     testing.TB
	nodes map[mesh.NodeID]*node

	mu       sync.Mutex
	out      mesh.NodeID // was put out of the mesh
	gateways []mesh.NodeID
	sent     map[string]int // "message recipient" tried outside
	points   int
	crashAt  int
	victim   mesh.NodeID
	crash    chan struct{} // closed at the point
	trace    []string
	pad      int // bytes of the messages of acceptFrom
	rate     int // of lines, in bytes a second from who dials; 0: no limit
	arrives  int // the same, behind a deep buffer
}

type node struct {
	w     *world
	id    mesh.NodeID
	disk  *journaltest.Disk
	j     *journal.Journal
	q     *queue.Queue
	r     *Relay
	dead  chan struct{}
	up    bool
	conns map[*pipe]bool
	stop  func()
	// store is a real home; nil: home answers, each answer after syncTime.
	store    *mailstore.Store
	syncTime time.Duration
	home     func(env transport.Envelope, rcpts []transport.Recipient, body *log.Draft) ([]transport.Result, error)
}

func newWorld(t testing.TB, ids ...mesh.NodeID) *world {
	w := &world{t: t, nodes: map[mesh.NodeID]*node{}, sent: map[string]int{}, crashAt: -1, crash: make(chan struct{})}
	for _, id := range ids {
		w.nodes[id] = &node{w: w, id: id, disk: journaltest.NewDisk(t), conns: map[*pipe]bool{}}
	}
	return w
}

func name(n mesh.NodeID) string { return fmt.Sprintf("n%d.ours.example", n) }

func toDomain(a string) transport.Destination {
	return transport.Destination{Scope: transport.ScopeOutside, Domain: a[strings.LastIndexByte(a, '@')+1:]}
}

// tried returns what was tried outside so far.
func (w *world) tried() map[string]int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return maps.Clone(w.sent)
}

func (n *node) note(format string, args ...any) {
	n.w.mu.Lock()
	defer n.w.mu.Unlock()
	n.w.trace = append(n.w.trace, fmt.Sprintf("%v n%d ", time.Now().Format("15:04:05.000"), n.id)+fmt.Sprintf(format, args...))
}

// point is where the victim may crash.
func (n *node) point() {
	w := n.w
	if w.victim != n.id {
		return
	}
	w.mu.Lock()
	k := w.points
	w.points++
	hit := k == w.crashAt
	w.mu.Unlock()
	if hit {
		close(w.crash)
		<-n.dead
	}
}

type outside func(ctx context.Context, d transport.Destination, src transport.Source) error

func (o outside) Carry(ctx context.Context, d transport.Destination, src transport.Source) error {
	return o(ctx, d, src)
}

func (n *node) start() {
	n.note("starts")
	n.j = n.disk.Open(n.w.t)
	n.dead = make(chan struct{})
	isGateway := func() bool { n.w.mu.Lock(); defer n.w.mu.Unlock(); return slices.Contains(n.w.gateways, n.id) }
	deps := queue.Deps{
		Self: n.id, Domain: toDomain, Rand: rand.Reader,
		Carrier: func(d transport.Destination) transport.Carrier {
			switch d.Scope {
			case transport.ScopeOutside:
				return outside(n.sendOutside)
			case transport.ScopeLocal:
				return nil
			}
			return n.r
		},
		Route: func(r *transport.Recipient) (transport.Destination, bool) {
			return transport.Destination{}, false
		},
		Resolve:    func(*transport.Envelope, string) []queue.Leg { return nil },
		Member:     func(m mesh.NodeID) bool { return n.w.nodes[m] != nil },
		Decode:     func([]byte) (queue.Delivered, error) { return queue.Delivered{}, nil },
		Host:       func() string { return name(n.id) },
		Postmaster: func() string { return "postmaster@ours.example" },
		Finals:     func(o mesh.NodeID) { n.r.Finals(o) },
	}
	if n.store != nil {
		n.store = mailstore.New(n.j, mailstore.Options{})
	}
	n.q = queue.New(n.j, deps)
	n.r = New(Deps{Self: n.id, Dial: n.dial, Name: name, Member: deps.Member, IsGateway: isGateway,
		PutOut: func(m mesh.NodeID) bool { n.w.mu.Lock(); defer n.w.mu.Unlock(); return m == n.w.out },
		Gateways: func() []mesh.NodeID {
			n.w.mu.Lock()
			defer n.w.mu.Unlock()
			return slices.DeleteFunc(slices.Clone(n.w.gateways), func(g mesh.NodeID) bool { return g == n.id })
		},
		Home: (*fakeHome)(n), Gateway: faultyGateway{n.q, n}, Origin: faultyOrigin{n.q, n}, NewDraft: n.j.NewDraft})
	if err := n.j.Start(context.Background()); err != nil {
		n.w.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	q, r := n.q, n.r
	wg.Go(func() { q.Run(ctx) })
	wg.Go(func() { r.Run(ctx) })
	n.stop = func() { cancel(); wg.Wait() }
	n.w.mu.Lock()
	n.up = true
	n.w.mu.Unlock()
	for _, o := range n.w.nodes {
		if o != n && o.up {
			o.peerUp(n.id)
			n.peerUp(o.id)
		}
	}
}

func (n *node) peerUp(o mesh.NodeID) { n.q.PeerUp(o); n.r.PeerUp(o) }

// kill ends a node as a power cut does, as far as others can see.
func (n *node) kill() {
	n.note("killed")
	n.w.mu.Lock()
	n.up = false
	var cs []*pipe
	for c := range n.conns {
		cs = append(cs, c)
	}
	n.w.mu.Unlock()
	for _, c := range cs {
		c.Close()
	}
	close(n.dead)
	n.stop()
	time.Sleep(time.Second) // servers of its streams end
	n.disk.Crash(n.w.t)
}

func (n *node) dial(ctx context.Context, to mesh.NodeID, service string) (net.Conn, error) {
	w := n.w
	o := w.nodes[to]
	w.mu.Lock()
	defer w.mu.Unlock()
	if !n.up || o == nil || !o.up {
		return nil, errors.New("no path")
	}
	a, b := newPipe()
	a.rate, b.arrives = w.rate, w.arrives
	n.conns[a], o.conns[b] = true, true
	r := o.r
	go func() {
		r.Serve(context.Background(), n.id, b)
		w.mu.Lock()
		delete(n.conns, a)
		delete(o.conns, b)
		w.mu.Unlock()
	}()
	return a, nil
}

func (n *node) sendOutside(ctx context.Context, d transport.Destination, src transport.Source) error {
	for {
		l, err := src.Next(ctx)
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		n.w.mu.Lock()
		rs := make([]transport.Result, len(l.Rcpts))
		for i, r := range l.Rcpts {
			n.w.trace = append(n.w.trace, fmt.Sprintf("%v n%d sends %d %s", time.Now().Format("15:04:05.000"), n.id, l.Envelope.ID[0], r.Address))
			n.w.sent[fmt.Sprintf("%d %s", l.Envelope.ID[0], r.Address)]++
			rs[i] = transport.Result{Outcome: transport.Relayed, Code: 250, By: "mx"}
		}
		n.w.mu.Unlock()
		src.Finish(l, rs)
	}
}

func (n *node) accept(id byte, dest transport.Destination, rcpts ...transport.Recipient) {
	d := n.j.NewDraft()
	fmt.Fprintf(d, "Subject: %d\r\n\r\nbody of %d\r\n", id, id)
	if err := d.Seal(context.Background()); err != nil {
		n.w.t.Fatal(err)
	}
	br, _ := d.Open()
	st, err := mime.Parse(br, d.Size())
	if err != nil {
		n.w.t.Fatal(err)
	}
	_, err = n.q.Accept(context.Background(), &queue.Message{
		Envelope: transport.Envelope{ID: transport.MessageID{id, 1}, From: "anna@ours.example", Origin: transport.OriginSubmission, EntryNode: n.id, EntryTime: time.Now()},
		Body:     d, Structure: st}, []queue.Leg{{Dest: dest, Rcpts: rcpts}})
	if err != nil {
		n.w.t.Fatal(err)
	}
}

type fakeHome node

func (h *fakeHome) Start(ctx context.Context, env transport.Envelope, rcpts []transport.Recipient, body *log.Draft, s *mime.Structure, after []Started) (Started, error) {
	if h.store != nil {
		d := &mailstore.Delivery{Envelope: env, Rcpts: rcpts, Draft: body, Structure: s}
		for _, a := range after {
			d.After = append(d.After, a.(*mailstore.Pending))
		}
		p, err := h.store.StartDelivery(ctx, d)
		if err != nil {
			return nil, err
		}
		return p, nil
	}
	rs, err := h.home(env, rcpts, body)
	if err != nil {
		return nil, err
	}
	return &answered{rs, h.syncTime}, nil
}

// answered is a delivery to a fake home.
type answered struct {
	rs   []transport.Result
	sync time.Duration
}

func (a *answered) Known() []transport.Result { return slices.Clone(a.rs) }

func (a *answered) Synced(context.Context) ([]transport.Result, error) {
	time.Sleep(a.sync)
	return a.rs, nil
}

func (h *fakeHome) Where(mesh.MailboxID) (mesh.NodeID, uint64, bool) { return 9, 4, true }

var errDead = errors.New("the node is dead")

func (n *node) around(f func() error) error {
	n.point()
	select {
	case <-n.dead:
		return errDead
	default:
	}
	err := f()
	n.point()
	select {
	case <-n.dead:
		return errDead
	default:
	}
	return err
}

// faultyGateway and faultyOrigin have a crash point before and after each call.
type faultyGateway struct {
	*queue.Queue
	n *node
}

func (g faultyGateway) Keep(ctx context.Context, o mesh.NodeID, env transport.Envelope, rs []transport.Recipient, b *log.Draft, s *mime.Structure) (f []transport.Fate, err error) {
	g.n.note("Keep %d %v", env.ID[0], rs)
	defer g.n.note("Keep %d %v ends", env.ID[0], rs)
	err = g.n.around(func() (err error) { f, err = g.Queue.Keep(ctx, o, env, rs, b, s); return })
	return f, err
}
func (g faultyGateway) Let(ctx context.Context, o mesh.NodeID, id transport.MessageID, keys []string) error {
	g.n.note("Let %d %v", id[0], keys)
	defer g.n.note("Let %d %v ends", id[0], keys)
	return g.n.around(func() error { return g.Queue.Let(ctx, o, id, keys) })
}
func (g faultyGateway) Drop(ctx context.Context, o mesh.NodeID, id transport.MessageID, keys []string) error {
	g.n.note("Drop %d %v", id[0], keys)
	defer g.n.note("Drop %d %v ends", id[0], keys)
	return g.n.around(func() error { return g.Queue.Drop(ctx, o, id, keys) })
}
func (g faultyGateway) Told(ctx context.Context, o mesh.NodeID, fs []transport.FinalResult) error {
	g.n.note("Told %d %v", 0, fs)
	defer g.n.note("Told %d %v ends", 0, fs)
	return g.n.around(func() error { return g.Queue.Told(ctx, o, fs) })
}

type faultyOrigin struct {
	*queue.Queue
	n *node
}

func (g faultyOrigin) Release(ctx context.Context, l *transport.Leg, rs []int, gw mesh.NodeID) error {
	g.n.note("Release %d %v", l.Envelope.ID[0], rs)
	defer g.n.note("Release %d %v ends", l.Envelope.ID[0], rs)
	return g.n.around(func() error { return g.Queue.Release(ctx, l, rs, gw) })
}
func (g faultyOrigin) Ask(gw mesh.NodeID, id transport.MessageID, keys []string) (s []transport.Standing, err error) {
	g.n.note("Ask %d %v", id[0], keys)
	defer g.n.note("Ask %d %v ends", id[0], keys)
	err = g.n.around(func() (err error) { s, err = g.Queue.Ask(gw, id, keys); return })
	return s, err
}
func (g faultyOrigin) Final(ctx context.Context, gw mesh.NodeID, f transport.FinalResult) error {
	g.n.note("Final %d %v", f.ID[0], f.Key)
	defer g.n.note("Final %d %v ends", f.ID[0], f.Key)
	return g.n.around(func() error { return g.Queue.Final(ctx, gw, f) })
}
