package log

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"sync/atomic"

	"posthouse/transport"
)

// files keeps segments open for reading, the least recently used closed first.
type files struct {
	l    *Log
	mu   sync.Mutex
	open map[uint64]*openFile
	tick uint64
	shut bool
}

type openFile struct {
	f    File
	name string
	h    *header
	seed uint32
	// guarded by files.mu
	users int
	used  uint64
	stale bool // to be closed by its last user
}

func newFiles(l *Log) *files { return &files{l: l, open: map[uint64]*openFile{}} }

func (c *files) len() int { c.mu.Lock(); defer c.mu.Unlock(); return len(c.open) }

// get returns the segment, opened, until put.
func (c *files) get(number uint64, ext string) (*openFile, error) {
	c.mu.Lock()
	if o := c.open[number]; o != nil {
		c.take(o)
		c.mu.Unlock()
		return o, nil
	}
	c.mu.Unlock()
	o, err := c.l.openSegment(number, ext)
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	if had := c.open[number]; had != nil || c.shut {
		if had != nil {
			c.take(had)
		} else {
			err = ErrClosed
		}
		c.mu.Unlock()
		o.f.Close()
		return had, err
	}
	c.open[number] = o
	c.take(o)
	var close []File
	for len(c.open) > c.l.opt.OpenFiles {
		var oldest uint64
		for n, o := range c.open {
			if o.users == 0 && (oldest == 0 || o.used < c.open[oldest].used) {
				oldest = n
			}
		}
		if oldest == 0 {
			break
		}
		close = append(close, c.open[oldest].f)
		delete(c.open, oldest)
	}
	c.mu.Unlock()
	for _, f := range close {
		f.Close()
	}
	return o, nil
}

// take counts a user; mu is held.
func (c *files) take(o *openFile) {
	c.tick++
	o.users++
	o.used = c.tick
}

func (c *files) put(o *openFile) {
	c.mu.Lock()
	o.users--
	last := o.stale && o.users == 0
	c.mu.Unlock()
	if last {
		o.f.Close()
	}
}

// forget closes a segment's file, or lets its last user do so.
func (c *files) forget(number uint64) {
	c.mu.Lock()
	o := c.open[number]
	delete(c.open, number)
	idle := o != nil && o.users == 0
	if o != nil {
		o.stale = true
	}
	c.mu.Unlock()
	if idle {
		o.f.Close()
	}
}

// close closes all files; those in use when their users are done.
func (c *files) close() {
	c.mu.Lock()
	c.shut = true
	var fs []File
	for n, o := range c.open {
		if o.stale = true; o.users == 0 {
			fs = append(fs, o.f)
		}
		delete(c.open, n)
	}
	c.mu.Unlock()
	for _, f := range fs {
		f.Close()
	}
}

