// Package deciders is layer A of the project's proof: the deciders of a whole
// mesh, message by message, bit for bit the same for the same seed.
//
// A node here is the code that ships: route, queue, mailstore with its delivery,
// relay's rules of custody, dsn, the domain state's machine, and below them the
// message log, the journal and the view. They are driven by hand, one step
// after the other, from one heap of events: no goroutines, no clock, no order
// of a map, and one generator of chance for each concern. What stands between
// them is a model: lines, disk, outside hosts, who leads, who is seen alive.
// DESIGN.md of simtest says which is which.
//
// An observer outside of the nodes checks what clients, exchangers and readers
// of mailboxes can see. Tests and `make sim` call it; nothing that ships does.
package deciders

import (
	"cmp"
	"container/heap"
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"time"
)

// Result is what a run showed.
type Result struct {
	Plan       Plan
	Hash       uint64 // of everything that happened
	Events     int
	Taken      int           // messages that a client read a 250 for
	Virtual    time.Duration // that passed
	Faults     map[Kind]int  // that happened
	Reports    int           // failure reports that people got
	Violations []string
	Timeline   []string // empty unless Options.Timeline
}

// Options choose what a run keeps.
type Options struct {
	Timeline bool // of faults, mail log lines and answers
}

// Run plays a plan: the faults and the load, then all faults end, and when
// everything that can happen has happened the observer looks.
func Run(p Plan, opt Options) *Result {
	w := newWorld(p, opt)
	w.play()
	r := w.res
	r.Hash, r.Virtual, r.Violations, r.Timeline = w.hash.sum, w.now, w.wrong, w.story
	return r
}

// event is something that happens at a time; equal times in the order in which
// they were planned.
type event struct {
	at  time.Duration
	seq uint64
	do  func()
}

type events []event

func (e events) Len() int { return len(e) }
func (e events) Less(i, j int) bool {
	return cmp.Or(cmp.Compare(e[i].at, e[j].at), cmp.Compare(e[i].seq, e[j].seq)) < 0
}
func (e events) Swap(i, j int) { e[i], e[j] = e[j], e[i] }
func (e *events) Push(x any)   { *e = append(*e, x.(event)) }
func (e *events) Pop() any {
	o := *e
	x := o[len(o)-1]
	o[len(o)-1] = event{}
	*e = o[:len(o)-1]
	return x
}

// world is one run.
type world struct {
	plan  Plan
	opt   Options
	res   *Result
	now   time.Duration
	heap  events
	seq   uint64
	hash  hash
	story []string
	wrong []string

	// One generator a concern: what is new in one leaves the others' choices.
	net, disk, load *rand.Rand

	ctx     context.Context
	full    map[int]int // users whose mailbox is full
	people  int         // users that there were, numbered from 0
	segment int64       // of the logs, in bytes
	crashes int         // at a disk operation
	calmed  bool        // all faults have ended

	nodes   []*node
	links   *links
	mesh    *council
	outside *outside
	obs     *observer
}

func newWorld(p Plan, opt Options) *world {
	gen := func(concern uint64) *rand.Rand { return rand.New(rand.NewPCG(p.Seed, concern)) }
	w := &world{plan: p, opt: opt, res: &Result{Plan: p, Faults: map[Kind]int{}}, hash: newHash(), ctx: context.Background(), full: map[int]int{}, segment: 64 << 10, people: p.Nodes * p.Users, net: gen(11), disk: gen(12), load: gen(13)}
	w.links = newLinks(w)
	w.obs = newObserver(w)
	w.outside = newOutside(w)
	w.mesh = newCouncil(w)
	for i := range p.Nodes {
		w.nodes = append(w.nodes, newNode(w, i))
	}
	return w
}

// after plans what happens d from now.
func (w *world) after(d time.Duration, f func()) {
	w.seq++
	heap.Push(&w.heap, event{w.now + max(d, 0), w.seq, f})
}

