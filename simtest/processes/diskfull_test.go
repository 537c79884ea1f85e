package processes

import (
	"errors"
	"fmt"
	"net/textproto"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"posthouse/appliance/demo"
)

// code returns the SMTP code of an error, 0 if it has none.
func code(err error) int {
	var answer *textproto.Error
	if errors.As(err, &answer) {
		return answer.Code
	}
	return 0
}

// sizeOf is how long the k-th body is: up to 160 KiB, and each tenth so long that
// it goes through a file of its own before anybody knows whether it is taken.
func sizeOf(k int) int {
	if k%10 == 9 {
		return 400 << 10
	}
	return k % 10 * 20 << 10
}

// try sends one message in a session of its own.
func try(m *Mesh, l *Ledger, office, to string, size int) error {
	s, err := m.FromOutside("somebody@example.net", office)
	if err != nil {
		return err
	}
	defer s.Close()
	id := NewID()
	err = s.SendText(id, filled(id, s.from, to, size), to)
	l.Sent(id, to, err)
	return err
}

func TestAFullDiskRefusesMailAndHealsByItself(t *testing.T) {
	asRoot(t)
	m := Up(t, "hq", "plzen")
	d := m.onDisk(t, "hq")
	l := NewLedger()
	to, there := m.User("hq", 0), m.User("plzen", 0)
	pid := m.Node("hq").Pid
	pids := map[string]int{"hq": pid, "plzen": m.Node("plzen").Pid}
	level := m.Level(pids)
	for k := range 50 {
		if err := try(m, l, "hq", to.Address, sizeOf(k)); err != nil {
			t.Fatal(err)
		}
	}

	// Mail goes on while somebody else fills the disk: 250 or 452, nothing else.
	stop := make(chan struct{})
	var wg sync.WaitGroup
	var mu sync.Mutex
	answers := map[int]int{}
	for range 3 {
		wg.Go(func() {
			for k := 0; ; k++ {
				select {
				case <-stop:
					return
				case <-time.After(20 * time.Millisecond):
				}
				err := try(m, l, "hq", to.Address, sizeOf(k))
				c := code(err)
				if err == nil {
					c = 250
				} else if c == 0 {
					t.Logf("while the disk was full: %v", err)
				}
				mu.Lock()
				answers[c]++
				mu.Unlock()
			}
		})
	}
	// At the other office mail for hq is taken all the time; it waits there.
	s, err := m.Submit(there, "plzen")
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	relayed := func(n int) {
		for range n {
			if err := l.Send(s, to.Address); err != nil {
				t.Errorf("the other office refused: %v", err)
			}
		}
	}
	relayed(20)
	// Once for long, then again and again.
	holds := []time.Duration{time.Duration(Count(3, 60)) * time.Second}
	for range Count(0, 9) {
		holds = append(holds, 2*time.Second)
	}
	var healed time.Duration
	for _, hold := range holds {
		release := d.fill("filler")
		full := time.Now()
		m.WaitFor("mail is refused with 452", 10*time.Second, func() bool { return code(try(m, l, "hq", to.Address, 0)) == 452 })
		relayed(20)
		for time.Since(full) < hold {
			if _, err := m.Messages(to); err != nil {
				t.Errorf("mail cannot be read while the disk is full: %v", err)
			}
			st, err := m.Status("hq")
			if err != nil || st.Health.OK || !strings.Contains(st.Health.Sentence, "disk") {
				t.Errorf("the status says %q, %v", st.Health.Sentence, err)
			}
			if err := try(m, l, "hq", to.Address, 0); code(err) != 452 {
				t.Errorf("while the disk is full: %v", err)
			}
			time.Sleep(500 * time.Millisecond)
		}
		release()
		healed = max(healed, m.WaitFor("mail is taken again", 15*time.Second, func() bool { return try(m, l, "hq", to.Address, 0) == nil }))
		relayed(20)
	}
	close(stop)
	wg.Wait()
	// What the other office was refused comes when hq says that it has room.
	after := settle(t, m, l, 20*time.Second)
	checkBodies(t, m, l)
	if now := m.Node("hq").Pid; now != pid || !running(pid) {
		t.Errorf("hq was process %d and is %d now", pid, now)
	}
	for c := range answers {
		if c != 250 && c != 452 {
			t.Errorf("answers: %v", answers)
		}
	}
	m.WaitFor("the status says that all is well", 10*time.Second, func() bool { st, err := m.Status("hq"); return err == nil && st.Health.OK })
	if len(m.holds("plzen", pids["plzen"]).above(level["plzen"])) == 0 {
		t.Error("our own session at plzen, which is open still, is not seen")
	}
	s.Close()
	back := m.BackTo(level, pids)
	t.Logf("full for %v: answers %v, taken again at most %v after there was room, all %d messages in place %v after the last; nothing more open than after the start %v later",
		holds, answers, healed.Round(time.Millisecond), l.Total(), after.Round(time.Millisecond), back.Round(time.Millisecond))

	t.Run("and at boot", func(t *testing.T) { startOnAFullDisk(t, m, d, l, to) })
}

func startOnAFullDisk(t *testing.T, m *Mesh, d *disk, l *Ledger, to demo.User) {
	// The first time it has its ballast to give up, and so lets people read. The
	// ballast comes back with a write after the disk was full.
	ballast := filepath.Join(m.Node("hq").Data, "view", "ballast")
	m.WaitFor("the ballast is there again", 30*time.Second, func() bool {
		f, err := os.Stat(ballast)
		if err == nil && f.Size() >= 8<<20 {
			return true
		}
		try(m, l, "hq", to.Address, 0)
		return false
	})
	m.Kill("hq")
	releases := []func(){d.fill("filler-1")}
	m.Start("hq")
	if there, err := m.Messages(to); err != nil || len(there) < 20 {
		t.Errorf("%d messages can be read on a full disk, %v", len(there), err)
	}
	// Then there is nothing left: it waits, or starts and takes nothing; it says
	// so either way. Unless it finds something of its own to drop: a view that was
	// set aside.
	m.Kill("hq")
	releases = append(releases, d.fill("filler-2"))
	started := make(chan error, 1)
	go func() {
		out, err := m.Command("demo", "start", "--dir", m.Dir, "hq")
		if err != nil {
			err = fmt.Errorf("%w: %s", err, out)
		}
		started <- err
	}()
	m.WaitFor("the node explains itself, or has made room", 10*time.Second, func() bool {
		st, err := m.Status("hq")
		return err == nil && running(m.Node("hq").Pid) && (strings.Contains(st.Health.Sentence, "full") || st.Health.OK && d.free(t) >= 16<<20)
	})
	pid := m.Node("hq").Pid
	time.Sleep(2 * time.Second)
	for _, release := range releases {
		release()
	}
	if err := <-started; err != nil {
		t.Errorf("hq did not start by itself when there was room: %v", err)
	}
	if m.Node("hq").Pid != pid || !running(pid) {
		t.Error("hq is another process")
	}
	m.WaitFor("mail is taken", 5*time.Second, func() bool { return try(m, l, "hq", to.Address, 0) == nil })
	settle(t, m, l, 30*time.Second)
	checkBodies(t, m, l)
}
