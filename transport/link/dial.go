package link

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/quic-go/quic-go"

	"posthouse/mesh"
)

const (
	// An unreachable peer is dialled every dialSoon ± dialSpread for dialSoonFor, then
	// every dialLate. From start to start: an attempt may outlast the next.
	dialSoon    = 3 * time.Second
	dialSpread  = time.Second
	dialSoonFor = time.Hour
	dialLate    = 30 * time.Second
	// dialRound bounds the attempts that start together: a handshake and a hello
	// take three round trips, some of 800 ms, and packets are lost.
	dialRound = 8 * time.Second
	// dialRounds is how many may overlap.
	dialRounds = 4
	// dialStagger is between the attempts of a round, one for each address.
	dialStagger = 250 * time.Millisecond
	// hintGap and datagramGap bound how often an event starts a round.
	hintGap     = 500 * time.Millisecond
	datagramGap = dialSoon
)

// dialDelay is the wait from the start of one round to the next.
func dialDelay(down time.Duration) time.Duration {
	if down < dialSoonFor {
		return jitter(dialSoon, dialSpread)
	}
	return jitter(dialLate, dialSpread)
}

// startPeer needs e.mu. Before Run it does nothing; Run calls it again.
func (e *Endpoint) startPeer(p *peer) {
	if e.ctx == nil || e.ctx.Err() != nil {
		return
	}
	ctx, cancel := context.WithCancel(e.ctx)
	p.stop = cancel
	e.spawnLocked(func(context.Context) {
		defer cancel()
		e.dialLoop(ctx, p)
	})
}

