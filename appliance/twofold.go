package appliance

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
)

// twofold keeps each small file twice, so that a bad sector in one of them
// costs nothing: the file itself, as it is, and beside it a copy under a
// checksum. The copy is written first: where the two differ it is right.
type twofold struct {
	Files
	// mended is told of each file that was made whole from its other half.
	mended func(Flaw)
	// turn holds one token: two writers of one file at a time could leave one's
	// copy beside the other's file.
	turn chan struct{}
}

func newTwofold(files Files, mended func(Flaw)) twofold {
	return twofold{files, mended, make(chan struct{}, 1)}
}

// Flaw is a damaged place in one of the node's files.
type Flaw struct {
	File   string `json:"file"` // within the data folder
	Offset int64  `json:"offset"`
	What   string `json:"what"`
}

func (f Flaw) String() string { return fmt.Sprintf("%s at %d: %s", f.File, f.Offset, f.What) }

const (
	copySuffix = ".copy"
	copyHeader = "posthouse copy 1 "
)

// A copy is
//
//	posthouse copy 1 SUM BEFORE\n content
//
// SUM being the SHA-256 of BEFORE, a line feed and the content, and BEFORE the
// SHA-256 of what the file held until this was written: a file that still holds
// it is not damaged, the write of it was cut off.
func copyOf(content, before []byte) []byte {
	was := sum(before)
	return append([]byte(copyHeader+sum([]byte(was+"\n"), content)+" "+was+"\n"), content...)
}

func sum(parts ...[]byte) string {
	h := sha256.New()
	for _, p := range parts {
		h.Write(p)
	}
	return hex.EncodeToString(h.Sum(nil))
}

// openCopy returns what a copy holds and the sum of what was before it, and
// whether it is what was written.
func openCopy(b []byte) (content []byte, before string, ok bool) {
	const head = len(copyHeader) + 2*sha256.Size + 1 + 2*sha256.Size + 1
	if len(b) < head || string(b[:len(copyHeader)]) != copyHeader || b[head-1] != '\n' {
		return nil, "", false
	}
	said := string(b[len(copyHeader):][:2*sha256.Size])
	before, content = string(b[head-1-2*sha256.Size:head-1]), b[head:]
	return content, before, b[head-2-2*sha256.Size] == ' ' && said == sum([]byte(before+"\n"), content)
}

// differ returns the first place where b is not what it should be.
func differ(b, want []byte) int64 {
	for i := range min(len(b), len(want)) {
		if b[i] != want[i] {
			return int64(i)
		}
	}
	return int64(min(len(b), len(want)))
}

// look reads both halves. flaws name what is wrong; mend says what to write to
// make both whole, nil for nothing.
func (t twofold) look(name string) (content []byte, flaws []Flaw, mend bool, err error) {
	main, err := t.Files.Read(name)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, nil, false, err
	}
	second, err2 := t.Files.Read(name + copySuffix)
	if err2 != nil && !errors.Is(err2, fs.ErrNotExist) {
		return nil, nil, false, err2
	}
	if singleCopy {
		return main, nil, false, err
	}
	base := filepath.Base(name)
	kept, before, whole := openCopy(second)
	switch {
	case err2 != nil:
		return main, nil, err == nil, err // from before there were copies, or nothing at all
	case !whole:
		flaws = []Flaw{{base + copySuffix, 0, "the copy is not what was written"}}
		return main, flaws, err == nil, err
	case err == nil && bytes.Equal(main, kept):
		return main, nil, false, nil
	case before == sum(main): // of nothing when it is missing
		return kept, nil, true, nil
	case err != nil:
		return kept, []Flaw{{base, 0, "the file is missing; its copy is there"}}, true, nil
	}
	return kept, []Flaw{{base, differ(main, kept), "the file is not what was written; its copy is whole"}}, true, nil
}

// Read implements Files: it makes whole what it can.
func (t twofold) Read(name string) ([]byte, error) {
	t.turn <- struct{}{}
	defer func() { <-t.turn }()
	content, flaws, mend, err := t.look(name)
	if err != nil {
		return nil, err
	}
	for _, f := range flaws {
		t.mended(f)
	}
	if mend {
		mode := fs.FileMode(0o600)
		if filepath.Ext(name) == ".pem" && !bytes.Contains(content, []byte("PRIVATE KEY")) {
			mode = 0o644
		}
		// A full disk may keep it as it is: the next start tries again.
		_ = t.write(name, content, mode)
	}
	return content, nil
}

// Write implements Files.
func (t twofold) Write(name string, content []byte, mode fs.FileMode) error {
	t.turn <- struct{}{}
	defer func() { <-t.turn }()
	return t.write(name, content, mode)
}

func (t twofold) write(name string, content []byte, mode fs.FileMode) error {
	before, err := t.Files.Read(name)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := t.Files.Write(name+copySuffix, copyOf(content, before), mode); err != nil {
		return err
	}
	return t.Files.Write(name, content, mode)
}

// Remove implements Files.
func (t twofold) Remove(name string) error {
	t.turn <- struct{}{}
	defer func() { <-t.turn }()
	if err := t.Files.Remove(name + copySuffix); err != nil {
		return err
	}
	return t.Files.Remove(name)
}
