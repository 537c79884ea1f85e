// Package scenario reads scenarios that people write (TOML) and makes plans of
// them that simtest plays: offices, lines, mail, what happens when.
//
// It is pure: text in, a simtest.Plan out; equal files and seeds give equal
// plans. It runs nothing. The scenarios that ship stand in shipped/.
package scenario

import (
	"fmt"
	"reflect"
	"slices"
	"strings"
	"time"

	"posthouse/appliance/config"
)

// Scenario is one file.
type Scenario struct {
	// Title names it in a line, such as "Headquarters is down for a day".
	Title string `toml:"title"`
	// About says in a few sentences what it asks and what to look for.
	About string `toml:"about"`
	// Length is how long things happen; then everything is healed and checked.
	Length Span `toml:"length"`
	// Seed decides who writes to whom when. Default 1.
	Seed uint64 `toml:"seed"`
	// Latency is the one-way time of every line not named below. Default 10 ms.
	Latency Span `toml:"latency"`

	Office []Office `toml:"office"`
	Line   []Line   `toml:"line"`
	Mail   Mail     `toml:"mail"`
	Event  []Event  `toml:"event"`
	Short  Short    `toml:"short"`
}

// Office is one office with its node. The first one founds the mesh.
type Office struct {
	// Name is a node name, such as "plzen".
	Name string `toml:"name"`
	// Gateway lets the office send Internet mail by itself; the first always may.
	Gateway bool `toml:"gateway"`
	// Bandwidth is that of the office's own line, "1 Mbit/s", each way: all that
	// it sends to other offices shares it, and all that it gets from them, not
	// its mail with the Internet. Default: no limit but the single lines'.
	Bandwidth Rate `toml:"bandwidth"`
}

// Line is what the line between two offices is like on a good day.
type Line struct {
	Between   Names   `toml:"between"`   // two offices
	Latency   Span    `toml:"latency"`   // one way
	Jitter    Span    `toml:"jitter"`    // up to so much more
	Bandwidth Rate    `toml:"bandwidth"` // "2 Mbit/s", each way; default: no limit
	Loss      Percent `toml:"loss"`      // "0.5 %"
}

// Mail is what people send all the time.
type Mail struct {
	// PerHour is how many messages all offices together hand in, between
	// offices and inside them. Default 0.
	PerHour float64 `toml:"per_hour"`
	// Inside is the share that stays in its office. Default none.
	Inside Percent `toml:"inside"`
	// Outside is the share that goes to the Internet, by submission.
	Outside Percent `toml:"outside"`
	// Probe is how often each office's local mail is timed. Default "5 min".
	Probe Span `toml:"probe"`
	// Sizes says how long messages are: "real" is as people's mail, 70 kB on
	// average and up to 6 MB, of 64 MiB in sum; what is more stays small.
	// Default: small.
	Sizes string `toml:"sizes"`
}

// Short is how the file is played where time is short, in `make test`.
type Short struct {
	// DivideTimeBy shortens all times of events and the whole. Default 1.
	DivideTimeBy float64 `toml:"divide_time_by"`
	// DivideMailBy thins the mail that events send. Default 1.
	DivideMailBy float64 `toml:"divide_mail_by"`
}

// Event is one thing that happens. Exactly one of the verbs is given.
type Event struct {
	At  Span `toml:"at"`  // since the beginning
	For Span `toml:"for"` // then it is undone; default: it stays so until the end

	// Verbs on lines; From or Toward names the other offices, default all.
	Cut   Names `toml:"cut"`
	Slow  Names `toml:"slow"`  // by By
	Lossy Names `toml:"lossy"` // by Loss
	Flap  Names `toml:"flap"`  // cut for Down, whole for Up, again and again
	Heal  Names `toml:"heal"`

	// Verbs on nodes.
	Kill     Names `toml:"kill"` // a power cut; For: until it starts again
	Stop     Names `toml:"stop"` // as a shutdown does
	Start    Names `toml:"start"`
	Restart  Names `toml:"restart"` // one after the other, each for Down; Up between them
	FullDisk Names `toml:"full_disk"`
	FreeDisk Names `toml:"free_disk"`
	SlowDisk Names `toml:"slow_disk"` // each sync takes By
	Clock    Names `toml:"clock"`     // the wall clock is By ahead; with a minus, behind
	Burn     Names `toml:"burn"`      // everything at the office is gone for ever
	Image    Names `toml:"image"`     // stopped for a moment: a copy of its disk is made
	Restore  Names `toml:"restore"`   // comes back with that copy, once the others know how far it was
	LoseDisk Names `toml:"lose_disk"` // its disk is gone; after For a new node replaces it

	// Verbs on the mesh.
	Join    Names `toml:"join"`    // an office that was not started until now; From: at whose door
	Revoke  Names `toml:"revoke"`  // put out of the mesh
	Promote Names `toml:"promote"` // takes the lead without a majority
	Lead    Names `toml:"lead"`    // is handed the lead
	Change  Names `toml:"change"`  // an admin there changes the domain, every By while For lasts

	// Verbs on mail.
	Send    int    `toml:"send"`    // messages, From these offices To those, within For
	Outside string `toml:"outside"` // "shut": nobody in the Internet answers

	From   Names   `toml:"from"`
	Toward Names   `toml:"toward"`
	To     Names   `toml:"to"`
	By     Shift   `toml:"by"`
	Loss   Percent `toml:"loss"`
	Down   Span    `toml:"down"`
	Up     Span    `toml:"up"`
}

