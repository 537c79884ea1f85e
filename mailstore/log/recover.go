package log

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"path/filepath"
	"slices"
	"sync/atomic"
)

// segment is a log segment as found on disk.
type segment struct {
	number uint64
	name   string
	h      *header
	size   int64  // bytes of it that count
	until  uint64 // last sequence in it that counts

	places atomic.Pointer[[]place] // of a compacted segment, once asked for
}

// folder is what stands in the log's folder.
type folder struct {
	segs   []*segment // log segments with a header, in the log's order
	bodies map[uint64]int64
	temps  []string
	other  []string // not ours
	lost   []uint64 // log segments without a good header
	top    uint64   // highest number in use
	damage []Damage

	replaced []*segment // that a compacted one in segs replaces
}

// readFolder lists dir and reads the header of every log segment.
func readFolder(ctx context.Context, fs FS, dir string) (*folder, error) {
	infos, err := fs.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	d := &folder{bodies: map[uint64]int64{}}
	for _, fi := range infos {
		if err := context.Cause(ctx); err != nil {
			return nil, err
		}
		number, ext, ok := parseName(fi.Name)
		if !ok || fi.Dir {
			d.other = append(d.other, fi.Name)
			continue
		}
		d.top = max(d.top, number)
		switch ext {
		case extTemp:
			d.temps = append(d.temps, fi.Name)
		case extBody:
			d.bodies[number] = fi.Size
		case extLog:
			if err := d.add(fs, dir, fi.Name, number); err != nil {
				return nil, err
			}
		}
	}
	d.order()
	return d, nil
}

func (d *folder) add(fs FS, dir, name string, number uint64) error {
	f, err := fs.OpenFile(filepath.Join(dir, name))
	if err != nil {
		return err
	}
	defer f.Close()
	h, bad, why, size, err := readHeader(f)
	if err != nil {
		return fmt.Errorf("read %s: %w", name, err)
	}
	for _, off := range bad {
		d.damage = append(d.damage, Damage{File: name, Offset: off, What: "segment header: " + why.Error()})
	}
	if h != nil && (h.number != number || h.flags&flagBody != 0) {
		d.damage = append(d.damage, Damage{File: name, What: fmt.Sprintf("the file is that of segment %d", h.number)})
		h = nil
	}
	if h == nil {
		d.lost = append(d.lost, number)
		return nil
	}
	d.segs = append(d.segs, &segment{number: number, name: name, h: h, size: size, until: math.MaxUint64})
	return nil
}

// rank orders segments that begin at the same sequence.
func (s *segment) rank() uint64 {
	if len(s.h.replaces) > 0 {
		return slices.Min(s.h.replaces)
	}
	return s.number
}

func (s *segment) compare(o *segment) int {
	return cmp.Or(cmp.Compare(s.h.first, o.h.first), cmp.Compare(s.rank(), o.rank()))
}

// order sets aside what was compacted, sorts the segments, bounds what counts
// in each, and names the missing.
func (d *folder) order() {
	gone := map[uint64]bool{}
	for _, s := range d.segs {
		for _, n := range s.h.replaces {
			gone[n] = true
		}
	}
	d.segs = slices.DeleteFunc(d.segs, func(s *segment) bool {
		if gone[s.number] {
			d.replaced = append(d.replaced, s)
		}
		return gone[s.number]
	})
	slices.SortFunc(d.segs, (*segment).compare)
	until := uint64(math.MaxUint64)
	for _, s := range slices.Backward(d.segs) {
		s.until = until
		until = min(until, s.h.prevEnd)
	}
	before := []uint64{0}
	for _, s := range d.segs {
		if p := s.h.prev; !slices.Contains(before, p) && !slices.Contains(d.lost, p) {
			d.damage = append(d.damage, Damage{File: fileName(p, extLog), What: "the segment is missing"})
		}
		before = append(slices.Clone(s.h.replaces), s.number)
	}
}

