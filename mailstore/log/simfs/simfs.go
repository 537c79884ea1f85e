// Package simfs is a disk in memory that behaves as badly as a real one may: a
// write goes to a volatile cache, a sync makes a file durable, a new name needs
// its folder synced, and at a crash each unsynced sector survives, is lost or
// is garbled on its own. Operations can be made to fail, and the disk to be
// full. It is for tests and for the whole-node simulator; it starts no
// goroutines and runs in synctest bubbles.
package simfs

import (
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path"
	"slices"
	"sort"
	"strings"
	"sync"
	"syscall"
	"time"

	"posthouse/mailstore/log"
)

// Sector is the unit in which unsynced bytes survive a crash, in bytes.
const Sector = 512

// ErrCrashed is returned by everything on a disk that crashed, until After
// gives the disk that the next start finds.
var ErrCrashed = errors.New("simulated disk: crashed")

// Mode says what a crash does to what was not synced.
type Mode int

// The modes.
const (
	LoseAll Mode = iota // nothing of it survives
	KeepAll             // all of it does
	Random              // each sector, size and name on its own, by the seed; some are garbled
	Torn                // as KeepAll, but the last write is kept only in part
)

func (m Mode) String() string { return [...]string{"lose all", "keep all", "random", "torn"}[m] }

// Op is one operation that changes the disk, as the fault hook sees it.
type Op struct {
	N    int    // from 1 on, since New
	Name string // "create", "write", "sync", "truncate", "rename", "remove", "mkdir", "syncdir"
	Path string
	Off  int64 // of a write, or the size of a truncate
	Len  int   // of a write
}

func (o Op) String() string {
	return fmt.Sprintf("%d %s %s @%d+%d", o.N, o.Name, path.Base(o.Path), o.Off, o.Len)
}

// Fault is what the hook answers: the zero value lets the operation happen.
type Fault struct {
	// Err fails the operation. A failed write keeps half its bytes in the
	// cache; a failed sync drops the dirty data: reads show it until the crash,
	// and no later sync writes it.
	Err error
	// Written has a sync that fails write nevertheless, as disks may whose error
	// concerned other data: what was told as failed is there after the crash.
	Written bool
	// Crash stops the disk: the operation takes place in the cache (a sync not
	// at all), and everything from it on answers ErrCrashed.
	Crash bool
}

// FS is the disk. It is safe for use by several goroutines.
type FS struct {
	// Hook is asked before every operation that changes the disk; nil: none.
	// It is called under the disk's lock. Set it before use.
	Hook func(Op) Fault
	// SyncTime is how long a sync takes, by the time package; 0: no time.
	SyncTime time.Duration

	mu      sync.Mutex
	ops     int
	crashed bool
	free    int64 // bytes that files may still grow by; -1: no bound
	cur     tree
	durable tree
	pending []nameOp // of folders not synced, in order
	locked  map[string]bool
	handles int
	lastOp  *write
}

type tree struct {
	files map[string]*inode
	dirs  map[string]bool
}

func (t tree) clone() tree {
	n := tree{files: make(map[string]*inode, len(t.files)), dirs: make(map[string]bool, len(t.dirs))}
	for k, v := range t.files {
		n.files[k] = v
	}
	for k, v := range t.dirs {
		n.dirs[k] = v
	}
	return n
}

// inode is a file's content: as reads see it and as it is on the platter.
type inode struct {
	cur     []byte
	durable []byte
	dirty   map[int64]bool // sectors written since the last sync
}

// write is the last write to a file, for Torn.
type write struct {
	ino *inode
	off int64
	n   int
}

// nameOp is a change of names that its folder's sync makes durable.
type nameOp struct {
	dir  string
	do   func(tree)
	path string
}

// New returns an empty disk.
func New() *FS {
	t := tree{files: map[string]*inode{}, dirs: map[string]bool{"/": true, ".": true}}
	return &FS{free: -1, cur: t, durable: t.clone(), locked: map[string]bool{}}
}

