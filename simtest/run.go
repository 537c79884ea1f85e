package simtest

import (
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"runtime"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"posthouse/appliance/admin"
	"posthouse/mailstore/log/simfs"
	"posthouse/simtest/record"
)

// Limits of the liveness phase (issue text, invariant 6).
const (
	agreeLimit   = 60 * time.Second // until all members agree
	drainLimit   = 15 * time.Second // then until nothing waits for another node
	outsideLimit = 30 * time.Minute // until nothing waits for the outside, asked to go on every half minute
	localLimit   = time.Second      // of local mail, under network faults alone
)

// Result is what a scenario came to.
type Result struct {
	Plan       Plan
	Violations []string
	Story      []string // what happened, for people
	Logs       []string // what each node logged in the last minute
	Virtual    time.Duration
	Mail       record.Mail
	Record     *record.Record
	Faults     map[Kind]int
}

// Watcher is who follows a run. Each field may be nil.
type Watcher struct {
	Trace io.Writer           // gets the story and all logs as they happen
	Tell  func(record.Moment) // hears of each moment once the mesh is founded
	Clock func(time.Duration) // hears the virtual time since then, now and then
}

// Run plays a plan in a bubble of its own: it founds the mesh, lets everything
// happen, heals all, and checks what must hold at quiet.
func Run(t *testing.T, p Plan, watcher Watcher) (r Result) {
	r = Result{Plan: p, Faults: map[Kind]int{}}
	real := time.Now()
	synctest.Test(t, func(t *testing.T) {
		before, _ := inBubble()
		w := NewWorld(t, p.Offices...)
		w.Latency, w.trace, w.clock = p.Latency, watcher.Trace, watcher.Clock
		w.size = p.Size
		w.keeper = record.NewKeeper(watcher.Tell)
		w.dice = rand.New(rand.NewPCG(p.Seed, 9))
		for _, l := range p.Lines {
			w.SetLine(l.A, l.B, l.Quality)
		}
		for _, u := range p.Uplinks {
			w.SetUplink(u.Office, u.Bandwidth)
			r.Faults[narrowUplink]++
		}
		for _, n := range p.Apart {
			w.Office(n).apart.Store(true)
		}
		began := time.Now()
		(&player{w: w, r: &r, writes: map[string]uint64{}}).play()
		r.Virtual = time.Since(began)
		r.Mail = w.ledger.Counts()
		if len(w.wrong) > 0 {
			for _, o := range w.Offices {
				for _, l := range o.logs.since(time.Now().Add(-time.Minute), 100) {
					r.Logs = append(r.Logs, fmt.Sprintf("%s %12s %s", o.Name, l.at.Sub(w.began).Round(time.Millisecond), l.text))
				}
			}
		}
		w.Close()
		w.checked(NothingIsLeft, 2)
		if now, _ := inBubble(); sum(now) > sum(before) {
			w.violation(NothingIsLeft, "goroutines are left: %s", grown(before, now))
		}
		if n := len(w.tcp); n > 0 {
			w.violation(NothingIsLeft, "%d ports are still open", n)
		}
		r.Violations, r.Story = w.wrong, w.story
		r.Record = w.keeper.End(r.Mail, w.Verdicts())
	})
	if r.Record != nil { // nil when the bubble ended before its time
		r.Record.Seed, r.Record.Took = p.Seed, time.Since(real)
	}
	return r
}

// inBubble counts the goroutines of the bubble that it is called in, by who
// started them, and those among them that are an end of a QUIC connection.
func inBubble() (by map[string]int, quic int) {
	buf := make([]byte, 4<<20)
	own, _, _ := strings.Cut(string(buf[:runtime.Stack(buf, false)]), "]")
	_, bubble, ok := strings.Cut(own, "synctest bubble ")
	if !ok {
		panic("not in a bubble")
	}
	n := runtime.Stack(buf, true)
	for ; n == len(buf); n = runtime.Stack(buf, true) {
		buf = make([]byte, 2*len(buf))
	}
	by = map[string]int{}
	for g := range strings.SplitSeq(string(buf[:n]), "\n\n") {
		if strings.Contains(g, "synctest bubble "+bubble+"]") {
			by[starter(g)]++
			if strings.Contains(g, "quic-go.(*Conn).run(") {
				quic++
			}
		}
	}
	return by, quic
}

