package capacity

import (
	"math"
	"testing"
	"time"
)

// near reports whether two durations differ by at most a share.
func near(a, b time.Duration, share float64) bool {
	return math.Abs(float64(a-b)) <= share*float64(b)
}

// Two offices, one line each way: what waits before it is M/D/1.
func TestWaitingBeforeALineIsAsTheorySays(t *testing.T) {
	for _, load := range []float64{0.3, 0.6, 0.8, 0.9} {
		m := Model{Seed: 1, Offices: 2, Size: 10_000, Bandwidth: 1e6, Length: 12 * time.Hour}
		service := seconds(Wire(m.Size) * 8 / m.Bandwidth)
		m.Rate = load / service.Seconds()
		got, want := m.Run().Mean-service, WaitMD1(m.Rate, service)
		if !near(got, want, 0.1) {
			t.Errorf("load %.1f: waited %v, M/D/1 says %v", load, got, want)
		}
	}
}

func TestAQueueDrainsAsTheFluidLimitSays(t *testing.T) {
	for _, load := range []float64{0.2, 0.5, 0.8} {
		m := Model{Seed: 1, Offices: 2, Size: 10_000, Bandwidth: 1e6, Length: 9 * time.Hour, Cut: true, From: time.Hour, To: 4 * time.Hour}
		service := seconds(Wire(m.Size) * 8 / m.Bandwidth)
		m.Rate = load / service.Seconds()
		// What waited goes before what comes later: the line is first in, first out,
		// so the last of the waiting is gone after λT/μ; the line is calm after λT/(μ-λ).
		got, want := m.Run().Drained, seconds(load*3*3600)
		if !near(got, want, 0.05) {
			t.Errorf("load %.1f: drained after %v, the fluid limit says %v", load, got, want)
		}
		if calm := Drain(3*time.Hour, m.Rate, service); !near(calm, seconds(3*3600*load/(1-load)), 0.001) {
			t.Errorf("load %.1f: calm after %v", load, calm)
		}
	}
}

func TestMoreThanALineTakesNeverDrains(t *testing.T) {
	if WaitMD1(2, time.Second) != math.MaxInt64 || Drain(time.Hour, 2, time.Second) != math.MaxInt64 {
		t.Error("an overloaded line has an end")
	}
}

func TestEqualSeedsGiveEqualRuns(t *testing.T) {
	m := Model{Seed: 7, Offices: 9, Rate: 0.2, Size: 50_000, Bandwidth: 4e6, Latency: 10 * time.Millisecond, Length: 3 * time.Hour, Cut: true, From: time.Hour, To: 2 * time.Hour}
	if a, b := m.Run(), m.Run(); a != b {
		t.Errorf("%+v and %+v", a, b)
	}
}

func TestADayOfFiveHundredOffices(t *testing.T) {
	c := Company{Offices: 500, People: 20, Mail: 30, Size: 60_000, Inside: 0.3, Outside: 0.4, Bandwidth: 20e6, Latency: 15 * time.Millisecond, Cut: 24 * time.Hour, Seed: 1}
	began := time.Now()
	a := c.Answer()
	t.Logf("%d messages in %v: %+v", a.Simulated.Messages, time.Since(began).Round(time.Millisecond), a)
	if a.Thinned {
		t.Error("it was thinned")
	}
	if float64(a.Simulated.Waiting) < 0.9*a.Waiting || float64(a.Simulated.Waiting) > 1.1*a.Waiting {
		t.Errorf("%d waited, the shares say %.0f", a.Simulated.Waiting, a.Waiting)
	}
	if sum := func() (s float64) {
		for _, h := range day {
			s += h
		}
		return
	}(); math.Abs(sum-100) > 0.01 {
		t.Errorf("a day has %.2f %% of its mail", sum)
	}
}
