package imapd

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/emersion/go-imap/v2"
	"github.com/emersion/go-imap/v2/imapserver"

	"posthouse/mailstore"
	"posthouse/transport"
)

// session is one connection's state. The library calls it from one goroutine,
// and Idle from a second one during IDLE.
type session struct {
	srv  *Server
	conn *imapserver.Conn
	g    *guard
	addr netip.Addr

	ctx    context.Context // ends with the connection
	cancel context.CancelFunc

	user   string
	tries  int // failed logins
	mb     *mailstore.Mailbox
	view   *view           // of the selected folder, or nil
	saved  []mailstore.UID // SEARCH RETURN (SAVE), RFC 5182
	buffer []byte          // for bodies

	mu     sync.Mutex
	closed bool
	idlers sync.WaitGroup // Idle calls; none begins once closed
}

var _ imapserver.SessionIMAP4rev2 = (*session)(nil)
var _ imapserver.SessionAppendLimit = (*session)(nil)

func (s *Server) newSession(c *imapserver.Conn) (imapserver.Session, *imapserver.GreetingData, error) {
	g := c.NetConn().(*guard)
	ctx, cancel := context.WithCancel(s.base)
	return &session{srv: s, conn: c, g: g, addr: addressOf(g), ctx: ctx, cancel: cancel}, nil, nil
}

// Close implements imapserver.Session.
func (s *session) Close() error {
	s.cancel()
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	s.idlers.Wait()
	if s.view != nil {
		s.view.close()
	}
	s.g.Close()
	if s.user == "" {
		s.srv.limits.depart(s.addr)
	} else {
		s.srv.limits.logout(s.user)
	}
	s.srv.sessions.Done()
	return nil
}

// Login implements imapserver.Session. It is called only after TLS.
func (s *session) Login(user, password string) error {
	began := time.Now()
	if user == "" || password == "" || len(user) > 320 || len(password) > 1024 || strings.ContainsRune(user+password, 0) {
		return s.refuse(user, began)
	}
	acc, err := s.srv.deps.Login(s.ctx, user, password, s.addr)
	switch {
	case errors.Is(err, ErrCredentials):
		return s.refuse(user, began)
	case err != nil:
		s.srv.log.Warn("login not possible now", "user", user, "addr", s.addr, "err", err)
		return no(imap.ResponseCodeUnavailable, "Login is not possible now, try again later")
	}
	s.srv.deps.Failures.Succeeded(s.addr, user)
	mb, err := s.srv.deps.Mailbox(acc.Mailbox)
	if err != nil {
		s.srv.log.Warn("mailbox not here", "user", acc.User, "mailbox", acc.Mailbox, "err", err)
		return no(imap.ResponseCodeUnavailable, "Your mailbox is at another office, use its server for now")
	}
	if acc.User == "" {
		acc.User = acc.Mailbox.String()
	}
	if !s.srv.limits.login(acc.User, s.srv.cfg.PerUser) {
		return no(imap.ResponseCodeLimit, "Too many connections of this user, close some")
	}
	s.srv.limits.depart(s.addr)
	s.user, s.mb = acc.User, mb
	s.srv.loggedIn(s.g, s.user)
	s.srv.log.Info("login", "user", s.user, "addr", s.addr)
	return nil
}

// refuse answers a wrong password, later each time. The delay runs from the
// question, so that the time of the answer tells nothing about the work behind it.
func (s *session) refuse(user string, began time.Time) error {
	s.srv.log.Info("login refused", "user", user[:min(len(user), 320)], "addr", s.addr)
	pause(s.srv.up, time.Until(began.Add(s.srv.deps.Failures.Failed(s.addr, user, began))))
	if s.srv.up.Err() != nil { // nobody's stop waits for who guesses
		return no(imap.ResponseCodeUnavailable, goingDown)
	}
	if s.tries++; s.tries >= s.srv.cfg.LoginTries {
		s.g.violation("Too many failed logins")
	}
	return no(imap.ResponseCodeAuthenticationFailed, "Wrong user name or password")
}

func no(code imap.ResponseCode, text string) error {
	return &imap.Error{Type: imap.StatusResponseTypeNo, Code: code, Text: text}
}

func bad(text string) error {
	return &imap.Error{Type: imap.StatusResponseTypeBad, Code: imap.ResponseCodeClientBug, Text: text}
}

