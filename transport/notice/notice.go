// Package notice tells the other nodes what a node knows of itself and they had
// better know before they try: that its disk is full, or has room again, which
// of its mailboxes are over their quota, and that it can take now what it turned
// away before. It hears the same from them.
//
// It is soft state. Each node keeps one stream open to each peer that it can
// reach, sends the whole of its facts when the stream opens, and again when they
// change; the peer forgets them when the stream ends. So a restart, a cut line and
// a revocation need no rule of their own, and nothing is kept on disk.
//
// It is no authority. A peer is heard about itself only: who asks whether a
// mailbox is full names the home that the domain state gives, and gets that
// node's word. A lie costs an attempt, or a 452. What is not known means "try".
//
// It moves no mail and wakes nobody: appliance hands what changed to the queue.
// transport/DESIGN.md says why this is no publication and no gossip.
package notice

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"sync"
	"time"

	"posthouse/mesh"
)

// Service is the name under which streams are opened.
const Service = "notice/1"

// Facts are what a node says of itself.
type Facts struct {
	// Full: its disk takes nothing new now.
	Full bool
	// Mailboxes are those of its own that are over their quota, at most
	// MaxMailboxes.
	Mailboxes []mesh.MailboxID
	// Again counts, since its start, how often it could take what it had turned
	// away: there was room again, perhaps so soon that nobody heard of the lack; or
	// its copy of the domain state was behind the sender's, and has caught up.
	Again uint64
}

// Times of a stream.
const (
	// pause is the least between two frames, on both sides: who speaks faster is
	// read slower.
	pause = time.Second
	// retry is how long after a stream broke the next is opened, while the peer
	// may be reached; after several that did not live, only news of the peer helps.
	retry   = 5 * time.Second
	retries = 3
	// open bounds the opening of a stream, write the sending of a frame.
	open  = 10 * time.Second
	write = 10 * time.Second
)

// Deps is what a Board needs from its surroundings.
type Deps struct {
	// Dial opens a stream to a node. ctx bounds the opening only.
	Dial func(ctx context.Context, node mesh.NodeID, service string) (net.Conn, error)
	// Heard is called after a peer's facts changed, in their order. first: they
	// are the first on this stream, and was is empty. It must not block. Nil:
	// nobody is told.
	Heard  func(peer mesh.NodeID, was, is Facts, first bool)
	Name   func(mesh.NodeID) string // for people
	Logger *slog.Logger
}

// Board is a node's notices: its own and its peers'. Safe for concurrent use.
type Board struct {
	d    Deps
	news chan struct{} // a token: Run looks at wanted

	mu     sync.Mutex
	own    Facts
	change chan struct{}                 // closed when own changes
	wanted []mesh.NodeID                 // peers that need a talker
	talks  map[mesh.NodeID]chan struct{} // of each talker: a token, its peer came up
	heard  map[mesh.NodeID]*heard        // what a peer says, as long as its stream lives
}

type heard struct{ facts Facts }

// New returns a Board; Run it to speak, Serve streams to hear.
func New(d Deps) *Board {
	if d.Logger == nil {
		d.Logger = slog.New(slog.DiscardHandler)
	}
	if d.Heard == nil {
		d.Heard = func(mesh.NodeID, Facts, Facts, bool) {}
	}
	return &Board{d: d, news: make(chan struct{}, 1), change: make(chan struct{}),
		talks: map[mesh.NodeID]chan struct{}{}, heard: map[mesh.NodeID]*heard{}}
}

// Set replaces what this node says of itself. It does not wait.
func (b *Board) Set(f Facts) {
	f = f.tidy()
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.own.equal(f) {
		return
	}
	b.own = f
	close(b.change)
	b.change = make(chan struct{})
}

// Full reports whether a peer says that its disk is full.
func (b *Board) Full(peer mesh.NodeID) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	h := b.heard[peer]
	return h != nil && h.facts.Full
}

// MailboxFull reports whether a mailbox's home says that it is over its quota.
func (b *Board) MailboxFull(home mesh.NodeID, m mesh.MailboxID) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if !ownWordOnly {
		for _, h := range b.heard {
			if h.facts.has(m) {
				return true
			}
		}
	}
	h := b.heard[home]
	return h != nil && h.facts.has(m)
}

