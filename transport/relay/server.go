package relay

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
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

// server is one stream that a peer opened.
type server struct {
	ended  atomic.Bool // the log has: nothing is answered any more
	r      *Relay
	peer   mesh.NodeID
	c      net.Conn
	slots  chan struct{} // messages being logged
	out    chan frame
	cancel context.CancelCauseFunc
	busy   atomic.Int64
	coming atomic.Bool // bytes came since the last frame went out
	wg     sync.WaitGroup

	mu    sync.Mutex
	holds Holds

	// Of the reader alone.
	in   *incoming
	last map[mesh.MailboxID]*turn
}

// incoming is the message that is being read.
type incoming struct {
	legFrame
	offer bool
	fault *transport.Fault // refused: its bytes are only skipped
	draft *log.Draft
	sum   hash.Hash
	got   int64
}

// turn is a message's place in the order of one mailbox.
type turn struct {
	before  *turn
	started chan struct{} // closed when the next may start
	told    chan struct{} // closed when the next may be answered
	begun   Started       // written before started closes; nil: nothing was started
	// settled is closed when begun has its results, and holds are set by them.
	settled chan struct{}
}

// frame is what the writer is given.
type frame struct {
	b       []byte
	results bool   // it is frameResults,
	seq     uint64 // of that message
	lanes   []Lane // those of its recipients that were not taken
}

// Serve answers a stream that peer opened until it ends. It closes conn.
func (r *Relay) Serve(ctx context.Context, peer mesh.NodeID, conn net.Conn) error {
	ctx, cancel := context.WithCancelCause(ctx)
	s := &server{r: r, peer: peer, c: conn, slots: make(chan struct{}, window), out: make(chan frame, 8), cancel: cancel,
		last: map[mesh.MailboxID]*turn{}}
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	written := make(chan struct{})
	go func() { defer close(written); s.write(ctx) }()
	err := s.read(ctx)
	if s.in != nil && s.in.draft != nil {
		s.in.draft.Discard()
	}
	if err != nil {
		// Answers still under way are not worth waiting for: the client asks
		// again. What was begun is finished, so that nothing is left half done.
		cancel(err)
	}
	s.wg.Wait()
	close(s.out)
	<-written
	stop()
	cancel(nil)
	conn.Close()
	if err != nil {
		return fmt.Errorf("relay from %s: %w", r.d.Name(peer), err)
	}
	return nil
}

func (s *server) write(ctx context.Context) {
	alive := time.NewTicker(working)
	defer alive.Stop()
	failed := false
	for {
		var b []byte
		select {
		case f, ok := <-s.out:
			if !ok {
				return
			}
			b = f.b
			s.coming.Store(false)
			if f.results {
				s.mu.Lock()
				s.holds.Tell(f.seq, f.lanes)
				s.mu.Unlock()
			}
		case <-alive.C:
			if !s.coming.Swap(false) && s.busy.Load() == 0 {
				continue
			}
			b = appendHead(nil, frameWait, 0)
		}
		if failed {
			continue // drains, so that nobody waits for us
		}
		s.c.SetWriteDeadline(time.Now().Add(2 * progress))
		if _, err := s.c.Write(b); err != nil {
			failed = true
			s.cancel(fmt.Errorf("answer: %w", err))
		}
	}
}

// over ends the stream without another answer when err says that this node's
// log has failed or is closed: it knows nothing about the messages, and must
// not tell the sender to wait with them. The next path, or this node's next
// life, answers.
func (s *server) over(err error) bool {
	if !errors.Is(err, log.ErrClosed) {
		return false
	}
	s.ended.Store(true)
	s.cancel(fmt.Errorf("the store has ended: %w", err))
	return true
}

// answer queues a frame; the writer drains whatever happens.
func (s *server) answer(kind byte, v any) { s.tell(kind, v, frame{}) }

// tell is answer with what the writer needs to know of results.
func (s *server) tell(kind byte, v any, f frame) {
	if s.ended.Load() {
		return
	}
	var err error
	if f.b, err = appendFrame(nil, kind, v); err != nil {
		s.cancel(err)
		return
	}
	s.out <- f
}

