package processes

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"syscall"
	"testing"
	"time"

	"posthouse/appliance/demo"
)

var three = []string{"hq", "plzen", "praha"}

// outsider is a source of mail from outside.
func outsider(name string, offices []string, to ...string) Source {
	return Source{Name: name, User: demo.User{Address: name + "@example.net"}, Offices: offices, To: to}
}

// person is the k-th person of an office as a source of mail.
func (m *Mesh) person(office string, k int, offices []string, to ...string) Source {
	u := m.User(office, k)
	return Source{Name: fmt.Sprintf("%s%d", office, k), User: u, Offices: offices, To: to}
}

// everybody returns the addresses of all people but the admin, and the outside.
func (m *Mesh) everybody() (out []string) {
	for _, u := range m.State().Users {
		out = append(out, u.Address)
	}
	return append(out, Friend)
}

// from turns a list so that it begins at i.
func from(list []string, i int) []string {
	i %= len(list)
	return append(append([]string(nil), list[i:]...), list[:i]...)
}

// runAll sends share messages of each source and waits.
func (t *Traffic) runAll(ctx context.Context, share int, sources ...Source) {
	t.m.tb.Helper()
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	want := t.Acked() + share*len(sources)
	var wg sync.WaitGroup
	for _, s := range sources {
		wg.Go(func() { t.Run(ctx, s, share) })
	}
	wg.Wait()
	if ctx.Err() == context.DeadlineExceeded {
		t.m.tb.Errorf("after a minute %d of %d messages were taken: %v", t.Acked(), want, t)
	}
}

// agree waits until these offices name one master and one term.
func (m *Mesh) agree(limit time.Duration, offices ...string) (master string, term uint64) {
	m.tb.Helper()
	m.WaitFor("one master for all", limit, func() bool {
		master, term = "", 0
		for _, o := range offices {
			s, err := m.Status(o)
			if err != nil || s.Master == "" || master != "" && (s.Master != master || s.Term != term) {
				return false
			}
			master, term = s.Master, s.Term
		}
		return true
	})
	return master, term
}

func TestAKilledOfficeGetsItsMailWithinFiveSecondsOfItsReturn(t *testing.T) {
	t.Parallel()
	m := Up(t, three...)
	plzen := m.Adopt("plzen")
	plzen.Ready(5 * time.Second)
	plzen.Kill()
	tr := m.NewTraffic()
	to := []string{m.User("plzen", 0).Address, m.User("plzen", 1).Address, m.User("plzen", 2).Address}
	began := time.Now()
	tr.runAll(t.Context(), 40, m.person("hq", 0, []string{"hq"}, to...), m.person("hq", 1, []string{"hq"}, from(to, 1)...),
		m.person("praha", 0, []string{"praha"}, to...), m.person("praha", 1, []string{"praha"}, from(to, 2)...), outsider("out", []string{"hq"}, to...))
	t.Logf("%v in %v", tr, time.Since(began).Round(time.Millisecond))
	for _, o := range []string{"hq", "praha"} {
		s, err := m.Status(o)
		if err != nil {
			t.Fatal(err)
		}
		for _, x := range s.Members {
			if x.Name == "plzen" && x.Queue == 0 {
				t.Errorf("%s says that nothing waits for plzen: %+v", o, x)
			}
		}
	}
	plzen.Exec()
	start := plzen.Ready(3 * time.Second)
	took := tr.Settle(5*time.Second, 0)
	t.Logf("plzen served %v after its exec, all was there %v later", start.Round(time.Millisecond), took.Round(time.Millisecond))
}

func TestAnyNodeMayBeKilledAtAnyInstant(t *testing.T) {
	t.Parallel()
	m := Up(t, three...)
	var procs []*Proc
	for _, o := range three {
		procs = append(procs, m.Adopt(o))
	}
	for _, p := range procs {
		p.Ready(5 * time.Second)
	}
	m.agree(30*time.Second, three...)
	pids := func() map[string]int {
		now := map[string]int{}
		for _, p := range procs {
			now[p.Office] = p.Pid()
		}
		return now
	}
	level := m.Level(pids())
	m.noGateway("plzen") // so that outside mail is handed over in two phases too
	kills, total := Count(6, 100), Count(600, 10000)
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 1))
	tr := m.NewTraffic()
	all := m.everybody()
	var sources []Source
	for i, o := range three {
		sources = append(sources, m.person(o, 0, from(three, i), from(all, i)...), m.person(o, 1, from(three, i), from(all, i+5)...), outsider(fmt.Sprintf("out%d", i), from(three, i), all[:len(all)-1]...))
	}
	began := time.Now()
	ctx, cancel := context.WithCancel(t.Context())
	var load sync.WaitGroup
	// Each sends its share, and then more, slowly, until the last kill: no kill
	// hits a mesh without load.
	for i, s := range sources {
		share := total / len(sources)
		s.Pause = time.Duration(1500*kills/share) * time.Millisecond * 8 / 10
		load.Go(func() {
			tr.Run(t.Context(), s, share)
			s.Name, s.Pause = fmt.Sprintf("more%d", i), 200*time.Millisecond
			tr.Run(ctx, s, 1<<30)
		})
	}
	var starts int
	for range kills {
		p := procs[rng.IntN(3)]
		<-time.After(time.Duration(rng.IntN(1000)) * time.Millisecond)
		p.Kill()
		<-time.After(time.Duration(rng.IntN(2000)) * time.Millisecond)
		p.Exec()
		if rng.IntN(3) == 0 { // and again while it starts
			<-time.After(time.Duration(rng.IntN(300)) * time.Millisecond)
			p.Kill()
			p.Exec()
			starts++
		}
	}
	cancel()
	load.Wait()
	t.Logf("%d kills and %d during a start in %v: %v", kills, starts, time.Since(began).Round(time.Millisecond), tr)
	for _, p := range procs {
		p.Ready(5 * time.Second)
	}
	took := tr.Settle(60*time.Second, kills)
	t.Logf("all was there %v later", took.Round(time.Millisecond))
	if tr.Acked() < total*9/10 {
		t.Errorf("only %d messages were sent", tr.Acked())
	}
	m.agree(30*time.Second, three...)

	// All at once, started in any order, under load.
	for round := range Count(1, 4) {
		ctx, cancel := context.WithCancel(t.Context())
		load.Go(func() {
			for i := range sources {
				sources[i].Name, sources[i].Pause = fmt.Sprintf("all%d.%d", round, i), 5*time.Millisecond
			}
			tr.runAll(ctx, 1<<30, sources...)
		})
		<-time.After(500 * time.Millisecond)
		down := rng.Perm(3)
		if round%2 == 1 {
			down = down[:2]
		}
		for _, i := range down {
			procs[i].Signal(syscall.SIGKILL)
		}
		for _, i := range down {
			procs[i].Kill()
		}
		for _, i := range rng.Perm(3) {
			for _, d := range down {
				if d == i {
					procs[i].Exec()
				}
			}
		}
		for _, p := range procs {
			p.Ready(5 * time.Second)
		}
		<-time.After(500 * time.Millisecond)
		cancel()
		load.Wait()
		_, term := m.agree(30*time.Second, three...)
		took := tr.Settle(30*time.Second, kills+3*(round+1))
		t.Logf("%d killed at once: term %d, all was there %v after the load's end", len(down), term, took.Round(time.Millisecond))
	}
	t.Logf("nothing more is open than after a start: %v", m.BackTo(level, pids()).Round(time.Millisecond))
}