// failure says an error of the store in IMAP's words.
func (s *session) failure(doing string, err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, mailstore.ErrNoFolder):
		return no(imap.ResponseCodeNonExistent, "No such folder")
	case errors.Is(err, mailstore.ErrExists):
		return no(imap.ResponseCodeAlreadyExists, "Folder exists")
	case errors.Is(err, mailstore.ErrHasInbox):
		return no(imap.ResponseCodeCannot, "INBOX cannot be removed")
	case errors.Is(err, mailstore.ErrName):
		return no(imap.ResponseCodeCannot, "This name is not allowed")
	case errors.Is(err, mailstore.ErrQuota):
		return no(imap.ResponseCodeOverQuota, "Mailbox is full, delete something first")
	case errors.Is(err, mailstore.ErrTooMany):
		return no(imap.ResponseCodeLimit, "Too many folders or keywords")
	case errors.Is(err, mailstore.ErrNotHome), errors.Is(err, mailstore.ErrNoMailbox):
		return no(imap.ResponseCodeUnavailable, "Mailbox has moved, connect again")
	case errors.Is(err, mailstore.ErrExpunged):
		return no("EXPUNGEISSUED", "Message was expunged") // RFC 5530
	case errors.Is(err, transport.ErrNoSpace):
		return no(imap.ResponseCodeUnavailable, "Server is out of disk space, try again later")
	}
	var ie *imap.Error
	if errors.As(err, &ie) || s.ctx.Err() != nil {
		return err
	}
	s.srv.log.Error("imap command", "doing", doing, "user", s.user, "err", err)
	return no(imap.ResponseCodeUnavailable, "Internal error, try again later")
}

// Namespace implements imapserver.SessionNamespace.
func (s *session) Namespace() (*imap.NamespaceData, error) {
	return &imap.NamespaceData{Personal: []imap.NamespaceDescriptor{{Delim: '/'}}}, nil
}

// AppendLimit implements imapserver.SessionAppendLimit (RFC 7889).
func (s *session) AppendLimit() uint32 { return uint32(s.srv.maxMessage()) }

// Select implements imapserver.Session: SELECT and EXAMINE.
func (s *session) Select(name string, opt *imap.SelectOptions) (*imap.SelectData, error) {
	s.saved = nil
	f, err := s.mb.Folder(folderName(name))
	if err != nil {
		return nil, s.failure("select", err)
	}
	v, err := openView(f, opt.ReadOnly)
	if err != nil {
		return nil, s.failure("select", err)
	}
	s.view = v.view
	data := &imap.SelectData{
		Flags:             v.flags,
		NumMessages:       uint32(len(v.uids)),
		FirstUnseenSeqNum: v.firstUnseen,
		UIDNext:           imap.UID(v.status.UIDNext),
		UIDValidity:       v.status.UIDValidity,
	}
	if !opt.ReadOnly {
		data.PermanentFlags = append(slices.Clone(v.flags), imap.FlagWildcard)
	}
	if s.conn.EnabledCaps().Has(imap.CapIMAP4rev2) { // RFC 9051 section 6.3.2
		data.List = &imap.ListData{Mailbox: v.status.Name, Delim: '/'}
	}
	return data, nil
}

// Unselect implements imapserver.Session.
func (s *session) Unselect() error {
	if s.view != nil {
		s.view.close()
		s.view = nil
	}
	s.saved = nil
	return nil
}

// Poll implements imapserver.Session: the changes since the last time.
func (s *session) Poll(w *imapserver.UpdateWriter, allowExpunge bool) error {
	if s.view == nil {
		return nil
	}
	if err := s.view.pull(); err != nil {
		return s.lost(err)
	}
	return s.view.tell(w, allowExpunge)
}

// lost ends a connection whose folder cannot be followed any more: its client
// must not go on with a stale view.
func (s *session) lost(err error) error {
	if errors.Is(err, mailstore.ErrNoFolder) {
		return s.g.violation("Selected folder was removed")
	}
	s.srv.log.Error("imap view", "user", s.user, "err", err)
	return s.g.violation("Internal error, connect again")
}

// Idle implements imapserver.Session.
func (s *session) Idle(w *imapserver.UpdateWriter, stop <-chan struct{}) error {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return nil
	}
	s.idlers.Add(1)
	s.mu.Unlock()
	defer s.idlers.Done()
	if s.view == nil {
		select {
		case <-stop:
		case <-s.ctx.Done():
		}
		return nil
	}
	for {
		if err := s.Poll(w, true); err != nil {
			s.g.Close()
			return err
		}
		if err := s.g.Flush(); err != nil {
			s.g.Close()
			return err
		}
		select {
		case <-s.view.changed:
		case <-stop:
			return nil
		case <-s.ctx.Done():
			return nil
		}
	}
}

