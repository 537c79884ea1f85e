package log

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math"
	"path/filepath"
	"slices"
)

// Summary is what Verify read.
type Summary struct {
	Segments, Bodies int
	Records          int
	Bytes            int64  // of all files of the log
	First, Last      uint64 // sequences of the first and the last record
	Damaged          int    // calls of report
	Orphans          int    // bodies that no record names; the next open may remove them
	Leftovers        int    // unfinished files; the next open removes them
	Foreign          int    // files that are not the log's
}

// Verify reads the log in dir, every byte of it, with all checksums, bodies
// too, and reports what is not as it was written. It changes nothing. Run it on
// a log that is closed: of one that is open the last write may look unfinished.
func Verify(ctx context.Context, fs FS, dir string, report func(Damage)) (Summary, error) {
	v := &verifier{ctx: ctx, fs: fs, dir: dir, report: report, bodies: map[uint64]recHead{}}
	if err := v.run(); err != nil {
		return v.Summary, fmt.Errorf("verify log %s: %w", dir, err)
	}
	return v.Summary, nil
}

type verifier struct {
	Summary
	ctx    context.Context
	fs     FS
	dir    string
	report func(Damage)
	bodies map[uint64]recHead // by the records that name them
}

func (v *verifier) damage(d Damage) {
	v.Damaged++
	v.report(d)
}

func (v *verifier) run() error {
	d, err := readFolder(v.ctx, v.fs, v.dir)
	if err != nil {
		return err
	}
	v.Segments, v.Leftovers, v.Foreign = len(d.segs)+len(d.lost), len(d.temps), len(d.other)
	for _, x := range d.damage {
		v.damage(x)
	}
	for i, s := range d.segs {
		if err := v.segment(d, i, s); err != nil {
			return err
		}
	}
	for _, n := range slices.Sorted(maps.Keys(d.bodies)) {
		if err := v.body(n, d.bodies[n]); err != nil {
			return err
		}
	}
	for n, r := range v.bodies {
		if _, ok := d.bodies[n]; !ok {
			v.damage(Damage{File: fileName(n, extBody), What: "a body is missing", First: r.seq, Last: r.seq})
		}
	}
	return nil
}

func (v *verifier) segment(d *folder, i int, s *segment) error {
	f, err := v.fs.OpenFile(filepath.Join(v.dir, s.name))
	if err != nil {
		return err
	}
	defer f.Close()
	v.Bytes += s.size
	w := newWalker(f, s.name, s.size, s.h)
	w.strict = s.until != math.MaxUint64
	w.until, w.bodies, w.onDamage = s.until, true, v.damage
	w.onRecord = func(r *found) error {
		v.Records++
		if v.First == 0 {
			v.First = r.seq
		}
		v.Last = max(v.Last, r.seq)
		if r.external {
			v.bodies[r.bodySeg] = r.recHead
		}
		return context.Cause(v.ctx)
	}
	tail, err := w.walk()
	if err != nil {
		return err
	}
	if tail >= 0 {
		clean, err := w.zeros(tail, s.size)
		if err != nil {
			return err
		}
		if !clean {
			v.damage(Damage{File: s.name, Offset: tail, What: "the log ends in a group that is not whole: the next open cuts it if it was never finished"})
		}
	}
	if !early(w, s) {
		return nil
	}
	x := Damage{File: s.name, Offset: w.end, What: "the segment ends early", First: w.last + 1, Last: s.until}
	if next := d.segs[i+1].h; next.prev != s.number && !slices.Contains(s.h.replaces, next.prev) {
		x.File, x.Offset, x.What = fileName(next.prev, extLog), 0, "the segment is missing or has no header"
	}
	v.damage(x)
	return nil
}

// body checks a body segment, and that it is the one that its record means.
func (v *verifier) body(number uint64, size int64) error {
	name := fileName(number, extBody)
	r, named := v.bodies[number]
	if !named {
		v.Orphans++
	}
	v.Bodies++
	v.Bytes += size
	f, err := v.fs.OpenFile(filepath.Join(v.dir, name))
	if err != nil {
		return err
	}
	defer f.Close()
	h, bad, why, size, err := readHeader(f)
	if err != nil {
		return fmt.Errorf("read %s: %w", name, err)
	}
	for _, off := range bad {
		v.damage(Damage{File: name, Offset: off, What: "segment header: " + why.Error(), First: r.seq, Last: r.seq})
	}
	if h == nil {
		return nil
	}
	if h.number != number || h.flags&flagBody == 0 || named && (h.bodySize != r.bodyLen || h.bodySum != r.bodyCRC) {
		v.damage(Damage{File: name, What: "the body is another one", First: r.seq, Last: r.seq})
		return nil
	}
	o := &openFile{f: f, name: name, h: h, seed: h.seed()}
	chunks := (h.bodySize + chunkSize - 1) / chunkSize
	for i := range chunks {
		if at := dataStart + i*chunkStep; at >= size {
			v.damage(Damage{File: name, Offset: size, What: "the file ends within the body", First: r.seq, Last: r.seq})
			return nil
		}
		if err := context.Cause(v.ctx); err != nil {
			return err
		}
		if _, err := o.chunk(i); errors.Is(err, ErrDamaged) {
			v.damage(Damage{File: name, Offset: dataStart + i*chunkStep, What: "a chunk of the body is not what was written", First: r.seq, Last: r.seq})
		} else if err != nil {
			return err
		}
	}
	if end := dataStart + h.bodySize + 4*chunks; size > end {
		v.damage(Damage{File: name, Offset: end, What: "bytes after the body"})
	}
	return nil
}
