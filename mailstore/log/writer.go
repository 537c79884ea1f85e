package log

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"time"
)

// batch is one Append.
type batch struct {
	t       *Ticket
	entries []Entry
	size    int64 // bytes on disk
	urgent  bool  // somebody waits for it
}

// check computes the size and refuses what cannot be written.
func (b *batch) check() error {
	if len(b.entries) == 0 {
		return errors.New("append of nothing")
	}
	for i := range b.entries {
		e := &b.entries[i]
		if len(e.Meta) > MaxMeta {
			return fmt.Errorf("append: meta of %d bytes is over %d", len(e.Meta), MaxMeta)
		}
		b.size += align(recordSize + int64(len(e.Meta)))
		if e.Body == nil {
			continue
		}
		if !e.Body.sealed || e.Body.gone.Load() {
			return errors.New("append: draft is not sealed, or was discarded or appended before")
		}
		if !e.Body.spooled() {
			b.size += align(e.Body.size)
		}
	}
	if b.size > maxBatch {
		return fmt.Errorf("append of %d bytes is over %d", b.size, maxBatch)
	}
	for i := range b.entries {
		if d := b.entries[i].Body; d != nil && d.gone.Swap(true) {
			return errors.New("append: draft in two entries")
		}
	}
	return nil
}

// Stats are counts since Open.
type Stats struct {
	Groups    uint64        // group writes
	Records   uint64        // records synced
	Bytes     uint64        // bytes written for them, bodies of their own not included
	Syncs     uint64        // fdatasyncs of log segments
	SyncTime  time.Duration // all of them together
	SyncMax   time.Duration // the longest
	Segments  uint64        // log segments begun
	NoSpace   uint64        // groups given up because the disk was full
	Waiting   int64         // bytes that wait now: for the writer, for Synced
	OpenFiles int           // segments open for reading now
}

// Stats returns the counts.
func (l *Log) Stats() Stats {
	n := l.files.len()
	l.mu.Lock()
	defer l.mu.Unlock()
	s := l.stats
	s.Waiting, s.OpenFiles = l.waiting, n
	return s
}

const (
	// gather bounds the group of several Appends, in bytes, so that one sync is
	// not made to wait for what came much later.
	gather = 4 << 20
	// ahead is how far the file is filled with zeros beyond a small group: a
	// sync inside written space changes no metadata and takes two thirds of the
	// time (DESIGN.md has the figures).
	ahead = 256 << 10
	// aheadMax is the largest group for which that pays.
	aheadMax = 64 << 10
)

// writer is the state of the writer goroutine.
type writer struct {
	h    *header // of the segment being written; nil before the first
	f    File
	name string
	seed uint32
	off  int64 // end of the last good group
	size int64 // end of the file, zeros included
	end  int64 // size of the segment before, when it was written by us
	prev uint64
	last uint64 // number of the last log segment
	buf  []byte
}

// write is the writer goroutine: it gathers what waits, writes it as one group,
// syncs once and answers.
func (l *Log) write() {
	defer close(l.written)
	crowded := false
	for {
		if crowded {
			l.linger()
		}
		l.hold()
		did, waited, closing := l.round()
		crowded = waited >= crowd
		switch {
		case did:
		case closing:
			l.end()
			return
		default:
			<-l.wake
		}
	}
}

// round writes the next group, if there is one, and returns how many waited for
// it.
func (l *Log) round() (did bool, waited int, closing bool) {
	bs, waited, mark, marked, closing := l.take()
	switch {
	case len(bs) > 0:
		l.writeInOrder(bs, mark)
		return true, waited, closing
	case marked && l.w.h != nil && l.Err() == nil:
		l.writeGroup(nil, mark)
		return true, 0, closing
	}
	return false, 0, closing
}

// Turn writes what waits as one group, syncs, answers, and calls Synced: one
// round of the writer and of the applier. It reports whether there was anything
// to do. Only with Options.ByHand, by one goroutine.
func (l *Log) Turn() bool {
	did, _, _ := l.round()
	return l.hand() || did
}

