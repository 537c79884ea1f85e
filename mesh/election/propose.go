package election

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/fxamacker/cbor/v2"
	"github.com/hashicorp/raft"

	"posthouse/mesh"
)

// ErrNotMaster means that this node does not lead.
var ErrNotMaster = errors.New("this node is not the master")

// NoMaster means that nobody can change the domain state now; reading goes on.
type NoMaster struct {
	Names      []string // of the voters that are reached, this node included
	Have, Need int
	Of         int // voters in all
	Why        string
}

func (n *NoMaster) Error() string {
	if n.Why != "" {
		return "nobody can change the domain state now: " + n.Why
	}
	return fmt.Sprintf("reached %s, but nobody can change the domain state now: needs %d of %d", names(n.Names), n.Need, n.Of)
}

// Refused is the master's refusal of a command before it was proposed.
type Refused struct{ Text string }

func (r *Refused) Error() string { return r.Text }

// The request and the reply that go between a node and the master.
type request struct {
	Version uint8  `cbor:"1,keyasint"`
	Kind    uint8  `cbor:"2,keyasint"` // 1 propose, 2 how far are you, 3 what must a current copy hold
	Command []byte `cbor:"3,keyasint,omitempty"`
	Lineage []byte `cbor:"4,keyasint,omitempty"` // of the asking node: 16 bytes
	Last    uint64 `cbor:"5,keyasint,omitempty"` // kind 2: the end of the master's log
}

type reply struct {
	Code   uint8  `cbor:"1,keyasint"`
	Text   string `cbor:"2,keyasint,omitempty"`
	Index  uint64 `cbor:"3,keyasint,omitempty"`
	Result []byte `cbor:"4,keyasint,omitempty"`
}

const (
	askPropose = 1
	askStatus  = 2
	askCurrent = 3

	replyOK        = 0
	replyNotMaster = 1 // try there, or later
	replyRefused   = 2 // final
	replyFailed    = 3 // outcome unknown: the same command may be tried again

	requestVersion = 1
	// MaxRequest bounds a request and a reply, in bytes.
	MaxRequest = 1<<20 + 4096
	// forwardTime bounds one try at the master; the command's id makes the next
	// one harmless.
	forwardTime = 8 * time.Second
	// retryAfter is the pause between two tries when nothing happened that
	// would wake us earlier.
	retryAfter = 250 * time.Millisecond
)

var requestDec, _ = cbor.DecOptions{MaxArrayElements: 16, MaxMapPairs: 16, MaxNestedLevels: 4, IndefLength: cbor.IndefLengthForbidden, TagsMd: cbor.TagsForbidden}.DecMode()

// Propose has the master put the command into the log, and returns the
// machine's result when this node has applied it as well: what was done here
// can be seen here. It may be repeated with the same bytes. The error is a
// *NoMaster after Config.Patience without one, a *Refused (or at the master
// what Machine.Prepare said) for a command that is none, or ctx's.
func (e *Election) Propose(ctx context.Context, command []byte) ([]byte, error) {
	r, err := e.insist(ctx, request{Kind: askPropose, Command: command})
	if err != nil {
		return nil, err
	}
	return r.Result, e.reach(ctx, r.Index, "the change is made, but has not reached this node yet")
}

// Current returns when this node has applied every command that anybody was
// answered before the call. Then what its machine does not know does not
// exist. The error is a *NoMaster after Config.Patience without one, or ctx's:
// the copy may be behind.
func (e *Election) Current(ctx context.Context) error {
	r, err := e.insist(ctx, request{Kind: askCurrent})
	if err != nil {
		return err
	}
	return e.reach(ctx, r.Index, "what the master has has not reached this node yet")
}

