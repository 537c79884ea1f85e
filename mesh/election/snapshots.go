package election

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"hash"
	"io"
	"path/filepath"
	"slices"
	"strings"

	"github.com/fxamacker/cbor/v2"
	"github.com/hashicorp/raft"
)

// snapshotFiles is Raft's snapshot store: one file each,
//
//	"PHES" version(4) metaLen(4) CBOR meta, payload, SHA-256 of all before(32)
//
// written under another name, synced and renamed. Opening one reads it through
// first, so that nobody restores from half of a damaged one.
type snapshotFiles struct {
	disk disk
	dir  string
}

const (
	snapMagic   = "PHES"
	snapVersion = 1
	snapSuffix  = ".snapshot"
	keepSnaps   = 2
	maxSnapMeta = 1 << 20
)

type snapMeta struct {
	Index       uint64 `cbor:"1,keyasint"`
	Term        uint64 `cbor:"2,keyasint"`
	Config      []byte `cbor:"3,keyasint"` // raft.EncodeConfiguration
	ConfigIndex uint64 `cbor:"4,keyasint"`
}

func (s snapshotFiles) Create(_ raft.SnapshotVersion, index, term uint64, c raft.Configuration, configIndex uint64, _ raft.Transport) (raft.SnapshotSink, error) {
	meta, err := cbor.Marshal(snapMeta{index, term, raft.EncodeConfiguration(c), configIndex})
	if err != nil {
		return nil, fmt.Errorf("create a snapshot: %w", err)
	}
	id := fmt.Sprintf("%016x-%016x", index, term)
	tmp := filepath.Join(s.dir, id+".tmp")
	f, err := s.disk.create(tmp)
	if err != nil {
		return nil, fmt.Errorf("create a snapshot: %w", err)
	}
	k := &snapSink{store: s, id: id, tmp: tmp, f: f, out: io.NewOffsetWriter(f, 0), sum: sha256.New()}
	k.w = bufio.NewWriterSize(io.MultiWriter(k.out, k.sum), 64<<10)
	hdr := binary.BigEndian.AppendUint32([]byte(snapMagic), snapVersion)
	hdr = binary.BigEndian.AppendUint32(hdr, uint32(len(meta)))
	if _, err := k.w.Write(append(hdr, meta...)); err != nil {
		k.Cancel()
		return nil, fmt.Errorf("create a snapshot: %w", err)
	}
	return k, nil
}

type snapSink struct {
	store snapshotFiles
	id    string
	tmp   string
	f     file
	out   io.Writer
	w     *bufio.Writer
	sum   hash.Hash
	done  bool
}

func (k *snapSink) ID() string                  { return k.id }
func (k *snapSink) Write(b []byte) (int, error) { return k.w.Write(b) }

func (k *snapSink) Close() error {
	if k.done {
		return nil
	}
	k.done = true
	err := k.w.Flush()
	if err == nil {
		_, err = k.out.Write(k.sum.Sum(nil))
	}
	if err == nil {
		err = k.f.Sync()
	}
	if e := k.f.Close(); err == nil {
		err = e
	}
	if err == nil {
		err = k.store.disk.rename(k.tmp, filepath.Join(k.store.dir, k.id+snapSuffix))
	}
	if err == nil {
		err = k.store.disk.sync(k.store.dir)
	}
	if err != nil {
		k.store.disk.remove(k.tmp)
		return fmt.Errorf("finish a snapshot: %w", err)
	}
	k.store.prune()
	return nil
}

func (k *snapSink) Cancel() error {
	if k.done {
		return nil
	}
	k.done = true
	k.f.Close()
	return k.store.disk.remove(k.tmp)
}

// names returns the snapshots' ids, the newest first.
func (s snapshotFiles) names() ([]string, error) {
	es, err := s.disk.list(s.dir)
	if err != nil {
		return nil, fmt.Errorf("list snapshots: %w", err)
	}
	var ids []string
	for _, e := range es {
		if id, ok := strings.CutSuffix(e, snapSuffix); ok {
			ids = append(ids, id)
		}
	}
	slices.Sort(ids)
	slices.Reverse(ids)
	return ids, nil
}

// prune keeps the newest few. A file that cannot be removed is tried again
// after the next snapshot.
func (s snapshotFiles) prune() {
	ids, _ := s.names()
	for i, id := range ids {
		if i >= keepSnaps {
			s.disk.remove(filepath.Join(s.dir, id+snapSuffix))
		}
	}
}

// List returns the newest snapshot if it is whole. A damaged newest one is an
// error and not passed over: the log behind an older one is gone.
func (s snapshotFiles) List() ([]*raft.SnapshotMeta, error) {
	ids, err := s.names()
	if err != nil || len(ids) == 0 {
		return nil, err
	}
	m, _, err := s.verify(ids[0])
	if err != nil {
		return nil, err
	}
	return []*raft.SnapshotMeta{m}, nil
}

func (s snapshotFiles) Open(id string) (*raft.SnapshotMeta, io.ReadCloser, error) {
	m, payload, err := s.verify(id)
	if err != nil {
		return nil, nil, err
	}
	return m, io.NopCloser(bytes.NewReader(payload)), nil
}

// verify reads a snapshot through and returns its meta and its payload. The
// state is small: all of it is in memory anyway.
func (s snapshotFiles) verify(id string) (*raft.SnapshotMeta, []byte, error) {
	b, err := s.disk.read(filepath.Join(s.dir, id+snapSuffix))
	if err != nil {
		return nil, nil, fmt.Errorf("open snapshot %s: %w", id, err)
	}
	bad := fmt.Errorf("%w: snapshot %s", ErrDamaged, id)
	const header = 12
	if len(b) < header+sha256.Size {
		return nil, nil, bad
	}
	body, sum := b[:len(b)-sha256.Size], b[len(b)-sha256.Size:]
	n := binary.BigEndian.Uint32(body[8:])
	if string(body[:4]) != snapMagic || binary.BigEndian.Uint32(body[4:]) != snapVersion || n > maxSnapMeta || int(n) > len(body)-header {
		return nil, nil, bad
	}
	var m snapMeta
	if got := sha256.Sum256(body); !bytes.Equal(got[:], sum) || cbor.Unmarshal(body[header:header+n], &m) != nil {
		return nil, nil, bad
	}
	payload := body[header+n:]
	return &raft.SnapshotMeta{Version: raft.SnapshotVersionMax, ID: id, Index: m.Index, Term: m.Term, Configuration: raft.DecodeConfiguration(m.Config),
		ConfigurationIndex: m.ConfigIndex, Size: int64(len(payload))}, payload, nil
}
