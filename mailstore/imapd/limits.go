package imapd

import (
	"context"
	"net"
	"net/netip"
	"sync"
	"time"
)

// limits counts connections.
type limits struct {
	mu      sync.Mutex
	waiting map[netip.Addr]int // not logged in
	users   map[string]int
}

func (l *limits) init() {
	l.waiting, l.users = map[netip.Addr]int{}, map[string]int{}
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

// pause waits, or returns early with ctx.
func pause(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}