// insist puts a request to whoever is master until it is answered.
func (e *Election) insist(ctx context.Context, q request) (reply, error) {
	deadline := time.Now().Add(e.cfg.Patience)
	for {
		changed := e.changes()
		r, err := e.try(ctx, q)
		if !errors.Is(err, errRetry) {
			return r, err
		}
		if !time.Now().Before(deadline) {
			return reply{}, e.noMaster()
		}
		t := time.NewTimer(retryAfter)
		select {
		case <-ctx.Done():
			t.Stop()
			return reply{}, context.Cause(ctx)
		case <-e.done:
			t.Stop()
			return reply{}, errStopped
		case <-changed:
			// A command of somebody else wakes us too: then it is too early.
			select {
			case <-t.C:
			case <-ctx.Done():
			}
		case <-t.C:
		}
		t.Stop()
	}
}

var errRetry = errors.New("try again")

func (e *Election) try(ctx context.Context, q request) (reply, error) {
	e.mu.Lock()
	loaded := e.loaded
	e.mu.Unlock()
	if !loaded { // Run is about to begin
		return reply{}, errRetry
	}
	s := e.State()
	if s.Stopped != "" || s.Rival.Generation != 0 || len(s.Lineages) == 0 {
		return reply{}, e.noMaster()
	}
	switch s.Master {
	case 0:
		return reply{}, errRetry
	case e.cfg.Self:
		return e.lead(e.cfg.Self, q)
	}
	ctx, cancel := context.WithTimeout(ctx, forwardTime)
	defer cancel()
	r, err := e.forward(ctx, s.Master, q)
	if err != nil {
		e.log.Debug("the master could not be asked", "peer", s.Master, "err", err)
		return reply{}, errRetry
	}
	switch r.Code {
	case replyOK:
		return r, nil
	case replyRefused:
		return reply{}, &Refused{r.Text}
	}
	return reply{}, errRetry
}

func (e *Election) forward(ctx context.Context, to mesh.NodeID, q request) (r reply, err error) {
	q.Version = requestVersion
	id := e.chain().now().ID
	q.Lineage = id[:]
	b, err := cbor.Marshal(q)
	if err != nil {
		return r, fmt.Errorf("ask node %s: %w", to, err)
	}
	b, err = e.d.Forward.Forward(ctx, to, b)
	if err != nil {
		return r, fmt.Errorf("ask node %s: %w", to, err)
	}
	if err := requestDec.Unmarshal(b, &r); err != nil {
		return r, fmt.Errorf("read the answer of node %s: %w", to, err)
	}
	return r, nil
}

// HandleForward answers a request that Forwarder.Forward carried here from a
// peer whose identity is proven.
func (e *Election) HandleForward(from mesh.NodeID, req []byte) []byte {
	b, err := cbor.Marshal(e.answer(from, req))
	if err != nil {
		return nil // a reply always encodes
	}
	return b
}

func (e *Election) answer(from mesh.NodeID, req []byte) reply {
	var q request
	if len(req) > MaxRequest || requestDec.Unmarshal(req, &q) != nil || q.Version != requestVersion {
		return reply{Code: replyRefused, Text: "the request is malformed"}
	}
	id := e.chain().now().ID
	if string(q.Lineage) != string(id[:]) {
		return reply{Code: replyNotMaster}
	}
	switch q.Kind {
	case askStatus:
		l := e.current()
		if l == nil {
			return reply{Code: replyFailed}
		}
		if q.Last > 0 && l.trans.mute.Load() && l.raft.LastIndex() >= q.Last {
			e.later(func() { e.caughtUp(l) })
		}
		return reply{Code: replyOK, Index: l.raft.AppliedIndex()}
	case askPropose, askCurrent:
		r, err := e.lead(from, q)
		switch {
		case err == nil:
			return r
		case errors.Is(err, errRetry):
			return reply{Code: replyNotMaster}
		default:
			return reply{Code: replyRefused, Text: err.Error()}
		}
	}
	return reply{Code: replyRefused, Text: "this version does not know the request"}
}

