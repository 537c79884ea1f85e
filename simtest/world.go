// Package simtest runs whole nodes, the same that ship, in virtual time over a
// simulated network, and checks from outside what must hold. It also holds the
// tests of the house itself: who may import whom.
//
// A World lives inside one testing/synctest bubble. Its nodes have a simulated
// UDP socket each, simulated TCP, a disk in memory that loses what was not
// synced, and a DNS that knows the world's names.
package simtest

import (
	"fmt"
	"io"
	mathrand "math/rand/v2"
	"net/netip"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/quic-go/quic-go/testutils/simnet"

	"posthouse/appliance/admin"
	"posthouse/appliance/config"
	"posthouse/simtest/bufpipe"
	"posthouse/simtest/record"
)

// Domain is the mail domain of every World.
const Domain = "company.test"

// World is a few offices on a simulated network. Make it inside a bubble.
type World struct {
	tb      testing.TB
	Latency time.Duration // one way, between any two nodes; see Slow for single lines
	Offices []*Office
	Outside *Outside

	mu        sync.Mutex
	lines     map[[2]netip.Addr]line     // from, to; absent: as good as can be
	qualities map[[2]netip.Addr]*quality // what a line is on a good day; absent: World.Latency alone
	uplinks   map[netip.Addr]*uplink     // what all lines of an office share; absent: nothing
	dice      *mathrand.Rand
	simnet.PerfectRouter
	noDNS     atomic.Bool                  // whoever asks for a host's address waits in vain
	tcp       map[string]*bufpipe.Listener // by "address:port" or socket path
	conns     map[*conn]bool
	served    map[*served]bool
	story     []string // what was done and what went wrong, for people
	trace     io.Writer
	began     time.Time
	wrong     []string // violations that watchers saw
	checks    [1 + invariants]int
	broken    [1 + invariants]int
	keeper    *record.Keeper
	size      int               // of the bodies of all mail that is sent here; 0: small, some longer
	nodes     map[string]string // offices by their nodes' ids
	token     string            // lets offices join for a month
	founders  []string          // the members of the group of everybody
	promoted  atomic.Uint64     // the generation that a promote made last
	promoting atomic.Bool       // somebody tried: each side may write from then on
	deciding  chan struct{}     // held by the one person who changes who is a member, or an office's disk

	ledger  *Ledger
	clock   func(time.Duration)
	readers sync.WaitGroup
	reading chan struct{}  // closed when readers are to end
	wg      sync.WaitGroup // of machines that act by themselves
	closing atomic.Bool
}

// NewWorld makes offices that are not started; the first is to found the mesh.
func NewWorld(tb testing.TB, offices ...string) *World {
	w := &World{tb: tb, Latency: 10 * time.Millisecond, lines: map[[2]netip.Addr]line{}, qualities: map[[2]netip.Addr]*quality{}, uplinks: map[netip.Addr]*uplink{}, keeper: record.NewKeeper(nil), reading: make(chan struct{}), deciding: make(chan struct{}, 1), dice: mathrand.New(mathrand.NewPCG(1, 1)),
		tcp: map[string]*bufpipe.Listener{}, conns: map[*conn]bool{}, served: map[*served]bool{}, nodes: map[string]string{}, began: time.Now()}
	w.Outside = newOutside(w)
	w.ledger = newLedger(w)
	for i, name := range offices {
		addr := netip.AddrFrom4([4]byte{10, 0, byte(i + 1), 1})
		at := func(port int) string { return netip.AddrPortFrom(addr, uint16(port)).String() }
		dir := filepath.Join(tb.TempDir(), name)
		cfg, problems := config.Parse(fmt.Sprintf("name=%q\nhost=%q\ndata=%q\ncontrol_socket=%q\ntake_back=\"10s\"\nadvertise=[%q]\n[listen]\nsmtp=%q\nsubmission=%q\nsubmissions=\"off\"\nimap=%q\nimaps=\"off\"\nhttps=\"off\"\nmesh=%q\n",
			name, name+"."+Domain, dir, "/"+name+".sock", at(44337), at(25), at(587), at(143), at(44337)))
		if len(problems) > 0 {
			tb.Fatal(problems)
		}
		w.Offices = append(w.Offices, newOffice(w, name, addr, cfg))
	}
	return w
}

