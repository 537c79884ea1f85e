package command

import (
	"context"
	"runtime/debug"
	"runtime/metrics"
	"time"
)

// What a burst took (passwords hashed, a large mailbox listed) goes back to the
// system when the node has been quiet: the runtime alone takes minutes for it,
// and an office's machine has other work.
const (
	tidyEvery = 500 * time.Millisecond
	tidyQuiet = 1 << 20 // bytes allocated between two looks: less is idleness
	tidyWorth = 8 << 20 // bytes allocated since the last time: less is not worth it
)

// tidy runs until ctx ends.
func tidy(ctx context.Context) {
	t := time.NewTicker(tidyEvery)
	defer t.Stop()
	sample := []metrics.Sample{{Name: "/gc/heap/allocs:bytes"}}
	var last, tidied uint64
	for {
		select {
		case <-t.C:
		case <-ctx.Done():
			return
		}
		metrics.Read(sample)
		now := sample[0].Value.Uint64()
		if now-last < tidyQuiet && now-tidied > tidyWorth {
			debug.FreeOSMemory()
			tidied = now
		}
		last = now
	}
}
