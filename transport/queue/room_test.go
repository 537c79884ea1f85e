package queue

import (
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"posthouse/mesh"
	"posthouse/transport"
)

// offers are the ids that a home was offered, in order.
type offers struct {
	mu  sync.Mutex
	ids []string
}

// take returns those since the last call.
func (o *offers) take() string {
	synctest.Wait()
	o.mu.Lock()
	defer o.mu.Unlock()
	ids := o.ids
	o.ids = nil
	return fmt.Sprint(ids)
}

// crowded is a home that is full until it has room.
func crowded(w *world, full func() bool) *offers {
	tried := new(offers)
	w.carry(toPlzen, eachLeg(func(l *transport.Leg) []transport.Result {
		tried.mu.Lock()
		tried.ids = append(tried.ids, fmt.Sprint(l.Envelope.ID[7]))
		tried.mu.Unlock()
		if full() {
			return all(len(l.Rcpts), transport.ErrNoSpace.Result("plzen"))
		}
		return all(len(l.Rcpts), transport.Result{Outcome: transport.Delivered, Code: 250})
	}))
	return tried
}

func TestNewsOfRoomBringsAtOnceInOrderWhatWasDeferred(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.start()
		var full atomic.Bool
		full.Store(true)
		tried := crowded(w, full.Load)
		for i := range 5 {
			w.accept(i+1, anna+fmt.Sprint(i), transport.OriginSubmission, one(toPlzen, user(bob)))
		}
		time.Sleep(20 * time.Second)
		want(t, tried.take(), "[1 2 3 4 5]")
		full.Store(false)
		w.q.Room(toPlzen)
		time.Sleep(time.Millisecond)
		want(t, tried.take(), "[1 2 3 4 5]")
		want(t, w.left(), "")
		w.crash()
	})
}

// A home that has not heard of a user yet says "moved". When it has, what waits for
// the end of that poll, a minute, goes at once.
func TestNewsOfWhoLivesThereBringsWhatWasCalledMoved(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.start()
		var known atomic.Bool
		var tries atomic.Int32
		w.carry(toPlzen, eachLeg(func(l *transport.Leg) []transport.Result {
			tries.Add(1)
			if !known.Load() {
				return all(len(l.Rcpts), transport.Result{Outcome: transport.Moved})
			}
			return all(len(l.Rcpts), transport.Result{Outcome: transport.Delivered, Code: 250})
		}))
		w.lives(bob, toPlzen)
		w.accept(1, anna, transport.OriginSubmission, one(toPlzen, user(bob)))
		time.Sleep(20 * time.Second)
		want(t, tries.Load(), int32(3)) // at once, after 1 s and 2 s; the next comes after a minute
		known.Store(true)
		w.q.Room(toPlzen)
		time.Sleep(time.Millisecond)
		want(t, w.left(), "")
		w.crash()
	})
}

func TestFalseNewsOfRoomCostOneAttempt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.start()
		tried := crowded(w, func() bool { return true })
		w.accept(1, anna, transport.OriginSubmission, one(toPlzen, user(bob)))
		time.Sleep(10 * time.Second)
		w.q.Room(toPlzen)
		time.Sleep(20 * time.Second)
		want(t, tried.take(), "[1 1]")
		time.Sleep(3 * time.Minute) // the schedule goes on, now with its second pause
		want(t, tried.take(), "[1]")
		w.crash()
	})
}

func TestNewsThatComeBeforeTheDeferralCountForIt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.start()
		var tries atomic.Int32
		w.carry(toPlzen, eachLeg(func(l *transport.Leg) []transport.Result {
			if tries.Add(1) == 1 {
				time.Sleep(time.Second)
				w.q.Room(toPlzen) // and the answer of before is still on its way
				time.Sleep(time.Second)
				return all(len(l.Rcpts), transport.ErrNoSpace.Result("plzen"))
			}
			return all(len(l.Rcpts), transport.Result{Outcome: transport.Delivered, Code: 250})
		}))
		w.accept(1, anna, transport.OriginSubmission, one(toPlzen, user(bob)))
		time.Sleep(3 * time.Second)
		want(t, w.left(), "")
		w.crash()
	})
}

func TestNewsOfRoomDoNotConcernAMailboxThatIsStillFull(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		var full atomic.Bool
		full.Store(true)
		w.full = func(_ transport.Destination, m mesh.MailboxID) bool { return full.Load() && m == user(bob).Mailbox }
		w.start()
		tried := crowded(w, func() bool { return true })
		w.accept(1, anna, transport.OriginSubmission, one(toPlzen, user(bob)))
		w.accept(2, anna, transport.OriginSubmission, one(toPlzen, user("cyril@ours.example")))
		time.Sleep(10 * time.Second)
		tried.take()
		w.q.Room(toPlzen)
		time.Sleep(time.Second)
		want(t, tried.take(), "[2]")
		full.Store(false)
		tried.take()
		w.q.Room(toPlzen)
		time.Sleep(time.Second)
		want(t, tried.take(), "[1 2]")
		w.crash()
	})
}