func (s *server) read(ctx context.Context) error {
	br := bufio.NewReaderSize((*arriving)(s), 64<<10)
	s.c.SetReadDeadline(time.Now().Add(idleStream))
	var hello [len(preamble)]byte
	if _, err := io.ReadFull(br, hello[:]); err != nil {
		return err
	}
	if string(hello[:3]) != preamble[:3] {
		return fmt.Errorf("%w: not a relay stream", errProtocol)
	}
	if hello[3] != preamble[3] {
		return fmt.Errorf("%w: version %d is not known here: update this node", errProtocol, hello[3])
	}
	var buf []byte
	for {
		s.c.SetReadDeadline(time.Now().Add(idleStream))
		kind, p, err := readFrame(br, buf)
		if err != nil {
			return err
		}
		buf = p
		if s.in != nil && (kind == frameLeg || kind == frameOffer || kind == frameBye) {
			return fmt.Errorf("%w: frame %d inside a message", errProtocol, kind)
		}
		switch kind {
		case frameLeg, frameOffer:
			err = s.begin(kind == frameOffer, p)
		case frameData:
			err = s.data(p)
		case frameEnd:
			err = s.end(ctx, p)
		case frameRelease:
			err = s.release(ctx, p)
		case frameFinals:
			err = s.finals(ctx, p)
		case frameAsk:
			err = s.ask(ctx, p)
		case frameBye:
			return nil
		default: // of a later version, and not meant to be understood
		}
		if err != nil {
			return err
		}
	}
}

// arriving reads a server's stream, and notes that something comes: on a narrow
// line a frame is minutes on its way.
type arriving server

func (a *arriving) Read(p []byte) (int, error) {
	n, err := a.c.Read(p)
	if n > 0 {
		a.coming.Store(true)
	}
	return n, err
}

func (s *server) begin(offer bool, p []byte) error {
	in := &incoming{offer: offer, sum: sha256.New()}
	if err := decode(p, &in.legFrame); err != nil {
		return err
	}
	if in.Size < 0 || in.Size > maxBody || len(in.Rcpts) == 0 {
		return fmt.Errorf("%w: message of %d bytes to %d recipients", errProtocol, in.Size, len(in.Rcpts))
	}
	in.fault = in.check(s.peer, offer, s.r.d.Member)
	if in.fault == nil && offer && !s.r.d.IsGateway() {
		in.fault = transport.Faultf(450, "4.3.2", "%s is no gateway now", s.r.d.Name(s.r.d.Self))
	}
	s.in = in
	if in.fault == nil {
		in.draft = s.r.d.NewDraft()
		if _, err := in.draft.Write(s.r.d.Trace(s.peer, &in.Envelope)); err != nil {
			s.refuse(err)
		}
	}
	in.Envelope.Hops++
	return nil
}

// refuse skips what comes of the message now: this node cannot take it.
func (s *server) refuse(err error) {
	s.in.fault = transport.AsFault(err)
	if s.in.draft != nil {
		s.in.draft.Discard()
		s.in.draft = nil
	}
}

func (s *server) data(p []byte) error {
	in := s.in
	if in == nil {
		return fmt.Errorf("%w: bytes of no message", errProtocol)
	}
	if in.got += int64(len(p)); in.got > in.Size {
		return fmt.Errorf("%w: message longer than announced", errProtocol)
	}
	in.sum.Write(p)
	if in.draft != nil {
		if _, err := in.draft.Write(p); err != nil {
			s.refuse(err)
		}
	}
	return nil
}

func (s *server) end(ctx context.Context, p []byte) error {
	in := s.in
	var e endFrame
	if err := decode(p, &e); err != nil {
		return err
	}
	if in == nil || in.got != in.Size || !bytes.Equal(in.sum.Sum(nil), e.Sum[:]) {
		return fmt.Errorf("%w: message is not what was announced", errProtocol)
	}
	s.in = nil
	// The order of a mailbox is the order of the stream: each message takes its
	// turn here, starts when those before it in its mailboxes have started, and is
	// answered after them.
	var turns []*turn
	if !in.offer && (in.fault == nil || in.fault.Temporary()) {
		for i := range in.Rcpts {
			m := in.Rcpts[i].Mailbox
			t := &turn{before: s.last[m], started: make(chan struct{}), told: make(chan struct{}), settled: make(chan struct{})}
			s.last[m] = t
			turns = append(turns, t)
		}
	}
	return s.work(ctx, func(ctx context.Context) {
		if in.offer {
			s.answer(frameFates, &fatesFrame{N: in.N, Fates: s.keep(ctx, in)})
		} else {
			rs := s.deliver(ctx, in, turns)
			for _, t := range turns {
				if t.before != nil {
					<-t.before.told
					t.before = nil // lets the chain go
				}
			}
			s.tell(frameResults, &resultsFrame{N: in.N, Results: rs}, frame{results: true, seq: in.Seq, lanes: in.held(rs)})
			for _, t := range turns {
				close(t.told)
			}
		}
	})
}

