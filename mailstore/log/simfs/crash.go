package simfs

import (
	"maps"
	"math/rand/v2"
	"slices"
)

// Sector is the unit in which unsynced bytes survive a crash, in bytes.
const Sector = 512

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

func (t tree) clone() tree {
	return tree{files: maps.Clone(t.files), dirs: maps.Clone(t.dirs)}
}

// Copy returns a disk with the same files, all of them synced. It is meant for
// one on which nothing is open; this one stays as it is.
func (s *FS) Copy() *FS {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := New()
	out.free, out.WholeSectors = s.free, s.WholeSectors
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
	return s.image(mode, seed)
}

// Image is what After would give, and the disk goes on: for a process that
// cannot be ended at that instant. What it does from then on is to be ignored.
func (s *FS) Image(mode Mode, seed uint64) *FS {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.image(mode, seed)
}

func (s *FS) image(mode Mode, seed uint64) *FS {
	rnd := rand.New(rand.NewPCG(seed, uint64(mode)))
	t := s.durable.clone()
	for _, op := range s.pending {
		if mode == KeepAll || mode == Torn || mode == Random && rnd.IntN(2) == 0 {
			op.do(t)
		}
	}
	out := New()
	out.free, out.WholeSectors = s.free, s.WholeSectors
	out.cur.dirs = t.dirs
	copies := map[*inode]*inode{}
	for _, name := range slices.Sorted(maps.Keys(t.files)) {
		ino := t.files[name]
		if copies[ino] == nil {
			b := ino.after(mode, rnd, s.lastOp, s.WholeSectors)
			copies[ino] = &inode{cur: b, durable: slices.Clone(b), dirty: map[int64]bool{}}
		}
		out.cur.files[name] = copies[ino]
	}
	out.durable = out.cur.clone()
	return out
}

// after returns the content that a crash leaves.
func (i *inode) after(mode Mode, rnd *rand.Rand, last *write, wholeSectors bool) []byte {
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
				for k := off; k < end && !wholeSectors; k++ {
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
