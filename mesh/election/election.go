// Package election decides which node is the master, and puts the commands of
// the domain state into one order. It is the only door to hashicorp/raft.
//
// The leader of a Raft group is the master. All admitted nodes hold a full
// copy; one, three or five of them vote, by their number and never by who is
// alive (Rule). Any node may Propose a command: it is carried to the master
// and answered when this node has applied it too.
//
// Raft itself never runs between two lineages: every connection opens with a
// header that says to which history its node belongs. Promote begins a new one
// where a quorum is lost for good; nodes of the old one that meet it put their
// log aside, list what they had committed after the fork, and follow.
//
// What this package does not do: it knows no command and no user (the Machine
// does), opens no socket (Network and Forwarder are handed in), and carries no
// mail. appliance builds one Election per node and runs it; mail goes on
// without it.
package election

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"slices"
	"sync"
	"time"

	"posthouse/mesh"
)

// Machine is what the log drives; domain.Machine is one.
type Machine interface {
	// Prepare makes a command from a node ready to be proposed by the master,
	// or refuses it.
	Prepare(command []byte, from mesh.NodeID, now time.Time) ([]byte, error)
	// Apply applies a command and returns its encoded result. An error means
	// that this build cannot go on: this node's Raft stops.
	Apply(index, term uint64, command []byte) (result []byte, err error)
	Applied() (index, term uint64)
	Snapshot() io.WriterTo
	Restore(io.Reader) error
}

// Network carries Raft's streams between nodes whose identity is proven.
type Network interface {
	Dial(ctx context.Context, to mesh.NodeID) (net.Conn, error)
	// Accept returns the next stream that a peer opened. It returns when ctx
	// ends; any error ends the Election.
	Accept(ctx context.Context) (net.Conn, mesh.NodeID, error)
}

// Forwarder carries one request to a node, where its Election.HandleForward
// answers it.
type Forwarder interface {
	Forward(ctx context.Context, to mesh.NodeID, request []byte) (reply []byte, err error)
}

// Command is one line of the machine's journal.
type Command struct {
	Index uint64    `cbor:"1,keyasint"`
	ID    mesh.ID   `cbor:"2,keyasint"`
	At    time.Time `cbor:"3,keyasint"`
	Actor string    `cbor:"4,keyasint,omitempty"`
	Text  string    `cbor:"5,keyasint,omitempty"`
}

// Config holds values; the zero value of each means its default.
type Config struct {
	Self      mesh.NodeID
	Heartbeat time.Duration // and election timeout; default 3 s
	Lease     time.Duration // default 1.5 s
	Commit    time.Duration // default 1 s
	TakeBack  time.Duration // steady contact before a higher priority leads again; default 60 s
	DeadFor   time.Duration // before a spare replaces a silent voter; default 10 min
	Patience  time.Duration // how long Propose waits for a master; default 10 s
}

// Deps are the parts that an Election works with.
type Deps struct {
	Machine Machine
	Storage Storage
	Network Network
	Forward Forwarder
	// Members returns the admitted nodes of the applied domain state.
	Members func() []Member
	// Reached reports whether a node can be reached now; for sentences only.
	Reached func(mesh.NodeID) bool
	// Trusted reports whether a node's vote may be asked for: not that of one
	// which has forgotten what it voted. Nil trusts all.
	Trusted func(mesh.NodeID) bool
	// Vetted is closed when a peer has said that this node's disk is the one that
	// it had. The only voter of several stands for election then, or after a
	// moment. Nil: at once.
	Vetted <-chan struct{}
	// Blank makes an empty Machine, for the state of a leader whose log this node
	// gets from its first entry on, beside its own; nil: only a snapshot will do.
	Blank func() Machine
	// Since returns the journal after an index, for the list of what a fork
	// leaves behind.
	Since func(index uint64) []Command
	// Now is the wall clock, for the date of what this node orders as master.
	// Nil: time.Now.
	Now    func() time.Time
	Rand   io.Reader
	Logger *slog.Logger
}

// State is a picture of the election as this node sees it.
type State struct {
	Self      mesh.NodeID
	Master    mesh.NodeID // 0 when nobody is known to lead
	Authority mesh.Authority
	Role      mesh.Role
	Voters    []mesh.NodeID // ordered by id
	Others    []mesh.NodeID // members without a vote
	Applied   uint64
	Contact   time.Time // when the master was last heard; now, on the master
	Needs     int       // voters that a decision needs
	Reached   int       // voters reached now, this node included if it votes
	// Stopped says why this node's Raft does not run; "" when it runs or has
	// not begun.
	Stopped string
	// Damaged says what was found damaged since the start and is fetched again
	// from the master, or was; "" for nothing.
	Damaged string
	// Rival is the lineage that a person has to decide about; zero normally.
	Rival Lineage
	// Forked lists the commands that this node had applied and that the lineage
	// it follows now does not share.
	Forked   []Command
	Lineages []Lineage // the present one last; empty before the node belongs to a mesh
}

