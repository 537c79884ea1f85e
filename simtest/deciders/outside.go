package deciders

import (
	"fmt"
	"time"

	"posthouse/transport"
)

// outside is the model of the hosts of other people, and of smtpout: what a
// reply means, and what a lost one does.
type outside struct {
	w                                   *world
	refuse, deferring, grey, drop, shut [hosts]int
	offline                             map[int]int // nodes that the Internet does not see

	seen map[copyOf]time.Duration // grey: when it was first offered
}

// copyOf names one message for one recipient.
type copyOf struct {
	id  transport.MessageID
	key string // transport.Recipient.Key
}

func newOutside(w *world) *outside {
	return &outside{w: w, offline: map[int]int{}, seen: map[copyOf]time.Duration{}}
}

func (o *outside) calm() {
	o.refuse, o.deferring, o.grey, o.drop, o.shut = [hosts]int{}, [hosts]int{}, [hosts]int{}, [hosts]int{}, [hosts]int{}
	clear(o.offline)
}

func outsideAddress(n int) string { return fmt.Sprintf("r%d@h%d.example", n%10, n/10) }

// host is the number of a domain; -1: no such host.
func host(domain string) int {
	var h int
	if _, err := fmt.Sscanf(domain, "h%d.example", &h); err != nil || h >= hosts {
		return -1
	}
	return h
}

// attempt is one SMTP transaction with a whole leg. done gets the results, or
// nil when the connection was lost.
func (o *outside) attempt(n *node, leg *transport.Leg, done func([]transport.Result)) {
	w, boot, h := o.w, n.boot, host(leg.Dest.Domain)
	rtt := time.Duration(20+w.net.IntN(200)) * time.Millisecond
	lost := func() { w.after(30*time.Second, func() { n.step(boot, func() { done(nil) }) }) }
	w.after(rtt, func() {
		if !n.runs() || n.boot != boot {
			return
		}
		if h < 0 || o.shut[h] > 0 || o.offline[n.i] > 0 {
			lost()
			return
		}
		rs := make([]transport.Result, len(leg.Rcpts))
		for i := range leg.Rcpts {
			k := copyOf{leg.Envelope.ID, leg.Rcpts[i].Key()}
			rs[i] = o.verdict(h, k)
			w.note("h%d says %d to %s from %s", h, rs[i].Code, w.obs.label(k), n.name)
			w.obs.offered(n, k, &rs[i], &leg.Envelope)
		}
		if o.drop[h] > 0 && w.net.IntN(2) == 0 {
			w.note("h%d hangs up before it says so", h)
			for i := range leg.Rcpts {
				w.obs.lost[copyOf{leg.Envelope.ID, leg.Rcpts[i].Key()}]++
			}
			lost()
			return
		}
		for i := range leg.Rcpts {
			n.unsure = append(n.unsure, copyOf{leg.Envelope.ID, leg.Rcpts[i].Key()})
		}
		w.after(rtt, func() { n.step(boot, func() { done(rs) }) })
	})
}

func (o *outside) verdict(h int, k copyOf) transport.Result {
	by := fmt.Sprintf("mx.h%d.example", h)
	switch {
	case o.refuse[h] > 0:
		return transport.Result{Outcome: transport.Failed, Code: 550, Enhanced: "5.1.1", Text: "No such user", By: by}
	case o.deferring[h] > 0:
		return transport.Result{Outcome: transport.Deferred, Code: 451, Enhanced: "4.3.0", Text: "Not now", By: by}
	case o.grey[h] > 0:
		first, ok := o.seen[k]
		if !ok {
			o.seen[k] = o.w.now
		}
		if !ok || o.w.now-first < 10*time.Minute {
			return transport.Result{Outcome: transport.Deferred, Code: 451, Enhanced: "4.7.1", Text: "Greylisted", By: by}
		}
	}
	return transport.Result{Outcome: transport.Relayed, Code: 250, Enhanced: "2.0.0", Text: "Taken", By: by}
}
