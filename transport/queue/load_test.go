package queue

import (
	"context"
	"fmt"
	"runtime"
	"sync"
	"testing"
	"time"

	"posthouse/transport"
)

// pool is a carrier of n goroutines.
func pool(n int, f func(l *transport.Leg) []transport.Result) carrier {
	return func(ctx context.Context, d transport.Destination, src transport.Source) error {
		errs := make(chan error, n)
		for range n {
			go func() { errs <- eachLeg(f)(ctx, d, src) }()
		}
		var err error
		for range n {
			if e := <-errs; e != nil {
				err = e
			}
		}
		return err
	}
}

func TestEachLegIsHandedOutOnceUnderLoad(t *testing.T) {
	w := newWorld(t)
	w.start()
	const n = 3000
	var mu sync.Mutex
	seen := map[string]int{}
	all := make(chan struct{})
	w.carry(toFar, pool(8, func(l *transport.Leg) []transport.Result {
		mu.Lock()
		defer mu.Unlock()
		if seen[l.Envelope.ID.String()]++; len(seen) == n {
			select {
			case <-all:
			default:
				close(all)
			}
		}
		return []transport.Result{{Outcome: transport.Relayed, Code: 250}}
	}))
	var wg sync.WaitGroup
	for g := range 4 {
		wg.Go(func() {
			for i := range n / 4 {
				w.accept(g*n+i+1, anna, transport.OriginSubmission, one(toFar, far("x@far.example")))
			}
		})
	}
	wg.Wait()
	<-all
	w.stop()
	for id, k := range seen {
		if k != 1 {
			t.Errorf("%s was handed out %d times", id, k)
		}
	}
}

// A queue for a destination that is down stays on disk: memory holds a window.
func TestALongQueueWaitsOutsideOfMemory(t *testing.T) {
	w := newWorld(t)
	w.start()
	const n = 6000
	w.carry(toPlzen, carrier(func(ctx context.Context, d transport.Destination, s transport.Source) error {
		return fmt.Errorf("no path")
	}))
	for i := range n {
		w.accept(i+1, anna, transport.OriginSubmission, one(toPlzen, user(bob)))
	}
	w.q.mu.Lock()
	held, window := w.q.held, len(w.q.dests[toPlzen].window)
	w.q.mu.Unlock()
	if held > windowLegs || window > windowLegs {
		t.Errorf("%d legs in memory, window %d", held, window)
	}
	got := 0
	last := uint64(0)
	done := make(chan struct{})
	w.carry(toPlzen, eachLeg(func(l *transport.Leg) []transport.Result {
		if l.Seq <= last {
			t.Errorf("leg %d after %d", l.Seq, last)
		}
		last = l.Seq
		if got++; got == n {
			close(done)
		}
		return []transport.Result{{Outcome: transport.Delivered}}
	}))
	w.q.PeerUp(plzen)
	<-done
	w.stop()
}

func BenchmarkAccept(b *testing.B) {
	w := newWorld(b)
	w.start()
	w.carry(local, eachLeg(func(l *transport.Leg) []transport.Result {
		return all(len(l.Rcpts), transport.Result{Outcome: transport.Delivered})
	}))
	text := make([]byte, 4096)
	b.ReportAllocs()
	b.SetParallelism(32)
	var next int
	var mu sync.Mutex
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			mu.Lock()
			next++
			id := next
			mu.Unlock()
			d := w.j.NewDraft()
			d.Write(text)
			if err := d.Seal(context.Background()); err != nil {
				b.Fatal(err)
			}
			m := &Message{Envelope: transport.Envelope{ID: msgID(id), From: anna, Origin: transport.OriginSubmission, EntryTime: time.Now()}, Body: d}
			if _, err := w.q.Accept(context.Background(), m, []Leg{one(local, user(bob))}); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.StopTimer()
	w.stop()
	runtime.GC()
}
