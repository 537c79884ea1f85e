// Package queue owns every message from its acceptance until the result of its
// last recipient is final: durable legs, their schedule, and giving up.
//
// intake (and relay, for what a gateway keeps) calls Accept; the queue hands
// the legs of each destination, in order, to the Carrier for it, and records
// what became of each recipient. It makes the reports that fall due. It does
// not decide where mail goes (route) and never touches a mailbox or a wire.
//
// DESIGN.md beside this file has the formats, the invariants and what happens
// at each crash.
package queue

import (
	"container/heap"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	"posthouse/mailstore/journal"
	"posthouse/mailstore/log"
	"posthouse/mailstore/mime"
	"posthouse/mesh"
	"posthouse/transport"
)

// Delivered is what the queue has to know of a KindDeliver record.
type Delivered struct {
	ID        transport.MessageID
	LegSeq    uint64 // 0: no leg of this node
	Mailboxes []mesh.MailboxID
}

// Leg is one destination of a message with its recipients.
type Leg struct {
	Dest  transport.Destination
	Rcpts []transport.Recipient
}

// Deps is what the queue needs from its surroundings. Functions must be safe
// for concurrent use and must not call back into the queue.
type Deps struct {
	Self mesh.NodeID
	// Carrier returns who carries to that destination; nil: nobody now.
	Carrier func(transport.Destination) transport.Carrier
	// Route says where a waiting recipient goes by the current domain state and
	// view. The zero Destination: not known (leave it). gone: the state is
	// current and has no such mailbox.
	Route func(r *transport.Recipient) (dest transport.Destination, gone bool)
	// Resolve routes a report to an address. No legs: nobody to tell.
	Resolve func(env *transport.Envelope, address string) []Leg
	// Domain returns the destination of an outside address at a gateway.
	Domain func(address string) transport.Destination
	// Full reports whether the destination's node says that a mailbox of its own
	// is full: news of room do not concern it. Nil: nothing is known of any.
	Full func(transport.Destination, mesh.MailboxID) bool
	// Seen reports whether the node of a destination in the mesh (of a gateway:
	// any) seems to be alive now: then it is tried again within seconds. Nil:
	// none does.
	Seen func(transport.Destination) bool
	// Member reports whether a node stands in the domain state.
	Member func(mesh.NodeID) bool
	// Decode reads the meta of a KindDeliver record (mailstore.DecodeDelivered).
	Decode func(meta []byte) (Delivered, error)
	// Host is this node's host name, for reports; Postmaster the address that
	// reports come from.
	Host       func() string
	Postmaster func() string
	// Parse walks a report that was made; nil: mime.Parse.
	Parse func(r io.ReaderAt, size int64) (*mime.Structure, error)
	// Finals is called, and must not block, when results wait for that origin.
	Finals func(origin mesh.NodeID)
	// Event is called for each line of the mail log; nil: none. It must not block.
	Event func(Event)

	Rand   io.Reader // crypto/rand.Reader
	Clock  Clock     // nil: the machine's
	Logger *slog.Logger
	Policy Policy
}

// Event is a line of the mail log.
type Event struct {
	What      string // an Outcome's name, or "aside"
	ID        transport.MessageID
	Queue     ID
	Dest      transport.Destination
	Recipient string // address
	Result    transport.Result
	Waited    time.Duration // since acceptance
}

// ID is a message's number in this node's queue, as people see it.
type ID uint64

// String prints the id as people type it.
func (i ID) String() string { return fmt.Sprintf("%d", uint64(i)) }

// Message is a message to be taken into custody.
type Message struct {
	Envelope  transport.Envelope
	Body      *log.Draft // sealed
	Structure *mime.Structure
	Expanded  []Expanded
	// Routes is what Queue.Routes said before the legs were decided; 0: nothing
	// can have changed since.
	Routes uint64
}

// Expanded is a recipient whose "expanded" (or, through a list, "delivered")
// report is due at acceptance: RFC 3461 section 5.2.7.
type Expanded struct {
	Rcpt transport.Recipient
	List bool
}

// Queue is a node's queue. Safe for concurrent use.
type Queue struct {
	j      *journal.Journal
	d      Deps
	policy Policy

	kick  chan struct{} // Run looks at q.check
	chore chan struct{} // the clerk looks at q.owed
	rnd   *lockedRand   // jitter

	mu      sync.Mutex
	loaded  bool
	clock   clock
	saved   time.Duration // queue time in the clock's row
	dests   map[transport.Destination]*dest
	check   []*dest                // to be looked at by Run
	timers  timers                 // of dests
	running int                    // carries under way to the outside
	fresh   map[uint64]*acceptMeta // appended, not yet applied
	last    map[legName]*row       // rows of the record applied last; nil: gone
	busy    map[legName]int        // LEG records appended, not yet applied
	owed    map[legName]struct{}   // legs that owe a report
	routes  uint64                 // changes of homes so far: see Reroute
	anew    bool                   // the clerk has to route everything anew
	missed  map[legName]struct{}   // legs that the clerk has to route as soon as they are not busy
	held    int                    // legs in the windows of all destinations
	swept   int64                  // day up to which old ids were forgotten
	finals  map[mesh.NodeID]map[legName]struct{}
	kept    map[mesh.NodeID]map[legName]struct{}

	underway []underway // in the log's order
	again    []underway // refused by a full disk, to be written again
	ended    bool       // Run has: nobody looks after records any more
	news     chan struct{}
}

