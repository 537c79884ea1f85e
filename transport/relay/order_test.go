package relay

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"posthouse/transport"
)

// orderRun sends mail of all sizes from three people to two mailboxes over a line
// that is as fast, or as slow, as the seed says, while the mailboxes are full, or
// away, now and then: each message comes once, and in its sender's order.
func orderRun(t *testing.T, seed uint64) (deferred int) {
	dice := rand.New(rand.NewPCG(seed, 2))
	synctest.Test(t, func(t *testing.T) {
		boxes := []string{"bob@ours.example", "cyril@ours.example"}
		shut := map[string]transport.Outcome{}
		got := map[string][]string{}
		w, o := homes(t, func(env transport.Envelope, r transport.Recipient, _ string) transport.Result {
			if x := shut[r.Address]; x != 0 {
				deferred++
				return transport.Result{Outcome: x, Code: 451, Home: gw1}
			}
			k := env.From + " " + r.Address
			got[k] = append(got[k], fmt.Sprint(env.ID[0]))
			return transport.Result{Outcome: transport.Delivered}
		})
		w.rate = 1 << (11 + dice.IntN(8)) // 16 kbit/s to 2 Mbit/s
		w.nodes[gw1].syncTime = time.Duration(dice.IntN(300)) * time.Millisecond
		turn := func() {
			w.mu.Lock()
			box := boxes[dice.IntN(2)]
			if shut[box] == 0 {
				shut[box] = []transport.Outcome{transport.Deferred, transport.Moved}[dice.IntN(2)]
			} else {
				delete(shut, box)
			}
			w.mu.Unlock()
			if dice.IntN(2) == 0 {
				o.q.Room(toHome) // news that it may go
			}
		}
		sent := map[string][]string{}
		for i := range byte(40) {
			from := fmt.Sprintf("s%d@ours.example", i%3)
			to := []transport.Recipient{user(boxes[dice.IntN(2)])}
			if dice.IntN(4) == 0 {
				to = []transport.Recipient{user(boxes[0]), user(boxes[1])}
			}
			w.pad = 16 << dice.IntN(13)
			o.acceptFrom(i, from, toHome, to...)
			for _, r := range to {
				k := from + " " + r.Address
				sent[k] = append(sent[k], fmt.Sprint(i))
			}
			if dice.IntN(2) == 0 {
				time.Sleep(time.Duration(dice.IntN(2000)) * time.Millisecond)
			}
			if dice.IntN(4) == 0 {
				turn()
			}
		}
		for range 20 {
			time.Sleep(time.Duration(dice.IntN(20_000)) * time.Millisecond)
			turn()
		}
		w.mu.Lock()
		clear(shut)
		w.mu.Unlock()
		o.q.Room(toHome)
		time.Sleep(3 * time.Hour)
		synctest.Wait()
		for k, want := range sent {
			if !slices.Equal(got[k], want) {
				t.Errorf("seed %d, %d bytes a second: %s got %v, sent were %v", seed, w.rate, k, strings.Join(got[k], " "), strings.Join(want, " "))
			}
		}
		for _, bad := range w.quiet() {
			t.Errorf("seed %d: %s", seed, bad)
		}
		for _, n := range w.nodes {
			n.kill()
		}
	})
	return deferred
}

func TestMailOverASlowLineToMailboxesThatFillAndEmptyStaysInOrder(t *testing.T) {
	deferred := 0
	for seed := range uint64(100) {
		deferred += orderRun(t, seed)
		if t.Failed() {
			return
		}
	}
	if deferred < 1000 {
		t.Errorf("only %d recipients were deferred", deferred)
	}
}

// Whoever has thousands of messages turned away at once, and reads no answer, has
// all of his mail wait, and fills no memory.
func TestHoldsAreBounded(t *testing.T) {
	var h Holds
	lane := func(i int) Lane { return Lane{From: fmt.Sprint(i)} }
	for i := range 3 * manyDeferred {
		if h.Waits(lane(i), uint64(i), 0) != (i > manyDeferred) {
			t.Fatalf("message %d waits: %v", i, i <= manyDeferred)
		}
		h.Defer(lane(i), uint64(i))
		h.Tell(uint64(i), []Lane{lane(i)})
		if h.many > manyDeferred || h.many != len(h.lanes) {
			t.Fatalf("%d entries, %d lanes after %d messages", h.many, len(h.lanes), i+1)
		}
	}
	h.Defer(lane(0), 1<<20) // not told yet
	const told = 3 * manyDeferred
	if h.Waits(lane(1), 1<<30, told) || !h.Waits(lane(1), 1<<30, manyDeferred) {
		t.Error("who has read everything waits, or who has not does not")
	}
	if !h.Waits(lane(0), 1<<30, told) || h.Waits(lane(0), 1<<19, told) {
		t.Error("what nobody was told of holds no later mail, or earlier mail")
	}
}
