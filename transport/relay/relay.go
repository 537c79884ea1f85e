// Package relay hands messages from node to node over streams that link opens.
//
// The client is the transport.Carrier for other homes and for gateways; the
// server gives what comes in to the mailboxes of this node (Home) or, for
// outside legs at a gateway, keeps it until its origin releases it (Gateway).
// relay keeps nothing durable itself: custody is queue's, deduplication is the
// home's and queue's.
//
// DESIGN.md beside this file has the frames and what a crash at each step does.
package relay

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"posthouse/mailstore/log"
	"posthouse/mailstore/mime"
	"posthouse/mesh"
	"posthouse/transport"
)

// Service is the name under which streams are opened.
const Service = "relay"

// Times and bounds of a stream.
const (
	progress   = 5 * time.Second  // without any: failed, and link takes another path
	working    = 2 * time.Second  // between signs of life while something comes in or is logged
	idleStream = 10 * time.Minute // the server's patience with a silent client; link sees a dead one sooner
	window     = 64               // messages unanswered
	windowSize = 8 << 20          // bytes unanswered
	askAfter   = 10 * time.Second // a kept leg's age before its origin is asked
	askEvery   = 5 * time.Minute  // without any event
)

// Home takes messages for the mailboxes of this node.
type Home interface {
	// Start fixes a message's place in the order of its mailboxes without waiting
	// for the disk, as mailstore.Store.StartDelivery does. Calls for one mailbox
	// come one at a time. after are those started before in these mailboxes that
	// have no results yet: should one of them not come to disk for want of space,
	// this one must not either. With an error body is still the caller's.
	Start(ctx context.Context, env transport.Envelope, rcpts []transport.Recipient, body *log.Draft, s *mime.Structure, after []Started) (Started, error)
	// Where returns the home of a mailbox, for answers that it moved.
	Where(m mesh.MailboxID) (home mesh.NodeID, version uint64, ok bool)
}

// Started is a delivery whose place is fixed; *mailstore.Pending is one.
type Started interface {
	// Known returns one result a recipient as far as it is known from the start:
	// Delivered ones are not to be told yet, the others are final.
	Known() []transport.Result
	// Synced returns the results once they are on disk. It is always called.
	Synced(ctx context.Context) ([]transport.Result, error)
}

// Gateway keeps outside legs for other nodes; *queue.Queue is one.
type Gateway interface {
	Keep(ctx context.Context, origin mesh.NodeID, env transport.Envelope, rcpts []transport.Recipient, body *log.Draft, s *mime.Structure) ([]transport.Fate, error)
	Let(ctx context.Context, origin mesh.NodeID, id transport.MessageID, keys []string) error
	Drop(ctx context.Context, origin mesh.NodeID, id transport.MessageID, keys []string) error
	Strand(ctx context.Context, origin mesh.NodeID, id transport.MessageID, keys []string) error
	Kept(origin mesh.NodeID, age time.Duration, limit int) ([]transport.KeptLeg, error)
	Finals(origin mesh.NodeID, limit int) ([]transport.FinalResult, error)
	Told(ctx context.Context, origin mesh.NodeID, fs []transport.FinalResult) error
	Origins() []mesh.NodeID
}

// Origin is where outside legs come from; *queue.Queue is one.
type Origin interface {
	Release(ctx context.Context, leg *transport.Leg, rcpts []int, gateway mesh.NodeID) error
	Ask(gateway mesh.NodeID, id transport.MessageID, keys []string) ([]transport.Standing, error)
	Final(ctx context.Context, gateway mesh.NodeID, f transport.FinalResult) error
}

