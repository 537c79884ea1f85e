// Package delivery is the carrier of the last leg: it takes what the queue has
// for mailboxes of this node to the mailstore. The queue calls it; which
// mailboxes are here, quotas and duplicates are the mailstore's to know.
//
// It starts deliveries one after the other, in the queue's order, and does not
// wait for the disk in between: the mailstore fixes each one's place in the log
// at the start, so every mailbox sees the queue's order, and one sync serves all
// that are under way. So there is no pool of workers, and none to bound: Window
// bounds what is under way.
package delivery

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"sync"

	"posthouse/mailstore"
	"posthouse/mailstore/log"
	"posthouse/mailstore/mime"
	"posthouse/mesh"
	"posthouse/transport"
)

// Stored is what the Body of a local leg implements beside transport.Body: the
// message stands in the log already.
type Stored interface {
	Ref() log.Ref
	Structure() *mime.Structure // not to be changed
}

// Store is the part of mailstore.Store that a Carrier uses.
type Store interface {
	StartDelivery(ctx context.Context, d *mailstore.Delivery) (*mailstore.Pending, error)
}

// Config configures a Carrier. The zero value is usable.
type Config struct {
	// Window bounds the deliveries that are under way. Default 256.
	Window int
	// Name returns this node's name for the results; nil: none.
	Name func() string
	// Logger may be nil.
	Logger *slog.Logger
}

// Carrier is the transport.Carrier of transport.ScopeLocal. It is safe for
// concurrent use and holds nothing between calls.
type Carrier struct {
	cfg   Config
	store Store
}