// LedWithout reports whether others lead without a node, as this one knows, or
// can. Only a node that votes knows the latter: one that was never told of a
// later vote has none itself, or one that is not enough.
func (s State) LedWithout(id mesh.NodeID) bool {
	if s.Master != 0 && s.Master != id {
		return true
	}
	all, others := len(s.Voters), len(s.Voters)
	if slices.Contains(s.Voters, id) {
		others--
	}
	return slices.Contains(s.Voters, s.Self) && others > all/2
}

// Election runs one node's part. Make it with New, then Run it.
type Election struct {
	cfg  Config
	d    Deps
	log  *slog.Logger
	rule Rule // owned by Run, as polling is

	polling bool
	added   time.Time // when a member was added last; owned by Run
	given   []Command // the journal of a state that is given up for the leader's; Run's own
	frozen  uint64    // the index of the frozen state that this run has written; Run's own

	ops    chan func() // run by Run, one at a time
	kick   chan struct{}
	polled chan []Contact
	laters chan struct{} // there is something in queue
	done   chan struct{} // closed when Run has ended
	ready  chan struct{} // closed when the machine holds what this node knew

	mu       sync.Mutex // guards what follows; never held during I/O or waits
	rec      record
	loaded   bool // rec is what the storage holds
	queue    []func()
	life     *life // nil when Raft does not run
	stopped  string
	damaged  string
	last     State // as last published
	watchers map[int]func(State)
	nextID   int
	leaving  map[mesh.NodeID]bool
	contacts map[mesh.NodeID]Contact
	advanced chan struct{} // closed and replaced when something was applied, or the state changed
}

const (
	// pollEvery is how often the master asks how far the others are; each poll
	// is a few bytes each way.
	pollEvery = 5 * time.Second
	pollTime  = 3 * time.Second
	// After a member was added the polls follow soon for a while: it is to vote as
	// soon as it has caught up.
	pollSoon    = 500 * time.Millisecond
	pollSoonFor = 10 * time.Second
)

// New checks the parts and starts nothing.
func New(cfg Config, d Deps) (*Election, error) {
	if cfg.Self == 0 || d.Machine == nil || d.Storage == nil || d.Network == nil || d.Forward == nil || d.Members == nil || d.Rand == nil || d.Logger == nil {
		return nil, errors.New("new election: a part is missing")
	}
	def := func(v *time.Duration, to time.Duration) {
		if *v == 0 {
			*v = to
		}
	}
	def(&cfg.Heartbeat, 3*time.Second)
	def(&cfg.Lease, 1500*time.Millisecond)
	def(&cfg.Commit, time.Second)
	def(&cfg.TakeBack, defaultTakeBack)
	def(&cfg.DeadFor, defaultDeadFor)
	def(&cfg.Patience, 10*time.Second)
	if d.Reached == nil {
		d.Reached = func(mesh.NodeID) bool { return false }
	}
	if d.Now == nil {
		d.Now = time.Now
	}
	if d.Trusted == nil {
		d.Trusted = func(mesh.NodeID) bool { return true }
	}
	if d.Since == nil {
		d.Since = func(uint64) []Command { return nil }
	}
	return &Election{cfg: cfg, d: d, log: d.Logger, rule: Rule{TakeBack: cfg.TakeBack, DeadFor: cfg.DeadFor},
		ops: make(chan func()), kick: make(chan struct{}, 1), polled: make(chan []Contact), laters: make(chan struct{}, 1), done: make(chan struct{}), ready: make(chan struct{}),
		watchers: map[int]func(State){}, leaving: map[mesh.NodeID]bool{}, contacts: map[mesh.NodeID]Contact{}, advanced: make(chan struct{})}, nil
}