// Office returns an office by name.
func (w *World) Office(name string) *Office {
	w.tb.Helper()
	for _, o := range w.Offices {
		if o.Name == name {
			return o
		}
	}
	w.tb.Fatalf("no office %s", name)
	return nil
}

// belonging are the offices that are members of the mesh now.
func (w *World) belonging() (out []*Office) {
	for _, o := range w.Offices {
		if !o.apart.Load() {
			out = append(out, o)
		}
	}
	return out
}

// Names returns the offices' names.
func (w *World) Names() []string {
	out := make([]string, len(w.Offices))
	for i, o := range w.Offices {
		out[i] = o.Name
	}
	return out
}

// decide lets one person decide about members and disks at a time, until the
// function that it returns is called.
func (w *World) decide() (done func()) {
	w.deciding <- struct{}{}
	return func() { <-w.deciding }
}

// note writes a line of the story.
func (w *World) note(format string, args ...any) { w.write(fmt.Sprintf(format, args...), false) }

func (w *World) write(text string, bad bool) {
	w.keeper.Moment(text, bad)
	w.mu.Lock()
	defer w.mu.Unlock()
	line := fmt.Sprintf("%12s  ", time.Since(w.began).Round(time.Millisecond)) + text
	w.story = append(w.story, line)
	if w.trace != nil {
		fmt.Fprintln(w.trace, line)
	}
}

// violation notes something that must never be; the test fails at its end.
func (w *World) violation(i Invariant, format string, args ...any) {
	text := fmt.Sprintf("invariant %d: ", i) + fmt.Sprintf(format, args...)
	w.write("VIOLATION: "+text, true)
	w.mu.Lock()
	defer w.mu.Unlock()
	w.checks[i] = max(w.checks[i], 1)
	w.broken[i]++
	if len(w.wrong) < 50 {
		w.wrong = append(w.wrong, text)
	}
}

// Until waits, in virtual time, until f is true; it fails the test after limit
// and returns how long it took.
func (w *World) Until(what string, limit time.Duration, f func() bool) time.Duration {
	w.tb.Helper()
	took, ok := w.within(limit, f)
	if !ok {
		w.explain()
		w.tb.Fatalf("%s: not within %v", what, limit)
	}
	return took
}

// within waits until f is true, at most for limit.
func (w *World) within(limit time.Duration, f func() bool) (time.Duration, bool) {
	began, pause := time.Now(), 50*time.Millisecond
	for !f() {
		if time.Since(began) > limit {
			return time.Since(began), false
		}
		time.Sleep(pause)
		if pause < 500*time.Millisecond && time.Since(began) > 10*time.Second {
			pause = 500 * time.Millisecond
		}
	}
	return time.Since(began), true
}

// explain prints how all nodes see themselves.
func (w *World) explain() {
	w.tb.Helper()
	for _, o := range w.Offices {
		if !o.Up() {
			w.tb.Logf("%s: down", o.Name)
			continue
		}
		s := o.Status()
		w.tb.Logf("%s: %s, master %q, term %d, %s, outside %d, held %d, joining %v", o.Name, s.State, s.Master, s.Term, s.Health.Sentence, s.QueueOutside, s.QueueHeld, s.JoinProgress)
		for _, m := range s.Members {
			w.tb.Logf("    %s sees %s: %s, %s, %s, queue %d for %d s", o.Name, m.Name, m.State, m.Role, m.Path, m.Queue, m.Oldest)
		}
	}
}

