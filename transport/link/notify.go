package link

import (
	"context"
	"net/netip"
	"sync"

	"posthouse/mesh"
)

// maxUnknown is how many strange keys wait to be told; more are forgotten (they
// come again, or do not matter).
const maxUnknown = 16

// notifier makes the callbacks, from one goroutine. What waits is bounded by the
// number of peers: of two events about one peer only the later is told.
type notifier struct {
	signal chan struct{}

	mu       sync.Mutex
	order    []mesh.NodeID // peers with a waiting event, oldest first
	events   map[mesh.NodeID]Event
	strange  []mesh.KeyHash
	learned  map[mesh.NodeID]netip.AddrPort
	watchers []*watcher
}

type watcher struct {
	f     func(Event)
	first []Event // told before others; guarded by notifier.mu
	gone  bool
}

func (n *notifier) wake() {
	select {
	case n.signal <- struct{}{}:
	default:
	}
}

func (n *notifier) event(ev Event) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if _, waits := n.events[ev.Peer]; !waits {
		n.order = append(n.order, ev.Peer)
	}
	if n.events == nil {
		n.events = map[mesh.NodeID]Event{}
	}
	n.events[ev.Peer] = ev
	n.wake()
}

func (n *notifier) unknown(key mesh.KeyHash) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, k := range n.strange {
		if k == key {
			return
		}
	}
	if len(n.strange) < maxUnknown {
		n.strange = append(n.strange, key)
		n.wake()
	}
}

func (n *notifier) met(id mesh.NodeID, addr netip.AddrPort) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.learned == nil {
		n.learned = map[mesh.NodeID]netip.AddrPort{}
	}
	n.learned[id] = addr
	n.wake()
}

func (n *notifier) watch(f func(Event), first []Event) (stop func()) {
	n.mu.Lock()
	defer n.mu.Unlock()
	w := &watcher{f: f, first: first}
	n.watchers = append(n.watchers, w)
	n.wake()
	return func() {
		n.mu.Lock()
		defer n.mu.Unlock()
		w.gone = true
		for i, x := range n.watchers {
			if x == w {
				n.watchers = append(n.watchers[:i:i], n.watchers[i+1:]...)
				return
			}
		}
	}
}

func (n *notifier) run(ctx context.Context, deps Deps) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-n.signal:
		}
		n.mu.Lock()
		var calls []func()
		tell := func(w *watcher, ev Event) {
			calls = append(calls, func() {
				n.mu.Lock()
				gone := w.gone
				n.mu.Unlock()
				if !gone {
					w.f(ev)
				}
			})
		}
		for _, w := range n.watchers {
			for _, ev := range w.first {
				tell(w, ev)
			}
			w.first = nil
		}
		for _, id := range n.order {
			for _, w := range n.watchers {
				tell(w, n.events[id])
			}
		}
		for id, addr := range n.learned {
			if deps.Learned != nil {
				calls = append(calls, func() { deps.Learned(id, addr) })
			}
		}
		for _, key := range n.strange {
			if deps.Unknown != nil {
				calls = append(calls, func() { deps.Unknown(key) })
			}
		}
		n.order, n.events, n.learned, n.strange = nil, nil, nil, nil
		n.mu.Unlock()
		for _, call := range calls {
			call()
		}
	}
}
