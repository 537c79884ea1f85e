package imapd

import (
	"errors"
	"fmt"
	"io"

	"github.com/emersion/go-imap/v2"

	"posthouse/mailstore"
	"posthouse/mailstore/mime"
)

// Append implements imapserver.Session. The message is kept byte for byte, as
// the client sent it; whatever of r is not read here the library reads and drops.
func (s *session) Append(name string, r imap.LiteralReader, opt *imap.AppendOptions) (*imap.AppendData, error) {
	f, err := s.mb.Folder(folderName(name))
	if errors.Is(err, mailstore.ErrNoFolder) {
		return nil, no(imap.ResponseCodeTryCreate, "No such folder")
	}
	if err != nil {
		return nil, s.failure("append", err)
	}
	flags, err := storedFlags(opt.Flags)
	if err != nil {
		return nil, err
	}
	if r.Size() == 0 {
		return nil, no(imap.ResponseCodeCannot, "An empty message cannot be kept")
	}
	if err := s.srv.deps.Admit(s.ctx, r.Size()); err != nil {
		return nil, s.failure("append", err)
	}
	d := s.srv.deps.NewDraft()
	defer d.Discard()
	if s.buffer == nil {
		s.buffer = make([]byte, outputBuffer)
	}
	// Only a whole message counts: a client that goes away in the middle
	// leaves nothing.
	n, err := io.CopyBuffer(d, onlyReader{r}, s.buffer)
	if err == nil && n != r.Size() {
		err = io.ErrUnexpectedEOF
	}
	if err != nil {
		return nil, s.failure("append", fmt.Errorf("read message: %w", err))
	}
	if err := d.Seal(s.ctx); err != nil {
		return nil, s.failure("append", err)
	}
	body, err := d.Open()
	if err != nil {
		return nil, s.failure("append", err)
	}
	st, err := mime.Parse(body, d.Size())
	body.Close()
	if err != nil {
		return nil, s.failure("append", err)
	}
	validity, uids, err := f.Append(s.ctx, []mailstore.AppendMessage{{Draft: d, Structure: st, Flags: flags, Received: opt.Time}})
	if err != nil {
		return nil, s.failure("append", err)
	}
	if len(uids) != 1 {
		return nil, s.failure("append", fmt.Errorf("one message got %d UIDs", len(uids)))
	}
	return &imap.AppendData{UID: imap.UID(uids[0]), UIDValidity: validity}, nil
}
