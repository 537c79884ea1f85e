package mailstore

import "sync"

// signals calls watchers, one goroutine for all of them, which lives while
// there is something to call.
type signals struct {
	mu   sync.Mutex
	due  []*watcher
	busy bool
	wg   sync.WaitGroup
}

type watcher struct {
	notify func()
	due    bool // stands in signals.due
	ended  bool
}

// Watch calls notify, from another goroutine and never while a lock is held,
// after each change in the folder, its removal included; several changes may
// make one call. notify must not block. stop ends it: a call that is under way
// then may still end after it.
func (f *Folder) Watch(notify func()) (stop func()) {
	w := &watcher{notify: notify}
	f.mb.mu.Lock()
	if f.watchers == nil {
		f.watchers = map[*watcher]struct{}{}
	}
	f.watchers[w] = struct{}{}
	f.mb.mu.Unlock()
	return func() {
		f.mb.mu.Lock()
		delete(f.watchers, w)
		f.mb.mu.Unlock()
		s := &f.mb.s.signals
		s.mu.Lock()
		w.ended = true
		s.mu.Unlock()
	}
}

// signal has the folder's watchers called; mb.mu is held.
func (f *Folder) signal() {
	if len(f.watchers) == 0 {
		return
	}
	s := &f.mb.s.signals
	s.mu.Lock()
	defer s.mu.Unlock()
	for w := range f.watchers {
		if !w.due {
			w.due = true
			s.due = append(s.due, w)
		}
	}
	if !s.busy && len(s.due) > 0 {
		s.busy = true
		s.wg.Go(s.run)
	}
}

func (s *signals) run() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for len(s.due) > 0 {
		due := s.due
		s.due = nil
		for _, w := range due {
			w.due = false
			if w.ended {
				continue
			}
			s.mu.Unlock()
			w.notify()
			s.mu.Lock()
		}
	}
	s.busy = false
}
