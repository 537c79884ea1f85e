package election

import (
	"context"
	"crypto/rand"
	"fmt"
	"log/slog"
	"testing"
	"time"
)

// BenchmarkPropose is one command at a time at the only node of a mesh, on the
// real disk: the time that an administrator waits.
func BenchmarkPropose(b *testing.B) {
	s, err := NewFileStorage(b.TempDir())
	if err != nil {
		b.Fatal(err)
	}
	m, h := newLedger(), newSimNet().host(1)
	e, err := New(Config{Self: 1, Heartbeat: 100 * time.Millisecond, Lease: 50 * time.Millisecond}, Deps{Machine: m, Storage: s, Network: h, Forward: h,
		Members: m.members, Rand: rand.Reader, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		b.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	ended := make(chan error)
	go func() { ended <- e.Run(ctx) }()
	if _, err := e.Bootstrap(ctx); err != nil {
		b.Fatal(err)
	}
	if _, err := e.Propose(ctx, []byte("c admit 0000000000000001 0")); err != nil {
		b.Fatal(err)
	}
	i := 0
	for b.Loop() {
		i++
		if _, err := e.Propose(ctx, fmt.Appendf(nil, "c%d x", i)); err != nil {
			b.Fatal(err)
		}
		if i%100 == 0 { // the ledger looks through all its lines
			m.mu.Lock()
			m.v.Lines = nil
			m.mu.Unlock()
		}
	}
	b.StopTimer()
	stop()
	<-ended
}
