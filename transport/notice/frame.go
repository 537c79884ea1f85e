package notice

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"

	"github.com/fxamacker/cbor/v2"

	"posthouse/mesh"
)

// A stream carries frames, each the whole of what the sender has to say: the
// length of what follows (4 bytes, big endian), then CBOR.
const (
	version  = 1
	maxFrame = 64 + MaxMailboxes*len(mesh.MailboxID{}) // bytes after the length
)

// MaxMailboxes bounds the mailboxes that are named as full; of the others nothing
// is known, and mail for them is taken.
const MaxMailboxes = 4096

// errFrame is wrapped by every refusal of a peer's bytes.
var errFrame = errors.New("not a notice")

// frame is Facts on the wire. A later version adds keys that this one ignores.
type frame struct {
	V     uint8  `cbor:"1,keyasint"`
	Full  bool   `cbor:"2,keyasint,omitempty"`
	IDs   []byte `cbor:"3,keyasint,omitempty"` // of mailboxes, 16 bytes each
	Again uint64 `cbor:"4,keyasint,omitempty"`
}

var decMode = func() cbor.DecMode {
	m, err := cbor.DecOptions{MaxNestedLevels: 4, MaxArrayElements: 16, MaxMapPairs: 16}.DecMode()
	if err != nil {
		panic(err) // the options are constants
	}
	return m
}()

// encode returns the frame of f.
func encode(f Facts) ([]byte, error) {
	x := frame{V: version, Full: f.Full, Again: f.Again}
	for i := range f.Mailboxes {
		x.IDs = append(x.IDs, f.Mailboxes[i][:]...)
	}
	p, err := cbor.Marshal(&x)
	if err != nil {
		return nil, err
	}
	return append(binary.BigEndian.AppendUint32(make([]byte, 0, 4+len(p)), uint32(len(p))), p...), nil
}

// read reads the next frame. io.EOF is the stream's end between two frames.
func read(r io.Reader) (f Facts, err error) {
	var n [4]byte
	if _, err := io.ReadFull(r, n[:]); err != nil {
		return f, err
	}
	size := binary.BigEndian.Uint32(n[:])
	if size > uint32(maxFrame) {
		return f, fmt.Errorf("%w: %d bytes are too many", errFrame, size)
	}
	p, err := io.ReadAll(io.LimitReader(r, int64(size)))
	if err == nil && len(p) < int(size) {
		err = io.ErrUnexpectedEOF
	}
	if err != nil {
		return f, err
	}
	return decode(p)
}

func decode(p []byte) (f Facts, err error) {
	var x frame
	if err := decMode.Unmarshal(p, &x); err != nil {
		return f, fmt.Errorf("%w: %w", errFrame, err)
	}
	const size = len(mesh.MailboxID{})
	if x.V == 0 || len(x.IDs)%size != 0 || len(x.IDs) > MaxMailboxes*size {
		return f, fmt.Errorf("%w: version %d, %d bytes of ids", errFrame, x.V, len(x.IDs))
	}
	f.Full, f.Again = x.Full, x.Again
	for b := range slices.Chunk(x.IDs, size) {
		f.Mailboxes = append(f.Mailboxes, mesh.MailboxID(b))
	}
	return f.tidy(), nil
}

// tidy puts the mailboxes in order, each once, and drops what is over the bound.
func (f Facts) tidy() Facts {
	f.Mailboxes = slices.Clone(f.Mailboxes)
	slices.SortFunc(f.Mailboxes, compare)
	f.Mailboxes = slices.Compact(f.Mailboxes)
	f.Mailboxes = f.Mailboxes[:min(len(f.Mailboxes), MaxMailboxes)]
	return f
}

func compare(a, b mesh.MailboxID) int { return bytes.Compare(a[:], b[:]) }

func (f Facts) equal(g Facts) bool {
	return f.Full == g.Full && f.Again == g.Again && slices.Equal(f.Mailboxes, g.Mailboxes)
}

// has reports whether f names a mailbox as full.
func (f Facts) has(m mesh.MailboxID) bool {
	_, ok := slices.BinarySearchFunc(f.Mailboxes, m, compare)
	return ok
}
