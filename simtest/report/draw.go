package report

import (
	"cmp"
	"fmt"
	"html/template"
	"math"
	"slices"
	"strings"
	"time"

	"posthouse/simtest/record"
)

// Sizes of the drawings, in the units of their view boxes.
const (
	width     = 1000.0
	margin    = 92.0 // for names and numbers at the left
	right     = 24.0
	laneHigh  = 46.0
	queueHigh = 200.0
	ageHigh   = 110.0
	histHigh  = 180.0
	axisHigh  = 26.0
)

// svg is a drawing under way.
type svg struct {
	strings.Builder
	length time.Duration
}

func (s *svg) add(format string, args ...any) { fmt.Fprintf(&s.Builder, format+"\n", args...) }

// x is where a time stands.
func (s *svg) x(at time.Duration) float64 {
	return margin + (width-margin-right)*float64(at)/float64(max(s.length, 1))
}

// rect draws a span of time; what is too short to be seen is made as wide as a
// line.
func (s *svg) rect(class string, from, until time.Duration, y, h, round float64, title string) {
	x := s.x(from)
	s.add(`<rect class="%s" x="%.1f" y="%.1f" width="%.1f" height="%.1f" rx="%.1f"><title>%s</title></rect>`,
		class, x, y, max(s.x(until)-x, 1.5), h, round, template.HTMLEscapeString(title))
}

func (s *svg) text(class string, x, y float64, text string) {
	s.add(`<text class="%s" x="%.1f" y="%.1f">%s</text>`, class, x, y, template.HTMLEscapeString(text))
}

// open begins a drawing with a name for those who do not see it.
func open(length time.Duration, high float64, label string) *svg {
	s := &svg{length: length}
	s.add(`<svg viewBox="0 0 %.0f %.0f" role="img" aria-label="%s">`, width, high, template.HTMLEscapeString(label))
	return s
}

func (s *svg) close() template.HTML {
	s.add(`</svg>`)
	return template.HTML(s.String())
}

// timeAxis draws the axis of times with lines up to top.
func (s *svg) timeAxis(top, y float64) {
	step := time.Minute
	for _, t := range []time.Duration{1, 2, 5, 10, 15, 30, 60, 120, 180, 360, 720, 1440, 2880, 10080} {
		if step = t * time.Minute; s.length/step <= 9 {
			break
		}
	}
	for at := time.Duration(0); at <= s.length; at += step {
		s.add(`<line class="grid" x1="%.1f" x2="%.1f" y1="%.1f" y2="%.1f"/>`, s.x(at), s.x(at), top, y)
		label := "0"
		switch {
		case at == 0:
		case at%(24*time.Hour) == 0:
			label = fmt.Sprintf("%d d", at/(24*time.Hour))
		case at%time.Hour == 0:
			label = fmt.Sprintf("%d h", at/time.Hour)
		case at < time.Hour:
			label = fmt.Sprintf("%d min", at/time.Minute)
		default:
			label = fmt.Sprintf("%d:%02d h", at/time.Hour, at/time.Minute%60)
		}
		s.text("tick", s.x(at), y+17, label)
	}
}

// classOf are the colours of an office's states.
var classOf = map[record.Power]string{record.Away: "away", record.On: "on", record.Off: "off", record.Dead: "dead",
	record.Burnt: "burnt", record.Full: "full", record.SlowIO: "slowio", record.Revoked: "revoked"}

// keys are the colours that the lanes of a record show.
func keys(r *record.Record) []key {
	out := []key{{"lead", "leads the mesh"}}
	for _, p := range []record.Power{record.On, record.Off, record.Dead, record.Full, record.SlowIO, record.Away, record.Burnt, record.Revoked} {
		if slices.ContainsFunc(r.States, func(s record.State) bool { return s.Power == p }) {
			out = append(out, key{classOf[p], string(p)})
		}
	}
	all, some := false, false
	for _, o := range r.Offices {
		for _, c := range cutsOf(r, o) {
			all, some = all || len(c.from) == len(r.Offices)-1, some || len(c.from) < len(r.Offices)-1
		}
	}
	if all {
		out = append(out, key{"cut all", "cut off from all others"})
	}
	if some {
		out = append(out, key{"cut", "cut off from some"})
	}
	return out
}

