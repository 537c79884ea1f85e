package election

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"log/slog"
	"path/filepath"
	"sync"
	"time"

	"github.com/hashicorp/raft"
	wal "github.com/hashicorp/raft-wal"
	"github.com/hashicorp/raft-wal/segment"
)

// Storage is where an Election keeps what must survive a restart: Raft's log,
// term and vote, snapshots, and a small record of its own. FileStorage is the
// real one; MemStorage survives a restart of the node, not of the process.
type Storage interface {
	// load and save keep small named values, each replaced as a whole.
	load(name string) ([]byte, error) // nil when there is none
	save(name string, value []byte) error
	// open returns the present stores, making empty ones if there are none.
	open(log *slog.Logger, damaged func(error)) (*stores, error)
	// setAside moves the present stores out of the way; the next open makes
	// empty ones. Only the last ones set aside are kept.
	setAside() error
}

type stores struct {
	log       *logStore
	stable    raft.StableStore
	snapshots raft.SnapshotStore
	close     func() error
}

// logStore is the log that Raft sees: the last entries cached, every entry that
// comes from below checked, and the commit index remembered, so that a node
// that restarts alone still knows everything it had applied.
type logStore struct {
	raft.LogStore // the cache
	below         raft.LogStore
	damaged       func(error)
	commit        commitKeeper
	monotonic     bool
}

type commitKeeper interface {
	get() uint64
	set(uint64) error
}

// cachedEntries is how many entries are kept in memory: what Raft reads in
// normal work, so that a bad disk shows in replication, never in applying.
const cachedEntries = 128

func newLogStore(below raft.LogStore, c commitKeeper, monotonic bool, damaged func(error)) (*logStore, error) {
	l := &logStore{below: below, commit: c, monotonic: monotonic, damaged: damaged}
	cache, err := raft.NewLogCache(cachedEntries, checkedLog{l})
	if err != nil {
		return nil, fmt.Errorf("cache the log: %w", err)
	}
	l.LogStore = cache
	return l, nil
}

// checkedLog reports a bad entry to the election before it returns the error.
type checkedLog struct{ *logStore }

func (c checkedLog) FirstIndex() (uint64, error)       { return c.below.FirstIndex() }
func (c checkedLog) LastIndex() (uint64, error)        { return c.below.LastIndex() }
func (c checkedLog) StoreLog(e *raft.Log) error        { return c.below.StoreLog(e) }
func (c checkedLog) StoreLogs(e []*raft.Log) error     { return c.below.StoreLogs(e) }
func (c checkedLog) DeleteRange(from, to uint64) error { return c.below.DeleteRange(from, to) }
func (c checkedLog) GetLog(i uint64, e *raft.Log) error {
	err := c.below.GetLog(i, e)
	if err == nil && e.Index != i {
		err = fmt.Errorf("%w: entry %d where %d belongs", ErrDamaged, e.Index, i)
	}
	if err != nil && !errors.Is(err, raft.ErrLogNotFound) {
		c.damaged(err)
	}
	return err
}

// DeleteRange does nothing on an empty log.
func (l *logStore) DeleteRange(from, to uint64) error {
	if last, err := l.below.LastIndex(); err != nil || last == 0 {
		return err
	}
	return l.LogStore.DeleteRange(from, to)
}

// IsMonotonic implements raft.MonotonicLogStore.
func (l *logStore) IsMonotonic() bool { return l.monotonic }

// applied notes that everything up to i was applied. It is only a hint that may
// be lost: every entry up to it is on the disk before.
func (l *logStore) applied(i uint64) error { return l.commit.set(i) }

// known returns the last index that is surely committed.
func (l *logStore) known() (uint64, error) {
	last, err := l.below.LastIndex()
	return min(l.commit.get(), last), err
}

// scan reads every entry once: Raft itself ends the process on a bad one.
func (l *logStore) scan() error {
	first, err := l.below.FirstIndex()
	if err != nil {
		return err
	}
	last, err := l.below.LastIndex()
	if err != nil {
		return err
	}
	var e raft.Log
	for i := max(first, 1); i <= last; i++ {
		if err := l.below.GetLog(i, &e); err != nil {
			return fmt.Errorf("%w: entry %d: %w", ErrDamaged, i, err)
		}
		if e.Index != i {
			return fmt.Errorf("%w: entry %d where %d belongs", ErrDamaged, e.Index, i)
		}
	}
	return nil
}

