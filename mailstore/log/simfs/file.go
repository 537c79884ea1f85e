package simfs

import (
	"io"
	"os"
	"syscall"
	"time"
)

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