// lanes draws a lane for each office: its states, its lead with terms, and what
// it was cut off from.
func lanes(r *record.Record) template.HTML {
	n := len(r.Offices)
	bottom := float64(n)*laneHigh + 6
	s := open(r.Length, bottom+axisHigh, "A lane for each office with cuts, power and the lead")
	s.timeAxis(2, bottom)
	for i, name := range r.Offices {
		y := float64(i)*laneHigh + 8
		s.text("name", margin-12, y+21, name)
		for j, from := range r.States {
			if from.Office != name {
				continue
			}
			until := r.Length
			for _, next := range r.States[j+1:] {
				if next.Office == name {
					until = next.At
					break
				}
			}
			if until > from.At || until == r.Length {
				s.rect("lane "+classOf[from.Power], from.At, until, y, 30, 4, fmt.Sprintf("%s: %s, %s to %s", name, from.Power, Clock(from.At), Clock(until)))
			}
		}
		for _, c := range cutsOf(r, name) {
			class := "cut"
			if len(c.from) == n-1 {
				class = "cut all"
			}
			s.rect(class, c.at, c.until, y+21, 9, 2, fmt.Sprintf("%s is cut off from %s, %s to %s", name, strings.Join(c.from, ", "), Clock(c.at), Clock(c.until)))
		}
		for _, l := range leads(r, i) {
			s.rect("lead", l.at, l.until, y, 7, 2, fmt.Sprintf("%s leads, term %d, %s to %s", name, l.term, Clock(l.at), Clock(l.until)))
			switch wide := s.x(l.until) - s.x(l.at); {
			case wide > 80:
				s.text("term", s.x(l.at)+4, y+18, fmt.Sprintf("leads, term %d", l.term))
			case wide > 26:
				s.text("term", s.x(l.at)+3, y+18, fmt.Sprintf("t. %d", l.term))
			}
		}
	}
	if r.FaultsEnd > 0 && r.FaultsEnd < r.Length {
		s.add(`<line class="end" x1="%.1f" x2="%.1f" y1="2" y2="%.1f"/>`, s.x(r.FaultsEnd), s.x(r.FaultsEnd), bottom)
	}
	return s.close()
}

// cutSpan is a time in which an office did not reach these.
type cutSpan struct {
	at, until time.Duration
	from      []string
}

// cutsOf joins the cuts of an office's lines: each time at which one begins or
// ends begins a span.
func cutsOf(r *record.Record, office string) (out []cutSpan) {
	var mine []record.Cut
	var times []time.Duration
	for _, c := range r.Cuts {
		if (c.A == office || c.B == office) && c.A != "outside" && c.B != "outside" && c.Until > c.At {
			mine = append(mine, c)
			times = append(times, c.At, c.Until)
		}
	}
	slices.Sort(times)
	times = slices.Compact(times)
	for i := 1; i < len(times); i++ {
		span := cutSpan{at: times[i-1], until: times[i]}
		for _, c := range mine {
			if c.At <= span.at && c.Until >= span.until {
				other := c.A
				if other == office {
					other = c.B
				}
				span.from = append(span.from, other)
			}
		}
		slices.Sort(span.from)
		if span.from = slices.Compact(span.from); len(span.from) == 0 {
			continue
		}
		if n := len(out); n > 0 && out[n-1].until == span.at && slices.Equal(out[n-1].from, span.from) {
			out[n-1].until = span.until
			continue
		}
		out = append(out, span)
	}
	return out
}

// lead is a time in which an office led, by its own word.
type lead struct {
	at, until time.Duration
	term      uint64
}

func leads(r *record.Record, office int) (out []lead) {
	for i, x := range r.Samples {
		if x.Master[office] != r.Offices[office] {
			continue
		}
		until := r.Length
		if i+1 < len(r.Samples) {
			until = r.Samples[i+1].At
		}
		if n := len(out); n > 0 && out[n-1].until == x.At && out[n-1].term == x.Term[office] {
			out[n-1].until = until
			continue
		}
		out = append(out, lead{x.At, until, x.Term[office]})
	}
	return out
}

// nice is a round number at or above n.
func nice(n float64) float64 {
	if n <= 4 {
		return 4
	}
	power := math.Pow(10, math.Floor(math.Log10(n)))
	for _, m := range []float64{1, 1.2, 2, 3, 4, 6, 8, 10} {
		if m*power >= n {
			return m * power
		}
	}
	return n
}

