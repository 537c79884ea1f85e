package imapd

import (
	"bytes"
	"errors"
	"io"

	"github.com/emersion/go-imap/v2"
	"github.com/emersion/go-imap/v2/imapserver"

	"posthouse/mailstore"
	"posthouse/mailstore/mime"
	"posthouse/transport"
)

const (
	fetchBatch   = 500      // messages whose flags are read, and set, in one go
	wholeSection = 64 << 10 // a section up to this size is read before it is announced
)

// Fetch implements imapserver.Session.
func (s *session) Fetch(w *imapserver.FetchWriter, set imap.NumSet, opt *imap.FetchOptions) error {
	at, err := s.messages(set)
	if err != nil {
		return err
	}
	marks := false // RFC 9051 section 6.4.5: BODY[] sets \Seen, BODY.PEEK[] does not
	for _, b := range opt.BodySection {
		marks = marks || !b.Peek
	}
	for _, b := range opt.BinarySection {
		marks = marks || !b.Peek
	}
	marks = marks && !s.view.readOnly
	content := opt.Envelope || opt.BodyStructure != nil || len(opt.BodySection)+len(opt.BinarySection)+len(opt.BinarySectionSize) > 0
	f := fetch{s: s, w: w, opt: opt}
	for len(at) > 0 {
		batch := at[:min(len(at), fetchBatch)]
		at = at[len(batch):]
		uids := s.view.at(batch)
		infos, err := s.view.folder.Infos(uids)
		if err != nil {
			return s.failure("fetch", err)
		}
		var marked map[mailstore.UID]mailstore.Info
		if marks {
			if marked, err = s.markSeen(infos); err != nil {
				return err
			}
		}
		for i := range infos {
			m := &infos[i]
			n, ok := s.view.number(m.UID)
			if !ok {
				continue
			}
			now, flagsToo := marked[m.UID]
			if flagsToo {
				m = &now
			}
			if s.ctx.Err() != nil {
				return s.ctx.Err()
			}
			if err := f.message(n, m, flagsToo, content); err != nil {
				return err
			}
		}
	}
	return f.late
}

// markSeen sets \Seen on those that lack it, in one record.
func (s *session) markSeen(infos []mailstore.Info) (map[mailstore.UID]mailstore.Info, error) {
	var unseen []mailstore.UID
	for i := range infos {
		if !hasFlag(infos[i].Flags, mailstore.Seen) {
			unseen = append(unseen, infos[i].UID)
		}
	}
	if len(unseen) == 0 {
		return nil, nil
	}
	changed, _, err := s.view.folder.SetFlags(s.ctx, unseen, mailstore.FlagsAdd, []mailstore.Flag{mailstore.Seen}, 0)
	if err != nil {
		return nil, s.failure("fetch", err)
	}
	m := make(map[mailstore.UID]mailstore.Info, len(changed))
	for i := range changed {
		s.view.told(&changed[i])
		m[changed[i].UID] = changed[i]
	}
	return m, nil
}

// fetch is one FETCH command.
type fetch struct {
	s     *session
	w     *imapserver.FetchWriter
	opt   *imap.FetchOptions
	late  error // what could not be read; said at the end
	flags []imap.Flag
}

