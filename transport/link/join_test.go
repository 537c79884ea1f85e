package link

import (
	"bytes"
	"errors"
	"io"
	"net/netip"
	"testing"
	"time"

	"posthouse/mesh"
	"posthouse/mesh/identity"
)

func TestANewNodeJoinsOnTheSameSocket(t *testing.T) {
	run(t, 2, func(t *testing.T, w *world) {
		a, b := w.nodes[0], w.nodes[1]
		a.SetPeers(a.id, w.peers(b.id))
		b.SetPeers(0, nil) // nobody yet
		w.startAll()
		s := seed(9)
		token, err := identity.NewToken(&s, []mesh.KeyHash{a.key.Hash()})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := b.DialJoin(t.Context(), a.addr, token.Expect); err == nil {
			t.Fatal("joined though nobody listens")
		}
		l, err := a.ListenJoin()
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		if _, err := a.ListenJoin(); err == nil {
			t.Error("two listen for joins")
		}
		admitted := make(chan error, 1)
		go func() {
			j, err := l.Accept(t.Context())
			if err != nil {
				admitted <- err
				return
			}
			defer j.Close()
			sig, err := io.ReadAll(io.LimitReader(j, 64))
			if err == nil {
				err = identity.VerifyProof(token.PublicKey(), j.Exporter, j.Key, sig)
			}
			if err == nil {
				_, err = io.WriteString(j, "welcome")
			}
			admitted <- err
		}()
		j, err := b.DialJoin(t.Context(), a.addr, token.Expect)
		if err != nil {
			t.Fatal(err)
		}
		if j.Key != a.key.Hash() || len(j.Exporter) != 32 || j.Addr != a.addr {
			t.Errorf("joined at %v %v", j.Key, j.Addr)
		}
		j.Write(token.Prove(j.Exporter, b.key.Hash()))
		j.Stream.Close()
		if got, err := io.ReadAll(j); string(got) != "welcome" || err != nil {
			t.Errorf("%q, %v", got, err)
		}
		j.Close()
		if err := <-admitted; err != nil {
			t.Error(err)
		}
		// Both now have the new state.
		a.SetPeers(a.id, w.peers())
		b.SetPeers(b.id, w.peers())
		w.connected()
	})
}

func TestAJoinerDialsOnlyWhomItExpects(t *testing.T) {
	run(t, 2, func(t *testing.T, w *world) {
		a, b := w.nodes[0], w.nodes[1]
		l, err := a.ListenJoin()
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		w.startAll()
		wrong := errors.New("somebody else answered")
		if _, err := b.DialJoin(t.Context(), a.addr, func(mesh.KeyHash) error { return wrong }); !errors.Is(err, wrong) {
			t.Errorf("got %v", err)
		}
		gone := netip.MustParseAddrPort("10.9.9.9:1")
		_, err = b.DialJoin(t.Context(), gone, func(mesh.KeyHash) error { return nil })
		wantErr(t, err, ErrUnreachable)
	})
}

func TestAJoinReachesNothingElseAndEnds(t *testing.T) {
	run(t, 2, func(t *testing.T, w *world) {
		a, b := w.nodes[0], w.nodes[1]
		a.SetPeers(a.id, w.peers(b.id))
		b.SetPeers(0, nil)
		a.echo(t.Context(), "echo/1")
		l, err := a.ListenJoin()
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		w.startAll()
		any := func(mesh.KeyHash) error { return nil }
		j, err := b.DialJoin(t.Context(), a.addr, any)
		if err != nil {
			t.Fatal(err)
		}
		theirs, err := l.Accept(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		// A second stream, made to look like one for a service, is read by nobody.
		st, err := j.conn.OpenStream()
		if err != nil {
			t.Fatal(err)
		}
		st.Write(header{kind: kindService, class: Control, name: "echo/1"}.encode())
		st.Write([]byte("hello"))
		st.SetReadDeadline(time.Now().Add(5 * time.Second))
		if n, err := st.Read(make([]byte, 1)); n != 0 || err == nil {
			t.Error("a service answered a stranger")
		}
		start := time.Now()
		if _, err := io.ReadAll(theirs); err == nil || time.Since(start) > time.Minute {
			t.Errorf("still open after %v: %v", time.Since(start), err)
		}
		if _, err := io.ReadAll(j); err == nil {
			t.Error("still open")
		}
	})
}

func TestJoinsAreBounded(t *testing.T) {
	now := time.Now()
	var g joinGate
	addr := func(i byte) netip.Addr { return netip.AddrFrom4([4]byte{192, 0, 2, i}) }
	for i := range 4 {
		if got := g.enter(now, addr(1), 8); got != (i < joinsFromOne) {
			t.Errorf("join %d from one address: %v", i, got)
		}
	}
	for i := byte(2); i < 20; i++ {
		if got := g.enter(now, addr(i), 8); got != (i < 8) {
			t.Errorf("join %d: %v", i, got)
		}
	}
	g.leave(addr(1))
	if !g.enter(now, addr(9), 8) {
		t.Error("a place that became free is not given")
	}
	n := 0
	for range 100 {
		if g.enter(now, addr(100), 1000) {
			g.leave(addr(100))
			n++
		}
	}
	if n >= joinBurst {
		t.Errorf("%d joins in no time", n)
	}
	if !g.enter(now.Add(2*joinEvery), addr(100), 1000) {
		t.Error("no join after a while")
	}
}

func TestGarbageOnThePortHarmsNobody(t *testing.T) {
	run(t, 3, func(t *testing.T, w *world) {
		a, b, stranger := w.nodes[0], w.nodes[1], w.nodes[2]
		a.SetPeers(a.id, w.peers(stranger.id))
		b.SetPeers(b.id, w.peers(stranger.id))
		a.echo(t.Context(), "echo/1")
		a.start()
		b.start()
		w.until("connected", 3*time.Second, func() bool { return a.up(b.id) && b.up(a.id) })
		for i := range 2000 {
			p := bytes.Repeat([]byte{byte(i)}, 1+i%1300)
			if i%3 == 0 { // looks like the start of a QUIC version 1 connection
				copy(p, []byte{0xc3, 0, 0, 0, 1, 8, 1, 2, 3, 4, 5, byte(i), byte(i >> 8), 8, 0})
			}
			stranger.sock.WriteTo(p, udp(a.addr))
		}
		time.Sleep(time.Minute)
		if got, _, err := b.call(a.id, "echo/1", Control, "x"); got != "x" || err != nil {
			t.Errorf("%q, %v", got, err)
		}
		if n := a.half.Load(); n != 0 {
			t.Errorf("%d half-open connections are left", n)
		}
	})
}
