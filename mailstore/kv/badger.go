package kv

import (
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/dgraph-io/badger/v4"
	"github.com/dgraph-io/badger/v4/options"
	"golang.org/x/sys/unix"
)

// format is the version of the rows on disk. Another one is set aside.
const format = 1

// The first byte of each key on disk.
const (
	keyMeta = 0 // the one row of meta
	keyRow  = 1 // rows of engines
	keyRedo = 2 // parts of a commit that is too big for one transaction
)

// badgerMeta is meta as it is on disk.
type badgerMeta struct {
	meta
	redo    uint32 // number of redo rows to be carried out; 0 for none
	redoSeq uint64 // Applied after that
}

const metaSize = 2 + 8 + 8 + 8 + 4 + 8

func (m badgerMeta) encode() []byte {
	b := binary.BigEndian.AppendUint16(make([]byte, 0, metaSize), format)
	b = binary.BigEndian.AppendUint64(b, m.ID)
	b = binary.BigEndian.AppendUint64(b, m.Applied)
	b = binary.BigEndian.AppendUint64(b, m.Target)
	b = binary.BigEndian.AppendUint32(b, m.redo)
	return binary.BigEndian.AppendUint64(b, m.redoSeq)
}

func decodeMeta(b []byte) (m badgerMeta, err error) {
	if len(b) < 2 || binary.BigEndian.Uint16(b) != format {
		return m, fmt.Errorf("format %x is not known to this version", b[:min(len(b), 2)])
	}
	if len(b) != metaSize {
		return m, fmt.Errorf("meta row of %d bytes: %w", len(b), ErrDamaged)
	}
	m.ID = binary.BigEndian.Uint64(b[2:])
	m.Applied = binary.BigEndian.Uint64(b[10:])
	m.Target = binary.BigEndian.Uint64(b[18:])
	m.redo = binary.BigEndian.Uint32(b[26:])
	m.redoSeq = binary.BigEndian.Uint64(b[30:])
	return m, nil
}

// badgerStore keeps the committed rows in Badger.
type badgerStore struct {
	db       *badger.DB
	dir      string
	memTable int64
	nextMem  int  // number of the write-ahead file that the next rotation takes
	reserve  bool // the file system can reserve blocks
	maxBytes int  // of one transaction
	maxOps   int
	tables   *tables
	sp       *space
}

// valueLogSize is the least that Badger takes: nothing is ever written there.
const valueLogSize = 1 << 20

// badgerOptions are what we run Badger with. table is called before each table
// that a compaction writes, on the goroutine that will write it.
func badgerOptions(dir string, memTable int64, log *slog.Logger, table func()) badger.Options {
	return badger.DefaultOptions(dir).
		WithSyncWrites(true).
		WithMemTableSize(memTable).
		WithNumMemtables(2).
		WithNumCompactors(2). // one is refused
		WithNumLevelZeroTables(3).
		WithNumLevelZeroTablesStall(8).
		WithValueThreshold(MaxValue + 1024).
		WithValueLogFileSize(valueLogSize).
		WithChecksumVerificationMode(options.OnBlockRead). // checkTables has read them whole
		WithCompression(options.None).                     // the cache then holds checked blocks, not copies
		WithBlockCacheSize(8 << 20).
		WithIndexCacheSize(0).
		WithDetectConflicts(false). // one writer
		WithMetricsEnabled(false).
		WithLogger(badgerLog{l: log, table: table})
}

func openBadger(dir string, memTable int64, opt Options, sp *space) (_ *badgerStore, _ meta, err error) {
	defer caught(&err)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, meta{}, err
	}
	if err := checkTables(dir); err != nil {
		return nil, meta{}, err
	}
	mems, err := memFiles(dir)
	if err != nil {
		return nil, meta{}, err
	}
	for _, m := range mems {
		fi, err := os.Stat(m)
		if err != nil {
			return nil, meta{}, err
		}
		if fi.Size() == 0 { // reserved, never taken: Badger refuses it
			if err := os.Remove(m); err != nil {
				return nil, meta{}, err
			}
		}
		// A file of a bigger memtable does not fit into a smaller one.
		memTable = max(memTable, (fi.Size()+1)/2)
	}
	bo := badgerOptions(dir, memTable, opt.Logger, sp.gate)
	db, err := badger.Open(bo)
	if err != nil {
		return nil, meta{}, err
	}
	s := &badgerStore{
		db: db, dir: dir, memTable: memTable, sp: sp,
		maxBytes: int(db.MaxBatchSize()) * 3 / 4,
		maxOps:   int(db.MaxBatchCount()) * 3 / 4,
	}
	if s.tables, err = guardTables(dir, sp); err != nil {
		opt.Logger.Warn("new tables cannot be watched: a disk that fills up at once may end the process", "err", err)
	}
	m, err := s.begin(opt)
	if err != nil {
		s.close()
		return nil, meta{}, err
	}
	return s, m, nil
}

