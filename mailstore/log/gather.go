package log

import (
	"fmt"
	"slices"
	"time"
)

// Under load a sync that waits a moment serves many more: what one costs is
// much the same for 4 and for 40 records, and who writes them is busy anyway.
// The writer waits only after a group that at least crowd Appends waited for,
// and only while more keep coming: fewer clients never wait for one another.
const (
	crowd      = 18
	crowdFew   = 4       // fewer than these in a step: no more are coming
	crowdMany  = 64      // as many as this: nobody else is waited for
	crowdSize  = 1 << 20 // bytes that wait: enough for any sync
	crowdStep  = time.Millisecond
	crowdSteps = 3
)

// linger waits for more to put into the next group.
func (l *Log) linger() {
	had := 0
	for range crowdSteps {
		l.mu.Lock()
		n, end := l.urgent, l.closing || l.dead != nil || l.waiting > crowdSize || l.room != nil
		l.mu.Unlock()
		if end || n >= crowdMany || had > 0 && n-had < crowdFew {
			return
		}
		had = n
		time.Sleep(crowdStep)
	}
}

// patience is about as long as a client takes from its answer to the next
// message. Deliveries begin the moment that a group is synced, and a sync for them
// alone would make the next messages wait for it.
const patience = 2 * time.Millisecond

// behindMany of what nobody waits for are worth a sync of their own.
const behindMany = 16

// hold waits while there is something to write, but nothing that somebody waits
// for.
func (l *Log) hold() {
	var timer *time.Timer
	for {
		l.mu.Lock()
		n := len(l.pending)
		now := n == 0 || n >= behindMany || l.urgent > 0 || l.closing || l.dead != nil || l.waiting > crowdSize || l.room != nil
		l.mu.Unlock()
		if now {
			break
		}
		if timer == nil {
			timer = time.NewTimer(l.opt.Patience)
			defer timer.Stop()
		}
		select {
		case <-l.wake:
		case <-timer.C:
			return
		}
	}
}

func (l *Log) take() (bs []batch, waited int, mark uint64, marked, closing bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	var n int
	var size int64
	for n < len(l.pending) && (n == 0 || size+l.pending[n].size <= gather) {
		size += l.pending[n].size
		if l.pending[n].urgent {
			waited++
		}
		n++
	}
	l.urgent -= waited
	if n == len(l.pending) { // the writer is done with what it took before
		clear(l.spare)
		bs, l.pending, l.spare = l.pending, l.spare[:0], l.pending
	} else {
		bs = slices.Clone(l.pending[:n])
		l.pending = slices.Delete(l.pending, 0, n)
	}
	marked, l.marked = l.marked, false
	return bs, waited, l.mark, marked, l.closing
}

// writeInOrder writes bs as one group; what must not overtake something refused is
// refused, and what stands behind it is a group of its own.
func (l *Log) writeInOrder(bs []batch, mark uint64) {
	from := 0
	for i := range bs {
		err := bs[i].orphaned()
		if err == nil {
			continue
		}
		if i > from {
			l.writeGroup(bs[from:i], mark)
		}
		drop(bs[i : i+1])
		l.refuse(bs[i:i+1], err)
		from = i + 1
	}
	if from < len(bs) {
		l.writeGroup(bs[from:], mark)
	}
}

// orphaned returns why an Append that b must not overtake was refused.
func (b *batch) orphaned() error {
	for i := range b.entries {
		for _, t := range b.entries[i].After {
			select {
			case <-t.done:
				if t.err != nil && heedsOrder {
					return fmt.Errorf("behind a record that was refused: %w", t.err)
				}
			default: // in this group, or in one that is still to come
			}
		}
	}
	return nil
}
