package simtest

import (
	"math"
	"math/rand/v2"
	"slices"
	"time"
)

// Clock sets an office's wall clock: from now on it is so much ahead of the right
// time, or behind it if d is negative, also over power cuts and stops. Timers and
// what the observer measures go on as they did.
func (o *Office) Clock(d time.Duration) {
	o.w.note("%s's clock is set %v off", o.Name, d)
	o.clock.Store(int64(d))
}

// now is what an office's wall clock shows, without a monotonic reading: who
// takes the difference of two such times gets what people did to the clock.
func (o *Office) now() time.Time { return time.Now().Round(0).Add(time.Duration(o.clock.Load())) }

// furthest is how far off clocks are at most.
const furthest = 10 * 365 * 24 * time.Hour

// clocks adds clocks that are set. A jump counts for a day at most in the age of
// what waits over a stop (MAIL.md): four of them end no mail to the outside.
func (p *Plan) clocks(r *rand.Rand) {
	if r.IntN(3) != 0 {
		return
	}
	p.Kinds = append(p.Kinds, EvClock)
	for range 1 + r.IntN(4) {
		i := r.IntN(len(p.Offices))
		d := time.Duration(float64(time.Second) * math.Pow(furthest.Seconds(), r.Float64())).Round(time.Second)
		if r.IntN(2) == 0 {
			d = -d
		}
		p.Events = append(p.Events, Event{At: time.Duration(r.Int64N(int64(p.Length))).Round(time.Millisecond), Do: EvClock, A: slices.Clone(p.Offices[i : i+1]), Span: d})
	}
}
