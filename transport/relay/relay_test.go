package relay

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"posthouse/mailstore/log"
	"posthouse/mesh"
	"posthouse/transport"
	"posthouse/transport/queue"
)

type (
	ctx  = context.Context
	conn = net.Conn
)

const (
	origin mesh.NodeID = 1
	gw1    mesh.NodeID = 2
	gw2    mesh.NodeID = 3
)

var toGateway = transport.Destination{Scope: transport.ScopeGateway}

func far(a string) transport.Recipient { return transport.Recipient{Address: a} }

func user(a string) transport.Recipient {
	r := transport.Recipient{Address: a}
	copy(r.Mailbox[:], a)
	return r
}

func (w *world) quiet() (bad []string) {
	for id, n := range w.nodes {
		rows, err := n.q.List()
		if err != nil {
			w.t.Fatal(err)
		}
		for _, r := range rows {
			bad = append(bad, fmt.Sprintf("node %d still has %+v", id, r))
		}
	}
	return bad
}

// outsideRun plays the life of three outside messages of one origin, with a
// crash of the victim at a point, and reports whether that point was met.
func outsideRun(t *testing.T, victim mesh.NodeID, crashAt int, swap bool, down time.Duration) (met bool) {
	met = true
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, origin, gw1, gw2)
		w.gateways = []mesh.NodeID{gw1, gw2}
		w.victim, w.crashAt = victim, crashAt
		for _, n := range []mesh.NodeID{origin, gw1, gw2} {
			w.nodes[n].start()
		}
		for i := range byte(3) {
			w.nodes[origin].accept(i, toGateway, far("x@a.example"), far("y@b.example"))
		}
		select {
		case <-w.crash:
			if swap {
				w.mu.Lock()
				w.gateways = []mesh.NodeID{gw2, gw1}
				w.mu.Unlock()
			}
			w.nodes[victim].kill()
			time.Sleep(down)
			w.nodes[victim].start()
		case <-time.After(time.Minute):
			met = false // the life of the messages has fewer points
		}
		time.Sleep(time.Hour)
		synctest.Wait()
		w.mu.Lock()
		for i := range 3 {
			for _, a := range []string{"x@a.example", "y@b.example"} {
				k := fmt.Sprintf("%d %s", i, a)
				if w.sent[k] != 1 {
					t.Errorf("crash of %d at %d, swap %v, down %v: %s was sent %d times", victim, crashAt, swap, down, k, w.sent[k])
				}
			}
		}
		w.mu.Unlock()
		if t.Failed() {
			t.Log(strings.Join(w.trace, "\n"))
		}
		for _, bad := range w.quiet() {
			t.Errorf("crash of %d at %d, swap %v, down %v: %s", victim, crashAt, swap, down, bad)
		}
		for _, n := range w.nodes {
			n.kill()
		}
	})
	return met
}

func TestOutsideMailIsSentExactlyOnceWhateverCrashesWherever(t *testing.T) {
	for _, victim := range []mesh.NodeID{origin, gw1} {
		k := 0
		for ; ; k++ {
			met := outsideRun(t, victim, k, false, time.Second)
			if outsideRun(t, victim, k, true, 10*time.Minute); t.Failed() {
				return
			}
			if !met {
				break
			}
		}
		if k < 10 {
			t.Fatalf("only %d points", k)
		}
	}
}

func TestAPersonDeclaresAGatewayLost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, origin, gw1, gw2)
		w.gateways = []mesh.NodeID{gw1, gw2}
		w.victim, w.crashAt = gw1, 2 // before Let: kept, released at the origin, never tried
		for _, n := range []mesh.NodeID{origin, gw1, gw2} {
			w.nodes[n].start()
		}
		w.nodes[origin].accept(1, toGateway, far("x@a.example"))
		<-w.crash
		w.nodes[gw1].kill()
		time.Sleep(time.Hour)
		if len(w.tried()) != 0 {
			t.Fatal("sent by whom?", w.tried())
		}
		n, err := w.nodes[origin].q.ReleaseFrom(t.Context(), gw1)
		if n != 1 || err != nil {
			t.Fatal(n, err)
		}
		time.Sleep(time.Hour)
		if diff := cmp.Diff(map[string]int{"1 x@a.example": 1}, w.tried()); diff != "" {
			t.Error(diff)
		}
		w.nodes[gw1].start() // it comes back after all, asks, and drops its copy
		time.Sleep(time.Hour)
		if diff := cmp.Diff(map[string]int{"1 x@a.example": 1}, w.tried()); diff != "" {
			t.Error(diff)
		}
		if bad := w.quiet(); bad != nil {
			t.Error(bad)
		}
		for _, n := range w.nodes {
			n.kill()
		}
	})
}

