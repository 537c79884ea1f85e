package command

import (
	"testing"

	"posthouse/simtest"
	"posthouse/simtest/scenario"
)

// A stolen node goes on running and talking after it was revoked, while the
// others change the domain and write to its people.
func TestARevokedOfficeThatGoesOnRunningGetsNothing(t *testing.T) {
	s, problems := scenario.Parse(`title = "A stolen node"
length = "10 min"
[[office]]
name = "hq"
[[office]]
name = "plzen"
[[office]]
name = "praha"
[[office]]
name = "brno"
[[event]]
at = "1 min"
revoke = "brno"
[[event]]
at = "2 min"
change = ["hq", "plzen"]
by = "20 s"
for = "3 min"
[[event]]
at = "3 min"
send = 60
from = ["hq", "plzen", "praha"]
to = "brno"
for = "3 min"
`)
	if len(problems) > 0 {
		t.Fatal(problems)
	}
	r := simtest.Run(t, s.Plan(1, false), simtest.Watcher{})
	for _, v := range r.Violations {
		t.Error(v)
	}
	if v := r.Record.Verdicts[simtest.RevokedIsOut-1]; v.Checked < 60 || v.Says() != "held" {
		t.Errorf("%s: %s, %d checks", v.Text, v.Says(), v.Checked)
	}
}