// work runs f beside the reader, at most window of them. f gets a context that
// outlives the stream: what was begun is finished.
func (s *server) work(ctx context.Context, f func(context.Context)) error {
	s.busy.Add(1)
	s.slots <- struct{}{} // frees itself: nothing that holds a slot waits for the reader
	s.wg.Go(func() {
		f(context.WithoutCancel(ctx))
		s.busy.Add(-1)
		<-s.slots
	})
	return nil
}

// deliver brings a message into its mailboxes: several at once, each started
// after those before it in its mailboxes, so that one sync serves many.
func (s *server) deliver(ctx context.Context, in *incoming, turns []*turn) []transport.Result {
	self := s.r.d.Name(s.r.d.Self)
	if in.fault != nil && turns == nil {
		return fill(len(in.Rcpts), in.fault.Result(self))
	}
	var err error
	var st *mime.Structure
	if in.fault != nil { // for now: those behind it wait too
		err = in.fault
	} else if st, err = seal(ctx, in.draft); err != nil {
		in.draft.Discard()
	}
	for _, t := range turns {
		if t.before != nil {
			<-t.before.started
		}
	}
	results := make([]transport.Result, len(in.Rcpts))
	var todo []transport.Recipient
	var at []int
	for i := range turns {
		if s.waits(in, i) {
			results[i] = transport.Waits(self)
			continue
		}
		todo = append(todo, in.Rcpts[i])
		at = append(at, i)
	}
	var d Started
	if err == nil && len(todo) > 0 {
		d, err = s.start(ctx, in, todo, st, turns)
	} else if err == nil {
		in.draft.Discard()
	}
	if err != nil {
		s.over(err)
		s.put(in, at, fill(len(at), transport.AsFault(err).Result(self)), results)
	} else if d != nil {
		s.put(in, at, d.Known(), results)
	}
	for _, t := range turns {
		t.begun = d
		close(t.started)
	}
	if d != nil {
		rs, err := d.Synced(ctx)
		if err == nil && len(rs) != len(todo) {
			err = errors.New("mailboxes answered for other recipients than were asked")
		}
		if err != nil {
			s.over(err)
			rs = fill(len(at), transport.AsFault(err).Result(self))
		}
		s.put(in, at, rs, results)
	}
	for _, t := range turns {
		close(t.settled)
	}
	return results
}

// start fixes the place of a message, behind what has no results yet.
func (s *server) start(ctx context.Context, in *incoming, todo []transport.Recipient, st *mime.Structure, turns []*turn) (Started, error) {
	if s.ended.Load() {
		in.draft.Discard()
		return nil, log.ErrClosed
	}
	var after []Started
	for _, t := range turns {
		if t.before == nil {
			continue
		}
		select {
		case <-t.before.settled:
		default:
			if b := t.before.begun; b != nil && !slices.Contains(after, b) {
				after = append(after, b)
			}
		}
	}
	d, err := s.r.d.Home.Start(ctx, in.Envelope, todo, in.draft, st, after)
	if err != nil {
		in.draft.Discard()
		return nil, err
	}
	if n := len(d.Known()); n != len(todo) {
		d.Synced(ctx)
		return nil, fmt.Errorf("mailboxes answered for %d recipients, %d were asked for", n, len(todo))
	}
	return d, nil
}

// put writes the results of the recipients at those places, and holds the lanes
// of those that did not get through.
func (s *server) put(in *incoming, at []int, rs, results []transport.Result) {
	for k, i := range at {
		r := rs[k]
		if r.By == "" {
			r.By = s.r.d.Name(s.r.d.Self)
		}
		if r.Outcome == transport.Moved && r.Home == 0 {
			if home, version, ok := s.r.d.Home.Where(in.Rcpts[i].Mailbox); ok && home != s.r.d.Self {
				r.Home, r.Version = home, version
			}
		}
		results[i] = r
		if held(r) {
			s.mu.Lock()
			s.holds.Defer(in.lane(i), in.Seq)
			s.mu.Unlock()
		}
	}
}

