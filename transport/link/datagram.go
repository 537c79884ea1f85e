package link

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/quic-go/quic-go"

	"posthouse/mesh"
)

const (
	// datagramsWaiting is how many wait to be sent to a peer; the oldest gives way.
	datagramsWaiting = 16
	// datagramBacklog is how many wait to be taken by the receiver; the newest is lost.
	datagramBacklog = 256
	// MaxDatagram is the largest datagram in bytes. Above about 1,200 it costs a stream.
	MaxDatagram = 64 << 10
	// maxUniStreams is how many large ones a peer may have under way.
	maxUniStreams = 16
	// largeDatagram bounds the time of one that goes by a stream.
	largeDatagram = 2 * time.Second
)

// Datagram is a message that came once or was lost. The receiver owns Data.
type Datagram struct {
	From mesh.NodeID
	Data []byte
}

// Datagrams is where they arrive. When nobody takes them 256 wait; the next are lost.
// It is never closed.
func (e *Endpoint) Datagrams() <-chan Datagram { return e.datagrams }

// SendDatagram sends b, or loses it: it never blocks and tells nothing about the
// outcome. Without a connection to the peer it is lost, and a connection is started.
// b may be used again at once. The error is ErrNotAdmitted, or about the size.
func (e *Endpoint) SendDatagram(to mesh.NodeID, b []byte) error {
	if len(b) > MaxDatagram {
		return fmt.Errorf("datagram of %d bytes: at most %d", len(b), MaxDatagram)
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	p := e.peers[to]
	if p == nil {
		return ErrNotAdmitted
	}
	if s := p.current(Control); s != nil {
		s.out.put(append([]byte(nil), b...))
	} else {
		p.kick(datagramGap)
	}
	return nil
}

// datagramQueue stands before quic-go's own, whose SendDatagram blocks while 32 wait,
// for seconds when a line is cut in mid-transfer.
type datagramQueue struct {
	signal chan struct{}

	mu   sync.Mutex
	ring [datagramsWaiting][]byte
	from int
	n    int
}

func newDatagramQueue() *datagramQueue {
	return &datagramQueue{signal: make(chan struct{}, 1)}
}

// put never blocks. Endpoint.mu may be held.
func (q *datagramQueue) put(b []byte) {
	q.mu.Lock()
	if q.n == len(q.ring) { // the oldest gives way
		q.from = (q.from + 1) % len(q.ring)
		q.n--
	}
	q.ring[(q.from+q.n)%len(q.ring)] = b
	q.n++
	q.mu.Unlock()
	select {
	case q.signal <- struct{}{}:
	default:
	}
}

func (q *datagramQueue) take() ([]byte, bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.n == 0 {
		return nil, false
	}
	b := q.ring[q.from]
	q.ring[q.from] = nil
	q.from = (q.from + 1) % len(q.ring)
	q.n--
	return b, true
}

// run sends until the connection ends.
func (q *datagramQueue) run(conn *quic.Conn) {
	for {
		b, ok := q.take()
		if !ok {
			select {
			case <-conn.Context().Done():
				return
			case <-q.signal:
			}
			continue
		}
		err := conn.SendDatagram(b)
		var large *quic.DatagramTooLargeError
		if errors.As(err, &large) {
			sendLarge(conn, b)
		} else if err != nil {
			return // the connection has ended
		}
	}
}

// sendLarge sends one by a stream of its own, or loses it.
func sendLarge(conn *quic.Conn, b []byte) {
	st, err := conn.OpenUniStream()
	if err != nil {
		return
	}
	st.SetWriteDeadline(time.Now().Add(largeDatagram))
	if _, err := st.Write(b); err != nil {
		st.CancelWrite(streamClosed)
		return
	}
	st.Close()
}

func (s *session) receiveDatagrams() {
	for {
		// The context is the connection's: it ends with it.
		b, err := s.conn.ReceiveDatagram(s.conn.Context())
		if err != nil {
			return
		}
		s.e.arrived(s, b)
	}
}

func (s *session) receiveLargeDatagrams() {
	for {
		st, err := s.conn.AcceptUniStream(s.conn.Context())
		if err != nil {
			return
		}
		s.e.spawn(func(context.Context) {
			st.SetReadDeadline(time.Now().Add(s.e.cfg.HandshakeTimeout))
			b, err := io.ReadAll(io.LimitReader(st, MaxDatagram+1))
			if err != nil || len(b) > MaxDatagram {
				st.CancelRead(streamProtocol)
				return
			}
			s.e.arrived(s, b)
		})
	}
}

func (e *Endpoint) arrived(s *session, b []byte) {
	select {
	case e.datagrams <- Datagram{From: s.peer.id, Data: b}:
	default: // to the sender it is a lost packet
	}
}

// ReceiveDatagram waits for the next of Datagrams.
func (e *Endpoint) ReceiveDatagram(ctx context.Context) (from mesh.NodeID, b []byte, err error) {
	select {
	case d := <-e.datagrams:
		return d.From, d.Data, nil
	case <-ctx.Done():
		return 0, nil, ctx.Err()
	}
}