// PeerUp tells that a node can be reached now. It does not wait. That it cannot
// be reached any more is what its streams say.
func (b *Board) PeerUp(peer mesh.NodeID) {
	b.mu.Lock()
	up := b.talks[peer]
	if up == nil {
		up = make(chan struct{}, 1)
		b.talks[peer] = up
		b.wanted = append(b.wanted, peer)
	}
	b.mu.Unlock()
	poke(up)
	poke(b.news)
}

func poke(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// Run speaks to the peers until ctx ends, and leaves nothing running.
func (b *Board) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	for {
		b.mu.Lock()
		for _, peer := range b.wanted {
			up := b.talks[peer]
			wg.Go(func() { b.talk(ctx, peer, up) })
		}
		b.wanted = nil
		b.mu.Unlock()
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-b.news:
		}
	}
}

// talk keeps a stream to one peer open whenever it can be reached: one goroutine
// for each peer that ever could.
func (b *Board) talk(ctx context.Context, peer mesh.NodeID, up <-chan struct{}) {
	left := 0
	for {
		var again <-chan time.Time
		if left > 0 {
			again = time.After(retry)
		}
		select {
		case <-ctx.Done():
			return
		case <-up:
			left = retries
		case <-again:
			left--
		}
		began := time.Now()
		err := b.tell(ctx, peer)
		if ctx.Err() != nil {
			return
		}
		if time.Since(began) > retry { // not one that refuses the service, say of an older version
			left = retries
		}
		b.d.Logger.Debug("notices end", "peer", b.d.Name(peer), "err", err)
	}
}

// tell opens a stream and sends this node's facts until the stream ends.
func (b *Board) tell(ctx context.Context, peer mesh.NodeID) error {
	dctx, cancel := context.WithTimeout(ctx, open)
	c, err := b.d.Dial(dctx, peer, Service)
	cancel()
	if err != nil {
		return err
	}
	ctx, end := context.WithCancelCause(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer c.Close()
	defer end(nil)
	wg.Go(func() { // nothing is ever said to us: a read ends with the stream
		_, err := io.Copy(io.Discard, io.LimitReader(c, 1))
		end(cmp.Or(err, io.EOF))
	})
	stop := context.AfterFunc(ctx, func() { c.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	said, first := Facts{}, true
	for {
		b.mu.Lock()
		own, change := b.own, b.change
		b.mu.Unlock()
		if first || !own.equal(said) {
			p, err := encode(own)
			if err != nil {
				return err
			}
			c.SetWriteDeadline(time.Now().Add(write))
			if _, err := c.Write(p); err != nil {
				return fmt.Errorf("send notices to %s: %w", b.d.Name(peer), err)
			}
			said, first = own, false
			if err := rest(ctx); err != nil {
				return err
			}
		}
		select {
		case <-change:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// rest keeps the least distance between two frames.
func rest(ctx context.Context) error {
	t := time.NewTimer(pause)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// Serve hears what a peer says of itself until the stream or ctx ends, and closes
// conn. Of two streams of one peer the later counts.
func (b *Board) Serve(ctx context.Context, peer mesh.NodeID, conn net.Conn) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer func() {
		if stop() {
			conn.Close()
		}
	}()
	me := &heard{}
	for first := true; ; first = false {
		is, err := read(conn)
		if err != nil {
			b.forget(peer, me)
			if ctx.Err() != nil || err == io.EOF {
				return nil
			}
			return fmt.Errorf("notices of %s: %w", b.d.Name(peer), err)
		}
		b.mu.Lock()
		if !first && b.heard[peer] != me {
			b.mu.Unlock()
			return errors.New("a later stream has taken over")
		}
		b.heard[peer] = me
		was := me.facts
		me.facts = is
		b.mu.Unlock()
		if first || !was.equal(is) {
			b.d.Heard(peer, was, is, first)
		}
		if rest(ctx) != nil {
			b.forget(peer, me)
			return nil
		}
	}
}

// forget drops what a stream said, unless a later one has taken over.
func (b *Board) forget(peer mesh.NodeID, me *heard) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.heard[peer] == me {
		delete(b.heard, peer)
	}
}
