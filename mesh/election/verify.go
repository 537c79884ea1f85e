package election

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/hashicorp/raft"
)

// Damage is a place in the election's files that is not as it was written.
type Damage struct {
	File   string // within the folder given to VerifyFiles
	Offset int64
	What   string
}

// VerifyFiles reads all that a FileStorage keeps in dir, every byte that a
// checksum covers, and returns what is damaged. It changes nothing. Run it while
// the node is stopped. A missing folder is whole: nothing was ever kept.
func VerifyFiles(dir string) ([]Damage, error) {
	var out []Damage
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		if e.IsDir() {
			if strings.HasSuffix(name, ".aside") {
				return fs.SkipDir // kept for a person, never read
			}
			return nil
		}
		bad, err := verifyFile(name, path)
		out = append(out, bad...)
		return err
	})
	if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	if err != nil {
		return out, fmt.Errorf("verify the election's files: %w", err)
	}
	return out, nil
}

func verifyFile(name, path string) (out []Damage, err error) {
	found := func(off int64, what string) { out = append(out, Damage{name, off, what}) }
	base := filepath.Base(name)
	switch {
	case strings.HasSuffix(base, snapSuffix):
		_, _, err := snapshotFiles{osDisk{}, filepath.Dir(path)}.verify(strings.TrimSuffix(base, snapSuffix))
		if errors.Is(err, ErrDamaged) {
			found(0, "the snapshot is not what was written")
			err = nil
		}
		return out, err
	case base == "meta":
		f, err := os.Open(path)
		if err != nil {
			return nil, err
		}
		defer f.Close()
		for slot := range int64(2) {
			if _, _, ok := readSlot(f, slot); !ok {
				found(slot*slotSize, fmt.Sprintf("copy %d of the list of segments is not what was written", slot+1))
			}
		}
		return out, nil
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	switch {
	case strings.HasSuffix(base, ".wal"):
		verifySegment(b, found)
	case base == "commit":
		for slot := 0; slot+commitSize <= len(b); slot += commitSlot {
			if _, ok := openCommit(b[slot:][:commitSize]); !ok {
				found(int64(slot), "the commit index is not what was written")
			}
		}
	case slices.Contains([]string{recordName, frozenName}, strings.TrimSuffix(base, copySuffix)):
		if _, ok := opened(b); !ok {
			found(0, "the record is not what was written")
		}
	}
	return out, nil
}

// Frames of raft-wal's segments, whose format its segment package documents: a
// header of 32 bytes, then frames of type(1) reserved(3) length(4) payload,
// padded to 8. A commit frame has, in place of the length, the CRC32C of all
// since the one before it, the first of all since the file's start.
const (
	segmentHeader = 32
	frameHeader   = 8
	frameEntry    = 1
	frameIndex    = 2
	frameCommit   = 3
)

// verifySegment checks each batch, and names the entry when it can.
func verifySegment(b []byte, found func(int64, string)) {
	var zero [frameHeader]byte
	start := 0 // of the batch
	var entries [][2]int
	for at := segmentHeader; ; {
		rest := b[min(at, len(b)):]
		if len(rest) < frameHeader || bytes.Equal(rest[:frameHeader], zero[:]) {
			// The end of what was written; behind it is reserved space.
			tail := bytes.TrimLeft(b[min(max(start, segmentHeader), len(b)):], "\x00")
			if len(tail) > 0 {
				found(int64(len(b)-len(tail)), "the log of the election ends in a batch that is not whole: damage, or a write that was never finished")
			}
			return
		}
		n := int(binary.LittleEndian.Uint32(rest[4:]))
		switch rest[0] {
		case frameCommit:
			if crc32.Checksum(b[start:at], castagnoli) != uint32(n) {
				off, what := start, "a batch of the election's log is not what was written"
				var l raft.Log
				for _, e := range entries {
					if (codec{}).Decode(b[e[0]:e[1]], &l) != nil {
						off, what = e[0], "an entry of the election's log is not what was written"
						break
					}
				}
				found(int64(off), what)
			}
			at += frameHeader
			start, entries = at, nil
		case frameEntry, frameIndex:
			if n > len(rest)-frameHeader {
				found(int64(at), "a frame of the election's log is longer than its file")
				return
			}
			if rest[0] == frameEntry {
				entries = append(entries, [2]int{at + frameHeader, at + frameHeader + n})
			}
			at += frameHeader + (n+7)&^7
		default:
			found(int64(at), "a frame of the election's log is not what was written")
			return
		}
	}
}
