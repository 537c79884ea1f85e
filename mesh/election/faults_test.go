package election

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/raft-wal/types"

	"posthouse/mesh"
)

// TestACommandThatWasAnsweredIsThere cuts random nodes off and restarts them
// while commands are made everywhere: at the end all logs are equal, every
// answered command stands in them once, and each term had one master.
func TestACommandThatWasAnsweredIsThere(t *testing.T) {
	for seed := range uint64(6) {
		t.Run(fmt.Sprint("seed ", seed), func(t *testing.T) {
			bubble(t, func(t *testing.T, w *world) {
				w.found(5, inMemory)
				rnd := rand.New(rand.NewPCG(seed, 1))
				var mu sync.Mutex
				answered := map[string]bool{}
				masters := map[uint64]mesh.NodeID{}
				var clients sync.WaitGroup
				end := time.Now().Add(3 * time.Minute)
				say := func(n *node, id string) {
					ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
					defer cancel()
					if _, err := n.Propose(ctx, []byte(id+" x")); err == nil {
						mu.Lock()
						answered[id] = true
						mu.Unlock()
					}
				}
				for i := 0; time.Now().Before(end); i++ {
					for _, id := range []mesh.NodeID{1, 2, 3, 4, 5} {
						n := w.nodes[id]
						clients.Go(func() { say(n, fmt.Sprintf("s%d-%s", i, id)) })
					}
					if a := w.master(1, 2, 3, 4, 5); a != nil {
						s, ok := a.Acting()
						if by := masters[s.Term]; ok && by != 0 && by != a.id {
							t.Fatalf("term %d has two masters", s.Term)
						}
						masters[s.Term] = a.id
					}
					victim := mesh.NodeID(1 + rnd.IntN(5))
					switch rnd.IntN(4) {
					case 0, 1:
						w.isolate(victim, true)
					case 2:
						for _, id := range []mesh.NodeID{1, 2, 3, 4, 5} {
							w.isolate(id, false)
						}
					case 3:
						n := w.nodes[victim]
						n.shut()
						w.start(victim, n.store)
					}
					time.Sleep(time.Duration(1+rnd.IntN(8)) * time.Second)
				}
				for _, id := range []mesh.NodeID{1, 2, 3, 4, 5} {
					w.isolate(id, false)
				}
				clients.Wait()
				w.until(15*time.Second, "a master", func() bool { return w.master(1, 2, 3, 4, 5) != nil })
				w.nodes[1].say("the last")
				w.until(30*time.Second, "equal", func() bool { return w.equal(1, 2, 3, 4, 5) })
				text := w.nodes[4].m.text()
				for id := range answered {
					if strings.Count(text, " "+id+" ") != 1 {
						t.Errorf("%s was answered and stands there %d times", id, strings.Count(text, " "+id+" "))
					}
				}
				t.Logf("%d answered, %d terms", len(answered), len(masters))
			})
		})
	}
}

func TestTheLeadMovesUnderLoad(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		w.found(3, inMemory)
		var clients sync.WaitGroup
		end := time.Now().Add(30 * time.Second)
		for _, id := range []mesh.NodeID{1, 2, 3} {
			clients.Go(func() {
				for i := 0; time.Now().Before(end); i++ {
					if _, err := w.nodes[id].Propose(context.Background(), fmt.Appendf(nil, "load%d-%d x", id, i)); err != nil {
						t.Errorf("at %s: %v", id, err)
						return
					}
				}
			})
		}
		for i := range 8 {
			time.Sleep(3 * time.Second)
			if m := w.master(1, 2, 3); m != nil {
				if err := m.TransferTo(context.Background(), mesh.NodeID(1+(int(m.id)+i%2)%3)); err != nil {
					t.Logf("transfer: %v", err)
				}
			}
		}
		clients.Wait()
		w.until(10*time.Second, "equal", func() bool { return w.equal(1, 2, 3) })
	})
}

// breaking fails from its k-th change on: the node dies there.
type breaking struct {
	Storage
	left *atomic.Int64
}

var errBroken = errors.New("the power is gone")

func (b breaking) step() error {
	if b.left.Add(-1) < 0 {
		return errBroken
	}
	return nil
}

func (b breaking) save(name string, v []byte) error {
	if err := b.step(); err != nil {
		return err
	}
	return b.Storage.save(name, v)
}

func (b breaking) setAside() error {
	if err := b.step(); err != nil {
		return err
	}
	return b.Storage.setAside()
}

func (b breaking) open(l *slog.Logger, d func(error)) (*stores, error) {
	if err := b.step(); err != nil {
		return nil, err
	}
	return b.Storage.open(l, d)
}

