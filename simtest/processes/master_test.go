package processes

import (
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"posthouse/appliance/admin"
)

func TestTheMasterIsKilledAndReplacedAndTakesTheLeadBack(t *testing.T) {
	t.Parallel()
	m := Up(t, three...)
	hq := m.Adopt("hq")
	hq.Ready(5 * time.Second)
	var before uint64
	m.WaitFor("hq leads", 60*time.Second, func() bool {
		s, err := m.Status("hq") // at the others an old belief may still stand
		before = s.Term
		return err == nil && s.Master == "hq"
	})
	m.agree(10*time.Second, three...)
	m.noGateway("plzen")
	n := Count(20, 100)
	old, anew := m.NewTraffic(), m.NewTraffic()

	// The outside world does not answer: what leaves waits at the master.
	outside := m.State().Outside.Pid
	syscall.Kill(outside, syscall.SIGSTOP)
	defer syscall.Kill(outside, syscall.SIGCONT)
	old.runAll(t.Context(), n, m.person("hq", 0, []string{"hq"}, Friend), m.person("plzen", 0, []string{"plzen"}, Friend), outsider("in0", []string{"hq"}, m.User("praha", 0).Address))
	var held [2]int
	for end := time.Now().Add(10 * time.Second); held != [2]int{2 * n, 0} && time.Now().Before(end); <-time.After(20 * time.Millisecond) {
		for i, o := range []string{"hq", "plzen"} {
			if s, err := m.Status(o); err == nil {
				held[i] = s.QueueOutside
			}
		}
	}
	t.Logf("of %d messages for the outside %d wait at the master, %d at plzen", 2*n, held[0], held[1])
	if held[0] != 2*n {
		q, _ := m.Command("queue", "list", "--socket", m.Node("plzen").Socket)
		t.Errorf("plzen's queue:\n%s", q[:min(len(q), 2000)])
	}
	hq.Kill()
	killed := time.Now()
	syscall.Kill(outside, syscall.SIGCONT)

	var master string
	var term uint64
	for {
		if master, term = m.agree(30*time.Second, "plzen", "praha"); master != "hq" {
			break
		}
		<-time.After(50 * time.Millisecond)
	}
	took := time.Since(killed)
	if took > 15*time.Second || term <= before {
		t.Errorf("%s leads after %v in term %d, before %d", master, took, term, before)
	}
	t.Logf("%s leads %v after the kill, term %d after %d", master, took.Round(time.Millisecond), term, before)

	anew.runAll(t.Context(), n, outsider("in1", []string{master}, m.User("plzen", 0).Address, m.User("praha", 1).Address),
		m.person("praha", 0, []string{"praha"}, Friend), m.person("plzen", 1, []string{"plzen"}, Friend, m.User("praha", 2).Address))
	later := anew.Settle(10*time.Second, 0)
	t.Logf("mail from outside and to the outside since then was there after %v", later.Round(time.Millisecond))
	if v := old.Compare(Friend, m.OutsideMail()); len(v.Missing) == 0 {
		t.Error("what the dead master had answered for has left without it")
	}
	s, err := m.Status(master)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%s says: %s", master, s.Health.Sentence)

	hq.Exec()
	start := hq.Ready(3 * time.Second)
	returned := time.Now()
	there := old.Settle(10*time.Second, 0)
	m.WaitFor("hq leads again", 60*time.Second, func() bool {
		s, err := m.Status("plzen")
		return err == nil && s.Master == "hq" && s.Term > term
	})
	_, after := m.agree(10*time.Second, three...)
	if after <= term {
		t.Errorf("term %d after %d", after, term)
	}
	t.Logf("hq served after %v; its mail was there %v later; it led again %v after it served, term %d", start.Round(time.Millisecond), there.Round(time.Millisecond), (time.Since(returned)).Round(time.Millisecond), after)
	anew.Settle(5*time.Second, 0)
}

