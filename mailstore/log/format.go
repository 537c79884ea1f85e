package log

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"path/filepath"
	"strconv"
	"strings"
)

// The format, byte by byte, is in DESIGN.md. Numbers are little-endian.
const (
	formatVersion = 1

	headSize  = 512          // one copy of the segment header
	dataStart = 2 * headSize // where groups, or a body's chunks, begin

	groupSize  = 56 // group header
	recordSize = 48 // record header
	alignment  = 8  // of records
	// sector is the alignment of groups: no sector that holds something
	// acknowledged is ever written again, so none can be torn.
	sector = 512

	chunkSize = 64 << 10 // bytes of a body segment under one checksum
	chunkStep = chunkSize + 4

	maxReplaces = 51 // segment numbers that fit into a header

	// MaxMeta is the largest Meta of an Entry, in bytes.
	MaxMeta = 16 << 20
	// maxBatch bounds one Append, in bytes on disk.
	maxBatch = 512 << 20
)

// Flags of a segment.
const (
	flagBody      = 1 << iota // one body in chunks
	flagCompacted             // live records of older segments, sequences kept, gaps allowed
	flagRecovered             // holds again the last group of a log that ended without a seal
	flagsKnown    = flagBody | flagCompacted | flagRecovered
)

// flagSeal on a group: nothing follows it in this segment.
const flagSeal = 1

var (
	magic      = []byte("PHOUSLOG")
	castagnoli = crc32.MakeTable(crc32.Castagnoli)
	le         = binary.LittleEndian
)

func sum(b []byte) uint32 { return crc32.Checksum(b, castagnoli) }

// header is what a segment says of itself.
type header struct {
	flags  uint16
	number uint64
	epoch  uint64
	// salt is random: it starts every group and seeds every checksum, so that
	// no foreign body can hold what looks like a group of this segment.
	salt    uint64
	first   uint64 // no record in here has a smaller sequence
	prevEnd uint64 // the log's last sequence before it; what older segments hold beyond is void
	prev    uint64 // the log segment before it; 0 for none
	floor   uint64 // no body segment below it was on its way: each is named by an older segment, or by nothing
	mark    uint64 // view position known durable when it was made

	bodySize int64  // of a body segment
	bodySum  uint32 // of a body segment: checksum of its chunks' checksums

	replaces []uint64 // of a compacted segment
}

// seed starts every checksum in the segment.
func (h *header) seed() uint32 {
	var b [16]byte
	le.PutUint64(b[0:], h.salt)
	le.PutUint64(b[8:], h.number)
	return sum(b[:])
}

// encode returns both copies.
func (h *header) encode() []byte {
	b := make([]byte, dataStart)
	copy(b, magic)
	le.PutUint16(b[8:], formatVersion)
	le.PutUint16(b[10:], h.flags)
	le.PutUint32(b[12:], headSize)
	for i, v := range []uint64{h.number, h.epoch, h.salt, h.first, h.prevEnd, h.prev, h.floor, h.mark, uint64(h.bodySize)} {
		le.PutUint64(b[16+8*i:], v)
	}
	le.PutUint32(b[88:], h.bodySum)
	le.PutUint32(b[92:], uint32(len(h.replaces)))
	for i, n := range h.replaces {
		le.PutUint64(b[96+8*i:], n)
	}
	le.PutUint32(b[headSize-4:], sum(b[:headSize-4]))
	copy(b[headSize:], b[:headSize])
	return b
}

// decodeCopy reads one copy.
func decodeCopy(b []byte) (*header, error) {
	if len(b) < headSize {
		return nil, fmt.Errorf("%d bytes are too few for a header", len(b))
	}
	if !bytes.Equal(b[:8], magic) {
		return nil, fmt.Errorf("does not start with %q", magic)
	}
	if le.Uint32(b[headSize-4:]) != sum(b[:headSize-4]) {
		return nil, fmt.Errorf("header checksum is wrong")
	}
	if v := le.Uint16(b[8:]); v != formatVersion {
		return nil, fmt.Errorf("format version %d is not known to this release", v)
	}
	h := &header{flags: le.Uint16(b[10:])}
	if h.flags&^flagsKnown != 0 || le.Uint32(b[12:]) != headSize {
		return nil, fmt.Errorf("header has unknown flags %#x", h.flags)
	}
	var size uint64
	for i, p := range []*uint64{&h.number, &h.epoch, &h.salt, &h.first, &h.prevEnd, &h.prev, &h.floor, &h.mark, &size} {
		*p = le.Uint64(b[16+8*i:])
	}
	h.bodySize = int64(size)
	h.bodySum = le.Uint32(b[88:])
	n := le.Uint32(b[92:])
	if n > maxReplaces || h.bodySize < 0 {
		return nil, fmt.Errorf("header is out of bounds")
	}
	for i := range n {
		h.replaces = append(h.replaces, le.Uint64(b[96+8*i:]))
	}
	return h, nil
}

// decodeHeader reads the header from its first good copy. bad names the
// offsets of copies that are not good, with the reason of the last one.
func decodeHeader(b []byte) (h *header, bad []int64, why error) {
	for off := 0; off < dataStart; off += headSize {
		c, err := decodeCopy(b[min(off, len(b)):min(off+headSize, len(b))])
		if err != nil {
			bad, why = append(bad, int64(off)), err
		} else if h == nil {
			h = c
		}
	}
	return h, bad, why
}