// SetFree bounds the bytes by which files may still grow; -1: no bound.
func (s *FS) SetFree(n int64) { s.mu.Lock(); s.free = n; s.mu.Unlock() }

// Free returns the bytes by which files may still grow; -1: no bound.
func (s *FS) Free() int64 { s.mu.Lock(); defer s.mu.Unlock(); return s.free }

// SetSyncTime changes SyncTime while the disk is in use.
func (s *FS) SetSyncTime(d time.Duration) { s.mu.Lock(); s.SyncTime = d; s.mu.Unlock() }

// Ops returns how many operations that change the disk took place.
func (s *FS) Ops() int { s.mu.Lock(); defer s.mu.Unlock(); return s.ops }

// Handles counts the files that are open.
func (s *FS) Handles() int { s.mu.Lock(); defer s.mu.Unlock(); return s.handles }

// Files counts the files that there are.
func (s *FS) Files() int { s.mu.Lock(); defer s.mu.Unlock(); return len(s.cur.files) }

// Crash stops the disk.
func (s *FS) Crash() { s.mu.Lock(); s.crashed = true; s.mu.Unlock() }

// Copy returns a disk with the same files, all of them synced. It is meant for
// one on which nothing is open; this one stays as it is.
func (s *FS) Copy() *FS {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := New()
	out.free = s.free
	for d := range s.cur.dirs {
		out.cur.dirs[d] = true
	}
	for name, ino := range s.cur.files {
		out.cur.files[name] = &inode{cur: slices.Clone(ino.cur), durable: slices.Clone(ino.cur), dirty: map[int64]bool{}}
	}
	out.durable = out.cur.clone()
	return out
}

// After crashes the disk, if it has not, and returns the one that the next
// start finds. It may be called again, for another mode or seed.
func (s *FS) After(mode Mode, seed uint64) *FS {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.crashed = true
	rnd := rand.New(rand.NewPCG(seed, uint64(mode)))
	t := s.durable.clone()
	for _, op := range s.pending {
		if mode == KeepAll || mode == Torn || mode == Random && rnd.IntN(2) == 0 {
			op.do(t)
		}
	}
	out := New()
	out.free = s.free
	out.cur.dirs = t.dirs
	copies := map[*inode]*inode{}
	for _, name := range sortedKeys(t.files) {
		ino := t.files[name]
		if copies[ino] == nil {
			b := ino.after(mode, rnd, s.lastOp)
			copies[ino] = &inode{cur: b, durable: slices.Clone(b), dirty: map[int64]bool{}}
		}
		out.cur.files[name] = copies[ino]
	}
	out.durable = out.cur.clone()
	return out
}

func sortedKeys(m map[string]*inode) []string {
	out := make([]string, 0, len(m))
	for k := range m {
		out = append(out, k)
	}
	sort.Strings(out)
	return out
}

// after returns the content that a crash leaves.
func (i *inode) after(mode Mode, rnd *rand.Rand, last *write) []byte {
	if len(i.dirty) == 0 && len(i.cur) == len(i.durable) {
		return slices.Clone(i.durable)
	}
	size := len(i.durable)
	switch {
	case mode == KeepAll || mode == Torn:
		// What a failed sync dropped is gone in every mode: it is not dirty.
		size = len(i.cur)
		if len(i.dirty) == 0 {
			size = len(i.durable)
		}
	case mode == Random:
		lo, hi := min(len(i.cur), len(i.durable)), max(len(i.cur), len(i.durable))
		switch rnd.IntN(4) {
		case 0:
			size = lo
		case 1:
			size = lo + (hi-lo)/2/Sector*Sector
		default:
			size = len(i.cur)
		}
	}
	out := make([]byte, size)
	copy(out, i.durable)
	for off := int64(0); off < int64(size); off += Sector {
		if !i.dirty[off/Sector] {
			continue
		}
		end := min(off+Sector, int64(size))
		keep := mode == KeepAll
		switch mode {
		case Torn:
			keep = last == nil || last.ino != i || off < (last.off+int64(last.n)/2)/Sector*Sector
		case Random:
			switch rnd.IntN(5) {
			case 0:
				for k := off; k < end; k++ {
					out[k] = byte(rnd.Uint32())
				}
			case 1, 2:
				keep = true
			}
		}
		if keep {
			clear(out[off:end])
			if off < int64(len(i.cur)) {
				copy(out[off:end], i.cur[off:])
			}
		}
	}
	return out
}