func TestSIGTERMUnderLoadEndsCleanlyAndTheNextStartIsQuick(t *testing.T) {
	t.Parallel()
	m := Up(t, three...)
	plzen := m.Adopt("plzen")
	plzen.Ready(5 * time.Second)
	m.agree(30*time.Second, three...)
	tr := m.NewTraffic()
	all := m.everybody()
	ctx, cancel := context.WithCancel(t.Context())
	var load sync.WaitGroup
	for i := range 6 {
		load.Go(func() {
			s := m.person(three[i%3], i/3, from(three, i), from(all, i)...)
			s.Pause = 2 * time.Millisecond
			tr.Run(ctx, s, 1<<30)
		})
	}
	load.Go(func() {
		s := outsider("out", []string{"plzen"}, all[:len(all)-1]...)
		s.Pause = 2 * time.Millisecond
		tr.Run(ctx, s, 1<<30)
	})
	for range Count(2, 6) {
		<-time.After(time.Duration(500+rand.IntN(1000)) * time.Millisecond)
		began := time.Now()
		plzen.Signal(syscall.SIGTERM)
		code := plzen.Ended(25 * time.Second)
		stop := time.Since(began)
		plzen.Exec()
		start := plzen.Ready(3 * time.Second)
		t.Logf("ended with code %d after %v; the next one served %v after its exec", code, stop.Round(time.Millisecond), start.Round(time.Millisecond))
		if code != 0 {
			t.Errorf("exit code %d", code)
		}
	}
	cancel()
	load.Wait()
	took := tr.Settle(30*time.Second, 0)
	t.Logf("%v; all was there after %v", tr, took.Round(time.Millisecond))

	// A few thousand messages on disk: the node is up as fast.
	var fill sync.WaitGroup
	for i := range 8 {
		fill.Go(func() {
			s := m.person("plzen", i%3, []string{"plzen"}, m.User("plzen", i%3).Address)
			s.Name = fmt.Sprintf("fill%d", i)
			tr.Run(t.Context(), s, Count(3000, 20000)/8)
		})
	}
	fill.Wait()
	for _, how := range []syscall.Signal{syscall.SIGKILL, syscall.SIGTERM} {
		plzen.Signal(how)
		plzen.Ended(25 * time.Second)
		plzen.Exec()
		start := plzen.Ready(5 * time.Second)
		t.Logf("with %d messages sent it served %v after its exec, after %v", tr.Acked(), start.Round(time.Millisecond), how)
		if start > time.Second {
			t.Errorf("a start took %v", start)
		}
	}
	tr.Settle(30*time.Second, 0)
}

// noGateway makes an office send its outside mail through another one.
func (m *Mesh) noGateway(office string) {
	m.tb.Helper()
	no := false
	if err := m.API("hq").ChangeNode(context.Background(), admin.NodeChange{Name: office, Gateway: &no}); err != nil {
		m.tb.Fatal(err)
	}
	m.WaitFor("it is no gateway", 10*time.Second, func() bool {
		s, err := m.Status(office)
		return err == nil && slices.ContainsFunc(s.Members, func(x admin.Member) bool { return x.Name == office && !x.Gateway })
	})
}

func (m *Mesh) newUser(office, local string) error {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	password, name := "secret-"+local, local
	_, err := m.API(office).CreateUser(ctx, admin.UserChange{Address: local + "@company.test", Name: &name, Home: &office, Password: &password})
	return err
}

