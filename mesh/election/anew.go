package election

import (
	"context"
	"errors"
	"slices"

	"posthouse/mesh"
)

// FetchAnew throws away what this node keeps of Raft and has the leader send it
// again; until it has caught up the node does not vote. It is for a node that
// was found to run on an older image of its disk: it has forgotten what it
// promised. led says what a peer that was asked knows (State.LedWithout). When
// nobody can lead without it, the only voter keeps what it has: nobody could send
// it, and only a person can promote another node. Else its vote is of yesterday,
// and what its log says beyond that never counted: the machine gets the leader's
// state, whole, and the commands that it does not hold are listed as forked.
func (e *Election) FetchAnew(ctx context.Context, why error, led bool) error {
	var err error
	if e2 := e.do(ctx, func() {
		l := e.current()
		if l == nil {
			err = errStopped
			return
		}
		s, e3 := l.servers()
		alone := e3 == nil && onlyVoter(s, e.cfg.Self)
		if e3 != nil || alone && !(led && givesUpItsVote) {
			err = errors.Join(e3, errors.New("this node holds the only vote: nobody could send it the state"))
			return
		}
		e.refetch(l, why, alone)
	}); e2 != nil {
		return e2
	}
	return err
}

// onlyVoter reports whether a node has the only vote.
func onlyVoter(s []Server, id mesh.NodeID) bool {
	return votersOf(s) == 1 && slices.Contains(s, Server{id, true})
}

// refetch throws this node's stores away and has the leader send all again; with
// must the machine's state too.
func (e *Election) refetch(l *life, cause error, must bool) {
	if e.current() != l {
		return
	}
	e.end(false)
	if err := e.anew(cause, must); err != nil {
		e.stop(err)
	}
}

// anew sets the stores aside and begins a life without any.
func (e *Election) anew(cause error, must bool) error {
	e.log.Error("the election's log cannot be relied on; it is set aside and fetched anew", "err", cause)
	e.mu.Lock()
	e.damaged = cause.Error()
	e.mu.Unlock()
	if at, _ := e.d.Machine.Applied(); at > e.frozen { // at the start nothing is applied, and the copy is all there is
		if err := e.saveFrozen(); err != nil {
			return errors.Join(cause, err)
		}
	}
	if err := e.saveRecord(func(r *record) { r.Switching, r.Wiped, r.Must = true, true, r.Must || must }); err != nil {
		return errors.Join(cause, err)
	}
	return e.tryBegin()
}

// restored notes that the state of the lineage has arrived.
func (e *Election) restored() {
	e.frozen = 0 // of the lineage before
	e.keepCopy()
	forked := e.lostOf(e.given)
	e.given = nil
	if err := e.saveRecord(func(r *record) {
		r.Must = false
		r.Forked = append(slices.Clone(r.Forked), forked...)
		r.Forked = r.Forked[max(0, len(r.Forked)-maxForked):]
	}); err != nil {
		e.log.Warn("the election's record could not be written", "err", err)
	}
}

// lostOf returns which commands of a log that never counted the state does not
// hold. Of what is older than the journal nobody can say it; it is shared.
func (e *Election) lostOf(given []Command) (lost []Command) {
	if len(given) == 0 {
		return nil
	}
	type same struct {
		id          mesh.ID
		actor, text string
	}
	now := e.d.Since(0)
	held := map[same]bool{}
	for _, c := range now {
		held[same{c.ID, c.Actor, c.Text}] = true
	}
	for _, c := range given {
		if len(now) > 0 && c.Index >= now[0].Index && !held[same{c.ID, c.Actor, c.Text}] {
			lost = append(lost, c)
		}
	}
	return lost
}

// caughtUp lets a node vote again that had lost its stores.
func (e *Election) caughtUp(l *life) {
	if e.current() != l || !l.trans.mute.Load() {
		return
	}
	must := l.must.Load()
	if whole, err := l.change(); err != nil {
		l.halt(err)
		return
	} else if !whole {
		return // the next poll finds it
	}
	if must {
		e.restored()
	}
	if err := e.saveRecord(func(r *record) { r.Wiped = false }); err != nil {
		e.log.Warn("the election's record could not be written", "err", err)
		return
	}
	l.trans.mute.Store(false)
}
