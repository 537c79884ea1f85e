package queue

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"posthouse/transport"
)

// rounds has plzen's carrier take all that may be under way at once, again and
// again, and answer it by its place in the round. It returns the rounds, each the
// messages' numbers, to be read when nothing runs.
func rounds(w *world, answer func(i int, l *transport.Leg) transport.Result) *[]string {
	tries := new([]string)
	w.carry(toPlzen, func(ctx context.Context, _ transport.Destination, src transport.Source) error {
		for {
			var under []*transport.Leg
			for {
				soon, cancel := context.WithTimeout(ctx, 100*time.Millisecond)
				l, err := src.Next(soon)
				cancel()
				if err != nil {
					break
				}
				under = append(under, l)
			}
			if len(under) == 0 {
				return nil
			}
			try := ""
			for i, l := range under {
				try += fmt.Sprint(l.Envelope.ID[7])
				src.Finish(l, all(1, answer(i, l)))
			}
			*tries = append(*tries, try)
		}
	})
	return tries
}

func TestADeferralHoldsBackTheSamePairOnly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.start()
		full := true
		w.carry(local, w.mailstore(func(l *transport.Leg, r *transport.Recipient) *transport.Result {
			if full && r.Address == bob && l.Envelope.From == anna {
				return &transport.Result{Outcome: transport.Deferred, Code: 452, Enhanced: "4.2.2", Text: "full"}
			}
			return nil
		}))
		w.accept(1, anna, transport.OriginSubmission, one(local, user(bob), user(carl)))
		synctest.Wait()
		full = false // it would fit now, but must not overtake
		w.accept(2, anna, transport.OriginSubmission, one(local, user(bob), user(carl)))
		w.accept(3, carl, transport.OriginSubmission, one(local, user(bob)))
		synctest.Wait()
		want(t, w.boxes(), []string{carl + " 0001", carl + " 0002", bob + " 0003"})
		time.Sleep(time.Minute)
		synctest.Wait()
		want(t, w.boxes(), []string{carl + " 0001", carl + " 0002", bob + " 0003", bob + " 0001", bob + " 0002"})
		want(t, w.left(), "")
		w.crash()
	})
}

// One of two recipients is being tried again when the other falls due: what is
// behind both passes neither.
func TestNothingOvertakesARecipientWhileAnotherOfItsMessageIsTried(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.start()
		var mu sync.Mutex
		full, got := true, []string{}
		w.carry(toPlzen, func(ctx context.Context, _ transport.Destination, src transport.Source) error {
			under, err := src.Next(ctx)
			if err != nil {
				return nil
			}
			mu.Lock()
			defer mu.Unlock()
			if full {
				full = false
				src.Finish(under, all(2, transport.Result{Outcome: transport.Deferred, Code: 452, Text: "full"}))
				return nil
			}
			take := func(l *transport.Leg) {
				for _, r := range l.Rcpts {
					got = append(got, fmt.Sprint(l.Envelope.ID[7], " ", r.Address))
				}
				src.Finish(l, all(len(l.Rcpts), transport.Result{Outcome: transport.Delivered}))
			}
			for began := time.Now(); under.Envelope.ID == msgID(1) && time.Since(began) < 30*time.Second; {
				soon, cancel := context.WithTimeout(ctx, time.Second)
				l, err := src.Next(soon)
				cancel()
				if err == nil {
					take(l)
				}
			}
			take(under)
			return nil
		})
		for i := range 2 {
			w.accept(i+1, anna, transport.OriginSubmission, one(toPlzen, user(bob), user(carl)))
			time.Sleep(time.Second)
		}
		time.Sleep(5 * time.Minute)
		synctest.Wait()
		mu.Lock()
		defer mu.Unlock()
		for _, to := range []string{bob, carl} {
			if first, second := slices.Index(got, "1 "+to), slices.Index(got, "2 "+to); first < 0 || second < first {
				t.Errorf("%s got %v", to, got)
			}
		}
		want(t, w.left(), "")
		w.crash()
	})
}

// A home answers what was on its way behind a deferral without trying it, and
// for a moment what comes behind "moved". So the first is tried alone then, and
// once it has ended the others do not wait for a schedule of their own.
func TestWhatWaitsBehindEarlierMailGoesSoonAfterIt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.start()
		var given, moved, last time.Time // when the first ended, the last moved, the last was tried
		tries := rounds(w, func(i int, l *transport.Leg) transport.Result {
			last = time.Now()
			switch first := l.Envelope.ID == msgID(1); {
			case i > 0 || time.Since(moved) < 900*time.Millisecond:
				return transport.Waits("plzen")
			case first && l.Attempts < 6:
				return transport.Result{Outcome: transport.Deferred, Code: 452, Text: "full"}
			case first:
				given = last
			}
			moved = last
			return transport.Result{Outcome: transport.Moved}
		})
		for i := range 4 {
			w.accept(i+1, anna, transport.OriginSubmission, one(toPlzen, user(bob)))
		}
		time.Sleep(time.Minute)
		w.lives(bob, transport.Destination{}) // he lives nowhere any more
		time.Sleep(4 * time.Hour)
		synctest.Wait()
		want(t, *tries, []string{"1234", "1", "1", "1", "1", "1", "1", "2", "2", "3", "3", "4", "4"})
		if took := last.Sub(given); took > 10*time.Second {
			t.Errorf("the last was tried %v after the first had ended", took)
		}
		w.crash()
	})
}

// What stood behind a message that found a full disk is not sent one by one, a
// round trip each, once that has gone through.
func TestWhatStoodBehindAFullDiskGoesTogether(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.start()
		var full atomic.Bool
		full.Store(true)
		tries := rounds(w, func(i int, l *transport.Leg) transport.Result {
			switch {
			case !full.Load():
				return transport.Result{Outcome: transport.Delivered, Code: 250}
			case i == 0:
				return transport.ErrNoSpace.Result("plzen")
			}
			return transport.Waits("plzen")
		})
		for i := range 6 {
			w.accept(i+1, anna, transport.OriginSubmission, one(toPlzen, user(bob)))
		}
		time.Sleep(20 * time.Second)
		full.Store(false)
		w.q.Room(toPlzen)
		time.Sleep(time.Second)
		synctest.Wait()
		want(t, *tries, []string{"123456", "1", "23456"})
		want(t, w.left(), "")
		w.crash()
	})
}
