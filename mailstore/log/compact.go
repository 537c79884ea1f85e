package log

import (
	"cmp"
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
	Bodies    int64 // bytes of the bodies of their own that were begun while it was: most of those that it names
	Compacted bool
}

// Usage is what the log takes on disk.
type Usage struct {
	Bytes    int64     // of all files
	Segments []Segment // those that are complete: all but the last, which is being written
}

// Segments lists the log segments that are complete, in order, without Bodies.
func (l *Log) Segments() []Segment {
	l.mu.Lock()
	defer l.mu.Unlock()
	var out []Segment
	for _, s := range l.segs {
		if s.until != math.MaxUint64 {
			out = append(out, s.info())
		}
	}
	return out
}

func (s *segment) info() Segment {
	return Segment{Number: s.number, First: s.h.first, Last: s.until, Bytes: s.size, Compacted: s.h.flags&flagCompacted != 0}
}

// Usage reads the sizes of all files.
func (l *Log) Usage() (u Usage, err error) {
	infos, err := l.fs.ReadDir(l.opt.Dir)
	if err != nil {
		return u, fmt.Errorf("read the log's folder: %w", err)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	type place struct {
		rank uint64
		at   int // in u.Segments
	}
	var ranks []place
	for _, s := range l.segs {
		ranks = append(ranks, place{s.rank(), len(u.Segments)})
		if s.until != math.MaxUint64 {
			u.Segments = append(u.Segments, s.info())
		}
	}
	slices.SortFunc(ranks, func(a, b place) int { return cmp.Compare(a.rank, b.rank) })
	for _, fi := range infos {
		u.Bytes += fi.Size
		number, ext, ok := parseName(fi.Name)
		if !ok || ext != extBody {
			continue
		}
		i := sort.Search(len(ranks), func(i int) bool { return ranks[i].rank > number })
		if i > 0 && ranks[i-1].at < len(u.Segments) {
			u.Segments[ranks[i-1].at].Bodies += fi.Size
		}
	}
	return u, nil
}

// Roll makes the next group begin a segment, so that the one before is
// complete and may be compacted.
func (l *Log) Roll() { l.mu.Lock(); l.rolling = true; l.mu.Unlock() }

// MaxMerge is how many segments one Compact takes at most.
const MaxMerge = 40

// Compact rewrites a segment of Segments, or several adjacent ones as one, with
// the records that decide keeps, each with its sequence and body and with the
// kind and meta that decide returns. The new segment is synced before the old
// ones go, and Refs into those go on working; of a dropped record they give
// ErrGone. Bodies of dropped records go too. On any error, damage in an old
// segment among them, the old ones stay.
//
// From now on the log by itself does not tell what was before mark, a position
// at which the view is durable: see Report.Compacted.
//
// decide is called in order, from this goroutine. One Compact runs at a time,
// beside Append and reads, after Replay.
func (l *Log) Compact(ctx context.Context, numbers []uint64, mark uint64, decide func(Record) (keep bool, kind Kind, meta []byte)) (Segment, error) {
	l.mu.Lock()
	olds, next, err := l.adjacent(numbers)
	if err == nil && l.dead != nil {
		err = l.dead
	}
	if err != nil {
		l.mu.Unlock()
		return Segment{}, fmt.Errorf("compact segments %d: %w", numbers, err)
	}
	l.compacting = true
	to := l.number
	l.number++
	l.mu.Unlock()
	s, err := l.compact(ctx, olds, next, to, mark, decide)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.compacting = false
	if err != nil {
		return Segment{}, fmt.Errorf("compact segment %s: %w", olds[0].name, noSpace(err))
	}
	return s.info(), nil
}

// adjacent returns the segments of these numbers and the one after them; mu is
// held.
func (l *Log) adjacent(numbers []uint64) (olds []*segment, next *segment, err error) {
	i := slices.IndexFunc(l.segs, func(s *segment) bool { return len(numbers) > 0 && s.number == numbers[0] })
	switch {
	case l.compacting || l.stuck || l.closing:
		return nil, nil, errors.New("the log is busy or closed")
	case i < 0 || i+len(numbers) >= len(l.segs):
		return nil, nil, errors.New("no such complete segment")
	case len(numbers) > MaxMerge:
		return nil, nil, fmt.Errorf("more than %d segments", MaxMerge)
	}
	for k, n := range numbers {
		if l.segs[i+k].number != n {
			return nil, nil, errors.New("the segments are not adjacent")
		}
	}
	return slices.Clone(l.segs[i : i+len(numbers)]), l.segs[i+len(numbers)], nil
}

func (l *Log) compact(ctx context.Context, olds []*segment, next *segment, to, mark uint64, decide func(Record) (bool, Kind, []byte)) (*segment, error) {
	h := *olds[0].h
	h.flags, h.number, h.mark = h.flags&^flagRecovered|flagCompacted, to, max(h.mark, mark)
	// It names the files that it replaces, which a crash may leave behind, the
	// lowest number that ever stood here, for the order, and the one that the
	// next segment knows as the one before it.
	before := []uint64{}
	h.replaces = []uint64{olds[0].rank()}
	for _, s := range olds {
		h.mark = max(h.mark, s.h.mark)
		h.replaces = append(h.replaces, s.number)
		before = append(append(before, s.number), s.h.replaces...)
	}
	if slices.Contains(before, next.h.prev) {
		h.replaces = append(h.replaces, next.h.prev)
	}
	slices.Sort(h.replaces)
	h.replaces = slices.Compact(h.replaces)
	var salt [8]byte
	if _, err := io.ReadFull(l.opt.Rand, salt[:]); err != nil {
		return nil, err
	}
	h.salt = binary.LittleEndian.Uint64(salt[:])
	tmp := l.path(to, extTemp)
	f, err := l.fs.Create(tmp)
	if err != nil {
		return nil, err
	}
	out := &rewriter{f: f, sync: func() error { return l.turn(f) }, h: &h, seed: h.seed(), off: dataStart, prev: h.prevEnd}
	for _, old := range olds {
		if err == nil {
			err = l.copy(ctx, out, old, decide)
		}
	}
	if err == nil {
		err = out.end()
	}
	if err == nil {
		err = l.finish(f, to, extLog)
	}
	if e := f.Close(); err == nil {
		err = e
	}
	if err != nil {
		var fail failure
		if errors.As(err, &fail) { // the folder's sync: which of the two will be there?
			return nil, l.die(err)
		}
		l.fs.Remove(tmp)
		return nil, err
	}
	s := &segment{number: to, name: fileName(to, extLog), h: &h, size: out.off, until: olds[len(olds)-1].until}
	s.places.Store(&out.places)
	l.mu.Lock()
	i := slices.Index(l.segs, olds[0])
	l.segs = slices.Concat(l.segs[:i], []*segment{s}, l.segs[i+len(olds):])
	l.mu.Unlock()
	numbers := make([]uint64, len(olds))
	for i, old := range olds {
		numbers[i] = old.number
		l.files.forget(old.number)
	}
	if err := l.dropOld(numbers, out.dropped); err != nil {
		// Were they replaced once more, nothing would name what is left of them.
		l.mu.Lock()
		l.stuck = true
		l.mu.Unlock()
		return nil, fmt.Errorf("remove what was replaced, no more is compacted until the next start: %w", err)
	}
	return s, nil
}

// dropOld removes what a compacted segment replaces: the bodies first, so that
// an open in between finds the segments that tell which, then these from the
// first to the last, so that of each the one after it tells where it ends.
func (l *Log) dropOld(numbers, bodies []uint64) error {
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
	for i, n := range numbers {
		if err := l.fs.Remove(l.path(n, extLog)); err != nil {
			return err
		}
		if i < len(numbers)-1 {
			if err := l.syncDir(); err != nil {
				return l.die(err)
			}
		}
	}
	return nil
}

// rewriter writes a compacted segment.
type rewriter struct {
	f    File
	sync func() error
	h    *header
	seed uint32
	off  int64
	prev uint64
	recs []recHead
	buf  []byte // records of the next group

	places  []place  // of the records written
	dropped []uint64 // bodies that nothing names now
}

// copy writes what decide keeps of old.
func (l *Log) copy(ctx context.Context, out *rewriter, old *segment, decide func(Record) (bool, Kind, []byte)) error {
	in, err := l.fs.OpenFile(l.path(old.number, extLog))
	if err != nil {
		return err
	}
	defer in.Close()
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
				out.dropped = append(out.dropped, r.bodySeg)
			}
			return nil
		}
		if len(meta) > MaxMeta {
			return fmt.Errorf("meta of %d bytes is over %d", len(meta), MaxMeta)
		}
		return out.add(in, r, kind, meta)
	}
	if _, err := w.walk(); err != nil {
		return err
	}
	if early(w, old) {
		bad = &Damage{File: old.name, Offset: w.end, What: "the segment ends early"}
	}
	if bad != nil {
		return fmt.Errorf("%v: %w", *bad, ErrDamaged)
	}
	return nil
}

