package imapd

import (
	"context"
	"net"
	"net/netip"
	"sync"
	"time"
)

const (
	firstDelay  = time.Second      // after one failed login
	longDelay   = 16 * time.Second // after five and more
	forgetAfter = 15 * time.Minute // without another failure
	maxFailures = 4096             // (address, user) pairs remembered
)

// limits counts connections and failed logins.
type limits struct {
	mu       sync.Mutex
	waiting  map[netip.Addr]int // not logged in
	users    map[string]int
	failures map[failureKey]failure
}

type failureKey struct {
	addr netip.Addr
	user string
}

type failure struct {
	count int
	last  time.Time
}

func (l *limits) init() {
	l.waiting, l.users, l.failures = map[netip.Addr]int{}, map[string]int{}, map[failureKey]failure{}
}

// addressOf returns the peer's address as the limits count it: an IPv6 client
// has a whole /64 to itself.
func addressOf(c net.Conn) netip.Addr {
	ap, err := netip.ParseAddrPort(c.RemoteAddr().String())
	if err != nil {
		return netip.Addr{}
	}
	a := ap.Addr().Unmap().WithZone("")
	if a.Is6() && !a.IsLoopback() {
		if p, err := a.Prefix(64); err == nil {
			return p.Addr()
		}
	}
	return a
}

// arrive counts a connection that is not logged in; false means too many.
func (l *limits) arrive(a netip.Addr, most int) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.waiting[a] >= most && !a.IsLoopback() && a.IsValid() {
		return false
	}
	l.waiting[a]++
	return true
}

// depart ends what arrive counted: the connection is gone, or logged in.
func (l *limits) depart(a netip.Addr) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.waiting[a]--; l.waiting[a] <= 0 {
		delete(l.waiting, a)
	}
}

// login counts a connection of a user; false means too many.
func (l *limits) login(user string, most int) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.users[user] >= most {
		return false
	}
	l.users[user]++
	return true
}

// logout ends what login counted.
func (l *limits) logout(user string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.users[user]--; l.users[user] <= 0 {
		delete(l.users, user)
	}
}

// failed notes a wrong password and returns how long its answer is to wait.
// The right password is never slowed down nor refused.
func (l *limits) failed(a netip.Addr, user string, now time.Time) time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	k := failureKey{a, user[:min(len(user), 255)]}
	f := l.failures[k]
	if now.Sub(f.last) > forgetAfter {
		f.count = 0
	}
	if _, known := l.failures[k]; !known && len(l.failures) >= maxFailures {
		l.forget(now)
	}
	f.count, f.last = f.count+1, now
	l.failures[k] = f
	return min(firstDelay<<min(f.count-1, 10), longDelay)
}

// forget makes room: all that is old, or else the oldest of a few.
func (l *limits) forget(now time.Time) {
	var oldest failureKey
	var when time.Time
	for k, f := range l.failures {
		if now.Sub(f.last) > forgetAfter {
			delete(l.failures, k)
		} else if when.IsZero() || f.last.Before(when) {
			oldest, when = k, f.last
		}
	}
	if len(l.failures) >= maxFailures {
		delete(l.failures, oldest)
	}
}

// succeeded forgets the failures of a pair.
func (l *limits) succeeded(a netip.Addr, user string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.failures, failureKey{a, user[:min(len(user), 255)]})
}

// pause waits, or returns early with ctx.
func pause(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}