// starter is the function that started a goroutine: the outermost on its stack
// that is not the standard library's way of starting one.
func starter(stack string) string {
	lines := strings.Split(strings.TrimSpace(stack), "\n")
	for i := len(lines) - 1; i > 0; i-- {
		f := lines[i]
		if strings.HasPrefix(f, "\t") || strings.HasPrefix(f, "created by ") || strings.HasPrefix(f, "sync.(*WaitGroup).Go") {
			continue
		}
		if args := strings.LastIndexByte(f, '('); args > 0 {
			f = f[:args]
		}
		return f
	}
	return "unknown"
}

// player plays one plan.
type player struct {
	w  *World
	r  *Result
	wg sync.WaitGroup // of load and faults in hand

	mu     sync.Mutex
	writes map[string]uint64    // aliases whose making was answered with success, by the generation that began with it
	terms  map[[2]uint64]string // by generation and term
	outs   []*out               // who was revoked
	masked map[string]time.Time // offices with trouble of their own: until when local mail may be late
	before level                // what the nodes had in hand before the first fault
}

func (x *player) play() {
	w, p := x.w, x.r.Plan
	x.terms, x.masked = map[[2]uint64]string{}, map[string]time.Time{}
	w.Found()
	first := w.Offices[0]
	for _, n := range p.Gateways {
		if err := first.Ops().ChangeNode(Ctx(), admin.NodeChange{Name: n, Gateway: new(true)}); err != nil {
			w.tb.Fatal(err)
		}
		w.Office(n).gateway = true
	}
	w.Until("all copies of the domain state are equal", 10*time.Second, w.Equal)
	x.before = w.level()
	w.note("the safety phase begins: %v", p.Kinds)
	begin := time.Now()
	w.keeper.Begin(p.Offices)
	for _, o := range w.Offices {
		o.keepState(map[bool]record.Power{true: record.Away, false: record.On}[o.apart.Load()])
	}
	stop, watching := make(chan struct{}), sync.WaitGroup{}
	watching.Go(func() { x.watch(stop) })
	if p.Follow {
		for _, o := range w.Offices {
			w.readers.Go(func() { w.read(o) })
		}
		w.readers.Go(func() { w.sample(p.Length) })
	}
	for _, e := range p.Events {
		time.Sleep(time.Until(begin.Add(e.At)))
		if w.clock != nil && !p.Follow { // else sample tells it
			w.clock(e.At)
		}
		x.do(e)
	}
	time.Sleep(time.Until(begin.Add(p.Length)))
	x.calm()
	close(stop)
	watching.Wait()
	x.quiet()
	w.stopReading()
	x.checkLevel()
	w.keeper.Stop()
}

// run counts an event and lets f happen beside the others.
func (x *player) run(k Kind, f func()) {
	x.r.Faults[k]++
	x.wg.Go(f)
}