// notCut checks that all that is known as committed is there: raft-wal takes a
// damaged last batch for one that was never finished, and drops it.
func (l *logStore) notCut(snaps raft.SnapshotStore) error {
	last, err := l.below.LastIndex()
	if err != nil {
		return err
	}
	metas, err := snaps.List()
	if err != nil {
		return err
	}
	if len(metas) > 0 {
		last = max(last, metas[0].Index)
	}
	if at := l.commit.get(); at > last {
		return fmt.Errorf("%w: the log ends at %d, %d was committed", ErrDamaged, last, at)
	}
	return nil
}

// FileStorage keeps everything under one folder: the record, the frozen state,
// and raft/ with the segments, meta, commit and snapshots.
type FileStorage struct {
	disk        disk
	dir         string
	segmentSize int
}

// NewFileStorage uses dir, which it makes if need be. One process at a time.
func NewFileStorage(dir string) (*FileStorage, error) {
	return newFileStorage(osDisk{}, dir)
}

func newFileStorage(d disk, dir string) (*FileStorage, error) {
	if err := d.mkdir(dir); err != nil {
		return nil, fmt.Errorf("make the election's folder: %w", err)
	}
	return &FileStorage{disk: d, dir: dir, segmentSize: 4 << 20}, nil
}

// A named value is kept twice, the copy written first: a damaged one costs
// nothing while the other is whole.
const copySuffix = ".copy"

// opened returns the value in a file, and whether it is what was written.
func opened(b []byte) ([]byte, bool) {
	if len(b) < 4 || crc32.Checksum(b[4:], castagnoli) != binary.BigEndian.Uint32(b) {
		return nil, false
	}
	return b[4:], true
}

func (s *FileStorage) load(name string) ([]byte, error) {
	missing := 0
	for _, file := range []string{name, name + copySuffix} {
		b, err := s.disk.read(filepath.Join(s.dir, file))
		if errors.Is(err, fs.ErrNotExist) {
			missing++
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("read %s: %w", name, err)
		}
		if value, ok := opened(b); ok {
			return value, nil
		}
	}
	if missing == 2 {
		return nil, nil
	}
	return nil, fmt.Errorf("%w: %s", ErrDamaged, name)
}

func (s *FileStorage) save(name string, value []byte) error {
	for _, file := range []string{name + copySuffix, name} {
		if err := s.write(file, value); err != nil {
			return fmt.Errorf("write %s: %w", name, err)
		}
	}
	return nil
}

func (s *FileStorage) write(name string, value []byte) error {
	path := filepath.Join(s.dir, name)
	f, err := s.disk.create(path + ".new")
	if err != nil {
		return err
	}
	_, err = f.WriteAt(append(binary.BigEndian.AppendUint32(nil, crc32.Checksum(value, castagnoli)), value...), 0)
	if err == nil {
		err = f.Sync()
	}
	if e := f.Close(); err == nil {
		err = e
	}
	if err == nil {
		err = s.disk.rename(path+".new", path)
	}
	if err == nil {
		err = s.disk.sync(s.dir)
	}
	return err
}

func (s *FileStorage) open(log *slog.Logger, damaged func(error)) (_ *stores, err error) {
	dir := filepath.Join(s.dir, "raft")
	if err := s.disk.mkdir(dir); err != nil {
		return nil, fmt.Errorf("make the log's folder: %w", err)
	}
	if err := s.disk.sync(s.dir); err != nil {
		return nil, fmt.Errorf("sync the election's folder: %w", err)
	}
	meta := &metaFile{disk: s.disk}
	w, err := openWAL(func() (*wal.WAL, error) {
		return wal.Open(dir, wal.WithCodec(codec{}), wal.WithMetaStore(rotatedMeta{meta, s.segmentSize}), wal.WithSegmentFiler(codecFiler{segment.NewFiler(dir, s.disk.segments())}),
			wal.WithSegmentSize(s.segmentSize), wal.WithLogger(newHclog(log)))
	})
	if err != nil {
		meta.Close()
		return nil, err
	}
	commit := &commitFile{disk: s.disk, path: filepath.Join(dir, "commit")}
	closeAll := func() error { return errors.Join(w.Close(), commit.close()) }
	if err := commit.open(); err != nil {
		return nil, errors.Join(err, closeAll())
	}
	l, err := newLogStore(w, commit, true, damaged)
	if err == nil {
		err = l.scan()
	}
	if err == nil {
		err = l.notCut(snapshotFiles{s.disk, dir})
	}
	if err != nil {
		return nil, errors.Join(err, closeAll())
	}
	return &stores{log: l, stable: w, snapshots: snapshotFiles{s.disk, dir}, close: closeAll}, nil
}

