package journal

import (
	"fmt"
	"slices"
	"time"

	"posthouse/mailstore/log"
)

// Condition is something about the store that a person should know. The
// appliance shows it.
type Condition struct {
	Name  string    // one of the constants below
	Text  string    // one sentence for the admin
	Since time.Time // when it was found
}

// The names of conditions.
const (
	CondLogLostEnd  = "store.log-lost-end" // the log ends before what had been stored
	CondViewOld     = "store.view-old"     // the view is from before what had been stored
	CondDamaged     = "store.damaged"      // bytes of the log are not what was written
	CondViewDamaged = "store.view-damaged" // the view is to be rebuilt at the next start
	CondViewWrong   = "store.view-wrong"   // rows of the view contradict each other
	CondHistoryLost = "store.history-lost" // no view, and no checkpoint to make one from
	CondViewRebuilt = "store.view-rebuilt" // the view was rebuilt at this start
	CondNoSpace     = "store.no-space"     // the disk is below its floor
	CondStopped     = "store.stopped"      // the journal has failed
)

// maxDamage bounds the conditions that name damage; the log has the rest.
const maxDamage = 100

func (j *Journal) note(name, text string) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.conditions = append(j.conditions, Condition{name, text, time.Now().UTC()})
}

// noteOnce is note for what is found again and again.
func (j *Journal) noteOnce(name, text string) {
	j.mu.Lock()
	known := slices.ContainsFunc(j.conditions, func(c Condition) bool { return c.Name == name })
	j.mu.Unlock()
	if !known {
		j.note(name, text)
	}
}

// noteDamaged makes a condition of damage that was met in a part of the log.
func (j *Journal) noteDamaged(what string, err error) {
	text := fmt.Sprintf("%s is damaged: %v", what, err)
	j.mu.Lock()
	known := slices.ContainsFunc(j.conditions, func(c Condition) bool { return c.Text == text })
	j.mu.Unlock()
	if !known {
		j.note(CondDamaged, text)
		j.slog.Error("damage met while tidying", "err", err)
	}
}

// noteDamage makes a condition of each damage that has none yet.
func (j *Journal) noteDamage(r log.Report) {
	j.mu.Lock()
	defer j.mu.Unlock()
	known := map[string]bool{}
	for _, c := range j.conditions {
		known[c.Text] = true
	}
	for i, d := range r.Damage {
		if i == maxDamage {
			break
		}
		c := Condition{CondDamaged, "the message log is damaged: " + d.String(), time.Now().UTC()}
		if !known[c.Text] {
			j.conditions = append(j.conditions, c)
			j.slog.Error("message log damaged", "file", d.File, "offset", d.Offset, "what", d.What)
		}
	}
	if n := len(r.Damage) - maxDamage; n > 0 {
		if text := fmt.Sprintf("the message log is damaged at %d more places", n); !known[text] {
			j.conditions = append(j.conditions, Condition{CondDamaged, text, time.Now().UTC()})
		}
	}
}

// Conditions returns what is wrong now, the oldest first. It may be called at
// any time after Open, also while Start replays.
func (j *Journal) Conditions() []Condition {
	full := j.view.Full()
	j.mu.Lock()
	defer j.mu.Unlock()
	cs := append([]Condition(nil), j.conditions...)
	switch {
	case !full:
		j.fullSince = time.Time{}
	case j.fullSince.IsZero():
		j.fullSince = time.Now().UTC()
	}
	if full {
		cs = append(cs, Condition{CondNoSpace, "the disk is nearly full: no mail is accepted until there is space again", j.fullSince})
	}
	if j.failed != nil && j.failed != ErrClosed {
		cs = append(cs, Condition{CondStopped, "the mail store has stopped: " + j.failed.Error(), time.Now().UTC()})
	}
	return cs
}
