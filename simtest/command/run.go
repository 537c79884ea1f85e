package command

import (
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"posthouse/appliance/config"
	"posthouse/simtest"
	"posthouse/simtest/record"
	"posthouse/simtest/report"
	"posthouse/simtest/scenario"
)

// open reads a scenario: a file, or one that ships.
func open(name string) (*scenario.Scenario, error) {
	text, err := os.ReadFile(name)
	if err != nil {
		shipped, notShipped := scenario.Open(name)
		if notShipped != nil {
			if strings.HasSuffix(name, ".toml") {
				return nil, misuse("%v", err)
			}
			return nil, misuse("%v", notShipped)
		}
		text = []byte(shipped)
	}
	s, problems := scenario.Parse(string(text))
	if len(problems) > 0 {
		return nil, &config.Problems{File: filepath.Base(name), List: problems}
	}
	return s, nil
}

func run(t *testing.T, args []string, term Terminal) (int, error) {
	var out string
	var seed uint64
	var short, asJSON bool
	words, err := flags("run", args, 1, func(f *flag.FlagSet) {
		f.StringVar(&out, "report", "", "")
		f.Uint64Var(&seed, "seed", 0, "")
		f.BoolVar(&short, "short", false, "")
		f.BoolVar(&asJSON, "json", false, "")
	})
	if err != nil {
		return 0, err
	}
	s, err := open(words[0])
	if err != nil {
		return 0, err
	}
	if seed == 0 {
		seed = s.Seed
	}
	plan := s.Plan(seed, short)
	v := &view{term: term, length: plan.Length}
	var watcher simtest.Watcher
	if !asJSON {
		fmt.Fprintf(term.Out, "%s\n%d offices, %s, seed %d\n\n", s.Title, len(plan.Offices), scenario.Spell(plan.Length), seed)
		watcher = simtest.Watcher{Tell: v.moment, Clock: v.clock}
	}
	var result simtest.Result
	t.Run("scenario", func(t *testing.T) { result = simtest.Run(t, plan, watcher) })
	v.wipe()
	r := result.Record
	if r == nil {
		return broken, fmt.Errorf("the run did not come to its end")
	}
	r.Title, r.About = s.Title, s.About
	if out != "" {
		var page bytes.Buffer
		if err := report.Write(&page, r); err != nil {
			return 0, fmt.Errorf("make the report: %w", err)
		}
		if err := write(out, "the report", page.Bytes()); err != nil {
			return 0, err
		}
	}
	if asJSON {
		err = printJSON(term, r, result)
	} else {
		printVerdicts(term, r, result)
	}
	if !r.Held() {
		return broken, err
	}
	return held, err
}

// printJSON prints a run for programs.
func printJSON(term Terminal, r *record.Record, result simtest.Result) error {
	type verdict struct {
		Number  int    `json:"number"`
		Text    string `json:"text"`
		Says    string `json:"says"`
		Checked int    `json:"checked"`
		Broken  int    `json:"broken"`
	}
	out := struct {
		Title      string      `json:"title"`
		Seed       uint64      `json:"seed"`
		Virtual    float64     `json:"virtual_s"`
		Real       float64     `json:"real_s"`
		Held       bool        `json:"held"`
		Sentence   string      `json:"sentence"`
		Mail       record.Mail `json:"mail"`
		Verdicts   []verdict   `json:"verdicts"`
		Violations []string    `json:"violations"`
	}{r.Title, r.Seed, r.Length.Seconds(), r.Took.Seconds(), r.Held(), report.Sentence(r), r.Mail, nil, append([]string{}, result.Violations...)}
	for _, v := range r.Verdicts {
		out.Verdicts = append(out.Verdicts, verdict{v.Number, v.Text, v.Says(), v.Checked, v.Broken})
	}
	e := json.NewEncoder(term.Out)
	e.SetIndent("", "  ")
	return e.Encode(out)
}

// printVerdicts prints what a run came to, for people.
func printVerdicts(term Terminal, r *record.Record, result simtest.Result) {
	fmt.Fprintf(term.Out, "\n%s\n\n", report.Sentence(r))
	for _, v := range r.Verdicts {
		mark := map[string]string{"held": "✓", "broken": "✗", "not touched": "·"}[v.Says()]
		fmt.Fprintf(term.Out, "  %s %2d  %-66s %-11s %8d checks\n", mark, v.Number, v.Text, v.Says(), v.Checked)
	}
	for _, v := range result.Violations {
		fmt.Fprintf(term.Out, "\n  ✗ %s", v)
	}
	if len(result.Violations) > 0 {
		fmt.Fprintf(term.Out, "\n\nWhat the nodes logged in the last minute:\n%s\n", strings.Join(result.Logs, "\n"))
	}
	fmt.Fprintf(term.Out, "\n%s of virtual time in %s\n", scenario.Spell(r.Length), r.Took.Round(100*time.Millisecond))
}

// view prints the timeline as it goes, with a bar below it on a terminal.
type view struct {
	term   Terminal
	length time.Duration
	bar    string
}

// clockTime is a time of a scenario: "1d 02:30:05".
func clockTime(d time.Duration) string {
	s := int(d.Seconds())
	text := fmt.Sprintf("%02d:%02d:%02d", s/3600%24, s/60%60, s%60)
	if days := s / 86400; days > 0 {
		text = fmt.Sprintf("%dd %s", days, text)
	}
	return text
}

func (v *view) moment(m record.Moment) {
	bar := v.bar
	v.wipe()
	fmt.Fprintf(v.term.Out, "%13s  %s\n", clockTime(m.At), m.Text)
	v.draw(bar)
}

func (v *view) clock(at time.Duration) {
	const width = 40
	n := min(width, int(width*at/v.length))
	bar := fmt.Sprintf("%13s  %s%s %3d %%", clockTime(at), strings.Repeat("█", n), strings.Repeat("░", width-n), min(100, 100*at/v.length))
	v.wipe()
	v.draw(bar)
}

func (v *view) draw(bar string) {
	if v.term.Bar && bar != "" {
		fmt.Fprint(v.term.Out, bar)
		v.bar = bar
	}
}

func (v *view) wipe() {
	if v.bar != "" {
		fmt.Fprint(v.term.Out, "\r\x1b[K")
		v.bar = ""
	}
}

// list prints the scenarios that ship.
func list(args []string, term Terminal) error {
	if _, err := flags("list", args, 0, func(*flag.FlagSet) {}); err != nil {
		return err
	}
	for _, name := range scenario.Shipped() {
		s, err := open(name)
		if err != nil {
			return err
		}
		fmt.Fprintf(term.Out, "%-20s %s (%s)\n", name, s.Title, s.Length)
	}
	return nil
}

// show prints the text of a scenario that ships.
func show(args []string, term Terminal) error {
	words, err := flags("show", args, 1, func(*flag.FlagSet) {})
	if err != nil {
		return err
	}
	text, err := scenario.Open(words[0])
	if err != nil {
		return misuse("%v", err)
	}
	fmt.Fprint(term.Out, text)
	return nil
}
