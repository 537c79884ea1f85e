package log

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"slices"
	"sync/atomic"

	"posthouse/transport"
)

// Draft is a body being written: in memory up to Options.SpoolThreshold, then
// in a spool file that becomes a segment of its own. One goroutine writes and
// seals; from Seal on it is read-only.
type Draft struct {
	l      *Log
	mem    []byte // the body, or once spooled the chunk being filled
	size   int64
	crc    uint32 // of the body; once spooled of its chunks' checksums
	sealed bool
	err    error       // of an earlier Write
	gone   atomic.Bool // appended or discarded

	number uint64 // of the body segment; 0 while in memory
	h      *header
	seed   uint32
	f      File
	chunks int64
}

// NewDraft starts a body.
func (l *Log) NewDraft() *Draft { return &Draft{l: l} }

func (d *Draft) spooled() bool { return d.number != 0 }

// Write implements io.Writer. On a full disk it fails with
// transport.ErrNoSpace. After an error the draft is only good for Discard.
func (d *Draft) Write(p []byte) (int, error) {
	if d.sealed || d.gone.Load() {
		return 0, errors.New("write to a draft that is sealed or discarded")
	}
	if d.err != nil {
		return 0, d.err
	}
	if !d.spooled() {
		if int64(len(d.mem)+len(p)) <= d.l.opt.SpoolThreshold {
			d.mem = append(d.mem, p...)
			d.size += int64(len(p))
			return len(p), nil
		}
		if d.err = d.spool(); d.err != nil {
			return 0, d.err
		}
	}
	n := len(p)
	for len(p) > 0 {
		k := min(chunkSize-len(d.mem), len(p))
		d.mem = append(d.mem, p[:k]...)
		p = p[k:]
		d.size += int64(k)
		if len(d.mem) == chunkSize {
			if d.err = d.chunk(); d.err != nil {
				return n - len(p), d.err
			}
		}
	}
	return n, nil
}

// WriteString implements io.StringWriter.
func (d *Draft) WriteString(s string) (int, error) { return d.Write([]byte(s)) }

// spool moves what is in memory into a file.
func (d *Draft) spool() error {
	var salt [8]byte
	if _, err := io.ReadFull(d.l.opt.Rand, salt[:]); err != nil {
		return err
	}
	l := d.l
	l.mu.Lock()
	switch {
	case l.dead != nil:
		defer l.mu.Unlock()
		return l.dead
	case l.closing:
		defer l.mu.Unlock()
		return ErrClosed
	}
	number := l.number
	l.number++
	l.live[number] = struct{}{}
	l.mu.Unlock()
	f, err := l.fs.Create(l.path(number, extTemp))
	if err != nil {
		l.forget(number)
		return fmt.Errorf("begin spool file: %w", l.noRoom(err))
	}
	d.number, d.f = number, f
	d.h = &header{flags: flagBody, number: number, epoch: l.epoch, salt: binary.LittleEndian.Uint64(salt[:])}
	d.seed = d.h.seed()
	had := d.mem
	d.mem = make([]byte, 0, chunkStep)
	for c := range slices.Chunk(had, chunkSize) {
		d.mem = append(d.mem[:0], c...)
		if len(c) == chunkSize {
			if err := d.chunk(); err != nil {
				return err
			}
		}
	}
	return nil
}

// forget takes a body segment off the list of those that are on their way.
func (l *Log) forget(number uint64) {
	l.mu.Lock()
	delete(l.live, number)
	l.mu.Unlock()
}

// chunk writes d.mem as the next chunk.
func (d *Draft) chunk() error {
	if err := d.put(); err != nil {
		return fmt.Errorf("write spool file %s: %w", fileName(d.number, extTemp), d.l.noRoom(err))
	}
	d.chunks++
	d.mem = d.mem[:0]
	if d.chunks%spoolAhead != 0 {
		return nil
	}
	if err := d.sync(); err != nil {
		return d.failed(err)
	}
	return nil
}

// put writes the chunk when it is its turn: of many large bodies one at a time
// keeps a processor busy, and small mail is not the last of a long row.
func (d *Draft) put() error {
	d.l.chunks <- struct{}{}
	defer func() { <-d.l.chunks }()
	crc := chunkSum(d.seed, d.chunks, d.mem)
	b := binary.LittleEndian.AppendUint32(d.mem, crc)
	d.crc = crc32.Update(d.crc, castagnoli, b[len(d.mem):])
	_, err := d.f.WriteAt(b, dataStart+d.chunks*chunkStep)
	return err
}