// drop removes the bodies of records that were refused: nothing names them, and
// nothing will.
func drop(bs []batch) {
	for i := range bs {
		for j := range bs[i].entries {
			if d := bs[i].entries[j].Body; d != nil {
				d.drop()
			}
		}
	}
}

// writeGroup writes bs as one group, syncs and answers. No batches: a group
// without records, for the mark.
func (l *Log) writeGroup(bs []batch, mark uint64) {
	w := &l.w
	if err := l.Err(); err != nil {
		l.refuse(bs, err)
		return
	}
	if l.shouldRoll() || w.h == nil || w.off >= l.opt.SegmentSize {
		if err := l.roll(bs); err != nil {
			l.giveUp(bs, fmt.Errorf("begin segment: %w", err))
			return
		}
	}
	recs := l.encode(bs, mark)
	n := int64(len(w.buf))
	if err := l.put(n); err != nil {
		err = fmt.Errorf("write group at %d of %s: %w", w.off, w.name, err)
		// The tail goes before the tickets are answered, so that what failed
		// never comes back.
		if full(err) {
			if e := l.retract(); e != nil {
				err = failure{fmt.Errorf("%w, after: %v", e, err)}
			}
		}
		l.giveUp(bs, err)
		return
	}
	if ackBeforeSync {
		answer(bs, nil)
	}
	took, err := l.sync()
	if err != nil && minded {
		err = l.die(fmt.Errorf("sync %s: %w", w.name, err))
		if !ackBeforeSync {
			l.refuse(bs, err)
		}
		return
	}
	w.off += n
	if len(recs) > 0 {
		w.prev = recs[len(recs)-1].Seq
	}
	if !ackBeforeSync {
		answer(bs, nil)
	}
	l.mu.Lock()
	var size, metas int64
	for i := range bs {
		size += bs[i].size
		for j := range bs[i].entries {
			e := &bs[i].entries[j]
			metas += int64(len(e.Meta))
			if e.Body != nil && e.Body.spooled() {
				delete(l.live, e.Body.number)
			}
		}
	}
	l.release(size - metas)
	if len(recs) > 0 {
		l.handed = append(l.handed, recs)
	}
	s := &l.stats
	s.Groups++
	s.Records += uint64(len(recs))
	s.Bytes += uint64(n)
	s.Syncs++
	s.SyncTime += took
	s.SyncMax = max(s.SyncMax, took)
	l.mu.Unlock()
	poke(l.apply)
	if cap(w.buf) > gather+(1<<20) {
		w.buf = nil
	}
}

// encode fills w.buf with the group and returns its records.
func (l *Log) encode(bs []batch, mark uint64) []Record {
	w := &l.w
	var count int
	size := int64(groupSize + sector)
	for i := range bs {
		count += len(bs[i].entries)
		size += bs[i].size
	}
	recs := make([]Record, 0, count)
	if pad := min(ahead, l.opt.SegmentSize); int64(cap(w.buf)) < size+pad {
		w.buf = make([]byte, 0, size+size/2+pad)
	}
	buf := w.buf[:groupSize]
	for i := range bs {
		for j := range bs[i].entries {
			e := &bs[i].entries[j]
			r := recHead{kind: e.Kind, seq: bs[i].t.first + uint64(j), metaLen: int64(len(e.Meta)), metaCRC: sum(e.Meta)}
			if d := e.Body; d != nil {
				r.bodyLen, r.bodyCRC = d.size, d.crc
				r.external, r.bodySeg = d.spooled(), d.number
			}
			at := len(buf)
			buf = append(buf, make([]byte, recordSize)...)
			buf = append(buf, e.Meta...)
			if e.Body != nil && !r.external {
				buf = append(buf, e.Body.mem...)
			}
			for len(buf)%alignment != 0 {
				buf = append(buf, 0)
			}
			r.encode(buf[at:], w.seed)
			recs = append(recs, r.record(w.h.number, w.off+int64(at), e.Meta))
		}
	}
	g := group{count: uint32(count), length: int64(len(buf) - groupSize), first: w.prev + 1, prev: w.prev, mark: mark}
	if count > 0 {
		g.first = recs[0].Seq
	}
	g.encode(buf, w.h, w.seed)
	w.buf = append(buf, zeroes[:alignGroup(int64(len(buf)))-int64(len(buf))]...)
	return recs
}

