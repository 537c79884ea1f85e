package simtest

import "posthouse/simtest/record"

// Invariant is one thing that must hold, by the number under which the project
// knows it.
type Invariant int

// The invariants. Each is checked from outside of the nodes.
const (
	OneOutcome       Invariant = 1 + iota // accepted mail: exactly once, or one report
	RefusedIsNowhere                      // refused mail is delivered to nobody
	OrderIsKept                           // of one sender to one recipient
	OneMaster                             // a term; writes need a majority; equal copies
	LocalMailFlows                        // within a second, in whatever split
	HealsInTime                           // members agree, queues drain
	UIDsStand                             // never another message, never taken back
	NothingIsLeft                         // goroutines, ports; stops in time
	RevokedIsOut                          // no message, no membership, no state
	MeshRules                             // detours, lineages after a promote
	invariants       = 10
)

// invariantTexts are the invariants in a line each, for people.
var invariantTexts = [1 + invariants]string{
	OneOutcome:       "accepted mail arrives exactly once, or its sender is told once",
	RefusedIsNowhere: "refused mail is delivered to nobody, and nothing that nobody sent",
	OrderIsKept:      "one sender's mail to one recipient keeps its order",
	OneMaster:        "one master a term, no change without a majority, equal copies",
	LocalMailFlows:   "mail inside an office arrives within a second, whatever is cut",
	HealsInTime:      "after the faults members agree in 60 s and queues drain",
	UIDsStand:        "message numbers (UIDs) never mean another message",
	NothingIsLeft:    "nodes stop in 30 s and leave nothing running",
	RevokedIsOut:     "a revoked node gets no mail, no members, no changes",
	MeshRules:        "mail goes around a cut line; one lineage after a promote",
}

// checked counts n checks of an invariant, whatever they came to.
func (w *World) checked(i Invariant, n int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.checks[i] += n
}

// Verdicts is what was checked so far and what it came to.
func (w *World) Verdicts() (out []record.Verdict) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for i := Invariant(1); i <= invariants; i++ {
		out = append(out, record.Verdict{Number: int(i), Text: invariantTexts[i], Checked: w.checks[i], Broken: w.broken[i]})
	}
	return out
}
