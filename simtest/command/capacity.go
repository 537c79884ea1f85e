package command

import (
	"encoding/json"
	"flag"
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"

	"posthouse/simtest/capacity"
	"posthouse/simtest/report"
	"posthouse/simtest/scenario"
)

// text lets a flag be anything that reads itself from text.
func text(f *flag.FlagSet, name string, into interface{ UnmarshalText([]byte) error }) {
	f.Func(name, "", func(s string) error { return into.UnmarshalText([]byte(s)) })
}

// bytesOf reads a size that a person writes: "75 kB", "2 MB".
func bytesOf(s string) (float64, error) {
	word := strings.ToLower(strings.ReplaceAll(s, " ", ""))
	for unit, of := range map[string]float64{"kb": 1e3, "mb": 1e6} {
		if n, ok := strings.CutSuffix(word, unit); ok {
			if f, err := strconv.ParseFloat(n, 64); err == nil && f > 0 && f*of <= 1e9 {
				return f * of, nil
			}
		}
	}
	return 0, fmt.Errorf("%q: want a size such as \"75 kB\" or \"2 MB\"", s)
}

// size writes a number of bytes as a person would.
func size(b float64) string {
	for _, u := range []struct {
		of   float64
		name string
	}{{1e12, "TB"}, {1e9, "GB"}, {1e6, "MB"}, {1e3, "kB"}} {
		if b >= u.of {
			return fmt.Sprintf("%.1f %s", b/u.of, u.name)
		}
	}
	return fmt.Sprintf("%.0f bytes", b)
}

func capacities(args []string, term Terminal) error {
	c := capacity.Company{Offices: 5, People: 20, Mail: 40, Size: 75e3, Seed: 1}
	inside, outside, line := scenario.Percent(30), scenario.Percent(40), scenario.Rate(20e6)
	latency, cut := scenario.Span(15*time.Millisecond), scenario.Span(24*time.Hour)
	asJSON := false
	if _, err := flags("capacity", args, 0, func(f *flag.FlagSet) {
		f.IntVar(&c.Offices, "offices", c.Offices, "")
		f.IntVar(&c.People, "people", c.People, "")
		f.Float64Var(&c.Mail, "mail", c.Mail, "")
		f.Uint64Var(&c.Seed, "seed", c.Seed, "")
		f.BoolVar(&asJSON, "json", false, "")
		f.Func("size", "", func(s string) (err error) { c.Size, err = bytesOf(s); return err })
		text(f, "inside", &inside)
		text(f, "outside", &outside)
		text(f, "line", &line)
		text(f, "latency", &latency)
		text(f, "cut", &cut)
	}); err != nil {
		return err
	}
	if c.Offices < 2 || c.Offices > 10_000 || c.People < 1 || c.People > 1e6 || !(c.Mail > 0 && c.Mail <= 1e5) || inside+outside >= 100 || cut <= 0 || cut > scenario.Span(60*24*time.Hour) {
		return misuse("capacity: want 2 to 10,000 offices with people who write mail, some of it between offices, and a cut of up to 60 days")
	}
	c.Inside, c.Outside, c.Bandwidth = float64(inside)/100, float64(outside)/100, float64(line)
	c.Latency, c.Cut = time.Duration(latency), time.Duration(cut)
	a := c.Answer()
	if asJSON {
		e := json.NewEncoder(term.Out)
		e.SetIndent("", "  ")
		return e.Encode(struct {
			Company capacity.Company
			Answer  capacity.Answer
		}{c, a})
	}
	long := func(d time.Duration) string {
		if d == math.MaxInt64 {
			return "never: more comes than the line takes"
		}
		return report.Spell(d)
	}
	say := func(what, format string, args ...any) {
		fmt.Fprintf(term.Out, "  %-52s %s\n", what, fmt.Sprintf(format, args...))
	}
	fmt.Fprintf(term.Out, "%d offices of %d people who write %.0f messages of %s a day each;\n%.0f %% stay in their office, %.0f %% go to the Internet (and as many come from there);\neach office's line takes %.1f Mbit/s each way.\n\n",
		c.Offices, c.People, c.Mail, size(c.Size), inside, outside, c.Bandwidth/1e6)
	fmt.Fprintf(term.Out, "On an ordinary day\n")
	say("messages written", "%.0f", a.Daily)
	say("between offices, in the busiest hour", "%.2f a second", a.Busy)
	say("an office's line is then in use", "%.1f %% of the time", 100*a.Line)
	say("mean wait before a line (M/D/1)", "%s", long(a.Wait))
	say("the master must pass, in the busiest hour", "%.2f messages a second", a.MasterRate)
	say("Internet mail a day, both ways", "%s", size(a.MasterDaily))
	fmt.Fprintf(term.Out, "\nOne office is cut off for %s, in the worst hours of a day\n", cut)
	say("messages that wait, at most", "%.0f", a.Waiting)
	say("disk that they need at the office", "%s", size(a.AtOffice))
	say("and at each other office", "%s", size(a.AtPeers))
	say("gone after the heal, by the fluid limit", "%s", long(a.Drain))
	say("the same, in the message-level model", "%s", long(a.Simulated.Drained))
	say("the longest wait of all", "%s", long(a.Simulated.Longest))
	fmt.Fprintf(term.Out, "\n%d messages were played, without a packet; simtest/DESIGN.md says how far to trust it.\n", a.Simulated.Messages)
	if a.Thinned {
		fmt.Fprintln(term.Out, "There were too many for one run: fewer offices were played, each as busy as it is.")
	}
	return nil
}