// legName names a leg on this node.
type legName struct {
	dest transport.Destination
	seq  uint64
}

// New registers the queue with j, which must not be started yet.
func New(j *journal.Journal, d Deps) *Queue {
	q := &Queue{routes: 1,
		j: j, d: d, policy: d.Policy.withDefaults(),
		kick: make(chan struct{}, 1), chore: make(chan struct{}, 1), news: make(chan struct{}, 1),
		rnd:   &lockedRand{r: d.Rand},
		dests: map[transport.Destination]*dest{}, fresh: map[uint64]*acceptMeta{}, last: map[legName]*row{},
		busy: map[legName]int{}, owed: map[legName]struct{}{}, missed: map[legName]struct{}{},
		finals: map[mesh.NodeID]map[legName]struct{}{}, kept: map[mesh.NodeID]map[legName]struct{}{},
	}
	if q.d.Parse == nil {
		q.d.Parse = mime.Parse
	}
	if q.d.Event == nil {
		q.d.Event = func(Event) {}
	}
	if q.d.Finals == nil {
		q.d.Finals = func(mesh.NodeID) {}
	}
	if q.d.Logger == nil {
		q.d.Logger = slog.New(slog.DiscardHandler)
	}
	if q.clock.src = q.d.Clock; q.clock.src == nil {
		q.clock.src = machine{time.Now()}
	}
	j.Register(q, log.KindAccept, log.KindLeg, log.KindDeliver)
	return q
}

// Accept takes a message into custody: one record, and it returns when that is
// on disk. From then on a 250 may be given. An error says that nothing was
// promised; with transport.ErrUncertain the message may nevertheless be there.
// A zero Envelope.ID gets a random one.
func (q *Queue) Accept(ctx context.Context, m *Message, legs []Leg) (ID, error) {
	t, err := q.accept(ctx, m, legs, acceptMeta{})
	if err != nil {
		return 0, err
	}
	switch err := t.Synced(ctx); {
	case errors.Is(err, transport.ErrNoSpace):
		return 0, fmt.Errorf("accept message: %w", err)
	case err != nil:
		return 0, fmt.Errorf("accept message: %w: %w", transport.ErrUncertain, err)
	}
	return ID(t.First()), nil
}

func (q *Queue) accept(ctx context.Context, m *Message, legs []Leg, meta acceptMeta) (*journal.Ticket, error) {
	if m.Envelope.ID.IsZero() {
		if _, err := io.ReadFull(q.d.Rand, m.Envelope.ID[:]); err != nil {
			return nil, fmt.Errorf("choose message id: %w", err)
		}
	}
	meta.V, meta.Envelope, meta.Structure = version, m.Envelope, m.Structure
	for _, l := range legs {
		meta.Legs = append(meta.Legs, acceptLeg(l))
	}
	for _, e := range m.Expanded {
		meta.Expands = append(meta.Expands, notice(e))
	}
	if err := q.j.Admit(ctx, m.Body.Size()+4096); err != nil {
		return nil, fmt.Errorf("accept message: %w", err)
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	meta.Stamp = q.clock.stamp()
	if meta.Routes = m.Routes; meta.Routes == 0 {
		meta.Routes = q.routes
	}
	b, err := encMode.Marshal(&meta)
	if err != nil {
		return nil, fmt.Errorf("accept message: %w", err)
	}
	t := q.j.Append(log.Entry{Kind: log.KindAccept, Meta: b, Body: m.Body})
	q.fresh[t.First()] = &meta
	q.follow(underway{t: t, fresh: []uint64{t.First()}})
	return t, nil
}

// Bounds of how much happens at once.
const (
	maxOutside = 100                   // carries to outside domains
	burst      = 16                    // carries started together,
	pace       = 20 * time.Millisecond // and then so many each time
	sweepEvery = 5 * time.Minute       // between looks at ages
)

// Run carries until ctx ends, then waits for everything that it started.
// The journal must be started.
func (q *Queue) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if err := q.begin(); err != nil {
		return err
	}
	wg.Go(func() { q.clerk(ctx) })
	wg.Go(func() { q.refused(ctx) })
	q.poke(q.chore)
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-q.kick:
		case <-timer.C:
		}
		starts, wait := q.turn()
		for _, d := range starts {
			wg.Go(func() { q.carry(ctx, d) })
		}
		if wait >= 0 {
			timer.Reset(wait)
		}
	}
}

