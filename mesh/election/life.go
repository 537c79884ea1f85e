package election

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/raft"

	"posthouse/mesh"
)

// life is one run of Raft: from opening its stores to closing them. A node has
// several in a row when lineages or damage make it begin anew.
type life struct {
	e       *Election
	log     *slog.Logger
	stores  *stores
	streams *streams
	trans   *guarded
	raft    *raft.Raft

	notify    chan bool // Raft blocks until it is read
	observe   chan raft.Observation
	barrier   chan struct{} // a batch was applied: let the followers know
	quit      chan struct{}
	wg        sync.WaitGroup
	readyTerm atomic.Uint64 // the term in which this master has applied all before it

	must   atomic.Bool // the machine's state is not the leader's: all of that has to come first
	beside Machine     // holds what has come of it, from the first command on; owned by turn
	turn   sync.Mutex  // which machine a command goes to; held while one is applied
	halted atomic.Pointer[error]
	hurt   sync.Once

	mu      sync.Mutex     // guards closing
	closing bool           // nobody begins to wait for Raft any more
	waits   sync.WaitGroup // for Raft's answers
}

const (
	// raftTimeout bounds one exchange with a peer, applyTimeout the wait for a
	// place in the queue of the leader.
	raftTimeout  = 5 * time.Second
	applyTimeout = 5 * time.Second
	// A snapshot is due after so many entries; so many stay behind it for
	// followers that are a little late.
	snapshotAfter = 2048
	trailing      = 2048
)

func (e *Election) raftConfig(l *life) *raft.Config {
	c := raft.DefaultConfig()
	c.LocalID = raft.ServerID(e.cfg.Self.String())
	c.HeartbeatTimeout, c.ElectionTimeout, c.LeaderLeaseTimeout, c.CommitTimeout = e.cfg.Heartbeat, e.cfg.Heartbeat, e.cfg.Lease, e.cfg.Commit
	c.SnapshotThreshold, c.TrailingLogs = snapshotAfter, trailing
	c.NotifyCh = l.notify
	c.Logger = newHclog(l.log)
	c.ShutdownOnRemove = false        // we stop it ourselves
	c.NoSnapshotRestoreOnStart = true // restore does it, with what was applied after it
	c.NoLegacyTelemetry = true
	return c
}

// open prepares a life without starting Raft.
func (e *Election) open() (*life, error) {
	l := &life{e: e, log: e.log, notify: make(chan bool, 8), observe: make(chan raft.Observation, 64), barrier: make(chan struct{}, 1), quit: make(chan struct{})}
	st, err := e.d.Storage.open(e.log, l.damaged)
	if err != nil {
		return nil, err
	}
	l.stores = st
	l.streams = newStreams(e)
	inner := raft.NewNetworkTransportWithConfig(&raft.NetworkTransportConfig{Stream: l.streams, MaxPool: 3, Timeout: raftTimeout, Logger: newHclog(e.log),
		MsgpackUseNewTimeFormat: true}) // fixed for ever: mixed settings do not understand each other
	l.trans = newGuarded(inner, e.d.Trusted)
	return l, nil
}

// restore brings the machine to what this node had applied before: the newest
// snapshot, then the log up to the last index known as committed. Raft itself
// would know the latter only when it hears a leader.
func (l *life) restore() error {
	m := l.e.d.Machine
	metas, err := l.stores.snapshots.List()
	if err != nil {
		return fmt.Errorf("read the snapshot: %w", err)
	}
	var from uint64
	if len(metas) > 0 {
		from = metas[0].Index
		if at, _ := m.Applied(); at < from || l.must.Load() {
			_, r, err := l.stores.snapshots.Open(metas[0].ID)
			if err != nil {
				return fmt.Errorf("read the snapshot: %w", err)
			}
			err = m.Restore(r)
			if err = errors.Join(err, r.Close()); err != nil {
				return fmt.Errorf("restore the snapshot: %w", err)
			}
		}
		l.must.Store(false)
	}
	to, err := l.stores.log.known()
	if err != nil || l.must.Load() {
		return err
	}
	var entry raft.Log
	for i := from + 1; i <= to; i++ {
		if err := l.stores.log.GetLog(i, &entry); err != nil {
			return fmt.Errorf("read entry %d: %w", i, err)
		}
		if at, _ := m.Applied(); entry.Type == raft.LogCommand && i > at {
			if _, err := m.Apply(i, entry.Term, entry.Data); err != nil {
				return err
			}
		}
	}
	return nil
}

// start runs Raft on what open prepared.
func (l *life) start() error {
	r, err := raft.NewRaft(l.e.raftConfig(l), &fsm{l}, l.stores.log, l.stores.stable, l.stores.snapshots, l.trans)
	if err != nil {
		return fmt.Errorf("start Raft: %w", err)
	}
	l.raft = r
	r.RegisterObserver(raft.NewObserver(l.observe, false, func(o *raft.Observation) bool {
		switch o.Data.(type) {
		case raft.LeaderObservation, raft.RaftState, raft.PeerObservation:
			return true
		}
		return false
	}))
	l.wg.Go(l.attend)
	if s, err := l.servers(); err == nil && onlyVoter(s, l.e.cfg.Self) {
		l.wg.Go(func() { l.standAtOnce(len(s) > 1) })
	}
	l.wg.Go(func() {
		for {
			select {
			case <-l.barrier:
				// Without it the followers would learn of a batch's commit with
				// the next heartbeat's append only.
				l.barred()
			case <-l.quit:
				return
			}
		}
	})
	return nil
}

