package scenario

import (
	"fmt"
	"strconv"
	"strings"
	"time"
	"unicode"
)

// Span is a time that a person writes: "90 s", "2h", "1 day", "1h 30min".
type Span time.Duration

// units of a Span, by every word for them.
var units = map[string]time.Duration{
	"ms": time.Millisecond, "millisecond": time.Millisecond,
	"s": time.Second, "sec": time.Second, "second": time.Second,
	"m": time.Minute, "min": time.Minute, "minute": time.Minute,
	"h": time.Hour, "hour": time.Hour, "d": 24 * time.Hour, "day": 24 * time.Hour, "w": 7 * 24 * time.Hour, "week": 7 * 24 * time.Hour,
}

// UnmarshalText implements encoding.TextUnmarshaler.
func (s *Span) UnmarshalText(b []byte) error {
	bad := fmt.Errorf("%q: want a time such as \"90 s\", \"2h\" or \"1 day\"", b)
	rest, sum := strings.TrimSpace(string(b)), time.Duration(0)
	if rest == "" {
		return bad
	}
	for rest != "" {
		i := strings.IndexFunc(rest, func(r rune) bool { return !unicode.IsDigit(r) && r != '.' })
		if i <= 0 {
			return bad
		}
		n, err := strconv.ParseFloat(rest[:i], 64)
		rest = strings.TrimSpace(rest[i:])
		j := strings.IndexFunc(rest, func(r rune) bool { return !unicode.IsLetter(r) })
		if j < 0 {
			j = len(rest)
		}
		word := strings.ToLower(rest[:j])
		unit, ok := units[word]
		if !ok {
			unit, ok = units[strings.TrimSuffix(word, "s")]
		}
		if d := n * float64(unit); err != nil || !ok || d > float64(10*365*24*time.Hour) {
			return bad
		} else {
			sum += time.Duration(d)
		}
		rest = strings.TrimLeft(rest[j:], " ,")
	}
	*s = Span(sum)
	return nil
}

// String writes it as a person would.
func (s Span) String() string { return Spell(time.Duration(s)) }

// Shift is a Span that may go back: "-3 days".
type Shift time.Duration

// UnmarshalText implements encoding.TextUnmarshaler.
func (s *Shift) UnmarshalText(b []byte) error {
	text, back := strings.CutPrefix(strings.TrimSpace(string(b)), "-")
	var span Span
	if err := span.UnmarshalText([]byte(text)); err != nil {
		return fmt.Errorf("%q: want a time such as \"90 s\" or \"1 day\"", b)
	}
	if *s = Shift(span); back {
		*s = -*s
	}
	return nil
}

// String writes it as a person would.
func (s Shift) String() string {
	if s < 0 {
		return "-" + Spell(-time.Duration(s))
	}
	return Spell(time.Duration(s))
}

// Spell writes a duration as a person would: "1 day 2 h", "5 min", "30 s".
func Spell(d time.Duration) string {
	if d < time.Second {
		return fmt.Sprintf("%d ms", d.Milliseconds())
	}
	var out []string
	for _, u := range []struct {
		of   time.Duration
		name string
	}{{24 * time.Hour, "day"}, {time.Hour, "h"}, {time.Minute, "min"}, {time.Second, "s"}} {
		if n := d / u.of; n > 0 && len(out) < 2 {
			if u.name == "day" && n > 1 {
				u.name = "days"
			}
			out = append(out, fmt.Sprintf("%d %s", n, u.name))
		} else if len(out) > 0 {
			break
		}
		d %= u.of
	}
	return strings.Join(out, " ")
}

// Names are offices: "plzen" or ["plzen", "praha"].
type Names []string

// UnmarshalTOML takes one name or a list of them.
func (n *Names) UnmarshalTOML(v any) error {
	bad := fmt.Errorf("want an office such as \"plzen\", or a list such as [\"plzen\", \"praha\"]")
	switch v := v.(type) {
	case string:
		*n = Names{v}
	case []any:
		for _, x := range v {
			s, ok := x.(string)
			if !ok {
				return bad
			}
			*n = append(*n, s)
		}
	default:
		return bad
	}
	return nil
}

// Rate is bits a second: "2 Mbit/s", "512 kbit/s".
type Rate int64

// UnmarshalText implements encoding.TextUnmarshaler.
func (r *Rate) UnmarshalText(b []byte) error {
	word := strings.ToLower(strings.ReplaceAll(string(b), " ", ""))
	for unit, of := range map[string]float64{"kbit/s": 1e3, "mbit/s": 1e6, "gbit/s": 1e9} {
		if n, ok := strings.CutSuffix(word, unit); ok {
			if f, err := strconv.ParseFloat(n, 64); err == nil && f*of >= 8000 && f*of <= 1e12 {
				*r = Rate(f * of)
				return nil
			}
		}
	}
	return fmt.Errorf("%q: want a bandwidth such as \"2 Mbit/s\" or \"512 kbit/s\", at least 8 kbit/s", b)
}

// Percent is 0 to 100: "0.5 %".
type Percent float64

// UnmarshalText implements encoding.TextUnmarshaler.
func (p *Percent) UnmarshalText(b []byte) error {
	n, ok := strings.CutSuffix(strings.TrimSpace(string(b)), "%")
	f, err := strconv.ParseFloat(strings.TrimSpace(n), 64)
	if !ok || err != nil || !(f >= 0 && f <= 100) {
		return fmt.Errorf("%q: want a share such as \"5 %%\"", b)
	}
	*p = Percent(f)
	return nil
}
