package deciders

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	"posthouse/mailstore"
	"posthouse/mailstore/journal"
	"posthouse/mailstore/kv"
	"posthouse/mailstore/log"
	"posthouse/mailstore/log/simfs"
	"posthouse/mailstore/mime"
	"posthouse/mesh"
	"posthouse/mesh/domain"
	"posthouse/transport"
	"posthouse/transport/queue"
	"posthouse/transport/relay"
	"posthouse/transport/route"
)

var (
	errSilent   = errors.New("it does not answer")
	errNoDial   = errors.New("it cannot be reached")
	errLostLine = errors.New("the connection was lost")
)

// node is one node: the engines that ship, by hand, and what survives them.
type node struct {
	w    *world
	i    int
	id   mesh.NodeID
	name string

	// What survives a crash.
	fs            *simfs.FS
	kept          *kv.Memory
	state         *domain.Machine // its log is a model: durable at once
	have, applied int             // commands in its log, and applied
	parted, shut  uint64          // nodes that it sends nothing to, and hears no more, as bits
	// How often its disk was made an older one, and the incarnation that it has.
	renewals, renewed uint64
	before            map[copyOf]waits // what was in its queue then, until that is compared
	orphaned          bool             // it is put out, and its people have no other home yet

	// Of this life.
	up      bool
	boot    int
	paused  int
	late    []func() // steps that wait for the end of a pause
	rand    *rand.ChaCha8
	j       *journal.Journal
	store   *mailstore.Store
	q       *queue.Queue
	hand    *queue.Hand
	carries []*carry
	shun    map[mesh.NodeID]time.Time
	agent   map[mesh.NodeID]*visit

	view      *mesh.View
	viewTopo  uint64
	viewIndex int

	wake                        time.Duration // when Turn is called next; 0: not planned
	flushing, commits, repeater bool
	crashIn                     int // disk operations until the power goes; 0: never
	crashAs                     Fault
	lost                        bool // the power went at a disk operation
	failSync                    bool
	slowSync                    int // ms
	skew                        time.Duration

	// What this node was told from outside that is not on its disk yet: it may
	// be forgotten, and asked for again.
	unsure, unsynced []copyOf
	// Deliveries, and whether they began when the node knew another home: none
	// of those may succeed.
	astray map[copyOf]bool
}

func newNode(w *world, i int) *node {
	return &node{w: w, i: i, id: mesh.NodeID(0x1000 + i), name: fmt.Sprintf("n%d", i), fs: simfs.New(), kept: new(kv.Memory), state: domain.NewMachine()}
}

var epoch = time.Date(2026, 3, 1, 0, 0, 0, 0, time.UTC)

func (n *node) wall() time.Time { return epoch.Add(n.w.now + n.skew) }

// Elapsed and Now implement queue.Clock.
func (n *node) Elapsed() time.Duration { return n.w.now }

// Now is the wall clock, which jumps.
func (n *node) Now() time.Time { return n.wall() }

func (n *node) runs() bool { return n.up && n.paused == 0 }

func (n *node) routing() route.State {
	return route.State{View: n.w.mesh.view(n), Directory: directory{n}, Age: n.w.mesh.age(n)}
}

func (n *node) syncTime() time.Duration {
	return 2*time.Millisecond + time.Duration(n.slowSync)*time.Millisecond
}

