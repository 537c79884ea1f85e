// Package joining brings a node into a mesh: the loop of the node that wants
// in, and the door that the mesh's members keep. Three ways lead through it: a
// token, an admin's password, or an admin's approval after comparing a code.
//
// It runs on streams of the link's join protocol, on which nothing else can be
// reached. Who is admitted is decided by the domain state; appliance plugs in
// the look-ups, the dialling and the command that admits.
package joining

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/fxamacker/cbor/v2"

	"posthouse/appliance/login"
	"posthouse/mesh"
)

// Service names the protocol's version in the first message.
const Service = 1

// maxFrame bounds a message, in bytes: a thousand peers fit.
const maxFrame = 256 << 10

// Request is what a joining node says first.
type Request struct {
	Version   int         `cbor:"1,keyasint"`
	Node      mesh.NodeID `cbor:"2,keyasint"` // what it would like to be called for ever
	Name      string      `cbor:"3,keyasint"`
	Host      string      `cbor:"4,keyasint"`
	Addresses []string    `cbor:"5,keyasint"` // host:port of its mesh port, if it knows
	Software  string      `cbor:"6,keyasint"`
	Level     uint32      `cbor:"7,keyasint"` // of domain commands that it knows
	Clock     time.Time   `cbor:"8,keyasint"`
	// Token and Proof are set for the token's door: its public key, and the
	// signature of the session's exporter.
	Token []byte `cbor:"9,keyasint,omitempty"`
	Proof []byte `cbor:"10,keyasint,omitempty"`
	// Admin is set for the admin's door.
	Admin string `cbor:"11,keyasint,omitempty"`
	// Seal is the key to which the mesh seals secrets for the node. It needs no
	// proof of its own: the session proves who says it.
	Seal mesh.SealKey `cbor:"12,keyasint"`
	// Plain asks to be let in without the right to lead, and without what the
	// nodes that may lead hold.
	Plain bool `cbor:"13,keyasint,omitempty"`
}

// Answer is what the mesh says.
type Answer struct {
	Version   int              `cbor:"1,keyasint"`
	Code      string           `cbor:"2,keyasint"` // "admitted", "challenge", or a Failure's code
	Text      string           `cbor:"3,keyasint,omitempty"`
	Node      mesh.NodeID      `cbor:"4,keyasint,omitempty"`
	Name      string           `cbor:"5,keyasint,omitempty"` // of the answering node
	Peers     []Peer           `cbor:"6,keyasint,omitempty"`
	Users     int              `cbor:"7,keyasint,omitempty"`
	Software  string           `cbor:"8,keyasint,omitempty"`
	Clock     time.Time        `cbor:"9,keyasint"`
	CA        []byte           `cbor:"10,keyasint,omitempty"` // PEM that clients trust
	Challenge *login.Challenge `cbor:"11,keyasint,omitempty"`
	Mutual    []byte           `cbor:"12,keyasint,omitempty"` // proof that the mesh knows the password too
	Domain    string           `cbor:"13,keyasint,omitempty"`
}

// Peer is a member of the mesh that was joined.
type Peer struct {
	ID        mesh.NodeID  `cbor:"1,keyasint" json:"id"`
	Key       mesh.KeyHash `cbor:"2,keyasint" json:"-"`
	KeyHex    string       `cbor:"-" json:"key"`
	Name      string       `cbor:"3,keyasint" json:"name"`
	Addresses []string     `cbor:"4,keyasint" json:"addresses"`
}

// proof is the answer to a challenge.
type proof struct {
	MAC []byte `cbor:"1,keyasint"`
}

var decoder = func() cbor.DecMode {
	m, err := cbor.DecOptions{MaxNestedLevels: 8, MaxArrayElements: 4096, MaxMapPairs: 64}.DecMode()
	if err != nil {
		panic(err) // the options are constants
	}
	return m
}()

var encoder = func() cbor.EncMode {
	m, err := cbor.EncOptions{Time: cbor.TimeRFC3339Nano}.EncMode()
	if err != nil {
		panic(err) // the options are constants
	}
	return m
}()

var errFrame = errors.New("not a join message")

// writeFrame writes a length (4 bytes, big-endian) and a CBOR item.
func writeFrame(w io.Writer, v any) error {
	b, err := encoder.Marshal(v)
	if err != nil {
		return fmt.Errorf("write join message: %w", err)
	}
	if len(b) > maxFrame {
		return fmt.Errorf("write join message: %d bytes", len(b))
	}
	if _, err = w.Write(append(binary.BigEndian.AppendUint32(nil, uint32(len(b))), b...)); err != nil {
		return fmt.Errorf("write join message: %w", err)
	}
	return nil
}

// readFrame reads what writeFrame wrote; everything is bounded.
func readFrame(r io.Reader, v any) error {
	var n [4]byte
	if _, err := io.ReadFull(r, n[:]); err != nil {
		return fmt.Errorf("read join message: %w", err)
	}
	size := binary.BigEndian.Uint32(n[:])
	if size > maxFrame {
		return errFrame
	}
	b, err := io.ReadAll(io.LimitReader(r, int64(size)))
	if err != nil {
		return fmt.Errorf("read join message: %w", err)
	}
	if len(b) < int(size) {
		return fmt.Errorf("read join message: %w", io.ErrUnexpectedEOF)
	}
	if err := decoder.Unmarshal(b, v); err != nil {
		return fmt.Errorf("%w: %w", errFrame, err)
	}
	return nil
}