// put writes the n bytes of w.buf at the end, with zeros behind them when that
// makes the next syncs cheaper and there is room for them.
func (l *Log) put(n int64) error {
	w := &l.w
	if n <= aheadMax && w.off+n > w.size && w.off+n < l.opt.SegmentSize {
		pad := int(min(ahead, l.opt.SegmentSize-w.off-n))
		b := append(w.buf, zeroes[:pad]...)
		if _, err := w.f.WriteAt(b, w.off); err == nil {
			w.size = w.off + int64(len(b))
			return nil
		} else if !full(err) {
			return err
		}
	}
	_, err := w.f.WriteAt(w.buf, w.off)
	w.size = max(w.size, w.off+n)
	return err
}

var zeroes [ahead]byte

// retract cuts off what was written after the last good group, durably.
func (l *Log) retract() error {
	w := &l.w
	if err := w.f.Truncate(w.off); err != nil {
		return fmt.Errorf("cut %s at %d: %w", w.name, w.off, err)
	}
	w.size = w.off
	if _, err := l.sync(); err != nil {
		return fmt.Errorf("sync %s after the cut: %w", w.name, err)
	}
	return nil
}

func (l *Log) sync() (time.Duration, error) {
	start := time.Now()
	err := l.w.f.Sync()
	return time.Since(start), err
}

// giveUp fails bs. The log survives a full disk and nothing else.
func (l *Log) giveUp(bs []batch, err error) {
	var f failure
	if !full(err) || errors.As(err, &f) {
		l.refuse(bs, l.die(err))
		return
	}
	err = noSpace(err)
	l.mu.Lock()
	l.stats.NoSpace++
	l.mu.Unlock()
	l.opt.Refused()
	l.opt.Logger.Warn("disk full: records refused", "err", err)
	drop(bs)
	l.refuse(bs, err)
}

// failure marks an error that ends the log even if its errno is ENOSPC: what
// is on disk is not known.
type failure struct{ error }

func (f failure) Unwrap() error { return f.error }

func (l *Log) refuse(bs []batch, err error) {
	var size int64
	for i := range bs {
		size += bs[i].size
	}
	l.mu.Lock()
	l.release(size)
	l.mu.Unlock()
	answer(bs, err)
}

func answer(bs []batch, err error) {
	for i := range bs {
		bs[i].t.answer(err)
	}
}

// die ends the log and returns what it answers from now on.
func (l *Log) die(cause error) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.dead == nil {
		l.dead = fmt.Errorf("%w: %w", ErrClosed, cause)
		l.opt.Logger.Error("the log has failed: nothing more is acknowledged", "err", cause)
		close(l.failed)
		l.release(0)
	}
	return l.dead
}

// roll seals the segment being written and begins the next.
func (l *Log) roll(bs []batch) error {
	w := &l.w
	if w.h != nil {
		if err := l.seal(); err != nil {
			return err
		}
	}
	sealedAt := w.end
	first := w.prev + 1
	if len(bs) > 0 {
		first = bs[0].t.first
	}
	h := &header{epoch: l.epoch, first: first, prevEnd: w.prev, prev: w.last}
	l.mu.Lock()
	h.number, h.mark = l.number, l.mark
	l.number++
	h.floor = l.floor(h.number)
	l.mu.Unlock()
	f, err := l.begin(h)
	if err != nil {
		return err
	}
	w.h, w.f, w.name, w.seed, w.last = h, f, fileName(h.number, extLog), h.seed(), h.number
	w.off, w.size = dataStart, dataStart
	l.mu.Lock()
	l.stats.Segments++
	if n := len(l.segs); n > 0 {
		before := l.segs[n-1]
		before.until, before.size = h.prevEnd, max(before.size, sealedAt)
	}
	l.segs = append(l.segs, &segment{number: h.number, name: w.name, h: h, size: 0, until: math.MaxUint64})
	l.mu.Unlock()
	return nil
}

// shouldRoll tells once that Roll was called.
func (l *Log) shouldRoll() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	was := l.rolling
	l.rolling = false
	return was && l.w.off > dataStart
}