// begin reserves blocks, ends what a crash interrupted and reads meta.
func (s *badgerStore) begin(opt Options) (meta, error) {
	mems, err := memFiles(s.dir)
	if err != nil {
		return meta{}, err
	}
	s.reserve = true
	for _, m := range mems {
		s.nextMem = max(s.nextMem, memNumber(m)+1)
	}
	// The newest one is open for writing.
	if err := s.hold(s.memPath(s.nextMem-1), 2*s.memTable, true); err != nil {
		return meta{}, err
	}
	logs, err := filepath.Glob(filepath.Join(s.dir, "*.vlog"))
	if err != nil {
		return meta{}, err
	}
	for _, l := range append(logs, filepath.Join(s.dir, "DISCARD")) {
		fi, err := os.Stat(l)
		if err != nil {
			return meta{}, err
		}
		if err := s.hold(l, fi.Size(), true); err != nil {
			return meta{}, err
		}
	}
	m, ok, err := s.read()
	if err != nil {
		return meta{}, err
	}
	if !ok {
		m = badgerMeta{meta: meta{ID: opt.ID()}}
		return m.meta, nil
	}
	if m.redo > 0 {
		if m, err = s.redo(m); err != nil {
			return meta{}, fmt.Errorf("end an interrupted commit: %w", err)
		}
	}
	if err := s.clearRedo(); err != nil {
		return meta{}, err
	}
	return m.meta, nil
}

func (s *badgerStore) limits() (bytes, ops int) { return s.maxBytes, s.maxOps }

func memFiles(dir string) ([]string, error) { return filepath.Glob(filepath.Join(dir, "*.mem")) }

func memNumber(path string) int {
	n, _ := strconv.Atoi(strings.TrimSuffix(filepath.Base(path), ".mem"))
	return n
}

func (s *badgerStore) memPath(n int) string {
	return filepath.Join(s.dir, fmt.Sprintf("%05d.mem", n))
}

// hold reserves blocks where the file system can; errFull when there are none.
func (s *badgerStore) hold(path string, size int64, grow bool) error {
	if !s.reserve || size == 0 {
		return nil
	}
	err := reserve(path, size, grow)
	switch {
	case errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.ENOSYS):
		s.reserve = false
		if !grow {
			os.Remove(path)
		}
		return nil
	case errors.Is(err, unix.ENOSPC):
		if !grow {
			os.Remove(path)
		}
		return errFull
	}
	return err
}

// prepare sees to it that the write-ahead file of the next rotation has its
// blocks before Badger maps it: a write through a mapping to a hole of a full
// disk would end the process. Badger opens a file of no length as a new one and
// extends it, which leaves the blocks in place.
func (s *badgerStore) prepare() error {
	if !s.reserve {
		return nil
	}
	fi, err := os.Stat(s.memPath(s.nextMem))
	switch {
	case errors.Is(err, os.ErrNotExist):
	case err != nil:
		return err
	case fi.Size() == 0:
		return nil // still waiting to be taken
	default: // taken: a transaction rotates once at most
		s.nextMem++
	}
	return s.hold(s.memPath(s.nextMem), 2*s.memTable, false)
}

func (s *badgerStore) meta() (meta, bool, error) {
	m, ok, err := s.read()
	return m.meta, ok, err
}

func (s *badgerStore) read() (m badgerMeta, ok bool, err error) {
	defer caught(&err)
	err = s.db.View(func(t *badger.Txn) error {
		it, err := t.Get([]byte{keyMeta})
		if errors.Is(err, badger.ErrKeyNotFound) {
			return nil
		}
		if err != nil {
			return asDamage(err)
		}
		ok = true
		return it.Value(func(b []byte) error { m, err = decodeMeta(b); return err })
	})
	return m, ok, err
}

// txn runs f in one transaction.
func (s *badgerStore) txn(f func(*badger.Txn) error) (err error) {
	defer caught(&err)
	t := s.db.NewTransaction(true)
	defer t.Discard()
	if err := f(t); err != nil {
		return err
	}
	return t.Commit()
}

func setMeta(t *badger.Txn, m badgerMeta) error { return t.Set([]byte{keyMeta}, m.encode()) }

