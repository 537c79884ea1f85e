// Package report makes one page of a Record: self-contained HTML with drawings
// in SVG, no scripts, nothing from elsewhere, for light and dark screens.
//
// It is pure: a Record in, HTML out. The command line calls it.
package report

import (
	"embed"
	"fmt"
	"html/template"
	"io"
	"slices"
	"strings"
	"time"

	"posthouse/simtest/record"
)

//go:embed page.html
var files embed.FS

// page is what the template draws.
type page struct {
	*record.Record
	Sentence   string
	Held       bool
	Lanes      template.HTML
	Queues     template.HTML
	Oldest     template.HTML
	Deliveries template.HTML
	Retries    template.HTML
	Figures    []figure
	Keys       []key
	Story      []record.Moment // of the timeline, at most some hundred
	Left       int             // moments that the page leaves out
}

// figure is one number at the top.
type figure struct{ Value, Of string }

// key explains one colour of the lanes.
type key struct{ Class, Says string }

// mostMoments is how much of a timeline a page tells.
const mostMoments = 300

// Write writes the page of a record.
func Write(w io.Writer, r *record.Record) error {
	t, err := template.New("page.html").Funcs(template.FuncMap{"clock": Clock, "spell": Spell, "thousands": thousands}).ParseFS(files, "page.html")
	if err != nil {
		return fmt.Errorf("read the page's template: %w", err)
	}
	p := page{Record: r, Sentence: Sentence(r), Held: r.Held(), Story: r.Moments}
	if len(p.Story) > mostMoments {
		p.Story, p.Left = p.Story[:mostMoments], len(p.Story)-mostMoments
	}
	p.Lanes, p.Queues, p.Oldest, p.Deliveries, p.Retries = lanes(r), queues(r), oldest(r), deliveries(r), retries(r)
	p.Keys = keys(r)
	most, longest := 0, 0.0
	for _, s := range r.Samples {
		sum := 0
		for _, n := range s.Queue {
			sum += max(n, 0)
		}
		most = max(most, sum)
	}
	took := sorted(r)
	if n := len(took); n > 0 {
		longest = took[n-1].Seconds()
	}
	p.Figures = []figure{
		{thousands(r.Mail.Taken), "messages accepted"},
		{thousands(r.Mail.Lost), "lost"},
		{Spell(quantile(took, 0.5)), "half of them arrived within"},
		{Spell(time.Duration(longest * float64(time.Second))), "the longest waited"},
		{thousands(most), "waited at once, at most"},
		{fmt.Sprint(changes(r)), "changes of the lead"},
	}
	return t.Execute(w, p)
}

// Sentence says in plain words what happened to the mail.
func Sentence(r *record.Record) string {
	m := r.Mail
	var b strings.Builder
	switch {
	case !r.Held():
		var which []string
		for _, v := range r.Verdicts {
			if v.Broken > 0 {
				which = append(which, fmt.Sprintf("%d (%s)", v.Number, v.Text))
			}
		}
		fmt.Fprintf(&b, "This went wrong: promise %s was not kept. ", strings.Join(which, ", "))
	case m.Taken == 0:
		return "No mail was sent, so nothing is said about it."
	}
	if m.Lost > 0 {
		fmt.Fprintf(&b, "Of %s messages that the offices accepted, %s were lost.", thousands(m.Taken), thousands(m.Lost))
	} else {
		fmt.Fprintf(&b, "The offices accepted %s messages, and every one of them arrived once.", thousands(m.Taken-m.Excused))
	}
	if m.Excused > 0 {
		fmt.Fprintf(&b, " %s more were for people of an office that is no member any more, or were still there when it was lost.", thousands(m.Excused))
	}
	if took := sorted(r); len(took) > 0 {
		fmt.Fprintf(&b, " Half were there within %s, 99 of 100 within %s; the one that waited longest took %s.",
			Spell(quantile(took, 0.5)), Spell(quantile(took, 0.99)), Spell(took[len(took)-1]))
	}
	if n := m.Refused + m.Unanswered; n > 0 {
		fmt.Fprintf(&b, " %s were not accepted, so that their senders knew and could try again.", thousands(n))
	}
	return b.String()
}

// sorted are the times that deliveries took.
func sorted(r *record.Record) []time.Duration {
	took := make([]time.Duration, len(r.Deliveries))
	for i, d := range r.Deliveries {
		took[i] = d.Took
	}
	slices.Sort(took)
	return took
}

func quantile(sorted []time.Duration, q float64) time.Duration {
	if len(sorted) == 0 {
		return 0
	}
	return sorted[min(len(sorted)-1, int(q*float64(len(sorted))))]
}

// changes counts how often another office came to lead, as most saw it.
func changes(r *record.Record) int {
	n, last := 0, ""
	for _, s := range r.Samples {
		if m := leader(s); m != "" && m != last {
			if last != "" {
				n++
			}
			last = m
		}
	}
	return n
}

// leader is who most offices say leads; "" when nobody does.
func leader(s record.Sample) string {
	votes := map[string]int{}
	best := ""
	for _, m := range s.Master {
		if m == "" {
			continue
		}
		votes[m]++
		if votes[m] > votes[best] {
			best = m
		}
	}
	return best
}

// Clock writes a time of the run: "02:30:05", "1d 02:30".
func Clock(d time.Duration) string {
	s := int(d.Seconds())
	if days := s / 86400; days > 0 {
		return fmt.Sprintf("%dd %02d:%02d", days, s/3600%24, s/60%60)
	}
	return fmt.Sprintf("%02d:%02d:%02d", s/3600, s/60%60, s%60)
}

// Spell writes a duration in two units at most.
func Spell(d time.Duration) string {
	switch {
	case d < time.Millisecond:
		return "1 ms"
	case d < time.Second:
		return fmt.Sprintf("%d ms", d.Milliseconds())
	case d < 10*time.Second:
		return fmt.Sprintf("%.1f s", d.Seconds())
	case d < 2*time.Minute:
		return fmt.Sprintf("%.0f s", d.Seconds())
	case d < 2*time.Hour:
		return fmt.Sprintf("%.0f min", d.Minutes())
	case d < 48*time.Hour:
		return fmt.Sprintf("%.1f h", d.Hours())
	}
	return fmt.Sprintf("%.1f days", d.Hours()/24)
}

// thousands writes a number with its groups: 50,000.
func thousands(n int) string {
	s := fmt.Sprint(n)
	for i := len(s) - 3; i > 0; i -= 3 {
		s = s[:i] + "," + s[i:]
	}
	return s
}
