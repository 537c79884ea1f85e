package simtest

import (
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"posthouse/appliance/admin"
)

// founded runs a story in which only the first offices have joined; the others
// are started and fresh.
func founded(t *testing.T, offices []string, joined int, f func(t *testing.T, w *World)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		w := NewWorld(t, offices...)
		defer w.Close()
		all := w.Offices
		w.Offices = all[:joined]
		w.Found()
		w.Offices = all
		for _, o := range all[joined:] {
			o.Start()
			w.Until(o.Name+" has started", time.Minute, func() bool { return o.Status().State == "fresh" && len(o.Status().Conditions) > 0 })
		}
		f(t, w)
	})
}

func (w *World) door(name string) string {
	return netip.AddrPortFrom(w.Office(name).Addr, 44337).String()
}

func (w *World) join(t *testing.T, name string, r admin.JoinRequest) {
	t.Helper()
	if err := w.Office(name).Ops().Join(Ctx(), r); err != nil {
		t.Fatal(err)
	}
}

// userAt gives a new office its user, as Found does.
func (w *World) userAt(t *testing.T, name string) {
	t.Helper()
	if err := w.addUser(name, name, name); err != nil {
		t.Fatal(err)
	}
}

func TestTheDoorWithAName(t *testing.T) {
	founded(t, three, 2, func(t *testing.T, w *World) {
		w.join(t, "praha", admin.JoinRequest{Target: "plzen." + Domain}) // its host, which DNS knows
		var p []admin.Pending
		w.Until("the application is shown", time.Minute, func() bool {
			p, _ = w.Office("hq").Ops().PendingNodes(Ctx())
			return len(p) == 1
		})
		said := strings.Join(w.Office("praha").Status().JoinProgress, "\n")
		if !strings.Contains(said, p[0].Code) {
			t.Errorf("praha does not show the code %s:\n%s", p[0].Code, said)
		}
		time.Sleep(2 * time.Minute) // people take their time
		w.Kill("praha")             // and lose their power meanwhile
		w.Start("praha")
		if err := w.Office("hq").Ops().Approve(Ctx(), p[0].ID); err != nil {
			t.Fatal(err)
		}
		w.Until("praha serves", time.Minute, w.whole)
		w.userAt(t, "praha")
		w.works("after the approval")
		w.Kill("praha")
		w.Start("praha")
		w.works("after a restart")
	})
}

func TestTheDoorWithAnApplicationThatIsTurnedAway(t *testing.T) {
	founded(t, three, 2, func(t *testing.T, w *World) {
		w.join(t, "praha", admin.JoinRequest{Target: w.door("hq")})
		var p []admin.Pending
		w.Until("the application is shown", time.Minute, func() bool {
			p, _ = w.Office("hq").Ops().PendingNodes(Ctx())
			return len(p) == 1
		})
		if err := w.Office("hq").Ops().Refuse(Ctx(), p[0].ID); err != nil {
			t.Fatal(err)
		}
		w.Until("praha says so", 2*time.Minute, func() bool { return strings.Contains(w.Office("praha").Status().Health.Sentence, "turned") })
	})
}

func TestTheDoorWithAnAdminsPassword(t *testing.T) {
	founded(t, three, 2, func(t *testing.T, w *World) {
		w.join(t, "praha", admin.JoinRequest{Target: w.door("plzen"), Admin: "admin@" + Domain, Password: "wrong"})
		w.Until("praha says that the password is wrong", time.Minute, func() bool {
			return strings.Contains(strings.ToLower(w.Office("praha").Status().Health.Sentence), "password")
		})
		w.join(t, "praha", admin.JoinRequest{Target: w.door("plzen"), Admin: "admin@" + Domain, Password: "secret"})
		w.Until("praha serves", time.Minute, w.whole)
		w.userAt(t, "praha")
		w.works("after the join")
	})
}

func TestATokenWorksOnceAndAWrongOneIsNamed(t *testing.T) {
	founded(t, []string{"hq", "plzen", "praha", "brno"}, 2, func(t *testing.T, w *World) {
		token, err := w.Office("plzen").Ops().CreateToken(Ctx(), admin.TokenRequest{})
		if err != nil {
			t.Fatal(err)
		}
		w.join(t, "praha", admin.JoinRequest{Target: token.Secret, At: w.door("hq")})
		w.Until("praha serves", time.Minute, func() bool { return w.Office("praha").Status().State == serving })
		w.join(t, "brno", admin.JoinRequest{Target: token.Secret, At: w.door("hq")})
		w.Until("brno says that the token was used", time.Minute, func() bool { return strings.Contains(w.Office("brno").Status().Health.Sentence, "used by praha") })
		fresh, err := w.Office("plzen").Ops().CreateToken(Ctx(), admin.TokenRequest{})
		if err != nil {
			t.Fatal(err)
		}
		w.join(t, "brno", admin.JoinRequest{Target: fresh.Secret, At: w.door("hq")})
		w.Until("brno serves", time.Minute, w.whole)
	})
}

