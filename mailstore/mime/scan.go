package mime

import (
	"bytes"
	"fmt"
	"io"
)

// bufferSize is the longest piece of a line that the scanner hands out.
const bufferSize = 32 << 10

// scanner cuts a message into lines, reading each byte once. A line longer than
// its buffer comes in pieces.
type scanner struct {
	r    io.ReaderAt
	size int64
	read int64 // bytes read so far: the place of the end of what buf holds
	buf  []byte
	pos  int  // next byte of buf to hand out
	n    int  // bytes in buf
	mid  bool // the last piece had no line end
	err  error
}

// whole is a source that has all of its bytes in memory.
type whole interface{ Whole() []byte }

func newScanner(r io.ReaderAt, size int64) *scanner {
	if w, ok := r.(whole); ok && size > 0 && size <= bufferSize {
		if b := w.Whole(); int64(len(b)) == size {
			return &scanner{r: r, size: size, read: size, buf: b, n: len(b)} // never filled again
		}
	}
	return &scanner{r: r, size: size, buf: make([]byte, min(max(size, 1), bufferSize))}
}

// next returns the next line with its line end, or a piece of one, and where it
// starts. first is false for the pieces after a line's first. The bytes are
// valid until the next call. At the end, or on an error, line is nil.
func (s *scanner) next() (line []byte, start int64, first bool) {
	for {
		i := bytes.IndexByte(s.buf[s.pos:s.n], '\n')
		if i < 0 && s.read < s.size && (s.pos > 0 || s.n < len(s.buf)) {
			if !s.fill() {
				return nil, 0, false
			}
			continue
		}
		if s.pos == s.n {
			return nil, 0, false
		}
		end := s.n
		if i >= 0 {
			end = s.pos + i + 1
		}
		line, start, first = s.buf[s.pos:end], s.read-int64(s.n-s.pos), !s.mid
		s.pos, s.mid = end, i < 0
		return line, start, first
	}
}

// fill moves what is left to the front and reads behind it.
func (s *scanner) fill() bool {
	s.n = copy(s.buf, s.buf[s.pos:s.n])
	s.pos = 0
	want := int(min(int64(len(s.buf)-s.n), s.size-s.read))
	n, err := s.r.ReadAt(s.buf[s.n:s.n+want], s.read)
	s.n += n
	s.read += int64(n)
	if n < want {
		if err == nil || err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		s.err = fmt.Errorf("read message at %d of %d: %w", s.read, s.size, err)
		return false
	}
	return true
}