// floor returns the lowest body segment whose draft has no synced record yet,
// or next; l.mu is held.
func (l *Log) floor(next uint64) uint64 {
	for n := range l.live {
		next = min(next, n)
	}
	return next
}

// begin makes a log segment that holds only its header: under a temporary name
// first, so that a name of a segment always has a good header behind it.
func (l *Log) begin(h *header) (File, error) {
	var salt [8]byte
	if _, err := io.ReadFull(l.opt.Rand, salt[:]); err != nil {
		return nil, err
	}
	h.salt = binary.LittleEndian.Uint64(salt[:])
	tmp := l.path(h.number, extTemp)
	f, err := l.fs.Create(tmp)
	if err != nil {
		return nil, err
	}
	if _, err = f.WriteAt(h.encode(), 0); err == nil {
		err = l.finish(f, h.number, extLog)
	}
	if err != nil {
		f.Close()
		if full(err) {
			l.fs.Remove(tmp) // left over otherwise: the next open removes it
		}
		return nil, err
	}
	return f, nil
}

// finish syncs a temporary file and gives it its name, durably.
func (l *Log) finish(f File, number uint64, ext string) error {
	if err := f.Sync(); err != nil {
		return err // nothing was told of this file yet
	}
	return l.publish(number, ext)
}

// publish gives a synced temporary file its name, durably.
func (l *Log) publish(number uint64, ext string) error {
	if err := l.fs.Rename(l.path(number, extTemp), l.path(number, ext)); err != nil {
		return err
	}
	if err := l.syncDir(); err != nil {
		return failure{err}
	}
	return nil
}

// seal ends the segment being written: whatever is bad in it from now on is
// damage. A full disk may keep the seal out; the cut and the sync it may not.
func (l *Log) seal() error {
	w := &l.w
	if w.h == nil {
		return nil
	}
	l.mu.Lock()
	mark := l.mark
	l.mu.Unlock()
	g := group{flags: flagSeal, first: w.prev + 1, prev: w.prev, mark: mark}
	b := make([]byte, groupSize)
	g.encode(b, w.h, w.seed)
	end := w.off + groupSize
	if _, err := w.f.WriteAt(b, w.off); full(err) {
		end = w.off
	} else if err != nil {
		return failure{err}
	}
	if err := w.f.Truncate(end); err != nil {
		return failure{err}
	}
	if _, err := l.sync(); err != nil {
		return failure{err}
	}
	w.end = end
	err := w.f.Close()
	w.h, w.f = nil, nil
	if err != nil {
		return failure{err}
	}
	return nil
}

// end is the last act of the writer.
func (l *Log) end() {
	w := &l.w
	if l.Err() == nil {
		if err := l.seal(); err != nil {
			l.die(fmt.Errorf("seal %s: %w", w.name, err))
		}
	}
	if w.f != nil {
		w.f.Close()
	}
	l.mu.Lock()
	var left []uint64
	if l.dead == nil {
		for n := range l.live {
			left = append(left, n)
		}
	}
	l.mu.Unlock()
	for _, n := range left { // drafts that nobody appended
		l.fs.Remove(l.path(n, extTemp))
		l.fs.Remove(l.path(n, extBody))
	}
}

// handOn is the applier goroutine: it calls Synced.
func (l *Log) handOn() {
	defer close(l.applied)
	for {
		if l.hand() {
			continue
		}
		select {
		case <-l.written:
			l.mu.Lock()
			empty := len(l.handed) == 0
			l.mu.Unlock()
			if empty {
				return
			}
		case <-l.apply:
		}
	}
}

// hand calls Synced with the groups that are on disk; false: there were none.
func (l *Log) hand() bool {
	l.mu.Lock()
	groups := l.handed
	l.handed = nil
	l.mu.Unlock()
	for _, recs := range groups {
		var metas int64
		for i := range recs {
			metas += int64(len(recs[i].Meta))
		}
		l.opt.Synced(recs)
		l.mu.Lock()
		l.release(metas)
		l.mu.Unlock()
	}
	return len(groups) > 0
}
