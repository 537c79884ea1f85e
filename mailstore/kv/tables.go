package kv

import (
	"bytes"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// tables gives each table that Badger makes its blocks the moment it appears.
// Badger makes a table under a new name, extends it and then writes it through
// a mapping, a page at a time; a disk that fills up in between would end the
// process. The folder tells of the new name at once, so what is left of that
// time is what the kernel takes to wake a goroutine.
type tables struct {
	f    *os.File // of inotify(7)
	dir  string
	sp   *space
	done chan struct{}
}

func guardTables(dir string, sp *space) (*tables, error) {
	fd, err := unix.InotifyInit1(unix.IN_NONBLOCK | unix.IN_CLOEXEC)
	if err != nil {
		return nil, err
	}
	if _, err := unix.InotifyAddWatch(fd, dir, unix.IN_CREATE); err != nil {
		unix.Close(fd)
		return nil, err
	}
	t := &tables{f: os.NewFile(uintptr(fd), "inotify"), dir: dir, sp: sp, done: make(chan struct{})}
	go t.run()
	return t, nil
}

func (t *tables) close() {
	if t != nil {
		t.f.Close()
		<-t.done
	}
}

func (t *tables) run() {
	defer close(t.done)
	buf := make([]byte, 4096)
	for {
		n, err := t.f.Read(buf)
		if err != nil {
			return // closed
		}
		t.events(buf[:n])
	}
}

func (t *tables) events(b []byte) {
	for len(b) >= unix.SizeofInotifyEvent {
		size := unix.SizeofInotifyEvent + int(binary.NativeEndian.Uint32(b[12:]))
		if size > len(b) {
			return
		}
		name := string(bytes.TrimRight(b[unix.SizeofInotifyEvent:size], "\x00"))
		b = b[size:]
		if strings.HasSuffix(name, ".sst") {
			t.hold(filepath.Join(t.dir, name))
		}
	}
}

// sizeWait bounds the wait for Badger's next call after it made a table.
const sizeWait = 20 * time.Millisecond

// hold reserves the blocks of one table.
func (t *tables) hold(path string) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return // gone already
	}
	defer f.Close()
	var size int64
	for begun := time.Now(); size == 0 && time.Since(begun) < sizeWait; runtime.Gosched() {
		fi, err := f.Stat()
		if err != nil {
			return
		}
		size = fi.Size()
	}
	if size == 0 {
		return
	}
	if err := unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_KEEP_SIZE, 0, size); errors.Is(err, unix.ENOSPC) {
		t.sp.sink()
		_ = unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_KEEP_SIZE, 0, size)
	}
}