// begin looks at every destination, in their order.
func (q *Queue) begin() error {
	defer q.mu.Unlock()
	if err := q.lock(); err != nil {
		return err
	}
	q.clock.now()
	for _, d := range q.inTurn() {
		q.rewind(d)
		q.look(d)
	}
	return nil
}

// inTurn returns all destinations, in the order of their keys. Under q.mu.
func (q *Queue) inTurn() []*dest {
	ds := slices.Collect(maps.Values(q.dests))
	slices.SortFunc(ds, func(a, b *dest) int { return slices.Compare(destKey(a.key), destKey(b.key)) })
	return ds
}

// turn looks at the destinations that changed or whose time has come, and says
// which to start and when to look again (negative: at the next kick).
func (q *Queue) turn() (starts []*dest, wait time.Duration) {
	q.mu.Lock()
	defer q.mu.Unlock()
	now := q.clock.now()
	for len(q.timers) > 0 && q.timers[0].at <= now {
		d := heap.Pop(&q.timers).(timer).d
		d.timer = 0
		q.look(d)
	}
	check := q.check
	q.check = nil
	var later []*dest
	for _, d := range check {
		d.listed = false
		if d.running || d.counts.Waiting == 0 || q.d.Carrier(d.key) == nil {
			if d.idle() && q.dests[d.key] == d {
				delete(q.dests, d.key)
				d.signal()
			}
			continue
		}
		if at := q.next(d, now); at > now {
			if at != never && (d.timer == 0 || at < d.timer) {
				d.timer = at
				heap.Push(&q.timers, timer{at, d})
			}
			continue
		}
		outside := d.key.Scope == transport.ScopeOutside
		if len(starts) == burst || outside && q.running >= maxOutside {
			d.listed = true
			later = append(later, d)
			continue
		}
		if outside {
			q.running++
		}
		d.running = true
		starts = append(starts, d)
	}
	q.check = append(q.check, later...) // looked at when the pace allows, or a carry ends
	if wait = q.untilTimer(now); len(starts) == burst && (wait < 0 || wait > pace) {
		wait = pace
	}
	return starts, wait
}

func (q *Queue) untilTimer(now time.Duration) time.Duration {
	if len(q.timers) == 0 {
		return -1
	}
	return max(q.timers[0].at-now, 0)
}

// look puts d on Run's list. Under q.mu.
func (q *Queue) look(d *dest) {
	if !d.listed {
		d.listed = true
		q.check = append(q.check, d)
	}
	q.poke(q.kick)
}

func (q *Queue) poke(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// timer is when to look at a destination again.
type timer struct {
	at time.Duration
	d  *dest
}

type timers []timer

func (t timers) Len() int           { return len(t) }
func (t timers) Less(i, j int) bool { return t[i].at < t[j].at }
func (t timers) Swap(i, j int)      { t[i], t[j] = t[j], t[i] }
func (t *timers) Push(x any)        { *t = append(*t, x.(timer)) }
func (t *timers) Pop() any          { o := *t; x := o[len(o)-1]; *t = o[:len(o)-1]; return x }

// Wake tries a destination at once, whatever its schedule said.
func (q *Queue) Wake(dst transport.Destination) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.wakeLocked(dst)
}

func (q *Queue) wakeLocked(dst transport.Destination) {
	if d := q.dests[dst]; d != nil && newsWakes {
		d.failures, d.notBefore, d.woken = 0, 0, d.running
		d.signal()
		q.look(d)
	}
}

// PeerUp tells that a node can be reached now: what waits for it leaves at once.
func (q *Queue) PeerUp(n mesh.NodeID) {
	q.Wake(transport.Destination{Scope: transport.ScopeNode, Node: n})
	q.Wake(transport.Destination{Scope: transport.ScopeGateway})
}

// Room tells that a destination which deferred mail for want of space has some
// again, or that one which knew nothing of a mailbox has heard of it: what it has
// deferred or called moved so far is due now, in order, but for mailboxes that
// Deps.Full knows. Harmless when it is not true: it costs an attempt.
func (q *Queue) Room(dst transport.Destination) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if d := q.dests[dst]; d != nil {
		d.room = q.clock.now()
		d.again = true
	}
	q.wakeLocked(dst)
}

// RoomHere tells that this node's own disk has room again: every destination is
// looked at, since what a carrier is answered can be recorded.
func (q *Queue) RoomHere() {
	q.mu.Lock()
	defer q.mu.Unlock()
	now := q.clock.now()
	for _, d := range q.inTurn() {
		if d.key.Scope == transport.ScopeLocal {
			d.room, d.again = now, true
		}
		q.wakeLocked(d.key)
	}
}

// lockedRand gives jitter.
type lockedRand struct {
	mu sync.Mutex
	r  io.Reader
}

// float returns a number in [0,1).
func (l *lockedRand) float() float64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	var b [8]byte
	if _, err := io.ReadFull(l.r, b[:]); err != nil {
		return 0.5 // jitter only
	}
	return float64(binary.BigEndian.Uint64(b[:])>>11) / (1 << 53)
}