// Nobody can say any more whether another gateway got it: a person decides.
func TestWhatIsKeptForAnOriginThatWasPutOutIsSetAside(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, origin, gw1)
		w.gateways = []mesh.NodeID{gw1}
		w.victim, w.crashAt = origin, 1 // kept at the gateway, not released
		w.nodes[origin].start()
		w.nodes[gw1].start()
		w.nodes[origin].accept(1, toGateway, far("x@a.example"))
		<-w.crash
		w.nodes[origin].kill()
		time.Sleep(time.Hour)
		kept, err := w.nodes[gw1].q.Kept(origin, 0, 10)
		if len(kept) != 1 || err != nil {
			t.Fatal(kept, err)
		}
		w.mu.Lock()
		w.out = origin
		w.mu.Unlock()
		time.Sleep(askEvery + time.Second)
		synctest.Wait()
		rows, err := w.nodes[gw1].q.List()
		if err != nil || len(rows) != 1 || rows[0].Aside != 1 || len(w.tried()) != 0 {
			t.Error(rows, err, w.tried())
		}
		w.nodes[gw1].kill()
	})
}

// homes starts an origin and one home whose mailboxes answer by f.
func homes(t *testing.T, f func(env transport.Envelope, r transport.Recipient, text string) transport.Result) (*world, *node) {
	w := newWorld(t, origin, gw1)
	w.nodes[gw1].home = func(env transport.Envelope, rcpts []transport.Recipient, body *log.Draft) ([]transport.Result, error) {
		br, err := body.Open()
		if err != nil {
			return nil, err
		}
		text, err := io.ReadAll(br)
		if err != nil {
			return nil, err
		}
		var rs []transport.Result
		w.mu.Lock()
		defer w.mu.Unlock()
		for _, r := range rcpts {
			rs = append(rs, f(env, r, string(text)))
		}
		return rs, nil
	}
	w.nodes[origin].start()
	w.nodes[gw1].start()
	return w, w.nodes[origin]
}

func TestMessagesToAHomeArriveInOrderWithATrace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var got []string
		w, o := homes(t, func(env transport.Envelope, r transport.Recipient, text string) transport.Result {
			got = append(got, fmt.Sprintf("%d %s hops %d %s", env.ID[0], r.Address, env.Hops, text[strings.Index(text, "Subject"):]))
			if !strings.HasPrefix(text, "Received: from n1.ours.example by n2.ours.example with QUIC\r\n\tid ") {
				t.Error(text)
			}
			return transport.Result{Outcome: transport.Delivered}
		})
		dest := transport.Destination{Scope: transport.ScopeNode, Node: gw1}
		var want []string
		for i := range byte(200) {
			o.accept(i, dest, user("bob@ours.example"))
			want = append(want, fmt.Sprintf("%d bob@ours.example hops 1 Subject: %d\r\n\r\nbody of %d\r\n", i, i, i))
		}
		synctest.Wait()
		if diff := cmp.Diff(want, got); diff != "" {
			t.Error(diff)
		}
		time.Sleep(time.Minute)
		if bad := w.quiet(); bad != nil {
			t.Error(bad)
		}
		o.kill()
		w.nodes[gw1].kill()
	})
}

func TestADeferralOnAStreamHoldsBackWhatIsBehindIt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var got []string
		var full atomic.Bool
		full.Store(true)
		w, o := homes(t, func(env transport.Envelope, r transport.Recipient, _ string) transport.Result {
			if full.Load() && env.ID[0] == 1 && r.Address == "bob@ours.example" {
				return transport.Result{Outcome: transport.Deferred, Code: 452, Enhanced: "4.2.2", Text: "full"}
			}
			got = append(got, fmt.Sprintf("%d %s", env.ID[0], r.Address))
			return transport.Result{Outcome: transport.Delivered}
		})
		dest := transport.Destination{Scope: transport.ScopeNode, Node: gw1}
		for i := range byte(4) {
			o.accept(i, dest, user("bob@ours.example"), user("carl@ours.example"))
		}
		synctest.Wait()
		full.Store(false)
		time.Sleep(2 * time.Minute)
		w.mu.Lock()
		defer w.mu.Unlock()
		bob := 0
		for i, s := range got {
			if strings.HasSuffix(s, "bob@ours.example") {
				if s[0] != byte('0'+bob) {
					t.Fatalf("out of order: %v", got[:i+1])
				}
				bob++
			}
		}
		if bob != 4 || len(got) != 8 {
			t.Error(got)
		}
		w.mu.Unlock()
		if bad := w.quiet(); bad != nil {
			t.Error(bad)
		}
		o.kill()
		w.nodes[gw1].kill()
		w.mu.Lock()
	})
}