// until lets everything happen up to a time.
func (w *world) until(t time.Duration) {
	for len(w.heap) > 0 && w.heap[0].at <= t && len(w.wrong) == 0 {
		e := heap.Pop(&w.heap).(event)
		w.now = e.at
		w.res.Events++
		w.hash.uint(uint64(e.at))
		e.do()
	}
	w.now = max(w.now, t)
}

// note is a line of the timeline, and a part of the hash.
func (w *world) note(format string, args ...any) {
	s := fmt.Sprintf(format, args...)
	w.hash.string(s)
	if w.opt.Timeline {
		w.story = append(w.story, fmt.Sprintf("%14s %s", w.now.Round(time.Millisecond), s))
	}
}

// violation ends the run.
func (w *world) violation(format string, args ...any) {
	s := fmt.Sprintf(format, args...)
	w.note("VIOLATION %s", s)
	w.wrong = append(w.wrong, s)
}

// Phases of a run.
const (
	settleTime = 2 * time.Minute  // before the first fault
	meshDrain  = 80 * time.Minute // the longest wait after a deferral by a home is 72 min
	allDrain   = 6 * time.Hour    // the longest wait after an outside deferral is 4 h 48 min
	lookEvery  = time.Hour        // the observer reads the mailboxes
)

func (w *world) play() {
	for _, n := range w.nodes {
		n.come()
	}
	w.until(settleTime)
	begin := w.now
	for _, f := range w.plan.Faults {
		w.after(f.At, func() { w.fault(f) })
	}
	for i := range w.plan.Load {
		l := &w.plan.Load[i]
		w.after(l.At, func() { w.submit(i, l) })
	}
	for w.now < begin+w.plan.Length && len(w.wrong) == 0 {
		w.until(min(w.now+lookEvery, begin+w.plan.Length))
		w.obs.look()
	}
	w.end()
}

// end ends all faults and waits for what has to come of all that happened.
func (w *world) end() {
	w.calm()
	quiet := w.now
	for w.now < quiet+meshDrain && !w.drained(false) && len(w.wrong) == 0 {
		w.until(w.now + 5*time.Minute)
	}
	if left := w.left(false); left != "" {
		w.violation("liveness: %v after all faults ended mail still waits for a mailbox: %s", w.now-quiet, left)
	}
	for w.now < quiet+allDrain && !w.drained(true) && len(w.wrong) == 0 {
		w.until(w.now + 10*time.Minute)
	}
	if left := w.left(true); left != "" {
		w.violation("liveness: %v after all faults ended mail still waits: %s", w.now-quiet, left)
	}
	w.until(w.now + 10*time.Minute) // reports that were made last arrive
	w.obs.final()
}

// calm ends all faults.
func (w *world) calm() {
	w.note("the faults end")
	w.calmed = true
	clear(w.full)
	w.links.calm()
	w.outside.calm()
	for _, n := range w.nodes {
		n.calm()
	}
	w.after(time.Minute, func() { w.gateway(w.mesh.members()[0], true) })
	w.calmMembers()
}

func (w *world) drained(all bool) bool { return w.left(all) == "" }

// left says what still waits: for mailboxes, or at all.
func (w *world) left(all bool) string {
	var b strings.Builder
	for _, n := range w.mesh.members() {
		if s := n.waiting(all); s != "" {
			fmt.Fprintf(&b, "%s: %s ", n.name, s)
		}
	}
	return b.String()
}

// hash is FNV-1a over 64 bits.
type hash struct{ sum uint64 }

func newHash() hash { return hash{14695981039346656037} }

func (h *hash) byte(b byte) { h.sum = (h.sum ^ uint64(b)) * 1099511628211 }
func (h *hash) uint(v uint64) {
	for range 8 {
		h.byte(byte(v))
		v >>= 8
	}
}
func (h *hash) string(s string) {
	for i := range len(s) {
		h.byte(s[i])
	}
	h.byte(0)
}

// sorted returns the keys of a map in their order.
func sorted[K cmp.Ordered, V any](m map[K]V) []K {
	ks := make([]K, 0, len(m))
	for k := range m {
		ks = append(ks, k)
	}
	slices.Sort(ks)
	return ks
}
