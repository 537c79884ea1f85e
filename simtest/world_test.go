package simtest

import (
	"testing"
	"testing/synctest"
	"time"

	"posthouse/mesh"
)

// inbox returns how many messages lie in the mailbox of an office's user.
func inbox(t *testing.T, w *World, office string) int {
	t.Helper()
	there, err := w.Inbox(office)
	if err != nil {
		t.Fatal(err)
	}
	return len(there)
}

func TestThreeOfficesFoundJoinAndCarryMail(t *testing.T) {
	began := time.Now()
	synctest.Test(t, func(t *testing.T) {
		w := NewWorld(t, "hq", "plzen", "praha")
		defer w.Close()
		start := time.Now()
		w.Found()
		t.Logf("founded, joined and filled after %v of virtual time", time.Since(start))
		if err := w.Submit("hq", "somebody@example.net", "plzen@"+Domain, "one"); err != nil {
			t.Fatal(err)
		}
		took := w.Until("the message is in plzen", 5*time.Second, func() bool { return inbox(t, w, "plzen") == 1 })
		t.Logf("hq to plzen took %v", took)
		if took > time.Second {
			t.Errorf("one hop took %v", took)
		}

		// A cut line stops nobody's own mail, and what was for the other side
		// leaves when it heals.
		w.Cut("plzen").From("hq", "praha")
		time.Sleep(time.Minute)
		if err := w.Submit("plzen", "somebody@example.net", "plzen@"+Domain, "local"); err != nil {
			t.Fatalf("local mail in the split: %v", err)
		}
		w.Until("local mail is delivered in the split", time.Second, func() bool { return inbox(t, w, "plzen") == 2 })
		for range 5 {
			if err := w.Submit("praha", "somebody@example.net", "plzen@"+Domain, "waits"); err != nil {
				t.Fatal(err)
			}
		}
		time.Sleep(time.Minute)
		if n := inbox(t, w, "plzen"); n != 2 {
			t.Errorf("%d messages crossed a cut line", n-2)
		}
		for _, m := range w.Office("praha").Status().Members {
			if m.Name == "plzen" && (m.State != string(mesh.Unreachable) || m.Queue != 5) {
				t.Errorf("praha says of plzen: %s with %d waiting", m.State, m.Queue)
			}
		}
		w.Heal("plzen").From("hq", "praha")
		took = w.Until("what waited is delivered", 15*time.Second, func() bool { return inbox(t, w, "plzen") == 7 })
		t.Logf("after the heal it took %v", took)

		// The master dies; another leads within 15 s; the dead one comes back and
		// follows, or leads again by its priority.
		w.Until("the mesh is whole after the heal", time.Minute, w.whole)
		master := w.Office("praha").Status().Master
		dead := w.Office(master)
		dead.Kill()
		var other *Office
		for _, o := range w.Offices {
			if o != dead {
				other = o
			}
		}
		took = w.Until("a new master", 15*time.Second, func() bool { m := other.Status().Master; return m != "" && m != master })
		t.Logf("take-over took %v", took)
		if err := w.Submit(other.Name, "somebody@example.net", dead.Name+"@"+Domain, "for the dead"); err != nil {
			t.Fatal(err)
		}
		before := 0
		dead.Start()
		w.Until("the mesh is whole again", time.Minute, w.whole)
		w.Until("mail for the dead is there", 5*time.Second, func() bool { return inbox(t, w, dead.Name) == before+1 })
	})
	t.Logf("all of it took %v of real time", time.Since(began).Round(time.Millisecond))
}