// recover brings the log into a state that may be appended to. Whatever it
// does may end at any point and be done again.
func (l *Log) recover(ctx context.Context) error {
	d, err := readFolder(ctx, l.fs, l.opt.Dir)
	if err != nil {
		return err
	}
	rep := &l.report
	for _, name := range d.temps {
		if err := l.fs.Remove(filepath.Join(l.opt.Dir, name)); err != nil {
			return err
		}
		rep.Leftovers++
	}
	l.number = d.top + 1
	l.epoch = max(l.opt.Epoch, 1)
	for _, s := range d.segs {
		rep.Mark = max(rep.Mark, s.h.mark)
		if s.h.flags&flagCompacted != 0 {
			rep.Compacted = max(rep.Compacted, s.h.mark)
		}
		if l.opt.Epoch == 0 {
			l.epoch = max(l.epoch, s.h.epoch)
		}
	}
	for _, x := range d.damage {
		l.found(x)
	}
	if err := l.finishCompaction(d); err != nil {
		return err
	}
	rep.Sealed = len(d.segs) == 0 && len(d.lost) == 0
	if n := len(d.segs); n > 0 {
		if err := l.recoverLast(d, d.segs[n-1]); err != nil {
			return err
		}
	} else if len(d.lost) == 0 && l.opt.Position == 0 {
		if err := l.orphans(d, 0, nil); err != nil {
			return err
		}
	}
	l.segs, l.lost, l.holes = d.segs, d.lost, len(d.damage) > 0
	if n := len(d.segs); n > 0 {
		l.w.last = d.segs[n-1].number
	}
	l.w.prev = rep.End
	rep.LostEnd = rep.End < max(l.opt.Position, rep.Mark)
	rep.Segments, rep.Bodies = len(d.segs), len(d.bodies)
	l.mark = rep.Mark
	l.next = max(rep.End, l.opt.Position, rep.Mark) + 1
	if rep.LostEnd {
		l.opt.Logger.Error("the log ends before the view: it has lost records", "end", rep.End, "position", l.opt.Position, "mark", rep.Mark)
	}
	return nil
}

// recoverLast looks through the last segment: the only one in which a write
// may not have been finished.
func (l *Log) recoverLast(d *folder, s *segment) error {
	f, err := l.fs.OpenFile(l.path(s.number, extLog))
	if err != nil {
		return err
	}
	defer f.Close()
	rep := &l.report
	var named []uint64
	whole := true
	walk := func(strict bool) (*walker, int64, error) {
		named, whole = nil, true
		var damage []Damage
		w := newWalker(f, s.name, s.size, s.h)
		w.strict = strict
		w.onDamage = func(x Damage) { damage = append(damage, x); whole = false }
		w.onRecord = func(r *found) error {
			if r.external {
				named = append(named, r.bodySeg)
			}
			return nil
		}
		tail, err := w.walk()
		if err == nil && !strict && !w.sealed {
			tail, err = w.doubt(tail, l.opt.Position)
		}
		for _, x := range damage {
			l.found(x)
		}
		return w, tail, err
	}
	w, tail, err := walk(false)
	if err != nil {
		return err
	}
	end := w.last
	torn := tail == w.groupS && tail > 0 // the last group, good but for a body
	if torn {
		end = w.groupH.prev
	}
	cut := int64(0)
	if tail >= 0 {
		clean, err := w.zeros(tail, s.size)
		if err != nil {
			return err
		}
		if !clean {
			cut = s.size - tail
		}
	}
	switch {
	case cut > 0 && end < l.opt.Position:
		// Some of it was synced: this is damage, and stays for a person to see.
		if w, _, err = walk(true); err != nil {
			return err
		}
		end, torn = w.last, false
	case cut > 0:
		for _, r := range w.groupR {
			if torn && r.external {
				named = slices.DeleteFunc(named, func(n uint64) bool { return n == r.bodySeg })
			}
		}
		if err := cutTail(f, tail); err != nil {
			return fmt.Errorf("cut the unfinished end of %s: %w", s.name, err)
		}
		s.size = tail
		rep.Cut = append(rep.Cut, Cut{File: s.name, Offset: tail, Bytes: cut})
		l.opt.Logger.Info("cut an unfinished write off the log", "file", s.name, "offset", tail, "bytes", cut)
	case tail >= 0:
		s.size = tail
	}
	rep.End, rep.Sealed, rep.Mark = end, w.sealed, max(rep.Mark, w.mark)
	for _, n := range named {
		if _, ok := d.bodies[n]; !ok {
			l.found(Damage{File: fileName(n, extBody), What: "a body is missing"})
			whole = false
		}
	}
	if whole && len(d.lost) == 0 && len(d.damage) == 0 && end >= max(l.opt.Position, rep.Mark) {
		if err := l.orphans(d, s.h.floor, named); err != nil {
			return err
		}
	}
	if w.sealed || torn || len(w.groupR) == 0 || w.groupR[0].seq <= l.opt.Position {
		return nil
	}
	return l.writeAgain(d, s, w, f)
}