// openWAL opens the log; what raft-wal cannot read is ErrDamaged, whether it
// says so by an error or by a panic.
func openWAL(open func() (*wal.WAL, error)) (w *wal.WAL, err error) {
	defer func() {
		if p := recover(); p != nil {
			w, err = nil, fmt.Errorf("%w: %v", ErrDamaged, p)
		}
	}()
	if w, err = open(); err != nil && !isSystemError(err) {
		err = fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	return w, err
}

// isSystemError tells a full disk or a missing right from bad bytes.
func isSystemError(err error) bool {
	var path *fs.PathError
	return errors.As(err, &path) && !errors.Is(err, fs.ErrNotExist)
}

func (s *FileStorage) setAside() error {
	dir, aside := filepath.Join(s.dir, "raft"), filepath.Join(s.dir, "raft.aside")
	if there, err := s.disk.exists(dir); err != nil {
		return fmt.Errorf("set the log aside: %w", err)
	} else if !there {
		return nil
	}
	if err := s.disk.removeAll(aside); err != nil {
		return fmt.Errorf("set the log aside: %w", err)
	}
	if err := s.disk.rename(dir, aside); err != nil {
		return fmt.Errorf("set the log aside: %w", err)
	}
	if err := s.disk.sync(s.dir); err != nil {
		return fmt.Errorf("set the log aside: %w", err)
	}
	return nil
}

// commitFile is index(8) CRC32C(4), twice, in sectors of their own, written in
// place and synced soon: a value that is lost or torn is an older one or none. It may not be much
// older: until Raft has a leader again, a node that lost its power knows the
// people up to here.
type commitFile struct {
	disk disk
	path string
	mu   sync.Mutex
	f    file
	at   uint64
	sync *time.Timer // set while a sync is due
}

// commitSync is how soon.
const commitSync = 100 * time.Millisecond

func (c *commitFile) open() (err error) {
	if c.f, err = c.disk.open(c.path); errors.Is(err, fs.ErrNotExist) {
		c.f, err = c.disk.create(c.path)
	}
	if err != nil {
		return fmt.Errorf("open the commit index: %w", err)
	}
	for slot := range int64(2) {
		b := make([]byte, commitSize)
		if n, _ := c.f.ReadAt(b, slot*commitSlot); n == len(b) {
			at, _ := openCommit(b)
			c.at = max(c.at, at)
		}
	}
	return nil
}

const (
	commitSize = 12
	commitSlot = 4096
)

func openCommit(b []byte) (at uint64, ok bool) {
	if crc32.Checksum(b[:8], castagnoli) != binary.BigEndian.Uint32(b[8:]) {
		return 0, false
	}
	return binary.BigEndian.Uint64(b), true
}

func (c *commitFile) get() uint64 { c.mu.Lock(); defer c.mu.Unlock(); return c.at }

func (c *commitFile) set(i uint64) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if i <= c.at || c.f == nil {
		return nil
	}
	b := binary.BigEndian.AppendUint64(nil, i)
	b = binary.BigEndian.AppendUint32(b, crc32.Checksum(b, castagnoli))
	for slot := range int64(2) {
		if _, err := c.f.WriteAt(b, slot*commitSlot); err != nil {
			return fmt.Errorf("note the commit index: %w", err)
		}
	}
	c.at = i
	if c.sync == nil {
		c.sync = time.AfterFunc(commitSync, func() {
			c.mu.Lock()
			defer c.mu.Unlock()
			if c.sync = nil; c.f != nil {
				c.f.Sync() // a hint: whether it lasts shows at the next start
			}
		})
	}
	return nil
}

func (c *commitFile) close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.f == nil {
		return nil
	}
	if c.sync != nil {
		c.sync.Stop()
	}
	err := errors.Join(c.f.Sync(), c.f.Close())
	c.f = nil
	return err
}

// MemStorage keeps everything in memory. Hand the same one to the next Election
// of a node to restart it.
type MemStorage struct {
	mu     sync.Mutex // guards the fields
	values map[string][]byte
	now    *memStores
}

type memStores struct {
	log   *raft.InmemStore
	snaps memSnapshots
	at    memCommit
}

type memCommit struct {
	mu sync.Mutex
	at uint64
}

func (c *memCommit) get() uint64 { c.mu.Lock(); defer c.mu.Unlock(); return c.at }
func (c *memCommit) set(i uint64) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.at = max(c.at, i)
	return nil
}

