package scenario

import (
	"slices"
	"strings"
	"testing"
	"time"

	"posthouse/appliance/config"
	"posthouse/simtest"
)

const good = `title = "A cut"
length = "2h"

[[office]]
name = "hq"

[[office]]
name = "plzen"

[[event]]
at = "10 min"
cut = "plzen"
for = "1h"
`

func TestAWrongFileNamesKeyLineAndSuggestion(t *testing.T) {
	for _, tc := range []struct{ name, add, want string }{
		{"an unknown verb", "[[event]]\nat = \"1h\"\nkil = \"hq\"", `x:16: event.kil: no such key; did you mean "event.kill"?`},
		{"the same mistake twice", "[[event]]\nkil = \"hq\"\n[[event]]\nkil = \"hq\"", "x:17: event.kil"},
		{"an office that is not there", "[[event]]\nkill = \"brno\"", `x:15: event.kill: "brno": no such office; there are hq, plzen`},
		{"two verbs", "[[event]]\nkill = \"hq\"\ncut = \"plzen\"", `event.kill: one event does one thing; this one has cut and kill`},
		{"no verb", "[[event]]\nat = \"1h\"", `x:14: event: nothing happens`},
		{"what does not go with a verb", "[[event]]\nstart = \"hq\"\nfor = \"1h\"", `x:16: event.for: does not go with start`},
		{"what a verb needs", "[[event]]\nslow = \"hq\"", `x:15: event.slow: needs "by" beside it`},
		{"after the end", "[[event]]\nat = \"3h\"\nkill = \"hq\"", `x:15: event.at: 3 h is after the end, which is at 2 h`},
		{"a time in no unit", "[[event]]\nat = \"5\"\nkill = \"hq\"", `x:15: event.at: "5": want a time such as "90 s", "2h" or "1 day"`},
		{"a burnt office that nobody revokes", "[[event]]\nburn = \"plzen\"", `x:15: event.burn: plzen never comes back: revoke it later`},
		{"a founder that joins", "[[event]]\njoin = \"hq\"", `x:15: event.join: hq founds the mesh`},
		{"a line to itself", "[[line]]\nbetween = [\"hq\", \"hq\"]", `x:15: line.between: want two offices`},
		{"a bandwidth in words", "[[line]]\nbetween = [\"hq\", \"plzen\"]\nbandwidth = \"fast\"", `want a bandwidth such as "2 Mbit/s"`},
		{"a disk that is slower by less than nothing", "[[event]]\nslow_disk = \"hq\"\nby = \"-3 s\"", `x:16: event.by: -3 s: only a clock`},
		{"a clock that is off by nothing known", "[[event]]\nclock = \"hq\"", `x:15: event.clock: needs "by" beside it`},
		{"sizes in words", "[mail]\nsizes = \"large\"", `x:15: mail.sizes: "large": want "real"`},
		{"a name twice", "[[office]]\nname = \"hq\"", `x:15: office.name: "hq" stands twice`},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, list := Parse(good + tc.add)
			if got := (&config.Problems{File: "x", List: list}).Error(); !strings.Contains(got, tc.want) {
				t.Errorf("got %q, want it to contain %q", got, tc.want)
			}
		})
	}
}

func TestTimesAreReadAsPeopleWriteThem(t *testing.T) {
	for text, want := range map[string]time.Duration{
		"90 s": 90 * time.Second, "2h": 2 * time.Hour, "1 day": 24 * time.Hour, "1h 30min": 90 * time.Minute,
		"7 days, 1 hour": 169 * time.Hour, "1.5 hours": 90 * time.Minute, "250ms": 250 * time.Millisecond, "2 weeks": 14 * 24 * time.Hour,
	} {
		var s Span
		if err := s.UnmarshalText([]byte(text)); err != nil || time.Duration(s) != want {
			t.Errorf("%s: %v, %v", text, s, err)
		}
	}
	for _, text := range []string{"", "h", "5", "five h", "-1h", "1x", "1e9 weeks"} {
		var s Span
		if err := s.UnmarshalText([]byte(text)); err == nil {
			t.Errorf("%q is %v", text, s)
		}
	}
}

