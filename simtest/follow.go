package simtest

import (
	"bufio"
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"sync"
	"time"

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
// wrong ends it; probes and the last look say what must work. It speaks IMAP
// itself: the client library asks for capabilities in goroutines of its own,
// which may meet an IDLE and then hold a mutex for as long.
func (w *World) idle(o *Office) {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	raw, err := w.dial(ctx, netip.AddrPortFrom(o.Addr, 50000), netip.AddrPortFrom(o.Addr, 143).String())
	if err != nil {
		return
	}
	over := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		select {
		case <-over:
		case <-w.reading:
		}
		raw.Close()
	})
	defer wg.Wait()
	defer close(over)
	var c net.Conn = raw
	r := bufio.NewReader(c)
	// until reads lines, those of the mailbox too, to the one that begins so.
	until := func(begin string) bool {
		for {
			line, err := r.ReadString('\n')
			if err != nil {
				return false
			}
			var n int
			var what string
			if _, err := fmt.Sscanf(line, "* %d %s", &n, &what); err == nil && what == "EXISTS" {
				w.ledger.shows(o.Name, n)
			}
			if begin != "" && strings.HasPrefix(line, begin) {
				return true
			}
		}
	}
	say := func(line, answer string) bool {
		_, err := fmt.Fprintf(c, "%s\r\n", line)
		return err == nil && until(answer)
	}
	if !until("* OK") || !say("a STARTTLS", "a OK") {
		return
	}
	c = tls.Client(raw, clientTLS)
	r = bufio.NewReader(c)
	if say("b LOGIN "+o.Name+"@"+Domain+" secret", "b OK") && say("c SELECT INBOX", "c OK") && say("d IDLE", "+") {
		until("") // to the end of the session
	}
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
			p := o.process()
			if p == nil {
				s.Queue, s.Oldest, s.Master, s.Term = append(s.Queue, -1), append(s.Oldest, 0), append(s.Master, ""), append(s.Term, 0)
				continue
			}
			st := o.Status()
			queue, oldest := waiting(st), int64(0)
			for _, m := range st.Members {
				oldest = max(oldest, m.Oldest)
			}
			if o.process() == p {
				o.waits(st)
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
