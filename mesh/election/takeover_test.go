package election

import (
	"flag"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"posthouse/mesh"
)

var takeovers = flag.Int("takeovers", 10, "how often TestATakeOverEndsWhenTheTimeoutsSay kills the master, and how often it cuts it off")

// Two voters are left. Each looks at most every 6 s (twice the heartbeat's time) whether the
// master was silent for 3 s, and says no to the other until it has found so
// itself: 9 s, and some round trips. Then one asks the other. When both ask at
// once, another round begins 3 to 6 s later.
func TestATakeOverEndsWhenTheTimeoutsSay(t *testing.T) {
	const (
		detected = 9*time.Second + 500*time.Millisecond
		round    = 6*time.Second + 500*time.Millisecond
	)
	for _, kill := range []bool{true, false} {
		name := map[bool]string{true: "killed", false: "cut off"}[kill]
		t.Run(name, func(t *testing.T) {
			var all []time.Duration
			split := 0
			for len(all) < *takeovers {
				bubble(t, func(t *testing.T, w *world) {
					w.found(3, inMemory)
					for range min(10, *takeovers-len(all)) {
						took, rounds := w.takeOver(kill)
						all = append(all, took)
						if rounds > 1 {
							split++
						}
						if limit := detected + round*time.Duration(rounds-1); took > limit {
							t.Errorf("a take-over in %d rounds took %v, over %v", rounds, took, limit)
						}
					}
				})
			}
			slices.Sort(all)
			at := func(share float64) time.Duration {
				return all[int(share*float64(len(all)-1))].Round(10 * time.Millisecond)
			}
			t.Logf("%d times %s: median %v, p90 %v, p99 %v, max %v; votes split %d times", len(all), name, at(.5), at(.9), at(.99), at(1), split)
		})
	}
}

// takeOver takes the master away at some moment of peace until another acts,
// and brings it back.
func (w *world) takeOver(kill bool) (took time.Duration, rounds uint64) {
	var a *node
	var rest []mesh.NodeID
	w.until(time.Minute, "a master that all know", func() bool {
		a, rest = w.master(1, 2, 3), nil
		for id, n := range w.nodes {
			if a == nil || n.State().Master != a.id {
				return false
			}
			if id != a.id {
				rest = append(rest, id)
			}
		}
		return true
	})
	time.Sleep(time.Minute + rand.N(10*time.Second)) // Raft sends again to who was away
	term, store := a.current().raft.CurrentTerm(), a.store
	w.isolate(a.id, !kill)
	if kill {
		a.host.down()
	}
	var b *node
	took = w.until(time.Minute, "another master", func() bool { b = w.master(rest...); return b != nil })
	rounds = b.current().raft.CurrentTerm() - term
	if kill {
		a.shut()
		w.start(a.id, store)
	}
	w.isolate(a.id, false)
	return took, rounds
}