// The domain state of a node that joins grows command by command, and the first
// ones know the founder alone: the others stay its peers all the same.
func TestANodeThatJoinsKeepsItsLinesWhileItsStateGrows(t *testing.T) {
	founded(t, officeNames[:5], 4, func(t *testing.T, w *World) {
		began := time.Now()
		token, err := w.Office("plzen").Ops().CreateToken(Ctx(), admin.TokenRequest{})
		if err != nil {
			t.Fatal(err)
		}
		joiner := officeNames[4]
		w.join(t, joiner, admin.JoinRequest{Target: token.Secret, At: w.door("hq")})
		w.Until(joiner+" serves", time.Minute, w.whole)
		up := 0
		for _, l := range w.Office(joiner).logs.since(began, 1000) {
			switch {
			case strings.Contains(l.text, "peer up"):
				up++
			case strings.Contains(l.text, "peer removed"), strings.Contains(l.text, "peer down"):
				t.Errorf("%v after the join began: %s", l.at.Sub(began), l.text)
			}
		}
		if up < 4 {
			t.Errorf("%s came to have %d of 4 lines", joiner, up)
		}
	})
}

func TestATokenThatTheDoorHasNotHeardOfWaitsForAMaster(t *testing.T) {
	founded(t, three, 2, func(t *testing.T, w *World) {
		w.Cut("hq").From("plzen")
		token, err := w.Office("hq").Ops().CreateToken(Ctx(), admin.TokenRequest{})
		if err != nil {
			t.Fatal(err)
		}
		w.Kill("hq") // the only one that knows the token
		w.Heal("hq").From("plzen")
		w.join(t, "praha", admin.JoinRequest{Target: token.Secret, At: w.door("plzen")})
		w.Until("praha says that nobody can admit it", time.Minute, func() bool {
			return w.Office("praha").condition("join.no-master") != ""
		})
		w.Start("hq")
		w.Until("praha serves", time.Minute, w.whole)
	})
}

func TestAJoinWhileNobodyCanAdmit(t *testing.T) {
	founded(t, []string{"hq", "plzen", "praha", "brno"}, 3, func(t *testing.T, w *World) {
		token, err := w.Office("plzen").Ops().CreateToken(Ctx(), admin.TokenRequest{})
		if err != nil {
			t.Fatal(err)
		}
		w.Kill("hq", "plzen")
		w.Until("no master", 30*time.Second, func() bool { return w.Office("praha").Status().Master == "" })
		w.join(t, "brno", admin.JoinRequest{Target: token.Secret, At: w.door("praha")})
		w.Until("brno says why", time.Minute, func() bool { return w.Office("brno").condition("join.no-master") != "" })
		t.Log(w.Office("brno").condition("join.no-master"))
		time.Sleep(30 * time.Minute)
		w.Kill("brno")
		w.Start("brno") // and it goes on trying after a restart
		time.Sleep(5 * time.Minute)
		w.Start("hq", "plzen")
		took := w.Until("brno serves", 2*time.Minute, w.whole)
		t.Logf("admitted %v after the quorum came back", took)
		w.userAt(t, "brno")
		w.works("after the join")
	})
}

func TestAJoinDuringASplit(t *testing.T) {
	founded(t, []string{"hq", "plzen", "praha", "brno"}, 3, func(t *testing.T, w *World) {
		token, err := w.Office("hq").Ops().CreateToken(Ctx(), admin.TokenRequest{})
		if err != nil {
			t.Fatal(err)
		}
		w.Cut("praha").FromAll()
		w.Until("hq sees that praha is cut off", time.Minute, func() bool { return w.Office("hq").sees("praha").State == unreachable })
		w.join(t, "brno", admin.JoinRequest{Target: token.Secret, At: w.door("plzen")})
		w.Until("brno serves", time.Minute, func() bool { return w.has("brno", "hq") && w.Office("brno").Status().Master != "" })
		w.userAt(t, "brno")
		w.mail("praha", "praha", "in the split", 2)
		w.HealAll()
		w.works("after the heal")
	})
}

