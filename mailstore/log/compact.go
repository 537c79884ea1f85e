package log

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"slices"
	"sort"
)

// ErrGone says that compaction dropped the record.
var ErrGone = errors.New("record was compacted away")

// Segment is a log segment that Compact may be asked for.
type Segment struct {
	Number    uint64
	First     uint64 // no record in it has a smaller sequence
	Last      uint64 // nor a larger one
	Bytes     int64
	Compacted bool
}

// Segments lists the log segments that are complete, in order: all but the
// last, which is being written.
func (l *Log) Segments() []Segment {
	l.mu.Lock()
	defer l.mu.Unlock()
	var out []Segment
	for _, s := range l.segs {
		if s.until != math.MaxUint64 {
			out = append(out, Segment{s.number, s.h.first, s.until, s.size, s.h.flags&flagCompacted != 0})
		}
	}
	return out
}

// Compact rewrites a segment of Segments with the records that decide keeps,
// each with its sequence and body and with the kind and meta that decide
// returns: the present state of what it made. The new segment is synced before
// the old one goes, and Refs into the old one go on working; of a dropped
// record they give ErrGone. Bodies of dropped records go too. On any error,
// damage in the old segment among them, the old one stays.
//
// decide is called in order, from this goroutine. One Compact runs at a time,
// beside Append and reads, after Replay.
func (l *Log) Compact(ctx context.Context, number uint64, decide func(Record) (keep bool, kind Kind, meta []byte)) error {
	l.mu.Lock()
	i := slices.IndexFunc(l.segs, func(s *segment) bool { return s.number == number && s.until != math.MaxUint64 })
	if i < 0 || l.compacting || l.dead != nil || l.closing {
		err := l.dead
		l.mu.Unlock()
		if err == nil {
			err = errors.New("no such segment, or busy, or closed")
		}
		return fmt.Errorf("compact segment %d: %w", number, err)
	}
	l.compacting = true
	old := l.segs[i]
	to := l.number
	l.number++
	l.mu.Unlock()
	err := l.compact(ctx, old, to, decide)
	l.mu.Lock()
	l.compacting = false
	l.mu.Unlock()
	if err != nil {
		return fmt.Errorf("compact segment %s: %w", old.name, noSpace(err))
	}
	return nil
}

func (l *Log) compact(ctx context.Context, old *segment, to uint64, decide func(Record) (bool, Kind, []byte)) error {
	h := *old.h
	h.flags, h.number = h.flags&^flagRecovered|flagCompacted, to
	h.replaces = append(slices.Clone(old.h.replaces), old.number)
	if len(h.replaces) > maxReplaces {
		return fmt.Errorf("it was compacted %d times already", maxReplaces)
	}
	var salt [8]byte
	if _, err := io.ReadFull(l.opt.Rand, salt[:]); err != nil {
		return err
	}
	h.salt = binary.LittleEndian.Uint64(salt[:])
	in, err := l.fs.OpenFile(l.path(old.number, extLog))
	if err != nil {
		return err
	}
	defer in.Close()
	tmp := l.path(to, extTemp)
	f, err := l.fs.Create(tmp)
	if err != nil {
		return err
	}
	out := &rewriter{f: f, h: &h, seed: h.seed(), off: dataStart, prev: h.prevEnd}
	dropped, err := out.copy(ctx, in, old, decide)
	if err == nil {
		err = l.finish(f, to, extLog)
	}
	if e := f.Close(); err == nil {
		err = e
	}
	if err != nil {
		var fail failure
		if errors.As(err, &fail) { // the folder's sync: which of the two will be there?
			return l.die(err)
		}
		l.fs.Remove(tmp)
		return err
	}
	s := &segment{number: to, name: fileName(to, extLog), h: &h, size: out.off, until: old.until}
	l.mu.Lock()
	l.segs[slices.Index(l.segs, old)] = s
	l.setMoved(s)
	l.mu.Unlock()
	l.files.forget(old.number)
	return l.dropOld(old.number, dropped)
}

