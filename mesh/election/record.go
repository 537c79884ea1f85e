package election

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/fxamacker/cbor/v2"
	"github.com/hashicorp/raft"

	"posthouse/mesh"
)

// record is what an Election keeps of its own beside Raft's stores.
type record struct {
	Chain chain `cbor:"1,keyasint"`
	// Switching: the stores are of what was before Chain; they are to be set
	// aside before anything else.
	Switching bool `cbor:"2,keyasint,omitempty"`
	// Must: the machine's state is of another lineage, or of a log that never
	// counted; the leader's has to come whole before it is changed. Readers see
	// the frozen state until then.
	Must bool `cbor:"3,keyasint,omitempty"`
	// Wiped: this node lost its stores within the lineage and may not vote yet.
	Wiped bool `cbor:"4,keyasint,omitempty"`
	// Next is a promotion under way: with the state in "frozen", at Index.
	Next  chain  `cbor:"5,keyasint,omitempty"`
	Index uint64 `cbor:"6,keyasint,omitempty"`
	Term  uint64 `cbor:"7,keyasint,omitempty"`

	Rival  chain     `cbor:"8,keyasint,omitempty"`
	Forked []Command `cbor:"9,keyasint,omitempty"`
}

const (
	recordName = "record"
	frozenName = "frozen"
	// maxForked bounds the list of forked commands that is kept.
	maxForked = 1000
)

func loadRecord(s Storage) (r record, err error) {
	b, err := s.load(recordName)
	if err != nil || b == nil {
		return r, err
	}
	if err := cbor.Unmarshal(b, &r); err != nil {
		return r, fmt.Errorf("%w: record: %w", ErrDamaged, err)
	}
	return r, nil
}

func (e *Election) saveRecord(change func(*record)) error {
	e.mu.Lock()
	r := e.rec
	e.mu.Unlock()
	change(&r)
	b, err := cbor.Marshal(r)
	if err != nil {
		return fmt.Errorf("write the election's record: %w", err)
	}
	if err := e.d.Storage.save(recordName, b); err != nil {
		return err
	}
	e.mu.Lock()
	e.rec = r
	e.mu.Unlock()
	return nil
}

func (e *Election) chain() chain {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.rec.Chain
}

func (e *Election) current() *life {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.life
}

// The functions below run in Run's goroutine.

// begin starts Raft on what the stores hold. When it cannot, the node goes on
// without: State.Stopped says why.
func (e *Election) begin() {
	if err := e.tryBegin(); err != nil {
		e.stop(err)
	}
}

func (e *Election) stop(err error) {
	e.log.Error("this node takes no part in the election", "err", err)
	e.mu.Lock()
	e.stopped = err.Error()
	e.mu.Unlock()
	e.wake()
}

func (e *Election) tryBegin() error {
	e.mu.Lock()
	rec := e.rec
	e.mu.Unlock()
	if len(rec.Next) > 0 {
		return e.finishPromotion()
	}
	if rec.Switching {
		if err := e.d.Storage.setAside(); err != nil {
			return err
		}
		if err := e.saveRecord(func(r *record) { r.Switching = false }); err != nil {
			return err
		}
	}
	if at, _ := e.d.Machine.Applied(); at == 0 && (rec.Must || rec.Wiped) {
		if err := e.thaw(); err != nil {
			return err
		}
	}
	if e.given = nil; rec.Must && rec.Wiped {
		e.given = e.d.Since(0)
	}
	l, err := e.open()
	if err == nil {
		l.must.Store(rec.Must)
		l.trans.mute.Store(rec.Wiped)
		if err = l.restore(); err == nil {
			err = l.start()
		}
		if err != nil {
			err = errors.Join(err, l.close())
		}
	}
	if errors.Is(err, ErrDamaged) && !rec.Switching {
		return e.anew(err, false)
	}
	if err != nil {
		return err
	}
	if rec.Must && !l.must.Load() {
		e.later(e.restored)
	}
	e.mu.Lock()
	e.life, e.stopped = l, ""
	e.mu.Unlock()
	e.wake()
	return nil
}