// Deps is what relay needs from its surroundings.
type Deps struct {
	Self mesh.NodeID
	// Dial opens a stream to a node. ctx bounds the opening only.
	Dial func(ctx context.Context, node mesh.NodeID, service string) (net.Conn, error)
	// Name returns a node's name for people.
	Name   func(mesh.NodeID) string
	Member func(mesh.NodeID) bool
	// PutOut reports whether a node was a member and is none any more; nil: none was.
	PutOut func(mesh.NodeID) bool
	// Gateways returns the gateways to offer outside legs to, best first.
	Gateways func() []mesh.NodeID
	// IsGateway reports whether this node takes outside legs now.
	IsGateway func() bool
	Home      Home
	Gateway   Gateway
	Origin    Origin
	NewDraft  func() *log.Draft
	// Trace returns the header fields that this hop puts before a message from
	// that peer: complete lines, CRLF. Nil: one Received field.
	Trace func(peer mesh.NodeID, env *transport.Envelope) []byte
	// Now is the wall clock, for that field. Nil: time.Now.
	Now    func() time.Time
	Logger *slog.Logger
}

// Relay is both ends of the relay on one node. Safe for concurrent use.
type Relay struct {
	d    Deps
	kick chan struct{}

	mu    sync.Mutex
	todo  map[mesh.NodeID]time.Duration // origins to be seen: the age from which kept legs are asked for
	doing map[mesh.NodeID]bool
	// Gateways that failed us, until when the others go first.
	shunned map[mesh.NodeID]time.Time
}

// New returns a relay; Run it for the gateway's part.
func New(d Deps) *Relay {
	if d.Logger == nil {
		d.Logger = slog.New(slog.DiscardHandler)
	}
	if d.Now == nil {
		d.Now = time.Now
	}
	r := &Relay{d: d, kick: make(chan struct{}, 1), todo: map[mesh.NodeID]time.Duration{}, doing: map[mesh.NodeID]bool{}, shunned: map[mesh.NodeID]time.Time{}}
	if r.d.Trace == nil {
		r.d.Trace = r.trace
	}
	return r
}

// trace is the Received field of RFC 5321 section 4.4, one a hop.
func (r *Relay) trace(peer mesh.NodeID, env *transport.Envelope) []byte {
	return fmt.Appendf(nil, "Received: from %s by %s with QUIC\r\n\tid %s; %s\r\n",
		r.d.Name(peer), r.d.Name(r.d.Self), env.ID, r.d.Now().UTC().Format("Mon, 02 Jan 2006 15:04:05 -0700"))
}

// stream is the client's end of a stream.
type stream struct {
	r    *Relay
	peer mesh.NodeID
	c    net.Conn
	out  chan []byte   // to the writer
	dead chan struct{} // closed when the stream has failed or ended
	idle chan struct{} // a token for each change of what is unanswered

	results atomic.Uint64 // answers to frameLeg that were read, and their legs finished

	mu      sync.Mutex
	err     error
	closing bool // nothing more is sent
	next    uint64
	waiting map[uint64]*call
	size    int64 // bytes of the bodies unanswered
}

// call is a frame that waits for its answer.
type call struct {
	size   int64
	answer func(kind byte, p []byte) error
}

func (r *Relay) open(ctx context.Context, node mesh.NodeID) (*stream, error) {
	dctx, cancel := context.WithTimeout(ctx, progress)
	defer cancel()
	c, err := r.d.Dial(dctx, node, Service)
	if err != nil {
		return nil, fmt.Errorf("reach %s: %w", r.d.Name(node), err)
	}
	return &stream{r: r, peer: node, c: c, out: make(chan []byte, 4), dead: make(chan struct{}), idle: make(chan struct{}, 1),
		waiting: map[uint64]*call{}}, nil
}

// run reads and writes until the stream ends. It owns all goroutines of it;
// drive is the one that sends.
func (s *stream) run(ctx context.Context, drive func(ctx context.Context) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var wg sync.WaitGroup
	wg.Go(func() { // ends blocked reads and writes
		select {
		case <-ctx.Done():
			s.fail(context.Cause(ctx))
		case <-s.dead:
			cancel(s.reason())
		}
		s.c.Close()
	})
	wg.Go(s.write)
	wg.Go(s.read)
	err := s.send(ctx, []byte(preamble))
	if err == nil {
		err = drive(ctx)
	}
	if err == nil {
		err = s.drained(ctx)
	}
	if err == nil {
		s.mu.Lock()
		s.closing = true
		s.mu.Unlock()
		err = s.send(ctx, appendHead(nil, frameBye, 0))
		if err == nil {
			close(s.out)
			<-s.dead // the server closes after its last answer
			if err = s.reason(); err == io.EOF {
				err = nil
			}
		}
	}
	if e := s.reason(); err != nil && e != nil && errors.Is(err, context.Canceled) {
		err = e
	}
	s.fail(cmp.Or(err, io.EOF))
	cancel(nil)
	wg.Wait()
	return err
}