// memSnapshots keeps the newest snapshot that was written to its end. Raft's own
// store shows one from its first byte on: a node that ends while one comes in
// would find half of it, as no disk of ours does.
type memSnapshots struct {
	mu     sync.Mutex // guards newest
	newest *raft.InmemSnapshotStore
}

func (s *memSnapshots) whole() *raft.InmemSnapshotStore {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.newest == nil {
		s.newest = raft.NewInmemSnapshotStore()
	}
	return s.newest
}

// Create implements raft.SnapshotStore.
func (s *memSnapshots) Create(v raft.SnapshotVersion, index, term uint64, c raft.Configuration, configured uint64, t raft.Transport) (raft.SnapshotSink, error) {
	next := raft.NewInmemSnapshotStore()
	k, err := next.Create(v, index, term, c, configured, t)
	if err != nil {
		return nil, err
	}
	return &memSink{SnapshotSink: k, store: s, next: next}, nil
}

// List implements raft.SnapshotStore.
func (s *memSnapshots) List() ([]*raft.SnapshotMeta, error) { return s.whole().List() }

// Open implements raft.SnapshotStore.
func (s *memSnapshots) Open(id string) (*raft.SnapshotMeta, io.ReadCloser, error) {
	return s.whole().Open(id)
}

// memSink is a snapshot that is being written.
type memSink struct {
	raft.SnapshotSink
	store *memSnapshots
	next  *raft.InmemSnapshotStore // nil once it is given up
}

// Cancel implements raft.SnapshotSink.
func (k *memSink) Cancel() error {
	k.next = nil
	return nil
}

// Close implements raft.SnapshotSink: it is whole now, and the newest.
func (k *memSink) Close() error {
	k.store.mu.Lock()
	defer k.store.mu.Unlock()
	if k.next != nil {
		k.store.newest = k.next
	}
	return nil
}

// NewMemStorage returns an empty one.
func NewMemStorage() *MemStorage { return &MemStorage{values: map[string][]byte{}} }

func (s *MemStorage) load(name string) ([]byte, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.values[name], nil
}

func (s *MemStorage) save(name string, value []byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.values[name] = append([]byte(nil), value...)
	return nil
}

func (s *MemStorage) open(_ *slog.Logger, damaged func(error)) (*stores, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.now == nil {
		s.now = &memStores{log: raft.NewInmemStore()}
	}
	l, err := newLogStore(s.now.log, &s.now.at, false, damaged)
	if err != nil {
		return nil, err
	}
	return &stores{log: l, stable: s.now.log, snapshots: &s.now.snaps, close: func() error { return nil }}, nil
}

func (s *MemStorage) setAside() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.now = nil
	return nil
}

// Copy returns what a copy of the disk would hold now: for tests of a node that
// is restored from it. The node must not run.
func (s *MemStorage) Copy() (*MemStorage, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	c := NewMemStorage()
	for k, v := range s.values {
		c.values[k] = v
	}
	if s.now == nil {
		return c, nil
	}
	c.now = &memStores{log: raft.NewInmemStore()}
	c.now.at.at = s.now.at.get()
	first, _ := s.now.log.FirstIndex()
	last, _ := s.now.log.LastIndex()
	for i := first; i != 0 && i <= last; i++ {
		var e raft.Log
		if err := s.now.log.GetLog(i, &e); err != nil {
			return nil, fmt.Errorf("copy entry %d: %w", i, err)
		}
		if err := c.now.log.StoreLog(&e); err != nil {
			return nil, fmt.Errorf("copy entry %d: %w", i, err)
		}
	}
	for _, k := range []string{"CurrentTerm", "LastVoteTerm"} { // Raft's own keys
		if v, err := s.now.log.GetUint64([]byte(k)); err == nil {
			c.now.log.SetUint64([]byte(k), v)
		}
	}
	if v, err := s.now.log.Get([]byte("LastVoteCand")); err == nil {
		c.now.log.Set([]byte("LastVoteCand"), v)
	}
	metas, err := s.now.snaps.List()
	if err != nil || len(metas) == 0 {
		return c, err
	}
	m, r, err := s.now.snaps.Open(metas[0].ID)
	if err != nil {
		return nil, fmt.Errorf("copy snapshot: %w", err)
	}
	defer r.Close()
	sink, err := c.now.snaps.Create(m.Version, m.Index, m.Term, m.Configuration, m.ConfigurationIndex, nil)
	if err != nil {
		return nil, fmt.Errorf("copy snapshot: %w", err)
	}
	if _, err := io.Copy(sink, r); err != nil {
		return nil, fmt.Errorf("copy snapshot: %w", err)
	}
	return c, sink.Close()
}
