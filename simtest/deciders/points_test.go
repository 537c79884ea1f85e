package deciders

import (
	"context"
	"encoding/binary"
	"fmt"
	"iter"
	"math/rand/v2"
	"os"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"posthouse/mailstore/journal"
	"posthouse/mailstore/log/simfs"
	"posthouse/mesh"
	"posthouse/mesh/domain"
	"posthouse/transport"
)

// FAULTS I3 for the whole way of a message. Two offices live through a short
// day in which everything happens once: mail is accepted, delivered, relayed,
// refused as moved, kept and released for the outside, deferred, reported on and
// expunged; people are made, moved and taken away; the logs are tidied. Each
// disk operation of either office is then a crash point, times what the disk
// makes of what was not synced, times what is left of the view.

// point is one case: the power of a node goes at a disk operation. The zero
// value is the day without.
type point struct {
	node, op int
	mode     simfs.Mode
	view     View
	both     bool // the other node's power goes too
	again    int  // and once more at that operation of the next life
}

func (p point) String() string {
	s := fmt.Sprintf("n%d, operation %d, %s, view %s", p.node, p.op, p.mode, p.view)
	if p.both {
		s += ", both nodes"
	}
	if p.again > 0 {
		s += fmt.Sprintf(", and operation %d of the next life", p.again)
	}
	return s
}

// Of the four people of the beginning u0 and u1 live at n0, u2 and u3 at n1. n0
// leads and is the gateway.
func shortDay() Plan {
	return Plan{Seed: 7, Nodes: 2, Users: 2, Gateways: 1, Latency: 20 * time.Millisecond, Length: 90 * time.Second, Load: []Load{
		{At: 1 * time.Second, Node: 0, From: 0, Users: []int{1}},
		{At: 3 * time.Second, Node: 0, From: 0, Users: []int{2}, Notify: transport.NotifySuccess | transport.NotifyFailure},
		{At: 5 * time.Second, Node: 1, From: 2, Users: []int{3}, Group: true},          // u0 u1 u2 too
		{At: 7 * time.Second, Node: 0, From: -2, Users: []int{1, 2, 3}},                // from outside
		{At: 9 * time.Second, Node: 1, From: 2, Users: []int{0}, Outside: []int{1, 2}}, // by the gateway
		{At: 12 * time.Second, Node: 1, From: 3, Outside: []int{11}},                   // refused there
		{At: 15 * time.Second, Node: 0, From: 0, Outside: []int{12}},                   // refused too
		{At: 18 * time.Second, Node: 1, From: 3, Users: []int{0, 2}},                   // while u0's mailbox is full
		{At: 21*time.Second - time.Millisecond, Node: 1, From: 3, Users: []int{1}},     // on its way while u1 moves
		{At: 22*time.Second + 500*time.Millisecond, Node: 0, From: 0, Users: []int{1, 3}},
		{At: 24 * time.Second, Node: 1, From: 2, Users: []int{3}},                         // to the new home
		{At: 27*time.Second + 100*time.Millisecond, Node: 0, From: 0, Users: []int{4, 2}}, // to a new person
		{At: 27*time.Second + 200*time.Millisecond, Node: 1, From: 2, Users: []int{4, 1}},
		{At: 39*time.Second - time.Millisecond, Node: 1, From: 2, Users: []int{5, 2}}, // on its way while u5 goes
		{At: 45 * time.Second, Node: 1, From: 2, Users: []int{0, 1, 2, 3, 4}},
		{At: 48 * time.Second, Node: 0, From: 0, Users: []int{1, 2, 3, 4}, Outside: []int{3}},
	}}
}

