package capacity_test

import (
	"cmp"
	"fmt"
	"slices"
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
		runs      int // of which the median counts: now and then a loss at the start costs a narrow line 20 s
	}{{64_000, 300, 3}, {256_000, 900, 1}, {1_000_000, 3000, 1}} {
		t.Run(fmt.Sprintf("%d kbit/s", tc.bandwidth/1000), func(t *testing.T) {
			p := simtest.Plan{Seed: 1, Offices: []string{"hq", "plzen"}, Latency: latency, Length: first + cut + 3*time.Minute, Follow: true,
				Lines: []simtest.Line{{A: "hq", B: "plzen", Quality: simtest.Quality{Latency: latency, Bandwidth: tc.bandwidth}}},
				Events: []simtest.Event{
					{At: first, Do: simtest.EvCut, A: []string{"hq"}, B: []string{"plzen"}, Way: "both"},
					{At: first, Do: simtest.EvMail, A: []string{"hq"}, B: []string{"plzen"}, Way: "port25", N: tc.each, Span: cut / time.Duration(tc.each)},
					{At: first, Do: simtest.EvMail, A: []string{"plzen"}, B: []string{"hq"}, Way: "port25", N: tc.each, Span: cut / time.Duration(tc.each)},
					{At: first + cut, Do: simtest.EvHeal, A: []string{"hq"}, B: []string{"plzen"}},
				}}
			var took []time.Duration
			for range tc.runs {
				took = append(took, lastDelivery(t, p)-first-cut)
			}
			slices.Sort(took)
			got := took[tc.runs/2]
			m := capacity.Model{Seed: 1, Offices: 2, Rate: float64(tc.each) / cut.Seconds(), Size: size, Bandwidth: float64(tc.bandwidth), Latency: latency,
				Length: cut, Cut: true, To: cut}
			want := m.Run().Drained
			t.Logf("%d messages each way were there %v after the heal; the model says %v (%.2f)", tc.each, got.Round(time.Millisecond), want.Round(time.Millisecond), got.Seconds()/want.Seconds())
			if off := got.Seconds() - want.Seconds(); off > 0.35*want.Seconds()+3 || -off > 0.35*want.Seconds()+3 {
				t.Errorf("%v and %v", got, want)
			}
		})
	}
}

// lastDelivery plays a plan with packets and returns when the last message came.
func lastDelivery(t *testing.T, p simtest.Plan) (at time.Duration) {
	t.Helper()
	r := simtest.Run(t, p, simtest.Watcher{})
	for _, v := range r.Violations {
		t.Error(v)
	}
	for _, d := range r.Record.Deliveries {
		at = max(at, d.At)
	}
	return at
}

// size is what a message of simtest's clients has on average.
const size = 210

// What the model was not fitted to: three offices, messages of 40 kB, another
// rate, another bandwidth and a cut of twenty minutes. The packet-level lines
// join two offices each; the model has one line an office, so it gets the two of
// an office together.
func TestTheModelHoldsWhereItWasNotFitted(t *testing.T) {
	const cut, first, latency, each, bytes, bandwidth = 20 * time.Minute, 30 * time.Second, 35 * time.Millisecond, 70, 40_000, 700_000
	offices := []string{"hq", "plzen", "praha"}
	p := simtest.Plan{Seed: 2, Offices: offices, Latency: latency, Length: first + cut + 3*time.Minute, Follow: true, Size: bytes,
		Events: []simtest.Event{{At: first, Do: simtest.EvCut, A: []string{"hq"}, B: []string{"plzen", "praha"}, Way: "both"},
			{At: first + cut, Do: simtest.EvHeal, A: []string{"hq"}, B: []string{"plzen", "praha"}}}}
	for i, a := range offices {
		for k, b := range offices {
			if a < b {
				p.Lines = append(p.Lines, simtest.Line{A: a, B: b, Quality: simtest.Quality{Latency: latency, Bandwidth: bandwidth}})
			}
			if a != b {
				p.Events = append(p.Events, simtest.Event{At: first + time.Duration(1+3*i+k)*time.Second, Do: simtest.EvMail, A: []string{a}, B: []string{b}, Way: "port25", N: each, Span: (cut - time.Minute) / each})
			}
		}
	}
	slices.SortStableFunc(p.Events, func(a, b simtest.Event) int { return cmp.Compare(a.At, b.At) })
	got := lastDelivery(t, p) - first - cut
	m := capacity.Model{Seed: 1, Offices: 3, Rate: 2 * each / cut.Seconds(), Size: bytes, Bandwidth: 2 * bandwidth, Latency: latency, Length: cut, Cut: true, To: cut}
	o := m.Run()
	want := o.Drained
	t.Logf("%d messages of %d bytes each way of each pair were there %v after the heal; the model says %v (%.2f); %d waited in it, %.1f MB", each, bytes, got.Round(time.Millisecond), want.Round(time.Millisecond), got.Seconds()/want.Seconds(), o.Waiting, o.Bytes/1e6)
	// A dozen runs took 45 to 52 s: how long the first connection needs differs, and
	// bulk holds back as the line's delay grows. The model knows neither.
	if off := got.Seconds() - want.Seconds(); off > 0.4*want.Seconds()+6 || -off > 0.3*want.Seconds() {
		t.Errorf("%v and %v", got, want)
	}
}
