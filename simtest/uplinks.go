package simtest

import "time"

// narrowUplink counts the offices with a narrow line of their own among what a
// run's faults were; no event, since the line is so from the first.
const narrowUplink Kind = "uplink"

// What an uplink carries beside people's mail, measured: the lead's share, which
// is the largest, with the others at rest, bits a second for each of them; and what
// a message costs beside its size, bytes.
const (
	idleTraffic = 7500
	messageCost = 1000
)

// needs is how long the mail that waits for nodes now takes over the offices' own
// lines: half as long again as they need for its bytes in what the mesh leaves of
// them. Zero where no office has one.
func (w *World) needs() (longest time.Duration) {
	up, down := map[string]int64{}, map[string]int64{}
	offices := w.belonging()
	for _, o := range offices {
		if !o.Up() {
			continue
		}
		waiting, err := o.Ops().Queue(Ctx())
		if err != nil {
			w.note("%s: what waits there: %v", o.Name, err)
		}
		for _, e := range waiting {
			cost, goes := e.Size+messageCost, false
			for _, to := range offices {
				if to.Name == e.Destination || e.Destination == "gateway" && to.gateway { // of the gateways it may be any
					down[to.Name] += cost
					goes = true
				}
			}
			if goes {
				up[o.Name] += cost
			}
		}
	}
	for _, o := range offices {
		w.mu.Lock()
		u := w.uplinks[o.Addr]
		w.mu.Unlock()
		if u == nil {
			continue
		}
		left := max(u.up.bandwidth/4, u.up.bandwidth-idleTraffic*int64(len(offices)-1))
		longest = max(longest, time.Duration(1.5*float64(max(up[o.Name], down[o.Name])*8)/float64(left)*float64(time.Second)))
	}
	return longest
}