// tasks is what happens on that day beside mail.
func (w *world) tasks() {
	at := func(d time.Duration, f func()) { w.after(d, f) }
	// order is a change of the domain state, asked for until it is taken.
	var order func(node int, b domain.Body)
	order = func(node int, b domain.Body) {
		if !w.mesh.propose(w.nodes[node], b) {
			w.after(time.Second, func() { order(node, b) })
		}
	}
	create := func(user, home int) domain.Body {
		w.people = max(w.people, user+1)
		return &domain.CreateUser{User: domain.User{ID: userID(user), Mailbox: mailboxOf(user), Address: address(user), Home: w.nodes[home].id}}
	}
	expunge := func(d time.Duration, node, user int) {
		at(d, func() {
			n := w.nodes[node]
			n.step(n.boot, func() { w.obs.expunge(n, user) })
		})
	}
	tidy := func(d time.Duration, node int) {
		at(d, func() {
			n := w.nodes[node]
			n.step(n.boot, func() {
				t, err := n.j.Tidy(context.Background(), journal.TidyOptions{Force: true})
				w.note("%s tidies: %+v %v", n.name, t, err)
				if err != nil && n.j.Err() == nil && !n.lost {
					w.violation("I3: %s cannot tidy: %v", n.name, err)
				}
			})
		})
	}
	at(0, func() { w.outside.refuse[1]++ })
	at(18*time.Second-time.Millisecond, func() { w.full[0]++ })
	at(20*time.Second, func() { w.full[0]-- })
	move := func(d time.Duration, user, home int) {
		at(d, func() {
			w.obs.moves(user)
			order(1, &domain.SetHome{User: userID(user), Home: w.nodes[home].id})
		})
	}
	move(21*time.Second, 1, 1)
	move(23*time.Second, 3, 0)
	at(27*time.Second, func() { order(0, create(4, 1)) })
	at(30*time.Second, func() { order(1, create(5, 0)) })
	expunge(33*time.Second, 1, 2)
	expunge(35*time.Second, 0, 0)
	tidy(36*time.Second, 0)
	tidy(37*time.Second, 1)
	at(39*time.Second, func() { order(0, &domain.DeleteUser{User: userID(5)}) })
	expunge(51*time.Second, 0, 0)
	expunge(52*time.Second, 1, 2)
	tidy(54*time.Second, 1)
	tidy(55*time.Second, 0)
}

// live plays the day with a crash.
func live(p point, opt Options) *world {
	w := newWorld(shortDay(), opt)
	w.disk = rand.New(rand.NewPCG(uint64(p.op), uint64(p.mode)))
	w.segment = 4 << 10
	for _, n := range w.nodes {
		n.kept.KeepHistory()
	}
	if p.op > 0 {
		n := w.nodes[p.node]
		n.crashIn, n.crashAs = p.op, Fault{Span: time.Second, Mode: p.mode, View: p.view, Again: p.again}
		if p.both {
			n.crashAs.B = 3
		}
	}
	for _, n := range w.nodes {
		n.come()
	}
	w.until(30 * time.Second)
	begin := w.now
	for i := range w.plan.Load {
		l := &w.plan.Load[i]
		w.after(l.At, func() { w.submit(i, l) })
	}
	w.tasks()
	for w.now < begin+w.plan.Length && len(w.wrong) == 0 {
		w.until(w.now + 500*time.Millisecond)
		w.obs.look()
	}
	w.end()
	w.obs.whole()
	return w
}

// whole checks what days do not: what no client read a 250 for came to all of
// its recipients or to none, to nobody twice; and a UID means what it meant.
func (o *observer) whole() {
	if len(o.w.wrong) > 0 {
		return
	}
	held := o.held()
	for _, num := range sorted(o.nums) {
		s := o.nums[num]
		if s.load != nil || s.no {
			continue
		}
		l := &o.w.plan.Load[num]
		users := slices.Clone(l.Users)
		if l.Group {
			users = append(users, 0, 1, 2)
		}
		slices.Sort(users)
		none, one := 0, 0
		count := func(to string, n, lost int) {
			switch {
			case n == 0:
				none++
			case n <= 1+lost:
				one++
			default:
				o.w.violation("I3: m%d was answered to nobody and came to %s %d times", num, to, n)
			}
		}
		for _, u := range slices.Compact(users) {
			n, lost := held[fmt.Sprintf("m%d %s", num, address(u))]+o.reports[fmt.Sprintf("failed m%d %s", num, address(u))], 0
			for _, p := range o.places() {
				for _, what := range o.seen[p] {
					if p.box == mailboxOf(u) && what == fmt.Sprintf("m%d", num) {
						n++
					}
				}
			}
			if o.moved[u] {
				lost = o.lost[copyOf{o.idOf(s), mailboxOf(u).String()}]
			}
			count(address(u), n, lost)
		}
		for _, x := range l.Outside {
			a := outsideAddress(x)
			k := copyOf{o.idOf(s), a}
			count(a, o.accepted[k]+o.reports[fmt.Sprintf("failed m%d %s", num, a)]+held[fmt.Sprintf("m%d %s", num, a)], o.lost[k])
		}
		if none > 0 && one > 0 {
			o.w.violation("I3: m%d, which was answered to nobody, came to %d of its recipients and not to %d", num, one, none)
		}
	}
	o.reports, o.papers = map[string]int{}, map[string]string{} // read again, not come again
	for _, p := range o.places() {
		n, user := o.w.nodes[p.node], userOf(p.box)
		f, _, list, ok := o.inbox(n, user)
		if !ok {
			return
		}
		for _, m := range list {
			if what, ok := o.identify(n, f, m.UID, user); ok && what != o.seen[p][m.UID] {
				o.w.violation("I4: UID %d of u%d at %s was %s and is %s", m.UID, user, n.name, o.seen[p][m.UID], what)
			}
		}
	}
}