func cutTail(f File, at int64) error {
	if err := f.Truncate(at); err != nil {
		return err
	}
	return f.Sync()
}

// doubt checks the inline bodies of the last group, which may be torn unless
// the view says that it was synced; it returns its start then, else tail. (What
// follows it does not help: it may be zeros, garbled, of the same write.)
func (w *walker) doubt(tail int64, position uint64) (int64, error) {
	if len(w.groupR) == 0 || w.groupR[0].seq <= position {
		return tail, nil
	}
	for i := range w.groupR {
		bad, err := w.body(&w.groupR[i])
		if err != nil || len(bad) > 0 {
			return w.groupS, err
		}
	}
	return tail, nil
}

// orphans removes the body segments that no record names. Those below floor
// are settled; named are those of the last segment. An older segment can name
// a body only if it was not complete when the body got its number: if the
// segment after it has a higher one. Where any of them is damaged nothing is
// removed.
func (l *Log) orphans(d *folder, floor uint64, named []uint64) error {
	var loose []uint64
	for n := range d.bodies {
		if n >= floor && !slices.Contains(named, n) {
			loose = append(loose, n)
		}
	}
	for i := len(d.segs) - 1; i > 0 && len(loose) > 0 && d.segs[i].rank() > slices.Min(loose); i-- {
		more, err := l.named(d.segs[i-1], d.segs[i-1].until)
		if errors.Is(err, ErrDamaged) {
			return nil
		}
		if err != nil {
			return err
		}
		loose = slices.DeleteFunc(loose, func(n uint64) bool { return slices.Contains(more, n) })
	}
	for _, n := range loose {
		if err := l.fs.Remove(l.path(n, extBody)); err != nil {
			return err
		}
		delete(d.bodies, n)
		l.report.Orphans++
	}
	return nil
}

// writeAgain writes the last group of a log that ended without a seal into a
// segment of its own, synced, before anyone sees it: if the process before us
// died of a failed sync, the cache shows good bytes that will never reach the
// disk. Groups before it were synced, or it would not have been written.
func (l *Log) writeAgain(d *folder, s *segment, w *walker, f File) error {
	var salt [8]byte
	if _, err := io.ReadFull(l.opt.Rand, salt[:]); err != nil {
		return err
	}
	h := &header{flags: flagRecovered, number: l.number, epoch: s.h.epoch, salt: binary.LittleEndian.Uint64(salt[:]),
		first: w.groupH.first, prevEnd: w.groupH.prev, prev: s.number, floor: l.number, mark: l.report.Mark}
	l.number++
	seed := h.seed()
	b := append(h.encode(), make([]byte, groupSize)...)
	for i := range w.groupR {
		r := w.groupR[i].recHead
		at := len(b)
		b = append(b, make([]byte, recordSize)...)
		b = append(b, w.groupR[i].meta...)
		body := make([]byte, r.inline())
		if n, err := f.ReadAt(body, w.groupR[i].off+recordSize+r.metaLen); n < len(body) {
			return fmt.Errorf("read %s again: %w", s.name, err)
		}
		b = append(b, body...)
		for len(b)%alignment != 0 {
			b = append(b, 0)
		}
		r.encode(b[at:], seed)
	}
	g := w.groupH
	g.length = int64(len(b) - dataStart - groupSize)
	g.encode(b[dataStart:], h, seed)
	seal := group{flags: flagSeal, first: w.last + 1, prev: w.last, mark: h.mark}
	b = append(b, make([]byte, alignGroup(int64(len(b)))-int64(len(b))+groupSize)...)
	seal.encode(b[len(b)-groupSize:], h, seed)

	out, err := l.fs.Create(l.path(h.number, extTemp))
	if err != nil {
		return err
	}
	if _, err = out.WriteAt(b, 0); err == nil {
		err = l.finish(out, h.number, extLog)
	}
	if e := out.Close(); err == nil {
		err = e
	}
	if err != nil {
		return fmt.Errorf("write the last group of %s again: %w", s.name, err)
	}
	s.until = min(s.until, h.prevEnd)
	d.segs = append(d.segs, &segment{number: h.number, name: fileName(h.number, extLog), h: h, size: int64(len(b)), until: math.MaxUint64})
	l.report.Recovered = len(w.groupR)
	return nil
}