// dialLoop dials p whenever it is not connected, until ctx ends.
func (e *Endpoint) dialLoop(ctx context.Context, p *peer) {
	var rounds sync.WaitGroup
	defer rounds.Wait()
	free := make(chan int, dialRounds) // which of giveUp may be set anew
	var giveUp [dialRounds]context.CancelFunc
	for i := range giveUp {
		free <- i
		giveUp[i] = func() {}
	}
	timer := time.NewTimer(0)
	defer timer.Stop()
	due := true
	for {
		e.mu.Lock()
		up, down := p.up, time.Since(p.since)
		now := !up && (due || p.kicked)
		p.kicked = false
		if now {
			p.lastDial = time.Now()
		}
		addrs := p.candidates()
		e.mu.Unlock()
		switch {
		case up:
			// What is still dialling is not needed: the other side's connection is up.
			// An attempt past its handshake goes on (see round).
			for _, f := range giveUp {
				f()
			}
			timer.Stop()
			due = true // when it goes down, dial at once
		case now:
			due = false
			timer.Reset(dialDelay(down))
			select {
			case slot := <-free:
				attempts, cancel := context.WithTimeout(ctx, dialRound)
				giveUp[slot] = cancel
				rounds.Go(func() {
					defer func() { cancel(); free <- slot }()
					err := e.round(ctx, attempts, p, addrs)
					if err == nil {
						err = errElsewhere // unless p is up now
					}
					e.mu.Lock()
					if !p.up {
						p.err = err
						p.markTried()
					}
					e.mu.Unlock()
				})
			default:
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-p.wake:
		case <-timer.C:
			due = true
		}
	}
}

// round tries all addresses, and is content with the first that answers as anybody
// who is admitted: nodes may have swapped their addresses. attempts ends it only
// before a handshake is complete: if both sides dropped the connection that they
// dialled because they saw the other's, none would be left.
func (e *Endpoint) round(ctx, attempts context.Context, p *peer, addrs []netip.AddrPort) error {
	if len(addrs) == 0 {
		return errors.New("no address is known")
	}
	attempts, cancel := context.WithCancel(attempts)
	defer cancel()
	errs := make([]error, len(addrs))
	var wg sync.WaitGroup
	for i, addr := range addrs {
		wg.Go(func() {
			if i > 0 {
				stagger := time.NewTimer(time.Duration(i) * dialStagger)
				defer stagger.Stop()
				select {
				case <-attempts.Done():
					errs[i] = attempts.Err()
					return
				case <-stagger.C:
				}
			}
			if _, errs[i] = e.connect(ctx, attempts, p, addr, Control); errs[i] == nil {
				cancel()
			}
		})
	}
	wg.Wait()
	var last error
	for i, err := range errs {
		if err == nil {
			return nil
		}
		if last == nil || !errors.Is(err, context.Canceled) {
			last = fmt.Errorf("dial %v: %w", addrs[i], err)
		}
	}
	return last
}

// errElsewhere: the node that was looked for is not at its address.
var errElsewhere = errors.New("another node is at its address")

// connect dials one address, looking for want. attempt bounds the handshake, ctx the hello.
func (e *Endpoint) connect(ctx, attempt context.Context, want *peer, addr netip.AddrPort, class Class) (*session, error) {
	tlsc := e.deps.Identity.ClientTLS(alpnMesh, func(key mesh.KeyHash) error {
		e.mu.Lock()
		defer e.mu.Unlock()
		if key == e.deps.Identity.Hash() {
			return errors.New("this is our own address")
		}
		return e.checkKey(key)
	})
	conn, err := e.tr.Dial(attempt, net.UDPAddrFromAddrPort(addr), tlsc, e.quicConfig())
	if err != nil {
		return nil, wireError(err)
	}
	return e.greet(ctx, conn, want, class)
}

// session returns the connection to p that serves class, making one if need be.
func (e *Endpoint) session(ctx context.Context, p *peer, class Class) (*session, error) {
	control, err := e.control(ctx, p)
	if err != nil {
		return nil, err
	}
	if class == Control {
		return control, nil
	}
	// Whoever gets the token dials; the others wait and find its connection.
	select {
	case p.bulkDial <- struct{}{}:
		defer func() { <-p.bulkDial }()
	case <-ctx.Done():
		return nil, fmt.Errorf("%w: %w", ErrUnreachable, ctx.Err())
	}
	e.mu.Lock()
	s := p.current(Bulk)
	sound := s != nil && !s.doubted
	e.mu.Unlock()
	if sound {
		return s, nil
	}
	// Where the control connection lives a handshake and a hello take three round
	// trips of a known length; longer, and it is dead, though nothing has said so.
	dctx, cancel := context.WithTimeout(ctx, max(directWait, 6*control.conn.ConnectionStats().SmoothedRTT))
	defer cancel()
	s, err = e.connect(dctx, dctx, p, control.addr, Bulk)
	if err != nil {
		if dctx.Err() != nil && ctx.Err() == nil {
			e.Doubt(p.id)
		}
		return nil, fmt.Errorf("%w: dial bulk: %w", ErrUnreachable, err)
	}
	if s.peer != p {
		return nil, fmt.Errorf("%w: %w", ErrUnreachable, errElsewhere)
	}
	return s, nil
}

// directWait bounds how long a stream waits for a first attempt before a way through
// others is looked for.
const directWait = 2 * time.Second

// control returns p's control connection. If p was not tried yet since it went down
// (or since the start), it waits a little for that; else it fails at once.
func (e *Endpoint) control(ctx context.Context, p *peer) (*session, error) {
	ctx, cancel := context.WithTimeout(ctx, directWait)
	defer cancel()
	for range 2 {
		e.mu.Lock()
		s, tried, err, removed, running := p.current(Control), p.tried, p.err, p.removed, e.ctx
		e.mu.Unlock()
		switch {
		case running == nil || running.Err() != nil:
			return nil, ErrClosed
		case removed:
			return nil, ErrNotAdmitted
		case s != nil:
			return s, nil
		}
		select {
		case <-tried:
			if err != nil {
				return nil, fmt.Errorf("%w: %w", ErrUnreachable, err)
			}
		default:
			select {
			case <-tried:
			case <-ctx.Done():
				return nil, fmt.Errorf("%w: %w", ErrUnreachable, ctx.Err())
			case <-running.Done():
				return nil, ErrClosed
			}
		}
	}
	return nil, ErrUnreachable
}

// wireError gives what quic-go reports the meaning that our callers know.
func wireError(err error) error {
	var (
		app    *quic.ApplicationError
		reset  *quic.StreamError
		broken *quic.TransportError
	)
	switch {
	case err == nil:
		return nil
	case errors.As(err, &reset):
		switch reset.ErrorCode {
		case streamNoService:
			return ErrNoService
		case streamBusy:
			return ErrBusy
		case streamNoRoute:
			return fmt.Errorf("%w: the node in between has lost it", ErrUnreachable)
		case streamRefused:
			return ErrNotAdmitted
		}
		if !reset.Remote {
			return ErrClosed
		}
		return ErrReset
	case errors.As(err, &app):
		if app.ErrorCode == codeRevoked {
			return fmt.Errorf("%w: %w", ErrNotAdmitted, err)
		}
		return fmt.Errorf("%w: %w", ErrUnreachable, err)
	case errors.As(err, &broken):
		// RFC 9001 section 4.8: 0x100 + the TLS alert. 42 is bad_certificate, which is
		// how the other side's check says no.
		if broken.ErrorCode == 0x100+42 {
			return fmt.Errorf("%w: %w", ErrNotAdmitted, err)
		}
		return fmt.Errorf("%w: %w", ErrUnreachable, err)
	}
	var idle *quic.IdleTimeoutError
	var handshake *quic.HandshakeTimeoutError
	var stateless *quic.StatelessResetError
	if errors.As(err, &idle) || errors.As(err, &handshake) || errors.As(err, &stateless) {
		return fmt.Errorf("%w: %w", ErrUnreachable, err)
	}
	return err
}
