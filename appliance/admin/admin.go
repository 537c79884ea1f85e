// Package admin is the one set of operations that page, command and API are
// faces of. Its types are the API's JSON and the command's --json: fields are
// added, never renamed.
package admin

import (
	"fmt"
	"time"

	"posthouse/appliance/health"
)

// Error is what an operation answers when it cannot be done: a stable code for
// scripts, one sentence for people, and the next step.
type Error struct {
	Code string `json:"code"` // "mesh.no-master", "user.exists", …
	Text string `json:"text"`
	Next string `json:"next,omitempty"`
	Kind Kind   `json:"-"`
}

// Kind sorts errors by what the caller can do about them.
type Kind uint8

// The kinds, with their HTTP status and exit code (sysexits.h).
const (
	Usage       Kind = iota + 1 // 400, 64: the request is wrong
	Denied                      // 403, 77
	NotFound                    // 404, 67: no such user, node or message
	Conflict                    // 409, 65: it exists, or is in another state
	Unavailable                 // 503, 75: try again when the reason is gone
	Internal                    // 500, 70
)

// HTTP returns the status code of the kind.
func (k Kind) HTTP() int { return [...]int{500, 400, 403, 404, 409, 503, 500}[k] }

// Exit returns the exit code of the kind.
func (k Kind) Exit() int { return [...]int{70, 64, 77, 67, 65, 75, 70}[k] }

func (e *Error) Error() string {
	if e.Next != "" {
		return e.Text + " " + e.Next
	}
	return e.Text
}

// Errorf makes an Error.
func Errorf(kind Kind, code, format string, args ...any) *Error {
	return &Error{Kind: kind, Code: code, Text: fmt.Sprintf(format, args...)}
}

// Status is what `posthouse status --json` prints.
type Status struct {
	Node         string             `json:"node"`
	Host         string             `json:"host"`
	Domain       string             `json:"domain"`
	State        string             `json:"state"` // of this node: fresh, joining, serving, draining, left
	Version      string             `json:"version"`
	Master       string             `json:"master"` // "" when none
	Term         uint64             `json:"term"`
	Generation   uint64             `json:"generation"`
	Health       Health             `json:"health"`
	Conditions   []health.Condition `json:"conditions"`
	QueueOutside int                `json:"queue_outside"` // recipients outside that wait here
	QueueHeld    int                `json:"queue_held"`    // recipients that wait for a person
	Members      []Member           `json:"members"`
	AppliedIndex uint64             `json:"applied_index"` // of the domain state here
	StateHash    string             `json:"state_hash"`    // equal on nodes of equal applied_index
	JoinProgress []string           `json:"join_progress,omitempty"`
	AsOf         time.Time          `json:"as_of"`
	Uptime       int64              `json:"uptime_s"`
	StoreBytes   int64              `json:"store_bytes"`      // that the message log takes on disk, as housekeeping saw it last
	StoreLive    int64              `json:"store_live_bytes"` // of them needed, estimated
}

// Health is the sentence.
type Health struct {
	OK       bool   `json:"ok"`
	Sentence string `json:"sentence"`
}

// Member is one node as the answering one sees it.
type Member struct {
	Name     string    `json:"name"`
	ID       string    `json:"id"`
	Host     string    `json:"host"`
	State    string    `json:"state"`
	Role     string    `json:"role"`
	Gateway  bool      `json:"gateway"`
	Version  string    `json:"version"`
	RTT      float64   `json:"rtt_ms"`
	Path     string    `json:"path"`  // "self", "direct", "via NAME", "none"
	Queue    int       `json:"queue"` // recipients waiting here for that node
	Oldest   int64     `json:"oldest_s"`
	Since    time.Time `json:"since"`
	Priority int       `json:"priority"`
}

// User is a person with a mailbox.
type User struct {
	Address string   `json:"address"`
	Name    string   `json:"name"`
	Home    string   `json:"home"` // node name
	Aliases []string `json:"aliases,omitempty"`
	Admin   bool     `json:"admin,omitempty"`
	ID      string   `json:"id"`
	Mailbox string   `json:"mailbox"`
	// Full: the mailbox is over its quota, as its home says; mail for it waits.
	Full bool `json:"full,omitempty"`
}

// UserChange makes or changes a user. Nil fields stay as they are.
type UserChange struct {
	Address string  `json:"address"`
	Name    *string `json:"name,omitempty"`
	// Home is a node's name; by default the node that is asked. It changes only
	// when the home that was is no member any more.
	Home     *string `json:"home,omitempty"`
	Password *string `json:"password,omitempty"`
	Admin    *bool   `json:"admin,omitempty"`
}

// Group is an address that stands for several people.
type Group struct {
	Address string   `json:"address"`
	Name    string   `json:"name"`
	Members []string `json:"members"` // addresses
	Owner   string   `json:"owner,omitempty"`
	Outside bool     `json:"outside"` // outside senders may write to it
}

// Alias is a second address of a user or group.
type Alias struct {
	Address string `json:"address"`
	Target  string `json:"target"`
}

// InitRequest founds a mesh on this node.
type InitRequest struct {
	Domain        string `json:"domain"`
	AdminName     string `json:"admin_name"` // local part of the first admin's address
	AdminPassword string `json:"admin_password"`
	Postmaster    string `json:"postmaster,omitempty"` // who gets postmaster@ and abuse@; default the admin
	// Networks are addresses that client certificates may name, such as
	// "10.0.0.0/8"; the demo uses it. Default: none.
	Networks []string `json:"networks,omitempty"`
}

// InitResult is what founding answers.
type InitResult struct {
	Node   string `json:"node"`
	Domain string `json:"domain"`
	Admin  string `json:"admin"` // the first admin's address
	CA     string `json:"ca"`    // PEM that clients trust
}

