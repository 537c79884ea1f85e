package simtest

import (
	"fmt"
	"os"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"posthouse/appliance/admin"
)

func TestAStoppedNodeIsShownAsLeftAndAKilledOneAsUnreachable(t *testing.T) {
	story(t, three, func(t *testing.T, w *World) {
		hq, plzen := w.Office("hq"), w.Office("plzen")
		began := time.Now()
		plzen.Stop()
		if took := time.Since(began); took > 8*time.Second {
			t.Errorf("a clean stop took %v", took)
		}
		w.Until("plzen has left", 5*time.Second, func() bool { return hq.sees("plzen").State == left && w.Office("praha").sees("plzen").State == left })
		w.mail("hq", "plzen", "while away", 3)
		plzen.Start()
		w.Until("plzen serves again", 10*time.Second, func() bool {
			return hq.sees("plzen").State == serving && w.Office("praha").sees("plzen").State == serving
		})
		w.Until("its mail is there", 5*time.Second, func() bool { return w.got("plzen", "while away", 3) })
		if v := hq.sees("plzen").Version; v != "sim" {
			t.Errorf("plzen's version is %q", v)
		}
		plzen.Kill()
		took := w.Until("plzen is seen as gone", 20*time.Second, func() bool { return hq.sees("plzen").State == unreachable })
		t.Logf("a killed node is seen as gone after %v", took)
		plzen.Start()
		w.works("after both")
	})
}

func TestTheLineBetweenTwoBranchesOnly(t *testing.T) {
	story(t, three, func(t *testing.T, w *World) {
		plzen, praha := w.Office("plzen"), w.Office("praha")
		w.Cut("plzen").From("praha")
		w.mail("plzen", "praha", "at once", 5)
		took := w.Until("mail sent at the cut is there", 20*time.Second, func() bool { return w.got("praha", "at once", 5) })
		t.Logf("mail sent at the moment of the cut took %v", took)
		took = w.Until("both show the way", 30*time.Second, func() bool {
			return plzen.sees("praha").Path == "via hq" && praha.sees("plzen").Path == "via hq" && plzen.sees("praha").State == serving && praha.sees("plzen").State == serving
		})
		t.Logf("the way is shown after %v", took)
		w.mail("praha", "plzen", "around", 5)
		if took = w.Until("mail goes around", 5*time.Second, func() bool { return w.got("plzen", "around", 5) }); took > time.Second {
			t.Errorf("mail around the cut took %v", took)
		}
		for range 60 { // it stays so
			time.Sleep(10 * time.Second)
			for _, m := range []string{plzen.sees("praha").State + " " + plzen.sees("praha").Path, praha.sees("plzen").State + " " + praha.sees("plzen").Path} {
				if m != serving+" via hq" {
					t.Fatalf("a branch shows the other as %s", m)
				}
			}
		}
		if text := plzen.condition("node.unreachable"); text != "" {
			t.Errorf("a reachable node is called unreachable: %s", text)
		}
		if text := plzen.condition("line.cut"); !strings.Contains(text, "via hq") {
			t.Errorf("the cut line is not named: %q", text)
		}
		w.Heal("plzen").From("praha")
		took = w.Until("the line is direct again", 10*time.Second, func() bool { return plzen.sees("praha").Path == "direct" && praha.sees("plzen").Path == "direct" })
		t.Logf("direct again after %v", took)
		w.works("after the heal")
	})
}

func TestALineThatIsCutInOneDirection(t *testing.T) {
	story(t, three, func(t *testing.T, w *World) {
		w.Cut("plzen").Toward("praha")
		w.mail("plzen", "praha", "there", 3)
		w.mail("praha", "plzen", "back", 3)
		took := w.Until("mail goes around both ways", 30*time.Second, func() bool { return w.got("praha", "there", 3) && w.got("plzen", "back", 3) })
		t.Logf("mail around a half cut line took %v", took)
		w.Until("the way is shown", 30*time.Second, func() bool { return w.Office("plzen").sees("praha").Path == "via hq" })
		w.Heal("plzen").From("praha")
		w.works("after the heal")
	})
}

