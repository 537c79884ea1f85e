package election

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/raft"

	"posthouse/mesh"
)

// streams is the raft.StreamLayer of one life: it dials by NodeID, opens every
// stream with the lineage header, and ends all of them when it is closed.
type streams struct {
	e        *Election
	incoming chan net.Conn
	closed   chan struct{}
	once     sync.Once
	ctx      context.Context // of the dials; ends with the layer
	cancel   context.CancelFunc

	mu   sync.Mutex // guards open
	open map[*tracked]struct{}
}

func newStreams(e *Election) *streams {
	s := &streams{e: e, incoming: make(chan net.Conn), closed: make(chan struct{}), open: map[*tracked]struct{}{}}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	return s
}

// tracked is a stream that its layer closes at the end.
type tracked struct {
	net.Conn
	s    *streams
	once sync.Once
	err  error
}

func (t *tracked) Close() error {
	t.once.Do(func() {
		t.s.mu.Lock()
		delete(t.s.open, t)
		t.s.mu.Unlock()
		t.err = t.Conn.Close()
	})
	return t.err
}

func (s *streams) track(c net.Conn) (net.Conn, error) {
	t := &tracked{Conn: c, s: s}
	s.mu.Lock()
	select {
	case <-s.closed:
		s.mu.Unlock()
		c.Close()
		return nil, net.ErrClosed
	default:
	}
	s.open[t] = struct{}{}
	s.mu.Unlock()
	return t, nil
}

// Accept implements net.Listener.
func (s *streams) Accept() (net.Conn, error) {
	select {
	case c := <-s.incoming:
		return c, nil
	case <-s.closed:
		return nil, net.ErrClosed
	}
}

// Close implements net.Listener.
func (s *streams) Close() error {
	s.once.Do(func() {
		s.mu.Lock()
		close(s.closed)
		s.cancel()
		all := make([]*tracked, 0, len(s.open))
		for t := range s.open {
			all = append(all, t)
		}
		s.mu.Unlock()
		for _, t := range all {
			t.Close()
		}
	})
	return nil
}

// Addr implements net.Listener.
func (s *streams) Addr() net.Addr { return nodeAddr(s.e.cfg.Self) }

type nodeAddr mesh.NodeID

func (nodeAddr) Network() string  { return "mesh" }
func (a nodeAddr) String() string { return mesh.NodeID(a).String() }

// Dial implements raft.StreamLayer.
func (s *streams) Dial(at raft.ServerAddress, timeout time.Duration) (net.Conn, error) {
	id, err := mesh.ParseNodeID(string(at))
	if err != nil {
		return nil, fmt.Errorf("dial for Raft: %w", err)
	}
	ctx, cancel := context.WithTimeout(s.ctx, timeout)
	defer cancel()
	raw, err := s.e.d.Network.Dial(ctx, id)
	if err != nil {
		return nil, fmt.Errorf("dial node %s for Raft: %w", id, err)
	}
	c, err := s.track(raw)
	if err != nil {
		return nil, err
	}
	mine := s.e.chain()
	theirs, err := exchange(c, mine, true)
	if err != nil {
		c.Close()
		return nil, fmt.Errorf("dial node %s for Raft: %w", id, err)
	}
	if r := mine.compare(theirs); r != same {
		c.Close()
		s.e.meet(r, theirs, id)
		return nil, fmt.Errorf("dial node %s for Raft: %w", id, errLineage)
	}
	return c, nil
}

var errLineage = errors.New("it belongs to another lineage")

// accept takes the streams that peers open, for whatever life there is, until
// that cannot be done any more; its error is never nil.
func (e *Election) accept(ctx context.Context, wg *sync.WaitGroup) error {
	for {
		c, from, err := e.d.Network.Accept(ctx)
		if err != nil {
			return err
		}
		wg.Go(func() {
			stop := context.AfterFunc(ctx, func() { c.Close() })
			defer stop()
			if err := e.welcome(ctx, c, from); err != nil {
				e.log.Debug("election stream refused", "peer", from, "err", err)
				c.Close()
			}
		})
	}
}

