package mime

import (
	"strings"
	"time"
)

// ParseDate reads a date of RFC 5322 section 3.3 with its obsolete forms, and
// what senders make of it. ok is false when no day and time can be made out.
func ParseDate(value []byte) (t time.Time, ok bool) {
	s := unfold(value, 256)
	var tokens [16]string
	n := 0
	for i := 0; i < len(s) && n < len(tokens); {
		switch c := s[i]; {
		case c == '(':
			p := addressParser{s: s, pos: i}
			p.readComment()
			i = p.pos
		case c == ' ' || c == '\t' || c == ',':
			i++
		default:
			j := i
			for j < len(s) && strings.IndexByte(" \t,(", s[j]) < 0 {
				j++
			}
			tokens[n] = s[i:j]
			n++
			i = j
		}
	}
	if n > 0 && len(tokens[0]) >= 10 && tokens[0][4] == '-' {
		for _, layout := range []string{time.RFC3339, "2006-01-02T15:04:05", "2006-01-02T15:04"} {
			if t, err := time.Parse(layout, tokens[0]); err == nil {
				return t, true
			}
		}
	}
	day, month, year := -1, time.Month(0), -1
	clock, zone, haveClock, haveZone := time.Duration(0), 0, false, false
	for _, tok := range tokens[:n] {
		if parts := strings.Split(tok, "-"); len(parts) == 3 && month == 0 && day < 0 { // 2-Jan-2006
			day, month, year = number(parts[0]), monthOf(parts[1]), yearOf(parts[2])
			continue
		}
		switch {
		case strings.ContainsRune(tok, ':') && tok[0] != '+' && tok[0] != '-':
			if d, good := clockOf(tok); good && !haveClock {
				clock, haveClock = d, true
			}
		case haveClock && !haveZone && (tok[0] == '+' || tok[0] == '-') && len(tok) >= 5:
			if v := number(strings.Replace(tok[1:], ":", "", 1)); v >= 0 && v%100 < 60 && v/100 <= 24 {
				zone, haveZone = v/100*3600+v%100*60, true
				if tok[0] == '-' {
					zone = -zone
				}
			}
		case month == 0 && monthOf(tok) != 0:
			month = monthOf(tok)
		case number(tok) >= 0:
			switch {
			case day < 0 && len(tok) <= 2:
				day = number(tok)
			case year < 0:
				year = yearOf(tok)
			}
		case haveClock && !haveZone:
			if z, good := zoneOf(tok); good {
				zone, haveZone = z, true
			}
		}
	}
	if day < 1 || day > 31 || month == 0 || year < 1 || year > 9999 || !haveClock {
		return time.Time{}, false
	}
	loc := time.UTC
	if zone != 0 {
		loc = time.FixedZone("", zone)
	}
	return time.Date(year, month, day, 0, 0, 0, 0, loc).Add(clock), true
}

func number(s string) int {
	if s == "" || len(s) > 6 {
		return -1
	}
	n := 0
	for i := range len(s) {
		if s[i] < '0' || s[i] > '9' {
			return -1
		}
		n = n*10 + int(s[i]-'0')
	}
	return n
}

// yearOf reads a year; RFC 5322 section 4.3 says what two and three digits mean.
func yearOf(s string) int {
	y := number(s)
	switch {
	case y < 0:
	case len(s) == 2 && y < 50:
		y += 2000
	case len(s) == 2 || len(s) == 3:
		y += 1900
	}
	return y
}

var months = [...]string{"jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"}

func monthOf(s string) time.Month {
	if len(s) >= 3 && len(s) <= 9 {
		for i, m := range months {
			if strings.EqualFold(s[:3], m) {
				return time.Month(i + 1)
			}
		}
	}
	return 0
}

func clockOf(s string) (time.Duration, bool) {
	parts := strings.Split(s, ":")
	if len(parts) < 2 || len(parts) > 3 {
		return 0, false
	}
	h, m, sec := number(parts[0]), number(parts[1]), 0
	if len(parts) == 3 {
		whole, _, _ := strings.Cut(parts[2], ".")
		sec = number(whole)
	}
	if h < 0 || h > 24 || m < 0 || m > 59 || sec < 0 || sec > 60 {
		return 0, false
	}
	return time.Duration(h)*time.Hour + time.Duration(m)*time.Minute + time.Duration(sec)*time.Second, true
}

func zoneOf(s string) (int, bool) {
	switch strings.ToUpper(s) {
	case "UT", "GMT", "UTC", "Z":
		return 0, true
	case "EDT":
		return -4 * 3600, true
	case "EST", "CDT":
		return -5 * 3600, true
	case "CST", "MDT":
		return -6 * 3600, true
	case "MST", "PDT":
		return -7 * 3600, true
	case "PST":
		return -8 * 3600, true
	case "CET", "MEZ":
		return 3600, true
	case "CEST", "MESZ":
		return 7200, true
	}
	return 0, false
}
