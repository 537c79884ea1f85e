// Package mailstore is mail at rest: mailboxes with their folders, UIDs, flags,
// modification sequences and a change feed. It knows no IMAP types: imapd, the
// mover and later DAV and JMAP stand on it.
//
// Every change is a record of the message log first; see mailstore/journal.
package mailstore

import (
	"errors"
	"time"

	"posthouse/mailstore/log"
	"posthouse/mailstore/mime"
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

// FolderInfo describes a folder without opening it.
type FolderInfo struct {
	Name       string // path with "/" between levels, NFC; "INBOX" in capitals
	Use        SpecialUse
	Subscribed bool
	NoSelect   bool // a name that is no folder itself: a parent, or only subscribed
	Children   bool
}

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

// Info is what is known of a message without touching its log record.
// Values are immutable snapshots.
type Info struct {
	UID      UID
	ModSeq   ModSeq
	Flags    []Flag    // system flags first, then keywords; not to be changed
	Size     int64     // bytes
	Received time.Time // internal date: UTC, whole seconds
}

// Changes is what happened in a folder after a ModSeq.
type Changes struct {
	Status   Status
	Expunged []UID  // growing
	Changed  []Info // new ones and those with other flags, by growing UID
	// Forgotten says that since is older than the oldest expunge that is
	// remembered: Expunged is empty, Changed is right, and what the caller knew
	// and List does not hold is gone.
	Forgotten bool
}

// Message is one message's stored structure and body.
type Message struct {
	Info      Info
	Structure *mime.Structure // not to be changed
	Body      transport.Body
}

// AppendMessage is a message for Append. Draft is sealed and Structure its walk.
type AppendMessage struct {
	Draft     *log.Draft
	Structure *mime.Structure
	Flags     []Flag
	Received  time.Time // zero: now
}

// FlagOp says how SetFlags combines.
type FlagOp uint8

// The flag operations. The numbers stand on disk.
const (
	FlagsSet FlagOp = iota + 1
	FlagsAdd
	FlagsRemove
)

// CopyResult pairs source and new UIDs (RFC 4315 COPYUID).
type CopyResult struct {
	UIDValidity uint32
	Source      []UID
	Dest        []UID
}

// Limits of a mailbox.
const (
	MaxFolders    = 2000      // of a mailbox
	MaxKeywords   = 59        // of a folder, over its life
	MaxKeyword    = 128       // bytes
	MaxName       = 1000      // bytes of a folder's name
	maxSubscribed = 256 << 10 // bytes of all subscribed names of a mailbox
	maxRuns       = 8192      // remembered runs of expunged UIDs of a folder
	perRecord     = 4096      // messages that one record changes
	copiesARecord = 512       // mailboxes that one DELIVER record names
	renewStep     = 1 << 20   // what Renew adds to every UIDVALIDITY
	keptDays      = 100       // that a delivery is remembered (MESH.md, Relay)
	laterDays     = 30        // with deliveries, that must follow a day before it is forgotten
	purgeARecord  = 16        // forgotten deliveries that one record removes
)