// waits reports whether a recipient's turn has not come.
func (s *server) waits(in *incoming, i int) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.holds.Waits(in.lane(i), in.Seq, in.Read) {
		return false
	}
	s.holds.Defer(in.lane(i), in.Seq)
	return true
}

func (in *incoming) lane(i int) Lane { return Lane{in.Rcpts[i].Mailbox, in.Envelope.From} }

// held returns the lanes whose later mail waits for these results.
func (in *incoming) held(rs []transport.Result) (ls []Lane) {
	for i := range rs {
		if held(rs[i]) {
			ls = append(ls, in.lane(i))
		}
	}
	return ls
}

// held reports whether later mail waits for that result.
func held(r transport.Result) bool {
	return r.Outcome == transport.Deferred || r.Outcome == transport.Moved
}

// seal ends a draft and walks it: structure from a peer is not believed.
func seal(ctx context.Context, d *log.Draft) (*mime.Structure, error) {
	if err := d.Seal(ctx); err != nil {
		return nil, fmt.Errorf("store message: %w", err)
	}
	br, err := d.Open()
	if err != nil {
		return nil, fmt.Errorf("read message back: %w", err)
	}
	defer br.Close()
	st, err := mime.Parse(br, d.Size())
	if err != nil {
		return nil, fmt.Errorf("read message back: %w", err)
	}
	return st, nil
}

func (s *server) keep(ctx context.Context, in *incoming) []transport.Fate {
	fates := make([]transport.Fate, len(in.Rcpts))
	err := error(nil)
	if in.fault != nil {
		err = in.fault
	} else {
		var st *mime.Structure
		if st, err = seal(ctx, in.draft); err != nil {
			in.draft.Discard()
		} else if fs, e := s.r.d.Gateway.Keep(ctx, s.peer, in.Envelope, in.Rcpts, in.draft, st); e != nil {
			err = e
		} else if len(fs) == len(fates) {
			return fs
		} else {
			err = errors.New("gateway answered for other recipients than were asked")
		}
		s.over(err)
	}
	for i := range fates {
		fates[i].Result = transport.AsFault(err).Result(s.r.d.Name(s.r.d.Self))
		fates[i].Result.Outcome = transport.Deferred // nothing ends by not being kept
	}
	return fates
}

func (s *server) release(ctx context.Context, p []byte) error {
	var f releaseFrame
	if err := decode(p, &f); err != nil {
		return err
	}
	return s.work(ctx, func(ctx context.Context) {
		err := s.r.d.Gateway.Let(ctx, s.peer, f.ID, f.Keys)
		if err != nil {
			s.r.d.Logger.Warn("release", "msg_id", f.ID.String(), "peer", s.r.d.Name(s.peer), "err", err)
		}
		s.answer(frameDone, &doneFrame{N: f.N, OK: err == nil})
	})
}

func (s *server) finals(ctx context.Context, p []byte) error {
	var f finalsFrame
	if err := decode(p, &f); err != nil {
		return err
	}
	if len(f.Finals) > maxBatch {
		return fmt.Errorf("%w: %d final results", errProtocol, len(f.Finals))
	}
	return s.work(ctx, func(ctx context.Context) {
		ok := true
		for _, r := range f.Finals {
			if err := s.r.d.Origin.Final(ctx, s.peer, r); err != nil {
				s.r.d.Logger.Warn("final result", "msg_id", r.ID.String(), "peer", s.r.d.Name(s.peer), "err", err)
				ok = false
				break
			}
		}
		s.answer(frameDone, &doneFrame{N: f.N, OK: ok})
	})
}

func (s *server) ask(ctx context.Context, p []byte) error {
	var f askFrame
	if err := decode(p, &f); err != nil {
		return err
	}
	if len(f.Legs) > maxBatch {
		return fmt.Errorf("%w: %d questions", errProtocol, len(f.Legs))
	}
	return s.work(ctx, func(context.Context) {
		a := standingFrame{N: f.N, Standings: make([][]transport.Standing, len(f.Legs))}
		for i, l := range f.Legs {
			st, err := s.r.d.Origin.Ask(s.peer, l.ID, l.Keys)
			if err != nil {
				s.r.d.Logger.Warn("question", "msg_id", l.ID.String(), "peer", s.r.d.Name(s.peer), "err", err)
				st = make([]transport.Standing, len(l.Keys))
				for k := range st {
					st[k] = transport.Undecided
				}
			}
			a.Standings[i] = st
		}
		s.answer(frameStanding, &a)
	})
}