// message writes the response for one message. What cannot be read is left out
// as a whole, and the command ends with NO.
func (f *fetch) message(n uint32, m *mailstore.Info, flagsToo, content bool) error {
	var msg *mailstore.Message
	var parts []item
	if content {
		var err error
		if msg, err = f.s.view.folder.Message(m.UID); errors.Is(err, mailstore.ErrExpunged) {
			return nil // its EXPUNGE follows
		} else if err == nil {
			var body transport.BodyReader
			if len(f.opt.BodySection)+len(f.opt.BinarySection)+len(f.opt.BinarySectionSize) > 0 {
				if body, err = msg.Body.Open(); err == nil {
					defer body.Close()
					parts, err = f.items(msg, body)
				}
			}
		}
		if err != nil {
			f.late = f.s.failure("fetch", err)
			return nil
		}
	}
	r := f.w.CreateMessage(n)
	if f.opt.UID {
		r.WriteUID(imap.UID(m.UID))
	}
	if f.opt.Flags || flagsToo {
		f.flags = shownFlags(f.flags, m.Flags)
		r.WriteFlags(f.flags)
	}
	if f.opt.InternalDate {
		r.WriteInternalDate(m.Received)
	}
	if f.opt.RFC822Size {
		r.WriteRFC822Size(m.Size)
	}
	if f.opt.Envelope {
		r.WriteEnvelope(shownEnvelope(&msg.Structure.Envelope))
	}
	if f.opt.BodyStructure != nil {
		r.WriteBodyStructure(shownStructure(msg.Structure.Root))
	}
	for i := range parts {
		if err := f.write(r, &parts[i]); err != nil {
			// The literal is announced and cannot be filled: nothing that
			// follows could be told from it.
			f.s.srv.log.Error("imap body", "user", f.s.user, "uid", m.UID, "err", err)
			f.s.g.abort()
			r.Close()
			return err
		}
	}
	return r.Close()
}

// item is one section, ready to be written: bytes in memory, or a source to be
// opened and its exact size.
type item struct {
	body   *imap.FetchItemBodySection
	binary *imap.FetchItemBinarySection
	length *imap.FetchItemBinarySectionSize
	size   int64
	bytes  []byte
	open   func() io.Reader
}

func (f *fetch) write(r *imapserver.FetchResponseWriter, it *item) error {
	var lw io.WriteCloser
	switch {
	case it.length != nil:
		r.WriteBinarySectionSize(it.length, uint32(it.size))
		return nil
	case it.binary != nil:
		lw = r.WriteBinarySection(it.binary, it.size)
	default:
		lw = r.WriteBodySection(it.body, it.size)
	}
	if it.open == nil {
		if _, err := lw.Write(it.bytes); err != nil {
			return err
		}
		return lw.Close()
	}
	if f.s.buffer == nil {
		f.s.buffer = make([]byte, outputBuffer)
	}
	if _, err := io.CopyBuffer(lw, onlyReader{it.open()}, f.s.buffer); err != nil {
		return err
	}
	return lw.Close()
}

type onlyReader struct{ io.Reader }

// items prepares all sections of a message, so that an error is known before
// anything is written wherever memory allows.
func (f *fetch) items(msg *mailstore.Message, body io.ReaderAt) ([]item, error) {
	var items []item
	budget := int64(1 << 20) // bytes of small sections held at once
	add := func(it item, raw func() io.Reader) error {
		if it.size <= min(wholeSection, budget) {
			budget -= it.size
			it.bytes = make([]byte, it.size)
			if _, err := io.ReadFull(raw(), it.bytes); err != nil {
				return err
			}
		} else {
			it.open = raw
		}
		items = append(items, it)
		return nil
	}
	size := msg.Body.Size()
	for _, sec := range f.opt.BodySection {
		if sec.Specifier == imap.PartSpecifierHeader && len(sec.HeaderFields)+len(sec.HeaderFieldsNot) > 0 {
			b, err := headerFields(msg.Structure.Root, size, body, sec)
			if err != nil {
				return nil, err
			}
			from, to := cut(sec.Partial, int64(len(b)))
			items = append(items, item{body: sec, size: to - from, bytes: b[from:to]})
			continue
		}
		start, end, ok := sectionOf(msg.Structure.Root, size, sec.Part, sec.Specifier)
		if !ok {
			start, end = 0, 0 // the library cannot say NIL
		}
		from, to := cut(sec.Partial, end-start)
		if err := add(item{body: sec, size: to - from}, func() io.Reader { return io.NewSectionReader(body, start+from, to-from) }); err != nil {
			return nil, err
		}
	}
	for _, sec := range f.opt.BinarySection {
		decode, n, err := binary(msg.Structure.Root, size, body, sec.Part)
		if err != nil {
			return nil, err
		}
		from, to := cut(sec.Partial, n)
		raw := func() io.Reader {
			r := decode()
			if _, err := io.CopyN(io.Discard, r, from); err != nil && from > 0 {
				return bytes.NewReader(nil)
			}
			return io.LimitReader(r, to-from)
		}
		if err := add(item{binary: sec, size: to - from}, raw); err != nil {
			return nil, err
		}
	}
	for _, sec := range f.opt.BinarySectionSize {
		_, n, err := binary(msg.Structure.Root, size, body, sec.Part)
		if err != nil {
			return nil, err
		}
		items = append(items, item{length: sec, size: n})
	}
	return items, nil
}

