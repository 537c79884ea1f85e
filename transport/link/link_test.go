package link

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"posthouse/mesh"
)

func TestTwoNodesConnectAndTalk(t *testing.T) {
	run(t, 2, func(t *testing.T, w *world) {
		a, b := w.nodes[0], w.nodes[1]
		b.echo(t.Context(), "echo/1")
		w.startAll()
		if d := w.connected(); d > 5*2*latency {
			t.Errorf("took %v", d)
		}
		for _, class := range []Class{Control, Bulk} {
			got, via, err := a.call(b.id, "echo/1", class, "hello")
			if got != "hello" || via != 0 || err != nil {
				t.Errorf("got %q via %v, %v", got, via, err)
			}
		}
		_, _, err := a.call(b.id, "other/1", Control, "hello")
		wantErr(t, err, ErrNoService)
		_, _, err = a.call(77, "echo/1", Control, "hello")
		wantErr(t, err, ErrNotAdmitted)
		if p := a.Peers(); len(p) != 1 || p[0].RTT < 2*latency || p[0].Addr != b.addr {
			t.Errorf("%+v", p)
		}
		if _, _, learned := a.seen(); len(learned) == 0 || learned[0] != b.addr {
			t.Errorf("learned %v", learned)
		}
		b.stop()
		w.until("a notices the goodbye", 3*latency, func() bool { return !a.up(b.id) })
	})
}

func TestSimultaneousDialsLeaveOneConnection(t *testing.T) {
	run(t, 2, func(t *testing.T, w *world) {
		a, b := w.nodes[0], w.nodes[1]
		w.startAll()
		w.connected()
		time.Sleep(5 * latency)
		if len(a.sessions(b.id)) != 2 {
			t.Errorf("%d connections at first; this test wants to see both", len(a.sessions(b.id)))
		}
		time.Sleep(linger + time.Second)
		for _, n := range []*node{a, b} {
			s := n.sessions(3 - n.id)
			if len(s) != 1 || s[0].dialer != a.id {
				t.Errorf("node %d: %d connections, want the one dialled by the smaller", n.id, len(s))
			}
			if events, _, _ := n.seen(); len(events) != 1 {
				t.Errorf("node %d saw %v", n.id, events)
			}
		}
	})
}

func TestACutIsNoticedAndAHealIsUsed(t *testing.T) {
	for _, cut := range []time.Duration{20 * time.Second, 20 * time.Minute} {
		run(t, 2, func(t *testing.T, w *world) {
			a, b := w.nodes[0], w.nodes[1]
			w.startAll()
			w.connected()
			time.Sleep(time.Minute)
			w.cutBetween(a, b)
			d := w.until("the cut is noticed", 17*time.Second, func() bool { return !a.up(b.id) && !b.up(a.id) })
			if d > 16*time.Second {
				t.Errorf("noticed after %v", d)
			}
			_, _, err := a.call(b.id, "echo/1", Control, "x")
			wantErr(t, err, ErrUnreachable)
			time.Sleep(cut)
			w.setCut(nil)
			if d := w.connected(); d > 4*time.Second+6*latency {
				t.Errorf("connected %v after the heal", d)
			}
		})
	}
}

func TestAfterAnHourAPeerIsDialledLessButAHintHelps(t *testing.T) {
	run(t, 2, func(t *testing.T, w *world) {
		a, b := w.nodes[0], w.nodes[1]
		w.startAll()
		w.connected()
		w.cutBetween(a, b)
		time.Sleep(2 * time.Hour)
		w.setCut(nil)
		if d := w.until("connected", 32*time.Second, func() bool { return a.up(b.id) && b.up(a.id) }); d < time.Second {
			t.Logf("lucky: %v", d)
		}
		w.cutBetween(a, b)
		time.Sleep(2 * time.Hour)
		w.setCut(nil)
		a.Hint(b.id)
		if d := w.connected(); d > 8*latency {
			t.Errorf("connected %v after the hint", d)
		}
	})
}

func TestRevocationClosesAtOnceAndRefuses(t *testing.T) {
	run(t, 3, func(t *testing.T, w *world) {
		a, b, c := w.nodes[0], w.nodes[1], w.nodes[2]
		l := b.listen("hold/1")
		w.startAll()
		w.connected()
		s, err := a.Dial(t.Context(), b.id, "hold/1", Bulk)
		if err != nil {
			t.Fatal(err)
		}
		held, err := l.Accept(t.Context())
		if err != nil || held.Peer() != a.id {
			t.Fatal(held, err)
		}
		b.SetPeers(b.id, w.peers(a.id))
		for _, c := range []net.Conn{held, s} {
			c.SetReadDeadline(time.Now().Add(time.Second))
		}
		if _, err := held.Read(make([]byte, 1)); err == nil || err == io.EOF || errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("b reads from a revoked node: %v", err)
		}
		w.until("a is told", 2*latency, func() bool { return !a.up(b.id) })
		_, err = s.Read(make([]byte, 1))
		wantErr(t, err, ErrNotAdmitted)
		s.Close()
		held.Close()
		b.mu.Lock()
		b.unknown = nil
		b.mu.Unlock()
		time.Sleep(10 * time.Minute)
		if _, unknown, _ := b.seen(); a.up(b.id) || !slices.Contains(unknown, a.key.Hash()) {
			t.Error("a got in again, or nobody was told of its attempts")
		}
		if !a.up(c.id) || !b.up(c.id) {
			t.Error("c lost somebody")
		}
		wantErr(t, b.SendDatagram(a.id, []byte("x")), ErrNotAdmitted)
		b.SetPeers(b.id, w.peers())
		w.until("admitted again", 5*time.Second, func() bool { return a.up(b.id) && b.up(a.id) })
	})
}

