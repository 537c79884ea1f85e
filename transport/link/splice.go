package link

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"time"

	"github.com/quic-go/quic-go"

	"posthouse/mesh"
)

const (
	// routeFresh is how long a neighbour's list of peers is believed.
	routeFresh = 10 * time.Second
	// routeWait bounds asking for one.
	routeWait = 2 * time.Second
	// routeAsk is how many neighbours are asked, the nearest first; routeTry is how
	// many of those that have the target are tried.
	routeAsk = 16
	routeTry = 3
)

// routeAnswer is whom a neighbour is connected to.
type routeAnswer struct {
	at    time.Time
	peers []mesh.NodeID
}

// dialThrough opens a stream to p through a neighbour that is connected to it.
func (e *Endpoint) dialThrough(ctx context.Context, p *peer, service string, class Class) (*Conn, error) {
	err := fmt.Errorf("%w: no connected node has a connection to it", ErrUnreachable)
	for _, m := range e.routesTo(ctx, p.id) {
		var c *Conn
		if c, err = e.through(ctx, m, p, service, class); err == nil {
			return c, nil
		}
		e.mu.Lock()
		delete(e.routes, m.id) // ask again
		e.mu.Unlock()
		if ctx.Err() != nil {
			break
		}
	}
	return nil, err
}

// DialVia is Dial through the given node and no other, even if there is a direct
// connection. The node in between sees how much is sent and when, not what.
func (e *Endpoint) DialVia(ctx context.Context, via, node mesh.NodeID, service string, class Class) (*Conn, error) {
	p, err := e.target(node, service, class)
	if err != nil {
		return nil, err
	}
	m, err := e.target(via, service, class)
	if err != nil {
		return nil, err
	}
	c, err := e.through(ctx, m, p, service, class)
	if err != nil {
		return nil, fmt.Errorf("dial %s at %v: %w", service, node, err)
	}
	return c, nil
}

// routesTo lists the neighbours that say that they are connected to node, nearest first.
func (e *Endpoint) routesTo(ctx context.Context, node mesh.NodeID) []*peer {
	type neighbour struct {
		p   *peer
		s   *session
		rtt time.Duration
	}
	var near []neighbour
	e.mu.Lock()
	for _, p := range e.peers {
		if s := p.current(Control); s != nil && p.id != node {
			near = append(near, neighbour{p: p, s: s})
		}
	}
	e.mu.Unlock()
	for i := range near {
		near[i].rtt = near[i].s.conn.ConnectionStats().SmoothedRTT
	}
	slices.SortFunc(near, func(a, b neighbour) int { return cmp.Or(cmp.Compare(a.rtt, b.rtt), cmp.Compare(a.p.id, b.p.id)) })
	near = near[:min(len(near), routeAsk)]

	has := make([]bool, len(near))
	var wg sync.WaitGroup
	for i, n := range near {
		wg.Go(func() { has[i] = slices.Contains(e.peersOf(ctx, n.p, n.s), node) })
	}
	wg.Wait()
	var routes []*peer
	for i, n := range near {
		if has[i] && len(routes) < routeTry {
			routes = append(routes, n.p)
		}
	}
	return routes
}

// peersOf asks a neighbour whom it is connected to, or remembers its last answer.
func (e *Endpoint) peersOf(ctx context.Context, p *peer, s *session) []mesh.NodeID {
	e.mu.Lock()
	known, ok := e.routes[p.id]
	e.mu.Unlock()
	if ok && time.Since(known.at) < routeFresh {
		return known.peers
	}
	ctx, cancel := context.WithTimeout(ctx, routeWait)
	defer cancel()
	c, err := s.openStream(ctx, header{kind: kindPeers, class: Control})
	if err != nil {
		return nil
	}
	defer c.Close()
	c.CloseWrite()
	c.SetReadDeadline(time.Now().Add(routeWait))
	stop := context.AfterFunc(ctx, c.Reset)
	defer stop()
	ids, err := readPeerList(c)
	if err != nil {
		return nil
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if !p.removed {
		e.routes[p.id] = routeAnswer{at: time.Now(), peers: ids}
	}
	return ids
}

// answerPeers answers kindPeers.
func (e *Endpoint) answerPeers(c *Conn) {
	defer c.Close()
	e.mu.Lock()
	var ids []mesh.NodeID
	for id, p := range e.peers {
		if id != c.peer.id && p.current(Control) != nil {
			ids = append(ids, id)
		}
	}
	e.mu.Unlock()
	c.SetWriteDeadline(time.Now().Add(routeWait))
	c.Write(encodePeerList(ids))
}

// through opens a stream at m, asks it to carry it to p, and speaks TLS with p in it.
func (e *Endpoint) through(ctx context.Context, m, p *peer, service string, class Class) (*Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, e.cfg.HandshakeTimeout)
	defer cancel()
	s, err := e.session(ctx, m, class)
	if err != nil {
		return nil, fmt.Errorf("through %v: %w", m.id, err)
	}
	under, err := s.openStream(ctx, header{kind: kindVia, class: class, node: p.id})
	if err != nil {
		return nil, fmt.Errorf("through %v: %w", m.id, err)
	}
	config := e.deps.Identity.ClientTLS(alpnSplice, func(key mesh.KeyHash) error {
		if key != p.key {
			return ErrNotAdmitted
		}
		return nil
	})
	t := tls.Client(under, config)
	err = t.HandshakeContext(ctx)
	if err == nil {
		// The handshake's context closes what is below when it ends, so the header
		// goes under the same limit.
		under.SetWriteDeadline(time.Now().Add(e.cfg.HandshakeTimeout))
		_, err = t.Write(header{kind: kindService, class: class, name: service}.encode())
		under.SetWriteDeadline(time.Time{})
	}
	if err != nil {
		under.Reset()
		if ctx.Err() != nil {
			err = fmt.Errorf("%w: %w", ErrUnreachable, err)
		}
		return nil, fmt.Errorf("through %v: %w", m.id, streamError(err))
	}
	c := &Conn{s: s, tls: t, under: under, peer: p}
	if !e.enter(c) {
		return nil, fmt.Errorf("through %v: %w", m.id, ErrNotAdmitted)
	}
	e.mu.Lock()
	p.via, p.viaAt = m.id, time.Now()
	e.mu.Unlock()
	return c, nil
}

