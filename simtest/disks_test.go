package simtest

import (
	"testing"
	"time"
)

// An office's disk is gone. Its admin puts the lost node out of the mesh and lets
// a new one of its name join; its people have their home there again, what the
// other offices kept for them comes, and no UID means another message than before.
func TestAnOfficeWhoseDiskIsLostIsReplaced(t *testing.T) {
	for _, c := range []struct {
		offices int
		lost    string
	}{{3, "plzen"}, {3, "hq"}, {2, "plzen"}, {2, "hq"}} {
		t.Run(c.lost, func(t *testing.T) {
			played(t, c.offices, func(x *player) {
				w := x.w
				w.Send(10).From("hq").To("plzen")
				w.Send(10).From("plzen").To("hq", "plzen")
				time.Sleep(5 * time.Second)
				w.ledger.Look(w.Offices...)
				done := make(chan struct{})
				go func() {
					defer close(done)
					x.loseDisk(w.Office(c.lost), 0) // at once: the next master has heard of nobody yet
				}()
				time.Sleep(time.Second)
				for _, o := range w.Offices {
					if o.Name == c.lost {
						continue
					}
					if n := w.Send(5).From(o.Name).To(c.lost); n != 5 {
						t.Errorf("%s took %d of 5 for the people of %s", o.Name, n, c.lost)
					}
				}
				<-done
				w.Until("what waited is there", time.Minute, func() bool { return inbox(t, w, c.lost) == 5*(c.offices-1) })
			})
		})
	}
}

// Each office in turn comes back with an older copy of its disk, while mail flows.
func TestOfficesComeBackWithOldImages(t *testing.T) {
	played(t, 3, func(x *player) {
		w := x.w
		for _, o := range w.Offices {
			x.image(o)
			w.Send(20).From("hq").To("plzen", "praha")
			w.Send(20).From("plzen").To("hq", "praha")
			w.Send(5).By("praha").To("keep@example.net", "hq")
			time.Sleep(20 * time.Second)
			w.ledger.Look(w.Offices...)
			x.restore(o)
			w.ledger.Look(w.Offices...)
		}
	})
}
