package log

import (
	"bytes"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math"
)

// window reads a file forward through one buffer.
type window struct {
	f    File
	size int64 // bytes of the file that are looked at
	buf  []byte
	off  int64 // of buf[0]
}

const windowSize = 256 << 10

// at returns the n bytes at off, valid until the next call; fewer at the end of
// the file.
func (w *window) at(off int64, n int) ([]byte, error) {
	n = int(max(0, min(int64(n), w.size-off)))
	if off >= w.off && off+int64(n) <= w.off+int64(len(w.buf)) {
		return w.buf[off-w.off:][:n], nil
	}
	want := int(min(int64(max(n, windowSize)), w.size-off))
	if cap(w.buf) < want {
		w.buf = make([]byte, want)
	}
	got, err := w.f.ReadAt(w.buf[:want], off)
	w.buf, w.off = w.buf[:got], off
	if got >= n {
		return w.buf[:n], nil
	}
	if err == nil || errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return nil, err
}

// found is a record whose header and meta are good.
type found struct {
	recHead
	off  int64
	meta []byte
}

// walker goes through the groups of a log segment. It tells what is damaged
// from what was never finished: a group is only written after the one before
// it was synced, so a bad group with a good one behind it is damage, and a bad
// one with nothing behind it, in a segment without a seal, is a torn write.
type walker struct {
	win    window
	name   string
	h      *header
	seed   uint32
	until  uint64 // what stands beyond this sequence is void
	strict bool   // every record was synced: nothing is torn
	bodies bool   // check inline bodies and padding too

	onRecord func(*found) error
	onDamage func(Damage)

	last   uint64 // sequence of the last record
	mark   uint64 // highest view position
	sealed bool
	groupS int64   // start of the last good group; 0 for none
	groupH group   // its header
	groupR []found // its records
	end    int64   // end of the last good group
}

func newWalker(f File, name string, size int64, h *header) *walker {
	return &walker{win: window{f: f, size: size}, name: name, h: h, seed: h.seed(), until: math.MaxUint64,
		onRecord: func(*found) error { return nil }, onDamage: func(Damage) {},
		last: h.prevEnd, mark: h.mark, end: dataStart}
}

// walk calls onRecord for the good records in order and onDamage for what is
// between them. tail is where an unfinished group begins, or -1; it is never
// set when strict.
func (w *walker) walk() (tail int64, err error) {
	for off := int64(dataStart); off < w.win.size; {
		if w.last >= w.until {
			return -1, nil
		}
		if w.sealed {
			if clean, err := w.zeros(off, w.win.size); err == nil && !clean {
				w.onDamage(Damage{File: w.name, Offset: off, What: "bytes after the seal"})
			}
			return -1, nil
		}
		g, ok, err := w.group(off)
		if err != nil {
			return -1, err
		}
		if !ok {
			next, err := w.nextGroup(off + 1)
			if err != nil {
				return -1, err
			}
			if next < 0 && !w.strict {
				return off, nil
			}
			if next < 0 {
				if clean, err := w.zeros(off, w.win.size); err != nil || clean {
					return -1, err
				}
				next = w.win.size
			}
			if err := w.salvage(off, next); err != nil {
				return -1, err
			}
			off = next
			continue
		}
		recs, bad, soft, err := w.records(g, off)
		if err != nil {
			return -1, err
		}
		stop := off + groupSize + g.length
		if len(bad) > 0 && !w.strict {
			next, err := w.nextGroup(stop)
			if err != nil {
				return -1, err
			}
			if next < 0 {
				return off, nil
			}
		}
		if g.prev > w.last {
			w.onDamage(Damage{File: w.name, Offset: off, What: "records are missing before this group", First: w.last + 1, Last: g.prev})
		}
		for _, d := range append(bad, soft...) {
			w.onDamage(d)
		}
		if w.bodies || g.flags&flagSeal != 0 {
			clean, err := w.zeros(stop, min(alignGroup(stop), w.win.size))
			if err != nil {
				return -1, err
			}
			if !clean {
				w.onDamage(Damage{File: w.name, Offset: stop, What: "bytes after the group"})
			}
		}
		stop = min(alignGroup(stop), w.win.size)
		w.groupS, w.groupH, w.groupR, w.end = off, g, recs, stop
		w.last, w.mark = max(w.last, g.prev), max(w.mark, g.mark)
		if err := w.deliver(recs); err != nil {
			return -1, err
		}
		if g.flags&flagSeal != 0 {
			w.sealed = true
		} else if w.h.flags&flagCompacted == 0 && w.last < w.until {
			w.last = max(w.last, g.first+uint64(g.count)-1)
		}
		off = stop
	}
	return -1, nil
}

func (w *walker) deliver(recs []found) error {
	for i := range recs {
		r := &recs[i]
		if r.seq <= w.last {
			continue
		}
		if r.seq > w.until {
			return nil
		}
		w.last = r.seq
		if err := w.onRecord(r); err != nil {
			return err
		}
	}
	return nil
}

// group reads the group header at off.
func (w *walker) group(off int64) (g group, ok bool, err error) {
	b, err := w.win.at(off, groupSize)
	if err != nil {
		return g, false, fmt.Errorf("read %s at %d: %w", w.name, off, err)
	}
	ok = g.decode(b, w.h, w.seed) && g.length <= w.win.size-off-groupSize && g.first > w.last &&
		(g.flags == 0 || g.flags == flagSeal && g.count == 0)
	return g, ok, nil
}