// found adds damage to the report, once.
func (l *Log) found(x Damage) {
	l.mu.Lock()
	known := slices.Contains(l.report.Damage, x)
	if !known {
		l.report.Damage = append(l.report.Damage, x)
	}
	l.mu.Unlock()
	if !known {
		l.opt.Logger.Error("the log is damaged", "file", x.File, "offset", x.Offset, "what", x.What, "first", x.First, "last", x.Last)
	}
}

// Replay calls f with every record whose Seq is at least from, in order. Only
// before the first Append. An error of f ends it. Damage does not: it goes into
// the Report and the records behind it follow.
func (l *Log) Replay(ctx context.Context, from uint64, f func(Record) error) error {
	for i, s := range l.segs {
		if s.until < from {
			continue
		}
		w, err := l.replay(ctx, s, from, f)
		if err != nil {
			return err
		}
		if !early(w, s) {
			continue
		}
		x := Damage{File: s.name, Offset: w.end, What: "the segment ends early", First: w.last + 1, Last: s.until}
		if next := l.segs[i+1].h; next.prev != s.number && !slices.Contains(s.h.replaces, next.prev) {
			x.File, x.Offset, x.What = fileName(next.prev, extLog), 0, "the segment is missing or has no header"
		}
		l.found(x)
	}
	return nil
}

// Latest calls f with the records of a kind, the newest first, until it returns
// false. Only before the first Append. Damage is passed over.
func (l *Log) Latest(ctx context.Context, kind Kind, f func(Record) bool) error {
	for _, s := range slices.Backward(l.segs) {
		var found []Record
		if _, err := l.each(ctx, s, 0, func(Damage) {}, func(r Record) error {
			if r.Kind == kind {
				found = append(found, r)
			}
			return nil
		}); err != nil {
			return err
		}
		for _, r := range slices.Backward(found) {
			if !f(r) {
				return nil
			}
		}
	}
	return nil
}

func (l *Log) replay(ctx context.Context, s *segment, from uint64, f func(Record) error) (*walker, error) {
	return l.each(ctx, s, from, l.found, f)
}

func (l *Log) each(ctx context.Context, s *segment, from uint64, onDamage func(Damage), f func(Record) error) (*walker, error) {
	file, err := l.fs.OpenFile(l.path(s.number, extLog))
	if err != nil {
		return nil, fmt.Errorf("replay: %w", err)
	}
	defer file.Close()
	w := newWalker(file, s.name, s.size, s.h)
	w.strict, w.until, w.onDamage = true, s.until, onDamage
	w.onRecord = func(r *found) error {
		if r.seq < from {
			return nil
		}
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		rec := r.record(s.number, r.off, r.meta)
		rec.Compacted = s.h.flags&flagCompacted != 0
		return f(rec)
	}
	if _, err := w.walk(); err != nil {
		return nil, fmt.Errorf("replay: %w", err)
	}
	return w, nil
}