// dropOld removes what a compacted segment replaces: the bodies first, so that
// an open in between finds the segment that tells which.
func (l *Log) dropOld(number uint64, bodies []uint64) error {
	for _, n := range bodies {
		l.files.forget(n)
		if err := l.fs.Remove(l.path(n, extBody)); err != nil {
			return err
		}
	}
	if len(bodies) > 0 {
		if err := l.syncDir(); err != nil {
			return l.die(err)
		}
	}
	return l.fs.Remove(l.path(number, extLog))
}

// setMoved notes where the records of the replaced segments are; mu is held,
// or the log is being opened.
func (l *Log) setMoved(s *segment) {
	for _, n := range s.h.replaces {
		l.moved[n] = s.number
	}
}

// rewriter writes a compacted segment.
type rewriter struct {
	f    File
	h    *header
	seed uint32
	off  int64
	prev uint64
	recs []recHead
	buf  []byte // records of the next group
}

// copy writes what decide keeps and returns the bodies that nothing names now.
func (o *rewriter) copy(ctx context.Context, in File, old *segment, decide func(Record) (bool, Kind, []byte)) (dropped []uint64, err error) {
	w := newWalker(in, old.name, old.size, old.h)
	w.strict, w.bodies, w.until = true, true, old.until
	var bad *Damage
	w.onDamage = func(d Damage) { bad = &d }
	w.onRecord = func(r *found) error {
		if err := context.Cause(ctx); err != nil {
			return err
		}
		rec := r.record(old.number, r.off, r.meta)
		rec.Compacted = old.h.flags&flagCompacted != 0
		keep, kind, meta := decide(rec)
		if !keep {
			if r.external {
				dropped = append(dropped, r.bodySeg)
			}
			return nil
		}
		if len(meta) > MaxMeta {
			return fmt.Errorf("meta of %d bytes is over %d", len(meta), MaxMeta)
		}
		return o.add(in, r, kind, meta)
	}
	if _, err := w.walk(); err != nil {
		return nil, err
	}
	if early(w, old) {
		bad = &Damage{File: old.name, Offset: w.end, What: "the segment ends early"}
	}
	if bad != nil {
		return nil, fmt.Errorf("%v: %w", *bad, ErrDamaged)
	}
	if err := o.flush(0); err != nil {
		return nil, err
	}
	if err := o.flush(flagSeal); err != nil {
		return nil, err
	}
	_, err = o.f.WriteAt(o.h.encode(), 0)
	return dropped, err
}

// early reports whether a walked segment lacks its end.
func early(w *walker, s *segment) bool {
	return s.until != math.MaxUint64 && w.last < s.until && !(w.sealed && s.h.flags&flagCompacted != 0)
}

func (o *rewriter) add(in File, r *found, kind Kind, meta []byte) error {
	head := r.recHead
	head.kind, head.metaLen, head.metaCRC = kind, int64(len(meta)), sum(meta)
	at := len(o.buf)
	o.buf = append(o.buf, make([]byte, recordSize)...)
	o.buf = append(o.buf, meta...)
	n := len(o.buf)
	o.buf = append(o.buf, make([]byte, r.inline())...)
	if got, err := in.ReadAt(o.buf[n:], r.off+recordSize+r.metaLen); got < len(o.buf)-n {
		return fmt.Errorf("read body of record %d: %w", r.seq, err)
	}
	o.buf = append(o.buf, zeroes[:align(int64(len(o.buf)))-int64(len(o.buf))]...)
	head.encode(o.buf[at:], o.seed)
	o.recs = append(o.recs, head)
	if len(o.buf) >= 1<<20 {
		return o.flush(0)
	}
	return nil
}

// flush writes what was added as a group; with flagSeal, the seal.
func (o *rewriter) flush(flags uint32) error {
	if len(o.recs) == 0 && flags == 0 {
		return nil
	}
	g := group{flags: flags, count: uint32(len(o.recs)), length: int64(len(o.buf)), first: o.prev + 1, prev: o.prev, mark: o.h.mark}
	if len(o.recs) > 0 {
		g.first = o.recs[0].seq
		o.prev, o.recs = o.recs[len(o.recs)-1].seq, o.recs[:0]
	}
	b := make([]byte, groupSize, alignGroup(groupSize+g.length))
	g.encode(b, o.h, o.seed)
	b = append(b, o.buf...)
	o.buf = o.buf[:0]
	if flags&flagSeal == 0 {
		b = b[:cap(b)]
	}
	_, err := o.f.WriteAt(b, o.off)
	o.off += int64(len(b))
	return err
}

