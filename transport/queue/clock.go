package queue

import "time"

// maxGap is how much of the time between the last record and a start counts: a
// clock that was set ten years ahead must not end what waits.
const maxGap = day

// clock gives queue time: it runs with this process's monotonic clock, and over
// a time when the node was off it adds what the wall clock says, between 0 and
// maxGap. So ages are never longer than they were, whatever is done to the
// clock (FAULTS.md, I16).
type clock struct {
	last  stamp
	base  time.Duration
	start time.Time // zero: not running yet
}

// saw notes the stamp of a record that was applied or is being written.
func (c *clock) saw(s stamp) {
	if s.Q > c.last.Q || s.Q == c.last.Q && s.W > c.last.W {
		c.last = s
	}
}

func (c *clock) now() time.Duration {
	if c.start.IsZero() {
		c.start = time.Now()
		c.base = c.last.Q
		if c.last.W != 0 {
			c.base += min(max(c.start.Sub(time.Unix(c.last.W, 0)), 0), maxGap)
		}
	}
	return (c.base + time.Since(c.start)).Truncate(time.Millisecond)
}

func (c *clock) stamp() stamp { return stamp{Q: c.now(), W: time.Now().Unix()} }