// JoinRequest writes the intent to join.
type JoinRequest struct {
	Target   string `json:"target"`          // a DNS name, host:port, or a token "PH1-…"
	At       string `json:"at,omitempty"`    // with a token: where to knock, when DNS does not tell
	Admin    string `json:"admin,omitempty"` // third door: a mesh admin's address
	Password string `json:"password,omitempty"`
	Member   bool   `json:"member,omitempty"` // as a plain member, see TokenRequest
}

// TokenRequest asks for a join token.
type TokenRequest struct {
	Reusable bool   `json:"reusable,omitempty"`
	Hours    int    `json:"hours,omitempty"` // default 24
	Name     string `json:"name,omitempty"`  // binds it to a node name
	// Member lets the node in as a plain member: it may not lead, and gets no
	// other office's secrets to keep.
	Member bool `json:"member,omitempty"`
}

// Token is a join token in the list; Secret only in the answer that made it.
type Token struct {
	ID       string    `json:"id"`
	Secret   string    `json:"secret,omitempty"`
	Reusable bool      `json:"reusable"`
	Expires  time.Time `json:"expires"`
	UsedBy   string    `json:"used_by,omitempty"`
	State    string    `json:"state"` // "open", "used", "expired", "revoked"
}

// Pending is a node that asks to be admitted.
type Pending struct {
	ID    string    `json:"id"`
	Name  string    `json:"name"`
	Host  string    `json:"host"`
	From  string    `json:"from"` // address that it came from
	Code  string    `json:"code"` // compare with what the node shows
	Since time.Time `json:"since"`
	State string    `json:"state"`           // pending, approved, refused, expired
	Clash string    `json:"clash,omitempty"` // "a node called plzen exists, last seen …"
}

// NodeChange changes a node's switches. Nil fields stay as they are.
type NodeChange struct {
	Name     string `json:"name"`
	Voter    *bool  `json:"voter,omitempty"`
	Gateway  *bool  `json:"gateway,omitempty"`
	Priority *int   `json:"priority,omitempty"`
	// Replaces is the name of a node that was put out of the mesh, perhaps the
	// same: its people, and the mail that waits for them, get their home at this
	// one, with empty mailboxes.
	Replaces string `json:"replaces,omitempty"`
}

// Settings are the values of the whole mesh.
type Settings struct {
	MaxMessage int64  `json:"max_message"` // bytes
	Quota      int64  `json:"quota"`       // bytes a mailbox; 0: none
	Smarthost  string `json:"smarthost"`   // host or host:port that takes all mail for outside; "": direct
	ClientName string `json:"client_name"` // the host name that clients are told; "": each office's own
	Postmaster string `json:"postmaster"`  // who gets mail to postmaster@ and abuse@
}

// SettingsChange changes what is not nil.
type SettingsChange struct {
	MaxMessage *int64  `json:"max_message,omitempty"`
	Quota      *int64  `json:"quota,omitempty"`
	Smarthost  *string `json:"smarthost,omitempty"`
	ClientName *string `json:"client_name,omitempty"`
	Postmaster *string `json:"postmaster,omitempty"`
}

// PromoteRequest takes over by hand when quorum is lost for good.
type PromoteRequest struct {
	// Confirm must be true; without it the answer says what may be lost.
	Confirm bool     `json:"confirm"`
	Revoke  []string `json:"revoke,omitempty"` // nodes to put out of the mesh
	Forget  []string `json:"forget,omitempty"` // nodes that will not come back; their keys are not tainted
}

// PromoteResult says what a promote did, or would do.
type PromoteResult struct {
	Done       bool     `json:"done"`
	Generation uint64   `json:"generation"`
	Term       uint64   `json:"term"`
	MayLose    []string `json:"may_lose"` // sentences
}

// QueueEntry is one message that waits here.
type QueueEntry struct {
	ID          string      `json:"id"`
	From        string      `json:"from"`
	Destination string      `json:"destination"` // "local", a node's name, "gateway", a domain
	Size        int64       `json:"size"`
	Accepted    time.Time   `json:"accepted"`
	Attempts    int         `json:"attempts"`
	Next        *time.Time  `json:"next,omitempty"` // nil: as soon as the destination is reached
	Held        string      `json:"held,omitempty"` // why it waits for a person
	Recipients  []QueueRcpt `json:"recipients"`
}

// QueueRcpt is one recipient that waits.
type QueueRcpt struct {
	Address string `json:"address"`
	State   string `json:"state"`
	Said    string `json:"said,omitempty"` // the other side's own words
}

// QueueAction names entries: one by ID, or all of a destination, or all.
type QueueAction struct {
	ID          string `json:"id,omitempty"`
	Destination string `json:"destination,omitempty"`
	All         bool   `json:"all,omitempty"`
	// From, for release only: what was handed to this node to be sent outside
	// and that it has not confirmed is taken back. For a node that is lost: if
	// it returns, it may have sent some of it already.
	From string `json:"from,omitempty"`
}

// ForkedCommand is a change that another lineage had committed and that this
// one does not have.
type ForkedCommand struct {
	Index uint64    `json:"index"`
	Time  time.Time `json:"time"`
	Actor string    `json:"actor"`
	What  string    `json:"what"`
}

// Spoken prints a duration in the unit that a person would use.
func Spoken(d time.Duration) string {
	switch {
	case d < 2*time.Minute:
		return fmt.Sprintf("%d s", int(max(d, 0).Seconds()))
	case d < 2*time.Hour:
		return fmt.Sprintf("%d min", int(d.Minutes()))
	case d < 48*time.Hour:
		return fmt.Sprintf("%d h", int(d.Hours()))
	}
	return fmt.Sprintf("%d days", int(d.Hours()/24))
}