func (s *stream) fail(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err == nil {
		s.err = err
		close(s.dead)
	}
}

func (s *stream) reason() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.err
}

func (s *stream) send(ctx context.Context, b []byte) error {
	select {
	case s.out <- b:
		return nil
	case <-s.dead:
		return s.reason()
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (s *stream) write() {
	for {
		var b []byte
		var ok bool
		select {
		case b, ok = <-s.out:
			if !ok {
				return
			}
		case <-s.dead:
			return
		}
		var moved time.Time // a line that is fast needs no deadline for each piece
		for p := range slices.Chunk(b, piece) {
			if now := time.Now(); now.Sub(moved) > progress/20 {
				moved = now
				s.c.SetWriteDeadline(now.Add(progress))
				s.expect()
			}
			if _, err := s.c.Write(p); err != nil {
				s.fail(fmt.Errorf("send to %s: %w", s.r.d.Name(s.peer), err))
				return
			}
		}
		s.expect()
	}
}

// expect moves the time by which something must be heard: never while nothing
// is awaited.
func (s *stream) expect() {
	s.mu.Lock()
	wait := len(s.waiting) > 0 || s.closing
	s.mu.Unlock()
	if wait {
		s.c.SetReadDeadline(time.Now().Add(progress))
	} else {
		s.c.SetReadDeadline(time.Time{})
	}
}

func (s *stream) read() {
	var buf []byte
	for {
		kind, p, err := readFrame(s.c, buf)
		if err != nil {
			var t interface{ Timeout() bool }
			if errors.As(err, &t) && t.Timeout() {
				err = fmt.Errorf("%s does not answer", s.r.d.Name(s.peer))
			} else if err != io.EOF {
				err = fmt.Errorf("hear from %s: %w", s.r.d.Name(s.peer), err)
			}
			s.fail(err)
			return
		}
		buf = p
		if kind != frameWait {
			var h struct {
				N uint64 `cbor:"1,keyasint"`
			}
			if err := decode(p, &h); err != nil {
				s.fail(err)
				return
			}
			s.mu.Lock()
			c := s.waiting[h.N]
			s.mu.Unlock()
			if c == nil {
				s.fail(fmt.Errorf("%w: answer to nothing", errProtocol))
				return
			}
			if err := c.answer(kind, p); err != nil {
				s.fail(err)
				return
			}
			s.mu.Lock()
			delete(s.waiting, h.N)
			s.size -= c.size
			s.mu.Unlock()
			select {
			case s.idle <- struct{}{}:
			default:
			}
		}
		s.expect()
	}
}

// call registers a frame that wants an answer and returns its number. answer
// runs on the reader: it must not wait for the network.
func (s *stream) call(size int64, answer func(kind byte, p []byte) error) uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.next++
	s.waiting[s.next] = &call{size, answer}
	s.size += size
	return s.next
}

// room waits until another message of that size may be under way.
func (s *stream) room(ctx context.Context, size int64) error {
	return s.until(ctx, func() bool { return len(s.waiting) < window && (len(s.waiting) == 0 || s.size+size <= windowSize) })
}

func (s *stream) drained(ctx context.Context) error {
	return s.until(ctx, func() bool { return len(s.waiting) == 0 })
}

func (s *stream) until(ctx context.Context, ok func() bool) error {
	for {
		s.mu.Lock()
		good := ok()
		s.mu.Unlock()
		if good {
			return nil
		}
		select {
		case <-s.idle:
		case <-s.dead:
			return s.reason()
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}