func (e *Election) welcome(ctx context.Context, c net.Conn, from mesh.NodeID) error {
	mine := e.chain()
	theirs, err := exchange(c, mine, false)
	if err != nil {
		return err
	}
	if r := mine.compare(theirs); r != same {
		e.meet(r, theirs, from)
		return errLineage
	}
	l := e.current()
	if l == nil {
		return errStopped
	}
	t, err := l.streams.track(c)
	if err != nil {
		return err
	}
	select {
	case l.streams.incoming <- t:
		return nil
	case <-l.streams.closed:
	case <-ctx.Done():
	}
	t.Close()
	return net.ErrClosed
}

// guarded is Raft's transport with one guard: a node that lost what it had
// voted and stored neither votes nor stands for election until it has again
// all that the leader has, and those who know that it did neither ask for its
// vote nor give it theirs. Else two halves of a majority could forget together.
type guarded struct {
	*raft.NetworkTransport
	mute    atomic.Bool
	trusted func(mesh.NodeID) bool
	rpc     chan raft.RPC
	quit    chan struct{}
	wg      sync.WaitGroup
}

var errMute = errors.New("this node does not vote until it has caught up again")

func newGuarded(t *raft.NetworkTransport, trusted func(mesh.NodeID) bool) *guarded {
	g := &guarded{NetworkTransport: t, trusted: trusted, rpc: make(chan raft.RPC), quit: make(chan struct{})}
	g.wg.Go(func() {
		for {
			select {
			case r := <-t.Consumer():
				if err := g.mayVote(r.Command); err != nil {
					r.Respond(nil, err)
					continue
				}
				select {
				case g.rpc <- r:
				case <-g.quit:
					return
				}
			case <-g.quit:
				return
			}
		}
	})
	return g
}

// Consumer implements raft.Transport.
func (g *guarded) Consumer() <-chan raft.RPC { return g.rpc }

var errForgot = errors.New("that node has forgotten what it voted")

// mayAsk says whether a vote may be asked for, and of this node, or given to it.
func (g *guarded) mayAsk(of raft.ServerID) error {
	if g.mute.Load() {
		return errMute
	}
	if id, err := mesh.ParseNodeID(string(of)); err == nil && !g.trusted(id) {
		return errForgot
	}
	return nil
}

// mayVote says whether what a peer asks for may be done: no vote for a node that
// has forgotten its own, on streams from before that was known either.
func (g *guarded) mayVote(ask any) error {
	switch ask := ask.(type) {
	case *raft.TimeoutNowRequest:
		if g.mute.Load() {
			return errMute
		}
	case *raft.RequestVoteRequest, *raft.RequestPreVoteRequest:
		return g.mayAsk(raft.ServerID(ask.(raft.WithRPCHeader).GetRPCHeader().ID))
	}
	return nil
}

// RequestVote implements raft.Transport.
func (g *guarded) RequestVote(id raft.ServerID, at raft.ServerAddress, a *raft.RequestVoteRequest, r *raft.RequestVoteResponse) error {
	if err := g.mayAsk(id); err != nil {
		return err
	}
	return g.NetworkTransport.RequestVote(id, at, a, r)
}

// RequestPreVote implements raft.WithPreVote.
func (g *guarded) RequestPreVote(id raft.ServerID, at raft.ServerAddress, a *raft.RequestPreVoteRequest, r *raft.RequestPreVoteResponse) error {
	if err := g.mayAsk(id); err != nil {
		return err
	}
	return g.NetworkTransport.RequestPreVote(id, at, a, r)
}

func (g *guarded) close() {
	g.CloseStreams()
	g.NetworkTransport.Close()
	close(g.quit)
	g.wg.Wait()
}