// New returns a Carrier into store.
func New(cfg Config, store Store) *Carrier {
	if cfg.Window <= 0 {
		cfg.Window = 256
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	return &Carrier{cfg: cfg, store: store}
}

// started is a delivery under way.
type started struct {
	leg     *transport.Leg
	pending *mailstore.Pending
	rcpts   []int // of leg.Rcpts, in the pending's order
	results []transport.Result
}

// Carry implements transport.Carrier.
func (c *Carrier) Carry(ctx context.Context, dest transport.Destination, src transport.Source) error {
	if dest.Scope != transport.ScopeLocal {
		return fmt.Errorf("delivery cannot carry to %s", dest)
	}
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	under := make(chan *started, c.cfg.Window)
	held := &held{by: map[lane]uint64{}}
	var wg sync.WaitGroup
	wg.Go(func() {
		// The log answers in its order, so waiting in that order loses nothing.
		for s := range under {
			rs, err := s.pending.Applied(ctx)
			if err != nil {
				stop(err) // this leg and those behind it are pending again
				continue
			}
			c.end(src, held, s, rs)
		}
	})
	err := c.pull(ctx, src, held, under)
	close(under)
	wg.Wait()
	if cause := context.Cause(ctx); cause != nil {
		err = cause
	}
	if errors.Is(err, io.EOF) {
		return nil
	}
	return err
}

// pull starts the deliveries until src has no more.
func (c *Carrier) pull(ctx context.Context, src transport.Source, held *held, under chan<- *started) error {
	for {
		leg, err := src.Next(ctx)
		if err != nil {
			return err
		}
		s, err := c.begin(ctx, src, held, leg)
		if err != nil {
			return err
		}
		if s == nil {
			continue
		}
		select {
		case under <- s:
		case <-ctx.Done():
			// Nobody else waits for it: without this a delivery that the log
			// refused would keep its claim, and every repeat would fail with it.
			s.pending.Applied(ctx)
			return context.Cause(ctx)
		}
	}
}

// begin starts a delivery; nil: the leg was finished at once. An error says that
// nothing can be delivered now.
func (c *Carrier) begin(ctx context.Context, src Finisher, held *held, leg *transport.Leg) (*started, error) {
	s := &started{leg: leg, results: make([]transport.Result, len(leg.Rcpts))}
	d := &mailstore.Delivery{Envelope: leg.Envelope, LegSeq: leg.Seq, After: held.last}
	for i := range leg.Rcpts {
		if held.has(leg, i) {
			s.results[i] = transport.Waits("")
			continue
		}
		s.rcpts = append(s.rcpts, i)
		d.Rcpts = append(d.Rcpts, leg.Rcpts[i])
	}
	stored, ok := leg.Body.(Stored)
	if !ok {
		return nil, fmt.Errorf("leg %d: its body is no record of the log", leg.Seq)
	}
	d.Source, d.Structure = stored.Ref(), stored.Structure()
	if len(d.Rcpts) == 0 {
		c.finish(src, leg, s.results)
		return nil, nil
	}
	var err error
	if s.pending, err = c.store.StartDelivery(ctx, d); err != nil {
		if ctx.Err() != nil || errors.Is(err, transport.ErrNoSpace) || errors.Is(err, log.ErrClosed) {
			return nil, err
		}
		// This message cannot be read: it waits for a person, the others go on.
		c.cfg.Logger.Error("local delivery", "msg_id", leg.Envelope.ID.String(), "err", err)
		r := transport.AsFault(err).Result("")
		for _, i := range s.rcpts {
			s.results[i] = r
		}
		c.finish(src, leg, s.results)
		return nil, nil
	}
	held.add(leg, s.pending, s.rcpts)
	held.last = []*mailstore.Pending{s.pending}
	return s, nil
}

// end reports a delivery that is on disk and visible.
func (c *Carrier) end(src Finisher, held *held, s *started, rs []transport.Result) {
	for i, r := range rs {
		s.results[s.rcpts[i]] = r
	}
	c.finish(src, s.leg, s.results)
	held.drop(s.leg, s.pending, s.rcpts)
}

// Finisher is the half of a transport.Source that takes results.
type Finisher interface {
	Finish(leg *transport.Leg, results []transport.Result)
}

// Hand is one Carry whose owner takes the steps: for the simulator of the
// deciders (simtest/deciders).
type Hand struct {
	c     *Carrier
	src   Finisher
	held  held
	under []*started
}

// ByHand begins a Carry by hand; nothing has to end it.
func (c *Carrier) ByHand(src Finisher) *Hand {
	return &Hand{c: c, src: src, held: held{by: map[lane]uint64{}}}
}

// Start starts the delivery of a leg. An error ends the Carry.
func (h *Hand) Start(leg *transport.Leg) error {
	s, err := h.c.begin(context.Background(), h.src, &h.held, leg)
	if s != nil {
		h.under = append(h.under, s)
	}
	return err
}

// Under returns how many deliveries are under way.
func (h *Hand) Under() int { return len(h.under) }

// Settle waits for the deliveries under way and reports them. An error ends the
// Carry.
func (h *Hand) Settle() error {
	under := h.under
	h.under = nil
	var failed error
	for _, s := range under {
		if failed != nil {
			s.pending.Applied(context.Background()) // gives its claim back if it is in no log
			continue
		}
		rs, err := s.pending.Applied(context.Background())
		if err != nil {
			failed = err
			continue
		}
		h.c.end(h.src, &h.held, s, rs)
	}
	return failed
}

func (c *Carrier) finish(src Finisher, leg *transport.Leg, results []transport.Result) {
	if c.cfg.Name != nil {
		for i := range results {
			results[i].By = c.cfg.Name()
		}
	}
	src.Finish(leg, results)
}

// lane is one sender's mail to one mailbox: it stays in order (MESH.md, Relay:
// a deferral holds later mail of the same sender to the same mailbox only).
type lane struct {
	from string
	to   mesh.MailboxID
}

// held are the lanes whose first mail was deferred while the queue does not know
// it yet: what it hands out behind that waits too. From Finish on it is the
// queue that keeps the order.
type held struct {
	last []*mailstore.Pending // what the next delivery must not overtake; of the starter alone

	mu sync.Mutex
	by map[lane]uint64 // sequence number of the leg that was deferred
}

func (h *held) add(leg *transport.Leg, p *mailstore.Pending, rcpts []int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, i := range p.Deferred() {
		h.by[lane{leg.Envelope.From, leg.Rcpts[rcpts[i]].Mailbox}] = leg.Seq
	}
}

func (h *held) drop(leg *transport.Leg, p *mailstore.Pending, rcpts []int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, i := range p.Deferred() {
		l := lane{leg.Envelope.From, leg.Rcpts[rcpts[i]].Mailbox}
		if h.by[l] == leg.Seq {
			delete(h.by, l)
		}
	}
}

func (h *held) has(leg *transport.Leg, rcpt int) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	seq, ok := h.by[lane{leg.Envelope.From, leg.Rcpts[rcpt].Mailbox}]
	return ok && leg.Seq > seq
}