// standWait is how long the only voter of several nodes waits for a word that
// its disk is the one that it had: a few round trips of a slow line, less than
// Raft itself would wait.
const standWait = time.Second

// standAtOnce has the only voter stand for election now: there is nobody whose
// silence it would have to wait for. Where there are others, its disk may be an
// older one, and the vote may be theirs by now. So they are given a moment to say
// so. It leads without their word, or nobody would while they are away, but then
// far beyond the terms that it may have forgotten.
func (l *life) standAtOnce(others bool) {
	if others && l.e.d.Vetted != nil {
		timer := time.NewTimer(standWait)
		defer timer.Stop()
		select {
		case <-l.e.d.Vetted:
		case <-timer.C:
			if err := l.leap(); err != nil {
				l.log.Warn("this node goes on in the terms that it knows", "err", err)
			}
		case <-l.quit:
			return
		}
	}
	if l.trans.mute.Load() {
		return
	}
	self := l.self()
	l.tell(&raft.TimeoutNowRequest{RPCHeader: self})
}

// leap has Raft go on in a term that nobody can have led in: what a leader of
// such a term would send is all that makes Raft write one down.
func (l *life) leap() error {
	var b [2]byte
	if _, err := io.ReadFull(l.e.d.Rand, b[:]); err != nil {
		return fmt.Errorf("draw a term: %w", err)
	}
	self := l.self()
	l.tell(&raft.AppendEntriesRequest{RPCHeader: self, Term: l.raft.CurrentTerm() + 16 + uint64(binary.BigEndian.Uint16(b[:]))})
	return nil
}

func (l *life) self() raft.RPCHeader {
	id := []byte(l.e.cfg.Self.String())
	return raft.RPCHeader{ProtocolVersion: raft.ProtocolVersionMax, ID: id, Addr: id}
}

// tell gives Raft what a peer might have sent.
func (l *life) tell(what any) {
	select {
	case l.trans.rpc <- raft.RPC{Command: what, RespChan: make(chan raft.RPCResponse, 1)}:
	case <-l.quit:
	}
}

// attend drains Raft's channels and lets Run look when something changed.
func (l *life) attend() {
	for {
		select {
		case leads := <-l.notify:
			if leads {
				l.kickBarrier()
			}
		case <-l.observe:
		case <-l.quit:
			return
		}
		l.e.Kick()
		l.e.wake()
	}
}

func (l *life) kickBarrier() {
	select {
	case l.barrier <- struct{}{}:
	default:
	}
}

// barred waits for a barrier.
func (l *life) barred() error {
	if !l.enter() {
		return errStopped
	}
	defer l.waits.Done()
	return l.raft.Barrier(applyTimeout).Error()
}

// enter asks to wait for an answer of Raft, which ends by waits.Done. Raft 1.8
// never answers what was committed and waits for the machine when it is shut
// down, so all have to be through before; it does answer them until then, at
// the latest when it has lost the lead.
func (l *life) enter() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.closing {
		l.waits.Add(1)
	}
	return !l.closing
}

// close ends Raft, its streams and its goroutines, and closes the stores.
// After it nothing of this life runs.
func (l *life) close() error {
	l.mu.Lock()
	l.closing = true
	l.mu.Unlock()
	l.waits.Wait()
	l.streams.Close()
	if l.raft != nil {
		l.raft.Shutdown().Error() // always nil; attend goes on reading until it is done
	}
	close(l.quit)
	l.trans.close()
	l.wg.Wait()
	if err := l.stores.close(); err != nil {
		return fmt.Errorf("close the log: %w", err)
	}
	return nil
}

func (l *life) leads() bool { return l.raft.State() == raft.Leader }

// makeReady has the master apply all that was committed before its term.
func (l *life) makeReady() error {
	term := l.raft.CurrentTerm()
	if l.readyTerm.Load() == term {
		return nil
	}
	if waitsForBarrier {
		if err := l.barred(); err != nil {
			return err
		}
	}
	l.readyTerm.Store(term)
	l.e.wake()
	return nil
}

func (l *life) servers() ([]Server, error) {
	f := l.raft.GetConfiguration()
	if err := f.Error(); err != nil {
		return nil, fmt.Errorf("read Raft's configuration: %w", err)
	}
	var out []Server
	for _, s := range f.Configuration().Servers {
		id, err := mesh.ParseNodeID(string(s.ID))
		if err != nil {
			return nil, fmt.Errorf("read Raft's configuration: %w", err)
		}
		out = append(out, Server{id, s.Suffrage == raft.Voter})
	}
	slices.SortFunc(out, func(a, b Server) int { return cmp.Compare(a.ID, b.ID) })
	return out, nil
}

