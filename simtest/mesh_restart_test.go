package simtest

import (
	"errors"
	"testing"
	"time"

	"posthouse/appliance/admin"
)

func TestAnOfficeThatStartsAloneServesItsOwnPeople(t *testing.T) {
	story(t, three, func(t *testing.T, w *World) {
		w.mail("hq", "plzen", "before", 3)
		w.Until("mail before", 5*time.Second, func() bool { return w.got("plzen", "before", 3) })
		w.Kill(three...)
		plzen := w.Office("plzen")
		plzen.Start()
		took := w.Until("plzen is ready", 3*time.Second, func() bool { return len(plzen.Status().Members) == 3 })
		t.Logf("ready after %v", took)
		// The login, what was there, local mail, and mail for the others, at once.
		if !w.got("plzen", "before", 3) {
			t.Error("the old mail cannot be read")
		}
		w.mail("plzen", "plzen", "alone", 3)
		w.Until("local mail", time.Second, func() bool { return w.got("plzen", "alone", 3) })
		w.mail("plzen", "hq", "for later", 3)
		if s := plzen.Status(); s.Master != "" || plzen.condition("mesh.no-master") == "" {
			t.Errorf("master %q, %q", s.Master, plzen.condition("mesh.no-master"))
		}
		began := time.Now()
		if err := w.addUser("plzen", "nobody", "plzen"); err == nil {
			t.Error("the domain state was changed without quorum")
		} else if took := time.Since(began); took > 15*time.Second {
			t.Errorf("the refusal %q took %v", err, took)
		}
		time.Sleep(time.Hour)
		w.mail("plzen", "plzen", "an hour later", 3)
		w.Until("local mail an hour later", time.Second, func() bool { return w.got("plzen", "an hour later", 3) })
		w.Start("hq", "praha")
		w.works("all are back")
		if !w.got("hq", "for later", 3) {
			t.Error("what waited has not arrived")
		}
	})
}

// The pages stand before the store is open, which may take minutes.
func TestANodeThatStartsSaysSoToWhoAsksForItsQueue(t *testing.T) {
	founded(t, three, 3, func(t *testing.T, w *World) {
		w.Kill("hq")
		w.Start("hq")
		starting := 0
		w.Until("hq shows its queue", time.Minute, func() bool {
			p := w.Office("hq").process()
			if p == nil {
				return false
			}
			_, err := p.node.Queue(Ctx())
			_, late := p.node.QueueRelease(Ctx(), admin.QueueAction{From: "plzen"})
			for _, err := range []error{err, late} {
				if e := (*admin.Error)(nil); errors.As(err, &e) && e.Code == "node.starting" {
					starting++
				} else if err != nil {
					t.Fatal(err)
				}
			}
			return err == nil && late == nil
		})
		if starting == 0 {
			t.Error("hq was never seen starting")
		}
	})
}

func TestNodesRestartInAnyOrder(t *testing.T) {
	story(t, three, func(t *testing.T, w *World) {
		for _, order := range [][]string{{"hq", "plzen", "praha"}, {"praha", "plzen", "hq"}, {"plzen", "hq", "praha"}} {
			w.Kill(three...)
			for _, name := range order {
				w.Start(name)
				time.Sleep(20 * time.Second)
			}
			w.works("one after the other " + order[0])
		}
		for _, name := range three { // rolling, in good order
			w.Stop(name)
			w.Until("a master without "+name, 15*time.Second, func() bool {
				for _, o := range w.Offices {
					if o.Up() && (o.Status().Master == "" || o.Status().Master == name) {
						return false
					}
				}
				return true
			})
			w.Start(name)
			w.works("rolling " + name)
		}
		w.Kill(three...)
		w.Start(three...)
		w.works("all at once")
		w.Stop(three...)
		w.Start(three...)
		w.works("all at once after a stop")
		w.Kill("hq", "plzen")
		time.Sleep(time.Minute)
		w.mail("praha", "praha", "no quorum", 2)
		w.Until("local mail without quorum", time.Second, func() bool { return w.got("praha", "no quorum", 2) })
		w.Start("plzen", "hq")
		w.works("two of three")
	})
}

func TestTheLeadIsTakenBackByPriority(t *testing.T) {
	story(t, three, func(t *testing.T, w *World) {
		w.Until("hq leads", time.Minute, func() bool { return w.Office("plzen").Status().Master == "hq" })
		term := w.Office("plzen").Status().Term
		w.Kill("hq")
		w.Until("another leads", 15*time.Second, func() bool { m := w.Office("plzen").Status().Master; return m != "" && m != "hq" })
		w.Start("hq")
		took := w.Until("hq leads again", 60*time.Second, func() bool {
			return w.Office("plzen").Status().Master == "hq" && w.Office("praha").Status().Master == "hq" && w.Office("hq").Status().Master == "hq"
		})
		t.Logf("taken back after %v", took)
		if now := w.Office("plzen").Status().Term; now <= term {
			t.Errorf("term %d after %d", now, term)
		}
		w.works("after")
	})
}