// queues draws how much waited at each office over time, as stacked areas.
func queues(r *record.Record) template.HTML {
	if len(r.Samples) == 0 {
		return ""
	}
	top, bottom := 10.0, 10+queueHigh
	s := open(r.Length, bottom+axisHigh, "Messages that wait at each office over time")
	sums := make([][]float64, len(r.Samples)) // from below, with 0 first
	most := 0.0
	for i, x := range r.Samples {
		sum := 0.0
		sums[i] = []float64{0}
		for _, q := range x.Queue {
			sum += float64(max(q, 0))
			sums[i] = append(sums[i], sum)
		}
		most = max(most, sum)
	}
	most = nice(most)
	y := func(v float64) float64 { return bottom - queueHigh*v/most }
	s.timeAxis(top, bottom)
	for i := range 5 {
		v := most * float64(i) / 4
		s.add(`<line class="grid" x1="%.1f" x2="%.1f" y1="%.1f" y2="%.1f"/>`, margin, width-right, y(v), y(v))
		s.text("left", margin-12, y(v)+4, thousands(int(v)))
	}
	for o := len(r.Offices) - 1; o >= 0; o-- {
		var there, back strings.Builder
		for i, x := range r.Samples {
			fmt.Fprintf(&there, "%.1f,%.1f ", s.x(x.At), y(sums[i][o+1]))
		}
		for i := len(r.Samples) - 1; i >= 0; i-- {
			fmt.Fprintf(&back, "%.1f,%.1f ", s.x(r.Samples[i].At), y(sums[i][o]))
		}
		s.add(`<polygon class="area o%d" points="%s%s"><title>waiting at %s</title></polygon>`, o%8, there.String(), back.String(), template.HTMLEscapeString(r.Offices[o]))
	}
	for o, name := range r.Offices {
		x := margin + 12 + float64(o)*96
		if x > width-90 {
			break
		}
		s.add(`<rect class="area o%d" x="%.1f" y="%.1f" width="11" height="11" rx="2"/>`, o%8, x, top+2)
		s.text("key", x+16, top+12, name)
	}
	return s.close()
}

// oldest draws the age of what waited longest for another office, as each
// office saw it.
func oldest(r *record.Record) template.HTML {
	most := time.Duration(0)
	for _, x := range r.Samples {
		for _, age := range x.Oldest {
			most = max(most, time.Duration(age)*time.Second)
		}
	}
	if most < time.Second {
		return ""
	}
	top, bottom := 10.0, 10+ageHigh
	s := open(r.Length, bottom+axisHigh, "The age of the oldest message that waits at each office over time")
	s.timeAxis(top, bottom)
	y := func(d time.Duration) float64 { return bottom - ageHigh*float64(d)/float64(most)*0.95 }
	for _, d := range []time.Duration{0, most / 2, most} {
		s.add(`<line class="grid" x1="%.1f" x2="%.1f" y1="%.1f" y2="%.1f"/>`, margin, width-right, y(d), y(d))
		label := "0"
		if d > 0 {
			label = Spell(d)
		}
		s.text("left", margin-12, y(d)+4, label)
	}
	for o, name := range r.Offices {
		var line strings.Builder
		for _, x := range r.Samples {
			fmt.Fprintf(&line, "%.1f,%.1f ", s.x(x.At), y(time.Duration(x.Oldest[o])*time.Second))
		}
		s.add(`<polyline class="age l%d" points="%s"><title>the oldest at %s</title></polyline>`, o%8, line.String(), template.HTMLEscapeString(name))
	}
	return s.close()
}

// mostRetried is how many destinations are drawn, those that were tried most.
const mostRetried = 12

