package gossip

import (
	"context"
	"encoding/binary"
	"fmt"
	"net"
	"time"

	"github.com/hashicorp/memberlist"

	"posthouse/mesh"
)

// transport is memberlist's view of the link. Names are NodeIDs; addresses are made
// up and constant, so nothing here depends on where a node is.
type transport struct {
	network Network
	ctx     context.Context // of Run
	self    mesh.NodeID
	packets chan *memberlist.Packet
	streams chan net.Conn
}

var _ memberlist.NodeAwareTransport = (*transport)(nil)

// FinalAdvertiseAddr implements memberlist.Transport.
func (t *transport) FinalAdvertiseAddr(string, int) (net.IP, int, error) {
	a, ok := t.network.Addr(t.self).(*net.TCPAddr)
	if !ok {
		return nil, 0, fmt.Errorf("address of node %v is not an IP address and port", t.self)
	}
	return a.IP, a.Port, nil
}

// node finds out who is meant: answers carry an address alone.
func (t *transport) node(a memberlist.Address) (mesh.NodeID, error) {
	if id, err := mesh.ParseNodeID(a.Name); err == nil {
		return id, nil
	}
	host, _, err := net.SplitHostPort(a.Addr)
	if err != nil {
		return 0, fmt.Errorf("gossip address %q: %w", a.Addr, err)
	}
	ip := net.ParseIP(host)
	if len(ip) != net.IPv6len {
		return 0, fmt.Errorf("gossip address %q is nobody's", a.Addr)
	}
	id := mesh.NodeID(binary.BigEndian.Uint64(ip[8:]))
	if want, ok := t.network.Addr(id).(*net.TCPAddr); !ok || !want.IP.Equal(ip) {
		return 0, fmt.Errorf("gossip address %q is nobody's", a.Addr)
	}
	return id, nil
}

// WriteToAddress implements memberlist.NodeAwareTransport.
func (t *transport) WriteToAddress(b []byte, a memberlist.Address) (time.Time, error) {
	id, err := t.node(a)
	if err != nil {
		return time.Time{}, err
	}
	if err := t.network.SendDatagram(id, b); err != nil {
		return time.Time{}, fmt.Errorf("gossip to %v: %w", id, err)
	}
	return time.Now(), nil
}

// WriteTo implements memberlist.Transport.
func (t *transport) WriteTo(b []byte, addr string) (time.Time, error) {
	return t.WriteToAddress(b, memberlist.Address{Addr: addr})
}

// DialAddressTimeout implements memberlist.NodeAwareTransport.
func (t *transport) DialAddressTimeout(a memberlist.Address, timeout time.Duration) (net.Conn, error) {
	id, err := t.node(a)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(t.ctx, timeout)
	defer cancel()
	c, err := t.network.Dial(ctx, id)
	if err != nil {
		return nil, fmt.Errorf("gossip with %v: %w", id, err)
	}
	return t.bound(c), nil
}

// bound makes a stream end with Run, whatever memberlist waits for on it.
func (t *transport) bound(c net.Conn) net.Conn {
	return &boundConn{Conn: c, stop: context.AfterFunc(t.ctx, func() { c.Close() })}
}

type boundConn struct {
	net.Conn
	stop func() bool
}

func (c *boundConn) Close() error {
	c.stop()
	return c.Conn.Close()
}

// DialTimeout implements memberlist.Transport.
func (t *transport) DialTimeout(addr string, timeout time.Duration) (net.Conn, error) {
	return t.DialAddressTimeout(memberlist.Address{Addr: addr}, timeout)
}

// PacketCh implements memberlist.Transport.
func (t *transport) PacketCh() <-chan *memberlist.Packet { return t.packets }

// StreamCh implements memberlist.Transport.
func (t *transport) StreamCh() <-chan net.Conn { return t.streams }

// Shutdown implements memberlist.Transport: Run ends what it has started.
func (t *transport) Shutdown() error { return nil }

func (t *transport) receive() {
	for {
		from, b, err := t.network.ReceiveDatagram(t.ctx)
		if err != nil {
			return
		}
		select {
		case t.packets <- &memberlist.Packet{Buf: b, From: t.network.Addr(from), Timestamp: time.Now()}:
		case <-t.ctx.Done():
			return
		}
	}
}

func (t *transport) accept() {
	for {
		s, err := t.network.Accept(t.ctx)
		if err != nil {
			return
		}
		// memberlist sets its own deadline with the first read; this one is for
		// streams that it never comes to read.
		s.SetDeadline(time.Now().Add(streamTimeout))
		select {
		case t.streams <- t.bound(s):
		case <-t.ctx.Done():
			s.Close()
			return
		}
	}
}
