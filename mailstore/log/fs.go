package log

import (
	"errors"
	"io"
	"os"
	"path/filepath"
	"syscall"
)

// FS is all that the log asks of a disk. Disk is the real one; simfs has one
// that loses what was not synced. Paths are the caller's own. Errors keep their
// errno in the chain: a full disk is syscall.ENOSPC or EDQUOT.
type FS interface {
	// MkdirAll makes dir and what is missing above it, durably.
	MkdirAll(dir string) error
	// Lock takes dir for this process until the result is closed.
	Lock(dir string) (io.Closer, error)
	// Create makes a file that must not exist, for reading and writing.
	Create(name string) (File, error)
	// OpenFile opens an existing file for reading and writing.
	OpenFile(name string) (File, error)
	// Rename gives a file another name of the same folder, in one step.
	Rename(from, to string) error
	Remove(name string) error
	// ReadDir lists a folder by name.
	ReadDir(dir string) ([]FileInfo, error)
	// SyncDir makes the names in dir durable.
	SyncDir(dir string) error
	Stat(name string) (FileInfo, error)
}

// FileInfo is one entry of a folder.
type FileInfo struct {
	Name string // without the folder
	Size int64  // bytes
	Dir  bool
}

// File is an open file. ReadAt and WriteAt may be called by several at once.
type File interface {
	io.ReaderAt
	io.WriterAt
	io.Closer
	// Sync makes content and size durable (fdatasync). After an error nothing
	// is known about what was written since the last success.
	Sync() error
	Truncate(size int64) error
	Size() (int64, error)
}

// Disk is the real file system. Supported: ext4, XFS, btrfs; not NFS or SMB.
type Disk struct{}

// MkdirAll implements FS: each folder it makes is synced into the one above.
func (d Disk) MkdirAll(dir string) error {
	if fi, err := os.Stat(dir); err == nil && fi.IsDir() {
		return nil
	}
	up := filepath.Dir(dir)
	if up != dir {
		if err := d.MkdirAll(up); err != nil {
			return err
		}
	}
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	return d.SyncDir(up)
}

// Lock implements FS by flock on the folder itself.
func (Disk) Lock(dir string) (io.Closer, error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	if err := flock(f); err != nil {
		f.Close()
		return nil, &os.PathError{Op: "lock (is another posthouse running?)", Path: dir, Err: err}
	}
	return f, nil
}

// Create implements FS.
func (Disk) Create(name string) (File, error) {
	return wrap(os.OpenFile(name, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600))
}

// OpenFile implements FS. A file on read-only media opens for reading.
func (Disk) OpenFile(name string) (File, error) {
	f, err := os.OpenFile(name, os.O_RDWR, 0)
	if errors.Is(err, syscall.EROFS) || errors.Is(err, os.ErrPermission) {
		f, err = os.Open(name)
	}
	return wrap(f, err)
}

func wrap(f *os.File, err error) (File, error) {
	if err != nil {
		return nil, err
	}
	return diskFile{f}, nil
}

// Rename implements FS.
func (Disk) Rename(from, to string) error { return os.Rename(from, to) }

// Remove implements FS.
func (Disk) Remove(name string) error { return os.Remove(name) }

// ReadDir implements FS.
func (Disk) ReadDir(dir string) ([]FileInfo, error) {
	es, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	out := make([]FileInfo, 0, len(es))
	for _, e := range es {
		fi, err := e.Info()
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		out = append(out, FileInfo{Name: e.Name(), Size: fi.Size(), Dir: fi.IsDir()})
	}
	return out, nil
}

// SyncDir implements FS.
func (Disk) SyncDir(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	err = f.Sync()
	if e := f.Close(); err == nil {
		err = e
	}
	return err
}

// Stat implements FS.
func (Disk) Stat(name string) (FileInfo, error) {
	fi, err := os.Stat(name)
	if err != nil {
		return FileInfo{}, err
	}
	return FileInfo{Name: fi.Name(), Size: fi.Size(), Dir: fi.IsDir()}, nil
}

type diskFile struct{ *os.File }

func (f diskFile) Sync() error { return fdatasync(f.File) }

func (f diskFile) Size() (int64, error) {
	fi, err := f.Stat()
	if err != nil {
		return 0, err
	}
	return fi.Size(), nil
}

// full reports whether err says that there is no room on the disk.
func full(err error) bool {
	return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT)
}
