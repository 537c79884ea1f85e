package mailstore

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"strings"

	"posthouse/mailstore/mime"
	"posthouse/transport"
)

// What a mailbox serves is the body as it was accepted, with the lines of the
// final delivery before it and without the Return-Path fields of others
// (RFC 5321 section 4.4). The bytes are shared by all mailboxes, so this is put
// together when it is read.

// returnPath is the line that final delivery adds (RFC 5321 section 4.4).
func returnPath(sender string) []byte {
	clean := strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f || r == '<' || r == '>' {
			return -1
		}
		return r
	}, sender)
	return []byte("Return-Path: <" + clean + ">\r\n")
}

// maxCuts bounds the Return-Path fields that are left out of one message.
const maxCuts = 256

// foreignReturnPaths finds the Return-Path fields of a header block; whole says
// that it has all of it.
func foreignReturnPaths(header []byte, whole bool) (cuts []cut) {
	for at := 0; at < len(header) && len(cuts) < maxCuts; {
		end := fieldEnd(header, at)
		if end == len(header) && !whole {
			break // where this field ends is not known
		}
		line := header[at:end]
		if len(bytes.TrimRight(line, "\r\n")) == 0 {
			break // the empty line
		}
		if name, _, ok := bytes.Cut(line, []byte(":")); ok && bytes.EqualFold(bytes.TrimRight(name, " \t"), []byte("Return-Path")) {
			if n := len(cuts); n > 0 && cuts[n-1].To == int64(at) {
				cuts[n-1].To = int64(end)
			} else {
				cuts = append(cuts, cut{From: int64(at), To: int64(end)})
			}
		}
		at = end
	}
	return cuts
}

// fieldEnd returns where the field that starts at at ends: behind its line and
// the continuation lines.
func fieldEnd(b []byte, at int) int {
	for {
		i := bytes.IndexByte(b[at:], '\n')
		if i < 0 {
			return len(b)
		}
		first := i == 0 || i == 1 && b[at] == '\r'
		at += i + 1
		if first || at >= len(b) || b[at] != ' ' && b[at] != '\t' {
			return at
		}
	}
}

// readHeader returns the first size bytes of a body, at most mime.MaxHeaderSize.
func readHeader(b transport.Body, size int64) ([]byte, error) {
	size = min(size, b.Size(), mime.MaxHeaderSize)
	r, err := b.Open()
	if err != nil {
		return nil, err
	}
	defer r.Close()
	h := make([]byte, size)
	if n, err := r.ReadAt(h, 0); err != nil && !(errors.Is(err, io.EOF) && int64(n) == size) {
		return nil, err
	}
	return h, nil
}

// shiftStructure moves a structure by the bytes that were put before the body
// less those that were left out: all of them lie in the top header.
func shiftStructure(st *mime.Structure, by int64, received int) {
	st.Received += received
	if st.Root == nil || by == 0 {
		return
	}
	st.Root.Body += by
	st.Root.End += by
	var below func(ps []*mime.Part)
	below = func(ps []*mime.Part) { // as deep as mime.MaxDepth
		for _, p := range ps {
			p.Header += by
			p.Body += by
			p.End += by
			below(p.Children)
		}
	}
	below(st.Root.Children)
}

func decodeStructure(b []byte) (*mime.Structure, error) {
	st := &mime.Structure{}
	if err := st.UnmarshalBinary(b); err != nil {
		return nil, fmt.Errorf("decode structure: %w", err)
	}
	return st, nil
}

// compose returns body with prefix before it and without cuts.
func compose(body transport.Body, prefix []byte, cuts []cut) transport.Body {
	if len(prefix) == 0 && len(cuts) == 0 {
		return body
	}
	c := &composed{body: body}
	add := func(p piece, n int64) {
		if n > 0 {
			p.at, p.end = c.size, c.size+n
			c.pieces = append(c.pieces, p)
			c.size += n
		}
	}
	add(piece{prefix: prefix}, int64(len(prefix)))
	at := int64(0)
	for _, k := range cuts {
		add(piece{from: at}, k.From-at)
		at = k.To
	}
	add(piece{from: at}, body.Size()-at)
	return c
}

type composed struct {
	body   transport.Body
	pieces []piece
	size   int64
}

// piece is the bytes [at, end) of what is served: those of prefix, or those of
// the body that begin at from.
type piece struct {
	at, end int64
	prefix  []byte
	from    int64
}

func (c *composed) Size() int64 { return c.size }

func (c *composed) Open() (transport.BodyReader, error) {
	r, err := c.body.Open()
	if err != nil {
		return nil, err
	}
	return &composedReader{c: c, r: r}, nil
}

type composedReader struct {
	c  *composed
	r  transport.BodyReader
	at int64
}

func (r *composedReader) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	if r.at >= r.c.size {
		return 0, io.EOF
	}
	n, err := r.ReadAt(p[:min(int64(len(p)), r.c.size-r.at)], r.at)
	r.at += int64(n)
	return n, err
}

func (r *composedReader) ReadAt(p []byte, off int64) (n int, err error) {
	if off < 0 {
		return 0, errors.New("read message: negative offset")
	}
	for _, k := range r.c.pieces {
		if len(p) == n {
			return n, nil
		}
		if off >= k.end {
			continue
		}
		want := p[n:min(int64(len(p)), int64(n)+k.end-off)]
		got := 0
		if k.prefix != nil {
			got = copy(want, k.prefix[off-k.at:])
		} else if got, err = r.r.ReadAt(want, k.from+off-k.at); got < len(want) {
			if err == nil || errors.Is(err, io.EOF) {
				err = io.ErrUnexpectedEOF
			}
			return n + got, err
		}
		n += got
		off += int64(got)
	}
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (r *composedReader) Close() error { return r.r.Close() }