// spoolAhead is how many chunks, 256 KiB, a spool file may have that are not on
// disk. What is handed to the disk at once is what a small message's sync has to
// wait behind, and dirty pages are memory: so large bodies go there bit by bit,
// and one at a time.
const spoolAhead = 256 << 10 / chunkSize

// sync brings the spool file to disk when it is its turn.
func (d *Draft) sync() error { return d.l.turn(d.f) }

// turn syncs a file that is written beside the log's end, one at a time.
func (l *Log) turn(f File) error {
	l.spools <- struct{}{}
	defer func() { <-l.spools }()
	return f.Sync()
}

// chunkSum binds a chunk to its segment and its place there.
func chunkSum(seed uint32, index int64, data []byte) uint32 {
	var b [8]byte
	binary.LittleEndian.PutUint64(b[:], uint64(index))
	return crc32.Update(crc32.Update(seed, castagnoli, b[:]), castagnoli, data)
}

// Seal ends the body: no more writes. A spooled one is on disk afterwards, its
// sync done by the caller's goroutine. From then on the draft is a
// transport.Body until it was appended or discarded.
func (d *Draft) Seal(ctx context.Context) error {
	if d.sealed || d.gone.Load() {
		return errors.New("seal a draft that is sealed or discarded")
	}
	if d.err == nil {
		d.err = context.Cause(ctx)
	}
	if d.err == nil && d.spooled() {
		d.err = d.settle()
	} else if d.err == nil {
		d.crc = sum(d.mem)
	}
	d.sealed = d.err == nil
	return d.err
}

func (d *Draft) settle() error {
	if len(d.mem) > 0 {
		if err := d.chunk(); err != nil {
			return err
		}
	}
	d.mem = nil
	d.h.bodySize, d.h.bodySum = d.size, d.crc
	if _, err := d.f.WriteAt(d.h.encode(), 0); err != nil {
		return fmt.Errorf("write spool file %s: %w", fileName(d.number, extTemp), d.l.noRoom(err))
	}
	err := d.sync()
	if err == nil {
		err = d.l.publish(d.number, extBody)
	}
	if err == nil {
		err = d.f.Close()
		d.f = nil
	}
	if err == nil {
		return nil
	}
	return d.failed(err)
}

// failed says what a failed sync of the spool file means.
func (d *Draft) failed(err error) error {
	err = fmt.Errorf("sync spool file %s: %w", fileName(d.number, extTemp), err)
	d.l.mu.Lock()
	closing := d.l.closing
	d.l.mu.Unlock()
	if closing { // Close has taken the file away
		return fmt.Errorf("%w: %w", ErrClosed, err)
	}
	if !full(err) {
		return d.l.die(err)
	}
	var f failure
	if errors.As(err, &f) {
		return d.l.die(err)
	}
	return d.l.noRoom(err)
}

// Discard drops a draft that will not be appended. Harmless after Append.
func (d *Draft) Discard() {
	if !d.gone.Swap(true) {
		d.drop()
	}
}

// drop removes the file. Nothing may name it.
func (d *Draft) drop() {
	d.mem = nil
	if !d.spooled() {
		return
	}
	if d.f != nil {
		d.f.Close()
		d.f = nil
	}
	// Who has read it may have left it open: its room on the disk would stay taken.
	d.l.files.forget(d.number)
	// What cannot be removed now is removed at the next open.
	if d.l.fs.Remove(d.l.path(d.number, extTemp)) != nil {
		d.l.fs.Remove(d.l.path(d.number, extBody))
	}
	d.l.forget(d.number)
}

// Size implements transport.Body.
func (d *Draft) Size() int64 { return d.size }

// Open implements transport.Body.
func (d *Draft) Open() (transport.BodyReader, error) {
	if !d.sealed {
		return nil, errors.New("open a draft that is not sealed")
	}
	if d.spooled() {
		return d.l.openBody(d.number, d.size, d.crc)
	}
	return memReader{bytes.NewReader(d.mem), d.mem}, nil
}

type memReader struct {
	*bytes.Reader
	all []byte
}

// Whole returns the body, which is in memory, not to be changed: a reader that
// knows of it need not copy.
func (m memReader) Whole() []byte { return m.all }

func (memReader) Close() error { return nil }
