package smtpd

import (
	"context"
	"net/netip"
	"sync"
	"time"
)

// limits counts what each client address holds.
type limits struct {
	cfg *Config

	mu      sync.Mutex
	total   int
	mx      map[netip.Addr]int
	pending map[netip.Addr]int // submission, not yet logged in
}

func newLimits(cfg *Config) *limits {
	return &limits{cfg: cfg, mx: map[netip.Addr]int{}, pending: map[netip.Addr]int{}}
}

// network is what counts as one client: an IPv4 address, an IPv6 /64.
func network(a netip.Addr) netip.Addr {
	if a.Is6() {
		p, _ := a.Prefix(64)
		return p.Addr()
	}
	return a
}

func (l *limits) trusted(a netip.Addr) bool {
	if a.IsLoopback() {
		return true
	}
	for _, p := range l.cfg.Trusted {
		if p.Contains(a) {
			return true
		}
	}
	return false
}

// slot is one connection's share; release it once.
type slot struct {
	l       *limits
	addr    netip.Addr
	table   map[netip.Addr]int // nil: not counted by address
	counted bool
}

// enter takes a slot; ok is false when there is none, and why says so.
func (l *limits) enter(a netip.Addr, port Port, trusted bool) (s slot, why string, ok bool) {
	s = slot{l: l, addr: network(a)}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.total >= l.cfg.MaxConns {
		return s, "Too many connections here now, try again later", false
	}
	if !trusted {
		most := l.cfg.ConnsPerAddr
		s.table = l.mx
		if port != PortMX {
			s.table, most = l.pending, l.cfg.PendingPerAddr
		}
		if s.table[s.addr] >= most {
			s.table = nil
			return s, "Too many connections from your address, close some and try again", false
		}
		s.table[s.addr]++
	}
	l.total++
	s.counted = true
	return s, "", true
}

// loggedIn frees the share of those who are not yet logged in.
func (s *slot) loggedIn() {
	s.l.mu.Lock()
	defer s.l.mu.Unlock()
	s.leaveTable()
}

func (s *slot) release() {
	s.l.mu.Lock()
	defer s.l.mu.Unlock()
	s.leaveTable()
	if s.counted {
		s.l.total--
		s.counted = false
	}
}

func (s *slot) leaveTable() {
	if s.table == nil {
		return
	}
	if s.table[s.addr]--; s.table[s.addr] <= 0 {
		delete(s.table, s.addr)
	}
	s.table = nil
}

// reverse is a reverse look-up under way. A nil one has no name.
type reverse struct {
	done chan struct{}
	name string
}

// startReverse looks a up in the background; the goroutine ends with ctx.
func startReverse(ctx context.Context, wg *sync.WaitGroup, timeout time.Duration, a netip.Addr, look func(context.Context, netip.Addr) string) *reverse {
	r := &reverse{done: make(chan struct{})}
	wg.Go(func() {
		defer close(r.done)
		ctx, cancel := context.WithTimeout(ctx, timeout)
		defer cancel()
		if name := look(ctx, a); validHelo(name) {
			r.name = name
		}
	})
	return r
}

func (r *reverse) wait(ctx context.Context) string {
	if r == nil {
		return ""
	}
	select {
	case <-r.done:
		return r.name
	case <-ctx.Done():
		return ""
	}
}
