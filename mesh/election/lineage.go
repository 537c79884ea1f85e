package election

import (
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"slices"
	"time"

	"github.com/fxamacker/cbor/v2"

	"posthouse/mesh"
)

// Lineage is one unbroken history of the domain state.
type Lineage struct {
	ID         mesh.ID `cbor:"1,keyasint"`
	Generation uint64  `cbor:"2,keyasint"`
	// Fork is the last index that it surely shares with the one before it.
	Fork uint64 `cbor:"3,keyasint,omitempty"`
	// Superseded marks one that a person decided against: not an ancestor, but
	// whoever still follows it gives it up for the last one of the chain.
	Superseded bool `cbor:"4,keyasint,omitempty"`
}

// chain is a lineage with those before it, the present one last. An empty
// chain is a node that belongs to no mesh yet.
type chain []Lineage

func (c chain) now() (l Lineage) {
	if len(c) > 0 {
		l = c[len(c)-1]
	}
	return l
}

func (c chain) has(id mesh.ID) bool {
	return slices.ContainsFunc(c, func(l Lineage) bool { return l.ID == id })
}

// relation is what a peer's chain is to ours.
type relation uint8

const (
	same    relation = iota
	ahead            // theirs descends from ours: we follow
	behind           // ours descends from theirs: they will follow
	rivals           // neither: a person has to pick
	strange          // nothing in common: another mesh
)

func (c chain) compare(theirs chain) relation {
	mine, other := c.now(), theirs.now()
	switch {
	case mine.ID == other.ID && len(c) > 0 == (len(theirs) > 0):
		return same
	case len(c) == 0, theirs.has(mine.ID):
		return ahead
	case len(theirs) == 0, c.has(other.ID):
		return behind
	}
	for _, l := range c {
		if theirs.has(l.ID) {
			return rivals
		}
	}
	return strange
}

// fork returns the last index that this chain's state surely shares with
// theirs, of which it is to become a part.
func (c chain) fork(theirs chain) uint64 {
	at := ^uint64(0)
	for _, l := range theirs {
		if !c.has(l.ID) && !l.Superseded {
			at = min(at, l.Fork)
		}
		if l.Superseded && c.has(l.ID) {
			at = min(at, l.Fork)
		}
	}
	return at
}

// The header that opens every Raft connection, each side sending its own and
// reading the other's: length(2, big endian), CBOR of header.
type header struct {
	Version uint8 `cbor:"1,keyasint"`
	Chain   chain `cbor:"2,keyasint"`
}

const (
	headerVersion = 1
	maxHeader     = 8 << 10
	// maxChain is how many lineages a mesh remembers; each takes a person who
	// promoted by hand.
	maxChain = 64
	// handshakeTime bounds the exchange: one round trip on the slowest line.
	handshakeTime = 5 * time.Second
)

var headerDec, _ = cbor.DecOptions{MaxArrayElements: maxChain, MaxMapPairs: 16, MaxNestedLevels: 6, IndefLength: cbor.IndefLengthForbidden, TagsMd: cbor.TagsForbidden}.DecMode()

func writeHeader(w io.Writer, c chain) error {
	b, err := cbor.Marshal(header{headerVersion, c})
	if err != nil {
		return fmt.Errorf("write the lineage header: %w", err)
	}
	if _, err := w.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(b))), b...)); err != nil {
		return fmt.Errorf("write the lineage header: %w", err)
	}
	return nil
}

func readHeader(r io.Reader) (chain, error) {
	n := make([]byte, 2)
	if _, err := io.ReadFull(r, n); err != nil {
		return nil, fmt.Errorf("read the lineage header: %w", err)
	}
	size := binary.BigEndian.Uint16(n)
	if size > maxHeader {
		return nil, fmt.Errorf("read the lineage header: %d bytes", size)
	}
	b := make([]byte, size)
	if _, err := io.ReadFull(r, b); err != nil {
		return nil, fmt.Errorf("read the lineage header: %w", err)
	}
	return parseHeader(b)
}

func parseHeader(b []byte) (chain, error) {
	var h header
	if err := headerDec.Unmarshal(b, &h); err != nil {
		return nil, fmt.Errorf("read the lineage header: %w", err)
	}
	for i, l := range h.Chain {
		if l.ID.IsZero() || l.Generation == 0 || i > 0 && l.Generation < h.Chain[i-1].Generation {
			return nil, fmt.Errorf("read the lineage header: lineage %d makes no sense", i)
		}
	}
	return h.Chain, nil
}

// exchange sends our chain and reads theirs; the dialling side speaks first.
func exchange(c net.Conn, mine chain, dialled bool) (theirs chain, err error) {
	if err := c.SetDeadline(time.Now().Add(handshakeTime)); err != nil {
		return nil, fmt.Errorf("exchange lineages: %w", err)
	}
	if dialled {
		if err = writeHeader(c, mine); err == nil {
			theirs, err = readHeader(c)
		}
	} else {
		if theirs, err = readHeader(c); err == nil {
			err = writeHeader(c, mine)
		}
	}
	if err != nil {
		return nil, err
	}
	if err := c.SetDeadline(time.Time{}); err != nil {
		return nil, fmt.Errorf("exchange lineages: %w", err)
	}
	return theirs, nil
}