// finishCompaction drops the segments that a compacted one replaces, where a
// stop came in between.
func (l *Log) finishCompaction(d *folder) error {
	for _, old := range d.replaced {
		i := slices.IndexFunc(d.segs, func(s *segment) bool { return slices.Contains(s.h.replaces, old.number) })
		had, err := l.named(old, d.segs[i].until)
		var has []uint64
		if err == nil {
			has, err = l.named(d.segs[i], d.segs[i].until)
		}
		if errors.Is(err, ErrDamaged) {
			// Neither goes, nor a body: a person may want the old one.
			l.found(Damage{File: old.name, What: fmt.Sprintf("it was compacted into %s but cannot be dropped: %v", d.segs[i].name, err)})
			continue
		}
		if err != nil {
			return err
		}
		dead := slices.DeleteFunc(had, func(n uint64) bool { _, ok := d.bodies[n]; return !ok || slices.Contains(has, n) })
		if err := l.dropOld(old.number, dead); err != nil {
			return err
		}
		for _, n := range dead {
			delete(d.bodies, n)
		}
	}
	return nil
}

// named lists the body segments that the records of s name; ErrDamaged when not
// all of them can be told.
func (l *Log) named(s *segment, until uint64) (out []uint64, err error) {
	f, err := l.fs.OpenFile(l.path(s.number, extLog))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	w := newWalker(f, s.name, s.size, s.h)
	w.strict, w.until = true, until
	whole := true
	w.onDamage = func(Damage) { whole = false }
	w.onRecord = func(r *found) error {
		if r.external {
			out = append(out, r.bodySeg)
		}
		return nil
	}
	if _, err := w.walk(); err != nil {
		return nil, err
	}
	if short := until != math.MaxUint64 && w.last < until && !(w.sealed && s.h.flags&flagCompacted != 0); !whole || short {
		return nil, fmt.Errorf("segment %s: %w", s.name, ErrDamaged)
	}
	return out, nil
}

// place is where a record is in a compacted segment.
type place struct {
	seq uint64
	off int64
}

// resolve returns where the record of ref is now.
func (l *Log) resolve(ref Ref) (Ref, error) {
	l.mu.Lock()
	to, ok := l.moved[ref.Segment]
	for next := to; ok; next, ok = l.moved[next] {
		to = next
	}
	l.mu.Unlock()
	if to == 0 {
		return ref, nil
	}
	o, err := l.files.get(to, extLog)
	if err != nil {
		return ref, err
	}
	defer l.files.put(o)
	places := o.places.Load()
	if places == nil {
		if places, err = o.index(); err != nil {
			return ref, err
		}
		o.places.Store(places)
	}
	ps := *places
	i := sort.Search(len(ps), func(i int) bool { return ps[i].seq >= ref.Seq })
	if i == len(ps) || ps[i].seq != ref.Seq {
		return ref, fmt.Errorf("record %d: %w", ref.Seq, ErrGone)
	}
	b := make([]byte, 4)
	if _, err := o.f.ReadAt(b, ps[i].off); err != nil {
		return ref, fmt.Errorf("read %s at %d: %w", o.name, ps[i].off, err)
	}
	return Ref{Segment: to, Offset: ps[i].off, Seq: ref.Seq, CRC: le.Uint32(b)}, nil
}

// index finds the records of a compacted segment.
func (o *openFile) index() (*[]place, error) {
	size, err := o.f.Size()
	if err != nil {
		return nil, err
	}
	w := newWalker(o.f, o.name, size, o.h)
	w.strict = true
	ps := new([]place)
	w.onRecord = func(r *found) error { *ps = append(*ps, place{r.seq, r.off}); return nil }
	_, err = w.walk()
	return ps, err
}