func (x *player) do(e Event) {
	w := x.w
	switch e.Do {
	case EvCut, EvHeal, EvSlow, EvLossy, EvTwice, EvLate, EvFlipped, EvNarrow:
		l := w.Heal(e.A...)
		switch e.Do {
		case EvCut:
			l = w.Cut(e.A...)
		case EvSlow:
			l = w.Slow(e.Span, e.A...)
		case EvLossy:
			l = w.Lossy(float64(e.N)/100, e.A...)
		case EvTwice:
			l = w.Twice(float64(e.N)/100, e.A...)
		case EvLate:
			l = w.Late(float64(e.N)/100, e.A...)
		case EvFlipped:
			l = w.Flipped(float64(e.N)/100, e.A...)
		case EvNarrow:
			l = w.Narrow(e.N, e.A...)
		}
		if e.Way == "one" {
			l.Toward(e.B...)
		} else {
			l.From(e.B...)
		}
		x.r.Faults[e.Do]++
		return
	case EvShut:
		w.note("the outside is shut")
		w.Outside.Shut()
		x.r.Faults[e.Do]++
		return
	case EvOpen:
		w.note("the outside is open")
		w.Outside.Open()
		return
	}
	o := w.Office(e.A[0])
	switch e.Do {
	case EvKill, EvCrashAt:
		var mode, view int
		fmt.Sscanf(e.Way, "%d %d", &mode, &view)
		if !o.Up() {
			return
		}
		x.mask(o, 20*time.Second)
		if e.Do == EvKill {
			x.run(e.Do, func() { o.PowerCut(simfs.Mode(mode), View(view)) })
			return
		}
		x.r.Faults[e.Do]++
		o.CrashAtOp(e.N, simfs.Mode(mode), View(view), func() {
			x.mask(o, 20*time.Second)
			time.Sleep(time.Second)
			o.Start()
		})
	case EvStop:
		if o.Up() {
			x.mask(o, 40*time.Second)
			x.run(e.Do, o.Stop)
		}
	case EvStart:
		x.mask(o, 10*time.Second)
		x.run(e.Do, o.Start)
	case EvFailSync, EvFailWritten:
		if o.Up() {
			x.mask(o, x.r.Plan.Length)
			if e.Do == EvFailSync {
				o.FailSync()
			} else {
				o.FailWrittenSync()
			}
			x.r.Faults[e.Do]++
		}
	case EvSlowDisk:
		x.mask(o, 2*time.Minute)
		if e.Span > 0 {
			x.mask(o, x.r.Plan.Length)
			x.r.Faults[e.Do]++
		}
		o.SlowDisk(e.Span)
	case EvFull:
		x.mask(o, 2*time.Minute)
		if e.N >= 0 {
			x.mask(o, x.r.Plan.Length)
			x.r.Faults[e.Do]++
		}
		o.Fill(int64(e.N))
	case EvClock:
		x.r.Faults[e.Do]++
		o.Clock(e.Span)
	case EvTransfer:
		x.run(e.Do, func() {
			for _, m := range w.Offices {
				if p := m.process(); p != nil && m.Status().Master == m.Name && m != o {
					ctx, cancel := context.WithTimeout(Ctx(), 20*time.Second)
					w.note("the lead goes to %s: %v", o.Name, p.node.Transfer(ctx, o.Name))
					cancel()
					return
				}
			}
		})
	case EvMail:
		x.run(e.Do, func() {
			m := w.Send(e.N).From(e.A[0]).Every(e.Span).Sized(e.Size...)
			if e.Way == "submission" {
				m.By(e.A[0])
			}
			m.To(e.B...)
		})
	case EvWrite:
		x.run(e.Do, func() { x.write(o, fmt.Sprintf("alias-%d@%s", e.N, Domain)) })
	case EvProbe:
		x.run(e.Do, func() { x.probe(o) })
	case EvJoin:
		x.run(e.Do, func() { x.join(o, e.B...) })
	case EvRevoke:
		x.run(e.Do, func() { x.revoke(o) })
	case EvBurn:
		x.run(e.Do, func() { w.Burn(o.Name) })
	case EvPromote:
		x.run(e.Do, func() {
			defer w.decide()()
			if e.Way != "perhaps" {
				x.mustPromote(o)
			} else if !x.promote(o, time.Minute) {
				w.note("%s has a master: nobody promotes it", o.Name)
			}
		})
	case EvImage:
		x.run(e.Do, func() { x.image(o) })
	case EvRestore:
		x.run(e.Do, func() { x.restore(o) })
	case EvLoseDisk:
		x.run(e.Do, func() { x.loseDisk(o, e.Span) })
	}
}

// mask says that an office's local mail may be late for a while.
func (x *player) mask(o *Office, d time.Duration) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if until := time.Now().Add(d); until.After(x.masked[o.Name]) {
		x.masked[o.Name] = until
	}
}

