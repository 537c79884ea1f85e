package simtest

import (
	"testing"
	"time"

	"posthouse/appliance/admin"
)

// revoked checks that a node is out, though it goes on running and talking.
func (w *World) revoked(t *testing.T, name string) {
	t.Helper()
	out := w.Office(name)
	gone := func() bool {
		for _, o := range w.Offices {
			if o != out && o.sees(name).Name != "" {
				return false
			}
		}
		return true
	}
	if took := w.Until("nobody lists "+name, 10*time.Second, gone); took > 2*time.Second {
		t.Errorf("%s was listed for %v", name, took)
	}
	before := out.Status().StateHash
	if err := w.addUser(w.rest(name)[0], "secret-of-"+name, w.rest(name)[0]); err != nil {
		t.Fatal(err)
	}
	time.Sleep(time.Minute) // for so long a way is shown after its last use
	for range 30 {
		time.Sleep(10 * time.Second)
		if !gone() {
			t.Fatalf("%s is listed again", name)
		}
		for _, m := range out.Status().Members {
			if m.Path == "direct" || m.Path != "none" && m.Path != "self" {
				t.Fatalf("%s still talks to %s: %s", name, m.Name, m.Path)
			}
		}
	}
	if out.Status().StateHash != before {
		t.Errorf("%s got domain state after it was revoked", name)
	}
	for _, other := range w.rest(name) {
		if m := w.Office(other).Status().Master; m == "" || m == name {
			t.Errorf("%s says that %q leads", other, m)
		}
	}
}

// rest are the other offices' names.
func (w *World) rest(name string) (out []string) {
	for _, o := range w.Offices {
		if o.Name != name {
			out = append(out, o.Name)
		}
	}
	return out
}

func TestARevokedMemberThatGoesOnRunningIsOut(t *testing.T) {
	story(t, []string{"hq", "plzen", "praha", "brno"}, func(t *testing.T, w *World) {
		who := ""
		for _, m := range w.Office("hq").Status().Members {
			if m.Role == "member" {
				who = m.Name
			}
		}
		w.mail("hq", who, "before", 2)
		w.Until("mail before", 5*time.Second, func() bool { return w.got(who, "before", 2) })
		if err := w.Office("hq").Ops().RevokeNode(Ctx(), who); err != nil {
			t.Fatal(err)
		}
		w.revoked(t, who)
		// Mail for its people is taken and waits, visibly.
		w.mail("hq", who, "after", 3)
		time.Sleep(time.Minute)
		if w.got(who, "after", 0); w.Office("hq").Status().QueueHeld != 3 {
			t.Errorf("hq shows %d held", w.Office("hq").Status().QueueHeld)
		}
		if text := w.Office("hq").condition("home.revoked"); text == "" {
			t.Error("nothing says that mail waits for a revoked node's people")
		}
		// What it sends goes nowhere.
		w.mail(who, "hq", "from outside the mesh", 1)
		time.Sleep(5 * time.Minute)
		w.got("hq", "from outside the mesh", 0)
	})
}

func TestARevokedVoterThatGoesOnRunningIsOut(t *testing.T) {
	story(t, three, func(t *testing.T, w *World) {
		// Asked for at a node that does not lead.
		if err := w.Office("plzen").Ops().RevokeNode(Ctx(), "praha"); err != nil {
			t.Fatal(err)
		}
		w.revoked(t, "praha")
		w.Kill("praha")
		w.Start("praha")
		w.revoked2(t, "praha")
	})
}

// revoked2: a restart changes nothing.
func (w *World) revoked2(t *testing.T, name string) {
	t.Helper()
	time.Sleep(5 * time.Minute)
	for _, other := range w.rest(name) {
		if w.Office(other).sees(name).Name != "" {
			t.Errorf("%s lists %s", other, name)
		}
	}
	if c := w.Office(name).condition("node.revoked"); c == "" {
		t.Errorf("%s does not say that it was put out: %+v", name, w.Office(name).Status().Conditions)
	}
}

func TestTheMasterIsRevokedFromAnotherNode(t *testing.T) {
	story(t, three, func(t *testing.T, w *World) {
		if err := w.Office("hq").Ops().RevokeNode(Ctx(), "hq"); err == nil {
			t.Error("the master revoked itself")
		}
		if err := w.Office("plzen").Ops().RevokeNode(Ctx(), "hq"); err != nil {
			t.Fatal(err)
		}
		w.revoked(t, "hq")
	})
}

func TestAStolenVoterIsRevokedAndABurntOneForgottenWithoutQuorum(t *testing.T) {
	story(t, three, func(t *testing.T, w *World) {
		w.Kill("praha")
		w.Cut("hq").FromAll()
		w.Until("plzen has no master", 30*time.Second, func() bool { return w.Office("plzen").Status().Master == "" })
		r, err := w.Office("plzen").Ops().Promote(Ctx(), admin.PromoteRequest{Confirm: true, Revoke: []string{"hq"}, Forget: []string{"praha"}})
		if err != nil || !r.Done {
			t.Fatal(r, err)
		}
		w.HealAll()
		time.Sleep(time.Minute)
		if s := w.Office("plzen").Status(); s.Master != "plzen" || len(s.Members) != 1 {
			t.Errorf("%q leads %d members", s.Master, len(s.Members))
		}
		if err := w.addUser("plzen", "eva", "plzen"); err != nil {
			t.Error(err)
		}
		before := w.Office("hq").Status().Generation
		time.Sleep(5 * time.Minute)
		if s := w.Office("hq").Status(); s.Generation != before {
			t.Errorf("the revoked node follows: generation %d", s.Generation)
		}
	})
}

func TestAStolenMasterIsRevokedWithoutQuorum(t *testing.T) {
	story(t, two, func(t *testing.T, w *World) {
		w.Cut("hq").From("plzen") // the thief has it
		w.Until("plzen has no master", 30*time.Second, func() bool { return w.Office("plzen").Status().Master == "" })
		r, err := w.Office("plzen").Ops().Promote(Ctx(), admin.PromoteRequest{Confirm: true, Revoke: []string{"hq"}})
		if err != nil || !r.Done {
			t.Fatal(r, err)
		}
		w.HealAll()
		w.revoked(t, "hq")
	})
}
