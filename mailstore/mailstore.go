// Package mailstore is mail at rest: mailboxes with their folders, UIDs, flags,
// modification sequences and a change feed. It knows no IMAP types: imapd, the
// mover and later DAV and JMAP stand on it.
//
// Every change is a record of the message log first; see mailstore/journal.
package mailstore

import (
	"context"
	"errors"
	"time"

	"posthouse/mailstore/journal"
	"posthouse/mailstore/log"
	"posthouse/mailstore/mime"
	"posthouse/mesh"
	"posthouse/transport"
)

// UID names a message in a folder; it only grows (RFC 9051 section 2.3.1.1).
type UID uint32

// ModSeq is the modification sequence of RFC 7162: one counter per folder,
// which grows with each change in it.
type ModSeq uint64

// Flag is an IMAP system flag such as `\Seen`, or a keyword. Comparison ignores
// case; `\Recent` is none.
type Flag string

// The system flags that are stored.
const (
	Seen     Flag = `\Seen`
	Answered Flag = `\Answered`
	Flagged  Flag = `\Flagged`
	Deleted  Flag = `\Deleted`
	Draft    Flag = `\Draft`
)

// SpecialUse is a folder's attribute of RFC 6154, such as `\Sent`, or "".
type SpecialUse string

// Errors that sessions tell apart.
var (
	ErrNoMailbox = errors.New("no such mailbox here")
	ErrNoFolder  = errors.New("no such folder")
	ErrExists    = errors.New("folder exists")
	ErrHasInbox  = errors.New("INBOX cannot be removed")
	ErrName      = errors.New("folder name not allowed")
	ErrQuota     = errors.New("over quota")
	ErrNotHome   = errors.New("mailbox is not homed here")
	ErrTooMany   = errors.New("too many folders or keywords")
	ErrExpunged  = errors.New("message was expunged")
)

// Store holds the mailboxes of this node. It is safe for concurrent use.
type Store struct{}

// Options configure a Store. The zero value is usable.
type Options struct {
	// Quota returns the limit of a mailbox in bytes, 0 for none. Nil: none.
	Quota func(mesh.MailboxID) int64
	// Cached bounds the folders kept in memory without a session. Default 256.
	Cached int
}

// New registers the store with j, which must not be started yet.
func New(j *journal.Journal, opt Options) *Store { panic("not written") }

// Create makes a mailbox with INBOX, Drafts, Sent, Junk, Trash and Archive,
// all subscribed. Making one that exists is harmless.
func (s *Store) Create(ctx context.Context, id mesh.MailboxID) error { panic("not written") }

// Has reports whether the mailbox exists here.
func (s *Store) Has(id mesh.MailboxID) bool { panic("not written") }

// Mailbox opens a mailbox; ErrNoMailbox when it is not here.
func (s *Store) Mailbox(id mesh.MailboxID) (*Mailbox, error) { panic("not written") }

// Delivery is one message for one or more mailboxes of this node.
type Delivery struct {
	Envelope transport.Envelope
	// Rcpts are recipients with Mailbox set; each gets at most one copy for
	// each (Envelope.ID, Mailbox), however often it is delivered.
	Rcpts []transport.Recipient
	// Exactly one of the two is set: Source for a message that the log has
	// already (the queue's ACCEPT), Draft for one that comes with this record.
	Source    log.Ref
	Draft     *log.Draft
	Structure *mime.Structure
	// LegSeq is the queue's leg that ends with this, or 0.
	LegSeq uint64
}

// Deliver puts the message into each recipient's INBOX and returns one result
// a recipient once that is on disk and visible: Delivered (also when it was
// there already: a repeat), Deferred 4.2.2 over quota, Moved when the mailbox
// is not here. All copies come in one log record. Calls for one mailbox give
// UIDs in the order of the calls.
func (s *Store) Deliver(ctx context.Context, d *Delivery) ([]transport.Result, error) {
	panic("not written")
}

// Delivered reports whether that message is or was in that mailbox.
func (s *Store) Delivered(id transport.MessageID, m mesh.MailboxID) (bool, error) {
	panic("not written")
}

// Mailbox is one user's mail.
type Mailbox struct{}

// ID returns the mailbox's id.
func (m *Mailbox) ID() mesh.MailboxID { panic("not written") }

// FolderInfo describes a folder without opening it.
type FolderInfo struct {
	Name       string // path with "/" between levels, NFC; "INBOX" in capitals
	Use        SpecialUse
	Subscribed bool
	NoSelect   bool // a parent that is no folder itself
	Children   bool
}

// Folders lists all folders, ordered by name with INBOX first. A subscribed
// name without a folder stands in it with NoSelect.
func (m *Mailbox) Folders() []FolderInfo { panic("not written") }

// CreateFolder makes a folder and the parents it needs (RFC 9051 section 6.3.4).
func (m *Mailbox) CreateFolder(ctx context.Context, name string, use SpecialUse) error {
	panic("not written")
}

