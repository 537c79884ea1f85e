// Package mime is the bounded walk over foreign MIME (RFC 2045–2047, 5322): it
// runs once, when a message is taken, and what it finds is stored beside the
// message, so that listing touches no body and no library ever recurses into
// foreign input. It is pure: bytes in, Structure out; it never fails.
package mime

import (
	"io"
	"time"
)

// Limits of the walk. What lies beyond is one opaque part and sets Cut.
const (
	MaxDepth      = 32
	MaxParts      = 1000
	MaxHeaderSize = 256 << 10 // bytes of one header block that are read
	MaxAddresses  = 1000      // over all address fields
	MaxParams     = 64        // of one field
	MaxValue      = 16 << 10  // bytes of one decoded field value kept
)

// Address is one mailbox of an address field, or a group's start or end
// (RFC 3501 section 7.4.2: Host is "" then).
type Address struct {
	_       struct{} `cbor:",toarray"`
	Name    string   // display name, decoded to UTF-8
	Mailbox string   // local part
	Host    string   // domain
}

// Envelope holds the fields that IMAP's ENVELOPE gives (RFC 9051 section
// 7.5.2), decoded to UTF-8.
type Envelope struct {
	_         struct{} `cbor:",toarray"`
	Date      time.Time
	Subject   string
	From      []Address
	Sender    []Address
	ReplyTo   []Address
	To        []Address
	Cc        []Address
	Bcc       []Address
	InReplyTo []string // msg-ids without brackets
	MessageID string   // without brackets
}

// Param is one parameter of a MIME field, RFC 2231 forms joined and decoded.
type Param struct {
	_     struct{} `cbor:",toarray"`
	Name  string   // lower case
	Value string
}

// Part is one node of the MIME tree, with the places of its header and body in
// the message: [Header, Body) is the header block with its empty line,
// [Body, End) the body. Offsets and sizes are bytes.
type Part struct {
	_           struct{} `cbor:",toarray"`
	Header      int64
	Body        int64
	End         int64
	Lines       int64  // of the body; text and message/rfc822 need it
	Type        string // lower case, "text"
	Subtype     string // lower case, "plain"
	Params      []Param
	ID          string // Content-ID
	Description string
	Encoding    string // Content-Transfer-Encoding, upper case, "7BIT" by default
	Disposition string // lower case, "" for none
	DispParams  []Param
	Language    []string
	Location    string
	MD5         string
	Envelope    *Envelope // of a message/rfc822 part's message
	Children    []*Part   // of a multipart; of message/rfc822: its one body
}

// Structure is what the walk found.
type Structure struct {
	_        struct{} `cbor:",toarray"`
	Envelope Envelope
	Root     *Part
	Cut      bool // a limit was met: below that the tree is opaque
	Received int  // number of Received fields in the top header
}

// Parse walks the message of the given size. It reads r once or twice from
// front to back, holds at most a header block and a buffer in memory, and takes
// time linear in size. An error is r's own.
func Parse(r io.ReaderAt, size int64) (*Structure, error) {
	panic("not written")
}
