package simtest

import (
	"slices"
	"strings"
	"testing"
	"time"

	"posthouse/appliance/admin"
)

func (w *World) promote(t *testing.T, name string) admin.PromoteResult {
	t.Helper()
	o := w.Office(name)
	asked, err := o.Ops().Promote(Ctx(), admin.PromoteRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if asked.Done || len(asked.MayLose) == 0 {
		t.Errorf("promote does not ask first: %+v", asked)
	}
	r, err := o.Ops().Promote(Ctx(), admin.PromoteRequest{Confirm: true})
	if err != nil || !r.Done {
		t.Fatal(r, err)
	}
	return r
}

func (w *World) has(office, user string) bool {
	all, err := w.Office(office).Ops().Users(Ctx())
	return err == nil && slices.ContainsFunc(all, func(u admin.User) bool { return u.Address == user+"@"+Domain })
}

func TestTwoOfficesAreWorkedOnApartAndHeal(t *testing.T) {
	story(t, two, func(t *testing.T, w *World) {
		hq, plzen := w.Office("hq"), w.Office("plzen")
		w.Cut("hq").From("plzen")
		w.Until("plzen has no master", 30*time.Second, func() bool { return plzen.Status().Master == "" })
		if err := w.addUser("plzen", "too-early", "plzen"); err == nil {
			t.Error("plzen changed the domain state without a master")
		}
		if r := w.promote(t, "plzen"); r.Generation != 2 {
			t.Errorf("generation %d", r.Generation)
		}
		for _, u := range []string{"eva", "jan"} {
			if err := w.addUser("plzen", u, "plzen"); err != nil {
				t.Fatal(err)
			}
		}
		for _, u := range []string{"ota", "ivo", "jan"} { // jan is made on both sides
			if err := w.addUser("hq", u, "hq"); err != nil {
				t.Fatal(err)
			}
		}
		w.mail("hq", "hq", "apart", 2)
		w.mail("plzen", "plzen", "apart", 2)
		w.mail("hq", "plzen", "across", 2)
		w.Until("local mail", time.Second, func() bool { return w.got("hq", "apart", 2) && w.got("plzen", "apart", 2) })

		w.HealAll()
		took := w.Until("both copies are equal", time.Minute, func() bool {
			return w.Equal() && hq.Status().Generation == 2 && hq.Status().Master == plzen.Status().Master
		})
		t.Logf("equal after %v", took)
		if !w.has("hq", "eva") || w.has("hq", "ota") || w.has("plzen", "ivo") || !w.has("hq", "jan") {
			t.Error("the state is not that of the promoted lineage")
		}
		forked, err := hq.Ops().Forked(Ctx())
		if err != nil {
			t.Fatal(err)
		}
		var what []string
		for _, c := range forked {
			what = append(what, c.What)
		}
		for _, u := range []string{"ota", "ivo", "jan"} {
			if !strings.Contains(strings.Join(what, "\n"), u) {
				t.Errorf("%s is not among the forked commands %q", u, what)
			}
		}
		if hq.condition("mesh.forked") == "" {
			t.Error("the page does not say that changes do not hold any more")
		}
		w.works("after the heal")
		if !w.got("plzen", "across", 2) {
			t.Error("mail that waited has not arrived")
		}
		w.Kill(two...)
		w.Start(two...)
		w.works("after a restart of both")
	})
}

func TestThreeOfficesPromotedApartWaitForAPerson(t *testing.T) {
	story(t, three, func(t *testing.T, w *World) {
		praha := w.Office("praha")
		w.Kill("hq") // for good, as it seems
		w.Cut("plzen").From("praha")
		w.Until("no master anywhere", 30*time.Second, func() bool { return w.Office("plzen").Status().Master == "" && praha.Status().Master == "" })
		w.promote(t, "plzen")
		w.promote(t, "praha")
		if err := w.addUser("plzen", "eva", "plzen"); err != nil {
			t.Fatal(err)
		}
		if err := w.addUser("praha", "ota", "praha"); err != nil {
			t.Fatal(err)
		}
		w.HealAll()
		w.Until("both say that a person has to decide", time.Minute, func() bool {
			return w.Office("plzen").condition("mesh.rival") != "" && praha.condition("mesh.rival") != ""
		})
		w.Start("hq")
		time.Sleep(5 * time.Minute)
		for _, name := range []string{"plzen", "praha"} {
			if err := w.addUser(name, "both", name); err == nil {
				t.Errorf("%s still writes", name)
			}
			w.mail(name, name, "meanwhile", 2)
			w.Until("local mail", time.Second, func() bool { return w.got(name, "meanwhile", 2) })
		}
		w.mail("plzen", "praha", "between rivals", 2)
		w.Until("mail between the rivals", 5*time.Second, func() bool { return w.got("praha", "between rivals", 2) })
		w.promote(t, "praha")
		w.works("praha was decided for")
		if w.has("hq", "eva") || !w.has("plzen", "ota") {
			t.Error("the state is not that of praha")
		}
		if c, err := w.Office("plzen").Ops().Forked(Ctx()); err != nil || len(c) == 0 {
			t.Errorf("plzen lists no forked commands: %v, %v", c, err)
		}
	})
}

func TestAHalfWithQuorumGoesOnAndTheOtherIsPromoted(t *testing.T) {
	story(t, three, func(t *testing.T, w *World) {
		w.Cut("praha").FromAll()
		w.Until("praha has no master", 30*time.Second, func() bool { return w.Office("praha").Status().Master == "" })
		if err := w.addUser("plzen", "eva", "plzen"); err != nil {
			t.Fatal(err)
		}
		w.promote(t, "praha") // by somebody who did not know better
		if err := w.addUser("praha", "ota", "praha"); err != nil {
			t.Fatal(err)
		}
		w.HealAll()
		w.works("the promoted lineage wins")
		if !w.has("hq", "ota") || w.has("praha", "eva") {
			t.Error("the state is not that of the promoted side")
		}
	})
}