// lead does at the master what a node asks of it.
func (e *Election) lead(from mesh.NodeID, q request) (reply, error) {
	e.mu.Lock()
	l, rival := e.life, len(e.rec.Rival) > 0
	e.mu.Unlock()
	if l == nil || rival || !l.leads() || l.makeReady() != nil {
		return reply{}, errRetry
	}
	if q.Kind == askCurrent {
		return e.confirm(l)
	}
	return e.order(l, from, q.Command)
}

// confirm says how far the machine is, once a majority has confirmed that this
// node still led after it looked: so nobody else can have answered more.
func (e *Election) confirm(l *life) (reply, error) {
	at, _ := e.d.Machine.Applied() // an answered command was applied here first
	if !l.enter() {
		return reply{}, errRetry
	}
	defer l.waits.Done()
	if err := l.raft.VerifyLeader().Error(); err != nil {
		return reply{}, errRetry
	}
	return reply{Code: replyOK, Index: at}, nil
}

// order puts a command into the log.
func (e *Election) order(l *life, from mesh.NodeID, command []byte) (reply, error) {
	prepared, err := e.d.Machine.Prepare(command, from, e.d.Now())
	if err != nil {
		return reply{}, err
	}
	if !l.enter() {
		return reply{}, errRetry
	}
	defer l.waits.Done()
	f := l.raft.Apply(prepared, applyTimeout)
	if err := f.Error(); err != nil {
		e.log.Debug("proposing failed", "err", err)
		return reply{}, errRetry
	}
	l.kickBarrier()
	switch v := f.Response().(type) {
	case []byte:
		return reply{Code: replyOK, Index: f.Index(), Result: v}, nil
	case error:
		return reply{}, v
	}
	return reply{}, errRetry
}

// ask polls one member.
func (e *Election) ask(ctx context.Context, id mesh.NodeID, l *life) Contact {
	ctx, cancel := context.WithTimeout(ctx, pollTime)
	defer cancel()
	r, err := e.forward(ctx, id, request{Kind: askStatus, Last: l.raft.LastIndex()})
	if err != nil || r.Code != replyOK {
		return Contact{ID: id}
	}
	return Contact{ID: id, Last: time.Now(), Index: r.Index}
}

// reach waits until this node has applied index; behind says what it means when
// ctx ends before.
func (e *Election) reach(ctx context.Context, index uint64, behind string) error {
	for {
		changed := e.changes()
		// A state that is to be given up holds nothing of what was asked for.
		l := e.current()
		if at, _ := e.d.Machine.Applied(); at >= index && (l == nil || !l.must.Load()) {
			return nil
		}
		select {
		case <-changed:
		case <-e.done:
			return errStopped
		case <-ctx.Done():
			return fmt.Errorf("%s: %w", behind, context.Cause(ctx))
		}
	}
}

// changes returns a channel that is closed at the next wake.
func (e *Election) changes() <-chan struct{} {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.advanced
}

func (e *Election) wake() {
	e.mu.Lock()
	defer e.mu.Unlock()
	close(e.advanced)
	e.advanced = make(chan struct{})
}

func (e *Election) noMaster() error {
	s := e.State()
	switch {
	case len(s.Lineages) == 0:
		return &NoMaster{Why: "this node belongs to no mesh yet"}
	case s.Stopped != "":
		return &NoMaster{Why: s.Stopped}
	case s.Rival.Generation != 0:
		return &NoMaster{Why: "two halves of the mesh were promoted apart; decide for one by promoting it again"}
	}
	n := &NoMaster{Need: s.Needs, Of: len(s.Voters), Have: s.Reached}
	for _, m := range e.d.Members() {
		if slices.Contains(s.Voters, m.ID) && (m.ID == e.cfg.Self || e.d.Reached(m.ID)) {
			n.Names = append(n.Names, m.Name)
		}
	}
	return n
}