func TestTwoOfficesArePromotedApartAndHeal(t *testing.T) {
	t.Parallel()
	m := Up(t, "hq", "plzen")
	hq, plzen := m.Adopt("hq"), m.Adopt("plzen")
	hq.Ready(5 * time.Second)
	plzen.Ready(5 * time.Second)
	m.agree(30*time.Second, "hq", "plzen")
	tr := m.NewTraffic()

	// hq works on while plzen hears nothing, then plzen alone.
	plzen.Kill()
	m.WaitFor("hq leads alone", 30*time.Second, func() bool {
		s, err := m.Status("hq")
		return err == nil && s.Master == "hq"
	})
	if err := m.newUser("hq", "only-hq"); err != nil {
		t.Fatalf("the founder alone cannot make a user: %v", err)
	}
	tr.runAll(t.Context(), 10, m.person("hq", 0, []string{"hq"}, m.User("hq", 1).Address, m.User("plzen", 0).Address))
	hq.Kill()
	plzen.Exec()
	plzen.Ready(3 * time.Second)
	// plzen is alone, and takes over by hand.
	m.WaitFor("plzen knows no master", 30*time.Second, func() bool {
		s, err := m.Status("plzen")
		return err == nil && s.Master == ""
	})
	if err := m.newUser("plzen", "too-early"); err == nil {
		t.Error("a user was made without a master")
	} else {
		t.Logf("without a master: %v", err)
	}
	out, err := m.Command("mesh", "promote", "--socket", m.Node("plzen").Socket)
	t.Logf("promote without --yes: %v\n%s", err, out)
	out, err = m.Command("mesh", "promote", "--yes", "--socket", m.Node("plzen").Socket)
	if err != nil {
		t.Fatalf("promote: %v\n%s", err, out)
	}
	t.Logf("promote --yes:\n%s", out)
	if err := m.newUser("plzen", "only-plzen"); err != nil {
		t.Fatalf("the promoted office cannot make a user: %v", err)
	}
	tr.runAll(t.Context(), 10, m.person("plzen", 0, []string{"plzen"}, m.User("plzen", 1).Address, m.User("hq", 0).Address),
		outsider("out", []string{"plzen"}, m.User("plzen", 2).Address))
	s, err := m.Status("plzen")
	if err != nil || s.Master != "plzen" || s.Generation != 2 {
		t.Fatalf("after the promote: %+v, %v", s, err)
	}

	// It heals.
	hq.Exec()
	hq.Ready(3 * time.Second)
	var a, b admin.Status
	took := m.WaitFor("both have the same state", 30*time.Second, func() bool {
		var e1, e2 error
		a, e1 = m.Status("hq")
		b, e2 = m.Status("plzen")
		return e1 == nil && e2 == nil && a.StateHash == b.StateHash && a.AppliedIndex == b.AppliedIndex && a.Generation == 2 && b.Generation == 2 && a.Master == b.Master && a.Master != ""
	})
	t.Logf("one lineage %v after hq served: master %s, generation %d, term %d, state %s at %d", took.Round(time.Millisecond), a.Master, a.Generation, a.Term, a.StateHash, a.AppliedIndex)
	out, err = m.Command("mesh", "forked", "--json", "--socket", m.Node("hq").Socket)
	if err != nil {
		t.Fatal(err, out)
	}
	var forked []admin.ForkedCommand
	if err := json.Unmarshal([]byte(out), &forked); err != nil {
		t.Fatal(err)
	}
	if len(forked) == 0 || !slices.ContainsFunc(forked, func(c admin.ForkedCommand) bool { return strings.Contains(c.What, "only-hq") }) {
		t.Errorf("the other side's user is not listed: %s", out)
	}
	t.Logf("forked: %s", out)
	for _, o := range []string{"hq", "plzen"} {
		users, err := m.API(o).Users(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		var names []string
		for _, u := range users {
			names = append(names, u.Address)
		}
		if slices.Contains(names, "only-hq@company.test") || !slices.Contains(names, "only-plzen@company.test") {
			t.Errorf("%s has %v", o, names)
		}
	}
	settled := tr.Settle(15*time.Second, 0)
	t.Logf("mail of both sides: %v, all there after %v", tr, settled.Round(time.Millisecond))
	t.Logf("hq says: %s", a.Health.Sentence)
	// And it goes on together.
	if err := m.newUser("hq", "together"); err != nil {
		t.Error(err)
	}
	tr.runAll(t.Context(), 5, m.person("hq", 1, []string{"hq"}, m.User("plzen", 0).Address, Friend), m.person("plzen", 1, []string{"plzen"}, m.User("hq", 0).Address, Friend))
	tr.Settle(15*time.Second, 0)
	hq.Kill()
	hq.Exec()
	hq.Ready(3 * time.Second)
	m.WaitFor("the same state after a restart", 30*time.Second, func() bool {
		a, e1 := m.Status("hq")
		b, e2 := m.Status("plzen")
		return e1 == nil && e2 == nil && a.StateHash == b.StateHash && a.Generation == 2
	})
}
