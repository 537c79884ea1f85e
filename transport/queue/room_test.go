package queue

import (
	"fmt"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"posthouse/mesh"
	"posthouse/transport"
)

// crowded is a home that is full until it has room; tried are the ids that it
// was offered, in order.
func crowded(w *world, full func() bool) (tried *[]string) {
	tried = new([]string)
	w.carry(toPlzen, eachLeg(func(l *transport.Leg) []transport.Result {
		*tried = append(*tried, fmt.Sprint(l.Envelope.ID[7]))
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
		synctest.Wait()
		want(t, fmt.Sprint(*tried), "[1 2 3 4 5]")
		full.Store(false)
		w.q.Room(toPlzen)
		time.Sleep(time.Millisecond)
		synctest.Wait()
		want(t, fmt.Sprint(*tried), "[1 2 3 4 5 1 2 3 4 5]")
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
		synctest.Wait()
		want(t, len(*tried), 2)
		time.Sleep(3 * time.Minute) // the schedule goes on, now with its second pause
		synctest.Wait()
		want(t, len(*tried), 3)
		w.crash()
	})
}

func TestNewsThatComeBeforeTheDeferralCountForIt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.start()
		tries := 0
		w.carry(toPlzen, eachLeg(func(l *transport.Leg) []transport.Result {
			if tries++; tries == 1 {
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
		synctest.Wait()
		*tried = nil
		w.q.Room(toPlzen)
		time.Sleep(time.Second)
		synctest.Wait()
		want(t, fmt.Sprint(*tried), "[2]")
		full.Store(false)
		synctest.Wait()
		*tried = nil
		w.q.Room(toPlzen)
		time.Sleep(time.Second)
		synctest.Wait()
		want(t, fmt.Sprint(*tried), "[1 2]")
		w.crash()
	})
}
