package queue

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"slices"
	"time"

	"github.com/fxamacker/cbor/v2"

	"posthouse/mailstore/kv"
	"posthouse/mailstore/log"
	"posthouse/mailstore/mime"
	"posthouse/mesh"
	"posthouse/transport"
)

// version stands first in every record and row of this package.
const version = 1

// stamp is when a record was written: queue time, and this node's clock.
type stamp struct {
	Q time.Duration `cbor:"1,keyasint"`
	W int64         `cbor:"2,keyasint"` // Unix seconds
}

// acceptMeta is the meta of KindAccept; the body is the message.
type acceptMeta struct {
	V         uint8              `cbor:"1,keyasint"`
	Envelope  transport.Envelope `cbor:"2,keyasint"`
	Legs      []acceptLeg        `cbor:"3,keyasint"`
	Structure *mime.Structure    `cbor:"4,keyasint"`
	Stamp     stamp              `cbor:"5,keyasint"`
	// Once: the id may come again (a report, a copy kept for its origin); the
	// recipients that are known under it already are left out when applied.
	Once    bool        `cbor:"6,keyasint,omitempty"`
	Keeper  mesh.NodeID `cbor:"7,keyasint,omitempty"` // two-phase: the origin that has to release
	Expands []notice    `cbor:"8,keyasint,omitempty"`

	Routes uint64 `cbor:"-"` // Queue.Routes when the legs were decided
}

type acceptLeg struct {
	Dest  transport.Destination `cbor:"1,keyasint"`
	Rcpts []transport.Recipient `cbor:"2,keyasint"`
}

// notice is a report that is due at acceptance.
type notice struct {
	Rcpt transport.Recipient `cbor:"1,keyasint"`
	List bool                `cbor:"2,keyasint,omitempty"`
}

// legMeta is the meta of KindLeg.
type legMeta struct {
	V       uint8                 `cbor:"1,keyasint"`
	Seq     uint64                `cbor:"2,keyasint"`
	Dest    transport.Destination `cbor:"3,keyasint"`
	Stamp   stamp                 `cbor:"4,keyasint"`
	Changes []change              `cbor:"5,keyasint"`
}

// row is one leg in the view.
type row struct {
	Ref      log.Ref             `cbor:"1,keyasint"` // of the ACCEPT record
	ID       transport.MessageID `cbor:"2,keyasint"`
	From     string              `cbor:"3,keyasint"`
	Origin   transport.Origin    `cbor:"4,keyasint"`
	Size     int64               `cbor:"5,keyasint"`
	Accepted time.Duration       `cbor:"6,keyasint"` // queue time
	Wall     int64               `cbor:"7,keyasint"` // the same by this node's clock
	Keeper   mesh.NodeID         `cbor:"8,keyasint,omitempty"`
	Rcpts    []rcpt              `cbor:"9,keyasint"` // by N

	more int // continuation rows in the view
}

// clone returns a copy that shares nothing that changes.
func (r *row) clone() *row {
	c := *r
	c.Rcpts = append([]rcpt(nil), r.Rcpts...)
	return &c
}

func (r *row) counts() (c Counts) {
	for i := range r.Rcpts {
		c.add(r.Rcpts[i].State, 1)
	}
	return c
}

func (r *row) owes() (o owes) {
	for i := range r.Rcpts {
		o |= r.Rcpts[i].Owes
	}
	return o
}

func (r *row) ended() bool {
	for i := range r.Rcpts {
		if !r.Rcpts[i].ended() {
			return false
		}
	}
	return true
}

const never = time.Duration(math.MaxInt64)

// A leg row starts with what scans look at, before its CBOR:
//
//	version, owes, continuation rows (1 byte each), keeper, next tick, size (8 bytes each, big
//	endian), five counts as uvarints: waiting, held, kept, released, aside.
type head struct {
	owes   owes
	keeper mesh.NodeID
	tick   time.Duration
	size   int64
	counts Counts
}

var errRow = errors.New("queue row is not one of ours")

func (q *Queue) encodeRow(dest transport.Destination, r *row) ([]byte, error) {
	c := r.counts()
	b := make([]byte, 0, 256)
	b = append(b, version, byte(r.owes()), 0)
	b = binary.BigEndian.AppendUint64(b, uint64(r.Keeper))
	b = binary.BigEndian.AppendUint64(b, uint64(q.policy.nextTick(dest, r)))
	b = binary.BigEndian.AppendUint64(b, uint64(r.Size))
	for _, n := range []int{c.Waiting, c.Held, c.Kept, c.Released, c.Aside} {
		b = binary.AppendUvarint(b, uint64(n))
	}
	body, err := encMode.Marshal(r)
	if err != nil {
		return nil, err
	}
	return append(b, body...), nil
}

// chunk is the most that one value of the view holds of a row; the rest of a
// leg with thousands of recipients follows in rows of its own.
const chunk = kv.MaxValue - 1<<10

func (q *Queue) putRow(b *kv.Batch, dest transport.Destination, seq uint64, r *row) error {
	v, err := q.encodeRow(dest, r)
	if err != nil {
		return err
	}
	more := (len(v) - 1) / chunk
	v[2] = byte(more)
	for i := more; i > 0; i-- {
		b.Put(moreKey(dest, seq, i), v[i*chunk:min(len(v), (i+1)*chunk)])
	}
	b.Put(legKey(dest, seq), v[:min(len(v), chunk):min(len(v), chunk)])
	for i := more + 1; i <= r.more; i++ {
		b.Delete(moreKey(dest, seq, i))
	}
	r.more = more
	return nil
}

