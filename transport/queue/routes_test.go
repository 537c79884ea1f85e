package queue

import (
	"context"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"posthouse/transport"
)

func TestMovedIsRoutedAnewAndNeverBounced(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.start()
		var times []time.Duration
		start := time.Now()
		moved := func(l *transport.Leg) []transport.Result {
			times = append(times, time.Since(start))
			return all(len(l.Rcpts), transport.Result{Outcome: transport.Moved, Home: plzen, Version: 1})
		}
		w.carry(toPlzen, eachLeg(moved))
		w.lives(bob, toPlzen)
		w.accept(1, anna, transport.OriginSubmission, one(toPlzen, user(bob)))
		time.Sleep(100 * time.Second)
		synctest.Wait()
		want(t, times, []time.Duration{0, time.Second, 3 * time.Second, 63 * time.Second, 64 * time.Second, 66 * time.Second})
		w.lives(bob, toBrno)
		got := 0
		w.carry(toBrno, eachLeg(func(l *transport.Leg) []transport.Result {
			got++
			return all(len(l.Rcpts), transport.Result{Outcome: transport.Delivered})
		}))
		w.q.Reroute()
		synctest.Wait()
		want(t, got, 1)
		want(t, w.left(), "")
		w.crash()
	})
}

// Its home was put out of the mesh while it was being tried there: nobody will
// answer that it has moved.
func TestWhatWasBeingTriedWhenItsHomeChangedGoesToTheNewOne(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.start()
		w.carry(toPlzen, eachLeg(func(l *transport.Leg) []transport.Result {
			time.Sleep(5 * time.Second)
			return nil
		}))
		w.lives(bob, toPlzen)
		w.accept(1, anna, transport.OriginSubmission, one(toPlzen, user(bob)))
		time.Sleep(time.Second)
		w.lives(bob, toBrno)
		got := time.Duration(0)
		start := time.Now()
		w.carry(toBrno, eachLeg(func(l *transport.Leg) []transport.Result {
			got = time.Since(start)
			return all(len(l.Rcpts), transport.Result{Outcome: transport.Delivered})
		}))
		w.q.Reroute()
		time.Sleep(10 * time.Minute)
		synctest.Wait()
		want(t, got, 4*time.Second)
		want(t, w.left(), "")
		w.crash()
	})
}

// Its legs were decided before homes changed, and it was on disk after: a sync
// may take seconds.
func TestWhatWasBeingAcceptedWhenItsHomeChangedGoesToTheNewOne(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.start()
		w.carry(toPlzen, eachLeg(func(*transport.Leg) []transport.Result { return nil }))
		got := []string{}
		w.carry(toBrno, eachLeg(func(l *transport.Leg) []transport.Result {
			w.mu.Lock()
			got = append(got, fmt.Sprint(l.Envelope.ID[7]))
			w.mu.Unlock()
			return all(len(l.Rcpts), transport.Result{Outcome: transport.Delivered})
		}))
		body := w.draft("Subject: 1\r\n\r\nbody\r\n")
		first := &Message{Envelope: transport.Envelope{ID: msgID(1), From: anna, Origin: transport.OriginSubmission, EntryTime: time.Now()},
			Body: body, Structure: structure(t, body), Routes: w.q.Routes()}
		w.lives(bob, toBrno)
		w.q.Reroute()
		synctest.Wait()
		if _, err := w.q.Accept(context.Background(), first, []Leg{one(toPlzen, user(bob))}); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Millisecond)
		w.accept(2, anna, transport.OriginSubmission, one(toBrno, user(bob)))
		time.Sleep(time.Second)
		synctest.Wait()
		want(t, got, []string{"1", "2"})
		want(t, w.left(), "")
		w.crash()
	})
}

func TestWhatAPersonHeldWhileItsHomeChangedGoesToTheNewOne(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.start()
		w.lives(bob, toPlzen)
		w.carry(toPlzen, eachLeg(func(*transport.Leg) []transport.Result { return nil }))
		id := w.accept(1, anna, transport.OriginSubmission, one(toPlzen, user(bob)))
		time.Sleep(time.Minute)
		if _, err := w.q.Hold(t.Context(), id); err != nil {
			t.Fatal(err)
		}
		w.lives(bob, toBrno)
		w.q.Reroute()
		w.carry(toBrno, eachLeg(func(l *transport.Leg) []transport.Result {
			return all(len(l.Rcpts), transport.Result{Outcome: transport.Delivered})
		}))
		time.Sleep(time.Minute)
		if _, err := w.q.Unhold(t.Context(), id); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second)
		synctest.Wait()
		want(t, w.left(), "")
		w.crash()
	})
}

// Its home was put out of the mesh, and cannot say that nobody lives there.
func TestMailForSomebodyDeletedWhoseHomeWasPutOutIsReported(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.start()
		w.carry(local, w.mailstore(nil))
		w.carry(toPlzen, eachLeg(func(*transport.Leg) []transport.Result { return nil }))
		w.lives(bob, toPlzen)
		w.accept(1, anna, transport.OriginSubmission, one(toPlzen, user(bob)))
		time.Sleep(time.Minute)
		w.lives(bob, transport.Destination{}) // gone
		w.q.Reroute()
		time.Sleep(time.Minute)
		want(t, len(w.boxes()), 0) // plzen may know better
		w.mu.Lock()
		delete(w.members, plzen)
		w.mu.Unlock()
		w.q.Reroute()
		time.Sleep(time.Minute)
		want(t, w.boxes(), []string{anna + " report"})
		want(t, w.left(), "")
		w.crash()
	})
}

func TestAMailboxThatIsGoneIsReportedOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.start()
		w.carry(local, w.mailstore(nil))
		w.lives(bob, transport.Destination{}) // gone
		w.carry(toPlzen, eachLeg(func(l *transport.Leg) []transport.Result {
			return all(len(l.Rcpts), transport.Result{Outcome: transport.Moved})
		}))
		w.accept(1, anna, transport.OriginSubmission, one(toPlzen, user(bob)))
		synctest.Wait()
		want(t, w.boxes(), []string{anna + " report"})
		want(t, w.left(), "")
		w.crash()
	})
}
