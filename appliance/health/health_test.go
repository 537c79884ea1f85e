package health

import (
	"testing"
	"testing/synctest"
	"time"
)

func TestTheGravestComesFirstAndKeepsItsBeginning(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		changes := 0
		b := New(func() { changes++ })
		if ok, s := b.Sentence(); !ok || s != "All mail is flowing." {
			t.Errorf("empty board says %v %q", ok, s)
		}
		b.Set(Condition{Name: "node.unreachable", About: "plzen", Severity: Warning, Text: "Plzen is cut off."})
		began := time.Now().UTC()
		time.Sleep(time.Minute)
		b.Set(Condition{Name: "store.full", Severity: Problem, Text: "The disk is full: new mail is deferred."})
		b.Set(Condition{Name: "node.unreachable", About: "plzen", Severity: Warning, Text: "Plzen is cut off for 1 min."})
		cs := b.Conditions()
		if len(cs) != 2 || cs[0].Name != "store.full" || !cs[1].Since.Equal(began) {
			t.Errorf("got %+v", cs)
		}
		if ok, s := b.Sentence(); ok || s != "The disk is full: new mail is deferred. Plzen is cut off for 1 min." {
			t.Errorf("got %v %q", ok, s)
		}
		b.Clear("store.full", "")
		b.Clear("store.full", "")
		if ok, _ := b.Sentence(); !ok || changes != 4 {
			t.Errorf("ok %v after %d changes, want 4", ok, changes)
		}
	})
}
