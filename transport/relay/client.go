package relay

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"time"

	"posthouse/mesh"
	"posthouse/transport"
)

// ErrNoGateway says that no gateway can be reached: outside mail waits.
var ErrNoGateway = errors.New("no gateway can be reached")

// Carry implements transport.Carrier for ScopeNode and ScopeGateway.
func (r *Relay) Carry(ctx context.Context, dest transport.Destination, src transport.Source) error {
	if dest.Scope == transport.ScopeNode {
		return r.carry(ctx, dest.Node, false, src)
	}
	err := ErrNoGateway
	for _, g := range r.gateways() {
		s, e := r.open(ctx, g)
		if e != nil {
			err = e
			continue
		}
		if err = r.carryOn(ctx, s, true, src); err != nil && ctx.Err() == nil {
			r.shun(g)
		}
		return err
	}
	return err
}

// shunFor is longer than the link takes to notice that a node has died.
const shunFor = 15 * time.Second

// shun lets the other gateways go before one that has failed us, until it is
// heard of again: the next attempt comes before the link knows that it is dead.
func (r *Relay) shun(g mesh.NodeID) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.shunned[g] = time.Now().Add(shunFor)
}

// gateways returns whom to offer outside legs to, best first.
func (r *Relay) gateways() []mesh.NodeID {
	gs := r.d.Gateways()
	r.mu.Lock()
	defer r.mu.Unlock()
	return Prefer(gs, r.shunned, time.Now())
}

func (r *Relay) carry(ctx context.Context, node mesh.NodeID, offer bool, src transport.Source) error {
	s, err := r.open(ctx, node)
	if err != nil {
		return err
	}
	return r.carryOn(ctx, s, offer, src)
}

func (r *Relay) carryOn(ctx context.Context, s *stream, offer bool, src transport.Source) error {
	var releases sync.WaitGroup
	err := s.run(ctx, func(ctx context.Context) error {
		for {
			read := s.results.Load() // before the choice: what was read by then is known to it
			leg, err := src.Next(ctx)
			if err == io.EOF {
				err = s.drained(ctx) // every offer answered, so every release is started
				releases.Wait()
				return err
			}
			if err != nil {
				return err
			}
			if err := s.room(ctx, leg.Body.Size()); err != nil {
				return err
			}
			if err := s.message(ctx, leg, read, offer, src, &releases); err != nil {
				return err
			}
		}
	})
	releases.Wait()
	return err
}

// message sends one leg, which was chosen when so many results had been read. Its
// answer ends it at src.
func (s *stream) message(ctx context.Context, leg *transport.Leg, read uint64, offer bool, src transport.Source, releases *sync.WaitGroup) error {
	body, err := leg.Body.Open()
	if err != nil {
		// Damage here must not stop what comes after it: it is tried again, and
		// the log's own condition names the file.
		src.Finish(leg, fill(len(leg.Rcpts), transport.AsFault(fmt.Errorf("open message: %w", err)).Result(s.r.d.Name(s.r.d.Self))))
		return nil
	}
	defer body.Close()
	f := legFrame{Envelope: leg.Envelope, Rcpts: leg.Rcpts, Size: leg.Body.Size(), Seq: leg.Seq, Read: read}
	kind := byte(frameLeg)
	answer := func(kind byte, p []byte) error {
		var a resultsFrame
		if kind != frameResults {
			return fmt.Errorf("%w: frame %d for a message", errProtocol, kind)
		}
		if err := decode(p, &a); err != nil {
			return err
		}
		if len(a.Results) != len(leg.Rcpts) {
			return fmt.Errorf("%w: %d results for %d recipients", errProtocol, len(a.Results), len(leg.Rcpts))
		}
		src.Finish(leg, a.Results)
		s.results.Add(1)
		return nil
	}
	if offer {
		f.Seq, f.Read = 0, 0
		kind = frameOffer
		answer = func(kind byte, p []byte) error {
			var a fatesFrame
			if kind != frameFates {
				return fmt.Errorf("%w: frame %d for an offer", errProtocol, kind)
			}
			if err := decode(p, &a); err != nil {
				return err
			}
			if len(a.Fates) != len(leg.Rcpts) {
				return fmt.Errorf("%w: %d fates for %d recipients", errProtocol, len(a.Fates), len(leg.Rcpts))
			}
			releases.Go(func() { s.release(ctx, leg, a.Fates, src) })
			return nil
		}
	}
	f.N = s.call(f.Size, answer)
	b, err := appendFrame(make([]byte, 0, min(f.Size, maxData)+2048), kind, &f)
	if err != nil {
		return err
	}
	sum := sha256.New()
	for left := f.Size; left > 0; {
		if len(b) > maxData { // small messages go out in one piece
			if err := s.send(ctx, b); err != nil {
				return err
			}
			b = make([]byte, 0, maxData+2048)
		}
		n := int(min(left, maxData))
		b = appendHead(b, frameData, n)
		b = slices.Grow(b, n)
		at := len(b)
		b = b[:at+n]
		if _, err := io.ReadFull(body, b[at:]); err != nil {
			return fmt.Errorf("read message %s: %w", leg.Envelope.ID, noEOF(err))
		}
		sum.Write(b[at:])
		left -= int64(n)
	}
	end := endFrame{}
	sum.Sum(end.Sum[:0])
	if b, err = appendFrame(b, frameEnd, &end); err != nil {
		return err
	}
	return s.send(ctx, b)
}

// release is the second phase: what the gateway keeps is released, on our disk
// first. Only then may it be sent there. If the frame is lost, the gateway asks.
func (s *stream) release(ctx context.Context, leg *transport.Leg, fates []transport.Fate, src transport.Source) {
	name := s.r.d.Name(s.peer)
	kept, keys, results := Fates(leg, fates, name)
	if len(kept) > 0 {
		if err := s.r.d.Origin.Release(ctx, leg, kept, s.peer); err != nil {
			// Nothing was released, or nobody knows: the leg stays unanswered
			// and pending, and the gateway will ask.
			s.fail(fmt.Errorf("release to %s: %w", name, err))
			return
		}
		n := s.call(0, func(kind byte, p []byte) error { return nil })
		if b, err := appendFrame(nil, frameRelease, &releaseFrame{N: n, ID: leg.Envelope.ID, Keys: keys}); err == nil {
			// Lost or not, custody has passed: the gateway asks when it hears nothing.
			_ = s.send(ctx, b)
		}
	}
	src.Finish(leg, results)
}

func fill(n int, r transport.Result) []transport.Result {
	rs := make([]transport.Result, n)
	for i := range rs {
		rs[i] = r
	}
	return rs
}