func TestMovedNamesTheHome(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, o := homes(t, func(transport.Envelope, transport.Recipient, string) transport.Result {
			return transport.Result{Outcome: transport.Moved}
		})
		src := &oneLeg{leg: &transport.Leg{Envelope: transport.Envelope{ID: transport.MessageID{1}, EntryNode: origin, Origin: transport.OriginSubmission},
			Rcpts: []transport.Recipient{user("bob@ours.example")}, Body: text("Subject: x\r\n\r\n")}}
		if err := o.r.Carry(t.Context(), transport.Destination{Scope: transport.ScopeNode, Node: gw1}, src); err != nil {
			t.Fatal(err)
		}
		want := []transport.Result{{Outcome: transport.Moved, Home: 9, Version: 4, By: "n2.ours.example"}}
		if diff := cmp.Diff(want, src.results); diff != "" {
			t.Error(diff)
		}
		o.kill()
		w.nodes[gw1].kill()
	})
}

type oneLeg struct {
	leg     *transport.Leg
	results []transport.Result
}

func (o *oneLeg) Next(ctx) (*transport.Leg, error) {
	if o.leg == nil {
		return nil, io.EOF
	}
	l := o.leg
	o.leg = nil
	return l, nil
}
func (o *oneLeg) Finish(_ *transport.Leg, rs []transport.Result) { o.results = rs }

type text string

func (x text) Size() int64 { return int64(len(x)) }
func (x text) Open() (transport.BodyReader, error) {
	return struct {
		*strings.Reader
		io.Closer
	}{strings.NewReader(string(x)), io.NopCloser(nil)}, nil
}

// A large message takes minutes on a narrow line, or on a wide one that many share:
// as long as bytes go out, or come in, nobody gives up.
func TestALargeMessageGetsThroughANarrowLineAtOnce(t *testing.T) {
	const size, rate = 400 << 10, 4 << 10
	for _, deep := range []bool{false, true} {
		t.Run(fmt.Sprintf("deep buffer %v", deep), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w, o := homes(t, func(transport.Envelope, transport.Recipient, string) transport.Result {
					return transport.Result{Outcome: transport.Delivered}
				})
				if deep {
					w.arrives = rate
				} else {
					w.rate = rate
				}
				src := &oneLeg{leg: &transport.Leg{Envelope: transport.Envelope{ID: transport.MessageID{1}, EntryNode: origin, Origin: transport.OriginSubmission},
					Rcpts: []transport.Recipient{user("bob@ours.example")}, Body: text(strings.Repeat("0123456789abcd\r\n", size/16))}}
				at := time.Now()
				if err := o.r.Carry(t.Context(), toHome, src); err != nil || len(src.results) != 1 {
					t.Fatal(err, src.results)
				}
				if took, least := time.Since(at), size/rate*time.Second; took < least || took > least+least/20 {
					t.Errorf("took %v, the line %v", took, least)
				}
				o.kill()
				w.nodes[gw1].kill()
			})
		})
	}
}

func TestASilentPeerFailsAfterFiveSecondsAndASlowOneDoesNot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		hang := func() { time.Sleep(time.Until(start.Add(time.Minute))) }
		w, o := homes(t, func(transport.Envelope, transport.Recipient, string) transport.Result {
			hang()
			return transport.Result{Outcome: transport.Delivered}
		})
		leg := func() *oneLeg {
			return &oneLeg{leg: &transport.Leg{Envelope: transport.Envelope{ID: transport.MessageID{1}, EntryNode: origin, Origin: transport.OriginSubmission},
				Rcpts: []transport.Recipient{user("bob@ours.example")}, Body: text(strings.Repeat("x\r\n", 1<<20))}}
		}
		src := leg()
		at := time.Now()
		if err := o.r.Carry(t.Context(), transport.Destination{Scope: transport.ScopeNode, Node: gw1}, src); err != nil || len(src.results) != 1 {
			t.Fatal(err, src.results)
		}
		if d := time.Since(at); d != time.Minute {
			t.Error(d)
		}
		a, b := newPipe() // nobody reads or writes at the other end
		o.r.d.Dial = func(ctx, mesh.NodeID, string) (conn, error) { return a, nil }
		at = time.Now()
		src = leg()
		err := o.r.Carry(t.Context(), transport.Destination{Scope: transport.ScopeNode, Node: gw1}, src)
		if err == nil || time.Since(at) != progress || src.results != nil {
			t.Error(err, time.Since(at), src.results)
		}
		b.Close()
		o.kill()
		w.nodes[gw1].kill()
	})
}