func userOf(m mesh.MailboxID) int { return int(binary.BigEndian.Uint64(m[8:])) - 1 }

// played plays points on all processors, until enough have failed, and returns
// how many.
func played(t *testing.T, all iter.Seq[point]) (n int) {
	t.Helper()
	todo := make(chan point)
	var mu sync.Mutex
	bad := map[string]point{}
	var wg sync.WaitGroup
	for range runtime.GOMAXPROCS(0) {
		wg.Go(func() {
			for p := range todo {
				w := live(p, Options{})
				if w.crashes == 0 {
					w.violation("I3: the power never went")
				}
				if len(w.wrong) > 0 {
					mu.Lock()
					bad[p.String()+": "+strings.Join(w.wrong, "\n")] = p
					mu.Unlock()
				}
			}
		})
	}
	for p := range all {
		mu.Lock()
		over := len(bad) >= enough
		mu.Unlock()
		if over {
			break
		}
		todo <- p
		n++
	}
	close(todo)
	wg.Wait()
	for i, what := range sorted(bad) {
		t.Error(what)
		if i == 0 {
			t.Log(strings.Join(live(bad[what], Options{Timeline: true}).story, "\n"))
		}
	}
	return n
}

// everyPoint yields all cases of n0 with that many operations and n1 with as
// many: with full all of them, else each operation with each mode of the disk,
// the rest in turn.
func everyPoint(ops [2]int, full bool) iter.Seq[point] {
	return func(yield func(point) bool) {
		for node, last := range ops {
			for op := 1; op <= last; op++ {
				for mode := simfs.LoseAll; mode <= simfs.Torn; mode++ {
					p := point{node: node, op: op, mode: mode}
					if !full {
						turn := op + int(mode)
						p.view, p.both = View(turn%views), turn%4 == 1
						if turn%4 == 3 {
							p.again = 1 + op/4%restart
						}
						if !yield(p) {
							return
						}
						continue
					}
					for p.view = range View(views) {
						for _, p.both = range []bool{false, true} {
							if !yield(p) {
								return
							}
						}
						p.both = false
						for p.again = 1; p.again <= restart; p.again += 1 + int(p.view) {
							if !yield(p) {
								return
							}
						}
						p.again = 0
					}
				}
			}
		}
	}
}

// restart is more operations than a start after a crash has on this day, which
// are 13.
const restart = 16

func TestEveryDiskOperationOfTheWayOfAMessageIsACrashPoint(t *testing.T) {
	defer debug.SetGCPercent(debug.SetGCPercent(400))
	clean := live(point{}, Options{Timeline: true})
	story := strings.Join(clean.story, "\n")
	if len(clean.wrong) > 0 {
		t.Fatal(strings.Join(clean.wrong, "\n"), "\n", story)
	}
	for _, what := range []string{"delivered m0 by local", "delivered m1 by node", "u0 finds at n0: delivered m1", "taken over by n0", "h0 says 250", "u3 finds at n1: failed m5",
		"deferred m7", "moved m8", "u4@company.test: 250", "u2 expunges 2 of 2", "n0 tidies: {Checkpoints:2 Segments:8", "n1 tidies: {Checkpoints:2 Segments:5"} {
		if !strings.Contains(story, what) {
			t.Errorf("on the day nothing says %q", what)
		}
	}
	if clean.res.Taken != len(clean.plan.Load) || t.Failed() {
		t.Fatalf("%d of %d messages taken\n%s", clean.res.Taken, len(clean.plan.Load), story)
	}
	ops, began := [2]int{clean.nodes[0].fs.Ops(), clean.nodes[1].fs.Ops()}, time.Now()
	n := played(t, everyPoint(ops, os.Getenv("PROVE") == "full"))
	t.Logf("%d and %d disk operations, %d points, %v", ops[0], ops[1], n, time.Since(began).Round(time.Millisecond))
}