func (x *player) isMasked(o *Office) bool {
	if o.syncTime.Load() > 0 || o.full.Load() { // also where its node is a new one by now
		return true
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	return time.Now().Before(x.masked[o.Name])
}

// probe checks invariant 5: local mail within a second, in whatever split.
func (x *player) probe(o *Office) {
	p := o.process()
	if p == nil || x.isMasked(o) || time.Since(p.began) < 10*time.Second {
		return
	}
	began := time.Now()
	mail := x.w.Send(1).From(o.Name)
	mail.probe = true
	taken := mail.To(o.Name)
	answered := time.Now()
	if o.process() != p || x.isMasked(o) || o.stopped.Load() { // its power fails at this instant
		return
	}
	x.w.checked(LocalMailFlows, 1)
	if taken != 1 {
		x.w.violation(LocalMailFlows, "%s did not take local mail", o.Name)
		return
	}
	time.Sleep(localLimit - time.Since(began))
	b, err := x.w.ledger.glance(o)
	if o.process() != p || x.isMasked(o) {
		return
	}
	if err != nil {
		x.w.violation(LocalMailFlows, "%s's INBOX cannot be read: %v", o.Name, err)
		return
	}
	subject := mail.name + "-0"
	for _, m := range b.Letters {
		if m.Subject == subject {
			return
		}
	}
	x.w.violation(LocalMailFlows, "%s: local mail %s was not there %v after it was sent (answered after %v)", o.Name, subject, time.Since(began), answered.Sub(began))
}

// write asks an office for a change of the domain state. Without a majority in
// reach, from before it asks until it has its answer, none may succeed.
func (x *player) write(o *Office, alias string) {
	p := o.process()
	if p == nil {
		return
	}
	w := x.w
	quorum := func() bool {
		n := len(w.belonging())
		return n < 3 || len(w.component(o)) > min(n-(n+1)%2, 5)/2 || w.promoting.Load() // of four, three vote
	}
	generation := o.Status().Generation
	ctx, cancel := context.WithTimeout(Ctx(), 30*time.Second)
	defer cancel()
	could := quorum()
	done := make(chan error, 1)
	go func() {
		_, err := p.node.CreateAlias(ctx, admin.Alias{Address: alias, Target: o.Name + "@" + Domain})
		done <- err
	}()
	var err error
	for waiting := true; waiting; {
		select {
		case err = <-done:
			waiting = false
		case <-time.After(100 * time.Millisecond):
			could = could || quorum()
		}
	}
	w.checked(OneMaster, 1)
	if err != nil {
		return
	}
	if !could && !quorum() {
		w.violation(OneMaster, "%s wrote domain state without a majority in reach", o.Name)
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	x.writes[alias] = generation
}

// watch looks at all nodes every few seconds: masters, and now and then INBOXes.
func (x *player) watch(stop chan struct{}) {
	since := map[[2]string]time.Time{}
	for i := 0; ; i++ {
		select {
		case <-stop:
			return
		case <-time.After(5 * time.Second):
		}
		for _, o := range x.w.Offices {
			p, s := o.process(), o.Status()
			if p != nil && o.process() == p {
				o.waits(s)
			}
			if s.Master == o.Name && s.Master != "" {
				x.leads(o.Name, s.Generation, s.Term)
			}
		}
		if x.r.Plan.Follow {
			x.detours(since)
		}
		if i%6 == 5 {
			x.w.ledger.Look(x.w.Offices[i/6%len(x.w.Offices)])
		}
	}
}

// leads notes that an office says that it is the master of a term.
func (x *player) leads(office string, generation, term uint64) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.w.checked(OneMaster, 1)
	k := [2]uint64{generation, term}
	was, ok := x.terms[k]
	if !ok {
		x.w.note("%s leads, term %d", office, term)
	}
	if ok && was != office {
		x.w.violation(OneMaster, "%s and %s are both master of term %d", was, office, term)
	}
	x.terms[k] = office
}

// calm ends all faults.
func (x *player) calm() {
	w := x.w
	w.note("the faults end")
	w.keeper.FaultsEnd()
	w.HealAll()
	w.Outside.Open()
	for _, o := range w.Offices {
		o.crashAt.Store(0)
		o.failSync.Store(0)
		if o.full.Load() {
			o.Fill(-1)
		}
		if o.syncTime.Load() != 0 {
			o.SlowDisk(0)
		}
	}
	for _, o := range w.belonging() {
		x.wg.Go(o.Start)
	}
	x.wg.Wait() // load that is under way ends; nothing new comes
	for _, o := range w.belonging() {
		o.Start()
	}
}

// quiet is the liveness phase and the last look.
func (x *player) quiet() {
	w := x.w
	w.checked(HealsInTime, 3)
	took, ok := w.within(agreeLimit, w.whole)
	w.note("all members agree after %v", took)
	if !ok {
		w.explain()
		w.violation(HealsInTime, "the members do not agree %v after all faults ended", took)
		took, ok = w.within(10*time.Minute, w.whole)
		w.note("they agree after %v more: %v", took, ok)
	}
	limit := drainLimit + w.needs()
	took, ok = w.within(limit, w.drained)
	w.note("nothing waits for a node after %v of %v", took, limit)
	if !ok {
		w.explain()
		w.violation(HealsInTime, "mail still waits for a node %v after all members agreed", took)
		took, ok = w.within(10*time.Minute, w.drained)
		w.note("nothing waits for a node after %v more: %v", took, ok)
	}
	w.checked(OneMaster, 1)
	// Raft's back-off towards a node that was cut off grows to some ten seconds.
	if took, ok = w.within(15*time.Second, w.Equal); ok {
		w.note("the copies of the domain state are equal after %v", took)
	} else {
		w.violation(OneMaster, "the copies of the domain state differ")
	}
	for _, o := range w.belonging() {
		aliases, err := o.Ops().Aliases(Ctx())
		if err != nil {
			w.violation(OneMaster, "%s: aliases: %v", o.Name, err)
			continue
		}
		there := map[string]bool{}
		for _, a := range aliases {
			there[a.Address] = true
		}
		for a, generation := range x.writes {
			if generation < w.promoted.Load() {
				continue // of a lineage that ended: it may be lost, and is listed for people
			}
			w.checked(OneMaster, 1)
			if !there[a] {
				w.violation(OneMaster, "%s does not know %s, whose making was answered", o.Name, a)
			}
		}
	}
	began, asked := time.Now(), time.Time{}
	_, ok = w.within(outsideLimit, func() bool {
		if time.Since(asked) > 30*time.Second {
			asked = time.Now()
			for _, o := range w.belonging() {
				if _, err := o.Ops().QueueRetry(Ctx(), admin.QueueAction{All: true}); err != nil {
					w.violation(HealsInTime, "%s: retry: %v", o.Name, err)
				}
			}
		}
		for _, o := range w.belonging() {
			if o.Status().QueueOutside > 0 {
				return false
			}
		}
		return w.drained()
	})
	if !ok {
		w.explain()
		w.violation(HealsInTime, "mail still waits %v after all is well", time.Since(began))
	}
	for _, o := range w.belonging() {
		if n := o.Status().QueueHeld; n > 0 && len(x.outs) == 0 && !o.rolledBack.Load() { // for a revoked node's people, or perhaps sent before
			w.violation(HealsInTime, "%s holds %d recipients' mail", o.Name, n)
		}
	}
	time.Sleep(2 * time.Second)
	x.checkLineage()
	x.checkOuts()
	w.ledger.Check()
}

// drained reports whether nothing waits for a node or a mailbox anywhere.
func (w *World) drained() bool {
	for _, o := range w.belonging() {
		for _, m := range o.Status().Members {
			if m.Queue > 0 {
				return false
			}
		}
	}
	return true
}