// boot starts the node on what its disk has.
func (n *node) start() error {
	n.boot++
	var seed [32]byte
	copy(seed[:], fmt.Sprintf("%d %d %d", n.w.plan.Seed, n.i, n.boot))
	n.rand = rand.NewChaCha8(seed)
	n.view, n.carries, n.shun, n.agent = nil, nil, map[mesh.NodeID]time.Time{}, map[mesh.NodeID]*visit{}
	n.wake, n.flushing, n.commits, n.repeater = 0, false, false, false
	n.unsure, n.unsynced, n.late, n.astray = nil, nil, nil, map[copyOf]bool{}
	n.fs.Hook = n.disk
	opt := journal.Options{ByHand: true}
	opt.Log.Dir, opt.Log.FS, opt.Log.Rand, opt.Log.SegmentSize = "log", n.fs, n.rand, n.w.segment
	opt.View.Memory, opt.View.Kept, opt.View.ID = true, n.kept, n.rand.Uint64
	j, err := journal.Open(context.Background(), opt)
	if err != nil {
		return err
	}
	n.j = j
	n.store = mailstore.New(j, mailstore.Options{Now: n.wall, Quota: n.w.quota, Self: n.id, Home: func(m mesh.MailboxID) (mesh.NodeID, uint64) {
		home, version, _ := n.state.Home(m)
		return home, version
	}})
	deps := queue.Deps{
		Self: n.id, Carrier: func(transport.Destination) transport.Carrier { return byHand{} }, Clock: n, Rand: n.rand,
		Route: func(r *transport.Recipient) (transport.Destination, bool) {
			dest, known := n.routing().Next(r)
			return dest, !known && n.w.mesh.age(n) < route.CurrentFor
		},
		Resolve: func(env *transport.Envelope, to string) []queue.Leg {
			if to == "" {
				n.w.violation("I16: %s makes a report to nobody", n.name)
			}
			a, err := mesh.ParseAddress(to)
			if err != nil {
				return nil
			}
			return legsOf(n.routing().Decide(env, []route.Rcpt{{Address: a, Notify: transport.NotifyNever}}))
		},
		Domain: route.ToDomain, Member: n.member, Parse: func(r io.ReaderAt, size int64) (*mime.Structure, error) {
			n.w.obs.wrote(r, size)
			return mime.Parse(r, size)
		},
		Decode: func(meta []byte) (queue.Delivered, error) {
			d, err := mailstore.DecodeDelivered(meta)
			return queue.Delivered(d), err
		},
		Host: func() string { return n.name + "." + domainName }, Postmaster: func() string { return "postmaster@" + domainName },
		Finals: func(origin mesh.NodeID) { n.see(origin, askAfter) },
		Event: func(e queue.Event) {
			n.w.note("%s %s %s by %s to %s: %d %s", n.name, e.What, n.w.obs.name(e.ID), e.Dest, e.Recipient, e.Result.Code, e.Result.Text)
		},
	}
	if n.w.plan.Short {
		deps.Policy = queue.Policy{OutsideLife: 5 * time.Hour, MeshLife: 10 * time.Hour, DelayAfter: 20 * time.Minute}
	}
	n.q = queue.New(j, deps)
	j.Register(tap{n}, log.KindDeliver)
	if err := j.Start(context.Background()); err != nil {
		j.Abort()
		return err
	}
	if n.hand, err = n.q.ByHand(); err != nil {
		j.Abort()
		return err
	}
	n.up = true
	return nil
}

// byHand stands where the queue only asks whether anybody carries.
type byHand struct{}

func (byHand) Carry(context.Context, transport.Destination, transport.Source) error {
	panic("deciders: the queue is driven by hand")
}

func legsOf(d route.Decision) []queue.Leg {
	legs := make([]queue.Leg, len(d.Legs))
	for i, l := range d.Legs {
		legs[i] = queue.Leg{Dest: l.Dest, Rcpts: l.Rcpts}
	}
	return legs
}

func (n *node) member(id mesh.NodeID) bool { x, ok := n.state.Node(id); return ok && x.Member() }

func (n *node) isGateway() bool { x, ok := n.state.Node(n.id); return ok && x.Member() && x.Gateway }

// come brings the node up; a disk without room lets it wait.
func (n *node) come() {
	if n.up {
		return
	}
	warned, alone := n.warned()
	if alone && n.w.mesh.doubted(n) { // it could not know
		n.w.after(5*time.Second, n.come)
		return
	}
	if err := n.start(); err != nil {
		n.w.note("%s cannot start: %v", n.name, err)
		n.dead()
		if errors.Is(err, simfs.ErrCrashed) {
			n.image(n.crashed())
		}
		n.w.after(5*time.Second, n.come)
		return
	}
	n.w.note("%s is up, life %d", n.name, n.boot)
	if len(n.w.mesh.commands) == 0 {
		n.w.mesh.found()
		n.have = len(n.w.mesh.commands)
	}
	n.have = max(n.have, foundedBy(n.w))
	boot := n.boot
	n.step(boot, func() {
		n.learn()
		if warned && !n.reconcile() {
			return
		}
		n.makeMailboxes()
		n.q.Reroute() // as every start does
		n.every()
	})
	if n.renewals > 0 {
		n.w.after(5*time.Minute, func() { n.letGo(boot) })
	}
	n.w.after(queue.SweepEvery, func() { n.sweep(boot) })
	n.w.links.changed()
}

// foundedBy is how many commands everybody has from the beginning.
func foundedBy(w *world) int { return w.plan.Nodes + w.plan.Nodes*w.plan.Users + 1 }

func (n *node) sweep(boot int) {
	if n.boot != boot || !n.up {
		return
	}
	n.step(boot, func() {
		n.hand.Clerk(true)
		n.every()
	})
	n.w.after(queue.SweepEvery, func() { n.sweep(boot) })
}

// step is one thing that happens in the node, in that life of it.
func (n *node) step(boot int, f func()) {
	switch {
	case !n.up || n.boot != boot:
	case n.paused > 0:
		n.late = append(n.late, f)
	default:
		f()
		n.pump()
	}
}