// DeleteFolder removes a folder with its messages; children stay.
func (m *Mailbox) DeleteFolder(ctx context.Context, name string) error { panic("not written") }

// RenameFolder renames a folder and its children. Of INBOX it moves the
// messages to the new folder and leaves INBOX empty (RFC 9051 section 6.3.6).
func (m *Mailbox) RenameFolder(ctx context.Context, from, to string) error { panic("not written") }

// Subscribe sets or clears the subscription of a name.
func (m *Mailbox) Subscribe(ctx context.Context, name string, on bool) error { panic("not written") }

// Usage returns messages and bytes of all folders.
func (m *Mailbox) Usage() (messages, bytes int64) { panic("not written") }

// Folder opens a folder; ErrNoFolder.
func (m *Mailbox) Folder(name string) (*Folder, error) { panic("not written") }

// Status is the state of a folder at one ModSeq.
type Status struct {
	Name          string
	UIDValidity   uint32
	UIDNext       UID
	Messages      uint32
	Unseen        uint32 // messages without \Seen
	Deleted       uint32 // messages with \Deleted
	Size          int64  // bytes
	HighestModSeq ModSeq
}

// Folder is one folder of a mailbox. It stays usable after a rename; after its
// removal every call returns ErrNoFolder. Safe for concurrent use.
type Folder struct{}

// Status returns the state now. It costs no scan.
func (f *Folder) Status() (Status, error) { panic("not written") }

// Info is what is known of a message without touching its log record.
// Values are immutable snapshots.
type Info struct {
	UID      UID
	ModSeq   ModSeq
	Flags    []Flag    // system flags first, then keywords; not to be changed
	Size     int64     // bytes
	Received time.Time // internal date
}

// List returns all messages by growing UID, with the status of that instant.
func (f *Folder) List() (Status, []Info, error) { panic("not written") }

// Infos returns the messages with these UIDs, growing; the missing are left out.
func (f *Folder) Infos(uids []UID) ([]Info, error) { panic("not written") }

// Changes is what happened in a folder after a ModSeq.
type Changes struct {
	Status   Status
	Expunged []UID  // growing
	Changed  []Info // new ones and those with other flags, by growing UID
}

// ChangesSince returns what happened after since, expunges included. A new
// message that is gone again stands in neither list.
func (f *Folder) ChangesSince(since ModSeq) (Changes, error) { panic("not written") }

// Watch calls notify, from another goroutine and never while a lock is held,
// after each change in the folder; several changes may make one call. notify
// must not block. stop ends it.
func (f *Folder) Watch(notify func()) (stop func()) { panic("not written") }

// Message is one message's stored structure and body.
type Message struct {
	Info      Info
	Structure *mime.Structure // not to be changed
	Body      transport.Body
}

// Message reads a message's structure from its log record; ErrExpunged.
func (f *Folder) Message(uid UID) (*Message, error) { panic("not written") }

// AppendMessage is a message for Append. Draft is sealed and Structure its walk.
type AppendMessage struct {
	Draft     *log.Draft
	Structure *mime.Structure
	Flags     []Flag
	Received  time.Time // zero: now
}

// Append adds messages by client's command; returns their UIDs once on disk
// and visible. All come in or none.
func (f *Folder) Append(ctx context.Context, msgs []AppendMessage) (uidValidity uint32, uids []UID, err error) {
	panic("not written")
}

// FlagOp says how SetFlags combines.
type FlagOp uint8

// The flag operations.
const (
	FlagsSet FlagOp = iota + 1
	FlagsAdd
	FlagsRemove
)

// SetFlags changes flags of those messages that exist, and returns their new
// Infos by growing UID once on disk. With unchangedSince > 0, messages with a
// larger ModSeq are left alone and returned in modified (RFC 7162 section 3.1.3).
func (f *Folder) SetFlags(ctx context.Context, uids []UID, op FlagOp, flags []Flag, unchangedSince ModSeq) (changed []Info, modified []UID, err error) {
	panic("not written")
}

// Expunge removes those of the messages that carry \Deleted; uids nil means all
// of the folder. It returns the removed UIDs.
func (f *Folder) Expunge(ctx context.Context, uids []UID) ([]UID, error) { panic("not written") }

// CopyResult pairs source and new UIDs (RFC 4315 COPYUID).
type CopyResult struct {
	UIDValidity uint32
	Source      []UID
	Dest        []UID
}

// Copy copies messages, flags and internal date into a folder of the same
// mailbox. All or none; messages that are gone are left out.
func (f *Folder) Copy(ctx context.Context, uids []UID, to string) (CopyResult, error) {
	panic("not written")
}

// Move is Copy and removal in one record (RFC 6851).
func (f *Folder) Move(ctx context.Context, uids []UID, to string) (CopyResult, error) {
	panic("not written")
}