// do counts an operation and asks the hook; mu is held.
func (s *FS) do(o Op) (Fault, error) {
	if s.crashed {
		return Fault{}, &os.PathError{Op: o.Name, Path: o.Path, Err: ErrCrashed}
	}
	s.ops++
	o.N = s.ops
	if s.Hook == nil {
		return Fault{}, nil
	}
	f := s.Hook(o)
	if f.Err != nil {
		f.Err = &os.PathError{Op: o.Name, Path: o.Path, Err: f.Err}
	}
	if f.Crash {
		s.crashed = true
		f.Err = &os.PathError{Op: o.Name, Path: o.Path, Err: ErrCrashed}
	}
	return f, nil
}

// name runs an operation on names; f changes a tree. mu is held.
func (s *FS) name(o Op, f func(tree)) error {
	fault, err := s.do(o)
	if err != nil {
		return err
	}
	if fault.Err == nil || fault.Crash {
		f(s.cur)
		s.pending = append(s.pending, nameOp{dir: path.Dir(o.Path), do: f, path: o.Path})
	}
	return fault.Err
}

func fail(op, name string, err error) error { return &os.PathError{Op: op, Path: name, Err: err} }

// MkdirAll implements log.FS.
func (s *FS) MkdirAll(dir string) error {
	dir = path.Clean(dir)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.cur.dirs[dir] {
		return nil
	}
	fault, err := s.do(Op{Name: "mkdir", Path: dir})
	if err != nil || fault.Err != nil {
		return errors.Join(err, fault.Err)
	}
	for d := dir; !s.cur.dirs[d]; d = path.Dir(d) {
		s.cur.dirs[d], s.durable.dirs[d] = true, true
	}
	return nil
}

type unlock func()

func (u unlock) Close() error { u(); return nil }

// Lock implements log.FS.
func (s *FS) Lock(dir string) (io.Closer, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.crashed {
		return nil, fail("lock", dir, ErrCrashed)
	}
	if s.locked[dir] {
		return nil, fail("lock", dir, syscall.EWOULDBLOCK)
	}
	s.locked[dir] = true
	return unlock(sync.OnceFunc(func() { s.mu.Lock(); delete(s.locked, dir); s.mu.Unlock() })), nil
}

// Create implements log.FS.
func (s *FS) Create(name string) (log.File, error) {
	name = path.Clean(name)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.cur.files[name] != nil || s.cur.dirs[name] {
		return nil, fail("create", name, os.ErrExist)
	}
	if !s.cur.dirs[path.Dir(name)] {
		return nil, fail("create", name, os.ErrNotExist)
	}
	ino := &inode{dirty: map[int64]bool{}}
	if err := s.name(Op{Name: "create", Path: name}, func(t tree) { t.files[name] = ino }); err != nil {
		return nil, err
	}
	s.handles++
	return &file{s: s, ino: ino, name: name}, nil
}

// OpenFile implements log.FS.
func (s *FS) OpenFile(name string) (log.File, error) {
	name = path.Clean(name)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.crashed {
		return nil, fail("open", name, ErrCrashed)
	}
	ino := s.cur.files[name]
	if ino == nil {
		return nil, fail("open", name, os.ErrNotExist)
	}
	s.handles++
	return &file{s: s, ino: ino, name: name}, nil
}

// Rename implements log.FS.
func (s *FS) Rename(from, to string) error {
	from, to = path.Clean(from), path.Clean(to)
	s.mu.Lock()
	defer s.mu.Unlock()
	ino := s.cur.files[from]
	if ino == nil {
		return fail("rename", from, os.ErrNotExist)
	}
	return s.name(Op{Name: "rename", Path: to}, func(t tree) {
		if t.files[from] == ino {
			delete(t.files, from)
		}
		t.files[to] = ino
	})
}

