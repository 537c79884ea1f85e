package election

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"io"

	"github.com/hashicorp/raft"
	"github.com/hashicorp/raft-wal/types"
)

// codec writes one Raft entry as
//
//	CRC32C(4) index(8) term(8) type(1) appended(8, Unix ns) dataLen(4) data extensions
//
// big endian, the CRC over all that follows it. raft-wal's own codec carries no
// sum over an entry that is read back.
type codec struct{}

// codecID names this format in every segment; raft-wal reserves below 1<<16.
const codecID = 0x5048_0001

const entryHeader = 33

func (codec) ID() uint64 { return codecID }

func (codec) Encode(l *raft.Log, w io.Writer) error {
	b := make([]byte, entryHeader, entryHeader+len(l.Data)+len(l.Extensions))
	binary.BigEndian.PutUint64(b[4:], l.Index)
	binary.BigEndian.PutUint64(b[12:], l.Term)
	b[20] = byte(l.Type)
	binary.BigEndian.PutUint64(b[21:], uint64(toNano(l.AppendedAt)))
	binary.BigEndian.PutUint32(b[29:], uint32(len(l.Data)))
	b = append(append(b, l.Data...), l.Extensions...)
	binary.BigEndian.PutUint32(b, crc32.Checksum(b[4:], castagnoli))
	_, err := w.Write(b)
	return err
}

func (codec) Decode(b []byte, l *raft.Log) error {
	if len(b) < entryHeader || crc32.Checksum(b[4:], castagnoli) != binary.BigEndian.Uint32(b) {
		return fmt.Errorf("%w: log entry", ErrDamaged)
	}
	n := int(binary.BigEndian.Uint32(b[29:]))
	if n > len(b)-entryHeader {
		return fmt.Errorf("%w: log entry", ErrDamaged)
	}
	*l = raft.Log{Index: binary.BigEndian.Uint64(b[4:]), Term: binary.BigEndian.Uint64(b[12:]), Type: raft.LogType(b[20]),
		AppendedAt: fromNano(int64(binary.BigEndian.Uint64(b[21:])))}
	if rest := b[entryHeader:]; len(rest) > 0 { // the buffer is the WAL's
		l.Data = append([]byte(nil), rest[:n]...)
		l.Extensions = append([]byte(nil), rest[n:]...)
	}
	return nil
}

// codecFiler stamps our codec into segment headers. raft-wal 0.4.0 stamps its
// own into every segment, whatever codec it was given, and then refuses to open
// them again.
type codecFiler struct{ types.SegmentFiler }

func (f codecFiler) Create(i types.SegmentInfo) (types.SegmentWriter, error) {
	i.Codec = codecID
	return f.SegmentFiler.Create(i)
}

func (f codecFiler) RecoverTail(i types.SegmentInfo) (types.SegmentWriter, error) {
	i.Codec = codecID
	return f.SegmentFiler.RecoverTail(i)
}

func (f codecFiler) Open(i types.SegmentInfo) (types.SegmentReader, error) {
	i.Codec = codecID
	return f.SegmentFiler.Open(i)
}
