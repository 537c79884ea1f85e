package web

import (
	"context"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"time"
)

// What a stranger may hold: MAIL.md, Limits.
const (
	strangersPerAddr = 20   // connections of one address on which nobody is logged in; none for loopback
	maxConns         = 2000 // of all together
	bodyTimeout      = 30 * time.Second
)

// door counts the connections of the HTTPS port.
type door struct {
	mu        sync.Mutex
	total     int
	strangers map[netip.Addr]int
}

// Limit returns l without the connections that are too many: those are closed
// at once. Use it with ConnContext, below TLS.
func (s *Server) Limit(l net.Listener) net.Listener { return &limited{l, &s.door} }

type limited struct {
	net.Listener
	d *door
}

func (l *limited) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if v := l.d.enter(c); v != nil {
			return v, nil
		}
		c.Close()
	}
}

// visitor is a counted connection.
type visitor struct {
	net.Conn
	d    *door
	addr netip.Addr

	// Guarded by door.mu.
	stranger, gone bool
}

func (d *door) enter(c net.Conn) *visitor {
	v := &visitor{Conn: c, d: d, addr: addrOf(c.RemoteAddr().String()), stranger: true}
	if v.addr.Is6() && !v.addr.IsLoopback() {
		p, _ := v.addr.Prefix(64) // one customer's network
		v.addr = p.Addr()
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.total >= maxConns || d.strangers[v.addr] >= strangersPerAddr && !v.addr.IsLoopback() {
		return nil
	}
	if d.strangers == nil {
		d.strangers = map[netip.Addr]int{}
	}
	d.total++
	d.strangers[v.addr]++
	return v
}

// known says that somebody is logged in on the connection.
func (v *visitor) known() {
	v.d.mu.Lock()
	defer v.d.mu.Unlock()
	v.noStranger()
}

func (v *visitor) noStranger() {
	if !v.stranger {
		return
	}
	v.stranger = false
	if v.d.strangers[v.addr]--; v.d.strangers[v.addr] <= 0 {
		delete(v.d.strangers, v.addr)
	}
}

func (v *visitor) Close() error {
	v.d.mu.Lock()
	if !v.gone {
		v.gone = true
		v.d.total--
		v.noStranger()
	}
	v.d.mu.Unlock()
	return v.Conn.Close()
}

type visitorKey struct{}

// ConnContext is for http.Server: it lets a request find its connection.
func (s *Server) ConnContext(ctx context.Context, c net.Conn) context.Context {
	if t, ok := c.(interface{ NetConn() net.Conn }); ok { // TLS
		c = t.NetConn()
	}
	if v, ok := c.(*visitor); ok {
		return context.WithValue(ctx, visitorKey{}, v)
	}
	return ctx
}

// hurry gives a request's body a time limit. One for all requests in
// http.Server would end the stream of events too.
func hurry(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.ContentLength != 0 {
			// An error means that this connection has no deadlines, as in tests.
			_ = http.NewResponseController(w).SetReadDeadline(time.Now().Add(bodyTimeout))
		}
		h.ServeHTTP(w, r)
	})
}
