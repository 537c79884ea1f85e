package imapd

import (
	"errors"
	"fmt"
	"strings"

	"github.com/emersion/go-imap/v2"
	"github.com/emersion/go-imap/v2/imapserver"
	"golang.org/x/text/unicode/norm"

	"posthouse/mailstore"
)

const maxPattern = 1 << 10 // bytes of a LIST pattern

// folderName brings a client's name into the store's form; the store checks it.
func folderName(name string) string {
	name = norm.NFC.String(name)
	if first, rest, ok := strings.Cut(name, "/"); strings.EqualFold(first, "INBOX") {
		if ok {
			return "INBOX/" + rest
		}
		return "INBOX"
	}
	return name
}

// Create implements imapserver.Session.
func (s *session) Create(name string, opt *imap.CreateOptions) error {
	use := mailstore.SpecialUse("")
	if len(opt.SpecialUse) > 1 {
		return no("USEATTR", "A folder can have one special use here") // RFC 6154 section 3
	}
	if len(opt.SpecialUse) == 1 {
		switch a := opt.SpecialUse[0]; a {
		case imap.MailboxAttrArchive, imap.MailboxAttrDrafts, imap.MailboxAttrJunk, imap.MailboxAttrSent, imap.MailboxAttrTrash:
			use = mailstore.SpecialUse(a)
		default:
			return no("USEATTR", "This special use is not supported")
		}
	}
	name = folderName(strings.TrimSuffix(name, "/")) // RFC 9051 section 6.3.4: "/" says that names below will follow
	return s.failure("create", s.mb.CreateFolder(s.ctx, name, use))
}

// Delete implements imapserver.Session.
func (s *session) Delete(name string) error {
	return s.failure("delete", s.mb.DeleteFolder(s.ctx, folderName(name)))
}

// Rename implements imapserver.Session.
func (s *session) Rename(from, to string, _ *imap.RenameOptions) error {
	return s.failure("rename", s.mb.RenameFolder(s.ctx, folderName(from), folderName(strings.TrimSuffix(to, "/"))))
}

// Subscribe implements imapserver.Session.
func (s *session) Subscribe(name string) error {
	return s.failure("subscribe", s.mb.Subscribe(s.ctx, folderName(name), true))
}

// Unsubscribe implements imapserver.Session.
func (s *session) Unsubscribe(name string) error {
	return s.failure("unsubscribe", s.mb.Subscribe(s.ctx, folderName(name), false))
}

// Status implements imapserver.Session.
func (s *session) Status(name string, opt *imap.StatusOptions) (*imap.StatusData, error) {
	if opt.DeletedStorage {
		return nil, bad("Unknown STATUS data item") // belongs to QUOTA, which is not offered
	}
	f, err := s.mb.Folder(folderName(name))
	if err != nil {
		return nil, s.failure("status", err)
	}
	return s.status(f)
}

func (s *session) status(f *mailstore.Folder) (*imap.StatusData, error) {
	st, err := f.Status()
	if err != nil {
		return nil, s.failure("status", err)
	}
	limit, recent := s.AppendLimit(), uint32(0)
	return &imap.StatusData{Mailbox: st.Name, NumMessages: &st.Messages, NumRecent: &recent, UIDNext: imap.UID(st.UIDNext),
		UIDValidity: st.UIDValidity, NumUnseen: &st.Unseen, NumDeleted: &st.Deleted, Size: &st.Size, AppendLimit: &limit}, nil
}

