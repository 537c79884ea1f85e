package simtest

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"
)

// Lines are lines between offices that a scenario is about to change.
type Lines struct {
	w      *World
	what   string
	a      []netip.Addr
	names  string
	change func(*line)
	ways   [][2]netip.Addr // that were changed
}

func (w *World) addrs(names []string) (out []netip.Addr) {
	for _, n := range names {
		if n == "outside" {
			out = append(out, outsideAddr)
			continue
		}
		out = append(out, w.Office(n).Addr)
	}
	return out
}

func (w *World) theirs(what string, offices []string, change func(*line)) *Lines {
	return &Lines{w: w, what: what, a: w.addrs(offices), names: strings.Join(offices, ", "), change: change}
}

// Cut cuts lines of these offices: w.Cut("hq").From("plzen"). "outside" is the
// Internet's side of an office's mail to others.
func (w *World) Cut(offices ...string) *Lines {
	return w.theirs("cut", offices, func(l *line) { l.cut = true })
}

// Heal makes lines of these offices as good as new.
func (w *World) Heal(offices ...string) *Lines {
	return w.theirs("heal", offices, func(l *line) { *l = line{} })
}

// Slow adds d to each packet's way, Lossy loses a share of packets.
func (w *World) Slow(d time.Duration, offices ...string) *Lines {
	return w.theirs("slow "+d.String(), offices, func(l *line) { l.extra = d })
}

// Lossy loses a share (0 to 1) of the packets.
func (w *World) Lossy(share float64, offices ...string) *Lines {
	return w.theirs(fmt.Sprintf("lose %.2f", share), offices, func(l *line) { l.loss = share })
}

// Twice lets a share (0 to 1) of the packets come twice.
func (w *World) Twice(share float64, offices ...string) *Lines {
	return w.theirs(fmt.Sprintf("double %.2f", share), offices, func(l *line) { l.twice = share })
}

// Late lets a share of the packets come after later ones.
func (w *World) Late(share float64, offices ...string) *Lines {
	return w.theirs(fmt.Sprintf("reorder %.2f", share), offices, func(l *line) { l.late = share })
}

// Flipped turns a bit in a share of the packets.
func (w *World) Flipped(share float64, offices ...string) *Lines {
	return w.theirs(fmt.Sprintf("corrupt %.2f", share), offices, func(l *line) { l.flipped = share })
}

// Narrow loses packets of more than so many bytes; 0: none.
func (w *World) Narrow(mtu int, offices ...string) *Lines {
	return w.theirs(fmt.Sprintf("lose packets over %d bytes", mtu), offices, func(l *line) { l.mtu = mtu })
}

// From changes the lines between the offices and those others, both ways.
func (l *Lines) From(others ...string) *Lines {
	l.w.note("%s: the lines between %s and %s", l.what, l.names, strings.Join(others, ", "))
	return l.apply(others, true)
}

// Toward changes one direction only: what the offices send to those others.
func (l *Lines) Toward(others ...string) *Lines {
	l.w.note("%s: what %s send to %s", l.what, l.names, strings.Join(others, ", "))
	return l.apply(others, false)
}

// FromAll changes the lines to all other offices, both ways.
func (l *Lines) FromAll() *Lines {
	var others []string
	for _, o := range l.w.Offices {
		if !slices.Contains(l.a, o.Addr) {
			others = append(others, o.Name)
		}
	}
	return l.From(others...)
}

func (l *Lines) apply(others []string, both bool) *Lines {
	w := l.w
	theirs := w.addrs(others)
	w.mu.Lock()
	for _, x := range l.a {
		for _, y := range theirs {
			for _, way := range [][2]netip.Addr{{x, y}, {y, x}} {
				if way[0] == y && !both {
					continue
				}
				s := w.lines[way]
				l.change(&s)
				w.lines[way] = s
				l.ways = append(l.ways, way)
			}
		}
	}
	w.mu.Unlock()
	w.keepLines(l.ways)
	w.breakCut()
	return l
}

