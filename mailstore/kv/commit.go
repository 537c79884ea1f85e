package kv

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"
)

// launch starts the committer.
func (v *View) launch() {
	if !v.opt.ByHand {
		go v.run()
	}
}

// Commit writes everything that was applied. Only with Options.ByHand.
func (v *View) Commit() error {
	if v.drain() {
		return nil
	}
	v.mu.RLock()
	defer v.mu.RUnlock()
	return v.failed
}

// halt ends the committer and waits for it.
func (v *View) halt() {
	v.stopOnce.Do(func() {
		close(v.stop)
		if v.opt.ByHand {
			v.end()
			close(v.done)
		}
	})
	<-v.done
}

// run is the committer.
func (v *View) run() {
	defer close(v.done)
	defer v.end()
	var stands <-chan time.Time
	if v.files != nil {
		t := time.NewTimer(time.Until(v.opened.Add(v.opt.standing)))
		defer t.Stop()
		stands = t.C
	}
	for {
		select {
		case <-v.work:
		case <-stands:
			v.stood()
			continue
		case <-v.stop:
			return
		}
		if !v.linger() || !v.drain() {
			return
		}
	}
}

// stood ends the trial of a view that has stood for long enough.
func (v *View) stood() {
	if v.files != nil && time.Since(v.opened) >= v.opt.standing {
		v.files.proven()
	}
}

// linger waits for more work to put into one commit. False: stopped.
func (v *View) linger() bool {
	if v.opt.Delay < 0 {
		return true
	}
	t := time.NewTimer(v.opt.Delay)
	defer t.Stop()
	for {
		v.mu.RLock()
		now := v.urgent || v.flushing > 0 || v.ops == 0 && v.applied == v.durable
		v.mu.RUnlock()
		if now {
			return true
		}
		select {
		case <-t.C:
			return true
		case <-v.work:
		case <-v.stop:
			return false
		}
	}
}

// fullPoll is how often the committer looks for space while there is none.
const fullPoll = time.Second

// drain commits all that was applied before the call. False: stopped or failed.
func (v *View) drain() bool {
	v.mu.RLock()
	target := v.applied
	v.mu.RUnlock()
	for {
		v.mu.RLock()
		done := v.durable >= target && len(v.gens) == 1 || v.abort
		v.mu.RUnlock()
		if done {
			break
		}
		switch err := v.commit(); {
		case errors.Is(err, errFull):
			t := time.NewTimer(fullPoll)
			select {
			case <-t.C:
				v.stood() // it does not need to be written for that
			case <-v.stop:
				t.Stop()
				return false
			}
		case err != nil:
			v.opt.Logger.Error("view cannot be written", "err", err)
			v.mu.Lock()
			v.failed = fmt.Errorf("write view: %w", err)
			v.wake()
			v.mu.Unlock()
			return false
		}
	}
	v.mu.Lock()
	v.urgent = false
	v.mu.Unlock()
	return true
}

// commit writes the oldest generation.
func (v *View) commit() error {
	if err := v.room(); err != nil {
		return v.noteFull(err)
	}
	v.mu.Lock()
	if v.full {
		v.full = false
		v.opt.Logger.Info("disk has space again: the view catches up")
	}
	g := v.gens[0]
	if g.seq == 0 {
		v.mu.Unlock()
		return nil
	}
	if len(v.gens) == 1 {
		v.gens = append(v.gens, newGeneration())
	}
	m := v.meta
	v.mu.Unlock()

	m.Applied = g.seq
	if err := v.st.commit(g.sorted(), m); err != nil {
		return v.noteFull(err)
	}
	s, err := v.st.snapshot()
	if err != nil {
		return err
	}
	v.mu.Lock()
	old := v.base
	v.base, v.meta, v.durable = v.share(s), m, g.seq
	v.gens = append(v.gens[:0:0], v.gens[1:]...)
	v.bytes -= g.bytes
	v.ops -= g.rows.Len()
	v.wake()
	v.mu.Unlock()
	old.drop()
	if v.files != nil {
		v.files.proven()
	}
	return nil
}

// noteFull notes that err is errFull, if it is, and returns it.
func (v *View) noteFull(err error) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	if errors.Is(err, errFull) && !v.full {
		v.full = true
		v.wake()
		v.opt.Logger.Warn("disk below its floor: the view is not written")
	}
	return err
}

// room asks whether anything may be written now.
func (v *View) room() error {
	if v.space != nil && !v.space.check() {
		return errFull
	}
	err := v.st.prepare()
	if errors.Is(err, errFull) && v.space != nil {
		v.space.sink()
	}
	return err
}

// end is the committer's last act.
func (v *View) end() {
	v.mu.RLock()
	last := !v.abort && v.failed == nil
	v.mu.RUnlock()
	for last {
		v.mu.RLock()
		last = v.durable < v.applied
		v.mu.RUnlock()
		if last && v.commit() != nil { // full or failed: the log has it
			break
		}
	}
	v.mu.Lock()
	v.closed = true
	base := v.base
	v.base, v.gens = nil, nil
	v.wake()
	v.mu.Unlock()
	if base != nil {
		base.drop()
	}
	v.live.Wait()
	v.closeErr = v.shut()
}

// shut closes store and files.
func (v *View) shut() error {
	if v.files == nil {
		return v.st.close()
	}
	var err error
	v.space.close()
	if !v.space.enough() {
		// Badger's close writes a table through a mapping; on a full disk that
		// ends the process. All is synced, so leaving it open loses nothing.
		// Its compactions stay behind the gate.
		v.opt.Logger.Warn("disk full: the view is left as it is, for the next start")
		err = fmt.Errorf("close view: %w", ErrNoSpace)
	} else {
		close(v.space.open)
		if err = v.st.close(); err == nil {
			v.files.proven() // also when there was nothing to write: nothing ended the process
		}
	}
	v.files.release()
	return err
}

// Reset sets the rows aside, or deletes them when keep is false, and begins a
// new view: Applied is 0. Nothing may be read or applied during the call, and
// snapshots of before end with it.
func (v *View) Reset(ctx context.Context, reason string, keep bool) error {
	v.mu.Lock()
	v.abort = true
	v.mu.Unlock()
	v.halt()
	if v.closeErr != nil {
		return v.closeErr
	}
	n := &View{opt: v.opt, work: make(chan struct{}, 1), stop: make(chan struct{}), done: make(chan struct{}), changed: make(chan struct{})}
	if v.files != nil {
		f, err := lockFiles(v.opt)
		if err != nil {
			return err
		}
		if keep {
			err = f.setAside(reason)
		} else {
			err = f.drop()
		}
		f.release()
		if err != nil {
			return err
		}
	} else if v.opt.Kept != nil {
		v.opt.Kept.clear()
	}
	if err := n.openStore(); err != nil {
		return err
	}
	v.adopt(n)
	v.launch()
	return nil
}

// adopt takes over the parts of n, which no goroutine has seen yet.
func (v *View) adopt(n *View) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.st, v.files, v.space, v.opened = n.st, n.files, n.space, n.opened
	v.work, v.stop, v.done = n.work, n.stop, n.done
	v.stopOnce = sync.Once{}
	v.closeErr = nil
	v.damaged.Store(false)
	v.gens, v.base, v.meta = n.gens, n.base, n.meta
	v.base.live = &v.live
	v.live.Add(1)
	v.applied, v.durable, v.bytes, v.ops = n.applied, n.durable, 0, 0
	v.urgent, v.full, v.abort, v.failed, v.closed, v.unbound = false, false, false, nil, false, false
}
