package relay

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/fxamacker/cbor/v2"

	"posthouse/mesh"
	"posthouse/transport"
)

// A stream starts with the four bytes "PHR" and the version. Each frame after
// that is its kind (1 byte), the length of its payload (4 bytes, big endian)
// and the payload: CBOR, but for frameData, which is bytes of the message.
const preamble = "PHR\x01"

// The kinds of frames. Never reuse a number.
const (
	frameLeg      = 1  // client: a message for mailboxes there, frameData and frameEnd follow
	frameOffer    = 2  // client: an outside message to be kept; likewise
	frameData     = 3  // client: bytes of the message last announced
	frameEnd      = 4  // client: its end, with the SHA-256
	frameRelease  = 5  // client: what was kept may be sent
	frameFinals   = 6  // client: final results, gateway to origin
	frameAsk      = 7  // client: how does this stand, gateway to origin
	frameBye      = 8  // client: nothing more comes, finish and close
	frameResults  = 16 // server: answer to frameLeg
	frameFates    = 17 // server: answer to frameOffer
	frameDone     = 18 // server: answer to frameRelease and frameFinals
	frameStanding = 19 // server: answer to frameAsk
	frameWait     = 20 // server: still at it
)

// Bounds of what is read from a peer.
const (
	maxFrame = 4 << 20   // bytes of a CBOR payload: 10,000 recipients
	maxData  = 64 << 10  // bytes of a frameData
	maxRcpts = 10000     // recipients of a frame
	maxBatch = 256       // entries of frameFinals and frameAsk
	maxBody  = 128 << 20 // bytes of a message, whatever is configured
)

// legFrame is the payload of frameLeg and frameOffer.
type legFrame struct {
	N        uint64                `cbor:"1,keyasint"` // counts frames that want an answer
	Envelope transport.Envelope    `cbor:"2,keyasint"`
	Rcpts    []transport.Recipient `cbor:"3,keyasint"`
	Size     int64                 `cbor:"4,keyasint"`
	// For the order at a home, see Holds: the message's place in its sender's queue, and
	// how many frameResults had been read when it was chosen. frameLeg alone.
	Seq  uint64 `cbor:"5,keyasint,omitempty"`
	Read uint64 `cbor:"6,keyasint,omitempty"`
}

type endFrame struct {
	Sum [32]byte `cbor:"1,keyasint"`
}

type releaseFrame struct {
	N    uint64              `cbor:"1,keyasint"`
	ID   transport.MessageID `cbor:"2,keyasint"`
	Keys []string            `cbor:"3,keyasint"`
}

type finalsFrame struct {
	N      uint64                  `cbor:"1,keyasint"`
	Finals []transport.FinalResult `cbor:"2,keyasint"`
}

type askFrame struct {
	N    uint64              `cbor:"1,keyasint"`
	Legs []transport.KeptLeg `cbor:"2,keyasint"`
}

type resultsFrame struct {
	N       uint64             `cbor:"1,keyasint"`
	Results []transport.Result `cbor:"2,keyasint"`
}

type fatesFrame struct {
	N     uint64           `cbor:"1,keyasint"`
	Fates []transport.Fate `cbor:"2,keyasint"`
}

type doneFrame struct {
	N  uint64 `cbor:"1,keyasint"`
	OK bool   `cbor:"2,keyasint"`
}

type standingFrame struct {
	N         uint64                 `cbor:"1,keyasint"`
	Standings [][]transport.Standing `cbor:"2,keyasint"`
}

// errProtocol is wrapped by what a peer of ours would never send.
var errProtocol = errors.New("relay protocol")

var encMode, decMode = codec()

func codec() (cbor.EncMode, cbor.DecMode) {
	enc, err := cbor.EncOptions{Time: cbor.TimeRFC3339Nano}.EncMode()
	if err != nil {
		panic(err)
	}
	dec, err := cbor.DecOptions{
		MaxArrayElements: maxRcpts + 16, MaxMapPairs: 64, MaxNestedLevels: 8,
		IndefLength: cbor.IndefLengthForbidden, TagsMd: cbor.TagsAllowed, DupMapKey: cbor.DupMapKeyEnforcedAPF,
	}.DecMode()
	if err != nil {
		panic(err)
	}
	return enc, dec
}