// end stops Raft. On the way out of Run a master hands the lead over first.
func (e *Election) end(handOver bool) {
	e.mu.Lock()
	l := e.life
	e.life = nil
	e.mu.Unlock()
	if l == nil {
		return
	}
	if handOver && l.leads() {
		if s, err := l.servers(); err == nil && votersOf(s) > 1 {
			if err := l.raft.LeadershipTransfer().Error(); err != nil {
				e.log.Warn("the lead could not be handed over", "err", err)
			}
		}
	}
	if err := l.close(); err != nil {
		e.log.Warn("the election's log did not close", "err", err)
	}
	e.wake()
}

// thaw gives the machine the state that was frozen when its log was lost.
func (e *Election) thaw() error {
	b, err := e.d.Storage.load(frozenName)
	if err != nil || b == nil {
		return err
	}
	if err := e.d.Machine.Restore(bytes.NewReader(b)); err != nil {
		return fmt.Errorf("restore the frozen state: %w", err)
	}
	return nil
}

func (e *Election) saveFrozen() error {
	at, _ := e.d.Machine.Applied()
	b, err := encodeMachine(e.d.Machine)
	if err == nil {
		err = e.d.Storage.save(frozenName, b)
	}
	if err != nil {
		return fmt.Errorf("save the state: %w", err)
	}
	e.frozen = at
	return nil
}

// keepCopy has the frozen state follow the machine's, a few seconds behind: when
// the log turns out to be damaged, this node still knows its people, with a
// master or without.
func (e *Election) keepCopy() {
	at, _ := e.d.Machine.Applied()
	if l := e.current(); l == nil || l.must.Load() || at <= e.frozen {
		return
	}
	if err := e.saveFrozen(); err != nil {
		e.log.Warn("the second copy of the domain state could not be written", "err", err)
	}
}

// freeze stops Raft for good: the log holds what this version does not know.
func (e *Election) freeze(l *life, err error) {
	if e.current() != l {
		return
	}
	e.end(false)
	e.stop(fmt.Errorf("the domain state stands still at this node: %w", err))
}

// meet is told of a peer's lineage that is not ours. It may be called from
// anywhere.
func (e *Election) meet(r relation, theirs chain, from mesh.NodeID) {
	switch r {
	case ahead:
		e.later(func() { e.adopt(theirs, from) })
	case rivals:
		e.later(func() { e.oppose(theirs, from) })
	case strange:
		e.log.Warn("a peer belongs to another mesh", "peer", from)
	}
}

// adopt follows a lineage that descends from ours: what we committed after the
// fork is listed, the log set aside, and the state comes as a snapshot.
func (e *Election) adopt(theirs chain, from mesh.NodeID) {
	mine := e.chain()
	if mine.compare(theirs) != ahead || !followsPromoted && len(mine) > 0 {
		return
	}
	e.end(false)
	var forked []Command
	if len(mine) > 0 {
		forked = e.d.Since(mine.fork(theirs))
		if len(forked) > maxForked {
			forked = forked[len(forked)-maxForked:]
		}
		if err := e.saveFrozen(); err != nil {
			e.stop(err)
			return
		}
	}
	err := e.saveRecord(func(r *record) {
		*r = record{Chain: theirs, Switching: true, Must: len(mine) > 0, Forked: append(r.Forked, forked...)}
	})
	if err != nil {
		e.stop(err)
		return
	}
	e.log.Info("following a lineage", "generation", theirs.now().Generation, "peer", from, "forked", len(forked))
	e.begin()
}

// oppose notes a lineage that contradicts ours. Nothing is written on either
// side until a person promotes one of them.
func (e *Election) oppose(theirs chain, from mesh.NodeID) {
	e.mu.Lock()
	known := e.rec.Rival.now().ID == theirs.now().ID
	mine := e.rec.Chain
	e.mu.Unlock()
	if known || mine.compare(theirs) != rivals {
		return
	}
	e.log.Error("two halves of the mesh were promoted apart; both stop writing until one is promoted again", "peer", from)
	if err := e.saveRecord(func(r *record) { r.Rival = theirs }); err != nil {
		e.log.Warn("the election's record could not be written", "err", err)
	}
	e.wake()
}

