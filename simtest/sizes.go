package simtest

import (
	"math"
	"math/rand/v2"
)

// randomBytes is how much all mail of a random plan comes to, counted once for
// each mailbox that it goes to: more makes a seed slower and finds no more.
const randomBytes = 12 << 20

// realSize is the size of a body as people's mail has them: nine of ten are text
// and small pictures, some are documents, one in a hundred is several megabytes.
// The mean is 70 kB.
func realSize(r *rand.Rand) int {
	least, most := 2e3, 30e3
	switch n := r.IntN(100); {
	case n == 0:
		least, most = 1e6, 6e6
	case n < 10:
		least, most = 100e3, 1e6
	}
	return int(least * math.Pow(most/least, r.Float64()))
}

// RealSizes gives the mail of a plan bodies of real sizes, up to so many bytes in
// sum over all mailboxes. Where that is not enough for all, which ones stay small
// is the generator's choice, all over the plan.
func (p *Plan) RealSizes(r *rand.Rand, bytes int) {
	const mean = 70e3
	copies := func(e Event) (n int) {
		for _, to := range e.B {
			if n++; to == "all" {
				n += len(p.Offices) - 1
			}
		}
		return n
	}
	all := 0.0
	for _, e := range p.Events {
		if e.Do == EvMail {
			all += float64(e.N * copies(e))
		}
	}
	share := min(1, float64(bytes)/(all*mean))
	for i, e := range p.Events {
		if e.Do != EvMail {
			continue
		}
		sizes := make([]int, e.N)
		for j := range sizes {
			if n := realSize(r); r.Float64() < share && n*copies(e) <= bytes {
				sizes[j] = n
				bytes -= n * copies(e)
			}
		}
		p.Events[i].Size = sizes
	}
}