func TestAPromotionCutOffAnywhereIsDoneOrNot(t *testing.T) {
	for k := range 12 {
		bubble(t, func(t *testing.T, w *world) {
			w.found(3, inMemory)
			w.nodes[1].say("common")
			w.until(10*time.Second, "equal", func() bool { return w.equal(1, 2, 3) })
			store := w.nodes[3].store
			w.nodes[3].shut()
			w.nodes[1].shut()
			var left atomic.Int64
			left.Store(1000)
			c := w.start(3, breaking{store, &left})
			time.Sleep(time.Second)
			before := c.m.text()
			left.Store(int64(k))
			_, err := c.Promote(context.Background())
			left.Store(0)
			c.shut()
			c = w.start(3, store)
			w.isolate(3, true)
			time.Sleep(10 * time.Second)
			gen := c.State().Authority.Generation
			if c.m.text() != before || gen != 1 && gen != 2 || err == nil && gen != 2 {
				t.Errorf("cut off after %d: generation %d (%v), state\n%s\nwas\n%s", k, gen, err, c.m.text(), before)
			}
			if _, acts := c.Acting(); acts != (gen == 2) {
				t.Errorf("cut off after %d: generation %d acts: %v", k, gen, acts)
			}
			if gen == 2 {
				c.say("goes on")
			}
		})
	}
}

func TestFollowingALineageCutOffAnywhereGoesOn(t *testing.T) {
	for k := range 8 {
		bubble(t, func(t *testing.T, w *world) {
			w.found(3, inMemory)
			w.nodes[1].say("common")
			w.until(10*time.Second, "equal", func() bool { return w.equal(1, 2, 3) })
			w.isolate(3, true)
			w.nodes[1].say("forked")
			w.until(10*time.Second, "equal", func() bool { return w.equal(1, 2) })
			store := w.nodes[2].store
			w.nodes[2].shut()
			w.nodes[1].shut()
			var left atomic.Int64
			left.Store(1000)
			b := w.start(2, breaking{store, &left})
			if _, err := w.nodes[3].Promote(context.Background()); err != nil {
				t.Fatal(err)
			}
			w.nodes[3].say("ahead")
			left.Store(int64(k))
			w.isolate(3, false)
			time.Sleep(15 * time.Second)
			left.Store(0)
			b.shut()
			b = w.start(2, store)
			w.until(30*time.Second, "it follows", func() bool { return w.equal(2, 3) })
			if f := b.State().Forked; len(f) != 1 || f[0].Text != "forked" {
				t.Errorf("cut off after %d: lists %+v", k, f)
			}
		})
	}
}

// TestTheMetaFileSurvivesAPowerCut tears the write of either slot at every
// sector: what opens is the state before or after, once acknowledged after.
func TestTheMetaFileSurvivesAPowerCut(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "meta")
	m := &metaFile{disk: osDisk{}}
	if _, err := m.Load(dir); err != nil {
		t.Fatal(err)
	}
	big := types.PersistentState{NextSegmentID: 1}
	for i := range uint64(40) {
		big.Segments = append(big.Segments, types.SegmentInfo{ID: i, BaseIndex: i, Codec: codecID})
	}
	if err := m.CommitState(big); err != nil {
		t.Fatal(err)
	}
	old, _ := os.ReadFile(path)
	big.NextSegmentID = 2
	if err := m.CommitState(big); err != nil {
		t.Fatal(err)
	}
	m.Close()
	now, _ := os.ReadFile(path)
	const sector = 512
	for slot := range 2 {
		for torn := range 1 << 5 { // which of the first five sectors made it
			img := bytes.Clone(old)
			if slot == 1 { // the first slot was synced before
				copy(img[:slotSize], now)
			}
			for s := range 5 {
				if torn>>s&1 == 1 {
					at := slot*slotSize + s*sector
					copy(img[at:at+sector], now[at:])
				}
			}
			if err := os.WriteFile(path, img, 0o600); err != nil {
				t.Fatal(err)
			}
			m := &metaFile{disk: osDisk{}}
			ps, err := m.Load(dir)
			m.Close()
			if err != nil || len(ps.Segments) != 40 || slot == 1 && ps.NextSegmentID != 2 || ps.NextSegmentID != 1 && ps.NextSegmentID != 2 {
				t.Fatalf("slot %d torn %05b: %d, %v", slot, torn, ps.NextSegmentID, err)
			}
		}
	}
}

// Raft forgets who waits for what is committed and not applied when it stops.
func TestAStopWhileCommandsAreBeingAppliedEnds(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		n := w.found(1, inMemory)
		for range 16 {
			n.m.slow = 200 * time.Millisecond
			var clients sync.WaitGroup
			for i := range 2 {
				clients.Go(func() {
					time.Sleep(time.Duration(i) * 50 * time.Millisecond)
					n.Propose(t.Context(), fmt.Appendf(nil, "c%d x", i))
				})
			}
			time.Sleep(300 * time.Millisecond) // a barrier waits behind the second one
			n.shut()
			clients.Wait()
			n = w.start(1, n.store)
			w.until(10*time.Second, "it leads", func() bool { return w.master(1) != nil })
		}
	})
}