// Bootstrap founds a mesh: a new lineage with this node as its only voter. Put
// the returned lineage into the first command.
func (e *Election) Bootstrap(ctx context.Context) (Lineage, error) {
	var lin Lineage
	var err error
	if e2 := e.do(ctx, func() { lin, err = e.bootstrap() }); e2 != nil {
		return Lineage{}, e2
	}
	return lin, err
}

func (e *Election) bootstrap() (Lineage, error) {
	if len(e.chain()) > 0 {
		return Lineage{}, errors.New("this node belongs to a mesh already")
	}
	id, err := e.newID()
	if err != nil {
		return Lineage{}, err
	}
	lin := Lineage{ID: id, Generation: 1}
	// What a founding that was cut off may have left:
	if err := e.d.Storage.setAside(); err != nil {
		return Lineage{}, err
	}
	l, err := e.open()
	if err != nil {
		return Lineage{}, err
	}
	err = raft.BootstrapCluster(e.raftConfig(l), l.stores.log, l.stores.stable, l.stores.snapshots, l.trans, e.alone())
	if err == nil {
		err = e.saveRecord(func(r *record) { *r = record{Chain: chain{lin}} })
	}
	if err == nil {
		err = l.start()
	}
	if err != nil {
		return Lineage{}, fmt.Errorf("found the mesh: %w", errors.Join(err, l.close()))
	}
	e.mu.Lock()
	e.life, e.stopped = l, ""
	e.mu.Unlock()
	e.wake()
	return lin, nil
}

func (e *Election) alone() raft.Configuration {
	id := e.cfg.Self.String()
	return raft.Configuration{Servers: []raft.Server{{Suffrage: raft.Voter, ID: raft.ServerID(id), Address: raft.ServerAddress(id)}}}
}

func (e *Election) newID() (id mesh.ID, err error) {
	if _, err = io.ReadFull(e.d.Rand, id[:]); err != nil {
		return id, fmt.Errorf("make a lineage id: %w", err)
	}
	return id, nil
}

// Promotion is what Promote did.
type Promotion struct {
	Lineage Lineage
	// Uncommitted are commands that stood in this node's log, of which nobody
	// knows whether they had been committed: they are now.
	Uncommitted []Command
}

// Promote begins a new lineage at this node, as its only voter, from its state
// and all of its log. It is for when a quorum is lost for good, or to decide
// between rivals; ask a person first. Then propose the machine's own promote
// command, with the lineage that is returned: it waits for the new master.
func (e *Election) Promote(ctx context.Context) (Promotion, error) {
	var p Promotion
	var err error
	if e2 := e.do(ctx, func() { p, err = e.promote() }); e2 != nil {
		return Promotion{}, e2
	}
	return p, err
}

func (e *Election) promote() (Promotion, error) {
	mine := e.chain()
	if len(mine) == 0 {
		return Promotion{}, errors.New("this node belongs to no mesh yet")
	}
	if len(mine) >= maxChain-2 {
		return Promotion{}, fmt.Errorf("this mesh was promoted %d times already", len(mine))
	}
	id, err := e.newID()
	if err != nil {
		return Promotion{}, err
	}
	e.mu.Lock()
	rival, must := e.rec.Rival, e.rec.Must
	e.mu.Unlock()
	if must {
		return Promotion{}, errors.New("this node's copy is of a lineage that was given up; promote another one")
	}
	e.end(false)
	l, err := e.open()
	at, term := e.d.Machine.Applied()
	fork := at
	if err == nil {
		err = l.restore()
		if err == nil {
			at, term, err = l.takeAll()
		}
		err = errors.Join(err, l.close())
	}
	if err != nil && !errors.Is(err, ErrDamaged) { // with a damaged log the applied state is all there is
		e.begin()
		return Promotion{}, fmt.Errorf("promote: %w", err)
	}
	next := append(chain{}, mine...)
	generation := mine.now().Generation
	for _, r := range rival {
		if !next.has(r.ID) {
			r.Superseded = true
			next = append(next, r)
			generation = max(generation, r.Generation)
		}
	}
	lin := Lineage{ID: id, Generation: generation + 1, Fork: fork}
	next = append(next, lin)
	if err := e.saveFrozen(); err != nil {
		e.begin()
		return Promotion{}, fmt.Errorf("promote: %w", err)
	}
	if err := e.saveRecord(func(r *record) { r.Next, r.Index, r.Term = next, max(at, 1), max(term, 1) }); err != nil {
		e.begin()
		return Promotion{}, fmt.Errorf("promote: %w", err)
	}
	e.begin()
	if s := e.stoppedWhy(); s != "" {
		return Promotion{}, fmt.Errorf("promote: %s", s)
	}
	return Promotion{Lineage: lin, Uncommitted: e.d.Since(fork)}, nil
}

