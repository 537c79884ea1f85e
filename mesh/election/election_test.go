package election

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"posthouse/mesh"
)

func TestVotesGrowWithTheMesh(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		a := w.found(1, inMemory)
		for i := 2; i <= 5; i++ {
			n := w.start(mesh.NodeID(i), NewMemStorage())
			a.say("admit %s 0", n.id)
			took := w.until(time.Minute, fmt.Sprintf("%d nodes", i), func() bool {
				s := a.State()
				return len(s.Voters) == target(i) && len(s.Others) == i-target(i)
			})
			t.Logf("%d nodes, %d votes after %v", i, target(i), took)
		}
		a.say("revoke %s", mesh.NodeID(5))
		w.until(time.Minute, "three votes", func() bool { return len(a.State().Voters) == 3 && len(a.State().Others) == 1 })
		w.until(10*time.Second, "all have it", func() bool { return w.equal(1, 2, 3, 4) })
	})
}

func TestACutOffMasterIsReplaced(t *testing.T) {
	for _, count := range []int{3, 5} {
		t.Run(fmt.Sprintf("%d nodes", count), func(t *testing.T) {
			bubble(t, func(t *testing.T, w *world) {
				a := w.found(count, inMemory)
				a.say("before")
				w.isolate(a.id, true)
				var b *node
				took := w.until(15*time.Second, "a new master", func() bool { b = w.master(2, 3, 4, 5); return b != nil })
				t.Logf("a new master after %v", took)
				if _, ok := a.Acting(); ok {
					t.Error("the old one still acts")
				}
				b.say("during")
				_, err := a.attempt("refused")
				if no, ok := errors.AsType[*NoMaster](err); !ok || no.Have != 1 || no.Need != count/2+1 || no.Error() != fmt.Sprintf("reached n1, but nobody can change the domain state now: needs %d of %d", count/2+1, count) {
					t.Errorf("the cut-off node says %v", err)
				}
				w.isolate(a.id, false)
				w.until(20*time.Second, "equal again", func() bool { return w.equal(1, 2, 3) && a.State().Master == b.State().Master })
				a.say("after")
			})
		})
	}
}

func TestWhatIsDoneHereIsSeenHere(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		w.found(4, inMemory) // the fourth has no vote
		for i := range 10 {
			for _, id := range []mesh.NodeID{2, 4} {
				n := w.nodes[id]
				from := time.Now()
				n.say("x%d", i)
				if lines := n.m.since(0); lines[len(lines)-1].Text != fmt.Sprintf("x%d", i) {
					t.Fatalf("not visible at %s", n.id)
				}
				if took := time.Since(from); took > 400*time.Millisecond {
					t.Errorf("took %v", took)
				}
			}
		}
		n := w.nodes[3]
		one, _ := n.Propose(context.Background(), []byte("same thing"))
		two, err := n.Propose(context.Background(), []byte("same thing"))
		if err != nil || string(one) == string(two) || string(two[:5]) != "again" {
			t.Errorf("%q then %q, %v", one, two, err)
		}
		var refused *Refused
		if _, err := n.Propose(context.Background(), []byte("nonsense")); !errors.As(err, &refused) || refused.Text != "that is no command" {
			t.Errorf("%v", err)
		}
	})
}

func TestACopyIsCurrentOrSaysThatItMayBeBehind(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		a, c := w.found(4, inMemory), w.nodes[4] // which has no vote
		current := func(n *node) error {
			ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
			defer cancel()
			return n.Current(ctx)
		}
		behind := func(n *node) {
			t.Helper()
			if err := current(n); !errors.As(err, new(*NoMaster)) {
				t.Errorf("%s cannot know, and says %v", n.id, err)
			}
		}
		w.isolate(c.id, true)
		a.say("one")
		behind(c)
		w.isolate(c.id, false)
		if err := current(c); err != nil || !w.equal(a.id, c.id) {
			t.Errorf("after the heal: %v", err)
		}
		a.say("two")
		if err := current(c); err != nil || !w.equal(a.id, c.id) {
			t.Errorf("at once: %v", err)
		}
		w.isolate(a.id, true) // the old master is sure of nothing, once others may lead
		w.until(15*time.Second, "a new master", func() bool { return w.master(2, 3) != nil })
		behind(a)
		w.isolate(a.id, false)
		if err := current(a); err != nil {
			t.Errorf("the old master after the heal: %v", err)
		}
		w.isolate(c.id, true)
		w.nodes[2].say("three")
		w.nodes[2].shut()
		w.nodes[3].shut()
		w.isolate(c.id, false)
		behind(c)
	})
}