// retries draws for each destination how often it was tried in vain over time.
func retries(r *record.Record) template.HTML {
	total := map[string]int{}
	for _, x := range r.Retries {
		total[x.To]++
	}
	var to []string
	for t := range total {
		to = append(to, t)
	}
	slices.SortFunc(to, func(a, b string) int { return cmp.Or(total[b]-total[a], strings.Compare(a, b)) })
	if to = to[:min(len(to), mostRetried)]; len(to) == 0 {
		return ""
	}
	const bins, high = 120, 34.0
	bin := max(r.Length/bins, 1)
	counts, most := map[string][]int{}, 0
	for _, t := range to {
		counts[t] = make([]int, bins+1)
	}
	for _, x := range r.Retries {
		if c := counts[x.To]; c != nil {
			i := min(int(x.At/bin), bins)
			c[i]++
			most = max(most, c[i])
		}
	}
	bottom := float64(len(to))*high + 6
	s := open(r.Length, bottom+axisHigh, "Attempts in vain at each destination over time")
	s.timeAxis(2, bottom)
	for k, t := range to {
		base := float64(k+1) * high
		s.text("name", margin-12, base-8, t)
		for i, n := range counts[t] {
			if n == 0 {
				continue
			}
			from := time.Duration(i) * bin
			h := (high - 8) * math.Log(1+float64(n)) / math.Log(1+float64(most))
			s.rect("bar", from, min(from+bin*9/10, r.Length), base-h, h, 1, fmt.Sprintf("%s: tried %s times in vain, %s to %s; %s in all", t, thousands(n), Clock(from), Clock(from+bin), thousands(total[t])))
		}
	}
	return s.close()
}

// decades of the delivery times' axis, in seconds.
var decades = []struct {
	at    float64
	label string
}{{0.001, "1 ms"}, {0.01, "10 ms"}, {0.1, "0.1 s"}, {1, "1 s"}, {10, "10 s"}, {60, "1 min"}, {600, "10 min"}, {3600, "1 h"}, {36000, "10 h"}, {86400, "1 d"}, {604800, "1 w"}}

// deliveries draws how long messages took, by the logarithm of the time.
func deliveries(r *record.Record) template.HTML {
	took := sorted(r)
	if len(took) == 0 {
		return ""
	}
	const steps = 8 // bars in a factor of ten
	first, last := -3*steps, int(math.Ceil(math.Log10(max(took[len(took)-1].Seconds(), 1))*steps))+1
	bars := make([]int, last-first)
	most := 0
	for _, d := range took {
		i := int(math.Floor(math.Log10(max(d.Seconds(), 0.001))*steps)) - first
		i = min(max(i, 0), len(bars)-1)
		bars[i]++
		most = max(most, bars[i])
	}
	top, bottom := 10.0, 10+histHigh
	s := open(0, bottom+axisHigh, "How long deliveries took")
	x := func(sec float64) float64 {
		return margin + (width-margin-right)*(math.Log10(sec)*steps-float64(first))/float64(last-first)
	}
	// Counts on a logarithmic scale too: the few that waited long matter most.
	y := func(n float64) float64 {
		return bottom - histHigh*math.Log10(1+n)/math.Log10(1+float64(most)*1.15)
	}
	for n := 1.0; n <= float64(most)*1.15; n *= 10 {
		s.add(`<line class="grid" x1="%.1f" x2="%.1f" y1="%.1f" y2="%.1f"/>`, margin, width-right, y(n), y(n))
		s.text("left", margin-12, y(n)+4, thousands(int(n)))
	}
	for _, d := range decades {
		if at := x(d.at); at <= width-right {
			s.add(`<line class="grid" x1="%.1f" x2="%.1f" y1="%.1f" y2="%.1f"/>`, at, at, top, bottom)
			s.text("tick", at, bottom+17, d.label)
		}
	}
	wide := (width - margin - 8) / float64(last-first)
	for i, n := range bars {
		if n > 0 {
			from := math.Pow(10, float64(first+i)/steps)
			s.add(`<rect class="bar" x="%.1f" y="%.1f" width="%.1f" height="%.1f" rx="2"><title>%s took %s to %s</title></rect>`, x(from)+0.5, y(float64(n)), wide-1, bottom-y(float64(n)),
				thousands(n), Spell(time.Duration(from*1e9)), Spell(time.Duration(from*math.Pow(10, 1.0/steps)*1e9)))
		}
	}
	for _, q := range []struct {
		of   float64
		name string
	}{{0.5, "half"}, {0.99, "99 of 100"}} {
		at := x(max(quantile(took, q.of).Seconds(), 0.001))
		s.add(`<line class="mark" x1="%.1f" x2="%.1f" y1="%.1f" y2="%.1f"/>`, at, at, top, bottom)
		if class, x := "marked", at+5; at < width-right-80 {
			s.text(class, x, top+11, q.name)
		} else {
			s.text(class+" left", at-5, top+11, q.name)
		}
	}
	return s.close()
}