func TestARolledBackNodeFetchesAnew(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		a := w.found(3, inMemory)
		a.say("x")
		b := w.nodes[2]
		if err := b.FetchAnew(context.Background(), errors.New("an older image"), true); err != nil {
			t.Fatal(err)
		}
		w.until(time.Minute, "it votes again", func() bool { l := b.current(); return l != nil && !l.trans.mute.Load() && w.equal(1, 2) })
		b.say("y")
	})
}

// The vote has moved since the image was made: what its node led by it is given
// up whole, though entries of both logs may have one index and one term.
func TestAnOldImageWithTheOnlyVoteIsGivenUpWhereAnotherLeads(t *testing.T) {
	for _, own := range []int{0, 3, 40} {
		bubble(t, func(t *testing.T, w *world) {
			a := w.found(2, inMemory)
			a.say("before the image")
			b := w.nodes[2]
			a.shut()
			image, err := a.store.(*MemStorage).Copy()
			if err != nil {
				t.Fatal(err)
			}
			a = w.start(1, a.store)
			a.say("after the image")
			w.until(time.Minute, "b is up to date", func() bool { return w.equal(1, 2) })
			if err := a.TransferTo(t.Context(), 2); err != nil {
				t.Fatal(err)
			}
			w.until(time.Minute, "b has the only vote", func() bool {
				s := b.State()
				return s.Master == 2 && len(s.Voters) == 1 && w.equal(1, 2)
			})
			for i := range 10 {
				b.say("b leads %d", i)
			}
			a.shut()
			w.net.cut(1, 2, true)
			a = w.start(1, image)
			w.until(10*time.Second, "a leads by its old vote", func() bool { return w.master(1) != nil })
			for i := range own {
				a.say("forgotten %d", i)
			}
			why := errors.New("an older image")
			if err := a.FetchAnew(t.Context(), why, false); err == nil {
				t.Fatal("the only vote was given up though nobody else leads")
			}
			if err := a.FetchAnew(t.Context(), why, true); err != nil {
				t.Fatal(err)
			}
			if text := a.m.text(); !strings.Contains(text, "before the image") {
				t.Fatalf("readers see %q meanwhile", text)
			}
			w.net.cut(1, 2, false)
			w.until(time.Minute, "a holds what b holds, and may vote", func() bool {
				l := a.current()
				return l != nil && !l.trans.mute.Load() && w.equal(1, 2)
			})
			if got := a.State().Forked; len(got) != own {
				t.Errorf("%d commands are listed as forked, want %d: %v", len(got), own, got)
			}
			a.say("after all")
			a.shut() // nothing of it comes back with a restart
			a = w.start(1, image)
			w.until(time.Minute, "both are equal", func() bool { return w.equal(1, 2) })
			b.say("and on")
			w.until(time.Minute, "both are equal", func() bool { return w.equal(1, 2) })
		})
	}
}

// Nobody may have led in a term by which a lone vote leads that nobody vouched for.
func TestALoneVoteThatNobodyVouchesForLeadsInATermOfItsOwn(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		a := w.found(2, inMemory)
		before := a.State().Authority.Term
		for _, sound := range []bool{true, false} {
			a.shut()
			w.net.cut(1, 2, true)
			w.vetted = make(chan struct{})
			if sound {
				close(w.vetted)
			}
			a = w.start(1, a.store)
			took := w.until(standWait+time.Second, "it leads", func() bool { return w.master(1) != nil })
			now := a.State().Authority.Term
			if sound && (now != before+1 || took >= standWait) || !sound && (now < before+16 || took < standWait) {
				t.Errorf("sound %v: term %d after %d, after %v", sound, now, before, took)
			}
			a.say("it leads")
			w.net.cut(1, 2, false)
			w.until(time.Minute, "the other follows", func() bool { return w.equal(1, 2) })
			before = a.State().Authority.Term
		}
	})
}

func TestWhoMayLeadWithoutANode(t *testing.T) {
	type ids = []mesh.NodeID
	for _, x := range []struct {
		master mesh.NodeID
		voters ids
		want   bool
	}{
		{2, ids{2}, true}, {3, ids{3, 4, 5}, true}, {1, ids{1}, false}, {0, ids{1}, false},
		{0, ids{2}, true},     // this one is about to stand again
		{0, ids{1, 2}, false}, // the other may have taken this one's vote since
		{0, ids{1, 2, 3}, true}, {0, ids{3}, false}, {0, nil, false},
	} {
		if got := (State{Self: 2, Master: x.master, Voters: x.voters}).LedWithout(1); got != x.want {
			t.Errorf("master %v, votes %v: %v", x.master, x.voters, got)
		}
	}
}