func setRows(t *badger.Txn, rows []row) error {
	n := 0
	for _, r := range rows {
		n += 1 + len(r.key)
	}
	keys := make([]byte, 0, n) // one allocation for all keys
	for _, r := range rows {
		at := len(keys)
		keys = append(append(keys, keyRow), r.key...)
		k := keys[at:len(keys):len(keys)]
		var err error
		if r.del {
			err = t.Delete(k)
		} else {
			err = t.Set(k, r.value)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (s *badgerStore) commit(rows []row, m meta) error {
	if part := s.part(rows); len(part) < len(rows) {
		return s.commitBig(rows, m)
	}
	err := s.txn(func(t *badger.Txn) error {
		if err := setRows(t, rows); err != nil {
			return err
		}
		return setMeta(t, badgerMeta{meta: m})
	})
	if fi, e := os.Stat(s.memPath(s.nextMem)); e == nil && fi.Size() > 0 {
		s.sp.begun() // it rotated: the full one becomes a table now
	}
	return err
}

func (s *badgerStore) close() (err error) {
	defer caught(&err)
	err = s.db.Close()
	s.tables.close()
	if next := s.memPath(s.nextMem); err == nil {
		if fi, e := os.Stat(next); e == nil && fi.Size() == 0 { // reserved, not taken
			os.Remove(next)
		}
	}
	return err
}

// badgerSnapshot is a read transaction that many readers share: a new one for
// each read would wait for the commit under way.
type badgerSnapshot struct {
	t  *badger.Txn
	db *badger.DB
}

func (s *badgerStore) snapshot() (_ snapshot, err error) {
	defer caught(&err)
	return &badgerSnapshot{s.db.NewTransaction(false), s.db}, nil
}

func (s *badgerSnapshot) verify() (err error) {
	defer caught(&err)
	if err := s.db.VerifyChecksum(); err != nil {
		return fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	return nil
}

func (s *badgerSnapshot) release() { s.t.Discard() }

func (s *badgerSnapshot) get(key []byte) (value []byte, ok bool, err error) {
	defer caught(&err)
	it, err := s.t.Get(append(append(make([]byte, 0, 1+len(key)), keyRow), key...))
	if errors.Is(err, badger.ErrKeyNotFound) {
		return nil, false, nil
	}
	if err != nil {
		return nil, false, asDamage(err)
	}
	value, err = it.ValueCopy(nil)
	return value, err == nil, asDamage(err)
}

func (s *badgerSnapshot) iter(prefix, from []byte) iterator {
	bi := &badgerIter{}
	defer caught(&bi.e)
	o := badger.DefaultIteratorOptions
	o.PrefetchValues = false
	o.Prefix = append([]byte{keyRow}, prefix...)
	bi.it = s.t.NewIterator(o)
	bi.it.Seek(append([]byte{keyRow}, from...))
	return bi
}

type badgerIter struct {
	it  *badger.Iterator
	buf []byte
	e   error
}

func (b *badgerIter) valid() bool { return b.e == nil && b.it.Valid() }
func (b *badgerIter) key() []byte { return b.it.Item().Key()[1:] }
func (b *badgerIter) value() (_ []byte, err error) {
	defer caught(&err)
	b.buf, err = b.it.Item().ValueCopy(b.buf)
	return b.buf, asDamage(err)
}
func (b *badgerIter) next() {
	defer caught(&b.e)
	b.it.Next()
}
func (b *badgerIter) err() error { return b.e }
func (b *badgerIter) close() {
	defer caught(&b.e)
	if b.it != nil {
		b.it.Close()
	}
}

// caught turns a panic of Badger, which is how it reports most damage, into an
// error.
func caught(err *error) {
	if p := recover(); p != nil {
		*err = fmt.Errorf("badger: %v: %w", p, ErrDamaged)
	}
}

// asDamage marks the errors that mean damage. Badger's wrapping loses the
// chain, so their text decides.
func asDamage(err error) error {
	if err != nil && strings.Contains(err.Error(), "checksum") {
		return fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	return err
}

// badgerLog hands Badger's messages to slog; its Info is our Debug. One of them
// stands between the making of a table and its writing: the only place where
// Badger can be held before it takes space. A test sees to it that a new version
// of Badger still says it.
type badgerLog struct {
	l     *slog.Logger
	table func()
}

const tableMessage = "LOG Compact. Added"

func text(f string, a []any) string { return strings.TrimSpace(fmt.Sprintf(f, a...)) }

func (b badgerLog) Errorf(f string, a ...any)   { b.l.Error("badger", "text", text(f, a)) }
func (b badgerLog) Warningf(f string, a ...any) { b.l.Warn("badger", "text", text(f, a)) }
func (b badgerLog) Infof(f string, a ...any)    { b.l.Debug("badger", "text", text(f, a)) }
func (b badgerLog) Debugf(f string, _ ...any) { // one a transaction and more
	if strings.Contains(f, tableMessage) {
		b.table()
	}
}