// Remove implements log.FS.
func (s *FS) Remove(name string) error {
	name = path.Clean(name)
	s.mu.Lock()
	defer s.mu.Unlock()
	ino := s.cur.files[name]
	if ino == nil {
		return fail("remove", name, os.ErrNotExist)
	}
	err := s.name(Op{Name: "remove", Path: name}, func(t tree) {
		if t.files[name] == ino {
			delete(t.files, name)
		}
	})
	if err == nil && s.free >= 0 {
		s.free += int64(len(ino.cur))
	}
	return err
}

// ReadDir implements log.FS.
func (s *FS) ReadDir(dir string) ([]log.FileInfo, error) {
	dir = path.Clean(dir)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.crashed {
		return nil, fail("readdir", dir, ErrCrashed)
	}
	if !s.cur.dirs[dir] {
		return nil, fail("readdir", dir, os.ErrNotExist)
	}
	var out []log.FileInfo
	for name, ino := range s.cur.files {
		if path.Dir(name) == dir {
			out = append(out, log.FileInfo{Name: path.Base(name), Size: int64(len(ino.cur))})
		}
	}
	for d := range s.cur.dirs {
		if path.Dir(d) == dir && d != dir {
			out = append(out, log.FileInfo{Name: path.Base(d), Dir: true})
		}
	}
	slices.SortFunc(out, func(a, b log.FileInfo) int { return strings.Compare(a.Name, b.Name) })
	return out, nil
}

// SyncDir implements log.FS.
func (s *FS) SyncDir(dir string) error {
	dir = path.Clean(dir)
	s.mu.Lock()
	fault, err := s.do(Op{Name: "syncdir", Path: dir})
	if err != nil || fault.Err != nil {
		s.mu.Unlock()
		return errors.Join(err, fault.Err)
	}
	var left []nameOp
	for _, op := range s.pending {
		if op.dir == dir {
			op.do(s.durable)
		} else {
			left = append(left, op)
		}
	}
	s.pending = left
	s.mu.Unlock()
	time.Sleep(s.SyncTime)
	return nil
}

// Stat implements log.FS.
func (s *FS) Stat(name string) (log.FileInfo, error) {
	name = path.Clean(name)
	s.mu.Lock()
	defer s.mu.Unlock()
	switch ino := s.cur.files[name]; {
	case s.crashed:
		return log.FileInfo{}, fail("stat", name, ErrCrashed)
	case ino != nil:
		return log.FileInfo{Name: path.Base(name), Size: int64(len(ino.cur))}, nil
	case s.cur.dirs[name]:
		return log.FileInfo{Name: path.Base(name), Dir: true}, nil
	}
	return log.FileInfo{}, fail("stat", name, os.ErrNotExist)
}

// Peek returns a file's bytes as reads see them; nil when there is none. For
// tests that look, or that damage it: see Poke.
func (s *FS) Peek(name string) []byte {
	s.mu.Lock()
	defer s.mu.Unlock()
	if ino := s.cur.files[path.Clean(name)]; ino != nil {
		return slices.Clone(ino.cur)
	}
	return nil
}

// Poke gives a file other bytes, durably, as damage does; nil takes it away.
func (s *FS) Poke(name string, b []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	name = path.Clean(name)
	if b == nil {
		delete(s.cur.files, name)
		delete(s.durable.files, name)
		return
	}
	ino := &inode{cur: slices.Clone(b), durable: slices.Clone(b), dirty: map[int64]bool{}}
	s.cur.files[name], s.durable.files[name] = ino, ino
}

type file struct {
	s      *FS
	ino    *inode
	name   string
	closed bool
}

func (f *file) check(op string) error {
	switch {
	case f.s.crashed:
		return fail(op, f.name, ErrCrashed)
	case f.closed:
		return fail(op, f.name, os.ErrClosed)
	}
	return nil
}