// pump lets the node do all that it can do now.
func (n *node) pump() {
	for range 10000 {
		if n.dying() {
			return
		}
		starts, wait := n.hand.Turn()
		for _, d := range starts {
			n.carry(d)
		}
		busy := len(starts) > 0
		for _, c := range append([]*carry(nil), n.carries...) {
			busy = c.advance() || busy
		}
		n.hand.Clerk(false)
		if busy {
			continue
		}
		if n.dying() {
			return
		}
		n.refused() // also of what a call waited for itself
		if wait >= 0 {
			n.wakeIn(wait)
		}
		if !n.flushing && (n.j.Stats().Waiting > 0 || slices.ContainsFunc(n.carries, (*carry).under)) {
			n.flushing = true
			boot := n.boot
			n.w.after(n.syncTime(), func() {
				n.step(boot, func() {
					n.flushing = false
					n.flush()
				})
			})
		}
		return
	}
	n.w.violation("%s does not come to rest", n.name)
}

// wakeIn calls pump again by then at the latest.
func (n *node) wakeIn(d time.Duration) {
	at := n.w.now + max(d, time.Millisecond)
	if n.wake > n.w.now && n.wake <= at {
		return
	}
	n.wake = at
	boot := n.boot
	n.w.after(at-n.w.now, func() {
		n.step(boot, func() {
			if n.wake == at {
				n.wake = 0
			}
		})
	})
}

// flush syncs what was appended and goes on with what waited for it.
func (n *node) flush() {
	told := len(n.unsynced)
	n.j.Turn()
	if n.j.Err() != nil {
		return
	}
	if !n.refused() {
		n.unsynced = n.unsynced[told:]
	}
	for _, c := range append([]*carry(nil), n.carries...) {
		c.synced()
	}
	if !n.commits {
		n.commits = true
		boot := n.boot
		n.w.after(250*time.Millisecond, func() {
			if n.boot == boot && n.up {
				n.commits = false
				n.j.Commit()
			}
		})
	}
}

// refused looks after what a full disk kept out, and reports whether there is
// any.
func (n *node) refused() bool {
	if !n.hand.Refused() {
		return false
	}
	if !n.repeater {
		n.repeater = true
		boot := n.boot
		n.w.after(queue.RepeatEvery, func() {
			n.step(boot, func() {
				n.repeater = false
				n.hand.Repeat()
			})
		})
	}
	return true
}

// disk is the hook of the node's disk: faults.
func (n *node) disk(op simfs.Op) simfs.Fault {
	if n.failSync && op.Name == "sync" {
		n.failSync = false
		return simfs.Fault{Err: errors.New("input/output error")}
	}
	if n.crashIn > 0 {
		if n.crashIn--; n.crashIn == 0 {
			n.lost = true
			return simfs.Fault{Crash: true}
		}
	}
	return simfs.Fault{}
}

// dying notices that the log has ended, or the power gone: so has the process.
func (n *node) dying() bool {
	if !n.up {
		return true
	}
	err := n.j.Err()
	if err == nil && !n.lost {
		return false
	}
	f := n.crashed()
	n.w.note("%s ends: %v", n.name, err)
	n.crash(f)
	n.w.after(max(f.Span, time.Second), n.come)
	for i, o := range n.w.nodes { // F9: at one instant
		if f.B>>i&1 == 1 && o != n && o.up {
			o.crash(Fault{Mode: f.Mode, View: f.View})
			n.w.after(max(f.Span, time.Second), o.come)
		}
	}
	return true
}

// crashed returns how the power went that a fault has taken at an operation.
func (n *node) crashed() Fault {
	f := n.crashAs
	n.crashAs = Fault{}
	n.w.crashes++
	return f
}

// crash takes the power away.
func (n *node) crash(f Fault) {
	if !n.up {
		return
	}
	n.w.note("%s loses its power: %s, view %s", n.name, f.Mode, f.View)
	n.w.obs.forgot(append(n.unsure, n.unsynced...))
	if f.View == Level {
		n.j.Commit()
	}
	n.fs.Crash()
	n.j.Abort()
	n.dead()
	n.image(f)
	n.w.links.changed()
}

// image is what the next start finds on disk.
func (n *node) image(f Fault) {
	n.fs = n.fs.After(f.Mode, n.w.disk.Uint64())
	n.fs.Hook = n.disk
	switch f.View {
	case Older:
		n.kept.Rewind(n.kept.Applied() / 2)
	case Gone:
		n.kept = new(kv.Memory)
	case Damaged:
		n.kept.Damage()
	}
	if f.Again > 0 {
		n.crashIn, n.crashAs = f.Again, f
		n.crashAs.Again = 0
	}
}