// enter notes a spliced stream with its peer, so that revoking the peer ends it; if
// that has happened already, the stream is reset.
func (e *Endpoint) enter(c *Conn) bool {
	e.mu.Lock()
	ok := !c.peer.removed && e.ctx.Err() == nil
	if ok {
		c.peer.spliced[c] = struct{}{}
	}
	e.mu.Unlock()
	if !ok {
		c.reset(streamRefused)
	}
	return ok
}

func (c *Conn) leave() {
	e := c.s.e
	e.mu.Lock()
	delete(c.peer.spliced, c)
	e.mu.Unlock()
}

// acceptSpliced is the far end: who is at the other, only TLS inside tells.
func (e *Endpoint) acceptSpliced(ctx context.Context, under *Conn, h header) {
	ctx, cancel := context.WithTimeout(ctx, e.cfg.HandshakeTimeout)
	defer cancel()
	t := tls.Server(under, e.deps.Identity.ServerTLS(e.check, alpnSplice))
	if err := t.HandshakeContext(ctx); err != nil {
		e.log.Info("spliced stream refused", "peer", h.node.String(), "via", under.peer.id.String(), "err", err)
		under.reset(streamRefused)
		return
	}
	key, err := e.deps.Identity.Peer(t.ConnectionState())
	if err != nil {
		under.reset(streamRefused)
		return
	}
	e.mu.Lock()
	p := e.byKey[key]
	e.mu.Unlock()
	if p == nil || p.id != h.node {
		under.reset(streamRefused)
		return
	}
	c := &Conn{s: under.s, tls: t, under: under, peer: p}
	if !e.enter(c) {
		return
	}
	c.SetReadDeadline(time.Now().Add(e.cfg.HandshakeTimeout))
	inner, err := readHeader(t)
	if err != nil || inner.kind != kindService {
		c.reset(streamProtocol)
		return
	}
	c.SetReadDeadline(time.Time{})
	e.deliver(c, inner.name)
}

// carry is the node in between: it copies until both halves have ended. Depth is
// one because a spliced stream arrives as another kind and is never carried on.
func (e *Endpoint) carry(ctx context.Context, from *Conn, h header) {
	asker := from.peer.id
	e.mu.Lock()
	p := e.peers[h.node]
	connected := p != nil && h.node != asker && p.current(Control) != nil
	room := e.carried < e.cfg.Splices && e.splices[asker] < max(1, e.cfg.Splices/4)
	if connected && room {
		e.carried++
		e.splices[asker]++
	}
	e.mu.Unlock()
	switch {
	case !connected:
		from.reset(streamNoRoute)
		return
	case !room:
		from.reset(streamBusy)
		return
	}
	defer func() {
		e.mu.Lock()
		defer e.mu.Unlock()
		e.carried--
		if e.splices[asker]--; e.splices[asker] == 0 {
			delete(e.splices, asker)
		}
	}()
	dctx, cancel := context.WithTimeout(ctx, e.cfg.HandshakeTimeout)
	defer cancel()
	s, err := e.session(dctx, p, h.class)
	var to *Conn
	if err == nil {
		to, err = s.openStream(dctx, header{kind: kindSpliced, class: h.class, node: asker})
	}
	if err != nil {
		from.reset(streamNoRoute)
		return
	}
	var wg sync.WaitGroup
	wg.Go(func() { pump(to, from) })
	wg.Go(func() { pump(from, to) })
	wg.Wait()
	from.Close()
	to.Close()
}

// pump copies one direction, hands its end on as it was, and stops the other side
// when it cannot.
func pump(to, from *Conn) {
	buf := make([]byte, chunk)
	for {
		n, err := from.st.Read(buf)
		if n > 0 {
			var werr error
			if to.s.pace != nil {
				_, werr = to.s.pace.write(to.st, buf[:n])
			} else {
				_, werr = to.st.Write(buf[:n])
			}
			if werr != nil {
				from.st.CancelRead(resetCode(werr))
				return
			}
		}
		if err == io.EOF {
			to.st.Close()
			return
		}
		if err != nil {
			to.st.CancelWrite(resetCode(err))
			return
		}
	}
}

func resetCode(err error) quic.StreamErrorCode {
	var reset *quic.StreamError
	if errors.As(err, &reset) {
		return reset.ErrorCode
	}
	return streamNoRoute // a connection has ended
}