func (f *file) ReadAt(p []byte, off int64) (int, error) {
	f.s.mu.Lock()
	defer f.s.mu.Unlock()
	if err := f.check("read"); err != nil {
		return 0, err
	}
	if off >= int64(len(f.ino.cur)) {
		return 0, io.EOF
	}
	n := copy(p, f.ino.cur[off:])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (f *file) WriteAt(p []byte, off int64) (int, error) {
	f.s.mu.Lock()
	defer f.s.mu.Unlock()
	if err := f.check("write"); err != nil {
		return 0, err
	}
	fault, err := f.s.do(Op{Name: "write", Path: f.name, Off: off, Len: len(p)})
	if err != nil {
		return 0, err
	}
	n := len(p)
	if fault.Err != nil && !fault.Crash {
		n /= 2
	}
	if grow := off + int64(n) - int64(len(f.ino.cur)); f.s.free >= 0 && grow > f.s.free {
		n = max(0, n-int(grow-f.s.free))
		if fault.Err == nil {
			fault.Err = fail("write", f.name, syscall.ENOSPC)
		}
	}
	f.put(p[:n], off)
	return n, fault.Err
}

func (f *file) put(p []byte, off int64) {
	if len(p) == 0 {
		return
	}
	end := off + int64(len(p))
	was := int64(len(f.ino.cur))
	if end > was {
		if f.s.free >= 0 {
			f.s.free -= end - was
		}
		f.ino.cur = append(f.ino.cur, make([]byte, end-was)...)
	}
	copy(f.ino.cur[off:], p)
	for k := min(off, max(was, off)) / Sector; k*Sector < end; k++ {
		f.ino.dirty[k] = true
	}
	f.s.lastOp = &write{f.ino, off, len(p)}
}

func (f *file) Truncate(size int64) error {
	f.s.mu.Lock()
	defer f.s.mu.Unlock()
	if err := f.check("truncate"); err != nil {
		return err
	}
	fault, err := f.s.do(Op{Name: "truncate", Path: f.name, Off: size})
	if err != nil {
		return err
	}
	if fault.Err != nil && !fault.Crash {
		return fault.Err
	}
	was := int64(len(f.ino.cur))
	if f.s.free >= 0 {
		f.s.free += was - size
	}
	if size <= was {
		f.ino.cur = f.ino.cur[:size:size]
	} else {
		f.ino.cur = append(f.ino.cur, make([]byte, size-was)...)
	}
	for k := min(size, was) / Sector; k*Sector < max(size, was); k++ {
		f.ino.dirty[k] = true
	}
	return fault.Err
}

func (f *file) Sync() error {
	f.s.mu.Lock()
	if err := f.check("sync"); err != nil {
		f.s.mu.Unlock()
		return err
	}
	fault, err := f.s.do(Op{Name: "sync", Path: f.name})
	if err == nil {
		err = fault.Err
	}
	if err == nil || fault.Err != nil && fault.Written && !f.s.crashed {
		f.ino.flush()
	}
	if !f.s.crashed {
		f.ino.dirty = map[int64]bool{}
	}
	takes := f.s.SyncTime
	f.s.mu.Unlock()
	if err == nil {
		time.Sleep(takes)
	}
	return err
}

// flush writes the dirty sectors, and no others: what a failed sync dropped
// stays lost.
func (i *inode) flush() {
	size := len(i.cur)
	if size < len(i.durable) {
		i.durable = i.durable[:size:size]
	} else {
		i.durable = append(i.durable, make([]byte, size-len(i.durable))...)
	}
	for k := range i.dirty {
		off := k * Sector
		if off < int64(size) {
			copy(i.durable[off:min(off+Sector, int64(size))], i.cur[off:])
		}
	}
}

func (f *file) Size() (int64, error) {
	f.s.mu.Lock()
	defer f.s.mu.Unlock()
	if err := f.check("stat"); err != nil {
		return 0, err
	}
	return int64(len(f.ino.cur)), nil
}

func (f *file) Close() error {
	f.s.mu.Lock()
	defer f.s.mu.Unlock()
	if !f.closed {
		f.s.handles--
	}
	f.closed = true
	return nil
}