// Run takes part in the election until ctx ends; then it hands the lead over
// and stops Raft. It leaves nothing running. Call it once.
//
// A node without a lineage waits: for Bootstrap, or for a member that connects.
func (e *Election) Run(ctx context.Context) error {
	defer close(e.done)
	rec, err := loadRecord(e.d.Storage)
	if errors.Is(err, ErrDamaged) {
		// Nobody may guess which mesh this was: the node goes on without.
		e.stop(err)
		close(e.ready)
		<-ctx.Done()
		return nil
	}
	if err != nil {
		return err
	}
	e.mu.Lock()
	e.rec, e.loaded = rec, true
	e.mu.Unlock()

	work, stop := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer stop()
	failed := make(chan error, 1)
	wg.Go(func() {
		if err := e.accept(work, &wg); work.Err() == nil {
			failed <- err
		}
	})
	if len(rec.Chain) > 0 {
		e.begin()
	}
	close(e.ready)
	tick := time.NewTicker(pollEvery)
	defer tick.Stop()
	soon := time.NewTimer(0)
	soon.Stop()
	defer soon.Stop()
	defer e.end(true)
	defer e.keepCopy() // before it
	for {
		e.publish()
		select {
		case <-ctx.Done():
			return nil
		case err := <-failed:
			return fmt.Errorf("accept election streams: %w", err)
		case op := <-e.ops:
			op()
		case <-e.laters:
			e.runLaters()
		case <-e.kick:
			e.decide() // who came or left needs no new poll
			e.poll(work, &wg)
		case <-tick.C:
			e.poll(work, &wg)
			e.keepCopy()
		case <-soon.C:
			e.poll(work, &wg)
		case cs := <-e.polled:
			e.polling = false
			e.heard(cs)
			e.decide()
			if time.Since(e.added) < pollSoonFor {
				soon.Reset(pollSoon)
			}
		}
	}
}

// Ready returns a channel that is closed once Run has given the machine all
// that this node knew before it was stopped, or has found that it cannot
// (State.Stopped). Until then the machine is empty: do not answer from it.
func (e *Election) Ready() <-chan struct{} { return e.ready }

// later has Run call f, without waiting: it may be called from anywhere.
func (e *Election) later(f func()) {
	e.mu.Lock()
	e.queue = append(e.queue, f)
	e.mu.Unlock()
	select {
	case e.laters <- struct{}{}:
	default:
	}
}

func (e *Election) runLaters() {
	e.mu.Lock()
	fs := e.queue
	e.queue = nil
	e.mu.Unlock()
	for _, f := range fs {
		f()
	}
}

// do runs f in Run's goroutine and waits for it.
func (e *Election) do(ctx context.Context, f func()) error {
	ran := make(chan struct{})
	select {
	case e.ops <- func() { f(); close(ran) }:
	case <-e.done:
		return errStopped
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	<-ran
	return nil
}

var errStopped = errors.New("the election has been stopped")

// Kick makes the master look at once whether votes have to change; call it
// when the nodes of the domain state changed.
func (e *Election) Kick() {
	select {
	case e.kick <- struct{}{}:
	default:
	}
}

// poll asks all members how far they are, if this node leads.
func (e *Election) poll(ctx context.Context, wg *sync.WaitGroup) {
	l := e.current()
	if l == nil || !l.leads() {
		e.rule.NotLeading()
		e.mu.Lock()
		clear(e.contacts)
		clear(e.leaving)
		e.mu.Unlock()
		return
	}
	if e.polling {
		return
	}
	e.polling = true
	wg.Go(func() {
		l.makeReady()
		select {
		case e.polled <- e.askAll(ctx, l):
		case <-ctx.Done():
		}
	})
}

// askAll asks all members how far they are.
func (e *Election) askAll(ctx context.Context, l *life) []Contact {
	members := e.d.Members()
	members = slices.DeleteFunc(slices.Clone(members), func(m Member) bool { return m.ID == e.cfg.Self })
	cs := make([]Contact, len(members))
	var asks sync.WaitGroup
	for i, m := range members {
		asks.Go(func() { cs[i] = e.ask(ctx, m.ID, l) })
	}
	asks.Wait()
	return cs
}

func (e *Election) heard(cs []Contact) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, c := range cs {
		old := e.contacts[c.ID]
		switch {
		case c.Last.IsZero(): // no answer: keep when it was last heard
			c.Last, c.Index = old.Last, old.Index
		case old.Since.IsZero():
			c.Since = c.Last
		default:
			c.Since = old.Since
		}
		e.contacts[c.ID] = c
	}
}

// decide takes the steps that the rule asks for, each on fresh facts.
func (e *Election) decide() {
	for range 16 {
		l := e.current()
		if l == nil || !l.leads() {
			e.rule.NotLeading()
			return
		}
		if l.readyTerm.Load() != l.raft.CurrentTerm() {
			return // the members may be of yesterday
		}
		f, ok := e.facts(l)
		if !ok {
			return
		}
		effects := e.rule.Step(time.Now(), f)
		if len(effects) == 0 {
			return
		}
		for _, x := range effects {
			err := l.perform(x)
			e.log.Info("election changed", "action", x.Action.String(), "peer", x.Node, "why", x.Why, "err", err)
			if err != nil || x.Action == Transfer {
				return
			}
			if x.Action == AddMember {
				e.added = time.Now()
			}
		}
	}
}