// The new node reaches one member only, which is cut off from the master but
// not from everybody: that one must learn of the admission in some way.
func TestAJoinThroughAMemberThatReachesTheMasterThroughAnother(t *testing.T) {
	founded(t, []string{"hq", "plzen", "praha", "brno"}, 3, func(t *testing.T, w *World) {
		token, err := w.Office("hq").Ops().CreateToken(Ctx(), admin.TokenRequest{})
		if err != nil {
			t.Fatal(err)
		}
		w.Until("hq leads", time.Minute, func() bool { return w.Office("hq").Status().Master == "hq" })
		w.Cut("hq").From("praha", "brno")
		time.Sleep(30 * time.Second)
		w.join(t, "brno", admin.JoinRequest{Target: token.Secret, At: w.door("praha")})
		w.Until("brno serves", time.Minute, func() bool { return w.has("brno", "hq") && w.Office("brno").Status().Master != "" })
		w.userAt(t, "brno")
		w.mail("brno", "hq", "around", 2)
		w.Until("mail goes around", 15*time.Second, func() bool { return w.got("hq", "around", 2) })
		w.HealAll()
		w.works("after the heal")
	})
}

func TestANodeComesBackAtAnotherAddress(t *testing.T) {
	story(t, three, func(t *testing.T, w *World) {
		w.Stop("plzen")
		w.moves("plzen", 77)
		w.Start("plzen")
		w.works("plzen has moved")
		w.Kill(three...)
		w.Start(three...)
		w.works("all restart after that")
		// Two swap their addresses.
		w.Stop("plzen", "praha")
		w.moves("plzen", 3)
		w.moves("praha", 77)
		w.Start("plzen", "praha")
		w.works("they have swapped")
	})
}

// Mail reaches a node before it has heard of any office, its own included. It is
// not put off for the time that a deferral takes, however long the line.
func TestMailThatComesInTheMomentOfAJoinIsThereAtOnce(t *testing.T) {
	for _, far := range []time.Duration{60 * time.Millisecond, 150 * time.Millisecond, 300 * time.Millisecond} {
		t.Run(far.String(), func(t *testing.T) { joinAsMailComes(t, far) })
	}
}

func joinAsMailComes(t *testing.T, far time.Duration) {
	founded(t, three, 2, func(t *testing.T, w *World) {
		hq := w.Office("hq")
		token, err := hq.Ops().CreateToken(Ctx(), admin.TokenRequest{})
		if err != nil {
			t.Fatal(err)
		}
		w.Slow(far, "praha").FromAll() // so Raft, which needs more round trips, comes behind the mail
		w.join(t, "praha", admin.JoinRequest{Target: token.Secret, At: w.door("hq")})
		w.Until("hq has admitted it", time.Minute, func() bool { return hq.sees("praha").Name != "" })
		if err := w.addUser("hq", "praha", "praha"); err != nil {
			t.Fatal(err)
		}
		w.mail("hq", "praha", "welcome", 3)
		if w.has("praha", "hq") {
			t.Fatal("praha knows the offices already: this shows nothing")
		}
		w.Until("praha knows the offices", time.Minute, func() bool { return w.has("praha", "praha") })
		took := w.Until("its mail is there", time.Minute, func() bool { return w.got("praha", "welcome", 3) })
		if took > 5*time.Second {
			t.Errorf("mail was there only %v after it knew the offices", took)
		}
		t.Log(took)
	})
}

// A home that hears of its new user late, as its line to the master is too slow for
// the election, says so when it has: mail that it turned away does not wait for the
// end of its minute.
func TestAHomeThatHearsLateOfItsUserGetsHisMailThen(t *testing.T) {
	story(t, three, func(t *testing.T, w *World) {
		w.Slow(4*time.Second, "hq").From("praha")
		time.Sleep(5 * time.Second)
		if err := w.addUser("hq", "new", "praha"); err != nil {
			t.Fatal(err)
		}
		w.Until("plzen knows the user", time.Minute, func() bool { return w.has("plzen", "new") })
		w.mail("plzen", "new", "welcome", 3)
		time.Sleep(10 * time.Second)
		if w.has("praha", "new") {
			t.Fatal("praha knows the user already: this shows nothing")
		}
		w.Slow(0, "hq").From("praha")
		knew := w.Until("praha knows the user", 40*time.Second, func() bool { return w.has("praha", "new") })
		took := w.Until("nothing waits", time.Minute, func() bool { return waiting(w.Office("plzen").Status()) == 0 })
		if took > 4*time.Second {
			t.Errorf("his mail was there only %v after praha knew the user", took)
		}
		t.Log(knew, took)
	})
}