// State returns what this node knows now.
func (e *Election) State() State {
	e.mu.Lock()
	l, rec, stopped, damaged := e.life, e.rec, e.stopped, e.damaged
	e.mu.Unlock()
	s := State{Self: e.cfg.Self, Stopped: stopped, Damaged: damaged, Forked: slices.Clone(rec.Forked), Lineages: slices.Clone(rec.Chain), Role: mesh.RoleMember, Rival: rec.Rival.now()}
	s.Applied, _ = e.d.Machine.Applied()
	now := rec.Chain.now()
	s.Authority = mesh.Authority{Lineage: now.ID, Generation: now.Generation}
	if l == nil {
		return s
	}
	s.Authority.Term = l.raft.CurrentTerm()
	_, leader := l.raft.LeaderWithID()
	if id, err := mesh.ParseNodeID(string(leader)); err == nil {
		s.Master = id
	}
	s.Contact = l.raft.LastContact()
	servers, err := l.servers()
	if err != nil {
		servers = nil
	}
	for _, x := range servers {
		if !x.Voter {
			s.Others = append(s.Others, x.ID)
			continue
		}
		s.Voters = append(s.Voters, x.ID)
		if x.ID == e.cfg.Self {
			s.Role = mesh.RoleVoter
		}
		if x.ID == e.cfg.Self || e.d.Reached(x.ID) {
			s.Reached++
		}
	}
	s.Needs = len(s.Voters)/2 + 1
	if l.raft.State() == raft.Leader {
		s.Master, s.Role, s.Contact = e.cfg.Self, mesh.RoleMaster, time.Now()
	} else if s.Master == e.cfg.Self {
		s.Master = 0
	}
	return s
}

// Contact returns State().Contact alone, at little cost: it is asked for each
// recipient of a message.
func (e *Election) Contact() time.Time {
	e.mu.Lock()
	l := e.life
	e.mu.Unlock()
	switch {
	case l == nil:
		return time.Time{}
	case l.raft.State() == raft.Leader:
		return time.Now()
	}
	return l.raft.LastContact()
}

// Acting returns the authority under which this node may act as master now: it
// holds the lease and has applied all before its term. What a master sends
// carries it; receivers keep a Fence.
func (e *Election) Acting() (mesh.Authority, bool) {
	l := e.current()
	if l == nil || !l.leads() {
		return mesh.Authority{}, false
	}
	e.mu.Lock()
	now, rival := e.rec.Chain.now(), len(e.rec.Rival) > 0
	e.mu.Unlock()
	term := l.raft.CurrentTerm()
	return mesh.Authority{Lineage: now.ID, Generation: now.Generation, Term: term}, !rival && l.readyTerm.Load() == term
}

// Watch calls f with each change of the state that is more than applied
// commands and contact times, from Run's goroutine; f must not block.
func (e *Election) Watch(f func(State)) (cancel func()) {
	e.mu.Lock()
	defer e.mu.Unlock()
	id := e.nextID
	e.nextID++
	e.watchers[id] = f
	return func() {
		e.mu.Lock()
		defer e.mu.Unlock()
		delete(e.watchers, id)
	}
}

func (e *Election) publish() {
	s := e.State()
	e.mu.Lock()
	old := e.last
	e.last = s
	var fs []func(State)
	if s.Master != old.Master || s.Authority != old.Authority || s.Role != old.Role || s.Stopped != old.Stopped || s.Rival != old.Rival ||
		len(s.Forked) != len(old.Forked) || !slices.Equal(s.Voters, old.Voters) || !slices.Equal(s.Others, old.Others) || !slices.Equal(s.Lineages, old.Lineages) {
		ids := make([]int, 0, len(e.watchers))
		for id := range e.watchers {
			ids = append(ids, id)
		}
		slices.Sort(ids)
		for _, id := range ids {
			fs = append(fs, e.watchers[id])
		}
	}
	e.mu.Unlock()
	for _, f := range fs {
		f(s)
	}
}

func votersOf(list []Server) (n int) {
	for _, s := range list {
		if s.Voter {
			n++
		}
	}
	return n
}
