package login

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"sync"
	"time"

	"github.com/fxamacker/cbor/v2"

	"posthouse/mesh"
)

// A log-in at a node that cannot open the user's verifier is judged by the
// user's home: one stream between the two nodes, whose keys are proven, with one
// Question and one Answer, each a length (2 bytes, big-endian) and a CBOR map of
// at most 2 KiB.

// Question asks a home about one of its users.
type Question struct {
	Version    uint8   `cbor:"1,keyasint"`
	User       mesh.ID `cbor:"2,keyasint"`
	Credential uint64  `cbor:"3,keyasint"` // its version, as the asking node has it
	Password   string  `cbor:"4,keyasint"`
	From       []byte  `cbor:"5,keyasint,omitempty"` // the client's address, 4 or 16 bytes
	// Nobody asks about a name that no user has, so that it is answered like one
	// that somebody has: User stands for the name, and the answer is Wrong.
	Nobody bool `cbor:"6,keyasint,omitempty"`
}

// About is the question whether a user's password is right. from, the client's
// address, may be zero.
func About(c Credential, password string, from netip.Addr) Question {
	return Question{User: c.User, Credential: c.Version, Password: password, From: from.AsSlice()}
}

// AboutNobody is the question about a name that no user has.
func AboutNobody(standIn mesh.ID, password string, from netip.Addr) Question {
	return Question{User: standIn, Password: password, From: from.AsSlice(), Nobody: true}
}

// Answer is the home's.
type Answer struct {
	Version uint8   `cbor:"1,keyasint"`
	Verdict Verdict `cbor:"2,keyasint"`
}

// Verdict is what the home says.
type Verdict uint8

// The verdicts. Never renumber one.
const (
	Right Verdict = 1
	Wrong Verdict = 2
	// Unjudged: the home is not the home, or its copy of the domain state is not
	// that of the asking node. To be asked again later.
	Unjudged Verdict = 3
	// Busy: too many questions of the asking node wait.
	Busy Verdict = 4
)

const (
	wireVersion = 1
	maxFrame    = 2048
	// perPeer is how many questions of one node are in hand, those that wait for
	// their late answer among them.
	perPeer = 32
	// AnswerLimit bounds an exchange: the longest delay of a wrong password, and
	// what stands before it in the queue.
	AnswerLimit = longDelay + 9*time.Second
)

var errFrame = errors.New("not a question about a log-in")

var frameDecoder = func() cbor.DecMode {
	m, err := cbor.DecOptions{MaxNestedLevels: 4, MaxArrayElements: 16, MaxMapPairs: 16, IndefLength: cbor.IndefLengthForbidden, TagsMd: cbor.TagsForbidden}.DecMode()
	if err != nil {
		panic(err) // the options are constants
	}
	return m
}()

func writeFrame(w io.Writer, v any) error {
	b, err := cbor.Marshal(v)
	if err == nil && len(b) > maxFrame {
		err = errFrame
	}
	if err == nil {
		_, err = w.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(b))), b...))
	}
	if err != nil {
		return fmt.Errorf("write about a log-in: %w", err)
	}
	return nil
}

func readFrame(r io.Reader, v any) error {
	var n [2]byte
	if _, err := io.ReadFull(r, n[:]); err != nil {
		return fmt.Errorf("read about a log-in: %w", err)
	}
	size := binary.BigEndian.Uint16(n[:])
	if size > maxFrame {
		return errFrame
	}
	b := make([]byte, size)
	if _, err := io.ReadFull(r, b); err != nil {
		return fmt.Errorf("read about a log-in: %w", err)
	}
	if err := frameDecoder.Unmarshal(b, v); err != nil {
		return fmt.Errorf("%w: %w", errFrame, err)
	}
	return nil
}

// Ask puts a question on a stream to the home.
func Ask(conn io.ReadWriter, q Question) (Verdict, error) {
	q.Version = wireVersion
	if err := writeFrame(conn, q); err != nil {
		return 0, err
	}
	var a Answer
	if err := readFrame(conn, &a); err != nil {
		return 0, err
	}
	if a.Version != wireVersion || a.Verdict < Right || a.Verdict > Busy {
		return 0, errFrame
	}
	return a.Verdict, nil
}

// Desk answers the questions of other nodes. All of them together never use more
// than one of the Checker's places, so that this node's own people find one. It
// is safe for concurrent use.
type Desk struct {
	check *Checker
	find  func(user mesh.ID) (Credential, string, bool)
	turn  chan struct{}

	failures Failures

	mu     sync.Mutex
	inHand map[mesh.NodeID]int
}

// NewDesk returns a Desk. find returns a user's credential and verifier; ok is
// false when this node is not the one to judge.
func NewDesk(check *Checker, find func(user mesh.ID) (c Credential, verifier string, ok bool)) *Desk {
	return &Desk{check: check, find: find, turn: make(chan struct{}, 1), inHand: map[mesh.NodeID]int{}}
}

// Serve answers the one question on a stream from peer. ctx bounds it.
func (d *Desk) Serve(ctx context.Context, conn io.ReadWriter, peer mesh.NodeID) error {
	var q Question
	if err := readFrame(conn, &q); err != nil {
		return err
	}
	v, err := d.judge(ctx, &q, peer)
	if err != nil {
		return err
	}
	return writeFrame(conn, Answer{wireVersion, v})
}

// judge says yes at once. A wrong password is answered late, the later the more
// there were of late for this user from the client's address, as the asking node
// tells it, or from the asking node as a whole, which may lie about addresses.
func (d *Desk) judge(ctx context.Context, q *Question, peer mesh.NodeID) (Verdict, error) {
	began := time.Now()
	if q.Version != wireVersion {
		return Unjudged, nil
	}
	if !d.enter(peer) {
		return Busy, nil
	}
	defer d.leave(peer)
	c, verifier := Credential{User: q.User}, ""
	if !q.Nobody {
		var ok bool
		if c, verifier, ok = d.find(q.User); !ok || c.Version != q.Credential {
			return Unjudged, nil
		}
	}
	from, known := netip.AddrFromSlice(q.From)
	right := !q.Nobody && d.check.Known(c, q.Password)
	if !right {
		select {
		case d.turn <- struct{}{}:
		case <-ctx.Done():
			return 0, context.Cause(ctx)
		}
		var err error
		right, err = d.check.Check(ctx, c, verifier, q.Password)
		<-d.turn
		if err != nil {
			return 0, err
		}
	}
	user := q.User.String()
	if right {
		if known {
			d.failures.Succeeded(from, user)
		}
		return Right, nil
	}
	late := d.failures.Failed(addressOf(peer), user, began)
	if known {
		late = max(late, d.failures.Failed(from, user, began))
	}
	select {
	case <-time.After(time.Until(began.Add(late))):
	case <-ctx.Done():
		return 0, context.Cause(ctx)
	}
	return Wrong, nil
}

// addressOf stands for a whole node among the addresses of Failures: its random
// 64 bits as a network of their own.
func addressOf(peer mesh.NodeID) netip.Addr {
	var b [16]byte
	binary.BigEndian.PutUint64(b[:8], uint64(peer))
	return netip.AddrFrom16(b)
}

func (d *Desk) enter(peer mesh.NodeID) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.inHand[peer] >= perPeer {
		return false
	}
	d.inHand[peer]++
	return true
}

func (d *Desk) leave(peer mesh.NodeID) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.inHand[peer]--; d.inHand[peer] == 0 {
		delete(d.inHand, peer)
	}
}
