// Package transport is the vocabulary of mail in motion: the envelope, the
// message, the leg, its results, and the fault that an SMTP client is told.
//
// A message enters at smtpd, is split by route into legs, and each leg is
// handed by queue to a Carrier until its result is final. The package holds no
// behaviour of its own and imports only mesh; every engine of transport and
// mailstore may import it.
package transport

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"time"

	"posthouse/mesh"
)

// MessageID names a message for ever: 128 random bits given at its first 250.
// It is not the Message-ID of the header. Reports have an id that is computed
// (see ReportID), so that a crash never doubles them.
type MessageID [16]byte

// String returns 32 lower-case hexadecimal digits.
func (m MessageID) String() string { return hex.EncodeToString(m[:]) }

// IsZero reports whether m is "none".
func (m MessageID) IsZero() bool { return m == MessageID{} }

// MarshalText implements encoding.TextMarshaler.
func (m MessageID) MarshalText() ([]byte, error) { return []byte(m.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (m *MessageID) UnmarshalText(b []byte) error { return (*mesh.ID)(m).UnmarshalText(b) }

// ReportID is the id of the report of that kind ("failed", "delayed", …) about
// one recipient of a message: the same whenever it is made.
func ReportID(about MessageID, recipient, kind string) (id MessageID) {
	h := sha256.Sum256(fmt.Appendf(nil, "report\x00%s\x00%s\x00%s", about, recipient, kind))
	copy(id[:], h[:])
	return id
}

// Origin says by which door a message came in.
type Origin uint8

// The origins.
const (
	OriginOutside    Origin = iota + 1 // port 25, nobody logged in
	OriginSubmission                   // a user who logged in
	OriginDevice                       // a scanner or printer let in by rule
	OriginNode                         // relayed by another node
	OriginLocal                        // made here: reports, notices
)

var originNames = [...]string{"", "outside", "submission", "device", "node", "local"}

func (o Origin) String() string {
	if int(o) < len(originNames) {
		return originNames[o]
	}
	return fmt.Sprintf("origin(%d)", uint8(o))
}

// BodyType is the BODY= parameter of MAIL FROM (RFC 6152, RFC 3030).
type BodyType string

// The body types; "" means that the client gave none.
const (
	Body7Bit   BodyType = "7BIT"
	Body8Bit   BodyType = "8BITMIME"
	BodyBinary BodyType = "BINARYMIME"
)

// Envelope is what is known of a message beside its recipients and its bytes.
// It is written once, at the first 250, and travels unchanged but for Hops.
// The numbers are its CBOR keys: never reuse one.
type Envelope struct {
	ID   MessageID `cbor:"1,keyasint"`
	From string    `cbor:"2,keyasint"` // reverse-path without brackets; "" is the null sender

	Ret        string   `cbor:"3,keyasint,omitempty"` // RFC 3461 section 4.3: "", "FULL" or "HDRS"
	EnvID      string   `cbor:"4,keyasint,omitempty"` // RFC 3461 section 4.4: xtext as given
	Body       BodyType `cbor:"5,keyasint,omitempty"`
	SMTPUTF8   bool     `cbor:"6,keyasint,omitempty"` // RFC 6531: the client asked for it
	RequireTLS bool     `cbor:"7,keyasint,omitempty"` // RFC 8689

	Origin     Origin      `cbor:"8,keyasint"`
	ClientAddr string      `cbor:"9,keyasint,omitempty"`  // IP address, no port
	Helo       string      `cbor:"10,keyasint,omitempty"` // as the client gave it
	ClientName string      `cbor:"11,keyasint,omitempty"` // verified reverse name
	TLS        string      `cbor:"12,keyasint,omitempty"` // "TLS1.3 TLS_AES_128_GCM_SHA256"; "" for plain text
	Login      string      `cbor:"13,keyasint,omitempty"` // address of the user who logged in
	EntryNode  mesh.NodeID `cbor:"14,keyasint"`
	EntryTime  time.Time   `cbor:"15,keyasint"` // UTC
	Hops       int         `cbor:"16,keyasint"` // hand-overs from node to node so far
}

// Notify is the NOTIFY parameter of RCPT TO, RFC 3461 section 4.1, as a set.
// The zero value means that the client gave none: FAILURE by default.
type Notify uint8

// The members of Notify.
const (
	NotifyNever Notify = 1 << iota
	NotifySuccess
	NotifyFailure
	NotifyDelay
)

// Recipient is one final recipient of a message.
type Recipient struct {
	// Mailbox is set for a recipient of the mesh and zero for one outside.
	Mailbox mesh.MailboxID `cbor:"1,keyasint"`
	// Address is the forward-path that leads there: after expansion of aliases
	// and groups, without brackets.
	Address string `cbor:"2,keyasint"`
	Notify  Notify `cbor:"3,keyasint,omitempty"`
	// ORcpt is "type;xtext" as given (RFC 3461 section 4.2), or "".
	ORcpt string `cbor:"4,keyasint,omitempty"`
	// Bounces is who hears of a failure instead of Envelope.From: the owner of
	// the group that this recipient was reached through, or "".
	Bounces string `cbor:"5,keyasint,omitempty"`
	// Detail is the sub-address ("+tag") that was cut, or "".
	Detail string `cbor:"6,keyasint,omitempty"`
	// Delayed says that the sender was told of the delay already, by a node that
	// had this recipient before: it is told once.
	Delayed bool `cbor:"7,keyasint,omitempty"`
}

// Key identifies the recipient within its message for deduplication: the
// mailbox for one of the mesh, the address key for one outside.
func (r *Recipient) Key() string {
	if !r.Mailbox.IsZero() {
		return r.Mailbox.String()
	}
	return r.Address
}

// Body is the immutable content of a message as stored: header and body with
// CRLF line ends. It may be read by several at once.
type Body interface {
	Size() int64 // bytes
	// Open returns a reader from the first byte. Reading verifies: damage is an
	// error, never wrong bytes. The caller closes it.
	Open() (BodyReader, error)
}

// BodyReader reads a Body from anywhere in it.
type BodyReader interface {
	io.Reader
	io.ReaderAt
	io.Closer
}

// Message is a message under way.
type Message struct {
	Envelope   Envelope
	Recipients []Recipient
	Body       Body
}

// Scope says in which direction a destination lies.
type Scope uint8

// The scopes.
const (
	ScopeLocal   Scope = iota + 1 // mailboxes of this node
	ScopeNode                     // the home node of the recipients
	ScopeGateway                  // outside, by whichever gateway is best when it leaves
	ScopeOutside                  // outside, from here: this node is a gateway
)

// Destination is the next stop of a leg, and the key of its queue.
type Destination struct {
	Scope  Scope       `cbor:"1,keyasint"`
	Node   mesh.NodeID `cbor:"2,keyasint,omitempty"` // for ScopeNode
	Domain string      `cbor:"3,keyasint,omitempty"` // for ScopeOutside: domain key
}

// String prints the destination as operators see it: "local",
// "node:0123456789abcdef", "gateway", "example.net".
func (d Destination) String() string {
	switch d.Scope {
	case ScopeLocal:
		return "local"
	case ScopeNode:
		return "node:" + d.Node.String()
	case ScopeGateway:
		return "gateway"
	case ScopeOutside:
		return d.Domain
	}
	return "nowhere"
}

// Leg is one message on its way to one destination, with the recipients that
// still wait there. Whoever gets a Leg reads it only.
type Leg struct {
	// Seq orders the legs of a destination: the log sequence of the message's
	// acceptance. (Seq, Dest) names the leg on this node.
	Seq      uint64
	Dest     Destination
	Envelope Envelope
	Rcpts    []Recipient // pending ones, in the order of the message
	Body     Body
	Attempts int       // ended attempts so far
	Accepted time.Time // when this node took it, by its own clock
}

// Outcome is what became of one recipient in one attempt.
type Outcome uint8

// The outcomes. All but Deferred and Moved are final.
const (
	Delivered Outcome = iota + 1 // it is in the mailbox, on disk
	Relayed                      // the next system has taken custody
	Deferred                     // try again
	Failed                       // it will never get there
	Moved                        // that node is not home; route anew
)

var outcomeNames = [...]string{"", "delivered", "relayed", "deferred", "failed", "moved"}

func (o Outcome) String() string {
	if int(o) < len(outcomeNames) {
		return outcomeNames[o]
	}
	return fmt.Sprintf("outcome(%d)", uint8(o))
}

// Final reports whether no further attempt follows.
func (o Outcome) Final() bool { return o == Delivered || o == Relayed || o == Failed }

// Result is what became of one recipient in one attempt.
type Result struct {
	Outcome Outcome `cbor:"1,keyasint"`
	Code    int     `cbor:"2,keyasint,omitempty"` // SMTP reply code; 0 when there was no reply
	// Enhanced is an RFC 3463 code such as "4.2.2", or "".
	Enhanced string `cbor:"3,keyasint,omitempty"`
	// Text is the other side's own words, or ours; one line, printable.
	Text string `cbor:"4,keyasint,omitempty"`
	// By names who said so: a host, or a node's name.
	By string `cbor:"5,keyasint,omitempty"`
	// Home and Version are set with Moved: where the answering node believes
	// the mailbox to live, and that belief's version.
	Home    mesh.NodeID `cbor:"6,keyasint,omitempty"`
	Version uint64      `cbor:"7,keyasint,omitempty"`
	// DSN says that the next system took over the duty to report (RFC 3461
	// section 5.2.2); only with Relayed.
	DSN bool `cbor:"8,keyasint,omitempty"`
	// Behind says that nothing was tried: earlier mail of the same sender to
	// the same mailbox waits. Only with Deferred.
	Behind bool `cbor:"9,keyasint,omitempty"`
}

// Waits is the result of a recipient whose turn has not come: see Result.Behind.
func Waits(by string) Result {
	return Result{Outcome: Deferred, Code: 451, Enhanced: "4.4.5", Text: "waits behind earlier mail of the same sender", By: by, Behind: true}
}

// Carrier takes the legs of one destination one stop further. Delivery, relay
// and smtpout are carriers.
type Carrier interface {
	// Carry pulls legs from src, in order, and reports each leg's results to
	// it, in any order. It returns when src has no more (nil), when ctx ends,
	// or when the destination cannot be reached now (the reason). Legs pulled
	// and not finished by then are pending again, in their old order.
	// At most one Carry runs per destination at a time.
	Carry(ctx context.Context, dest Destination, src Source) error
}

// Source hands the legs of one destination to a Carrier. It is safe for use by
// several goroutines.
type Source interface {
	// Next returns the next leg due, waiting for one while ctx lasts and the
	// queue has a reason to keep the destination open. io.EOF means that
	// nothing is due: finish what you have and return.
	Next(ctx context.Context) (*Leg, error)
	// Finish reports one Result for each of leg.Rcpts, in their order.
	Finish(leg *Leg, results []Result)
}