// cut applies a client's <offset.size> to n bytes.
func cut(p *imap.SectionPartial, n int64) (from, to int64) {
	if p == nil {
		return 0, n
	}
	from = min(max(p.Offset, 0), n)
	return from, from + min(max(p.Size, 0), n-from)
}

// binary returns a part decoded (RFC 3516): how to read it, and its size.
func binary(root *mime.Part, size int64, body io.ReaderAt, path []int) (decode func() io.Reader, n int64, err error) {
	start, end, ok := int64(0), size, true
	encoding := ""
	if len(path) > 0 {
		p := partAt(root, path)
		if p == nil {
			return func() io.Reader { return bytes.NewReader(nil) }, 0, nil
		}
		start, end = p.Body, p.End
		if len(p.Children) == 0 {
			encoding = p.Encoding
		}
	}
	raw := func() io.Reader { return io.NewSectionReader(body, start, end-start) }
	if _, ok = mime.Decode(encoding, nil); !ok {
		return nil, 0, no(imap.ResponseCodeUnknownCTE, "Unknown content transfer encoding")
	}
	switch encoding {
	case "", "7BIT", "8BIT", "BINARY":
		return raw, end - start, nil
	}
	decode = func() io.Reader { r, _ := mime.Decode(encoding, raw()); return r }
	n, err = io.Copy(io.Discard, decode())
	return decode, n, err
}

// partAt finds a part by its number (RFC 9051 section 6.4.5.1).
func partAt(root *mime.Part, path []int) *mime.Part {
	cur, top := root, true // top: cur is the body of a message, whose part 1 may be itself
	for i, n := range path {
		if i > 0 && cur.IsMessage() && len(cur.Children) == 1 && !top {
			cur, top = cur.Children[0], true
		}
		switch {
		case cur.Type == "multipart" && len(cur.Children) > 0:
			if n < 1 || n > len(cur.Children) {
				return nil
			}
			cur = cur.Children[n-1]
		case n != 1 || !top && cur.Type != "multipart":
			return nil
		}
		top = false
	}
	return cur
}

// sectionOf returns the place of a section in the message.
func sectionOf(root *mime.Part, size int64, path []int, spec imap.PartSpecifier) (start, end int64, ok bool) {
	inner := root
	if len(path) > 0 {
		p := partAt(root, path)
		switch {
		case p == nil:
			return 0, 0, false
		case spec == imap.PartSpecifierNone:
			return p.Body, p.End, true
		case spec == imap.PartSpecifierMIME:
			return p.Header, p.Body, true
		case !p.IsMessage() || len(p.Children) != 1:
			return 0, 0, false
		}
		inner = p.Children[0]
	}
	switch spec {
	case imap.PartSpecifierNone:
		return 0, size, true
	case imap.PartSpecifierHeader:
		return inner.Header, inner.Body, true
	case imap.PartSpecifierText:
		return inner.Body, inner.End, true
	}
	return 0, 0, false
}

// headerFields returns BODY[HEADER.FIELDS (…)] or its NOT. Of a header beyond
// mime.MaxHeaderSize only that much is looked at.
func headerFields(root *mime.Part, size int64, body io.ReaderAt, sec *imap.FetchItemBodySection) ([]byte, error) {
	start, end, ok := sectionOf(root, size, sec.Part, imap.PartSpecifierHeader)
	if !ok {
		return nil, nil
	}
	block := make([]byte, min(end-start, mime.MaxHeaderSize))
	if _, err := io.ReadFull(io.NewSectionReader(body, start, int64(len(block))), block); err != nil {
		return nil, err
	}
	if len(sec.HeaderFields) > 0 {
		return mime.AppendFields(nil, block, sec.HeaderFields, false), nil
	}
	return mime.AppendFields(nil, block, sec.HeaderFieldsNot, true), nil
}