// records reads the records of the group at off. What is bad among them is
// returned, not reported: it may be a torn write. soft is damage that leaves
// the record itself whole.
func (w *walker) records(g group, off int64) (recs []found, bad, soft []Damage, err error) {
	gaps := w.h.flags&flagCompacted != 0
	end := g.first + uint64(g.count) - 1 // of the last record, without gaps
	recs = make([]found, 0, min(g.count, 4096))
	next, hole := g.first, false
	for p, stop := off+groupSize, off+groupSize+g.length; p < stop; {
		r, ok, err := w.record(p, stop)
		if err != nil {
			return nil, nil, nil, err
		}
		if !ok || r.seq < next || !gaps && (r.seq > end || r.seq > next && !hole) {
			if !hole {
				hole = true
				bad = append(bad, Damage{File: w.name, Offset: p, What: "a record is not what was written", First: next})
			}
			p += alignment
			continue
		}
		if hole {
			hole = false
			bad[len(bad)-1].Last = r.seq - 1
		}
		if w.bodies {
			d, err := w.body(&r)
			if err != nil {
				return nil, nil, nil, err
			}
			soft = append(soft, d...)
		}
		recs = append(recs, r)
		next = r.seq + 1
		p += r.total()
	}
	switch {
	case hole && !gaps:
		bad[len(bad)-1].Last = max(end, next-1)
	case int(g.count) > len(recs) && len(bad) == 0:
		bad = append(bad, Damage{File: w.name, Offset: off, What: "the group is short of records", First: next, Last: end})
	}
	return recs, bad, soft, nil
}

// record reads the record at p, which must end by stop.
func (w *walker) record(p, stop int64) (r found, ok bool, err error) {
	b, err := w.win.at(p, recordSize)
	if err != nil {
		return r, false, fmt.Errorf("read %s at %d: %w", w.name, p, err)
	}
	if !r.decode(b, w.seed) || p+r.total() > stop {
		return r, false, nil
	}
	b, err = w.win.at(p+recordSize, int(r.metaLen))
	if err != nil {
		return r, false, fmt.Errorf("read %s at %d: %w", w.name, p, err)
	}
	if sum(b) != r.metaCRC {
		return r, false, nil
	}
	r.off, r.meta = p, bytes.Clone(b)
	return r, true, nil
}

// body checks the inline body of r and its padding.
func (w *walker) body(r *found) (bad []Damage, err error) {
	var crc uint32
	off := r.off + recordSize + r.metaLen
	stop := off + r.inline()
	for p := off; p < stop; {
		b, err := w.win.at(p, int(min(windowSize, stop-p)))
		if err != nil {
			return nil, fmt.Errorf("read %s at %d: %w", w.name, p, err)
		}
		crc = crc32.Update(crc, castagnoli, b)
		p += int64(len(b))
	}
	if !r.external && crc != r.bodyCRC {
		bad = append(bad, Damage{File: w.name, Offset: off, What: "a body is not what was written", First: r.seq, Last: r.seq})
	}
	clean, err := w.zeros(stop, r.off+r.total())
	if err == nil && !clean {
		bad = append(bad, Damage{File: w.name, Offset: stop, What: "padding is not zero"})
	}
	return bad, err
}

// nextGroup returns the offset of the first good group at or after off, -1 for
// none.
func (w *walker) nextGroup(off int64) (int64, error) {
	var salt [8]byte
	le.PutUint64(salt[:], w.h.salt)
	for off < w.win.size {
		b, err := w.win.at(off, windowSize)
		if err != nil {
			return -1, fmt.Errorf("read %s at %d: %w", w.name, off, err)
		}
		i := bytes.Index(b, salt[:])
		if i < 0 {
			off += int64(max(len(b)-7, 1))
			continue
		}
		off += int64(i)
		_, ok, err := w.group(off)
		if err != nil {
			return -1, err
		}
		if ok && off%sector == 0 {
			return off, nil
		}
		off++
	}
	return -1, nil
}

// salvage delivers the good records between off and stop, which are not in a
// good group, and reports the damage.
func (w *walker) salvage(off, stop int64) error {
	d := Damage{File: w.name, Offset: off, What: "a group is not what was written", First: w.last + 1}
	seen := false
	for p := off; p < stop; {
		r, ok, err := w.record(p, stop)
		if err != nil {
			return err
		}
		if !ok || r.seq <= w.last || r.seq > w.until {
			p += alignment
			continue
		}
		d.Last = r.seq - 1
		if d.Last >= d.First || !seen {
			w.onDamage(d)
		}
		seen = true
		if w.bodies {
			bad, err := w.body(&r)
			if err != nil {
				return err
			}
			for _, d := range bad {
				w.onDamage(d)
			}
		}
		if err := w.deliver([]found{r}); err != nil {
			return err
		}
		p += r.total()
		d.Offset, d.First = p, w.last+1
	}
	if !seen {
		w.onDamage(d)
	}
	return nil
}

// zeros reports whether the bytes from off to stop are all zero.
func (w *walker) zeros(off, stop int64) (bool, error) {
	for off < stop {
		b, err := w.win.at(off, int(min(windowSize, stop-off)))
		if err != nil {
			return false, fmt.Errorf("read %s at %d: %w", w.name, off, err)
		}
		for _, c := range b {
			if c != 0 {
				return false, nil
			}
		}
		off += int64(len(b))
	}
	return true, nil
}
