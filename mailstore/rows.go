package mailstore

import (
	"encoding/binary"
	"errors"
	"fmt"

	"posthouse/mailstore/log"
	"posthouse/mesh"
	"posthouse/transport"
)

// The rows of the view that belong to the mailboxes; all keys start with "m".
// DESIGN.md describes them. Numbers in keys are big-endian, so that rows stand
// in their order; values are a version byte and varints.

const rowVersion = 1

var errRow = errors.New("row of the view is malformed")

func boxKey(m mesh.MailboxID) []byte { return append([]byte("mB"), m[:]...) }

func folderKey(m mesh.MailboxID, id uint32) []byte {
	return binary.BigEndian.AppendUint32(append(append(make([]byte, 0, 22), "mF"...), m[:]...), id)
}

func messagePrefix(m mesh.MailboxID, folder uint32) []byte {
	return binary.BigEndian.AppendUint32(append(append(make([]byte, 0, 26), "mM"...), m[:]...), folder)
}

func messageKey(m mesh.MailboxID, folder uint32, uid UID) []byte {
	return binary.BigEndian.AppendUint32(messagePrefix(m, folder), uint32(uid))
}

func tombPrefix(m mesh.MailboxID, folder uint32) []byte {
	return binary.BigEndian.AppendUint32(append(append(make([]byte, 0, 30), "mX"...), m[:]...), folder)
}

func tombKey(m mesh.MailboxID, folder uint32, mod ModSeq) []byte {
	return binary.BigEndian.AppendUint64(tombPrefix(m, folder), uint64(mod))
}

func dedupeKey(c claimKey) []byte {
	return append(append(append(make([]byte, 0, 34), "md"...), c.id[:]...), c.mailbox[:]...)
}

func dayKey(day uint32, c claimKey) []byte {
	k := binary.BigEndian.AppendUint32(append(make([]byte, 0, 38), "me"...), day)
	return append(append(k, c.id[:]...), c.mailbox[:]...)
}

// parseDayKey is the inverse of dayKey.
func parseDayKey(k []byte) (day uint32, c claimKey, err error) {
	if len(k) != 38 {
		return 0, c, errRow
	}
	copy(c.id[:], k[6:])
	copy(c.mailbox[:], k[22:])
	return binary.BigEndian.Uint32(k[2:]), c, nil
}

var (
	epochKey  = []byte("mR")
	dayPrefix = []byte("me")
)

// claimKey names one delivery: MESH.md, Relay: the dedupe key.
type claimKey struct {
	id      transport.MessageID
	mailbox mesh.MailboxID
}

// msg is one message of a folder in memory: 80 bytes.
type msg struct {
	uid      UID
	crc      uint32
	mod      ModSeq
	created  ModSeq // the ModSeq that it came with
	flags    bits
	size     int64
	received int64 // Unix seconds
	segment  uint64
	offset   int64
	seq      uint64 // of the record that holds structure and body
	source   uint64 // seq of the record that holds the body; 0: the same
}

func (m *msg) ref() log.Ref {
	return log.Ref{Segment: m.segment, Offset: m.offset, Seq: m.seq, CRC: m.crc}
}

func (m *msg) setRef(r log.Ref) {
	m.segment, m.offset, m.seq, m.crc = r.Segment, r.Offset, r.Seq, r.CRC
}

func (m *msg) row() []byte {
	b := make([]byte, 0, 64)
	b = append(b, rowVersion)
	b = binary.AppendUvarint(b, uint64(m.mod))
	b = binary.AppendUvarint(b, uint64(m.mod-m.created))
	b = binary.AppendUvarint(b, uint64(m.flags))
	b = binary.AppendUvarint(b, uint64(m.size))
	b = binary.AppendVarint(b, m.received)
	b = binary.AppendUvarint(b, m.segment)
	b = binary.AppendUvarint(b, uint64(m.offset))
	b = binary.AppendUvarint(b, m.seq)
	b = binary.LittleEndian.AppendUint32(b, m.crc)
	if m.source != 0 {
		b = binary.AppendUvarint(b, m.seq-m.source)
	}
	return b
}

func (m *msg) parse(uid UID, row []byte) error {
	r := rowReader{b: row}
	r.version()
	m.uid = uid
	m.mod = ModSeq(r.uint())
	m.created = m.mod - ModSeq(r.uint())
	m.flags = bits(r.uint())
	m.size = int64(r.uint())
	m.received = r.int()
	m.segment = r.uint()
	m.offset = int64(r.uint())
	m.seq = r.uint()
	if len(r.b) < 4 {
		return fmt.Errorf("message row: %w", errRow)
	}
	m.crc = binary.LittleEndian.Uint32(r.b)
	r.b = r.b[4:]
	m.source = 0
	if len(r.b) > 0 {
		m.source = m.seq - r.uint()
	}
	if r.bad {
		return fmt.Errorf("message row: %w", errRow)
	}
	return nil
}

// rowReader reads a row's fields; bad is set by the first that is not there.
type rowReader struct {
	b   []byte
	bad bool
}

func (r *rowReader) version() {
	if len(r.b) == 0 || r.b[0] != rowVersion {
		r.bad = true
		return
	}
	r.b = r.b[1:]
}

func (r *rowReader) uint() uint64 {
	v, n := binary.Uvarint(r.b)
	if n <= 0 {
		r.bad, r.b = true, nil
		return 0
	}
	r.b = r.b[n:]
	return v
}

