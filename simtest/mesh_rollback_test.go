package simtest

import (
	"fmt"
	"testing"
	"time"

	"posthouse/mailstore/log/simfs"
)

// image copies a stopped office's disk.
func (o *Office) image(t *testing.T) *image {
	t.Helper()
	i, err := o.copy()
	if err != nil {
		t.Fatal(err)
	}
	return i
}

// restore puts a copy in place of a stopped office's disk.
func (o *Office) restore(t *testing.T, i *image) {
	t.Helper()
	o.w.note("%s is restored from an image", o.Name)
	if err := o.put(i); err != nil {
		t.Fatal(err)
	}
}

// uids are the subjects in an office's INBOX by UIDVALIDITY and UID.
func (w *World) uids(t *testing.T, office string) (validity uint32, all map[string]string) {
	t.Helper()
	box, err := w.Open(office, false)
	if err != nil {
		t.Fatal(err)
	}
	all = map[string]string{}
	for _, l := range box.Letters {
		all[fmt.Sprintf("%d/%d", box.UIDValidity, l.UID)] = l.Subject
	}
	return box.UIDValidity, all
}

func TestANodeThatWasRestoredFromAnOldImageIsTakenInAnew(t *testing.T) {
	for _, who := range []string{"plzen", "hq"} {
		t.Run(who, func(t *testing.T) {
			story(t, three, func(t *testing.T, w *World) {
				o, other := w.Office(who), "praha"
				w.mail(other, who, "early", 3)
				w.Until("early mail", 5*time.Second, func() bool { return w.got(who, "early", 3) })
				o.Stop()
				old := o.image(t)
				o.Start()
				w.works("after the image was taken")
				w.mail(other, who, "late", 5)
				w.Until("late mail", 5*time.Second, func() bool { return w.got(who, "late", 5) })
				before, shown := w.uids(t, who)
				time.Sleep(time.Minute)
				for round := range 3 { // the same image again and again
					o.Kill()
					o.restore(t, old)
					w.mail(other, who, fmt.Sprintf("while away %d", round), 2)
					o.Start()
					w.Until("it serves", 5*time.Second, func() bool {
						box, err := w.Open(who, false)
						if err == nil && box.UIDValidity <= before {
							t.Fatalf("it serves with UIDVALIDITY %d after %d", box.UIDValidity, before)
						}
						return err == nil
					})
					w.Until("it says so", 10*time.Second, func() bool { return o.condition("node.rolled-back") != "" })
					w.Until("mail that waited is there", 60*time.Second, func() bool { return w.got(who, fmt.Sprintf("while away %d", round), 2) })
					now, all := w.uids(t, who)
					if now <= before {
						t.Errorf("UIDVALIDITY %d after %d", now, before)
					}
					before = now
					for uid, subject := range all {
						if was, ok := shown[uid]; ok && was != subject {
							t.Errorf("UID %s was %q, now it is %q", uid, was, subject)
						}
						shown[uid] = subject
					}
					w.works(fmt.Sprintf("after round %d", round))
					_, all = w.uids(t, who)
					for uid, subject := range all {
						shown[uid] = subject
					}
				}
				// From now on it is a node like any other: no restart is a rollback.
				validity, _ := w.uids(t, who)
				w.Kill(three...)
				w.Start(three...)
				w.works("all restart")
				o.Stop()
				o.Start()
				w.works("it restarts")
				if now, _ := w.uids(t, who); now != validity {
					t.Errorf("UIDVALIDITY went from %d to %d without a rollback", validity, now)
				}
			})
		})
	}
}

func TestNoPowerCutLooksLikeARollback(t *testing.T) {
	story(t, three, func(t *testing.T, w *World) {
		was := map[string]uint32{}
		for _, name := range three {
			was[name], _ = w.uids(t, name)
		}
		modes := []simfs.Mode{simfs.Random, simfs.KeepAll, simfs.LoseAll, simfs.Torn}
		views := []View{KeepView, DropView, RewindView}
		for i := range 12 {
			for k := range 20 {
				w.mail(three[k%3], three[(k+i)%3], fmt.Sprintf("round %d message %d", i, k), 1)
			}
			o := w.Office(three[i%3])
			o.PowerCut(modes[i%len(modes)], views[i%len(views)])
			if i%4 == 3 {
				w.Office(three[(i+1)%3]).PowerCut(modes[(i+1)%len(modes)], views[i%len(views)])
			}
			time.Sleep(time.Duration(i) * time.Second)
			w.Start(three...)
			w.Until("the mesh is whole", time.Minute, w.whole)
		}
		for _, name := range three {
			if now, _ := w.uids(t, name); now != was[name] {
				t.Errorf("%s: UIDVALIDITY went from %d to %d", name, was[name], now)
			}
			if c := w.Office(name).condition("node.rolled-back"); c != "" {
				t.Errorf("%s: %s", name, c)
			}
		}
	})
}