// Serf forgets a failed node after 24 h by default, and link dials less often
// after the first: the short form has the latter only.
func TestAnOfficeWithoutItsLineForADayAndAnHour(t *testing.T) {
	away := 70 * time.Minute
	if os.Getenv("PROVE") == "full" {
		away = 25 * time.Hour
	}
	story(t, three, func(t *testing.T, w *World) {
		w.Cut("plzen").FromAll()
		w.mail("hq", "plzen", "waits", 20)
		w.mail("plzen", "praha", "waits too", 20)
		time.Sleep(away)
		w.mail("plzen", "plzen", "local", 2)
		w.Until("local mail", time.Second, func() bool { return w.got("plzen", "local", 2) })
		w.Heal("plzen").FromAll()
		began := time.Now()
		w.Until("members agree", time.Minute, w.whole)
		t.Logf("members agree after %v", time.Since(began))
		took := w.Until("the queues are empty", 15*time.Second, func() bool { return w.got("plzen", "waits", 20) && w.got("praha", "waits too", 20) })
		t.Logf("and the queues are empty %v later", took)
		w.works("after a day")
	})
}

// DNS is down where the line is cut. Offices find each other by their names, yet
// what the mesh decides counts at once.
func TestAChangeOfHomesWaitsForNoDNS(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := NewWorld(t, three...)
		defer w.Close()
		for _, o := range w.Offices {
			o.cfg.Advertise = []string{o.cfg.Host + ":44337"}
		}
		w.Found()
		w.Cut("praha").From("hq")
		w.Cut("praha").From("plzen")
		time.Sleep(20 * time.Second)
		w.mail("hq", "praha", "waits", 3)
		w.noDNS.Store(true)
		time.Sleep(time.Minute)
		waiting := func(at, to string) (n int) {
			for _, m := range w.Office(at).Status().Members {
				if m.Name == to {
					n = m.Queue
				}
			}
			return n
		}
		if n := waiting("hq", "praha"); n != 3 {
			t.Fatalf("%d messages wait for praha", n)
		}
		if err := w.Office("hq").Ops().RevokeNode(Ctx(), "praha"); err != nil { // its disk is lost, say
			t.Fatal(err)
		}
		home := "plzen"
		if _, err := w.Office("hq").Ops().ChangeUser(Ctx(), admin.UserChange{Address: "praha@" + Domain, Home: &home}); err != nil {
			t.Fatal(err)
		}
		took := w.Until("what waited for praha's user goes to plzen", 30*time.Second, func() bool {
			all, err := w.Office("hq").Ops().Queue(Ctx())
			return err == nil && len(all) == 0
		})
		if took > 2*time.Second {
			t.Errorf("it took %v", took)
		}
		w.Kill("hq") // it forgets what the names mean
		w.Start("hq")
		time.Sleep(10 * time.Second)
		w.noDNS.Store(false)
		w.Until("hq sees plzen", time.Minute, func() bool { return w.Office("hq").sees("plzen").State == serving })
	})
}

// Small packets get through, so each office sees the other all the time, and large
// ones do not, so no mail does. When the line is whole again nobody tells the queue.
func TestMailFlowsSoonAfterALineThatPassedSmallPacketsOnly(t *testing.T) {
	story(t, two, func(t *testing.T, w *World) {
		for i, d := range []time.Duration{20 * time.Second, 70 * time.Second, 4 * time.Minute, 9 * time.Minute} {
			w.Narrow(300, "hq").From("plzen")
			time.Sleep(time.Second)
			subject := fmt.Sprint("narrow ", i)
			w.mail("hq", "plzen", subject, 3)
			time.Sleep(d)
			if s := w.Office("hq").sees("plzen").State; s != serving {
				t.Fatalf("hq sees plzen as %s: this shows nothing", s)
			}
			w.Narrow(0, "hq").From("plzen")
			took := w.Until("its mail is there", 2*time.Minute, func() bool { return w.got("plzen", subject, 3) })
			if t.Log(d, took); took > 13*time.Second {
				t.Errorf("mail came %v after %v of a line that passed small packets only", took, d)
			}
		}
	})
}
