package simtest

import (
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/quic-go/quic-go/testutils/simnet"
)

// What an office sends to all others waits for one line, and so does what they
// send to it; what does not fit before it is lost.
func TestAllThatAnOfficeSendsAndGetsSharesItsLine(t *testing.T) {
	const bandwidth, latency, size = 1_000_000, 10 * time.Millisecond, 1000
	each := time.Duration((size + headers) * 8 * int64(time.Second) / bandwidth)
	buffer := int(lineBuffer/each) + 1 // packets that are taken at one moment
	for _, tc := range []struct {
		name     string
		from, to []string
		packets  int // from each to each
		come     int
	}{
		{"from it to two", []string{"hq"}, []string{"plzen", "praha"}, 10, 20},
		{"from two to it", []string{"plzen", "praha"}, []string{"hq"}, 10, 20},
		{"from it, more than fits", []string{"hq"}, []string{"plzen", "praha"}, 30, buffer},
		{"to it, more than fits", []string{"plzen", "praha"}, []string{"hq"}, 30, buffer},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := NewWorld(t, "hq", "plzen", "praha")
				defer w.Close()
				w.Latency = latency
				w.SetUplink("hq", bandwidth)
				var wg sync.WaitGroup
				var mu sync.Mutex
				var ends []func()
				came, last, sockets, began := 0, time.Duration(0), map[string]*simnet.SimConn{}, time.Now()
				for _, o := range w.Offices {
					socket, open, end := o.plug()
					open()
					sockets[o.Name], ends = socket, append(ends, end)
					wg.Go(func() {
						for b := make([]byte, 2000); ; {
							n, _, err := socket.ReadFrom(b)
							if err != nil {
								return
							}
							mu.Lock()
							came, last = came+1, time.Since(began)
							mu.Unlock()
							if n != size {
								t.Errorf("a packet of %d bytes came", n)
							}
						}
					})
				}
				for range tc.packets {
					for _, a := range tc.from {
						for _, b := range tc.to {
							if _, err := sockets[a].WriteTo(make([]byte, size), &net.UDPAddr{IP: w.Office(b).Addr.AsSlice(), Port: 44337}); err != nil {
								t.Fatal(err)
							}
						}
					}
				}
				time.Sleep(time.Minute)
				for _, s := range sockets {
					s.Close()
				}
				wg.Wait()
				for _, end := range ends {
					end()
				}
				if want := latency + time.Duration(tc.come)*each; came != tc.come || last != want {
					t.Errorf("%d packets came, the last after %v; want %d and %v", came, last, tc.come, want)
				}
			})
		})
	}
}

// A hub sends a large message to each of four branches at once over a line of
// 1 Mbit/s. What the branches send to it and to each other goes beside it, what it
// sends to one of them behind the large one, and nobody doubts that the lead is there.
func TestAHubSendsALargeMessageToEachBranchOverANarrowLine(t *testing.T) {
	const bandwidth, large, at = 1_000_000, 1_500_000, 5 * time.Second
	hub, branches := officeNames[0], officeNames[1:]
	p := Plan{Seed: 1, Offices: officeNames, Uplinks: []Uplink{{hub, bandwidth}}, Latency: 20 * time.Millisecond, Length: 2 * time.Minute, Follow: true}
	for _, b := range branches {
		p.Events = append(p.Events, Event{At: at, Do: EvMail, A: []string{hub}, B: []string{b}, Way: "port25", N: 1, Size: []int{large}})
	}
	sent := map[string]int{}
	for i, b := range branches {
		for _, way := range [][2]string{{hub, b}, {b, hub}, {b, branches[(i+1)%len(branches)]}} {
			p.Events = append(p.Events, Event{At: at, Do: EvMail, A: []string{way[0]}, B: []string{way[1]}, Way: "submission", N: 20, Span: 3 * time.Second})
			sent[way[0]+way[1]] = 20
		}
		sent[hub+b]++
	}
	r := Run(t, p, Watcher{})
	report(t, r)
	var there, beside time.Duration // the last from the hub, the slowest of the others
	for _, d := range r.Record.Deliveries {
		sent[d.From+d.To]--
		if d.From == hub {
			there = max(there, d.Took)
		} else {
			beside = max(beside, d.Took)
		}
	}
	for way, n := range sent {
		if n != 0 {
			t.Errorf("%s: %d were not seen to come", way, n)
		}
	}
	needs := time.Duration(len(branches) * large * 8 * int(time.Second) / bandwidth)
	t.Logf("%d messages of %d bytes were there after %v, the line needs %v; small ones beside them after %v at most", len(branches), large, there, needs, beside)
	// 62 to 66 s in a dozen runs: bulk takes a fifth less than what would fill the
	// line. Nothing that the others send waits behind more than the line's buffer.
	if most := needs * 3 / 2; there > most {
		t.Errorf("the large messages took %v, more than %v", there, most)
	}
	if beside > localLimit {
		t.Errorf("small mail beside them took %v", beside)
	}
	terms := map[uint64]bool{}
	for _, s := range r.Record.Samples {
		for _, n := range s.Term {
			terms[n] = true
		}
	}
	if len(terms) != 1 {
		t.Errorf("the lead changed: terms %v", terms)
	}
}

