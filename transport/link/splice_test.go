package link

import (
	"bytes"
	"context"
	"crypto/tls"
	"io"
	"net/netip"
	"os"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/quic-go/quic-go/testutils/simnet"
)

func TestACutPairTalksThroughAThirdWhoReadsNothing(t *testing.T) {
	run(t, 4, func(t *testing.T, w *world) {
		a, b, c, d := w.nodes[0], w.nodes[1], w.nodes[2], w.nodes[3]
		c.echo(t.Context(), "echo/1")
		// d is connected to nobody but a, and is no way to c.
		w.setCut(func(from, to netip.AddrPort) bool {
			return from == a.addr && to == c.addr || from == c.addr && to == a.addr ||
				from == d.addr && to != a.addr || to == d.addr && from != a.addr
		})
		canary := strings.Repeat("CANARY in plain sight! ", 2000)
		var mu sync.Mutex
		seen := false
		w.mu.Lock()
		w.tap = func(p simnet.Packet) {
			mu.Lock()
			defer mu.Unlock()
			seen = seen || bytes.Contains(p.Data, []byte("CANARY"))
		}
		w.mu.Unlock()
		w.startAll()
		w.until("connected", 3*time.Second, func() bool { return a.up(b.id) && c.up(b.id) && a.up(d.id) })
		for _, class := range []Class{Control, Bulk} {
			got, via, err := a.call(c.id, "echo/1", class, canary)
			if got != canary || via != b.id || err != nil {
				t.Fatalf("%d bytes via %v, %v", len(got), via, err)
			}
		}
		mu.Lock()
		inTheClear := seen
		mu.Unlock()
		if inTheClear {
			t.Error("the canary crossed the network in the clear")
		}
		for _, p := range a.Peers() {
			if p.ID == c.id && (p.Connected || p.Via != b.id) {
				t.Errorf("%+v", p)
			}
		}
		_, _, err := a.call(c.id, "other/1", Control, "x")
		wantErr(t, err, ErrNoService)
		// b carries nothing any more.
		w.until("b has let go", time.Second, func() bool {
			b.Endpoint.mu.Lock()
			defer b.Endpoint.mu.Unlock()
			return b.carried == 0 && len(b.splices) == 0
		})
		for _, n := range []*node{a, c} {
			n.Endpoint.mu.Lock()
			for _, p := range n.peers {
				if len(p.spliced) > 0 {
					t.Errorf("node %d still notes spliced streams", n.id)
				}
			}
			n.Endpoint.mu.Unlock()
		}
		// The way through b ends with b.
		a.SetPeers(a.id, w.peers(b.id))
		for _, p := range a.Peers() {
			if p.ID == c.id && p.Via != 0 {
				t.Errorf("b is gone, yet %+v", p)
			}
		}
	})
}

func TestTheFarEndOfASpliceTakesNothingButTLS(t *testing.T) {
	run(t, 3, func(t *testing.T, w *world) {
		a, b, c := w.nodes[0], w.nodes[1], w.nodes[2]
		c.echo(t.Context(), "echo/1")
		w.startAll()
		w.connected()
		s := a.sessions(b.id)[0]
		st, err := s.openStream(t.Context(), header{kind: kindVia, class: Control, node: c.id})
		if err != nil {
			t.Fatal(err)
		}
		defer st.Close()
		io.WriteString(st, "GET / HTTP/1.1\r\n\r\n")
		st.SetReadDeadline(time.Now().Add(10 * time.Second))
		if _, err := io.ReadAll(st); err == nil {
			t.Error("a spliced stream without TLS was served")
		}
	})
}

func TestSplicedStreamsNameTheirRealPeerAndDieWithIt(t *testing.T) {
	for _, tt := range []struct {
		name   string
		revoke func(a, b, c *node) // how the pair a, c is torn apart
	}{
		{"the target is revoked at the node in between", func(a, b, c *node) { b.SetPeers(b.id, b.w.peers(c.id)) }},
		{"the target is revoked at the dialler", func(a, b, c *node) { a.SetPeers(a.id, a.w.peers(c.id)) }},
		{"the dialler is revoked at the target", func(a, b, c *node) { c.SetPeers(c.id, c.w.peers(a.id)) }},
		{"the dialler is revoked at the node in between", func(a, b, c *node) { b.SetPeers(b.id, b.w.peers(a.id)) }},
		{"the node in between stops", func(a, b, c *node) { b.stop() }},
		{"the dialler stops", func(a, b, c *node) { a.stop() }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			run(t, 3, func(t *testing.T, w *world) {
				a, b, c := w.nodes[0], w.nodes[1], w.nodes[2]
				l := c.listen("hold/1")
				w.cutBetween(a, c)
				w.startAll()
				w.until("connected", 3*time.Second, func() bool { return a.up(b.id) && b.up(a.id) && c.up(b.id) && b.up(c.id) })
				ours, err := a.DialVia(t.Context(), b.id, c.id, "hold/1", Bulk)
				if err != nil {
					t.Fatal(err)
				}
				theirs, err := l.Accept(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				if theirs.Peer() != a.id || theirs.Via() != b.id || ours.Peer() != c.id || ours.RemoteAddr().String() != Addr(c.id).String() {
					t.Errorf("peer %v via %v", theirs.Peer(), theirs.Via())
				}
				// What b handles is what goes through under: TLS 1.3 with c's key.
				inner := ours.tls.ConnectionState()
				if key, err := a.key.Peer(inner); inner.Version != tls.VersionTLS13 || key != c.key.Hash() || err != nil {
					t.Errorf("inside is %x with %v, %v", inner.Version, key, err)
				}
				start := time.Now()
				tt.revoke(a, b, c)
				for _, s := range []*Conn{ours, theirs} {
					s.SetReadDeadline(time.Now().Add(time.Minute))
					if n, err := s.Read(make([]byte, 1)); n != 0 || err == nil || err == io.EOF {
						t.Errorf("%v can still be read: %v", s.Peer(), err)
					}
					s.Close()
				}
				if d := time.Since(start); d > 6*latency {
					t.Errorf("the stream lived on for %v", d)
				}
			})
		})
	}
}

