package simtest

import (
	"sync"
	"time"
)

// memory is what the observer knows of an office's disk, to tell which answers
// of the outside the node could not note before it ended: SMTP has no cure for
// those, they are given again. A gateway stops sending when its disk is full or
// its log has failed, so only what was under way then is excused.
type memory struct {
	mu      sync.Mutex
	full    time.Time // since when; zero: never
	room    time.Time // since when again; before full: it is full
	failed  time.Time // a write or sync failed last
	sync    time.Duration
	quicker time.Time // until when a slow disk still has a backlog
}

const (
	// recordTime is from the outside's answer until its record is on disk, on a
	// disk in order: the answer travels, and a client's transaction ends.
	recordTime = 5 * time.Second
	// transactionTime bounds what was handed to a connection when the disk became
	// full, or failed.
	transactionTime = 10 * time.Second
	// repeatTime is from new room until what was refused is recorded.
	repeatTime = 5 * time.Second
)

func (m *memory) broke() { m.mu.Lock(); m.failed = time.Now(); m.mu.Unlock() }

func (m *memory) filled(full bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if full {
		m.full = time.Now()
	} else {
		m.room = time.Now()
	}
}

func (m *memory) slowed(d time.Duration) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if d == 0 {
		m.quicker = time.Now().Add(stopSyncs * m.sync)
		return
	}
	m.sync, m.quicker = d, time.Time{}
}

// forgets notes that the office's node ended, from a moment on until now: which
// answers of the outside it may have forgotten.
func (o *Office) forgets(from time.Time) {
	m, now, l := &o.memory, time.Now(), o.w.ledger
	m.mu.Lock()
	defer m.mu.Unlock()
	lag := recordTime
	if m.quicker.IsZero() || now.Before(m.quicker) {
		lag += stopSyncs * m.sync
	}
	l.trouble(o, from.Add(-lag), now)
	if !m.failed.IsZero() {
		l.trouble(o, m.failed.Add(-lag), m.failed.Add(transactionTime))
	}
	if !m.full.IsZero() && (m.room.Before(m.full) || from.Before(m.room.Add(repeatTime))) {
		l.trouble(o, m.full.Add(-lag), m.full.Add(transactionTime))
	}
}
