package election

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
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
type snapshotFiles struct{ dir string }

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
	f, err := os.OpenFile(filepath.Join(s.dir, id+".tmp"), os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return nil, fmt.Errorf("create a snapshot: %w", err)
	}
	k := &snapSink{store: s, id: id, f: f, sum: sha256.New()}
	k.w = bufio.NewWriterSize(io.MultiWriter(f, k.sum), 64<<10)
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
	f     *os.File
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
	tmp := k.f.Name()
	err := k.w.Flush()
	if err == nil {
		_, err = k.f.Write(k.sum.Sum(nil))
	}
	if err == nil {
		err = k.f.Sync()
	}
	if e := k.f.Close(); err == nil {
		err = e
	}
	if err == nil {
		err = os.Rename(tmp, filepath.Join(k.store.dir, k.id+snapSuffix))
	}
	if err == nil {
		err = syncDir(k.store.dir)
	}
	if err != nil {
		os.Remove(tmp)
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
	return os.Remove(k.f.Name())
}

// names returns the snapshots' ids, the newest first.
func (s snapshotFiles) names() ([]string, error) {
	es, err := os.ReadDir(s.dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("list snapshots: %w", err)
	}
	var ids []string
	for _, e := range es {
		if id, ok := strings.CutSuffix(e.Name(), snapSuffix); ok {
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
			os.Remove(filepath.Join(s.dir, id+snapSuffix))
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
	m, _, _, err := s.verify(ids[0])
	if err != nil {
		return nil, err
	}
	return []*raft.SnapshotMeta{m}, nil
}

func (s snapshotFiles) Open(id string) (*raft.SnapshotMeta, io.ReadCloser, error) {
	m, f, from, err := s.verify(id)
	if err != nil {
		return nil, nil, err
	}
	g, err := os.Open(f)
	if err != nil {
		return nil, nil, fmt.Errorf("open snapshot %s: %w", id, err)
	}
	return m, struct {
		io.Reader
		io.Closer
	}{bufio.NewReader(io.NewSectionReader(g, from, m.Size)), g}, nil
}

// verify reads a snapshot through and returns its meta, its file, and where
// its payload begins.
func (s snapshotFiles) verify(id string) (*raft.SnapshotMeta, string, int64, error) {
	path := filepath.Join(s.dir, id+snapSuffix)
	f, err := os.Open(path)
	if err != nil {
		return nil, "", 0, fmt.Errorf("open snapshot %s: %w", id, err)
	}
	defer f.Close()
	bad := fmt.Errorf("%w: snapshot %s", ErrDamaged, id)
	st, err := f.Stat()
	if err != nil {
		return nil, "", 0, fmt.Errorf("open snapshot %s: %w", id, err)
	}
	sum := sha256.New()
	r := bufio.NewReader(f)
	body := io.TeeReader(io.LimitReader(r, st.Size()-sha256.Size), sum)
	hdr := make([]byte, 12)
	if _, err := io.ReadFull(body, hdr); err != nil || string(hdr[:4]) != snapMagic || binary.BigEndian.Uint32(hdr[4:]) != snapVersion {
		return nil, "", 0, bad
	}
	n := binary.BigEndian.Uint32(hdr[8:])
	if n > maxSnapMeta {
		return nil, "", 0, bad
	}
	raw := make([]byte, n)
	if _, err := io.ReadFull(body, raw); err != nil {
		return nil, "", 0, bad
	}
	if _, err := io.Copy(io.Discard, body); err != nil {
		return nil, "", 0, fmt.Errorf("read snapshot %s: %w", id, err)
	}
	got := make([]byte, sha256.Size)
	var m snapMeta
	if _, err := io.ReadFull(r, got); err != nil || !bytes.Equal(got, sum.Sum(nil)) || cbor.Unmarshal(raw, &m) != nil {
		return nil, "", 0, bad
	}
	from := int64(len(hdr)) + int64(n)
	return &raft.SnapshotMeta{Version: raft.SnapshotVersionMax, ID: id, Index: m.Index, Term: m.Term, Configuration: raft.DecodeConfiguration(m.Config),
		ConfigurationIndex: m.ConfigIndex, Size: st.Size() - sha256.Size - from}, path, from, nil
}