func TestWhatAPeerCannotKnowIsRefused(t *testing.T) {
	ok := func() legFrame {
		return legFrame{Envelope: transport.Envelope{ID: transport.MessageID{1}, From: "a@b.example", EntryNode: origin, Origin: transport.OriginSubmission},
			Rcpts: []transport.Recipient{user("bob@ours.example")}}
	}
	member := func(n mesh.NodeID) bool { return n == origin || n == gw1 }
	for name, change := range map[string]func(f *legFrame){
		"no id":                          func(f *legFrame) { f.Envelope.ID = transport.MessageID{} },
		"entered at another node":        func(f *legFrame) { f.Envelope.EntryNode = gw1 },
		"entered at a stranger":          func(f *legFrame) { f.Envelope.EntryNode, f.Envelope.Hops = 77, 1 },
		"goes round":                     func(f *legFrame) { f.Envelope.Hops = 25 },
		"negative hops":                  func(f *legFrame) { f.Envelope.Hops = -1 },
		"unknown origin":                 func(f *legFrame) { f.Envelope.Origin = 9 },
		"no sender address":              func(f *legFrame) { f.Envelope.From = "a@b>\r\nRCPT TO:<x@y" },
		"a recipient twice":              func(f *legFrame) { f.Rcpts = append(f.Rcpts, f.Rcpts[0]) },
		"an outside recipient at a home": func(f *legFrame) { f.Rcpts[0] = far("x@a.example") },
	} {
		t.Run(name, func(t *testing.T) {
			f := ok()
			if bad := f.check(origin, false, member); bad != nil {
				t.Fatal("the control is refused:", bad)
			}
			change(&f)
			if f.check(origin, false, member) == nil {
				t.Error("accepted")
			}
		})
	}
}

func FuzzFrames(f *testing.F) {
	for _, v := range []struct {
		kind byte
		v    any
	}{
		{frameLeg, &legFrame{N: 1, Envelope: transport.Envelope{ID: transport.MessageID{1}, EntryTime: time.Unix(0, 0)}, Rcpts: []transport.Recipient{user("a@b.example")}, Size: 3}},
		{frameFates, &fatesFrame{N: 1, Fates: []transport.Fate{{Kept: true}}}},
		{frameAsk, &askFrame{N: 1, Legs: []transport.KeptLeg{{ID: transport.MessageID{1}, Keys: []string{"x"}}}}},
		{frameFinals, &finalsFrame{N: 1, Finals: []transport.FinalResult{{Key: "x", Result: transport.Result{Outcome: transport.Relayed}}}}},
		{frameStanding, &standingFrame{N: 1, Standings: [][]transport.Standing{{1, 2}}}},
	} {
		b, err := appendFrame(nil, v.kind, v.v)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Add([]byte{frameLeg, 0xff, 0xff, 0xff, 0xff})
	f.Fuzz(func(t *testing.T, b []byte) {
		r := bytes.NewReader(b)
		var buf []byte
		for {
			kind, p, err := readFrame(r, buf)
			if err != nil {
				return
			}
			buf = p
			for _, v := range []any{&legFrame{}, &endFrame{}, &releaseFrame{}, &finalsFrame{}, &askFrame{}, &resultsFrame{}, &fatesFrame{}, &doneFrame{}, &standingFrame{}} {
				if decode(p, v) == nil {
					if l, ok := v.(*legFrame); ok {
						l.check(1, kind == frameOffer, func(mesh.NodeID) bool { return true })
					}
				}
			}
		}
	})
}

var _ Gateway = (*queue.Queue)(nil)
var _ Origin = (*queue.Queue)(nil)