func TestAnyNodeMayRestart(t *testing.T) {
	for name, storage := range map[string]func(t *testing.T) func(mesh.NodeID) Storage{
		"in memory": func(t *testing.T) func(mesh.NodeID) Storage { return inMemory },
		"on disk":   func(t *testing.T) func(mesh.NodeID) Storage { return onDisk(t, t.TempDir()) },
	} {
		t.Run(name, func(t *testing.T) {
			store := storage(t)
			bubble(t, func(t *testing.T, w *world) {
				w.found(3, store)
				for i := range mesh.NodeID(3) {
					old := w.nodes[i+1]
					old.say("before %d", i)
					before := old.m.text()
					old.shut()
					w.until(15*time.Second, "a master without it", func() bool { return w.master(1, 2, 3) != nil })
					n := w.start(i+1, old.store)
					w.until(time.Second, "it knows what it knew", func() bool { return len(n.m.text()) >= len(before) })
					n.say("after %d", i)
				}
				w.until(10*time.Second, "equal", func() bool { return w.equal(1, 2, 3) })
			})
		})
	}
}

func TestANodeThatRestartsAloneKnowsWhatItKnew(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		w.found(3, inMemory)
		b := w.nodes[2]
		b.say("the last word")
		before := b.m.text()
		for _, id := range []mesh.NodeID{1, 2, 3} {
			w.nodes[id].shut()
		}
		b = w.start(2, b.store)
		<-b.Ready()
		if b.m.text() != before {
			t.Errorf("it knows\n%s\nit knew\n%s", b.m.text(), before)
		}
	})
}

func TestAWipedFollowerGetsASnapshot(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		a := w.found(3, inMemory)
		c := w.nodes[3]
		c.shut()
		for i := range 2 {
			a.say("line %d", i)
		}
		if err := a.current().raft.Snapshot().Error(); err != nil {
			t.Fatal(err)
		}
		c = w.start(3, NewMemStorage())
		w.until(30*time.Second, "the wiped one is equal", func() bool { return w.equal(1, 3) })
		c.say("and takes part")
	})
}

func TestTheHigherPriorityGetsTheLeadBack(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		a := w.found(3, inMemory)
		a.say("admit %s 10", mesh.NodeID(2))
		took := w.until(40*time.Second, "2 leads", func() bool { return w.master(2) != nil })
		t.Logf("led after %v", took)
		if took < 10*time.Second {
			t.Error("without steady contact")
		}
		b := w.nodes[2]
		b.shut()
		w.until(15*time.Second, "another one leads", func() bool { return w.master(1, 3) != nil })
		w.start(2, b.store)
		from := w.until(time.Minute, "2 leads again", func() bool { return w.master(2) != nil })
		t.Logf("leads again after %v", from)
	})
}

// TestANewMasterHasAppliedWhatWasAnsweredBeforeItsTerm cuts the master off
// while its followers' word is under way to it: it answers the command, and
// they hold it without knowing that it is committed. Whoever leads next must
// not act before its machine has it.
func TestANewMasterHasAppliedWhatWasAnsweredBeforeItsTerm(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		a := w.found(3, inMemory)
		time.Sleep(20 * time.Second) // the lines are warm, nothing is under way
		answered := make(chan error, 1)
		go func() {
			_, err := a.attempt("the last word")
			answered <- err
		}()
		time.Sleep(simLatency * 3 / 2)
		w.isolate(1, true)
		if err := <-answered; err != nil {
			t.Fatal(err)
		}
		for _, id := range []mesh.NodeID{2, 3} {
			if strings.Contains(w.nodes[id].m.text(), "the last word") {
				t.Fatalf("%s has applied it already: the cut came too late to show anything", id)
			}
		}
		for end := time.Now().Add(15 * time.Second); w.master(2, 3) == nil; time.Sleep(time.Millisecond) {
			if time.Now().After(end) {
				t.Fatal("no new master within 15 s")
			}
		}
		if m := w.master(2, 3); !strings.Contains(m.m.text(), "the last word") {
			t.Errorf("%s acts as master and has not applied what was answered before its term", m.id)
		}
	})
}