// group is a group header.
type group struct {
	flags  uint32
	count  uint32
	length int64  // bytes of the records that follow
	first  uint64 // sequence of the first record
	prev   uint64 // last sequence before the group; first-prev-1 were given up
	mark   uint64 // view position known durable
}

func (g *group) encode(b []byte, h *header, seed uint32) {
	le.PutUint64(b[0:], h.salt)
	le.PutUint32(b[12:], g.flags)
	le.PutUint32(b[16:], g.count)
	le.PutUint32(b[20:], 0)
	le.PutUint64(b[24:], uint64(g.length))
	le.PutUint64(b[32:], g.first)
	le.PutUint64(b[40:], g.prev)
	le.PutUint64(b[48:], g.mark)
	le.PutUint32(b[8:], crc32.Update(seed, castagnoli, b[12:groupSize]))
}

func (g *group) decode(b []byte, h *header, seed uint32) bool {
	if len(b) < groupSize || le.Uint64(b) != h.salt || le.Uint32(b[8:]) != crc32.Update(seed, castagnoli, b[12:groupSize]) {
		return false
	}
	*g = group{le.Uint32(b[12:]), le.Uint32(b[16:]), int64(le.Uint64(b[24:])), le.Uint64(b[32:]), le.Uint64(b[40:]), le.Uint64(b[48:])}
	return g.length >= 0 && g.length%alignment == 0 && g.length >= int64(g.count)*recordSize && g.first > g.prev
}

// recHead is a record header.
type recHead struct {
	crc      uint32 // of the rest of the header; it covers metaCRC
	kind     Kind
	external bool // the body is a segment of its own
	seq      uint64
	metaLen  int64
	metaCRC  uint32
	bodyLen  int64
	bodySeg  uint64
	bodyCRC  uint32 // of an inline body; of an external one its segment's bodySum
}

const recExternal = 1 // flag

// inline returns the bytes of body that stand in the record.
func (r *recHead) inline() int64 {
	if r.external {
		return 0
	}
	return r.bodyLen
}

// total returns the record's bytes with header and padding.
func (r *recHead) total() int64 { return align(recordSize + r.metaLen + r.inline()) }

func align(n int64) int64 { return (n + alignment - 1) &^ (alignment - 1) }

// alignGroup returns the offset of the group that follows one ending at n.
func alignGroup(n int64) int64 { return (n + sector - 1) &^ (sector - 1) }

func (r *recHead) encode(b []byte, seed uint32) {
	b[4], b[5] = formatVersion, byte(r.kind)
	var flags uint16
	if r.external {
		flags = recExternal
	}
	le.PutUint16(b[6:], flags)
	le.PutUint64(b[8:], r.seq)
	le.PutUint32(b[16:], uint32(r.metaLen))
	le.PutUint32(b[20:], r.metaCRC)
	le.PutUint64(b[24:], uint64(r.bodyLen))
	le.PutUint64(b[32:], r.bodySeg)
	le.PutUint32(b[40:], r.bodyCRC)
	le.PutUint32(b[44:], 0)
	r.crc = crc32.Update(seed, castagnoli, b[4:recordSize])
	le.PutUint32(b[0:], r.crc)
}

// decode reports whether b starts with a record header of this segment that
// obeys the bounds.
func (r *recHead) decode(b []byte, seed uint32) bool {
	if len(b) < recordSize || b[4] != formatVersion {
		return false
	}
	crc := le.Uint32(b)
	if crc != crc32.Update(seed, castagnoli, b[4:recordSize]) {
		return false
	}
	flags := le.Uint16(b[6:])
	*r = recHead{crc: crc, kind: Kind(b[5]), external: flags&recExternal != 0, seq: le.Uint64(b[8:]),
		metaLen: int64(le.Uint32(b[16:])), metaCRC: le.Uint32(b[20:]),
		bodyLen: int64(le.Uint64(b[24:])), bodySeg: le.Uint64(b[32:]), bodyCRC: le.Uint32(b[40:])}
	return flags&^recExternal == 0 && r.metaLen <= MaxMeta && r.bodyLen >= 0 && r.inline() <= maxBatch && (r.bodySeg != 0) == r.external
}

// record returns what callers see of it.
func (r *recHead) record(segment uint64, off int64, meta []byte) Record {
	return Record{Seq: r.seq, Kind: r.kind, Meta: meta, BodySize: r.bodyLen,
		Ref: Ref{Segment: segment, Offset: off, Seq: r.seq, CRC: r.crc}}
}

// The kinds of files, by the ends of their names.
const (
	extLog  = ".seg"  // log segment
	extBody = ".body" // body segment
	extTemp = ".tmp"  // one of them, not finished: never named by anything
)

func fileName(number uint64, ext string) string { return fmt.Sprintf("%012d%s", number, ext) }

// parseName splits a file name of ours; ok is false for others.
func parseName(name string) (number uint64, ext string, ok bool) {
	ext = filepath.Ext(name)
	if ext != extLog && ext != extBody && ext != extTemp {
		return 0, "", false
	}
	number, err := strconv.ParseUint(strings.TrimSuffix(name, ext), 10, 64)
	return number, ext, err == nil && number > 0 && fileName(number, ext) == name
}