func TestARebootReplacesTheOldConnectionAtOnce(t *testing.T) {
	run(t, 2, func(t *testing.T, w *world) {
		a, b := w.nodes[0], w.nodes[1]
		a.echo(t.Context(), "echo/1")
		w.startAll()
		w.connected()
		time.Sleep(time.Minute)
		a.mu.Lock()
		a.events = nil
		a.mu.Unlock()
		b = w.reboot(1, b.addr, 2)
		if d := w.until("b up", time.Second, func() bool { return b.up(a.id) && len(a.sessions(b.id)) == 1 && len(b.sessions(a.id)) == 1 }); d > 6*latency {
			t.Errorf("took %v", d)
		}
		if got, _, err := b.call(a.id, "echo/1", Control, "x"); got != "x" || err != nil {
			t.Errorf("%q, %v", got, err)
		}
		time.Sleep(time.Second)
		if events, _, _ := a.seen(); len(events) == 0 || events[len(events)-1] != "up 2" {
			t.Errorf("a saw %v: the queue is not woken", events)
		}
	})
}

func TestNodesThatSwapTheirAddressesAreStillThemselves(t *testing.T) {
	run(t, 3, func(t *testing.T, w *world) {
		w.startAll()
		w.connected()
		time.Sleep(20 * time.Second)
		b, c := w.nodes[1], w.nodes[2]
		oldB, oldC := b.addr, c.addr
		w.setCut(func(from, to netip.AddrPort) bool { return from == oldB || from == oldC })
		b.stop()
		c.stop()
		w.setCut(nil)
		// The others still know the old addresses.
		known := w.peers()
		b, c = w.make(2, oldC, 2), w.make(3, oldB, 2)
		w.nodes[1], w.nodes[2] = b, c
		for _, n := range []*node{b, c} {
			n.SetPeers(n.id, known)
			n.echo(t.Context(), "echo/1")
		}
		b.start()
		c.start()
		a := w.nodes[0]
		w.until("connected", 5*time.Second, func() bool { return a.up(2) && a.up(3) && b.up(1) && c.up(1) })
		for _, n := range []*node{b, c} {
			if got, _, err := w.nodes[0].call(n.id, "echo/1", Control, "x"); got != "x" || err != nil {
				t.Errorf("%q, %v", got, err)
			}
		}
		for _, p := range w.nodes[0].Peers() {
			if want := map[mesh.NodeID]netip.AddrPort{2: oldC, 3: oldB}[p.ID]; p.Addr != want {
				t.Errorf("node %d is at %v, want %v", p.ID, p.Addr, want)
			}
		}
	})
}

func TestAWrongAddressInTheDomainStateDisturbsNobody(t *testing.T) {
	run(t, 3, func(t *testing.T, w *world) {
		a, b := w.nodes[0], w.nodes[1]
		peers := w.peers()
		peers[2].Addrs = []netip.AddrPort{b.addr}
		a.SetPeers(a.id, peers)
		a.start()
		b.start() // the third stays down
		w.connected()
		time.Sleep(20 * time.Second)
		before := a.sessions(b.id)
		time.Sleep(10 * time.Minute)
		if after := a.sessions(b.id); len(before) != 1 || !slices.Equal(before, after) {
			t.Errorf("the connection was changed: %d, then %d", len(before), len(after))
		}
		start := time.Now()
		_, _, err := a.call(3, "echo/1", Control, "x")
		wantErr(t, err, ErrUnreachable)
		if d := time.Since(start); d > time.Second || !strings.Contains(err.Error(), "another node is at its address") {
			t.Errorf("after %v: %v", d, err)
		}
	})
}

func TestAPeerMayBeRefusedByItsFacts(t *testing.T) {
	run(t, 2, func(t *testing.T, w *world) {
		a, b := w.nodes[0], w.nodes[1]
		b.build(Config{}, func(peer mesh.NodeID, its Facts) error {
			if peer == a.id && its.BootCount < 2 && string(its.Lineage) == "L1" {
				return errors.New("node plzen went back in time")
			}
			return nil
		})
		b.SetPeers(b.id, w.peers())
		w.startAll()
		time.Sleep(20 * time.Second)
		if a.up(b.id) || b.up(a.id) {
			t.Error("connected")
		}
		if p := a.Peers(); !strings.Contains(p[0].Err, "went back in time") {
			t.Errorf("a is not told why: %+v", p)
		}
		a.mu.Lock()
		a.facts.BootCount = 2
		a.mu.Unlock()
		w.connected()
	})
}

