package simtest

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"

	"posthouse/simtest/bufpipe"
)

// listener is a TCP port of the simulated network, or a control socket.
type listener struct {
	*bufpipe.Listener
	w      *World
	at     string
	closed func()
}

func (l *listener) Close() error {
	l.closed()
	return l.Listener.Close()
}

// Accept implements net.Listener.
func (l *listener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	s := &served{Conn: c, w: l.w, at: l.at}
	l.w.mu.Lock()
	l.w.served[s] = true
	l.w.mu.Unlock()
	return s, nil
}

// served is the accepting end of a connection, counted until it is closed.
type served struct {
	net.Conn
	w  *World
	at string // the listener's address
}

func (s *served) Close() error {
	s.w.mu.Lock()
	delete(s.w.served, s)
	s.w.mu.Unlock()
	return s.Conn.Close()
}

// conn is the dialling end of a TCP connection that the world can break.
type conn struct {
	*bufpipe.Conn
	w        *World
	from, to netip.Addr
	node     bool // a node's, not a client's
}

func (c *conn) Close() error {
	c.w.mu.Lock()
	delete(c.w.conns, c)
	c.w.mu.Unlock()
	return c.Conn.Close()
}

// breakConns breaks the TCP connections that f names, at both ends. f is called
// with w.mu held.
func (w *World) breakConns(f func(from, to netip.Addr) bool) {
	w.mu.Lock()
	var gone []*conn
	for c := range w.conns {
		if f(c.from, c.to) {
			gone = append(gone, c)
			delete(w.conns, c)
		}
	}
	w.mu.Unlock()
	for _, c := range gone {
		c.Conn.Close()
	}
}

func (w *World) listen(address string) (net.Listener, error) {
	var addr net.Addr = &net.UnixAddr{Name: address, Net: "unix"}
	if a, err := netip.ParseAddrPort(address); err == nil {
		addr = net.TCPAddrFromAddrPort(a)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.tcp[address] != nil {
		return nil, fmt.Errorf("listen %s: address in use", address)
	}
	l := bufpipe.Listen(addr)
	w.tcp[address] = l
	return &listener{l, w, address, sync.OnceFunc(func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		if w.tcp[address] == l {
			delete(w.tcp, address)
		}
	})}, nil
}

// unlisten takes away an address's ports, as a machine that loses power does.
func (w *World) unlisten(a netip.Addr, socket string) {
	w.mu.Lock()
	var gone []*bufpipe.Listener
	for at, l := range w.tcp {
		if p, err := netip.ParseAddrPort(at); at == socket || err == nil && p.Addr() == a {
			gone = append(gone, l)
			delete(w.tcp, at)
		}
	}
	w.mu.Unlock()
	for _, l := range gone {
		l.Close()
	}
}

// nodePort is from where nodes dial; clients that sit in an office have others.
const nodePort = 40000

var errRefused = errors.New("connection refused")

// dial connects to a port that somebody listens on. A cut line lets nobody
// through; people sit in their office, so their lines are not cut.
func (w *World) dial(ctx context.Context, from netip.AddrPort, address string) (net.Conn, error) {
	to, err := netip.ParseAddrPort(address)
	if err != nil {
		return nil, err
	}
	w.mu.Lock()
	l, cut := w.tcp[address], w.lines[[2]netip.Addr{from.Addr(), to.Addr()}].cut || w.lines[[2]netip.Addr{to.Addr(), from.Addr()}].cut
	w.mu.Unlock()
	if cut {
		<-ctx.Done()
		return nil, os.ErrDeadlineExceeded
	}
	if l == nil {
		return nil, errRefused
	}
	p, err := l.Dial(net.TCPAddrFromAddrPort(from))
	if err != nil {
		return nil, errRefused
	}
	c := &conn{Conn: p, w: w, from: from.Addr(), to: to.Addr(), node: from.Port() == nodePort}
	w.mu.Lock()
	w.conns[c] = true
	w.mu.Unlock()
	return c, nil
}

// names is the world's DNS: the offices' hosts and the outside's mail exchanger.
type names struct{ w *World }

func (n names) notFound(name string) error {
	return &net.DNSError{Err: "no such host", Name: name, IsNotFound: true}
}

func (n names) LookupMX(_ context.Context, name string) ([]*net.MX, error) {
	if strings.TrimSuffix(name, ".") == outsideDomain {
		return []*net.MX{{Host: "mx." + outsideDomain + ".", Pref: 10}}, nil
	}
	return nil, n.notFound(name)
}

func (n names) LookupSRV(_ context.Context, _, _, name string) (string, []*net.SRV, error) {
	return "", nil, n.notFound(name)
}

func (n names) LookupAddr(_ context.Context, addr string) ([]string, error) {
	return nil, n.notFound(addr)
}

func (n names) LookupHost(ctx context.Context, host string) ([]string, error) {
	addrs, err := n.LookupNetIP(ctx, "ip", host)
	if err != nil {
		return nil, err
	}
	return []string{addrs[0].String()}, nil
}

func (n names) LookupNetIP(ctx context.Context, _, host string) ([]netip.Addr, error) {
	if n.w.noDNS.Load() {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	host = strings.TrimSuffix(host, ".")
	if host == "mx."+outsideDomain {
		return []netip.Addr{outsideAddr}, nil
	}
	for _, o := range n.w.Offices {
		if o.cfg.Host == host {
			return []netip.Addr{o.Addr}, nil
		}
	}
	return nil, n.notFound(host)
}