func (q *Queue) deleteRow(b *kv.Batch, dest transport.Destination, seq uint64, r *row) {
	b.Delete(legKey(dest, seq))
	for i := 1; i <= r.more; i++ {
		b.Delete(moreKey(dest, seq, i))
	}
}

// readRow decodes the value of a leg row, with what follows it; not inside a
// Scan.
func (q *Queue) readRow(dest transport.Destination, seq uint64, v []byte) (*row, error) {
	if len(v) < 3 {
		return nil, errRow
	}
	more := int(v[2])
	if more > 0 {
		v = slices.Clone(v)
		for i := 1; i <= more; i++ {
			w, ok, err := q.j.View().Get(moreKey(dest, seq, i))
			if err != nil {
				return nil, err
			}
			if !ok {
				return nil, errRow
			}
			v = append(v, w...)
		}
	}
	_, rest, err := decodeHead(v)
	if err != nil {
		return nil, err
	}
	r := &row{more: more}
	if err := decMode.Unmarshal(rest, r); err != nil {
		return nil, fmt.Errorf("queue row: %w", err)
	}
	return r, nil
}

// getRow reads a leg row; nil when there is none.
func (q *Queue) getRow(dest transport.Destination, seq uint64) (*row, error) {
	v, ok, err := q.j.View().Get(legKey(dest, seq))
	if err != nil || !ok {
		return nil, err
	}
	return q.readRow(dest, seq, v)
}

var encMode, decMode = codec()

func codec() (cbor.EncMode, cbor.DecMode) {
	// RFC 3339 keeps the zone of a Date field and fractions of a second.
	enc, err := cbor.EncOptions{Time: cbor.TimeRFC3339Nano}.EncMode()
	if err != nil {
		panic(err)
	}
	// A MIME part nests two levels, its array and that of its children.
	dec, err := cbor.DecOptions{MaxNestedLevels: 4*mime.MaxDepth + 32}.DecMode()
	if err != nil {
		panic(err)
	}
	return enc, dec
}

func decodeHead(b []byte) (h head, rest []byte, err error) {
	if len(b) < 27 || b[0] != version {
		return h, nil, errRow
	}
	h.owes = owes(b[1])
	h.keeper = mesh.NodeID(binary.BigEndian.Uint64(b[3:]))
	h.tick = time.Duration(binary.BigEndian.Uint64(b[11:]))
	h.size = int64(binary.BigEndian.Uint64(b[19:]))
	b = b[27:]
	for _, p := range []*int{&h.counts.Waiting, &h.counts.Held, &h.counts.Kept, &h.counts.Released, &h.counts.Aside} {
		n, l := binary.Uvarint(b)
		if l <= 0 {
			return h, nil, errRow
		}
		*p, b = int(n), b[l:]
	}
	return h, b, nil
}

// Keys of the view. All start with "q/"; numbers are big endian.
//
//	q/l DEST 00 SEQ    a leg (DEST: scope, node, domain)
//	q/k DEST 00 SEQ I  what follows in a leg with very many recipients
//	q/m SEQ            a message: the destinations where it has legs
//	q/s ID HASH        an id known here: a report, or a recipient kept for its origin
//	q/g ID             seq of a message of ours with a leg to a gateway
//	q/x DAY KEY        when to forget a q/s or q/g row
//	q/c                the queue's clock
const (
	preLeg    = "q/l"
	preMore   = "q/k"
	preMsg    = "q/m"
	preSeen   = "q/s"
	preGate   = "q/g"
	preExpire = "q/x"
	keyClock  = "q/c"
)

func destKey(d transport.Destination) []byte {
	b := append([]byte(preLeg), byte(d.Scope))
	b = binary.BigEndian.AppendUint64(b, uint64(d.Node))
	b = append(b, d.Domain...)
	return append(b, 0)
}

func legKey(d transport.Destination, seq uint64) []byte {
	return binary.BigEndian.AppendUint64(destKey(d), seq)
}

func moreKey(d transport.Destination, seq uint64, i int) []byte {
	k := append(legKey(d, seq), byte(i))
	copy(k, preMore)
	return k
}

// parseLegKey is the inverse of legKey.
func parseLegKey(k []byte) (d transport.Destination, seq uint64, ok bool) {
	k = k[len(preLeg):]
	if len(k) < 18 {
		return d, 0, false
	}
	d.Scope = transport.Scope(k[0])
	d.Node = mesh.NodeID(binary.BigEndian.Uint64(k[1:]))
	d.Domain = string(k[9 : len(k)-9])
	return d, binary.BigEndian.Uint64(k[len(k)-8:]), true
}

func msgKey(seq uint64) []byte { return binary.BigEndian.AppendUint64([]byte(preMsg), seq) }

// msgRow lists where a message has legs.
type msgRow struct {
	V     uint8                   `cbor:"1,keyasint"`
	Ref   log.Ref                 `cbor:"2,keyasint"`
	Dests []transport.Destination `cbor:"3,keyasint"`
}

// seenRow is what is remembered of an id for 100 days.
type seenRow struct {
	V     uint8                 `cbor:"1,keyasint"`
	Seq   uint64                `cbor:"2,keyasint"`
	Dest  transport.Destination `cbor:"3,keyasint"`
	N     int                   `cbor:"4,keyasint"`
	State State                 `cbor:"5,keyasint"`
	Last  transport.Result      `cbor:"6,keyasint"`
}

// seenFor is how long ids are remembered: longer than any leg is carried.
const seenFor = 100 * day

func words(r *transport.Result, reason string) string {
	switch {
	case r.Text != "":
		return r.Text
	case reason != "":
		return reason
	}
	return "nothing"
}

func days(d time.Duration) string { return fmt.Sprintf("%d days", int(d/day)) }