// For changes the lines, to all other offices if nothing else was said, lets
// time pass, and heals them: w.Cut("hq").For(3*time.Hour).
func (l *Lines) For(d time.Duration) {
	if l.ways == nil {
		l.FromAll()
	}
	time.Sleep(d)
	l.heal()
}

// Flap changes the lines, to all other offices if nothing else was said, for
// down and heals them for up, so many times.
func (l *Lines) Flap(down, up time.Duration, times int) {
	if l.ways == nil {
		l.FromAll()
	}
	for i := range times {
		if i > 0 {
			l.w.note("%s again: %s", l.what, l.names)
			l.again()
		}
		time.Sleep(down)
		l.heal()
		time.Sleep(up)
	}
}

// heal makes the lines that were changed as good as new.
func (l *Lines) heal() {
	l.w.note("the lines of %s are healed", l.names)
	l.w.mu.Lock()
	for _, way := range l.ways {
		delete(l.w.lines, way)
	}
	l.w.mu.Unlock()
	l.w.keepLines(l.ways)
}

// again changes the same lines as before.
func (l *Lines) again() {
	l.w.mu.Lock()
	for _, way := range l.ways {
		s := l.w.lines[way]
		l.change(&s)
		l.w.lines[way] = s
	}
	l.w.mu.Unlock()
	l.w.keepLines(l.ways)
	l.w.breakCut()
}

// HealAll makes all lines as good as new.
func (w *World) HealAll() {
	w.note("all lines are healed")
	w.mu.Lock()
	var ways [][2]netip.Addr
	for way := range w.lines {
		ways = append(ways, way)
	}
	clear(w.lines)
	w.mu.Unlock()
	w.keepLines(ways)
}

// keepLines writes down which of these lines are cut now.
func (w *World) keepLines(ways [][2]netip.Addr) {
	name := func(a netip.Addr) string {
		for _, o := range w.Offices {
			if o.Addr == a {
				return o.Name
			}
		}
		return "outside"
	}
	for _, way := range ways {
		w.mu.Lock()
		cut := w.lines[way].cut || w.lines[[2]netip.Addr{way[1], way[0]}].cut
		w.mu.Unlock()
		w.keeper.Line(name(way[0]), name(way[1]), cut)
	}
}

// breakCut breaks the connections over lines that are cut.
func (w *World) breakCut() {
	w.breakConns(func(from, to netip.Addr) bool { // called with w.mu held
		return w.lines[[2]netip.Addr{from, to}].cut || w.lines[[2]netip.Addr{to, from}].cut
	})
}

// Kill is a power cut at these offices, together.
func (w *World) Kill(offices ...string) {
	for _, n := range offices {
		w.Office(n).Kill()
	}
}

// Stop stops these offices one after the other, as SIGTERM does.
func (w *World) Stop(offices ...string) {
	for _, n := range offices {
		w.Office(n).Stop()
	}
}

// Start starts these offices.
func (w *World) Start(offices ...string) {
	for _, n := range offices {
		w.Office(n).Start()
	}
}

// component returns the running offices that are connected with this one both
// ways, directly or through others, as far as lines and power go.
func (w *World) component(o *Office) (out []*Office) {
	var up []*Office // asked before w.mu is taken: an office's own lock comes first
	for _, x := range w.belonging() {
		if x.Up() {
			up = append(up, x)
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	open := func(a, b *Office) bool {
		return !w.lines[[2]netip.Addr{a.Addr, b.Addr}].cut && !w.lines[[2]netip.Addr{b.Addr, a.Addr}].cut
	}
	out = []*Office{o}
	for i := 0; i < len(out); i++ {
		for _, x := range up {
			if open(out[i], x) && !slices.Contains(out, x) {
				out = append(out, x)
			}
		}
	}
	return out
}
