package deciders

import (
	"strings"
	"testing"
	"time"
)

// A mailbox that came to a node after its image was made comes there anew: under
// numbers that were never used.
func TestAMailboxThatAnImageDoesNotKnowBeginsAnew(t *testing.T) {
	for seed := range uint64(4) {
		p := Plan{Seed: seed, Nodes: 3, Users: 2, Gateways: 0b101, Length: 2 * time.Hour, Latency: 20 * time.Millisecond,
			Faults: []Fault{
				{At: 10 * time.Minute, Kind: OldImage, A: 0b010, Span: 50 * time.Minute},
				{At: 20 * time.Minute, Kind: Home, A: 0b001, N: 0, B: 1},
			}}
		for i := range 60 {
			p.Load = append(p.Load, Load{At: time.Duration(i) * 110 * time.Second, Node: i % 3, From: i % 6, Users: []int{0}, Outside: []int{i % 4 * 10}})
		}
		r := Run(p, Options{Timeline: true})
		for _, v := range r.Violations {
			t.Errorf("seed %d: %s", seed, v)
		}
		if s := strings.Join(r.Timeline, "\n"); r.Faults["restored"] != 1 || !strings.Contains(s, "n1 is taken in anew") {
			t.Errorf("seed %d: n1 was not restored", seed)
		}
	}
}
