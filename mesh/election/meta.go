package election

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"path/filepath"
	"sync"
	"time"

	"github.com/fxamacker/cbor/v2"
	"github.com/hashicorp/raft-wal/types"
)

// ErrDamaged means that what Raft keeps on this disk is not what was written.
// Nothing of it may be believed; the node fetches the state anew.
var ErrDamaged = errors.New("the election's files are damaged")

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// metaFile is raft-wal's MetaStore: which segments there are, and Raft's term
// and vote. Both are small, so every change writes all of it.
//
// The file has two slots of slotSize on space reserved once; each holds
//
//	"PHEM" version(4) sequence(8) length(4) CRC32C(4) CBOR(length)
//
// big endian, the CRC over the sequence, the length and the CBOR. A change is
// written to the first slot and synced, then to the second and synced. So one
// slot is always whole after a power cut, and outside of that moment both hold
// the same: a flipped bit in one costs nothing.
type metaFile struct {
	disk disk
	mu   sync.Mutex // orders changes; raft-wal commits and Raft votes in different goroutines
	f    file
	seq  uint64
	meta metaState
}

const (
	metaMagic   = "PHEM"
	metaVersion = 1
	slotSize    = 64 << 10
	slotHeader  = 24
)

type metaState struct {
	NextSegment uint64            `cbor:"1,keyasint"`
	Segments    []metaSegment     `cbor:"2,keyasint"`
	Stable      map[string][]byte `cbor:"3,keyasint"`
}

type metaSegment struct {
	ID         uint64 `cbor:"1,keyasint"`
	Base       uint64 `cbor:"2,keyasint"`
	Min        uint64 `cbor:"3,keyasint"`
	Max        uint64 `cbor:"4,keyasint"`
	IndexStart uint64 `cbor:"5,keyasint"`
	Created    int64  `cbor:"6,keyasint"` // Unix nanoseconds; 0 is never
	Sealed     int64  `cbor:"7,keyasint"`
	SizeLimit  uint32 `cbor:"8,keyasint"`
}

// Load implements types.MetaStore.
func (m *metaFile) Load(dir string) (types.PersistentState, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	path := filepath.Join(dir, "meta")
	f, err := m.disk.open(path)
	if errors.Is(err, fs.ErrNotExist) {
		if f, err = m.create(dir, path); err != nil {
			return types.PersistentState{}, fmt.Errorf("create the election's meta file: %w", err)
		}
	} else if err != nil {
		return types.PersistentState{}, fmt.Errorf("open the election's meta file: %w", err)
	}
	m.f = f
	whole := false
	for slot := range int64(2) {
		if seq, st, ok := readSlot(f, slot); ok && (!whole || seq > m.seq) {
			m.seq, m.meta, whole = seq, st, true
		}
	}
	if !whole {
		f.Close()
		m.f = nil
		return types.PersistentState{}, fmt.Errorf("%w: both copies of the meta file", ErrDamaged)
	}
	if m.meta.Stable == nil {
		m.meta.Stable = map[string][]byte{}
	}
	ps := types.PersistentState{NextSegmentID: m.meta.NextSegment}
	for _, s := range m.meta.Segments {
		ps.Segments = append(ps.Segments, types.SegmentInfo{ID: s.ID, BaseIndex: s.Base, MinIndex: s.Min, MaxIndex: s.Max, Codec: codecID,
			IndexStart: s.IndexStart, CreateTime: fromNano(s.Created), SealTime: fromNano(s.Sealed), SizeLimit: s.SizeLimit})
	}
	return ps, nil
}

// create makes the file whole before it gets its name: a file that has the
// name and holds no whole slot is damaged, never new.
func (m *metaFile) create(dir, path string) (file, error) {
	f, err := m.disk.create(path + ".new")
	if err != nil {
		return nil, err
	}
	m.f, m.meta = f, metaState{Stable: map[string][]byte{}}
	if _, err = f.WriteAt(make([]byte, 2*slotSize), 0); err == nil {
		err = m.write()
	}
	if err == nil {
		err = m.disk.rename(path+".new", path)
	}
	if err == nil {
		err = m.disk.sync(dir)
	}
	if err != nil {
		f.Close()
		m.f = nil
		return nil, err
	}
	return f, nil
}

func readSlot(f io.ReaderAt, slot int64) (seq uint64, st metaState, ok bool) {
	b := make([]byte, slotSize)
	if _, err := f.ReadAt(b, slot*slotSize); err != nil {
		return 0, st, false
	}
	n := binary.BigEndian.Uint32(b[16:])
	if string(b[:4]) != metaMagic || binary.BigEndian.Uint32(b[4:]) != metaVersion || n > slotSize-slotHeader {
		return 0, st, false
	}
	sum := crc32.Update(crc32.Checksum(b[8:20], castagnoli), castagnoli, b[slotHeader:slotHeader+n])
	if sum != binary.BigEndian.Uint32(b[20:]) || cbor.Unmarshal(b[slotHeader:slotHeader+n], &st) != nil {
		return 0, st, false
	}
	return binary.BigEndian.Uint64(b[8:]), st, true
}

// write makes the present meta durable in both slots.
func (m *metaFile) write() error {
	if m.f == nil {
		return types.ErrClosed
	}
	body, err := cbor.Marshal(m.meta)
	if err != nil {
		return err
	}
	if len(body) > slotSize-slotHeader {
		return fmt.Errorf("meta of %d bytes", len(body))
	}
	m.seq++
	b := make([]byte, slotHeader+len(body))
	copy(b, metaMagic)
	binary.BigEndian.PutUint32(b[4:], metaVersion)
	binary.BigEndian.PutUint64(b[8:], m.seq)
	binary.BigEndian.PutUint32(b[16:], uint32(len(body)))
	copy(b[slotHeader:], body)
	binary.BigEndian.PutUint32(b[20:], crc32.Update(crc32.Checksum(b[8:20], castagnoli), castagnoli, body))
	for slot := range int64(2) {
		if _, err := m.f.WriteAt(b, slot*slotSize); err != nil {
			return fmt.Errorf("write the election's meta file: %w", err)
		}
		if err := m.f.Sync(); err != nil {
			return fmt.Errorf("sync the election's meta file: %w", err)
		}
	}
	return nil
}

// CommitState implements types.MetaStore.
func (m *metaFile) CommitState(ps types.PersistentState) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.meta.NextSegment, m.meta.Segments = ps.NextSegmentID, nil
	for _, s := range ps.Segments {
		m.meta.Segments = append(m.meta.Segments, metaSegment{s.ID, s.BaseIndex, s.MinIndex, s.MaxIndex, s.IndexStart, toNano(s.CreateTime), toNano(s.SealTime), s.SizeLimit})
	}
	return m.write()
}

// GetStable implements types.MetaStore.
func (m *metaFile) GetStable(key []byte) ([]byte, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.meta.Stable[string(key)], nil
}

// SetStable implements types.MetaStore.
func (m *metaFile) SetStable(key, value []byte) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.meta.Stable[string(key)] = append([]byte(nil), value...)
	return m.write()
}

// Close implements types.MetaStore.
func (m *metaFile) Close() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.f == nil {
		return nil
	}
	err := m.f.Close()
	m.f = nil
	return err
}

func toNano(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixNano()
}

func fromNano(n int64) time.Time {
	if n == 0 {
		return time.Time{}
	}
	return time.Unix(0, n)
}
