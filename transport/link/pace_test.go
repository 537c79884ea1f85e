package link

import (
	"fmt"
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
		s.step(50*time.Millisecond, 0, uint64(s.rate/20), 0)
	}
	if s.rate != rateStart*64 {
		t.Errorf("after six free steps %v", s.rate)
	}
	before := s.rate
	s.step(50*time.Millisecond, 0, 100, 0) // hardly used: says nothing
	if s.rate != before {
		t.Errorf("an unused rate grew to %v", s.rate)
	}
	const line = 1 << 18
	s.step(time.Second, limit+10*time.Millisecond, line, 0) // full at 256 KiB/s
	if s.rate != 0.8*line || s.growing {
		t.Errorf("after a full queue %v", s.rate)
	}
	s.step(time.Second, limit*3/4, line, 0) // in between: stays
	if s.rate != 0.8*line {
		t.Errorf("in between %v", s.rate)
	}
	s.step(time.Second, 0, line, 0) // free again: carefully
	if got := s.rate / (0.8 * line); got < 1.05 || got > 1.15 {
		t.Errorf("grew by %v", got)
	}
	before = s.rate
	s.step(time.Second, 0, line, line/8) // an eighth is lost, as on a line by radio
	if s.rate <= before {
		t.Errorf("sank to %v for a little loss", s.rate)
	}
	s.step(time.Second, 0, line, line/2) // a buffer that is full at once
	if s.rate != 0.8*line/2 {
		t.Errorf("after much was lost %v", s.rate)
	}
	for range 1000 {
		s.step(time.Second, time.Hour, 0, 0)
	}
	if s.rate != rateFloor {
		t.Errorf("sank to %v", s.rate)
	}
	for range 20 { // 64 kbit/s: a full packet takes 160 ms, and that is no queue
		s.step(time.Second, 160*time.Millisecond, uint64(s.rate), 0)
	}
	if s.rate < 8<<10 || s.rate > 16<<10 {
		t.Errorf("on a narrow line %v", s.rate)
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

// Lines with room for any number of packets: bulk uses most of them, and does not
// fill them. A second connection starts with what the first has learnt.
func TestBulkLeavesTheLineUsableForOthers(t *testing.T) {
	for _, tc := range []struct {
		rate  float64 // bytes a second
		size  int
		share float64       // of the line that bulk has at least,
		later float64       // on a second connection,
		worst time.Duration // and a small answer beside it takes at most
	}{
		{500_000, 10 << 20, 0.8, 0.88, 400 * time.Millisecond},
		{64_000, 1 << 20, 0.65, 0.8, time.Second},
		{8_000, 160 << 10, 0.7, 0.65, 2500 * time.Millisecond}, // one packet takes 160 ms
	} {
		t.Run(fmt.Sprintf("%.0f kbit a second", tc.rate*8/1000), func(t *testing.T) {
			bulkBeside(t, tc.rate, tc.size, tc.share, tc.later, tc.worst)
		})
	}
}

func bulkBeside(t *testing.T, rate float64, size int, share, later float64, most time.Duration) {
	run(t, 2, func(t *testing.T, w *world) {
		a, b := w.nodes[0], w.nodes[1]
		b.stop()
		b = w.makeOn(2, b.addr, 1, narrow(rate))
		w.nodes[1] = b
		b.SetPeers(b.id, w.peers())
		b.echo(t.Context(), "echo/1")
		l := b.listen("sink/1")
		w.startAll()
		w.connected()
		send := func(size int, beside func()) (took time.Duration) {
			start := time.Now()
			c, err := a.Dial(t.Context(), b.id, "sink/1", Bulk)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			go func() {
				c.Write(make([]byte, size))
				c.CloseWrite()
			}()
			done := make(chan struct{})
			go func() {
				defer close(done)
				c, err := l.Accept(t.Context())
				if err != nil {
					return
				}
				defer c.Close()
				if got, _ := io.Copy(io.Discard, c); got != int64(size) {
					t.Errorf("%d of %d bytes came", got, size)
				}
			}()
			beside()
			<-done
			return time.Since(start)
		}
		worst := time.Duration(0)
		took := send(size, func() {
			time.Sleep(2 * time.Second)
			for range 15 {
				t0 := time.Now()
				if _, _, err := a.call(b.id, "echo/1", Control, "x"); err != nil {
					t.Fatal(err)
				}
				worst = max(worst, time.Since(t0))
				time.Sleep(time.Second)
			}
		})
		time.Sleep(2 * bulkIdle) // its connection ends
		again := send(size/10, func() {})
		used := func(size int, took time.Duration) float64 { return float64(size) / rate / took.Seconds() }
		t.Logf("%.0f %% of the line, a tenth of that later %.0f %%; worst answer %v", 100*used(size, took), 100*used(size/10, again), worst)
		if used(size, took) < share || used(size/10, again) < later {
			t.Errorf("%d bytes took %v, and a tenth of that later %v", size, took, again)
		}
		if worst > most {
			t.Errorf("an answer took %v beside bulk", worst)
		}
	})
}
