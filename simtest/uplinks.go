package simtest

import (
	"math"
	"math/rand/v2"
	"slices"
	"time"
)

// narrowUplink counts the offices with a narrow line of their own among what a
// run's faults were; no event, since the line is so from the first.
const narrowUplink Kind = "uplink"

// The narrowest and the widest line that random plans give an office, bits a second.
const (
	narrowest = 64e3
	widest    = 2e6
)

// uplinks gives one or two offices of one plan in five a narrow line of their own.
// Not where a disk becomes an older one: over a full line its node hears of that
// seconds after it has opened its doors, and nobody could say what holds until then.
func (p *Plan) uplinks(r *rand.Rand) {
	if r.IntN(5) != 0 || slices.Contains(p.Kinds, EvRestore) {
		return
	}
	p.Kinds = append(p.Kinds, narrowUplink)
	for _, i := range r.Perm(len(p.Offices))[:1+r.IntN(2)] {
		p.Uplinks = append(p.Uplinks, Uplink{Office: p.Offices[i], Bandwidth: int64(narrowest * math.Pow(widest/narrowest, r.Float64()))})
	}
}

// fits is how many bytes of mail the narrowest uplink carries each way while the
// plan lasts: of more, no end would be seen.
func (p *Plan) fits() int {
	fits := math.MaxInt
	for _, u := range p.Uplinks {
		fits = min(fits, int(float64(u.Bandwidth)/8*p.Length.Seconds()))
	}
	return fits
}

// What mail gets of an uplink, measured with one large message over the line of one
// of two offices at rest, 64 kbit/s to 2 Mbit/s: 0.71 to 0.86 of it. What the lead
// sends each further office beside, bits a second; what a message costs beside its
// size, bytes.
const (
	uplinkShare   = 0.7
	uplinkOffices = 2 // whose traffic is in the share
	idleTraffic   = 7500
	uplinkLeast   = 0.5 // of the line is left, whatever the mesh needs
	messageCost   = 1000
	amongOthers   = 1.5 // as long as alone: several share it, and some of it comes twice
)

// needs is how long the mail that waits for nodes now may take over the offices'
// own lines. Zero where no office has one.
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
		bits := float64(8 * max(up[o.Name], down[o.Name]))
		longest = max(longest, time.Duration(amongOthers*bits/forMail(u.up.bandwidth, len(offices))*float64(time.Second)))
	}
	return longest
}

// forMail is what mail gets of an uplink, bits a second.
func forMail(bandwidth int64, offices int) float64 {
	left := float64(bandwidth - idleTraffic*int64(offices-uplinkOffices))
	return uplinkShare * max(uplinkLeast*float64(bandwidth), left)
}
