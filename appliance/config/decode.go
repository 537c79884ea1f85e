package config

import (
	"errors"
	"fmt"
	"reflect"
	"regexp"
	"strconv"
	"strings"

	"github.com/BurntSushi/toml"
)

// Problem is one thing wrong in a file.
type Problem struct {
	Key  string // "listen.smtp"
	Line int    // 0 when the key is absent
	Text string // what is wrong and what to write instead
}

// Problems is every thing wrong in a file, at once.
type Problems struct {
	File string
	List []Problem
}

// Error lists one problem a line: "file:line: key: text".
func (p *Problems) Error() string {
	var b strings.Builder
	for i, x := range p.List {
		if i > 0 {
			b.WriteByte('\n')
		}
		b.WriteString(p.File)
		if x.Line > 0 {
			fmt.Fprintf(&b, ":%d", x.Line)
		}
		if x.Key != "" {
			b.WriteString(": " + x.Key)
		}
		b.WriteString(": " + x.Text)
	}
	return b.String()
}

// Decode reads TOML that people write into the struct at into: a key that the
// struct does not have is a problem with its line and the nearest key that it
// has. ok is false when the text could not be read at all.
func Decode(text string, into any) (problems []Problem, ok bool) {
	md, err := toml.Decode(text, into)
	if err != nil {
		return []Problem{problemOf(err)}, false
	}
	known, seen := keys(reflect.TypeOf(into).Elem(), ""), map[string]int{}
	for _, k := range md.Undecoded() {
		key := k.String()
		what := "no such key"
		if s := nearest(key, known); s != "" {
			what += fmt.Sprintf("; did you mean %q?", s)
		}
		problems = append(problems, Problem{key, nthLine(text, key, seen[key]), what})
		seen[key]++
	}
	return problems, true
}

// nested is how a type error inside a table prints: the library wraps its own
// error once more and keeps the position only in the text.
var nested = regexp.MustCompile(`(?s)^toml: line (\d+) \(last key "([^"]*)"\): (.*)$`)

// problemOf turns the library's error into a Problem.
func problemOf(err error) Problem {
	var pe toml.ParseError
	if errors.As(err, &pe) && pe.Position.Line > 0 {
		return Problem{Key: pe.LastKey, Line: pe.Position.Line, Text: plain(pe.Message)}
	}
	if m := nested.FindStringSubmatch(err.Error()); m != nil {
		line, _ := strconv.Atoi(m[1])
		return Problem{Key: m[2], Line: line, Text: plain(m[3])}
	}
	return Problem{Text: plain(err.Error())}
}

// plain says what the library found in words for people who do not program.
func plain(text string) string {
	if _, to, ok := strings.Cut(text, "destination has type "); ok {
		switch to {
		case "string":
			return "want text in quotes, such as \"plzen\""
		case "int", "integer", "int64":
			return "want a number, without quotes"
		case "[]string", "slice":
			return "want a list, such as [\"10.0.0.0/8\"]"
		case "Duration", "config.Duration":
			return "want a duration in quotes, such as \"60s\""
		}
	}
	if strings.HasPrefix(text, "type mismatch") && strings.Contains(text, "expected table") {
		return "want a table: a line with the name in brackets, such as [listen], and its keys below"
	}
	if text == "strings cannot contain newlines" {
		return "the closing quote is missing"
	}
	return strings.TrimPrefix(text, "toml: ")
}

// keys lists the dotted TOML keys of a struct type.
func keys(t reflect.Type, prefix string) (all []string) {
	for f := range t.Fields() {
		name := prefix + f.Tag.Get("toml")
		all = append(all, name)
		of := f.Type
		if of.Kind() == reflect.Slice {
			of = of.Elem()
		}
		if of.Kind() == reflect.Struct {
			all = append(all, keys(of, name+".")...)
		}
	}
	return all
}

// nearest returns the known key closest to key, or "" when none is close.
func nearest(key string, known []string) string {
	best, at := "", 1+len(key)/3
	last := func(s string) string { return s[strings.LastIndexByte(s, '.')+1:] }
	for _, k := range known {
		if d := min(distance(key, k), distance(last(key), last(k))+1); d <= at {
			if d < at || best == "" {
				best, at = k, d
			}
		}
	}
	return best
}

// distance is the Levenshtein distance of a and b.
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diag := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := diag
			if a[i] != b[j] {
				cost = 1 + min(diag, row[j], row[j+1])
			}
			diag, row[j+1] = row[j+1], cost
		}
	}
	return row[len(b)]
}

// LineOf finds the line of a dotted key, 0 when it does not stand there. In a
// list of tables ([[event]]) it is that of the table with this index.
func LineOf(text, key string, index int) int {
	line := 0
	find(text, key, func(at, table int) bool {
		if table == index || table < 0 {
			line = at
		}
		return line == 0
	})
	return line
}

// nthLine finds the line where a dotted key stands for the n-th time.
func nthLine(text, key string, n int) int {
	line := 0
	find(text, key, func(at, _ int) bool { line = at; n--; return n >= 0 })
	return line
}

// find calls f with each line where a dotted key stands, and with the index of
// the table in its list, -1 outside of lists, until f returns false.
func find(text, key string, f func(line, table int) bool) {
	section, index := "", -1
	count := map[string]int{}
	table, name := "", key
	if i := strings.LastIndexByte(key, '.'); i >= 0 {
		table, name = key[:i], key[i+1:]
	}
	for i, line := range strings.Split(text, "\n") {
		line = strings.TrimSpace(line)
		if strings.HasPrefix(line, "[") {
			head, _, _ := strings.Cut(line, "#")
			section, index = strings.Trim(head, "[] \t"), -1
			if strings.HasPrefix(line, "[[") {
				index = count[section]
				count[section]++
			}
			if section == key && !f(i+1, index) {
				return
			}
			continue
		}
		k, _, ok := strings.Cut(line, "=")
		k = strings.TrimSpace(k)
		if ok && (section == table && k == name || table != "" && section == "" && k == key) && !f(i+1, index) {
			return
		}
	}
}
