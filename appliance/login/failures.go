package login

import (
	"net/netip"
	"strings"
	"sync"
	"time"
)

// Limits of Failures.
const (
	firstDelay  = time.Second
	longDelay   = 16 * time.Second
	failureLife = 15 * time.Minute
	maxFailures = 16384 // pairs remembered
)

// Failures knows how often a password was wrong of late, by address and user,
// and so how long the next answer has to wait. It delays; it locks nobody out.
// A node has one for all its doors, so that nobody guesses faster by knocking
// at several, and one for the questions of other nodes.
// It is safe for concurrent use; the zero value is ready.
type Failures struct {
	mu sync.Mutex
	of map[failureKey]failure
}

type failureKey struct {
	from netip.Addr
	user string
}

type failure struct {
	count int
	last  time.Time
}

func keyOf(from netip.Addr, user string) failureKey {
	if from = from.Unmap().WithZone(""); from.Is6() {
		p, _ := from.Prefix(64) // one customer's network
		from = p.Addr()
	}
	return failureKey{from, strings.ToLower(user[:min(len(user), 255)])}
}

// Failed notes a wrong password and returns how long after its question it is
// to be answered: 1, 2, 4, 8, 16 s.
func (f *Failures) Failed(from netip.Addr, user string, now time.Time) time.Duration {
	k := keyOf(from, user)
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.of == nil {
		f.of = map[failureKey]failure{}
	}
	x, known := f.of[k]
	if now.Sub(x.last) > failureLife {
		x.count = 0
	}
	if !known && len(f.of) >= maxFailures {
		f.makeRoom(now)
	}
	x.count, x.last = x.count+1, now
	f.of[k] = x
	return min(firstDelay<<min(x.count-1, 10), longDelay)
}

// makeRoom forgets what is old, or else the oldest.
func (f *Failures) makeRoom(now time.Time) {
	var oldest failureKey
	var when time.Time
	for k, x := range f.of {
		if now.Sub(x.last) > failureLife {
			delete(f.of, k)
		} else if when.IsZero() || x.last.Before(when) {
			oldest, when = k, x.last
		}
	}
	if len(f.of) >= maxFailures {
		delete(f.of, oldest)
	}
}

// Succeeded forgets the failures of a pair.
func (f *Failures) Succeeded(from netip.Addr, user string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.of, keyOf(from, user))
}