// perform carries out one effect and waits until it is committed.
func (l *life) perform(x Effect) error {
	id, at := raft.ServerID(x.Node.String()), raft.ServerAddress(x.Node.String())
	var f raft.Future
	switch x.Action {
	case AddMember:
		f = l.raft.AddNonvoter(id, at, 0, applyTimeout)
	case Promoted:
		f = l.raft.AddVoter(id, at, 0, applyTimeout)
	case Demoted:
		f = l.raft.DemoteVoter(id, 0, applyTimeout)
	case RemoveNode:
		f = l.raft.RemoveServer(id, 0, applyTimeout)
	case Transfer:
		f = l.raft.LeadershipTransferToServer(id, at)
	}
	if err := f.Error(); err != nil {
		return fmt.Errorf("%s node %s: %w", x.Action, x.Node, err)
	}
	l.kickBarrier()
	return nil
}

// damaged is called from wherever a bad entry is met; Run begins anew.
func (l *life) damaged(err error) {
	l.hurt.Do(func() { l.e.later(func() { l.e.refetch(l, err, false) }) })
}

// halt stops this life because the machine cannot apply what stands in the
// log; the node goes on with the state as it is.
func (l *life) halt(err error) {
	if l.halted.CompareAndSwap(nil, &err) {
		l.e.later(func() { l.e.freeze(l, err) })
	}
}

// fsm stands between Raft and the machine.
type fsm struct{ l *life }

var errNoSnapshot = errors.New("the log goes on from a state that this node does not have")

func (f *fsm) Apply(entry *raft.Log) any {
	l := f.l
	if err := l.halted.Load(); err != nil {
		return *err
	}
	l.turn.Lock()
	defer l.turn.Unlock()
	m := l.e.d.Machine
	if l.must.Load() {
		var err error
		if m, err = l.another(); err != nil {
			l.damaged(err)
			return err
		}
	}
	if at, _ := m.Applied(); entry.Index <= at {
		return nil // applied before Raft was started anew
	}
	res, err := m.Apply(entry.Index, entry.Term, entry.Data)
	if err != nil {
		l.halt(err)
		return err
	}
	if err := l.stores.log.applied(entry.Index); err != nil {
		l.log.Warn("the commit index could not be noted", "err", err)
	}
	l.e.wake()
	return res
}

func (f *fsm) Snapshot() (raft.FSMSnapshot, error) {
	if err := f.l.halted.Load(); err != nil {
		return nil, *err
	}
	if f.l.must.Load() {
		return nil, errNoSnapshot
	}
	return fsmSnapshot{f.l.e.d.Machine.Snapshot()}, nil
}

func (f *fsm) Restore(r io.ReadCloser) error {
	defer r.Close()
	l := f.l
	if err := l.halted.Load(); err != nil {
		return *err
	}
	l.turn.Lock()
	defer l.turn.Unlock()
	l.beside = nil
	if err := l.e.d.Machine.Restore(r); err != nil {
		l.halt(err)
		return err
	}
	at, _ := l.e.d.Machine.Applied()
	if err := l.stores.log.applied(at); err != nil {
		l.log.Warn("the commit index could not be noted", "err", err)
	}
	if l.must.Swap(false) {
		l.e.later(l.e.restored)
	}
	l.e.wake()
	return nil
}

// another returns the machine for what the leader sends from the first entry on,
// while readers keep the state that this node had.
func (l *life) another() (Machine, error) {
	if l.beside == nil {
		first, err := l.stores.log.FirstIndex()
		if err != nil {
			return nil, err
		}
		if first != 1 || l.e.d.Blank == nil {
			return nil, errNoSnapshot
		}
		l.beside = l.e.d.Blank()
	}
	return l.beside, nil
}

// change gives the machine the state that has come beside it. It reports
// whether the machine's state is the leader's now.
func (l *life) change() (bool, error) {
	l.turn.Lock()
	defer l.turn.Unlock()
	if !l.must.Load() {
		return true, nil
	}
	if l.beside == nil {
		return false, nil
	}
	b, err := encodeMachine(l.beside)
	if err == nil {
		err = l.e.d.Machine.Restore(bytes.NewReader(b))
	}
	if err != nil {
		return false, fmt.Errorf("take the state that was fetched anew: %w", err)
	}
	l.beside = nil
	l.must.Store(false)
	return true, nil
}

type fsmSnapshot struct{ w io.WriterTo }

func (s fsmSnapshot) Persist(sink raft.SnapshotSink) error {
	if _, err := s.w.WriteTo(sink); err != nil {
		return errors.Join(err, sink.Cancel())
	}
	return sink.Close()
}

func (fsmSnapshot) Release() {}

func encodeMachine(m Machine) ([]byte, error) {
	var b bytes.Buffer
	if _, err := m.Snapshot().WriteTo(&b); err != nil {
		return nil, fmt.Errorf("write the state: %w", err)
	}
	return b.Bytes(), nil
}