func TestFortyPeersConnectAtOnce(t *testing.T) {
	run(t, 41, func(t *testing.T, w *world) {
		hub := w.nodes[0]
		for _, n := range w.nodes[1:] {
			n.SetPeers(n.id, w.peers()[:1])
		}
		w.startAll()
		w.until("all connected", 8*time.Second, func() bool {
			for _, p := range hub.Peers() {
				if !p.Connected {
					return false
				}
			}
			return true
		})
	})
}

func TestASlowServiceDelaysNoOther(t *testing.T) {
	run(t, 2, func(t *testing.T, w *world) {
		a, b := w.nodes[0], w.nodes[1]
		b.build(Config{Backlog: 64}, nil)
		b.SetPeers(b.id, w.peers())
		b.echo(t.Context(), "echo/1")
		l := b.listen("slow/1")
		w.startAll()
		w.connected()
		var held []*Conn
		for range 64 + 1 {
			c, err := a.Dial(t.Context(), b.id, "slow/1", Control)
			if err != nil {
				t.Fatal(err)
			}
			held = append(held, c)
			time.Sleep(time.Millisecond)
		}
		_, err := held[64].Read(make([]byte, 1))
		wantErr(t, err, ErrBusy)
		if got, _, err := a.call(b.id, "echo/1", Control, "x"); got != "x" || err != nil {
			t.Errorf("%q, %v", got, err)
		}
		l.Close()
		_, err = held[0].Read(make([]byte, 1))
		wantErr(t, err, ErrNoService)
		_, err = l.Accept(t.Context())
		wantErr(t, err, ErrClosed)
		for _, c := range held {
			c.Close()
		}
		for _, n := range w.nodes {
			for _, s := range n.sessions(3 - n.id) {
				w.until("streams are given back", time.Second, func() bool { return s.streams.Load() == 0 })
			}
		}
	})
}

func TestStreamsAboveTheLimitWait(t *testing.T) {
	run(t, 2, func(t *testing.T, w *world) {
		a, b := w.nodes[0], w.nodes[1]
		b.build(Config{Streams: 4, Backlog: 100}, nil)
		b.SetPeers(b.id, w.peers())
		b.listen("hold/1")
		w.startAll()
		w.connected()
		time.Sleep(time.Second)
		var last error
		for range 6 {
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			_, last = a.Dial(ctx, b.id, "hold/1", Control)
			cancel()
			if last != nil {
				break
			}
		}
		wantErr(t, last, ErrBusy)
	})
}

func TestClosingDuringAWriteCutsItOff(t *testing.T) {
	run(t, 2, func(t *testing.T, w *world) {
		a, b := w.nodes[0], w.nodes[1]
		l := b.listen("sink/1")
		w.startAll()
		w.connected()
		c, err := a.Dial(t.Context(), b.id, "sink/1", Control)
		if err != nil {
			t.Fatal(err)
		}
		failed := make(chan error)
		go func() {
			_, err := c.Write(make([]byte, 64<<20)) // more than any window
			failed <- err
		}()
		held, err := l.Accept(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second)
		c.Close()
		wantErr(t, <-failed, ErrClosed)
		_, err = io.Copy(io.Discard, held)
		wantErr(t, err, ErrReset)
		held.Close()
	})
}

func TestAnUnusedBulkConnectionEnds(t *testing.T) {
	run(t, 2, func(t *testing.T, w *world) {
		a, b := w.nodes[0], w.nodes[1]
		b.echo(t.Context(), "echo/1")
		w.startAll()
		w.connected()
		if _, _, err := a.call(b.id, "echo/1", Bulk, "x"); err != nil {
			t.Fatal(err)
		}
		time.Sleep(bulkIdle + time.Second)
		synctest.Wait()
		if s := a.sessions(b.id); len(s) != 1 || s[0].class != Control {
			t.Errorf("%d connections are left", len(s))
		}
		if _, _, err := a.call(b.id, "echo/1", Bulk, "x"); err != nil {
			t.Fatal(err)
		}
	})
}

func TestNothingWorksWithoutRun(t *testing.T) {
	run(t, 2, func(t *testing.T, w *world) {
		a, b := w.nodes[0], w.nodes[1]
		_, _, err := a.call(b.id, "echo/1", Control, "x")
		wantErr(t, err, ErrClosed)
		_, err = a.DialJoin(t.Context(), b.addr, func(mesh.KeyHash) error { return nil })
		wantErr(t, err, ErrClosed)
		a.start()
		a.stop()
		_, _, err = a.call(b.id, "echo/1", Control, "x")
		wantErr(t, err, ErrClosed)
		if err := a.Run(t.Context()); err == nil {
			t.Error("Run ran twice")
		}
	})
}

func TestSettingsThatMakeNoSenseAreRefused(t *testing.T) {
	for name, cfg := range map[string]Config{
		"idle timeout below three keep-alives": {IdleTimeout: 5 * time.Second},
		"negative":                             {Streams: -1},
	} {
		if _, err := New(cfg, Deps{}); err == nil || !strings.HasPrefix(err.Error(), "link: ") {
			t.Errorf("%s: %v", name, err)
		}
	}
}
