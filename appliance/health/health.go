// Package health keeps the named conditions of a node: what is wrong, for whom,
// since when, and what to do next. The status page, the command line and the
// API show the same list; one sentence sums it up.
package health

import (
	"slices"
	"strings"
	"sync"
	"time"
)

// Severity orders conditions; the gravest comes first.
type Severity uint8

// The severities.
const (
	Notice  Severity = iota + 1 // worth knowing, nothing to do
	Warning                     // someone should look this week
	Problem                     // someone cannot do something now
)

func (s Severity) String() string {
	return [...]string{"", "notice", "warning", "problem"}[s]
}

// Condition is one thing that is wrong.
type Condition struct {
	Name     string    `json:"name"` // stable, dotted: "store.full", "join.token"
	About    string    `json:"about,omitempty"`
	Severity Severity  `json:"-"`
	Level    string    `json:"severity"`
	Text     string    `json:"text"` // one sentence: who cannot do what
	Next     string    `json:"next,omitempty"`
	Since    time.Time `json:"since"`
}

// Board holds the conditions in force. It is safe for concurrent use.
type Board struct {
	mu      sync.Mutex
	list    map[[2]string]Condition
	changed func()
}

// New returns an empty board; changed (nil allowed) is called without a lock
// held after each change.
func New(changed func()) *Board {
	return &Board{list: map[[2]string]Condition{}, changed: changed}
}

// Set puts a condition in force or changes its text; About tells several of one
// name apart. Since is kept from the first time.
func (b *Board) Set(c Condition) {
	key := [2]string{c.Name, c.About}
	b.mu.Lock()
	old, had := b.list[key]
	if c.Since.IsZero() {
		c.Since = time.Now().UTC()
	}
	if had {
		c.Since = old.Since
	}
	c.Level = c.Severity.String()
	b.list[key] = c
	b.mu.Unlock()
	if b.changed != nil && old != c {
		b.changed()
	}
}

// Clear ends a condition; harmless when it is not in force.
func (b *Board) Clear(name, about string) {
	b.mu.Lock()
	_, had := b.list[[2]string{name, about}]
	delete(b.list, [2]string{name, about})
	b.mu.Unlock()
	if had && b.changed != nil {
		b.changed()
	}
}

// Conditions returns what is in force, the gravest and oldest first.
func (b *Board) Conditions() []Condition {
	b.mu.Lock()
	out := make([]Condition, 0, len(b.list))
	for _, c := range b.list {
		out = append(out, c)
	}
	b.mu.Unlock()
	slices.SortFunc(out, func(x, y Condition) int {
		if x.Severity != y.Severity {
			return int(y.Severity) - int(x.Severity)
		}
		if c := x.Since.Compare(y.Since); c != 0 {
			return c
		}
		return strings.Compare(x.Name+x.About, y.Name+y.About)
	})
	return out
}

// Sentence sums the board up. ok is false when somebody cannot do something.
func (b *Board) Sentence() (ok bool, sentence string) { return Sum(b.Conditions()) }

// Sum makes one sentence, or a few, of conditions that are sorted as
// Conditions sorts them. ok is false when somebody cannot do something.
func Sum(cs []Condition) (ok bool, sentence string) {
	if len(cs) == 0 || cs[0].Severity == Notice {
		return true, "All mail is flowing."
	}
	var said []string
	for _, c := range cs[:min(len(cs), 3)] {
		if c.Severity > Notice {
			said = append(said, c.Text)
		}
	}
	return cs[0].Severity < Problem, strings.Join(said, " ")
}
