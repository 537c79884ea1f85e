package kv

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"

	"github.com/dgraph-io/badger/v4"
	"github.com/dgraph-io/badger/v4/options"
	"github.com/dgraph-io/badger/v4/table"
	"github.com/dgraph-io/ristretto/v2/z"
)

// checkers is how many tables are read at once: what a disk can use.
const checkers = 2

// checkTables reads every table that the manifest in dir names with its
// checksums; others were never finished, and Badger removes them. Badger does the same
// when it is asked to, but on a bad block it dereferences nil, and on a bad
// footer it calls log.Fatal, in goroutines of its own: the process would end.
func checkTables(dir string) (err error) {
	if uncheckedTables {
		return nil
	}
	defer caught(&err)
	f, err := os.Open(filepath.Join(dir, badger.ManifestFilename))
	if errors.Is(err, os.ErrNotExist) {
		return nil // a new view
	}
	if err != nil {
		return err
	}
	defer f.Close()
	manifest, _, err := badger.ReplayManifestFile(f, 0, badger.DefaultOptions(dir))
	if err != nil {
		return fmt.Errorf("manifest: %w: %w", ErrDamaged, err)
	}
	var names []string
	for id := range manifest.Tables {
		names = append(names, table.NewFilename(id, dir))
	}
	var wg sync.WaitGroup
	work, errs := make(chan string), make([]error, checkers)
	for i := range checkers {
		wg.Go(func() {
			for name := range work {
				if err := checkTable(name); err != nil && errs[i] == nil {
					errs[i] = fmt.Errorf("table %s: %w", filepath.Base(name), err)
				}
			}
		})
	}
	for _, name := range names {
		work <- name
	}
	close(work)
	wg.Wait()
	return errors.Join(errs...)
}

func checkTable(name string) (err error) {
	if err := checkFooter(name); err != nil {
		return err
	}
	m, err := z.OpenMmapFile(name, os.O_RDONLY, 0)
	if err != nil {
		return fmt.Errorf("map: %w", err)
	}
	defer caught(&err)
	defer m.Close(-1)
	_, err = table.OpenTable(m, table.Options{ReadOnly: true, BlockSize: 4 << 10, Compression: options.None, ChkMode: options.OnTableRead})
	if err != nil {
		return fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	return nil
}

// checkFooter looks whether a table's end makes sense: index, its length(4), a
// checksum of it, that one's length(4).
func checkFooter(name string) error {
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	left, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return err
	}
	for _, what := range []string{"checksum", "index"} {
		var b [4]byte
		if left -= 4; left < 0 {
			return fmt.Errorf("%w: too short for its %s", ErrDamaged, what)
		}
		if _, err := f.ReadAt(b[:], left); err != nil {
			return err
		}
		if left -= int64(binary.BigEndian.Uint32(b[:])); left < 0 {
			return fmt.Errorf("%w: the length of its %s makes no sense", ErrDamaged, what)
		}
	}
	return nil
}
