package simfs

import (
	"errors"
	"io"
	"maps"
	"os"
	"path"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"posthouse/mailstore/log"
)

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

// Rename implements log.FS, for folders too.
func (s *FS) Rename(from, to string) error {
	from, to = path.Clean(from), path.Clean(to)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.cur.dirs[from] {
		return s.renameDir(from, to)
	}
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

// renameDir gives a folder another name. The journal of a file system keeps the
// order of names: those in the folder are durable before it is.
func (s *FS) renameDir(from, to string) error {
	err := s.name(Op{Name: "rename", Path: to}, func(t tree) {
		for d := range maps.Clone(t.dirs) {
			if d == from || strings.HasPrefix(d, from+"/") {
				delete(t.dirs, d)
				t.dirs[to+d[len(from):]] = true
			}
		}
		for f, ino := range maps.Clone(t.files) {
			if strings.HasPrefix(f, from+"/") {
				delete(t.files, f)
				t.files[to+f[len(from):]] = ino
			}
		}
	})
	if n := len(s.pending); err == nil && n > 0 {
		s.pending[n-1].moved = from
	}
	return err
}

// Remove implements log.FS, for empty folders too.
func (s *FS) Remove(name string) error {
	name = path.Clean(name)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.cur.dirs[name] {
		for f := range s.cur.files {
			if path.Dir(f) == name {
				return fail("remove", name, syscall.ENOTEMPTY)
			}
		}
		return s.name(Op{Name: "remove", Path: name}, func(t tree) { delete(t.dirs, name) })
	}
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
		if op.dir != dir {
			left = append(left, op)
			continue
		}
		if op.moved != "" {
			left = slices.DeleteFunc(left, func(o nameOp) bool {
				in := o.dir == op.moved || strings.HasPrefix(o.dir, op.moved+"/")
				if in {
					o.do(s.durable)
				}
				return in
			})
		}
		op.do(s.durable)
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
