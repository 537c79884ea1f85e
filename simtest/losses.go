package simtest

import (
	"strings"
	"time"

	"posthouse/appliance/admin"
)

// loss is what an office's machine lost at one moment, or may have: a disk that
// is gone, an old image of it, a node that was put out of the mesh. The
// invariants leave out what such a node held.
type loss struct {
	o       *Office
	image   time.Time // what was there at that time is there again; zero: nothing is
	at      time.Time
	emptied time.Time       // when nothing was seen to wait there last
	kept    map[string]bool // subjects that stand in its INBOX again
}

// loses notes a loss. kept are subjects of which its INBOX still has a copy.
func (l *Ledger) loses(o *Office, image time.Time, kept map[string]bool) {
	l.leaves(o, image, kept)
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.letters, o.Name) // other UIDs from now on
	l.renewed[o.Name] = true
	delete(l.shown, o.Name)
}

// leaves is loses for an office whose mailboxes nobody reads any more.
func (l *Ledger) leaves(o *Office, image time.Time, kept map[string]bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.losses = append(l.losses, loss{o: o, image: image, at: time.Now(), emptied: time.Unix(0, o.emptied.Load()), kept: kept})
}

// lostSince reports whether an office lost its disk, or some of it, after a time.
// Called with l.mu held.
func (l *Ledger) lostSince(o *Office, t time.Time) bool {
	for _, x := range l.losses {
		if x.o == o && !t.After(x.at) {
			return true
		}
	}
	return false
}

// excused reports whether a message that was accepted may have no outcome for a
// recipient: some node that may have held it, or its copy, lost it. Called with
// l.mu held.
func (l *Ledger) excused(a *attempt, r string) bool {
	o, outside := l.w.Office(a.at), !strings.HasSuffix(r, "@"+Domain)
	if o.lost.Load() && a.when.UnixNano() > o.emptied.Load()-int64(time.Second) {
		return true
	}
	for _, x := range l.losses {
		if a.when.After(x.at) {
			continue
		}
		held := x.emptied // what came later may have waited there
		if held.Before(x.image) {
			held = x.image
		}
		user := x.o.Name + "@" + Domain
		switch {
		case r == user && !x.kept[a.subject]: // the copy
			return true
		case x.o == o && a.when.After(held.Add(-time.Second)):
			return true
		case outside && (x.o == o || x.o.gateway) && !x.image.IsZero(): // held for a person
			return true
		case outside && x.o.gateway: // in its custody
			return true
		case outside && a.from == user: // the report
			return true
		}
	}
	return false
}

// waiting counts the recipients that wait at a node.
func waiting(s admin.Status) int {
	n := s.QueueOutside + s.QueueHeld
	for _, m := range s.Members {
		n += m.Queue
	}
	return n
}

// waits notes how much waits at an office's node now.
func (o *Office) waits(s admin.Status) {
	if len(s.Members) == 0 { // it starts still, and does not know
		return
	}
	if waiting(s) == 0 && !o.lost.Load() && !o.apart.Load() { // who was put out shows no others to wait for
		o.emptied.Store(time.Now().UnixNano())
	}
}
