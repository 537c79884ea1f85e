package command

import (
	"testing"
	"time"

	"posthouse/simtest"
	"posthouse/simtest/report"
	"posthouse/simtest/scenario"
)

// Each scenario that ships is played short: at most an hour of virtual time.
func TestTheScenariosThatShip(t *testing.T) {
	for _, name := range scenario.Shipped() {
		t.Run(name, func(t *testing.T) {
			s, err := open(name)
			if err != nil {
				t.Fatal(err)
			}
			p := s.Plan(s.Seed, true)
			if p.Length > time.Hour {
				t.Errorf("it takes %v", p.Length)
			}
			r := simtest.Run(t, p, simtest.Watcher{})
			for _, v := range r.Violations {
				t.Error(v)
			}
			if t.Failed() {
				for _, l := range append(r.Story, r.Logs...) {
					t.Log(l)
				}
				return
			}
			t.Log(report.Sentence(r.Record))
			for _, v := range r.Record.Verdicts {
				if must := map[string]int{"burnt-branch": 9, "one-line": 10, "two-offices": 10}[name]; v.Checked == 0 && (v.Number < 9 && v.Number != 2 || v.Number == must) {
					t.Errorf("invariant %d, %s: %s", v.Number, v.Text, v.Says())
				}
			}
			t.Logf("%v of virtual time in %v", r.Record.Length.Round(time.Second), r.Record.Took.Round(100*time.Millisecond))
		})
	}
}