// appendFrame appends a frame with a CBOR payload.
func appendFrame(b []byte, kind byte, v any) ([]byte, error) {
	p, err := encMode.Marshal(v)
	if err != nil {
		return nil, err
	}
	if len(p) > maxFrame {
		return nil, fmt.Errorf("%w: frame of %d bytes", errProtocol, len(p))
	}
	return append(appendHead(b, kind, len(p)), p...), nil
}

func appendHead(b []byte, kind byte, n int) []byte {
	return binary.BigEndian.AppendUint32(append(b, kind), uint32(n))
}

// readFrame reads one frame into buf, which grows as bytes arrive and is never
// sized by a peer's word alone.
func readFrame(r io.Reader, buf []byte) (kind byte, payload []byte, err error) {
	var h [5]byte
	if _, err := io.ReadFull(r, h[:]); err != nil {
		return 0, buf, err
	}
	kind = h[0]
	n, most := int64(binary.BigEndian.Uint32(h[1:])), int64(maxFrame)
	if kind == frameData {
		most = maxData
	}
	if n > most {
		return 0, buf, fmt.Errorf("%w: frame of %d bytes", errProtocol, n)
	}
	buf = buf[:0]
	for int64(len(buf)) < n {
		step := min(n-int64(len(buf)), 64<<10)
		at := len(buf)
		buf = append(buf, make([]byte, step)...)
		if _, err := io.ReadFull(r, buf[at:]); err != nil {
			return 0, buf, noEOF(err)
		}
	}
	return kind, buf, nil
}

func noEOF(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}

func decode(p []byte, v any) error {
	if err := decMode.Unmarshal(p, v); err != nil {
		return fmt.Errorf("%w: %w", errProtocol, err)
	}
	return nil
}

// maxHops is how often a message may pass from node to node (FAULTS.md, I16).
const maxHops = 25

// check says what is wrong with an announced message from peer: it believes a
// peer only about what that peer may know.
func (f *legFrame) check(peer mesh.NodeID, offer bool, member func(mesh.NodeID) bool) *transport.Fault {
	e := &f.Envelope
	bad := func(why string) *transport.Fault {
		return &transport.Fault{Code: 554, Enhanced: "5.5.0", Text: "message refused between offices: " + why}
	}
	switch {
	case e.ID.IsZero():
		return bad("it has no id")
	case e.Hops < 0 || e.Origin < transport.OriginOutside || e.Origin > transport.OriginLocal:
		return bad("its envelope makes no sense")
	case e.Hops >= maxHops:
		return &transport.Fault{Code: 554, Enhanced: "5.4.6", Text: "message goes round in a circle between offices"}
	case e.Hops == 0 && e.EntryNode != peer:
		return bad("it did not enter where it says")
	case len(e.From) > mesh.MaxPathLen:
		return bad("its sender is too long")
	}
	if e.From != "" {
		if _, err := mesh.ParseAddress(e.From); err != nil {
			return bad("its sender is no address")
		}
	}
	seen := make(map[string]bool, len(f.Rcpts))
	for i := range f.Rcpts {
		r := &f.Rcpts[i]
		if k := r.Key(); seen[k] {
			return bad("a recipient stands in it twice")
		} else {
			seen[k] = true
		}
		if r.Mailbox.IsZero() != offer {
			return bad("a recipient does not belong here")
		}
		if _, err := mesh.ParseAddress(r.Address); err != nil && offer {
			return bad("a recipient is no address")
		}
	}
	// Last, and for now only: an office that joined a moment ago stands in the
	// sender's copy of the domain state before it stands in ours.
	if entriesAreMembers && !member(e.EntryNode) {
		return &transport.Fault{Code: 451, Enhanced: "4.3.2", Text: "the office where the message entered is not known here yet"}
	}
	return nil
}