// Found starts all offices that are not apart, founds the mesh at the first, and
// lets the others join. Each office gets one user, named as the office.
func (w *World) Found() {
	w.tb.Helper()
	offices := w.belonging()
	for _, o := range offices {
		o.Start()
	}
	w.Until("all nodes have started", time.Minute, func() bool {
		for _, o := range offices {
			if !o.Up() || o.Status().Health.Sentence == "" || o.Status().State == "" || len(o.Status().Conditions) == 0 {
				return false
			}
		}
		return true
	})
	first := w.Offices[0]
	first.gateway = true
	if _, err := first.Ops().Init(Ctx(), admin.InitRequest{Domain: Domain, AdminName: "admin", AdminPassword: "secret"}); err != nil {
		w.tb.Fatal(err)
	}
	token, err := first.Ops().CreateToken(Ctx(), admin.TokenRequest{Reusable: true, Hours: 24 * 30})
	if err != nil {
		w.tb.Fatal(err)
	}
	w.token = token.Secret
	for _, o := range offices[1:] {
		if err := o.Ops().Join(Ctx(), admin.JoinRequest{Target: token.Secret, At: netip.AddrPortFrom(first.Addr, 44337).String()}); err != nil {
			w.tb.Fatal(err)
		}
	}
	w.Until("all nodes serve", time.Minute, w.whole)
	w.learnNodes(first.Status())
	for _, o := range offices {
		password := "secret"
		if _, err := first.Ops().CreateUser(Ctx(), admin.UserChange{Address: o.Name + "@" + Domain, Home: &o.Name, Password: &password}); err != nil {
			w.tb.Fatal(err)
		}
	}
	for _, o := range offices {
		w.founders = append(w.founders, o.Name+"@"+Domain)
	}
	if _, err := first.Ops().PutGroup(Ctx(), admin.Group{Address: everybody, Name: "Everybody", Members: w.founders}); err != nil {
		w.tb.Fatal(err)
	}
	w.Until("all copies of the domain state are equal", 10*time.Second, w.Equal)
	if len(offices) < len(w.Offices) { // a token that knows the keys of all candidates
		if token, err = first.Ops().CreateToken(Ctx(), admin.TokenRequest{Reusable: true, Hours: 24 * 30}); err != nil {
			w.tb.Fatal(err)
		}
		w.token = token.Secret
	}
}

// learnNodes notes which office each node is that this status lists.
func (w *World) learnNodes(s admin.Status) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, m := range s.Members {
		w.nodes[m.ID] = m.Name
	}
}

// called is the name of a queue's destination for people.
func (w *World) called(dest string) string {
	id, node := strings.CutPrefix(dest, "node:")
	w.mu.Lock()
	defer w.mu.Unlock()
	if name := w.nodes[id]; node && name != "" {
		return name
	}
	return dest
}

// Equal reports whether all running nodes have the same domain state.
func (w *World) Equal() bool {
	hash := ""
	for _, o := range w.belonging() {
		if !o.Up() {
			continue
		}
		s := o.Status()
		if hash != "" && s.StateHash != hash {
			return false
		}
		hash = s.StateHash
	}
	return true
}

// whole reports whether all running nodes serve, see each other, agree about
// the master, and as many vote as should.
func (w *World) whole() bool {
	master, offices := "", w.belonging()
	for _, o := range offices {
		if !o.Up() {
			return false
		}
		s := o.Status()
		if s.State != "serving" || s.Master == "" || len(s.Members) != len(offices) || master != "" && s.Master != master {
			return false
		}
		master = s.Master
		votes := 0
		for _, m := range s.Members {
			if m.State != "serving" {
				return false
			}
			if m.Role != "member" {
				votes++
			}
		}
		if want := map[bool]int{len(offices) < 3: 1, len(offices) == 3 || len(offices) == 4: 3, len(offices) > 4: 5}[true]; votes != want {
			return false
		}
	}
	return true
}

// Close ends all nodes and lets what they leave behind run out.
func (w *World) Close() {
	w.closing.Store(true)
	w.stopReading()
	w.wg.Wait()
	for _, o := range w.Offices {
		o.Stop()
		o.bury()
	}
	w.Outside.close()
	time.Sleep(2 * time.Minute)
}

// Submit hands in one message at an office's port 25 from outside, and returns
// what the node answered to the text.
func (w *World) Submit(office, from, to, subject string) error {
	c, err := w.smtp(office, 25, "", "")
	if err != nil {
		return err
	}
	defer c.close()
	answers, err := c.send(from, []string{to}, text(from, to, subject))
	if err != nil {
		return err
	}
	if answers[0] != 250 {
		return fmt.Errorf("refused with %d", answers[0])
	}
	return nil
}
