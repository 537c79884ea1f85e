package simtest

import (
	"sync"
	"time"

	"github.com/emersion/go-imap/v2/imapclient"

	"posthouse/simtest/record"
)

// read waits at the INBOX of an office's user, as a mail program does, and tells
// the ledger when how many messages are there. It comes back when the node does.
func (w *World) read(o *Office) {
	for {
		if !o.apart.Load() && o.Up() {
			w.idle(o)
		}
		select {
		case <-w.reading:
			return
		case <-time.After(time.Second):
		}
	}
}

// idle reads until the session ends or nobody follows any more. Whatever goes
// wrong ends it; probes and the last look say what must work.
func (w *World) idle(o *Office) {
	c, err := w.login(o.Name, o.Name, "secret", &imapclient.UnilateralDataHandler{Mailbox: func(d *imapclient.UnilateralDataMailbox) {
		if d.NumMessages != nil {
			w.ledger.shows(o.Name, int(*d.NumMessages))
		}
	}})
	if err != nil {
		return
	}
	defer c.Close()
	box, err := c.Select("INBOX", nil).Wait()
	if err != nil {
		return
	}
	w.ledger.shows(o.Name, int(box.NumMessages))
	c.Caps() // the library asks for them by itself after a login, which must not meet the IDLE
	waiting, err := c.Idle()
	if err != nil {
		return
	}
	over := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() { waiting.Wait(); close(over) })
	select {
	case <-over:
	case <-w.reading:
		waiting.Close()
	}
	c.Close()
	wg.Wait()
}

// shows notes that an office's INBOX has n messages now.
func (l *Ledger) shows(office string, n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for len(l.shown[office]) < n {
		l.shown[office] = append(l.shown[office], time.Now())
	}
}

// stopReading lets the readers and the sampler end.
func (w *World) stopReading() {
	w.mu.Lock()
	select {
	case <-w.reading:
	default:
		close(w.reading)
	}
	w.mu.Unlock()
	w.readers.Wait()
}

// sample keeps queues, masters and terms over time, some hundred times in all.
func (w *World) sample(length time.Duration) {
	began := time.Now()
	pause := min(max(length/600, time.Second), 5*time.Minute).Round(time.Second)
	for {
		var s record.Sample
		for _, o := range w.Offices {
			now := time.Now()
			p := o.process()
			if p == nil {
				s.Queue, s.Oldest, s.Master, s.Term = append(s.Queue, -1), append(s.Oldest, 0), append(s.Master, ""), append(s.Term, 0)
				continue
			}
			st := o.Status()
			queue, oldest := st.QueueOutside+st.QueueHeld, int64(0)
			for _, m := range st.Members {
				queue += m.Queue
				oldest = max(oldest, m.Oldest)
			}
			if queue == 0 && o.process() == p {
				o.emptied.Store(now.UnixNano())
			}
			s.Queue, s.Oldest, s.Master, s.Term = append(s.Queue, queue), append(s.Oldest, oldest), append(s.Master, st.Master), append(s.Term, st.Term)
		}
		w.keeper.Sample(s)
		if w.clock != nil {
			w.clock(time.Since(began))
		}
		select {
		case <-w.reading:
			return
		case <-time.After(pause):
		}
	}
}