// openSegment opens a segment and checks its header. A file that is missing or
// has no good header is ErrDamaged.
func (l *Log) openSegment(number uint64, ext string) (*openFile, error) {
	name := fileName(number, ext)
	f, err := l.fs.OpenFile(l.path(number, ext))
	if errors.Is(err, os.ErrNotExist) {
		return nil, damaged(name, 0, "the file is missing")
	}
	if err != nil {
		return nil, fmt.Errorf("open segment %s: %w", name, err)
	}
	h, bad, why, _, err := readHeader(f)
	switch {
	case err != nil:
		err = fmt.Errorf("read segment %s: %w", name, err)
	case h == nil:
		err = damaged(name, bad[0], why.Error())
	case h.number != number || (h.flags&flagBody != 0) != (ext == extBody):
		err = damaged(name, 0, fmt.Sprintf("the file is that of segment %d", h.number))
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return &openFile{f: f, name: name, h: h, seed: h.seed()}, nil
}

// readHeader reads the header of an open segment; see decodeHeader.
func readHeader(f File) (h *header, bad []int64, why error, size int64, err error) {
	if size, err = f.Size(); err != nil {
		return nil, nil, nil, 0, err
	}
	b := make([]byte, min(size, dataStart))
	if _, err := f.ReadAt(b, 0); err != nil && !errors.Is(err, io.EOF) {
		return nil, nil, nil, 0, err
	}
	h, bad, why = decodeHeader(b)
	return h, bad, why, size, nil
}

func damaged(name string, off int64, what string) error {
	return fmt.Errorf("segment %s at %d: %s: %w", name, off, what, ErrDamaged)
}

// speculative is how much is read with a record's header: most metas fit.
const speculative = 2 << 10

// Record reads the record at ref, checked.
func (l *Log) Record(ref Ref) (Record, error) { return l.RecordInto(ref, nil) }

// BufferSize is the capacity of a buffer that RecordInto needs for most records.
const BufferSize = speculative

// RecordInto is Record for callers that read many: buf is used for the meta if
// its capacity allows, so that the record is good until buf is used again.
func (l *Log) RecordInto(ref Ref, buf []byte) (Record, error) {
	o, ref, err := l.find(ref)
	if err != nil {
		return Record{}, fmt.Errorf("record %d: %w", ref.Seq, err)
	}
	defer l.files.put(o)
	r, meta, err := o.record(ref, buf)
	if err != nil {
		return Record{}, fmt.Errorf("record %d: %w", ref.Seq, err)
	}
	return r.record(ref.Segment, ref.Offset, meta), nil
}

// find opens the segment that holds the record of ref, until put, and returns
// where the record is there.
func (l *Log) find(ref Ref) (o *openFile, now Ref, err error) {
	for tried := uint64(0); ; tried = now.Segment {
		if now, err = l.resolve(ref); err != nil {
			return nil, ref, err
		}
		if o, err = l.files.get(now.Segment, extLog); err == nil {
			return o, now, nil
		}
		if now.Segment == tried { // else it may have been compacted between the two
			return nil, ref, err
		}
	}
}

// record reads and checks the header and meta at ref, into buf if it is large
// enough.
func (o *openFile) record(ref Ref, buf []byte) (r recHead, meta []byte, err error) {
	if cap(buf) < speculative {
		buf = make([]byte, speculative)
	}
	b := buf[:speculative]
	n, err := o.f.ReadAt(b, ref.Offset)
	if err != nil && !errors.Is(err, io.EOF) {
		return r, nil, fmt.Errorf("read %s at %d: %w", o.name, ref.Offset, err)
	}
	if b = b[:n]; !r.decode(b, o.seed) || r.seq != ref.Seq || r.crc != ref.CRC {
		return r, nil, damaged(o.name, ref.Offset, "no such record there")
	}
	if want := int(recordSize + r.metaLen); want <= n {
		meta = b[recordSize:want:want]
	} else {
		meta = make([]byte, r.metaLen)
		if _, err := o.f.ReadAt(meta, ref.Offset+recordSize); errors.Is(err, io.EOF) {
			return r, nil, damaged(o.name, ref.Offset, "the file ends within the record")
		} else if err != nil {
			return r, nil, fmt.Errorf("read %s at %d: %w", o.name, ref.Offset, err)
		}
	}
	if sum(meta) != r.metaCRC {
		return r, nil, damaged(o.name, ref.Offset+recordSize, "meta is not what was written")
	}
	return r, meta, nil
}

// Body returns the body of the record at ref. It opens nothing yet.
func (l *Log) Body(ref Ref) transport.Body { return &body{l: l, ref: ref} }

// BodyOfSize is Body for a caller who knows how large the body is: it need not
// be read for that.
func (l *Log) BodyOfSize(ref Ref, size int64) transport.Body {
	b := &body{l: l, ref: ref}
	b.size.Store(size + 1)
	return b
}

type body struct {
	l    *Log
	ref  Ref
	size atomic.Int64 // plus one; 0 while not known
}

// load opens the segment that holds the record, until put, and reads its
// header.
func (b *body) load() (o *openFile, r recHead, ref Ref, err error) {
	if o, ref, err = b.l.find(b.ref); err != nil {
		return nil, r, ref, err
	}
	buf, ok := b.l.buffers.Get().(*[speculative]byte)
	if !ok {
		buf = new([speculative]byte)
	}
	defer b.l.buffers.Put(buf)
	if r, _, err = o.record(ref, buf[:]); err != nil {
		b.l.files.put(o)
		return nil, r, ref, err
	}
	b.size.Store(r.bodyLen + 1)
	return o, r, ref, nil
}

// Size implements transport.Body; 0 when the record cannot be read, which Open
// then tells.
func (b *body) Size() int64 {
	if n := b.size.Load(); n > 0 {
		return n - 1
	}
	o, r, _, err := b.load()
	if err != nil {
		return 0
	}
	b.l.files.put(o)
	return r.bodyLen
}

// Open implements transport.Body.
func (b *body) Open() (transport.BodyReader, error) {
	o, r, ref, err := b.load()
	if err != nil {
		return nil, fmt.Errorf("body of record %d: %w", b.ref.Seq, err)
	}
	defer b.l.files.put(o)
	if r.external {
		br, err := b.l.openBody(r.bodySeg, r.bodyLen, r.bodyCRC)
		if err != nil {
			// Compaction may have dropped record and body since the record was read.
			if o, _, _, again := b.load(); again == nil {
				b.l.files.put(o)
			} else if errors.Is(again, ErrGone) {
				return nil, fmt.Errorf("body of record %d: %w", b.ref.Seq, ErrGone)
			}
		}
		return br, err
	}
	off := ref.Offset + recordSize + r.metaLen
	p := make([]byte, r.bodyLen)
	if n, err := o.f.ReadAt(p, off); n < len(p) && errors.Is(err, io.EOF) {
		return nil, damaged(o.name, off, "the file ends within a body")
	} else if n < len(p) {
		return nil, fmt.Errorf("read %s at %d: %w", o.name, off, err)
	}
	if sum(p) != r.bodyCRC {
		return nil, damaged(o.name, off, "a body is not what was written")
	}
	return memReader{bytes.NewReader(p), p}, nil
}

// openBody opens a body segment and checks that it is the one meant.
func (l *Log) openBody(number uint64, size int64, crc uint32) (transport.BodyReader, error) {
	o, err := l.files.get(number, extBody)
	if err != nil {
		return nil, err
	}
	if o.h.bodySize != size || o.h.bodySum != crc {
		l.files.put(o)
		return nil, damaged(o.name, 0, "the body is another one")
	}
	return &bodyReader{c: l.files, o: o}, nil
}

// bodyReader reads a body segment chunk by chunk, each checked. Its ReadAt may
// be called by several at once.
type bodyReader struct {
	c   *files
	o   *openFile
	pos int64

	mu    sync.Mutex
	data  []byte // the chunk read last, checked; not changed afterwards
	index int64
	shut  bool
}

func (r *bodyReader) chunk(index int64) ([]byte, error) {
	r.mu.Lock()
	data, at, shut := r.data, r.index, r.shut
	r.mu.Unlock()
	if shut {
		return nil, os.ErrClosed
	}
	if data != nil && at == index {
		return data, nil
	}
	data, err := r.o.chunk(index)
	if err != nil {
		return nil, err
	}
	r.mu.Lock()
	r.data, r.index = data, index
	r.mu.Unlock()
	return data, nil
}

// chunk reads and checks one chunk.
func (o *openFile) chunk(index int64) ([]byte, error) {
	n := min(chunkSize, o.h.bodySize-index*chunkSize)
	off := dataStart + index*chunkStep
	b := make([]byte, n+4)
	if got, err := o.f.ReadAt(b, off); got < len(b) && errors.Is(err, io.EOF) {
		return nil, damaged(o.name, off, "the file ends within the body")
	} else if got < len(b) {
		return nil, fmt.Errorf("read %s at %d: %w", o.name, off, err)
	}
	if chunkSum(o.seed, index, b[:n]) != le.Uint32(b[n:]) {
		return nil, damaged(o.name, off, "a chunk of the body is not what was written")
	}
	return b[:n:n], nil
}

// ReadAt implements io.ReaderAt.
func (r *bodyReader) ReadAt(p []byte, off int64) (n int, err error) {
	if off < 0 {
		return 0, errors.New("negative offset")
	}
	for n < len(p) {
		if off >= r.o.h.bodySize {
			return n, io.EOF
		}
		data, err := r.chunk(off / chunkSize)
		if err != nil {
			return n, err
		}
		k := copy(p[n:], data[off%chunkSize:])
		n += k
		off += int64(k)
	}
	return n, nil
}

// Read implements io.Reader.
func (r *bodyReader) Read(p []byte) (int, error) {
	if r.pos >= r.o.h.bodySize {
		return 0, io.EOF
	}
	p = p[:min(int64(len(p)), r.o.h.bodySize-r.pos)]
	n, err := r.ReadAt(p, r.pos)
	r.pos += int64(n)
	return n, err
}

// Close implements io.Closer.
func (r *bodyReader) Close() error {
	r.mu.Lock()
	shut := r.shut
	r.shut, r.data = true, nil
	r.mu.Unlock()
	if !shut {
		r.c.put(r.o)
	}
	return nil
}
