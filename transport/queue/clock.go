package queue

import "time"

// maxGap is how much of the time between the last record and a start counts: a
// clock that was set ten years ahead must not end what waits.
const maxGap = day

// Clock is what the queue knows of time.
type Clock interface {
	// Elapsed is the time since whenever; it never jumps.
	Elapsed() time.Duration
	// Now is the wall clock, which people set.
	Now() time.Time
}

// machine is the Clock of the machine.
type machine struct{ start time.Time }

func (m machine) Elapsed() time.Duration { return time.Since(m.start) }
func (m machine) Now() time.Time         { return time.Now() }

// clock gives queue time: it runs with this process's monotonic clock, and over
// a time when the node was off it adds what the wall clock says, between 0 and
// maxGap. So ages are never longer than they were, whatever is done to the
// clock (FAULTS.md, I16).
type clock struct {
	src   Clock
	last  stamp
	base  time.Duration
	runs  bool
	start time.Duration // Elapsed when it began to run
}

// saw notes the stamp of a record that was applied or is being written.
func (c *clock) saw(s stamp) {
	if s.Q > c.last.Q || s.Q == c.last.Q && s.W > c.last.W {
		c.last = s
	}
}

func (c *clock) now() time.Duration {
	if !c.runs {
		c.runs, c.start = true, c.src.Elapsed()
		c.base = c.last.Q
		if c.last.W != 0 {
			c.base += min(max(c.src.Now().Sub(time.Unix(c.last.W, 0)), 0), maxGap)
		}
	}
	return (c.base + c.src.Elapsed() - c.start).Truncate(time.Millisecond)
}

func (c *clock) stamp() stamp { return stamp{Q: c.now(), W: c.src.Now().Unix()} }