// end writes what is left, the seal, and the header, which makes it a segment.
func (o *rewriter) end() error {
	if err := o.flush(0); err != nil {
		return err
	}
	if err := o.flush(flagSeal); err != nil {
		return err
	}
	_, err := o.f.WriteAt(o.h.encode(), 0)
	return err
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
	o.places = append(o.places, place{head.seq, o.off + groupSize + int64(at)})
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
	if _, err := o.f.WriteAt(b, o.off); err != nil {
		return err
	}
	o.off += int64(len(b))
	return o.sync() // a little at a time: the syncs of mail wait behind it
}

// finishCompaction drops the segments that a compacted one replaces, where a
// stop came in between.
func (l *Log) finishCompaction(d *folder) error {
	slices.SortFunc(d.replaced, (*segment).compare)
	after := map[*segment]uint64{}
	for _, old := range slices.Backward(d.replaced) {
		i := slices.IndexFunc(d.segs, func(s *segment) bool { return slices.Contains(s.h.replaces, old.number) })
		if i < 0 { // replaced by one that was replaced itself
			continue
		}
		old.until = d.segs[i].until
		if u, ok := after[d.segs[i]]; ok {
			old.until = min(old.until, u)
		}
		after[d.segs[i]] = old.h.prevEnd
	}
	for _, old := range d.replaced {
		i := slices.IndexFunc(d.segs, func(s *segment) bool { return slices.Contains(s.h.replaces, old.number) })
		if i < 0 {
			continue
		}
		had, err := l.named(old, old.until)
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
		if err := l.dropOld([]uint64{old.number}, dead); err != nil {
			return err
		}
		if err := l.syncDir(); err != nil {
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

// resolve returns where the record of ref is now: what was compacted is found
// by its sequence.
func (l *Log) resolve(ref Ref) (Ref, error) {
	for {
		s := l.holder(ref)
		if s == nil {
			return ref, nil
		}
		ps := s.places.Load()
		if ps == nil {
			var err error
			if ps, err = l.index(s); err != nil {
				if l.holder(ref) != s { // compacted again in between
					continue
				}
				return ref, err
			}
			s.places.Store(ps)
		}
		i := sort.Search(len(*ps), func(i int) bool { return (*ps)[i].seq >= ref.Seq })
		if i == len(*ps) || (*ps)[i].seq != ref.Seq {
			if l.holes { // it may have been in a segment that is missing
				return ref, fmt.Errorf("record %d is not in %s, and the log has damage: %w", ref.Seq, s.name, ErrDamaged)
			}
			return ref, fmt.Errorf("record %d: %w", ref.Seq, ErrGone)
		}
		o, err := l.files.get(s.number, extLog)
		if err != nil {
			if l.holder(ref) != s {
				continue
			}
			return ref, err
		}
		b := make([]byte, 4)
		_, err = o.f.ReadAt(b, (*ps)[i].off)
		l.files.put(o)
		if err != nil {
			return ref, fmt.Errorf("read %s at %d: %w", o.name, (*ps)[i].off, err)
		}
		return Ref{Segment: s.number, Offset: (*ps)[i].off, Seq: ref.Seq, CRC: le.Uint32(b)}, nil
	}
}

// holder returns the compacted segment that took over from the one that ref
// names; nil when the record stands where ref says, or nowhere.
func (l *Log) holder(ref Ref) *segment {
	l.mu.Lock()
	defer l.mu.Unlock()
	i := sort.Search(len(l.segs), func(i int) bool { return l.segs[i].h.first > ref.Seq }) - 1
	if i < 0 || l.segs[i].number == ref.Segment || l.segs[i].h.flags&flagCompacted == 0 || slices.Contains(l.lost, ref.Segment) {
		return nil
	}
	return l.segs[i]
}

// index finds the records of a compacted segment. It is kept: 16 bytes a record.
func (l *Log) index(s *segment) (*[]place, error) {
	o, err := l.files.get(s.number, extLog)
	if err != nil {
		return nil, err
	}
	defer l.files.put(o)
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