// verb is what an event may say beside its verb.
type verb struct{ may, must string }

// verbs are by their key in the file.
var verbs = map[string]verb{
	"cut": {may: "for from toward"}, "slow": {"for from toward by", "by"}, "lossy": {"for from toward loss", "loss"},
	"flap": {"for from down up", "for down up"}, "heal": {may: "from"},
	"kill": {may: "for"}, "stop": {may: "for"}, "start": {}, "restart": {may: "down up"},
	"full_disk": {may: "for"}, "free_disk": {}, "slow_disk": {"for by", "by"}, "clock": {"for by", "by"}, "burn": {},
	"image": {}, "restore": {}, "lose_disk": {may: "for"},
	"join": {may: "from"}, "revoke": {}, "promote": {}, "lead": {}, "change": {"for by", "for by"},
	"send": {"for from to", "from to"}, "outside": {may: "for"},
}

// given are the keys of an event that the file gives, without "at".
func (e Event) given() (keys []string) {
	v := reflect.ValueOf(e)
	for i := range v.NumField() {
		if k := v.Type().Field(i).Tag.Get("toml"); k != "at" && !v.Field(i).IsZero() {
			keys = append(keys, k)
		}
	}
	return keys
}

// verb is the event's verb, "" when it has none or several.
func (e Event) verb() (name string) {
	for _, k := range e.given() {
		if _, ok := verbs[k]; ok {
			if name != "" {
				return ""
			}
			name = k
		}
	}
	return name
}

// who are the offices that the verb names.
func (e Event) who() Names {
	v := reflect.ValueOf(e)
	for i := range v.NumField() {
		if v.Type().Field(i).Tag.Get("toml") == e.verb() {
			n, _ := v.Field(i).Interface().(Names)
			return n
		}
	}
	return nil
}

// Parse reads a file's text. With problems, the Scenario is of no use.
func Parse(text string) (*Scenario, []config.Problem) {
	s := &Scenario{}
	problems, ok := config.Decode(text, s)
	if !ok {
		return nil, problems
	}
	c := &checker{s: s, text: text, problems: problems}
	c.check()
	if s.Latency == 0 {
		s.Latency = Span(10 * time.Millisecond)
	}
	if s.Mail.Probe == 0 {
		s.Mail.Probe = Span(5 * time.Minute)
	}
	if s.Seed == 0 {
		s.Seed = 1
	}
	slices.SortStableFunc(c.problems, func(a, b config.Problem) int { return a.Line - b.Line })
	return s, c.problems
}

// checker finds everything wrong in a file that could be read.
type checker struct {
	s        *Scenario
	text     string
	problems []config.Problem
}

// bad notes a problem of a key; index is that of its table in a list.
func (c *checker) bad(key string, index int, format string, args ...any) {
	line := config.LineOf(c.text, key, index)
	if table, _, ok := strings.Cut(key, "."); ok && line == 0 {
		line = config.LineOf(c.text, table, index)
	}
	c.problems = append(c.problems, config.Problem{Key: key, Line: line, Text: fmt.Sprintf(format, args...)})
}

// names checks that these are offices of the file.
func (c *checker) names(key string, index int, list Names) {
	for _, n := range list {
		if slices.ContainsFunc(c.s.Office, func(o Office) bool { return o.Name == n }) {
			continue
		}
		var all []string
		for _, o := range c.s.Office {
			all = append(all, o.Name)
		}
		c.bad(key, index, "%q: no such office; there are %s", n, strings.Join(all, ", "))
	}
}

