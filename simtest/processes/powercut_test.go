package processes

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/textproto"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"posthouse/appliance/demo"
)

// stream sends messages, one after the other, until stop is closed or the
// session ends; to(k) says to whom the k-th goes.
func stream(t *testing.T, l *Ledger, stop <-chan struct{}, open func() (*Sender, error), to func(k int) string) {
	s, err := open()
	if err != nil {
		return
	}
	defer s.Close()
	for k := 0; ; k++ {
		select {
		case <-stop:
			return
		default:
		}
		id, rcpt := NewID(), to(k)
		size := 0
		if k%25 == 7 {
			size = 100 << 10 // some have a file of their own in the log
		}
		err := s.SendText(id, filled(id, s.from, rcpt, size), rcpt)
		l.Sent(id, rcpt, err)
		var answer *textproto.Error
		if errors.As(err, &answer) && answer.Code >= 500 {
			t.Errorf("mail to %s was refused for good: %v", rcpt, err)
		}
		if err != nil {
			return
		}
	}
}

// filled is a message whose body is about size bytes that follow from its id.
func filled(id, from, to string, size int) string {
	return Text(id, from, to) + filling(id, size/66) + ending(id)
}

func filling(id string, lines int) string {
	var b strings.Builder
	for i := range lines {
		sum := sha256.Sum256(fmt.Append(nil, id, i))
		b.WriteString(hex.EncodeToString(sum[:]) + "\r\n")
	}
	return b.String()
}

func ending(id string) string { return "The end of " + id + ".\r\n" }

// cutPower cuts the power of hq, whose data lie on d, while mail comes in by
// all ways, and starts hq again.
func cutPower(t *testing.T, m *Mesh, d *disk, l *Ledger, random *rand.Rand, round int) {
	t.Helper()
	stop := make(chan struct{})
	var wg sync.WaitGroup
	here := []demo.User{m.User("hq", 0), m.User("hq", 1), m.User("hq", 2)}
	there := m.User("plzen", 0)
	for i := range 4 {
		wg.Go(func() {
			stream(t, l, stop, func() (*Sender, error) { return m.FromOutside("somebody@example.net", "hq") }, func(k int) string { return here[(i+k)%3].Address })
		})
	}
	wg.Go(func() {
		stream(t, l, stop, func() (*Sender, error) { return m.Submit(here[0], "hq") }, func(int) string { return there.Address })
	})
	wg.Go(func() {
		stream(t, l, stop, func() (*Sender, error) { return m.Submit(there, "plzen") }, func(k int) string { return here[k%3].Address })
	})
	time.Sleep(100*time.Millisecond + time.Duration(random.IntN(700))*time.Millisecond)
	pid := m.Node("hq").Pid
	kill := func() { syscall.Kill(pid, syscall.SIGKILL) }
	if round%2 == 0 {
		// First the process ends, so that every sync that it had begun is done.
		kill()
		for running(pid) {
			time.Sleep(time.Millisecond)
		}
	} else {
		// First the disk ends: what was being synced is lost, and whatever the
		// node answers from now on it answers at its peril.
		before := kill
		kill = func() { time.Sleep(30 * time.Millisecond); before() }
	}
	d.cut(kill, func() bool { return !running(pid) })
	close(stop)
	wg.Wait()
	if took := m.Start("hq"); took > 5*time.Second {
		t.Errorf("hq took %v to start after cut %d", took, round)
	}
}

func TestAPowerCutLosesNothingThatWasAnswered(t *testing.T) {
	asRoot(t)
	m := Up(t, "hq", "plzen")
	d := m.onDisk(t, "hq")
	l := NewLedger()
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 1))
	cuts := Count(5, 50)
	var slowest time.Duration
	for i := range cuts {
		cutPower(t, m, d, l, random, i)
		slowest = max(slowest, settle(t, m, l, 60*time.Second))
	}
	checkBodies(t, m, l)
	t.Logf("%d power cuts, %d messages answered: none lost, none twice; all mail was in place at most %v after a start", cuts, l.Total(), slowest.Round(time.Millisecond))
}

func TestThePowerCutRigCatchesAnAnswerBeforeTheSync(t *testing.T) {
	asRoot(t)
	m := UpOf(t, Mutant(t, "mutant_ack_before_sync"), "hq", "plzen")
	d := m.onDisk(t, "hq")
	l := NewLedger()
	random := rand.New(rand.NewPCG(3, 4))
	for i := range 5 {
		cutPower(t, m, d, l, random, 2*i+1)
		if lost := m.lost(t, l, 3*time.Second); lost > 0 {
			t.Logf("caught at cut %d: %d of %d messages were answered and are gone", i+1, lost, l.Total())
			return
		}
	}
	t.Errorf("a program that answers before the sync lost none of %d messages in 5 cuts: this rig proves nothing", l.Total())
}

// lost waits for all mail to arrive and returns how much did not.
func (m *Mesh) lost(t *testing.T, l *Ledger, limit time.Duration) (lost int) {
	t.Helper()
	for end := time.Now().Add(limit); ; time.Sleep(100 * time.Millisecond) {
		lost = 0
		for _, u := range m.State().Users {
			there, err := m.Inbox(u)
			if err != nil {
				t.Logf("%s: %v", u.Address, err)
			}
			missing, _ := l.Missing(u.Address, there)
			lost += len(missing)
		}
		if lost == 0 || time.Now().After(end) {
			return lost
		}
	}
}

var errBody = errors.New("the body is not what was sent")

// checkBodies reads every message whole and compares it with what its id says.
func checkBodies(t *testing.T, m *Mesh, l *Ledger) {
	t.Helper()
	for _, u := range m.State().Users {
		all, err := m.Messages(u)
		if err != nil {
			t.Errorf("%s: %v", u.Address, err)
			continue
		}
		for _, x := range all {
			if strings.HasPrefix(x.Subject, "Welcome") || x.Subject == "Hello from outside" {
				continue // the demo's own
			}
			if err := x.check(); err != nil {
				t.Errorf("%s, UID %d, %s: %v", u.Address, x.UID, x.Subject, err)
			}
		}
	}
}