// In a bubble who waits for another's Close waits for ever: virtual time stands
// still meanwhile.
func TestClosingASplicedStreamAgainDoesNotWaitForTheFirst(t *testing.T) {
	run(t, 3, func(t *testing.T, w *world) {
		a, b, c := w.nodes[0], w.nodes[1], w.nodes[2]
		l := c.listen("hold/1")
		w.startAll()
		w.connected()
		s, err := a.DialVia(t.Context(), b.id, c.id, "hold/1", Control)
		if err != nil {
			t.Fatal(err)
		}
		far, err := l.Accept(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer far.Close()
		// Nobody reads: the window fills, then the last packet before it, until
		// there is no room for TLS's goodbye either.
		for _, size := range []int{64 << 20, 1} {
			s.SetWriteDeadline(time.Now().Add(time.Minute))
			for err = nil; err == nil; {
				_, err = s.under.Write(make([]byte, size))
			}
			wantErr(t, err, os.ErrDeadlineExceeded)
		}
		first := make(chan time.Duration)
		start := time.Now()
		go func() {
			s.Close()
			first <- time.Since(start)
		}()
		synctest.Wait()
		s.Close()
		s.Reset()
		if d := time.Since(start); d != 0 {
			t.Errorf("the second took %v", d)
		}
		if d := <-first; d == 0 {
			t.Error("the first had nothing to wait for: this test shows nothing")
		}
	})
}

func TestAThirdNodeThatLostTheTargetIsNotUsed(t *testing.T) {
	run(t, 3, func(t *testing.T, w *world) {
		a, b, c := w.nodes[0], w.nodes[1], w.nodes[2]
		w.startAll()
		w.connected()
		c.stop()
		// Its goodbye may be lost with its socket.
		w.until("the others know", 20*time.Second, func() bool { return !a.up(c.id) && !b.up(c.id) })
		start := time.Now()
		_, _, err := a.call(c.id, "echo/1", Control, "x")
		wantErr(t, err, ErrUnreachable)
		if d := time.Since(start); d > directWait+time.Second {
			t.Errorf("took %v", d)
		}
		_, err = a.DialVia(t.Context(), b.id, c.id, "echo/1", Control)
		wantErr(t, err, ErrUnreachable)
	})
}

func TestWhoIsNotAdmittedAtTheTargetGetsNoSplice(t *testing.T) {
	run(t, 3, func(t *testing.T, w *world) {
		a, b, c := w.nodes[0], w.nodes[1], w.nodes[2]
		c.echo(t.Context(), "echo/1")
		c.SetPeers(c.id, w.peers(a.id))
		w.startAll()
		w.until("connected", 3*time.Second, func() bool { return a.up(b.id) && b.up(c.id) && c.up(b.id) })
		_, _, err := a.call(c.id, "echo/1", Control, "x")
		wantErr(t, err, ErrNotAdmitted)
	})
}

func TestANodeCarriesABoundedNumberOfStreams(t *testing.T) {
	run(t, 3, func(t *testing.T, w *world) {
		a, b, c := w.nodes[0], w.nodes[1], w.nodes[2]
		c.listen("hold/1")
		w.startAll()
		w.connected()
		var err error
		var held []*Conn
		for range 16 + 1 {
			var s *Conn
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			if s, err = a.DialVia(ctx, b.id, c.id, "hold/1", Control); err == nil {
				held = append(held, s)
			}
			cancel()
		}
		wantErr(t, err, ErrBusy)
		if len(held) != 16 {
			t.Errorf("%d carried for one peer", len(held))
		}
		for _, s := range held {
			s.Close()
		}
	})
}