func TestWhatShipsIsWellWrittenAndPlansAreTheSeeds(t *testing.T) {
	if len(Shipped()) < 10 {
		t.Errorf("%d ship", len(Shipped()))
	}
	for _, name := range Shipped() {
		text, err := Open(name)
		if err != nil {
			t.Fatal(err)
		}
		s, problems := Parse(text)
		if len(problems) > 0 {
			t.Error((&config.Problems{File: name, List: problems}).Error())
			continue
		}
		if a, b := s.Plan(3, true).String(), s.Plan(3, true).String(); a != b {
			t.Errorf("%s: one seed, two plans", name)
		}
		if a, b := s.Plan(3, true).String(), s.Plan(4, true).String(); a == b {
			t.Errorf("%s: two seeds, one plan", name)
		}
		if p := s.Plan(s.Seed, false); p.Length != time.Duration(s.Length) {
			t.Errorf("%s: %v of %v", name, p.Length, s.Length)
		}
	}
}

func TestACutIsHealedAndAFlapEndsWhole(t *testing.T) {
	s, problems := Parse(good + "[[event]]\nat = \"1h 20 min\"\nflap = \"plzen\"\ndown = \"10 s\"\nup = \"20 s\"\nfor = \"5 min\"\n")
	if len(problems) > 0 {
		t.Fatal(problems)
	}
	var kinds []simtest.Kind
	for _, e := range s.Plan(1, false).Events {
		if e.Do == simtest.EvCut || e.Do == simtest.EvHeal {
			kinds = append(kinds, e.Do)
		}
	}
	if len(kinds) < 10 || len(kinds)%2 != 0 || kinds[len(kinds)-1] != simtest.EvHeal || !slices.Equal(kinds[:2], []simtest.Kind{simtest.EvCut, simtest.EvHeal}) {
		t.Errorf("%v", kinds)
	}
}

func TestAClockIsSetAndSetRight(t *testing.T) {
	s, problems := Parse(good + "[[event]]\nat = \"30 min\"\nclock = [\"plzen\", \"hq\"]\nby = \"-3 days\"\nfor = \"1h\"\n")
	if len(problems) > 0 {
		t.Fatal(problems)
	}
	var got []string
	for _, e := range s.Plan(1, false).Events {
		if e.Do == simtest.EvClock {
			got = append(got, e.String())
		}
	}
	want := []string{"30m0s clock plzen -72h0m0s", "30m0s clock hq -72h0m0s", "1h30m0s clock plzen", "1h30m0s clock hq"}
	slices.Sort(got)
	slices.Sort(want)
	if !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestAnOfficeHasALineOfItsOwn(t *testing.T) {
	s, problems := Parse(strings.Replace(good, "name = \"plzen\"", "name = \"plzen\"\nbandwidth = \"512 kbit/s\"", 1))
	if len(problems) > 0 {
		t.Fatal(problems)
	}
	if got, want := s.Plan(1, false).Uplinks, []simtest.Uplink{{Office: "plzen", Bandwidth: 512_000}}; !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	_, problems = Parse(strings.Replace(good, "name = \"hq\"", "name = \"hq\"\nbandwidth = \"2 kbit/s\"", 1))
	if got, want := (&config.Problems{File: "x", List: problems}).Error(), `x:6: office.bandwidth: "2 kbit/s": want a bandwidth`; !strings.Contains(got, want) {
		t.Errorf("got %q, want it to contain %q", got, want)
	}
}

func FuzzParse(f *testing.F) {
	f.Add(good)
	for _, name := range Shipped() {
		text, _ := Open(name)
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		if len(text) > 1<<16 {
			return
		}
		Parse(text) // whatever it says, it comes back
	})
}
