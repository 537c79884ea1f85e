package link

import (
	"io"
	"sync"
	"testing"
	"time"

	"github.com/quic-go/quic-go/testutils/simnet"
)

func TestSpeedFollowsThePath(t *testing.T) {
	const limit = 150 * time.Millisecond
	s := speed{limit: limit, rate: rateStart, growing: true}
	for range 6 { // the path has room: doubles
		s.step(50*time.Millisecond, 0, uint64(s.rate/20))
	}
	if s.rate != rateStart*64 {
		t.Errorf("after six free steps %v", s.rate)
	}
	before := s.rate
	s.step(50*time.Millisecond, 0, 100) // hardly used: says nothing
	if s.rate != before {
		t.Errorf("an unused rate grew to %v", s.rate)
	}
	s.step(time.Second, limit+1, 1<<20) // full at 1 MiB/s
	if s.rate != 0.8*(1<<20) || s.growing {
		t.Errorf("after a full queue %v", s.rate)
	}
	s.step(time.Second, limit*3/4, 1<<20) // in between: stays
	if s.rate != 0.8*(1<<20) {
		t.Errorf("in between %v", s.rate)
	}
	s.step(time.Second, 0, 1<<20) // free again: carefully
	if got := s.rate / (0.8 * (1 << 20)); got < 1.05 || got > 1.15 {
		t.Errorf("grew by %v", got)
	}
	for range 1000 {
		s.step(time.Second, time.Hour, 0)
	}
	if s.rate != rateFloor {
		t.Errorf("sank to %v", s.rate)
	}
}

// narrow is a line of so many bytes a second with room for any number of packets.
func narrow(rate float64) simnet.NodeBiDiLinkSettings {
	var mu sync.Mutex
	var free time.Time
	return simnet.NodeBiDiLinkSettings{LatencyFunc: func(p simnet.Packet) time.Duration {
		mu.Lock()
		defer mu.Unlock()
		now := time.Now()
		if free.Before(now) {
			free = now
		}
		free = free.Add(time.Duration(float64(len(p.Data)) / rate * float64(time.Second)))
		return latency + free.Sub(now)
	}}
}

// A line of 4 Mbit/s with room for seconds of packets: bulk must not fill it.
func TestBulkLeavesTheLineUsableForOthers(t *testing.T) {
	run(t, 2, func(t *testing.T, w *world) {
		a, b := w.nodes[0], w.nodes[1]
		b.stop()
		b = w.makeOn(2, b.addr, 1, narrow(500_000))
		w.nodes[1] = b
		b.SetPeers(b.id, w.peers())
		b.echo(t.Context(), "echo/1")
		l := b.listen("sink/1")
		var got int64
		done := make(chan struct{})
		go func() {
			defer close(done)
			c, err := l.Accept(t.Context())
			if err != nil {
				return
			}
			defer c.Close()
			got, _ = io.Copy(io.Discard, c)
		}()
		w.startAll()
		w.connected()
		c, err := a.Dial(t.Context(), b.id, "sink/1", Bulk)
		if err != nil {
			t.Fatal(err)
		}
		const size = 10 << 20 // 21 s of the line
		go func() {
			c.Write(make([]byte, size))
			c.CloseWrite()
		}()
		start := time.Now()
		var worst time.Duration
		time.Sleep(2 * time.Second)
		for range 15 {
			t0 := time.Now()
			if _, _, err := a.call(b.id, "echo/1", Control, "x"); err != nil {
				t.Fatal(err)
			}
			worst = max(worst, time.Since(t0))
			time.Sleep(time.Second)
		}
		<-done
		c.Close()
		took := time.Since(start)
		t.Logf("worst answer %v, %d bytes in %v (%.0f %% of the line)", worst, got, took, 100*float64(got)*8/4e6/took.Seconds())
		if got != size || took > 40*time.Second {
			t.Errorf("%d bytes in %v", got, took)
		}
		if worst > 400*time.Millisecond {
			t.Errorf("an answer took %v beside bulk", worst)
		}
	})
}
