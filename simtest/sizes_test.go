package simtest

import (
	"slices"
	"testing"
	"time"
)

func TestRandomMailIsAsLongAsPeoplesAndBoundedInSum(t *testing.T) {
	small, middle, large := 0, 0, 0
	for seed := range uint64(50) {
		p := RandomPlan(seed, 0, 5*time.Minute)
		sum := 0
		for _, e := range p.Events {
			copies := len(e.B)
			if slices.Contains(e.B, "all") {
				copies += len(p.Offices) - 1
			}
			for _, n := range e.Size {
				sum += n * copies
				switch {
				case n == 0:
				case n <= 30e3:
					small++
				case n <= 1e6:
					middle++
				default:
					large++
				}
			}
		}
		if sum > randomBytes {
			t.Errorf("seed %d: %d bytes", seed, sum)
		}
	}
	if large < 20 || middle < 5*large || small < 5*middle {
		t.Errorf("%d of up to 30 kB, %d of up to 1 MB, %d longer", small, middle, large)
	}
}

// Invariant 1. What came with another body than its client sent is seen in a
// mailbox and outside; the checker is told of other bodies than were sent.
func TestABodyThatIsNotAsItWasSentIsSeen(t *testing.T) {
	founded(t, two, 2, func(t *testing.T, w *World) {
		w.Outside.Shut()
		for _, to := range []string{"plzen", "keep@" + outsideDomain} {
			if n := w.Send(1).By("hq").Sized(300 << 10).To(to); n != 1 {
				t.Fatalf("mail to %s was not taken", to)
			}
		}
		w.ledger.mu.Lock()
		for k := range w.ledger.sizes {
			w.ledger.sizes[k] += 100
		}
		w.ledger.mu.Unlock()
		w.Outside.Open()
		w.Until("all is where it goes", 10*time.Minute, func() bool { return w.drained() && w.Office("hq").Status().QueueOutside == 0 })
		w.ledger.Check()
		if len(w.wrong) != 2 || w.broken[OneOutcome] != 2 {
			t.Errorf("the checker says %.200q", w.wrong)
		}
		w.wrong = nil
	})
}