func TestAWitnessGivesTheLeadAway(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		a := w.found(3, inMemory)
		a.say("admit %s -1", mesh.NodeID(2))
		a.say("admit %s -1", mesh.NodeID(3))
		w.isolate(1, true)
		w.until(15*time.Second, "a witness leads meanwhile", func() bool { return w.master(2, 3) != nil })
		w.isolate(1, false)
		w.until(40*time.Second, "the candidate leads again", func() bool { return w.master(1) != nil })
	})
}

func TestTheLeadIsHandedOverAtAStop(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		a := w.found(3, inMemory)
		a.shut()
		took := w.until(2*time.Second, "another one leads", func() bool { return w.master(2, 3) != nil })
		t.Logf("another one led after %v", took)
		m := w.master(2, 3)
		to := mesh.NodeID(5) - m.id
		if err := m.TransferTo(context.Background(), to); err != nil {
			t.Fatal(err)
		}
		w.until(2*time.Second, "it leads by request", func() bool { return w.master(to) != nil })
		if err := m.TransferTo(context.Background(), to); !errors.Is(err, ErrNotMaster) {
			t.Errorf("%v", err)
		}
	})
}

func TestPromoteAndHealGiveOneLineage(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		a := w.found(3, inMemory)
		a.say("common")
		w.until(10*time.Second, "equal", func() bool { return w.equal(1, 2, 3) })
		w.isolate(3, true)
		a.say("forked 1")
		a.say("forked 2")
		c := w.nodes[3]
		p, err := c.Promote(context.Background())
		if err != nil {
			t.Fatal(err)
		}
		if p.Lineage.Generation != 2 {
			t.Errorf("%+v", p)
		}
		w.until(10*time.Second, "the promoted one leads", func() bool { return w.master(3) != nil })
		c.say("from the promoted side")
		if a.State().Authority.Generation != 1 {
			t.Error("too early")
		}
		w.isolate(3, false)
		w.until(time.Minute, "one lineage", func() bool {
			for _, n := range w.nodes {
				if n.State().Authority.Generation != 2 || n.State().Master != w.nodes[3].State().Master || n.State().Master == 0 {
					return false
				}
			}
			return w.equal(1, 2, 3)
		})
		for _, id := range []mesh.NodeID{1, 2} {
			f := w.nodes[id].State().Forked
			if len(f) != 2 || f[0].Text != "forked 1" || f[1].Text != "forked 2" {
				t.Errorf("%s lists %+v", id, f)
			}
		}
		a.say("together again")
		w.until(time.Minute, "three votes", func() bool { return len(c.State().Voters) == 3 })
		// A restart in the new lineage.
		old := w.nodes[1]
		old.shut()
		n := w.start(1, old.store)
		n.say("restarted")
		if len(n.State().Forked) != 2 {
			t.Error("the list did not survive")
		}
		if err := n.ForgetForked(context.Background()); err != nil || len(n.State().Forked) != 0 {
			t.Error("the list was not dropped")
		}
	})
}

func TestTwoPromotionsStopBothUntilOneIsPromotedAgain(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		w.found(3, inMemory)
		b, c := w.nodes[2], w.nodes[3]
		w.isolate(1, true)
		w.isolate(2, true)
		w.isolate(3, true)
		for _, n := range []*node{b, c} {
			if _, err := n.Promote(context.Background()); err != nil {
				t.Fatal(err)
			}
			n.say("at %s", n.id)
		}
		w.net.cut(2, 3, false)
		w.until(time.Minute, "both see it", func() bool { return b.State().Rival.Generation == 2 && c.State().Rival.Generation == 2 })
		if _, err := b.attempt("x"); err == nil {
			t.Error("b writes on")
		}
		if _, err := c.attempt("x"); err == nil {
			t.Error("c writes on")
		}
		if p, err := b.Promote(context.Background()); err != nil || p.Lineage.Generation != 3 {
			t.Fatal(p, err)
		}
		w.isolate(1, false)
		w.until(time.Minute, "one lineage", func() bool {
			return w.equal(1, 2, 3) && c.State().Authority.Generation == 3 && w.nodes[1].State().Authority.Generation == 3
		})
		if f := c.State().Forked; len(f) != 1 || f[0].Text != "at "+c.id.String() {
			t.Errorf("c lists %+v", f)
		}
		c.say("after")
	})
}

