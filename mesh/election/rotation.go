package election

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"path/filepath"
	"time"

	"github.com/hashicorp/raft-wal/segment"
	"github.com/hashicorp/raft-wal/types"
)

// rotatedMeta is raft-wal's MetaStore, with what a stop has cut off put right
// before raft-wal sees it. raft-wal 0.4.0 seals a full segment by an index in
// its last batch, and notes that in the meta file and begins the next segment
// only afterwards, in the background. Stopped in between, or in the middle of
// that batch, it opens a segment to which it appends nothing any more ("segment
// is sealed"), for ever: the node would follow nobody and vote for nobody.
type rotatedMeta struct {
	*metaFile
	size int // of a segment
}

// Load implements types.MetaStore.
func (m rotatedMeta) Load(dir string) (types.PersistentState, error) {
	ps, err := m.metaFile.Load(dir)
	if n := len(ps.Segments); err != nil || n == 0 || !ps.Segments[n-1].SealTime.IsZero() {
		return ps, err
	}
	if err := m.finish(dir, &ps); err != nil {
		return ps, fmt.Errorf("finish a segment of the election's log: %w", err)
	}
	return ps, nil
}

// finish looks at the segment that is written to.
func (m rotatedMeta) finish(dir string, ps *types.PersistentState) error {
	tail := &ps.Segments[len(ps.Segments)-1]
	name := filepath.Join(dir, segment.FileName(*tail))
	b, err := m.disk.read(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // noted, but not made yet
	}
	if err != nil {
		return err
	}
	index, entries, whole := sealedAt(b)
	switch {
	case index == 0 || !finishesRotations:
		return nil
	case !whole: // the batch that seals it was never answered for
		return m.unseal(name, index)
	}
	now := time.Now()
	tail.SealTime, tail.MaxIndex, tail.IndexStart = now, tail.BaseIndex+uint64(entries)-1, uint64(index)+frameHeader
	next := types.SegmentInfo{ID: ps.NextSegmentID, BaseIndex: tail.MaxIndex + 1, MinIndex: tail.MaxIndex + 1, SizeLimit: uint32(m.size), Codec: codecID, CreateTime: now}
	ps.NextSegmentID++
	ps.Segments = append(ps.Segments, next) // raft-wal makes the file
	return m.CommitState(*ps)
}

// unseal takes away the head of an index, so that its segment ends before.
func (m rotatedMeta) unseal(name string, index int64) error {
	f, err := m.disk.open(name)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(make([]byte, frameHeader), index)
	if err == nil {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}

// sealedAt returns where the index of a segment stands, 0: nowhere, how many
// entries there are, and whether the batch with the index is the last and whole.
func sealedAt(b []byte) (index int64, entries int, whole bool) {
	start := 0 // of the batch
	for at := segmentHeader; at+frameHeader <= len(b); {
		n := int(binary.LittleEndian.Uint32(b[at+4:]))
		switch b[at] {
		case frameEntry:
			entries++
		case frameIndex:
			index, whole = int64(at), false
		case frameCommit:
			whole = index > int64(start) && crc32.Checksum(b[start:at], castagnoli) == uint32(n)
			at += frameHeader
			start = at
			continue
		default:
			return index, entries, whole
		}
		if n > len(b)-at-frameHeader {
			return index, entries, false
		}
		at += frameHeader + (n+7)&^7
	}
	return index, entries, whole
}