func (e *Election) facts(l *life) (Facts, bool) {
	servers, err := l.servers()
	if err != nil {
		return Facts{}, false
	}
	members := e.d.Members()
	if len(members) == 0 {
		return Facts{}, false // nothing is founded yet
	}
	now := time.Now()
	e.mu.Lock()
	defer e.mu.Unlock()
	f := Facts{Self: e.cfg.Self, Members: members, Servers: servers, Commit: l.raft.AppliedIndex()}
	for _, m := range members {
		c, ok := e.contacts[m.ID]
		if !ok && m.ID != e.cfg.Self { // unheard since we lead: the silence counts from now
			c = Contact{ID: m.ID, Last: now.Add(-liveFor - 1)}
			e.contacts[m.ID] = c
		}
		if m.ID != e.cfg.Self {
			f.Contacts = append(f.Contacts, c)
		}
	}
	for id := range e.leaving {
		f.Leaving = append(f.Leaving, id)
	}
	slices.Sort(f.Leaving)
	return f, true
}

// Withdraw takes a node's vote and its place in Raft before it is revoked; the
// master does it, so call it where State.Master is this node, or it returns
// ErrNotMaster. Where the
// voters left would be no majority without it, silent ones lose their vote
// first. All are asked now: a master that leads since a moment knows nothing of
// the others yet, and a vote taken from one that lives could be the one that the
// next change needs. The node stays out while this node leads.
func (e *Election) Withdraw(ctx context.Context, id mesh.NodeID) error {
	var err error
	began := time.Now()
	l := e.current()
	if l == nil || !l.leads() {
		return ErrNotMaster
	}
	answers := e.askAll(ctx, l)
	if e2 := e.do(ctx, func() {
		l := e.current()
		if l == nil || !l.leads() {
			err = ErrNotMaster
			return
		}
		if id == e.cfg.Self {
			err = errors.New("the master cannot take its own vote: hand the lead over first")
			return
		}
		e.heard(answers)
		e.mu.Lock()
		e.leaving[id] = true
		e.mu.Unlock()
		for err == nil {
			f, ok := e.facts(l)
			if !ok {
				break
			}
			var x Effect
			if x, ok = before(began, f, id); !ok {
				break
			}
			if x.Action == 0 {
				e.mu.Lock()
				delete(e.leaving, id)
				e.mu.Unlock()
				err = errTooFew
				break
			}
			err = l.perform(x)
		}
		if err == nil {
			err = l.perform(Effect{RemoveNode, id, "it is being revoked"})
		}
	}); e2 != nil {
		return e2
	}
	return err
}

var errTooFew = errors.New("too few of the nodes that vote answer now; try again when they do")

// TransferTo hands the lead to a node: by an administrator's word, or because
// this one goes out of service. A node without a vote gets one first.
func (e *Election) TransferTo(ctx context.Context, id mesh.NodeID) error {
	var err error
	began := time.Now()
	l := e.current()
	if l == nil || !l.leads() {
		return ErrNotMaster
	}
	answers := e.askAll(ctx, l) // what was heard a while ago may be dead by now
	if e2 := e.do(ctx, func() {
		l := e.current()
		if l == nil || !l.leads() {
			err = ErrNotMaster
			return
		}
		e.heard(answers)
		servers, e3 := l.servers()
		if e3 != nil {
			err = e3
			return
		}
		at := slices.IndexFunc(servers, func(s Server) bool { return s.ID == id })
		if at < 0 {
			err = fmt.Errorf("node %s takes no part in the election", id)
			return
		}
		if !servers[at].Voter {
			// Two votes, one of them silent, would decide nothing any more.
			f, ok := e.facts(l)
			if !ok || !newView(time.Now(), e.cfg.DeadFor, f).fresh(id) || !slices.ContainsFunc(answers, func(c Contact) bool { return c.ID == id && !c.Last.Before(began) }) {
				err = fmt.Errorf("node %s does not answer or is not up to date; try again when it is", id)
				return
			}
			if err = l.perform(Effect{Promoted, id, "it is to lead"}); err != nil {
				return
			}
		}
		e.rule.given, e.rule.givenAt = id, time.Now()
		err = l.perform(Effect{Transfer, id, "by request"})
	}); e2 != nil {
		return e2
	}
	return err
}