func TestTheLeadIsHandedOverByRequest(t *testing.T) {
	story(t, three, func(t *testing.T, w *World) {
		// By priority hq would take it back; as equals it stays where it was put.
		for _, name := range []string{"plzen", "praha"} {
			p := 100
			if err := w.Office("hq").Ops().ChangeNode(Ctx(), admin.NodeChange{Name: name, Priority: &p}); err != nil {
				t.Fatal(err)
			}
		}
		for _, name := range []string{"praha", "plzen", "hq"} {
			if err := w.Office("plzen").Ops().Transfer(Ctx(), name); err != nil {
				t.Fatal(err)
			}
			w.Until(name+" leads", 5*time.Second, func() bool { return w.Office("plzen").Status().Master == name })
			time.Sleep(time.Minute)
			if m := w.Office("praha").Status().Master; m != name {
				t.Errorf("a minute later %s leads, not %s", m, name)
			}
		}
	})
}

func TestVotesAndGatewaysAreSwitched(t *testing.T) {
	story(t, []string{"hq", "plzen", "praha", "brno"}, func(t *testing.T, w *World) {
		hq := w.Office("hq")
		roles := func() (votes int, voters map[string]bool) {
			voters = map[string]bool{}
			for _, m := range hq.Status().Members {
				if m.Role != "member" {
					votes++
					voters[m.Name] = true
				}
			}
			return
		}
		no, yes := false, true
		var out string
		_, before := roles()
		for _, name := range []string{"plzen", "praha", "brno"} {
			if before[name] {
				out = name
			}
		}
		if err := hq.Ops().ChangeNode(Ctx(), admin.NodeChange{Name: out, Voter: &no}); err != nil {
			t.Fatal(err)
		}
		w.Until(out+" votes no more", time.Minute, func() bool { n, v := roles(); return n == 3 && !v[out] })
		if err := hq.Ops().ChangeNode(Ctx(), admin.NodeChange{Name: out, Voter: &yes}); err != nil {
			t.Fatal(err)
		}
		// Outside mail leaves by the gateways, the one of the highest priority first.
		w.Until("hq alone is a gateway", time.Minute, func() bool { return hq.sees("hq").Gateway && !hq.sees("plzen").Gateway })
		if err := w.Office("praha").Ops().ChangeNode(Ctx(), admin.NodeChange{Name: "plzen", Gateway: &yes}); err != nil {
			t.Fatal(err)
		}
		w.Until("plzen is one too", 5*time.Second, func() bool { return w.Office("brno").sees("plzen").Gateway })
		if err := w.Office("praha").Ops().ChangeNode(Ctx(), admin.NodeChange{Name: "hq", Gateway: &no}); err != nil {
			t.Fatal(err)
		}
		w.Until("hq is none any more", 5*time.Second, func() bool { return !w.Office("brno").sees("hq").Gateway })
		w.works("after")
	})
}

// While an office was away a node joined and took the lead. The office has never
// heard of it, and what it would have to hear comes from the lead alone. It believes
// most of those that vote that this is a member, not one.
func TestAnOfficeComesBackToAMasterThatItHasNeverHeardOf(t *testing.T) {
	story(t, []string{"hq", "plzen", "praha", "brno"}, func(t *testing.T, w *World) {
		no := false
		if err := w.Office("hq").Ops().ChangeNode(Ctx(), admin.NodeChange{Name: "brno", Voter: &no}); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute) // the three others vote
		w.Stop("brno")
		w.LoseDisk("hq")
		if err := w.Replace("hq", 2*time.Minute); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute)
		if err := w.Office("plzen").Ops().Transfer(Ctx(), "hq"); err != nil {
			t.Fatal(err)
		}
		w.Until("the new node leads", time.Minute, func() bool { return w.Office("plzen").Status().Master == "hq" })
		if err := w.addUser("plzen", "late", "plzen"); err != nil {
			t.Fatal(err)
		}
		time.Sleep(20 * time.Second) // the last master has long fallen silent
		w.Cut("brno").From("praha")
		w.Start("brno")
		time.Sleep(30 * time.Second)
		if w.has("brno", "late") {
			t.Error("one node's word let a stranger in")
		}
		w.HealAll()
		w.Until("brno has heard of it, and of the user", time.Minute, func() bool { return w.has("brno", "late") && w.Office("brno").Status().Master == "hq" })
		w.works("after all")
	})
}
