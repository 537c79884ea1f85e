package link

import (
	"sync"
	"sync/atomic"
	"time"

	"github.com/quic-go/quic-go"
)

// pacer keeps bulk from filling the buffers on a path: congestion control by itself
// fills them (SmoothedRTT far above MinRTT), and then votes and pings wait behind
// mail. It slows writers down before QUIC sees the bytes.
//
// All bulk streams of a connection share one. They take turns by position: the bytes
// that wait are numbered in the order in which their writers came, and the line
// advances over them with the allowed rate, which may change while they wait.
type pacer struct {
	stats func() quic.ConnectionStats
	moved atomic.Int64  // when bytes last came or went in any of the streams, in nanoseconds since 1970
	heard atomic.Uint64 // bytes that came

	mu    sync.Mutex
	speed speed
	line  float64   // how many bytes may have been sent by now
	taken float64   // how many have a number
	now   time.Time // of line
	last  time.Time // of the last look at the path
	sent  uint64    // BytesSent then
	lost  uint64    // BytesLost then
	wait  time.Duration
}

// newPacer starts at half of what the last connection to the peer had learnt; 0: nothing.
func newPacer(limit time.Duration, conn *quic.Conn, learnt float64) *pacer {
	rate := float64(rateStart)
	if learnt > 0 {
		rate = max(learnt/2, rateFloor)
	}
	return &pacer{stats: conn.ConnectionStats, speed: speed{limit: limit, rate: rate, growing: true}}
}

// learnt is what the path carries, as far as it was seen; 0: nothing was.
func (p *pacer) learnt() float64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.speed.growing && p.speed.rate <= rateStart {
		return 0
	}
	return p.speed.rate
}

const (
	rateStart = 8 << 10 // bytes/s, on a path of which nothing is known: doubles with each round trip
	rateFloor = 4 << 10
	rateMax   = 1 << 30 // above, nobody waits
	paceTick  = 2 * time.Millisecond
	paceLong  = 250 * time.Millisecond // longest nap of one that waits
	quantum   = 50 * time.Millisecond  // of line time in one chunk
	packet    = 1280                   // bytes of a full one
	burst     = 8 << 10                // what is sent at once on a path of which nothing is known: a second of 64 kbit/s
)

// speed is the decider: pure, so that it is tested step by step.
type speed struct {
	limit   time.Duration // of the delay that we may cause
	rate    float64       // bytes/s allowed
	growing bool          // doubles until the path has shown its limit once
}

// step takes in what happened since the last step: for how long, how many bytes were
// sent and lost, and the delay on the path now.
//
// The delay of the smallest packets is what it is compared with; what a full one
// takes by itself, on a narrow line more than the limit, is no queue.
func (s *speed) step(dt, delay time.Duration, sent, lost uint64) {
	delay -= time.Duration(packet / s.rate * float64(time.Second))
	measured := float64(sent-min(lost, sent)) / dt.Seconds()
	switch {
	case delay > s.limit, lost > sent/5:
		s.growing = false
		// What got through is what the line carries; a fifth below it the queue drains.
		s.rate = max(rateFloor, 0.8*min(s.rate, max(measured, rateFloor)))
	case delay < s.limit/2 && measured > s.rate/2: // only a rate that is used can be judged
		if s.growing {
			s.rate *= 2
		} else {
			s.rate *= 1.1
		}
		s.rate = min(s.rate, 2*rateMax)
	}
}

// advance needs p.mu.
func (p *pacer) advance(now time.Time) {
	if dt := now.Sub(p.last); dt >= max(p.wait, paceTick) {
		st := p.stats()
		if !p.last.IsZero() {
			p.speed.step(dt, st.SmoothedRTT-st.MinRTT, st.BytesSent-p.sent, st.BytesLost-p.lost)
		}
		// What is sent at a new rate takes a round trip to be sent and one to be heard of.
		p.last, p.sent, p.lost, p.wait = now, st.BytesSent, st.BytesLost, min(st.SmoothedRTT, time.Second)
		if p.speed.growing {
			p.wait *= 2
		}
	}
	p.line += p.speed.rate * now.Sub(p.now).Seconds()
	p.now = now
	// What was not used is saved up a little, so that a short burst after a pause does
	// not wait: on a path whose limit is known only what that sends in a quantum.
	saved := p.speed.rate * quantum.Seconds()
	if p.speed.growing {
		saved = max(saved, min(chunk, max(burst, p.speed.rate/4)))
	}
	if p.line > p.taken+saved || p.speed.rate >= rateMax {
		p.line = p.taken + saved
	}
}

// reads notes that n bytes came.
func (p *pacer) reads(n int) {
	p.heard.Add(uint64(n))
	p.moves(n)
}

// moves notes that n bytes came or went.
func (p *pacer) moves(n int) {
	if n > 0 {
		p.moved.Store(time.Now().UnixNano())
	}
}

// stands returns for how long nothing has come or gone.
func (p *pacer) stands() time.Duration { return time.Since(time.Unix(0, p.moved.Load())) }

// take numbers the next of n bytes and returns how many, and the number of the first.
func (p *pacer) take(now time.Time, n int) (int, float64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.advance(now)
	n = min(n, chunk)
	if p.speed.rate < rateMax {
		n = min(n, max(1200, int(p.speed.rate*quantum.Seconds())))
	}
	first := p.taken
	p.taken += float64(n)
	return n, first
}

// due returns how long to wait for the byte with that number; 0 is now. It is asked
// again after at most that time, because the rate may have risen.
func (p *pacer) due(now time.Time, number float64) time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.advance(now)
	wait := time.Duration((number - p.line) / p.speed.rate * float64(time.Second))
	switch {
	case wait < time.Millisecond: // below what timers can do; the debt stays in line
		return 0
	case wait > 4*time.Millisecond:
		return min(wait/2, paceLong)
	}
	return wait
}

// write writes all of b in chunks, each in its time.
func (p *pacer) write(st *quic.Stream, b []byte) (written int, err error) {
	for {
		n, number := p.take(time.Now(), len(b))
		for wait := p.due(time.Now(), number); wait > 0; wait = p.due(time.Now(), number) {
			nap := time.NewTimer(wait)
			select {
			case <-nap.C:
			case <-st.Context().Done(): // Write knows why
				nap.Stop()
				m, err := st.Write(b[:n])
				return written + m, err
			}
		}
		m, err := st.Write(b[:n])
		p.moves(m)
		written += m
		if b = b[m:]; err != nil || len(b) == 0 {
			return written, err
		}
	}
}
