package processes

import (
	"flag"
	"os"
	"sync"
	"testing"
	"time"

	"posthouse/appliance/demo"
)

func TestMain(m *testing.M) {
	// The tests that say so run beside each other: they wait more than they work.
	flag.Parse()
	if p := flag.Lookup("test.parallel"); p.Value.String() == p.DefValue {
		p.Value.Set("4")
	}
	code := m.Run()
	Clean()
	os.Exit(code)
}

// settle waits until every ledger entry is where it belongs, and fails on a
// message that is there twice.
func settle(t *testing.T, m *Mesh, l *Ledger, limit time.Duration) time.Duration {
	t.Helper()
	s := m.State()
	took := m.WaitFor("all mail is delivered", limit, func() bool {
		for _, u := range s.Users {
			there, err := m.Inbox(u)
			if err != nil {
				t.Logf("%s: %v", u.Address, err)
				return false
			}
			missing, doubled := l.Missing(u.Address, there)
			if len(doubled) > 0 {
				t.Fatalf("%s has these twice: %v", u.Address, doubled)
			}
			if len(missing) > 0 {
				return false
			}
		}
		missing, doubled := l.Missing("friend@example.net", m.OutsideMail())
		if len(doubled) > 0 {
			t.Fatalf("the outside has these twice: %v", doubled)
		}
		return len(missing) == 0
	})
	return took
}

func TestMailBetweenAllPairsArrivesOnceInTheRightMailbox(t *testing.T) {
	m := Up(t, "hq", "plzen", "praha")
	offices := []string{"hq", "plzen", "praha"}
	l := NewLedger()
	total := Count(300, 1000)
	var wg sync.WaitGroup
	began := time.Now()
	for i, from := range offices {
		wg.Go(func() {
			sender := m.User(from, 0)
			s, err := m.Submit(sender, from)
			if err != nil {
				t.Error(err)
				return
			}
			defer s.Close()
			for k := range total / 5 {
				to := m.User(offices[(i+k)%3], 1+k/3%2).Address
				if k%5 == 4 {
					to = "friend@example.net"
				}
				if err := l.Send(s, to); err != nil {
					t.Error(err)
					return
				}
			}
		})
		wg.Go(func() {
			s, err := m.FromOutside("somebody@example.net", from)
			if err != nil {
				t.Error(err)
				return
			}
			defer s.Close()
			for k := range total / 7 {
				to := m.User(offices[(i+k)%3], 2).Address
				if err := l.Send(s, to); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	sent := time.Since(began)
	after := settle(t, m, l, 30*time.Second)
	t.Logf("%d messages sent in %v, all delivered %v later", l.Total(), sent.Round(time.Millisecond), after.Round(time.Millisecond))
	for _, u := range m.State().Users {
		if there, err := m.Inbox(u); err != nil || u == m.User(u.Home, 0) && len(there) > 3 {
			t.Errorf("%s: %v, %d messages that nobody sent there", u.Address, err, len(there))
		}
	}
}

func TestASingleMessageTakesLessThanASecond(t *testing.T) {
	m := Up(t, "hq", "plzen")
	from, to := m.User("hq", 0), m.User("plzen", 0)
	began := time.Now()
	s, err := m.Submit(from, "hq")
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	id := NewID()
	if err := s.Send(id, to.Address); err != nil {
		t.Fatal(err)
	}
	m.WaitFor("it is there", time.Second, func() bool { return has(t, m, to, id) })
	if d := time.Since(began); d > time.Second {
		t.Errorf("%v from submission to FETCH", d)
	} else {
		t.Logf("%v from connecting to submit until FETCH at the other office", d.Round(time.Millisecond))
	}
}

func has(t *testing.T, m *Mesh, u demo.User, id string) bool {
	t.Helper()
	there, err := m.Inbox(u)
	if err != nil {
		t.Log(err)
		return false
	}
	for _, x := range there {
		if x == id {
			return true
		}
	}
	return false
}
