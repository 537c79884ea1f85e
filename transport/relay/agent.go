package relay

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"posthouse/mesh"
	"posthouse/transport"
)

// Run is the gateway's duty towards origins: it tells them final results, and
// asks about what it keeps without a release. It ends with ctx and leaves
// nothing running.
func (r *Relay) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	tick := time.NewTicker(askEvery)
	defer tick.Stop()
	r.every()
	for {
		r.mu.Lock()
		for n, age := range r.todo {
			if !r.doing[n] {
				delete(r.todo, n)
				r.doing[n] = true
				wg.Go(func() { r.visit(ctx, n, age) })
			}
		}
		r.mu.Unlock()
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-r.kick:
		case <-tick.C:
			r.every()
		}
	}
}

func (r *Relay) every() {
	for _, n := range r.d.Gateway.Origins() {
		r.see(n, askAfter)
	}
}

// PeerUp tells that a node can be reached now.
func (r *Relay) PeerUp(n mesh.NodeID) {
	r.mu.Lock()
	delete(r.shunned, n)
	r.mu.Unlock()
	if slices.Contains(r.d.Gateway.Origins(), n) {
		r.see(n, 0)
	}
}

// Finals tells that final results wait for an origin. It does not block.
func (r *Relay) Finals(origin mesh.NodeID) { r.see(origin, askAfter) }

func (r *Relay) see(n mesh.NodeID, age time.Duration) {
	r.mu.Lock()
	if a, ok := r.todo[n]; !ok || age < a {
		r.todo[n] = age
	}
	r.mu.Unlock()
	select {
	case r.kick <- struct{}{}:
	default:
	}
}

func (r *Relay) visit(ctx context.Context, n mesh.NodeID, age time.Duration) {
	if err := r.settle(ctx, n, age); err != nil && ctx.Err() == nil {
		r.d.Logger.Info("origin not seen", "peer", r.d.Name(n), "err", err)
	}
	r.mu.Lock()
	delete(r.doing, n)
	r.mu.Unlock()
	select {
	case r.kick <- struct{}{}:
	default:
	}
}

// settle does with one origin what is to be done, in batches.
func (r *Relay) settle(ctx context.Context, origin mesh.NodeID, age time.Duration) error {
	finals, err := r.d.Gateway.Finals(origin, maxBatch)
	if err != nil {
		return err
	}
	kept, err := r.d.Gateway.Kept(origin, age, maxBatch)
	if err != nil || len(finals)+len(kept) == 0 {
		return err
	}
	if r.d.PutOut != nil && r.d.PutOut(origin) {
		return Orphans(ctx, r.d.Gateway, origin, finals, kept)
	}
	s, err := r.open(ctx, origin)
	if err != nil {
		return err
	}
	return s.run(ctx, func(ctx context.Context) error {
		for len(finals) > 0 {
			if err := s.tell(ctx, finals); err != nil {
				return err
			}
			if err := r.d.Gateway.Told(ctx, origin, finals); err != nil {
				return err
			}
			if finals, err = r.d.Gateway.Finals(origin, maxBatch); err != nil {
				return err
			}
		}
		if len(kept) == 0 {
			return nil
		}
		standings, err := s.ask(ctx, kept)
		if err != nil {
			return err
		}
		open := false
		for i, k := range kept {
			undecided, err := Stand(ctx, r.d.Gateway, origin, k, standings[i])
			if err != nil {
				return err
			}
			open = open || undecided
		}
		if len(kept) == maxBatch && !open { // there may be more
			r.see(origin, age)
		}
		return nil
	})
}

// tell sends final results and waits until they are confirmed.
func (s *stream) tell(ctx context.Context, fs []transport.FinalResult) error {
	ok := false
	n := s.call(0, func(kind byte, p []byte) error {
		var d doneFrame
		if kind != frameDone {
			return fmt.Errorf("%w: frame %d for final results", errProtocol, kind)
		}
		err := decode(p, &d)
		ok = d.OK
		return err
	})
	b, err := appendFrame(nil, frameFinals, &finalsFrame{N: n, Finals: fs})
	if err != nil {
		return err
	}
	if err := s.send(ctx, b); err != nil {
		return err
	}
	if err := s.drained(ctx); err != nil {
		return err
	}
	if !ok {
		return fmt.Errorf("%s could not note the final results", s.r.d.Name(s.peer))
	}
	return nil
}

func (s *stream) ask(ctx context.Context, kept []transport.KeptLeg) ([][]transport.Standing, error) {
	var a standingFrame
	n := s.call(0, func(kind byte, p []byte) error {
		if kind != frameStanding {
			return fmt.Errorf("%w: frame %d for a question", errProtocol, kind)
		}
		return decode(p, &a)
	})
	b, err := appendFrame(nil, frameAsk, &askFrame{N: n, Legs: kept})
	if err != nil {
		return nil, err
	}
	if err := s.send(ctx, b); err != nil {
		return nil, err
	}
	if err := s.drained(ctx); err != nil {
		return nil, err
	}
	if len(a.Standings) != len(kept) {
		return nil, fmt.Errorf("%w: %d answers to %d questions", errProtocol, len(a.Standings), len(kept))
	}
	for i := range kept {
		if len(a.Standings[i]) != len(kept[i].Keys) {
			return nil, fmt.Errorf("%w: an answer does not fit its question", errProtocol)
		}
	}
	return a.Standings, nil
}
