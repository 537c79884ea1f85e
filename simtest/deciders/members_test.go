package deciders

import (
	"strings"
	"testing"
	"time"
)

// Its connections stand for a moment longer: what comes in by them is not
// believed, and nothing goes out to it.
func TestANodeThatWasPutOutGetsNothingThroughAndNothingMore(t *testing.T) {
	for seed := range uint64(4) {
		p := Plan{Seed: seed, Nodes: 3, Users: 2, Gateways: 0b101, Length: time.Hour, Latency: 20 * time.Millisecond,
			Faults: []Fault{{At: 10 * time.Minute, Kind: Revoke, A: 0b010, B: 1, Span: 10 * time.Minute}}}
		for i := range 200 {
			l := Load{At: 10*time.Minute + time.Duration(i-50)*50*time.Millisecond, Node: i % 3, From: i % 6, Users: []int{i / 3 % 6}}
			if i%5 == 0 {
				l.Outside = []int{i % 4 * 10}
			}
			p.Load = append(p.Load, l)
		}
		r := Run(p, Options{Timeline: true})
		for _, v := range r.Violations {
			t.Errorf("seed %d: %s", seed, v)
		}
		if s := strings.Join(r.Timeline, "\n"); !strings.Contains(s, "n1 deferred") || !strings.Contains(s, "not known here yet") {
			t.Errorf("seed %d: nothing of the revoked node's came while its connections stood", seed)
		}
	}
}