func (r *rowReader) int() int64 {
	v, n := binary.Varint(r.b)
	if n <= 0 {
		r.bad, r.b = true, nil
		return 0
	}
	r.b = r.b[n:]
	return v
}

func (r *rowReader) string() string {
	n := r.uint()
	if n > uint64(len(r.b)) {
		r.bad, r.b = true, nil
		return ""
	}
	s := string(r.b[:n])
	r.b = r.b[n:]
	return s
}

func appendString(b []byte, s string) []byte {
	return append(binary.AppendUvarint(b, uint64(len(s))), s...)
}

// row is the folder without its messages.
func (f *Folder) row() []byte {
	b := make([]byte, 0, 96)
	b = append(b, rowVersion)
	b = appendString(b, f.name)
	b = appendString(b, string(f.use))
	b = binary.AppendUvarint(b, uint64(f.uidNext))
	b = binary.AppendUvarint(b, uint64(f.mod))
	b = binary.AppendUvarint(b, uint64(f.floor))
	b = binary.AppendUvarint(b, uint64(f.messages))
	b = binary.AppendUvarint(b, uint64(f.unseen))
	b = binary.AppendUvarint(b, uint64(f.deleted))
	b = binary.AppendUvarint(b, uint64(f.size))
	b = binary.AppendUvarint(b, uint64(len(f.keywords)))
	for _, k := range f.keywords {
		b = appendString(b, k)
	}
	return b
}

func (f *Folder) parse(row []byte) error {
	r := rowReader{b: row}
	r.version()
	f.name = r.string()
	f.use = SpecialUse(r.string())
	f.uidNext = UID(r.uint())
	f.mod = ModSeq(r.uint())
	f.floor = ModSeq(r.uint())
	f.messages = uint32(r.uint())
	f.unseen = uint32(r.uint())
	f.deleted = uint32(r.uint())
	f.size = int64(r.uint())
	for n := r.uint(); n > 0 && !r.bad; n-- {
		f.keywords = append(f.keywords, r.string())
	}
	f.nextUID, f.nextMod = f.uidNext, f.mod+1
	if !uidsKept {
		f.nextUID = 1
	}
	if !modsKept {
		f.nextMod = 1
	}
	if r.bad || len(f.keywords) > MaxKeywords {
		return fmt.Errorf("folder row: %w", errRow)
	}
	return nil
}

// row is the mailbox without its folders.
func (mb *Mailbox) row() []byte {
	b := append(make([]byte, 0, 64), rowVersion)
	b = binary.AppendUvarint(b, uint64(mb.counter))
	b = binary.AppendUvarint(b, uint64(mb.base))
	b = binary.AppendUvarint(b, uint64(len(mb.subscribed)))
	for _, n := range sortedNames(mb.subscribed) {
		b = appendString(b, n)
	}
	return b
}

func (mb *Mailbox) parse(row []byte) error {
	r := rowReader{b: row}
	r.version()
	mb.counter = uint32(r.uint())
	mb.base = uint32(r.uint())
	for n := r.uint(); n > 0 && !r.bad; n-- {
		mb.subscribed[r.string()] = struct{}{}
	}
	if r.bad {
		return fmt.Errorf("mailbox row: %w", errRow)
	}
	return nil
}

// run is UIDs lo..hi that one record expunged. They were created at created,
// created+step, and so on: step is 0 or 1.
type run struct {
	lo, hi  UID
	created ModSeq
	step    ModSeq
}

// tomb is what one record expunged.
type tomb struct {
	mod  ModSeq
	runs []run
}

// bury adds a message to the runs; growing UIDs.
func (t *tomb) bury(uid UID, created ModSeq) {
	if n := len(t.runs); n > 0 {
		r := &t.runs[n-1]
		if uid == r.hi+1 {
			if r.lo == r.hi && (created == r.created || created == r.created+1) {
				r.step = created - r.created
			}
			if created == r.created+ModSeq(uid-r.lo)*r.step {
				r.hi = uid
				return
			}
		}
	}
	t.runs = append(t.runs, run{lo: uid, hi: uid, created: created})
}

// since appends the UIDs that existed at that ModSeq.
func (t *tomb) since(since ModSeq, uids []UID) []UID {
	for _, r := range t.runs {
		for u := r.lo; ; u++ {
			if r.created+ModSeq(u-r.lo)*r.step > since {
				break // creation grows with the UID
			}
			uids = append(uids, u)
			if u == r.hi {
				break
			}
		}
	}
	return uids
}

func (t *tomb) row() []byte {
	b := append(make([]byte, 0, 16), rowVersion)
	end := UID(0)
	for _, r := range t.runs {
		b = binary.AppendUvarint(b, uint64(r.lo-end))
		b = binary.AppendUvarint(b, uint64(r.hi-r.lo)<<1|uint64(r.step))
		b = binary.AppendUvarint(b, uint64(r.created))
		end = r.hi
	}
	return b
}

func (t *tomb) parse(mod ModSeq, row []byte) error {
	r := rowReader{b: row}
	r.version()
	t.mod = mod
	end := UID(0)
	for len(r.b) > 0 && !r.bad {
		lo := end + UID(r.uint())
		n := r.uint()
		t.runs = append(t.runs, run{lo: lo, hi: lo + UID(n>>1), created: ModSeq(r.uint()), step: ModSeq(n & 1)})
		end = lo + UID(n>>1)
	}
	if r.bad {
		return fmt.Errorf("expunge row: %w", errRow)
	}
	return nil
}