// The founder of two offices holds the only vote: what it forgot only the other
// has, and only a person can say so.
func TestAFounderOfTwoThatWasRestoredFollowsTheOther(t *testing.T) {
	story(t, two, func(t *testing.T, w *World) {
		hq := w.Office("hq")
		hq.Stop()
		old := hq.image(t)
		hq.Start()
		w.works("after the image was taken")
		if err := w.addUser("plzen", "eva", "plzen"); err != nil {
			t.Fatal(err)
		}
		if err := w.addUser("hq", "ota", "hq"); err != nil {
			t.Fatal(err)
		}
		w.Until("both have it", 5*time.Second, w.Equal)
		hash := w.Office("plzen").Status().StateHash
		hq.Kill()
		hq.restore(t, old)
		hq.Start()
		w.Until("it says so", 10*time.Second, func() bool { return hq.condition("node.rolled-back") != "" })
		w.Until("plzen has no master", time.Minute, func() bool { return w.Office("plzen").Status().Master == "" })
		time.Sleep(5 * time.Minute)
		if now := w.Office("plzen").Status().StateHash; now != hash {
			t.Fatal("plzen's domain state was changed by a master that has forgotten it")
		}
		w.promote(t, "plzen")
		w.works("plzen was promoted")
		if !w.has("hq", "eva") || !w.has("hq", "ota") {
			t.Error("what was made after the image is lost")
		}
	})
}

// What the image holds for the outside may have left long ago: nobody outside
// gets it twice, and a person decides.
func TestWhatAnOldImageHoldsForTheOutsideIsNotSentAgain(t *testing.T) {
	story(t, three, func(t *testing.T, w *World) {
		hq, to := w.Office("hq"), "keep@example.net"
		taken := func() int {
			w.Outside.mu.Lock()
			defer w.Outside.mu.Unlock()
			return len(w.Outside.got[delivery{"once", to}])
		}
		w.Outside.Shut()
		c, err := w.smtp("hq", 587, "hq@"+Domain, "secret")
		if err != nil {
			t.Fatal(err)
		}
		if answers, err := c.send("hq@"+Domain, []string{to}, text("hq@"+Domain, to, "once")); err != nil || answers[0] != 250 {
			t.Fatal(answers, err)
		}
		c.close()
		hq.Stop()
		old := hq.image(t)
		w.Outside.Open()
		hq.Start()
		w.Until("it left", 10*time.Minute, func() bool { return taken() == 1 })
		time.Sleep(time.Minute)
		hq.Kill()
		hq.restore(t, old)
		hq.Start()
		w.Until("it is held", 10*time.Second, func() bool { return hq.Status().QueueHeld == 1 })
		time.Sleep(time.Hour)
		if n := taken(); n != 1 {
			t.Errorf("the outside got it %d times", n)
		}
		w.works("after the image")
	})
}

// The only vote of two offices has moved since the image was made. The office
// that had it then must not lead by that where the other is there; cut off, it
// cannot know better and leads, but gives up all that once they meet.
func TestAnImageInWhichAnOfficeHadTheOnlyVoteDoesNotBringItBack(t *testing.T) {
	for _, cut := range []bool{false, true} {
		t.Run(fmt.Sprintf("cut %v", cut), func(t *testing.T) {
			story(t, two, func(t *testing.T, w *World) {
				hq, plzen := w.Office("hq"), w.Office("plzen")
				hq.Stop()
				old := hq.image(t)
				hq.Start()
				w.works("after the image was taken")
				if err := plzen.Ops().Transfer(Ctx(), "plzen"); err != nil {
					t.Fatal(err)
				}
				w.Until("the vote has moved", time.Minute, func() bool {
					return w.onlyVoter(plzen) != nil && hq.Status().Master == "plzen"
				})
				for i := range 6 { // more than hq could write by its old vote
					if err := w.addUser("plzen", fmt.Sprintf("eva%d", i), "plzen"); err != nil {
						t.Fatal(err)
					}
				}
				w.Until("both have it", 5*time.Second, w.Equal)
				time.Sleep(steady)
				hq.Kill()
				hq.restore(t, old)
				if cut {
					w.Cut("hq").From("plzen")
				}
				hq.Start()
				if cut {
					w.Until("it leads alone", 3*time.Second, func() bool { return hq.Status().Master == "hq" })
					if err := w.addUser("hq", "ota", "hq"); err != nil {
						t.Fatal(err)
					}
					if a, b := hq.Status().Term, plzen.Status().Term; a == b {
						t.Errorf("both lead in term %d", a)
					}
					w.HealAll()
				}
				led := false
				w.Until("it says so", 30*time.Second, func() bool {
					led = led || hq.Status().Master == "hq"
					return hq.condition("node.rolled-back") != ""
				})
				if !cut && led {
					t.Error("it led by a vote that it no longer has")
				}
				w.works("hq was taken in anew")
				if !w.has("hq", "eva5") || w.has("plzen", "ota") || w.has("hq", "ota") {
					t.Error("the domain state is not the one of the office that has the vote")
				}
				hq.Stop()
				hq.Start()
				w.works("hq has restarted")
			})
		})
	}
}

// The only voter whose disk is as it was leads without the other's word.
func TestTheOnlyVoterLeadsThoughTheOtherIsAway(t *testing.T) {
	story(t, two, func(t *testing.T, w *World) {
		w.Office("plzen").Kill()
		for range 3 {
			w.Office("hq").Kill()
			w.Start("hq")
			took := w.Until("it leads", 3*time.Second, func() bool { return w.Office("hq").Status().Master == "hq" })
			t.Logf("after %v", took)
		}
		if err := w.addUser("hq", "ota", "hq"); err != nil {
			t.Fatal(err)
		}
		w.Start("plzen")
		w.works("plzen is back")
	})
}