// The line of 128 kbit/s is cut in the middle of a message of 300 kB.
func TestALargeMessageGetsThroughANarrowLineThatWasCutInItsMiddle(t *testing.T) {
	const bandwidth, large, at, cut, heal = 128_000, 300_000, 5 * time.Second, 25 * time.Second, 55 * time.Second
	for _, way := range [][2]string{{"hq", "plzen"}, {"plzen", "hq"}} {
		from, to := way[0], way[1]
		p := Plan{Seed: 1, Offices: officeNames[:2], Uplinks: []Uplink{{"plzen", bandwidth}}, Latency: 20 * time.Millisecond, Length: 3 * time.Minute, Follow: true, Events: []Event{
			{At: at, Do: EvMail, A: []string{from}, B: []string{to}, Way: "port25", N: 1, Size: []int{large}},
			{At: cut, Do: EvCut, A: []string{from}, B: []string{to}, Way: "both"},
			{At: heal, Do: EvHeal, A: []string{from}, B: []string{to}},
		}}
		r := Run(t, p, Watcher{})
		report(t, r)
		needs := time.Duration(large * 8 * int(time.Second) / bandwidth)
		limit := heal + drainLimit + time.Duration(large*8/forMail(bandwidth, 2)*float64(time.Second))
		if n := len(r.Record.Deliveries); n != 1 {
			t.Fatalf("%s to %s: %d came", from, to, n)
		}
		d := r.Record.Deliveries[0]
		t.Logf("%s to %s: it was there %v after the heal, the line needs %v", from, to, d.At-heal, needs)
		if d.At < heal || d.At > limit {
			t.Errorf("%s to %s: it was there after %v, not between %v and %v", from, to, d.At, heal, limit)
		}
	}
}

// A hub of five on 94 kbit/s has three quarters of its line left for mail,
// and ways through others are its own line once more.
func TestALargeMessageLeavesAHubOnANarrowLine(t *testing.T) {
	const bandwidth, large, at = 94_000, 400_000, 5 * time.Second
	limit := at + drainLimit + time.Duration(large*8/forMail(bandwidth, 5)*float64(time.Second))
	p := Plan{Seed: 1, Offices: officeNames, Uplinks: []Uplink{{"hq", bandwidth}}, Latency: 20 * time.Millisecond, Length: limit, Follow: true, Events: []Event{
		{At: at, Do: EvMail, A: []string{"hq"}, B: []string{"plzen"}, Way: "port25", N: 1, Size: []int{large}},
	}}
	r := Run(t, p, Watcher{})
	report(t, r)
	if n := len(r.Record.Deliveries); n != 1 || r.Record.Deliveries[0].At > limit {
		t.Fatalf("%d came, not within %v", n, limit)
	}
	t.Logf("it was there after %v of %v", r.Record.Deliveries[0].Took, limit-at)
}

// A plan in six has an office or two with narrow lines of 64 kbit/s to 2 Mbit/s and
// no more mail than they carry; for the rest each seed is what it was without them.
func TestAPlanInSixHasNarrowLines(t *testing.T) {
	const seeds = 600
	narrow, slow, fast := 0, 0, 0
	for seed := range uint64(seeds) {
		p := RandomPlan(seed, 0, 5*time.Minute)
		sum := 0
		for _, e := range p.Events {
			for _, n := range e.Size {
				sum += n
			}
		}
		for _, u := range p.Uplinks {
			if u.Bandwidth < narrowest || u.Bandwidth > widest || int64(sum) > u.Bandwidth/8*300 || !slices.Contains(p.Offices, u.Office) {
				t.Errorf("seed %d: %v, %d bytes of mail", seed, u, sum)
			}
			if u.Bandwidth < 200e3 {
				slow++
			}
			if u.Bandwidth > 600e3 {
				fast++
			}
		}
		if len(p.Uplinks) == 0 {
			continue
		}
		narrow++
		if len(p.Uplinks) > 2 || p.Uplinks[0] == p.Uplinks[len(p.Uplinks)-1] && len(p.Uplinks) == 2 || strings.Count(p.String(), "own line") != len(p.Uplinks) {
			t.Errorf("seed %d: %v", seed, p.Uplinks)
		}
		// Other mail is chosen by who may send it, which the lines change only in size.
		q := NewPlan(seed, len(p.Offices), 5*time.Minute)
		for _, e := range q.Events {
			if e.Do == EvMail && !slices.ContainsFunc(p.Events, func(x Event) bool { x.Size = nil; return x.String() == e.String() }) {
				t.Fatalf("seed %d lost %v", seed, e)
			}
		}
	}
	if narrow < seeds/8 || narrow > seeds/5 || slow < narrow/5 || fast < narrow/5 {
		t.Errorf("%d of %d plans, %d slow and %d fast lines", narrow, seeds, slow, fast)
	}
}