func TestAnUnknownCommandStopsRaftAndNotTheNode(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		a := w.found(3, inMemory)
		for _, id := range []mesh.NodeID{1, 2} {
			w.nodes[id].m.know = true
		}
		a.say("future")
		c := w.nodes[3]
		w.until(5*time.Second, "3 has stopped", func() bool { return c.State().Stopped != "" })
		t.Log(c.State().Stopped)
		a.say("more")
		if _, err := c.attempt("x"); err == nil {
			t.Error("3 writes on")
		}
		before := c.m.text()
		c.shut()
		c = w.start(3, c.store) // the same version again
		time.Sleep(5 * time.Second)
		if c.State().Stopped == "" && c.m.text() != before {
			t.Error("it went on")
		}
		c.shut()
		c = w.start(3, c.store)
		c.m.know = true // updated
		w.until(20*time.Second, "it goes on", func() bool { return w.equal(1, 3) })
	})
}

func TestARevokedVoterIsWithdrawnFirst(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		a := w.found(3, inMemory)
		w.nodes[3].shut() // dead
		time.Sleep(30 * time.Second)
		if err := a.Withdraw(context.Background(), 2); err != nil {
			t.Fatal(err)
		}
		w.nodes[2].shut() // its revocation ends its connections
		a.say("revoke %s", mesh.NodeID(2))
		if s := a.State(); len(s.Voters) != 1 || s.Role != mesh.RoleMaster {
			t.Errorf("%+v", s)
		}
	})
}

func TestADeadVoterIsReplacedByALiveSpare(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		a := w.found(4, inMemory)
		spare := a.State().Others[0]
		dead := mesh.NodeID(2)
		if spare == dead {
			dead = 3
		}
		w.nodes[dead].shut()
		took := w.until(12*time.Minute, "the spare votes", func() bool {
			v := a.State().Voters
			return len(v) == 3 && v[0] != dead && v[1] != dead && v[2] != dead
		})
		if took < 9*time.Minute {
			t.Errorf("after %v already", took)
		}
	})
}

func TestTheOnlyVoteOfTwoNodesMoves(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		a := w.found(2, inMemory)
		time.Sleep(10 * time.Second)
		w.isolate(2, true)
		for range 2 { // also while it was heard a moment ago
			if err := a.TransferTo(context.Background(), 2); err == nil {
				t.Fatal("the vote went to a node that cannot be reached")
			}
			time.Sleep(30 * time.Second)
		}
		a.say("still the master")
		w.isolate(2, false)
		w.until(time.Minute, "2 has it", func() bool { return w.equal(1, 2) })
		time.Sleep(10 * time.Second)
		if err := a.TransferTo(context.Background(), 2); err != nil {
			t.Fatal(err)
		}
		b := w.nodes[2]
		w.until(10*time.Second, "2 has the only vote", func() bool { s := b.State(); return s.Role == mesh.RoleMaster && len(s.Voters) == 1 })
		a.shut()
		b.say("revoke %s", a.id)
		w.until(5*time.Second, "1 has gone", func() bool { return len(b.State().Others) == 0 })
	})
}

func TestAMemberIsAddedAtOnceWhileAnotherIsSilent(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		a := w.found(3, inMemory)
		w.isolate(3, true)
		time.Sleep(time.Minute)
		n := w.start(4, NewMemStorage())
		w.net.cut(3, 4, true)
		a.say("admit %s 0", n.id)
		took := w.until(3*time.Second, "the new one has the state", func() bool { return w.equal(1, 4) })
		t.Logf("after %v", took)
	})
}
