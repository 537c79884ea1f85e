package simtest

import (
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"posthouse/appliance/admin"
)

// The stories here are short, each about one invariant: with the guard of the
// product that stands behind it taken out (.ci/mutants.txt), its checker must
// speak. DESIGN.md has the table.

// Invariant 2. A sync fails under a message: nobody knows whether it will be
// there after the restart, so its client gets no answer, and never a refusal.
func TestAMessageOfWhichNobodyKnowsIsNotRefused(t *testing.T) {
	tale(t, 2, func(w *World) {
		for range 3 {
			hq := w.Office("hq")
			life := hq.process()
			hq.FailWrittenSync()
			w.Send(1).From("hq").To("hq")
			w.Until("hq is back", time.Minute, func() bool { return hq.process() != life && w.whole() })
		}
	})
}

// Invariant 3. A mailbox has room for small mail only; what is small waits behind
// the larger mail of its sender.
func TestSmallMailDoesNotOvertakeLargeMailOfItsSender(t *testing.T) {
	tale(t, 2, func(w *World) {
		quota := func(n int64) {
			if _, err := w.Office("hq").Ops().ChangeSettings(Ctx(), admin.SettingsChange{Quota: &n}); err != nil {
				t.Fatal(err)
			}
			w.Until("all know the quota", 10*time.Second, w.Equal)
		}
		quota(3_000)
		w.Cut("plzen").From("hq")
		// The bodies of c1-0 to c1-99 are long, those from c1-100 on are not.
		if n := w.Send(110).From("plzen").To("hq"); n != 110 {
			t.Fatalf("%d of 110 taken", n)
		}
		w.HealAll()
		time.Sleep(5 * time.Minute)
		quota(0)
		w.Until("what waited is there", 2*time.Hour, w.drained) // the mailbox was not full in others' eyes: by the schedule
	})
}

// Invariant 3. A large message is on its way for longer than anybody waits, over a
// narrow line, behind one of its sender that finds no room: room comes meanwhile.
func TestWhatIsLongOnItsWayDoesNotOvertakeWhatFoundNoRoom(t *testing.T) {
	tale(t, 2, func(w *World) {
		quota := func(n int64) {
			if _, err := w.Office("hq").Ops().ChangeSettings(Ctx(), admin.SettingsChange{Quota: &n}); err != nil {
				t.Fatal(err)
			}
			w.Until("all know the quota", 10*time.Second, w.Equal)
		}
		quota(3_000)
		w.SetLine("hq", "plzen", Quality{Latency: 20 * time.Millisecond, Bandwidth: 64_000})
		if n := w.Send(3).From("plzen").Sized(5_000, 400_000, 500).To("hq"); n != 3 {
			t.Fatalf("%d of 3 taken", n)
		}
		time.Sleep(30 * time.Second)
		quota(0)
		w.Until("all is there", 2*time.Hour, w.drained)
	})
}

// Invariant 5. An office that has heard nothing of the master for minutes takes
// its own mail, and the others'.
func TestAnOfficeThatIsAloneTakesTheMailOfThoseItKnows(t *testing.T) {
	tale(t, 2, func(w *World) {
		w.Cut("plzen").FromAll()
		time.Sleep(3 * time.Minute)
		x := &player{w: w}
		for _, o := range w.Offices {
			x.probe(o)
			w.Send(2).From(o.Name).To("hq", "plzen")
		}
	})
}

// Invariant 6. What waited through an hour goes when the line is back, not when
// its next try was due.
func TestWhatWaitedThroughAnHourGoesAtOnce(t *testing.T) {
	tale(t, 5, func(w *World) {
		w.Cut(officeNames...).From(officeNames...)
		for i, from := range officeNames { // each has a schedule of its own
			w.Send(1).From(from).To(officeNames[(i+1)%5], officeNames[(i+3)%5])
			time.Sleep(7 * time.Second)
		}
		time.Sleep(time.Hour)
	})
}

// Invariant 7. A home loses its power, and what it had written of the view of
// its log: numbers go on where they were.
func TestNumbersGoOnAfterAPowerCut(t *testing.T) {
	tale(t, 2, func(w *World) {
		for range 3 {
			w.Send(10).From("plzen").To("hq")
			w.Until("it is there", drainLimit, w.drained)
			w.ledger.Look(w.Office("hq"))
			time.Sleep(2 * time.Minute) // the view is written
			w.Kill("hq")
			w.Start("hq")
			w.Until("hq is back", time.Minute, w.whole)
		}
	})
}

// Invariant 8. Mail to the outside leaves nothing open behind it.
func TestMailToTheOutsideLeavesNothingOpen(t *testing.T) {
	tale(t, 2, func(w *World) {
		w.Cut("hq").From("outside")
		w.Send(5).By("hq").To("keep@example.net", "refuse@example.net")
		time.Sleep(time.Minute)
	})
}

// Invariant 4. Two masters of one term cannot be had by taking a guard out of
// the product: Raft has it. So the checker is told of them.
func TestTwoMastersOfATermAreSeen(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := NewWorld(t, two...)
		x := &player{w: w, terms: map[[2]uint64]string{}}
		for _, l := range []struct {
			office           string
			generation, term uint64
		}{{"hq", 1, 4}, {"plzen", 1, 5}, {"hq", 1, 4}, {"hq", 2, 5}} {
			x.leads(l.office, l.generation, l.term)
		}
		if len(w.wrong) > 0 {
			t.Errorf("a master a term: %v", w.wrong)
		}
		if x.leads("hq", 1, 5); len(w.wrong) != 1 || w.broken[OneMaster] != 1 {
			t.Errorf("two masters of a term: %v", w.wrong)
		}
		w.Close()
	})
}

// Invariant 8. A goroutine that nobody waits for ends the bubble with a panic,
// and a node's files and ports are counted: the count is told of leaks.
func TestWhatIsLeftIsSeen(t *testing.T) {
	fresh := func() level {
		return level{offices: slices.Clone(two), goroutines: map[string]int{"serve": 200}, quic: 2, conns: map[string]conns{}, files: map[string]int{"hq": 1, "plzen": 1}, kept: map[string]int{"hq": 3, "plzen": 3}}
	}
	before := fresh()
	for what, change := range map[string]func(*level){
		"": func(l *level) { l.goroutines["serve"] += 2 * levelSlack; l.goroutines[raftEnd] = 8; l.files["hq"] = 4 },
		"200 did before the faults: 9 more of dial": func(l *level) { l.goroutines["dial"] += 2*levelSlack + 1 },
		"11 streams of Raft":                        func(l *level) { l.goroutines[raftEnd] = 11 },
		"9 ends of QUIC":                            func(l *level) { l.quic = 9 },
		"plzen has 5 files open":                    func(l *level) { l.files["plzen"] = 5 },
		"1 connections that it opened":              func(l *level) { l.conns["hq"] = conns{dialled: 1} },
		"1 connections that it accept":              func(l *level) { l.conns["hq"] = conns{accepted: 1} },
	} {
		now := fresh()
		change(&now)
		said := strings.Join(now.above(before), "\n")
		if (said == "") != (what == "") || !strings.Contains(said, what) {
			t.Errorf("wanted %q, said %q", what, said)
		}
	}
	now := fresh()
	if now.offices, now.goroutines["serve"] = append(now.offices, "praha"), 300; len(now.above(before)) > 0 {
		t.Error("a third office is no leak")
	}
}
