package capacity_test

import (
	"fmt"
	"testing"
	"time"

	"posthouse/simtest"
	"posthouse/simtest/capacity"
)

// Two offices behind a narrow line that is cut while both write: what the model
// says of the time until all is there, and what whole nodes do.
func TestTheModelAgreesWithPackets(t *testing.T) {
	const cut, first, latency = 5 * time.Minute, 30 * time.Second, 20 * time.Millisecond
	for _, tc := range []struct {
		bandwidth int64
		each      int // messages written at each office in the cut
	}{{64_000, 300}, {256_000, 900}, {1_000_000, 3000}} {
		t.Run(fmt.Sprintf("%d kbit/s", tc.bandwidth/1000), func(t *testing.T) {
			p := simtest.Plan{Seed: 1, Offices: []string{"hq", "plzen"}, Latency: latency, Length: first + cut + 3*time.Minute, Follow: true,
				Lines: []simtest.Line{{A: "hq", B: "plzen", Quality: simtest.Quality{Latency: latency, Bandwidth: tc.bandwidth}}},
				Events: []simtest.Event{
					{At: first, Do: simtest.EvCut, A: []string{"hq"}, B: []string{"plzen"}, Way: "both"},
					{At: first, Do: simtest.EvMail, A: []string{"hq"}, B: []string{"plzen"}, Way: "port25", N: tc.each, Span: cut / time.Duration(tc.each)},
					{At: first, Do: simtest.EvMail, A: []string{"plzen"}, B: []string{"hq"}, Way: "port25", N: tc.each, Span: cut / time.Duration(tc.each)},
					{At: first + cut, Do: simtest.EvHeal, A: []string{"hq"}, B: []string{"plzen"}},
				}}
			r := simtest.Run(t, p, simtest.Watcher{})
			for _, v := range r.Violations {
				t.Error(v)
			}
			var last time.Duration
			for _, d := range r.Record.Deliveries {
				last = max(last, d.At)
			}
			got := last - first - cut
			m := capacity.Model{Seed: 1, Offices: 2, Rate: float64(tc.each) / cut.Seconds(), Size: size, Bandwidth: float64(tc.bandwidth), Latency: latency,
				Length: cut, Cut: true, To: cut}
			want := m.Run().Drained
			t.Logf("%d messages each way were there %v after the heal; the model says %v (%.2f)", tc.each, got.Round(time.Millisecond), want.Round(time.Millisecond), got.Seconds()/want.Seconds())
			if off := got.Seconds() - want.Seconds(); off > 0.3*want.Seconds()+3 || -off > 0.3*want.Seconds()+3 {
				t.Errorf("%v and %v", got, want)
			}
		})
	}
}

// size is what a message of simtest's clients has on average.
const size = 210
