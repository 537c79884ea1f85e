package election

import (
	"errors"
	"io"
	"io/fs"
	"os"

	walfs "github.com/hashicorp/raft-wal/fs"
	"github.com/hashicorp/raft-wal/types"
)

// disk is all that FileStorage asks of a file system. osDisk is the real one;
// the tests have one that loses what was not synced.
type disk interface {
	mkdir(dir string) error                    // and what is missing above it
	read(name string) ([]byte, error)          // a whole file
	create(name string) (file, error)          // empty, whatever had the name
	open(name string) (file, error)            // an existing one, for both
	rename(from, to string) error              // a file or a folder
	remove(name string) error                  // a file
	removeAll(dir string) error                // a folder, if there is one
	exists(name string) (bool, error)          // a file or a folder
	list(dir string) (names []string, _ error) // none: no error
	sync(dir string) error                     // makes the names in it durable
	segments() types.VFS                       // raft-wal's part
}

// file is an open file.
type file interface {
	io.ReaderAt
	io.WriterAt
	io.Closer
	Sync() error
}

type osDisk struct{}

func (osDisk) mkdir(dir string) error           { return os.MkdirAll(dir, 0o700) }
func (osDisk) read(name string) ([]byte, error) { return os.ReadFile(name) }
func (osDisk) rename(from, to string) error     { return os.Rename(from, to) }
func (osDisk) remove(name string) error         { return os.Remove(name) }
func (osDisk) removeAll(dir string) error       { return os.RemoveAll(dir) }
func (osDisk) segments() types.VFS              { return walfs.New() }
func (osDisk) create(name string) (file, error) {
	return opening(os.OpenFile(name, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600))
}
func (osDisk) open(name string) (file, error) { return opening(os.OpenFile(name, os.O_RDWR, 0)) }

func opening(f *os.File, err error) (file, error) {
	if err != nil {
		return nil, err
	}
	return f, nil
}

func (osDisk) exists(name string) (bool, error) {
	_, err := os.Stat(name)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil, err
}

func (osDisk) list(dir string) (names []string, _ error) {
	es, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	for _, e := range es {
		names = append(names, e.Name())
	}
	return names, err
}

func (osDisk) sync(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}
