package appliance

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"time"

	"github.com/fxamacker/cbor/v2"

	"posthouse/mesh"
	"posthouse/transport/link"
)

// The small requests that nodes make of one another beside mail, votes and
// gossip: one stream, one request, one answer. Each says what a caller may ask.
const (
	serviceCall  = "call/1"
	callCommand  = "command"     // forward a command of the domain state to the master
	callSign     = "certificate" // sign a client-facing certificate: candidates do
	callTransfer = "transfer"    // hand the lead over: the master does
	callWithdraw = "withdraw"    // take a node's vote before it is revoked: the master does
	callHello    = "hello"       // a sign of life
	callWhose    = "whose"       // which member has a key: see vouched
	callStanding = "standing"    // how the asking node, or the named one, stands with this one: see witness

	maxCall   = 2 << 20 // bytes of a request or an answer
	callLimit = 15 * time.Second
)

// call is a request.
type call struct {
	What string      `cbor:"1,keyasint"`
	Body []byte      `cbor:"2,keyasint,omitempty"`
	Node mesh.NodeID `cbor:"3,keyasint,omitempty"`
}

// reply is an answer; Fault is a sentence when it could not be done.
type reply struct {
	Body  []byte `cbor:"1,keyasint,omitempty"`
	Fault string `cbor:"2,keyasint,omitempty"`
}

var callDecoder = func() cbor.DecMode {
	m, err := cbor.DecOptions{MaxNestedLevels: 4, MaxArrayElements: 16, MaxMapPairs: 16}.DecMode()
	if err != nil {
		panic(err) // the options are constants
	}
	return m
}()

func writeItem(w io.Writer, v any) error {
	b, err := cbor.Marshal(v)
	if err != nil {
		return fmt.Errorf("write call: %w", err)
	}
	if _, err := w.Write(append(binary.BigEndian.AppendUint32(nil, uint32(len(b))), b...)); err != nil {
		return fmt.Errorf("write call: %w", err)
	}
	return nil
}

func readItem(r io.Reader, v any) error {
	var n [4]byte
	if _, err := io.ReadFull(r, n[:]); err != nil {
		return fmt.Errorf("read call: %w", err)
	}
	size := binary.BigEndian.Uint32(n[:])
	if size > maxCall {
		return fmt.Errorf("read call: %d bytes are too many", size)
	}
	b, err := io.ReadAll(io.LimitReader(r, int64(size)))
	if err == nil && len(b) < int(size) {
		err = io.ErrUnexpectedEOF
	}
	if err == nil {
		err = callDecoder.Unmarshal(b, v)
	}
	if err != nil {
		return fmt.Errorf("read call: %w", err)
	}
	return nil
}

// ask makes a request of a node and returns its answer.
func (n *Node) ask(ctx context.Context, to mesh.NodeID, c call) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, callLimit)
	defer cancel()
	conn, err := n.link.Dial(ctx, to, serviceCall, link.Control)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	stop := endWith(ctx, conn)
	defer stop()
	if err := writeItem(conn, c); err != nil {
		return nil, err
	}
	if err := conn.CloseWrite(); err != nil {
		return nil, err
	}
	var r reply
	if err := readItem(conn, &r); err != nil {
		return nil, err
	}
	if r.Fault != "" {
		return nil, errors.New(r.Fault)
	}
	return r.Body, nil
}

// answerCalls serves the other nodes' requests until ctx ends.
func (n *Node) answerCalls(ctx context.Context) error {
	l, err := n.link.Listen(serviceCall)
	if err != nil {
		return err
	}
	return n.serveStreams(ctx, l, "call", func(ctx context.Context, c *link.Conn) error {
		n.answerCall(ctx, c, c.Peer())
		return nil
	})
}

func (n *Node) answerCall(ctx context.Context, conn net.Conn, peer mesh.NodeID) {
	ctx, cancel := context.WithTimeout(ctx, callLimit)
	defer cancel()
	defer conn.Close()
	stop := endWith(ctx, conn)
	defer stop()
	var c call
	if err := readItem(conn, &c); err != nil {
		return
	}
	body, err := n.serveCall(ctx, peer, &c)
	r := reply{Body: body}
	if err != nil {
		r.Fault = err.Error()
		if r.Fault == "" {
			r.Fault = "the node could not do it"
		}
	}
	if writeItem(conn, r) == nil {
		conn.(interface{ CloseWrite() error }).CloseWrite()
		io.Copy(io.Discard, io.LimitReader(conn, 1)) // until the peer has it
	}
}

func (n *Node) serveCall(ctx context.Context, peer mesh.NodeID, c *call) ([]byte, error) {
	e := n.elected()
	switch {
	case c.What == callHello:
		return nil, nil
	case c.What == callStanding && c.Node != 0:
		return n.witness.standing(c.Node)
	case c.What == callStanding:
		return n.witness.standing(peer)
	case c.What == callWhose:
		return n.whose(c.Body)
	case c.What == callSign:
		return n.certs.sign(peer, c.Body)
	case e == nil:
		return nil, errors.New("this node takes no part in the election yet")
	case c.What == callCommand:
		return e.HandleForward(peer, c.Body), nil
	case c.What == callTransfer:
		return nil, e.TransferTo(ctx, c.Node)
	case c.What == callWithdraw:
		return nil, e.Withdraw(ctx, c.Node)
	}
	return nil, fmt.Errorf("this version does not know the request %q", c.What)
}

// forwarder implements election.Forwarder.
type forwarder struct{ n *Node }

func (f forwarder) Forward(ctx context.Context, to mesh.NodeID, request []byte) ([]byte, error) {
	return f.n.ask(ctx, to, call{What: callCommand, Body: request})
}

// raftNetwork implements election.Network.
type raftNetwork struct {
	n *Node
	l *link.Listener
}

const serviceRaft = "raft/1"

func (r raftNetwork) Dial(ctx context.Context, to mesh.NodeID) (net.Conn, error) {
	return r.n.link.Dial(ctx, to, serviceRaft, link.Control)
}

func (r raftNetwork) Accept(ctx context.Context) (net.Conn, mesh.NodeID, error) {
	c, err := r.l.Accept(ctx)
	if err != nil {
		return nil, 0, err
	}
	if r.n.witness.suspect(c.Peer()) {
		c.Close() // it has forgotten what it voted, and what it had stored
		r.n.witness.doubt(c.Peer())
		return r.Accept(ctx)
	}
	return c, c.Peer(), nil
}