func (c *checker) check() {
	s := c.s
	if s.Title == "" {
		c.bad("title", 0, "give it a title, such as \"Headquarters is down for a day\"")
	}
	if s.Length <= 0 {
		c.bad("length", 0, "say how long things happen, such as \"2h\"")
	}
	if n := len(s.Office); n < 2 || n > 60 {
		c.bad("office", 0, "%d offices: want 2 to 60, each as [[office]] with a name", n)
	}
	for i, o := range s.Office {
		if !validName(o.Name) {
			c.bad("office.name", i, "%q: want letters, digits and hyphens, such as \"plzen\"", o.Name)
		}
		if slices.ContainsFunc(s.Office[:i], func(x Office) bool { return x.Name == o.Name }) {
			c.bad("office.name", i, "%q stands twice", o.Name)
		}
	}
	for i, l := range s.Line {
		if len(l.Between) != 2 || l.Between[0] == l.Between[1] {
			c.bad("line.between", i, "want two offices, such as [\"hq\", \"plzen\"]")
		}
		c.names("line.between", i, l.Between)
	}
	if s.Mail.PerHour < 0 || s.Mail.PerHour > 1e6 {
		c.bad("mail.per_hour", 0, "want 0 to 1,000,000 messages an hour")
	}
	if s.Mail.Inside+s.Mail.Outside > 100 {
		c.bad("mail.outside", 0, "inside and outside together are more than 100 %%")
	}
	if s.Mail.Sizes != "" && s.Mail.Sizes != "real" {
		c.bad("mail.sizes", 0, "%q: want \"real\", or nothing for small messages", s.Mail.Sizes)
	}
	for _, d := range []struct {
		key string
		by  float64
	}{{"short.divide_time_by", s.Short.DivideTimeBy}, {"short.divide_mail_by", s.Short.DivideMailBy}} {
		if d.by != 0 && d.by < 1 {
			c.bad(d.key, 0, "want 1 or more")
		}
	}
	for i, e := range s.Event {
		c.event(i, e)
	}
	c.members()
}

func (c *checker) event(i int, e Event) {
	name := e.verb()
	if name == "" {
		var have []string
		for _, k := range e.given() {
			if _, ok := verbs[k]; ok {
				have = append(have, k)
			}
		}
		if len(have) > 1 {
			c.bad("event."+have[1], i, "one event does one thing; this one has %s", strings.Join(have, " and "))
		} else if !c.misspelt(i) {
			c.bad("event", i, "nothing happens: want a verb, such as cut = \"plzen\" or kill = \"hq\"")
		}
		return
	}
	v := verbs[name]
	for _, k := range e.given() {
		if k != name && !slices.Contains(strings.Fields(v.may), k) {
			c.bad("event."+k, i, "does not go with %s", name)
		}
	}
	for _, k := range strings.Fields(v.must) {
		if !slices.Contains(e.given(), k) {
			c.bad("event."+name, i, "needs %q beside it", k)
		}
	}
	if e.At > c.s.Length {
		c.bad("event.at", i, "%v is after the end, which is at %v", e.At, c.s.Length)
	}
	if e.By < 0 && name != "clock" {
		c.bad("event.by", i, "%v: only a clock is less than it was", e.By)
	}
	if e.Outside != "" && e.Outside != "shut" {
		c.bad("event.outside", i, "%q: want \"shut\"", e.Outside)
	}
	if e.Send < 0 || e.Send > 1_000_000 {
		c.bad("event.send", i, "want 1 to 1,000,000 messages")
	}
	c.names("event."+name, i, e.who())
	c.names("event.toward", i, e.Toward)
	c.names("event.to", i, e.To)
	if !slices.Equal(e.From, Names{"outside"}) {
		c.names("event.from", i, e.From)
	}
}

// misspelt reports whether an event has a key that there is not: that is told.
func (c *checker) misspelt(i int) bool {
	begin, end := config.LineOf(c.text, "event", i), config.LineOf(c.text, "event", i+1)
	return slices.ContainsFunc(c.problems, func(p config.Problem) bool {
		return p.Line > begin && (end == 0 || p.Line < end) && strings.HasPrefix(p.Key, "event.")
	})
}

// members checks who belongs to the mesh when.
func (c *checker) members() {
	for i, e := range c.s.Event {
		for _, n := range e.Join {
			if len(c.s.Office) > 0 && n == c.s.Office[0].Name {
				c.bad("event.join", i, "%s founds the mesh; another office may join", n)
			}
		}
		for _, n := range e.Burn {
			if !slices.ContainsFunc(c.s.Event, func(r Event) bool { return slices.Contains(r.Revoke, n) && r.At > e.At }) {
				c.bad("event.burn", i, "%s never comes back: revoke it later, as its admin would", n)
			}
		}
	}
}

// validName says what a node may be called.
func validName(s string) bool {
	return s != "" && len(s) <= 40 && s[0] != '-' && s != "outside" && s != "all" && strings.IndexFunc(s, func(r rune) bool {
		return !(r >= 'a' && r <= 'z' || r >= '0' && r <= '9' || r == '-')
	}) < 0
}