func (n *node) dead() {
	n.up, n.crashIn, n.lost, n.failSync = false, 0, false, false
	n.boot++
	n.carries, n.late = nil, nil
}

// calm ends the node's own faults.
func (n *node) calm() {
	n.crashIn, n.failSync, n.slowSync = 0, false, 0
	n.fs.SetFree(-1)
	n.resume(true)
	n.come()
}

func (n *node) resume(all bool) {
	if n.paused == 0 {
		return
	}
	if n.paused--; all {
		n.paused = 0
	}
	if n.paused > 0 || !n.up {
		return
	}
	late := n.late
	n.late = nil
	boot := n.boot
	n.w.links.changed()
	for _, f := range late {
		n.step(boot, f)
	}
}

// learn applies the commands that the node has.
func (n *node) learn() {
	if n.applied >= n.have {
		return
	}
	parts := domain.Part(0)
	stop := n.state.Watch(func(c domain.Change) { parts |= c.Parts })
	for n.applied < n.have {
		n.applied++
		r, err := n.state.ApplyResult(uint64(n.applied), 1, n.w.mesh.commands[n.applied-1])
		if err != nil || r.Code != domain.OK {
			n.w.violation("%s cannot apply command %d: %s %v", n.name, n.applied, r.Text, err)
			return
		}
	}
	stop()
	if parts&(domain.Users|domain.Homes) != 0 {
		n.makeMailboxes()
	}
	if parts&domain.Nodes != 0 {
		n.heardOf()
	}
	if parts&(domain.Users|domain.Homes|domain.Nodes) != 0 {
		n.q.Reroute()
	}
}

// home makes the mailbox of a user who lives here, as the appliance does.
func (n *node) home(m mesh.MailboxID) (bool, error) {
	if n.store.Has(m) {
		home, _, known := n.state.Home(m)
		return !known || home == n.id, nil
	}
	home, version, known := n.state.Home(m)
	if !known || home != n.id {
		return false, nil
	}
	return true, n.store.Create(context.Background(), m, uint32(version-1))
}

func (n *node) makeMailboxes() {
	for _, u := range n.state.Users() {
		if u.Home == n.id && !n.store.Has(u.Mailbox) {
			if _, err := n.home(u.Mailbox); err != nil {
				return
			}
		}
	}
}

// StartDelivery implements delivery.Store, as the appliance does.
func (n *node) StartDelivery(ctx context.Context, d *mailstore.Delivery) (*mailstore.Pending, error) {
	for i := range d.Rcpts {
		if _, err := n.home(d.Rcpts[i].Mailbox); err != nil {
			return nil, err
		}
	}
	for i := range d.Rcpts {
		k := copyOf{d.Envelope.ID, d.Rcpts[i].Mailbox.String()}
		home, _, ok := n.state.Home(d.Rcpts[i].Mailbox)
		ours := ok && home == n.id
		if _, began := n.astray[k]; ours || !began { // a repeat of what began here ends here
			n.astray[k] = !ours
		}
	}
	return n.store.StartDelivery(ctx, d)
}

func (n *node) peerUp(o *node) {
	n.step(n.boot, func() {
		n.q.PeerUp(o.id)
		delete(n.shun, o.id)
		for _, id := range n.q.Origins() {
			if id == o.id {
				n.see(id, 0)
			}
		}
	})
}

// gateways returns whom to offer outside legs to.
func (n *node) gateways() []mesh.NodeID {
	rank := func(id mesh.NodeID) int {
		if x, ok := n.state.Node(id); ok {
			return -x.Priority
		}
		return 0
	}
	return relay.Prefer(route.Gateways(n.w.mesh.view(n), rank), n.shun, epoch.Add(n.w.now))
}

// waiting says what waits at the node: with all also what waits for the outside.
func (n *node) waiting(all bool) string {
	if !n.up {
		return "down"
	}
	rows, err := n.q.List()
	if err != nil {
		return err.Error()
	}
	var b strings.Builder
	for _, r := range rows {
		mesh := r.Key.Scope == transport.ScopeLocal || r.Key.Scope == transport.ScopeNode
		if c := r.Counts; (mesh || all) && c.Waiting+c.Kept+c.Released > 0 && !n.allStrayed(r) {
			fmt.Fprintf(&b, "%s (%s)", r.Destination, r.Error)
			legs, _ := n.q.Legs(n.w.ctx, r.Key, 0, 4)
			for _, l := range legs {
				for _, x := range l.Recipients {
					fmt.Fprintf(&b, " %s to %s %s %d", n.w.obs.name(l.Message), x.Address, x.State, x.Attempts)
				}
			}
			b.WriteString("; ")
		}
	}
	return b.String()
}