// takeAll applies what stands in the log beyond the known commit index, and
// returns the log's end.
func (l *life) takeAll() (index, term uint64, err error) {
	m := l.e.d.Machine
	index, term = m.Applied()
	metas, err := l.stores.snapshots.List()
	if err != nil {
		return 0, 0, err
	}
	from := uint64(1)
	if len(metas) > 0 {
		from = metas[0].Index + 1
		if metas[0].Index > index {
			index = metas[0].Index
		}
		term = max(term, metas[0].Term)
	}
	last, err := l.stores.log.LastIndex()
	if err != nil {
		return 0, 0, err
	}
	var entry raft.Log
	for i := from; i <= last; i++ {
		if err := l.stores.log.GetLog(i, &entry); err != nil {
			return 0, 0, fmt.Errorf("read entry %d: %w", i, err)
		}
		if at, _ := m.Applied(); entry.Type == raft.LogCommand && i > at {
			if _, err := m.Apply(i, entry.Term, entry.Data); err != nil {
				return 0, 0, err
			}
		}
		index, term = max(index, i), max(term, entry.Term)
	}
	return index, term, nil
}

// finishPromotion makes stores that hold nothing but a snapshot of the frozen
// state with this node as only voter. It may be cut off anywhere and begun
// again.
func (e *Election) finishPromotion() error {
	e.mu.Lock()
	rec := e.rec
	e.mu.Unlock()
	if err := e.thaw(); err != nil {
		return err
	}
	if err := e.d.Storage.setAside(); err != nil {
		return err
	}
	l, err := e.open()
	if err != nil {
		return err
	}
	err = func() error {
		if err := l.stores.stable.SetUint64([]byte("CurrentTerm"), rec.Term); err != nil {
			return err
		}
		sink, err := l.stores.snapshots.Create(raft.SnapshotVersionMax, rec.Index, rec.Term, e.alone(), 1, l.trans)
		if err != nil {
			return err
		}
		return fsmSnapshot{e.d.Machine.Snapshot()}.Persist(sink)
	}()
	if err = errors.Join(err, l.close()); err != nil {
		return fmt.Errorf("promote: %w", err)
	}
	if err := e.saveRecord(func(r *record) { *r = record{Chain: r.Next, Forked: r.Forked} }); err != nil {
		return fmt.Errorf("promote: %w", err)
	}
	e.log.Warn("this node was promoted", "generation", rec.Next.now().Generation)
	return e.tryBegin()
}

func (e *Election) stoppedWhy() string {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.stopped
}

// ForgetForked drops the list of forked commands: a person has read it.
func (e *Election) ForgetForked(ctx context.Context) error {
	var err error
	if e2 := e.do(ctx, func() { err = e.saveRecord(func(r *record) { r.Forked = nil }) }); e2 != nil {
		return e2
	}
	return err
}

func names(list []string) string {
	switch len(list) {
	case 0:
		return "nobody"
	case 1:
		return list[0]
	}
	return strings.Join(list[:len(list)-1], ", ") + " and " + list[len(list)-1]
}
