// Package mime is the bounded walk over foreign MIME (RFC 2045–2047, 5322): it
// runs once, when a message is taken, and what it finds is stored beside the
// message, so that listing touches no body and no library ever recurses into
// foreign input. It is pure: bytes in, Structure out; it never fails on content.
//
// Beside the walk it has the small readers of foreign text that its callers
// need on the same bytes: header fields with their places (intake, imapd),
// decoded header text and decoded bodies (imapd's SEARCH and BINARY).
//
// How it reads what senders get wrong:
//   - A header ends at its empty line, or before the first line that is no
//     field: that line is body then. A leading mbox "From " line is skipped.
//   - A delimiter line is "--", the boundary, perhaps "--", and blanks; nothing
//     else on the line. The innermost open multipart is asked first.
//   - Of a field that may stand once, the first one counts; To, Cc and Bcc add up.
//   - Text without a usable charset is UTF-8 if it is valid, windows-1252 if not.
//   - A Structure holds valid UTF-8 without control characters.
//
// Time is linear in size whatever the bytes are, memory one header block, one
// buffer and the Structure, whose strings together stay below MaxText.
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
	MaxAddresses  = 1000      // over all address fields of one header
	MaxParams     = 64        // of one field, pieces of RFC 2231 counted
	MaxValue      = 16 << 10  // bytes of one decoded field value kept
	MaxText       = 256 << 10 // bytes of all strings of one Structure
	MaxBoundary   = 256       // bytes; RFC 2046 section 5.1.1 allows 70
)

// MissingDomain is the Host of an address that has none; "" is for groups.
const MissingDomain = "MISSING_DOMAIN"

// Address is one mailbox of an address field, or a group's start or end
// (RFC 3501 section 7.4.2): Host is "" then, and Mailbox the group's name at
// its start and "" at its end.
type Address struct {
	Name    string // display name, decoded to UTF-8
	Mailbox string // local part, without quotes
	Host    string // domain
}

// Envelope holds the fields that IMAP's ENVELOPE gives (RFC 9051 section
// 7.5.2), decoded to UTF-8. A field that the header has not is zero: that
// Sender and ReplyTo are From by default is the reader's business.
type Envelope struct {
	Date      time.Time // in the sender's zone; zero when absent or not to be read
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
	Name  string // lower case
	Value string
}

// Part is one node of the MIME tree, with the places of its header and body in
// the message: [Header, Body) is the header block with its empty line,
// [Body, End) the body. Offsets and sizes are bytes.
type Part struct {
	Header      int64
	Body        int64
	End         int64
	Lines       int64  // line ends in the body of a text/* or message/* part, else 0
	Type        string // lower case, "text"
	Subtype     string // lower case, "plain"
	Params      []Param
	ID          string // Content-ID with its brackets
	Description string
	Encoding    string // Content-Transfer-Encoding, upper case, "7BIT" by default
	Disposition string // lower case, "" for none
	DispParams  []Param
	Language    []string
	Location    string
	MD5         string
	Envelope    *Envelope // of a message/rfc822 part's message
	// Children of a multipart; of message/rfc822 its one body, whose Header is
	// where the inner message starts. None when the part is opaque: a limit was
	// met, no boundary is given, or the boundary never came.
	Children []*Part
}

// Param returns the value of the first parameter with that lower-case name.
func (p *Part) Param(name string) string { return param(p.Params, name) }

// Filename returns the name that the sender gave to the part, or "".
func (p *Part) Filename() string {
	if n := param(p.DispParams, "filename"); n != "" {
		return n
	}
	return param(p.Params, "name")
}

func param(ps []Param, name string) string {
	for i := range ps {
		if ps[i].Name == name {
			return ps[i].Value
		}
	}
	return ""
}

// IsMessage reports whether the part is of a type that holds a whole message
// (RFC 2046 section 5.2.1, RFC 6532 section 3.7).
func (p *Part) IsMessage() bool {
	return p.Type == "message" && (p.Subtype == "rfc822" || p.Subtype == "global")
}

// Structure is what the walk found. It has a compact form of its own
// (AppendBinary), which CBOR libraries store as one byte string.
type Structure struct {
	Envelope Envelope
	Root     *Part
	Cut      bool // a limit was met: below that the tree is opaque
	Received int  // number of Received fields in the top header, as far as it is read
	// Clean says that the whole top header was read and has no Return-Path
	// field: final delivery need not look for one. False says nothing.
	Clean bool
}

// Parse walks the message of the given size. It reads r once from front to
// back, holds at most a header block and a buffer in memory, and takes time
// linear in size. An error is r's own.
func Parse(r io.ReaderAt, size int64) (*Structure, error) {
	w := walk{s: newScanner(r, size), out: &Structure{}, room: MaxText}
	root := w.open(0, "text", "plain")
	w.out.Root = root
	if err := w.run(); err != nil {
		return nil, err
	}
	return w.out, nil
}