// Store implements imapserver.Session.
func (s *session) Store(w *imapserver.FetchWriter, set imap.NumSet, st *imap.StoreFlags, _ *imap.StoreOptions) error {
	if err := s.writable(); err != nil {
		return err
	}
	at, err := s.messages(set)
	if err != nil {
		return err
	}
	flags, err := storedFlags(st.Flags)
	if err != nil {
		return err
	}
	op := mailstore.FlagsSet
	switch st.Op {
	case imap.StoreFlagsAdd:
		op = mailstore.FlagsAdd
	case imap.StoreFlagsDel:
		op = mailstore.FlagsRemove
	}
	if len(at) == 0 {
		return nil
	}
	changed, _, err := s.view.folder.SetFlags(s.ctx, s.view.at(at), op, flags, 0)
	if err != nil {
		return s.failure("store", err)
	}
	var buf []imap.Flag
	for i := range changed {
		m := &changed[i]
		s.view.told(m)
		n, ok := s.view.number(m.UID)
		if st.Silent || !ok {
			continue
		}
		buf = shownFlags(buf, m.Flags)
		r := w.CreateMessage(n)
		r.WriteUID(imap.UID(m.UID))
		r.WriteFlags(buf)
		if err := r.Close(); err != nil {
			return err
		}
	}
	return nil
}

// writable refuses what EXAMINE forbids (RFC 9051 section 6.3.3).
func (s *session) writable() error {
	if s.view.readOnly {
		return no(imap.ResponseCodeNoPerm, "Folder was opened by EXAMINE, nothing may be changed")
	}
	return nil
}

// Expunge implements imapserver.Session: EXPUNGE, UID EXPUNGE and CLOSE.
func (s *session) Expunge(w *imapserver.ExpungeWriter, set *imap.UIDSet) error {
	closing := s.g.command() == "CLOSE"
	if s.view.readOnly && closing {
		return nil // RFC 9051 section 6.4.1: no messages are removed
	}
	if err := s.writable(); err != nil {
		return err
	}
	var uids []mailstore.UID
	if set != nil {
		at, err := s.messages(*set)
		if err != nil {
			return err
		}
		if uids = s.view.at(at); len(uids) == 0 {
			return nil
		}
	}
	if _, err := s.view.folder.Expunge(s.ctx, uids); err != nil {
		return s.failure("expunge", err)
	}
	if closing {
		return nil
	}
	if err := s.view.pull(); err != nil {
		return s.lost(err)
	}
	return s.view.tellExpunged(w.WriteExpunge)
}

// Copy implements imapserver.Session.
func (s *session) Copy(set imap.NumSet, dest string) (*imap.CopyData, error) {
	at, err := s.messages(set)
	if err != nil || len(at) == 0 {
		return nil, err
	}
	r, err := s.view.folder.Copy(s.ctx, s.view.at(at), folderName(dest))
	if err != nil {
		return nil, s.copyFailure("copy", err)
	}
	return copyData(r), nil
}

// copyFailure adds what a client should try when the destination is missing.
func (s *session) copyFailure(doing string, err error) error {
	if errors.Is(err, mailstore.ErrNoFolder) {
		if _, gone := s.view.folder.Status(); gone == nil {
			return no(imap.ResponseCodeTryCreate, "No such folder")
		}
	}
	return s.failure(doing, err)
}

func copyData(r mailstore.CopyResult) *imap.CopyData {
	if len(r.Source) == 0 {
		return nil
	}
	return &imap.CopyData{UIDValidity: r.UIDValidity, SourceUIDs: uidSet(r.Source), DestUIDs: uidSet(r.Dest)}
}

// Move implements imapserver.SessionMove.
func (s *session) Move(w *imapserver.MoveWriter, set imap.NumSet, dest string) error {
	if err := s.writable(); err != nil {
		return err
	}
	at, err := s.messages(set)
	if err != nil || len(at) == 0 {
		return err
	}
	r, err := s.view.folder.Move(s.ctx, s.view.at(at), folderName(dest))
	if err != nil {
		return s.copyFailure("move", err)
	}
	if data := copyData(r); data != nil {
		if err := w.WriteCopyData(data); err != nil {
			return err
		}
	}
	if err := s.view.pull(); err != nil {
		return s.lost(err)
	}
	return s.view.tellExpunged(w.WriteExpunge)
}
