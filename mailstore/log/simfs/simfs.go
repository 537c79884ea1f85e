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
	"os"
	"path"
	"sync"
	"time"
)

// ErrCrashed is returned by everything on a disk that crashed, until After
// gives the disk that the next start finds.
var ErrCrashed = errors.New("simulated disk: crashed")

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
	// WholeSectors: at a crash a sector is as it was or as it was written, never
	// garbled. Not every disk promises that; raft-wal counts on it.
	WholeSectors bool

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
	// moved is the former name of a folder that gets another: what waits in it
	// is durable before.
	moved string
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

func fail(op, name string, err error) error { return &os.PathError{Op: op, Path: name, Err: err} }