// List implements imapserver.Session: LIST in all its forms, and LSUB.
func (s *session) List(w *imapserver.ListWriter, ref string, patterns []string, opt *imap.ListOptions) error {
	if len(patterns) == 0 { // RFC 9051 section 6.3.9: asks for the delimiter
		return w.WriteList(&imap.ListData{Attrs: []imap.MailboxAttr{imap.MailboxAttrNoSelect}, Delim: '/'})
	}
	lsub := s.g.command() == "LSUB"
	ps := make([]pattern, len(patterns))
	for i, p := range patterns {
		if len(ref)+len(p) > maxPattern {
			return no(imap.ResponseCodeLimit, "Pattern too long")
		}
		ps[i] = newPattern(ref, p)
	}
	matches := func(name string) bool {
		for _, p := range ps {
			if p.match(name) {
				return true
			}
		}
		return false
	}
	folders := s.mb.Folders()
	// Parents that match and are told for the sake of what is below them: with
	// RECURSIVEMATCH (RFC 5258 section 3.5), and by LSUB (RFC 3501 section 6.3.9).
	above := map[string]bool{}
	if opt.SelectSubscribed && (opt.SelectRecursiveMatch || lsub) {
		for _, f := range folders {
			if !f.Subscribed || lsub && matches(f.Name) {
				continue
			}
			for i := strings.LastIndexByte(f.Name, '/'); i > 0; i = strings.LastIndexByte(f.Name[:i], '/') {
				above[f.Name[:i]] = true
			}
		}
	}
	for _, f := range folders {
		parent := above[f.Name]
		delete(above, f.Name)
		switch {
		case !matches(f.Name),
			opt.SelectSubscribed && !f.Subscribed && !parent,
			!opt.SelectSubscribed && f.NoSelect && !f.Children, // only subscribed
			opt.SelectSpecialUse && f.Use == "":
			continue
		}
		if err := s.listed(w, &f, parent, lsub, opt); err != nil {
			return err
		}
	}
	for name := range above { // parents that are no folders
		if matches(name) {
			if err := s.listed(w, &mailstore.FolderInfo{Name: name, NoSelect: true, Children: true}, true, lsub, opt); err != nil {
				return err
			}
		}
	}
	return nil
}

// listed writes one line of LIST.
func (s *session) listed(w *imapserver.ListWriter, f *mailstore.FolderInfo, parent, lsub bool, opt *imap.ListOptions) error {
	d := &imap.ListData{Mailbox: f.Name, Delim: '/'}
	if f.NoSelect || lsub && !f.Subscribed {
		if !f.Children {
			d.Attrs = append(d.Attrs, imap.MailboxAttrNonExistent)
		}
		d.Attrs = append(d.Attrs, imap.MailboxAttrNoSelect)
	}
	if f.Children {
		d.Attrs = append(d.Attrs, imap.MailboxAttrHasChildren)
	} else {
		d.Attrs = append(d.Attrs, imap.MailboxAttrHasNoChildren)
	}
	if f.Subscribed && (opt.ReturnSubscribed || opt.SelectSubscribed) && !lsub {
		d.Attrs = append(d.Attrs, imap.MailboxAttrSubscribed)
	}
	if f.Use != "" {
		d.Attrs = append(d.Attrs, imap.MailboxAttr(f.Use))
	}
	if parent && opt.SelectRecursiveMatch {
		d.ChildInfo = &imap.ListDataChildInfo{Subscribed: true}
	}
	if opt.ReturnStatus != nil && !f.NoSelect {
		if opt.ReturnStatus.DeletedStorage {
			return bad("Unknown STATUS data item")
		}
		folder, err := s.mb.Folder(f.Name)
		if err == nil {
			d.Status, err = s.status(folder)
		}
		var gone *imap.Error
		if err != nil && !errors.Is(err, mailstore.ErrNoFolder) && !errors.As(err, &gone) {
			return fmt.Errorf("status of a listed folder: %w", err)
		}
	}
	return w.WriteList(d)
}

// pattern is a LIST pattern, joined with its reference. Matching costs at most
// the product of both lengths, whatever the wildcards.
type pattern string

func newPattern(ref, p string) pattern {
	if strings.HasPrefix(p, "/") {
		p = p[1:]
	} else if ref != "" {
		p = strings.TrimSuffix(ref, "/") + "/" + p
	}
	return pattern(folderName(p))
}

func (p pattern) match(name string) bool {
	at := make([]bool, len(name)+1) // at[i]: what is read of p matches name[:i]
	at[0] = true
	for i := range len(p) {
		switch c := p[i]; c {
		case '*', '%':
			for j := 1; j <= len(name); j++ {
				at[j] = at[j] || at[j-1] && (c == '*' || name[j-1] != '/')
			}
		default:
			for j := len(name); j > 0; j-- {
				at[j] = at[j-1] && name[j-1] == c
			}
			at[0] = false
		}
	}
	return at[len(name)]
}
