package domain

import (
	"time"

	"posthouse/mesh"
)

// Time is a moment in milliseconds since 1970, UTC. Zero means "never" or
// "not yet". Every Time of the state came in a command: it was read from the
// master's clock once and is the same everywhere.
type Time int64

// TimeOf converts from the standard library's time, cutting below a millisecond.
func TimeOf(t time.Time) Time { return Time(t.UnixMilli()) }

// Std converts to the standard library's time; zero becomes the zero time.Time.
func (t Time) Std() time.Time {
	if t == 0 {
		return time.Time{}
	}
	return time.UnixMilli(int64(t)).UTC()
}

// Records are immutable once they stand in the state: a command replaces a
// record, it never writes into one. Whoever gets a pointer to one from a query
// may keep it and reads it only. The numbers are the CBOR keys of snapshots:
// never reuse one.

// Lineage is one unbroken history of the domain state: founding starts the
// first, `posthouse mesh promote` each further one.
type Lineage struct {
	ID         mesh.ID `cbor:"1,keyasint"`
	Generation uint64  `cbor:"2,keyasint"`
	// Fork is the last index that this lineage shares with the one before it;
	// 0 for the founded one.
	Fork  uint64 `cbor:"3,keyasint,omitempty"`
	Since Time   `cbor:"4,keyasint,omitempty"`
}

// Domain is a mail domain with its other names.
type Domain struct {
	ID   mesh.ID `cbor:"1,keyasint"`
	Name string  `cbor:"2,keyasint"` // as given; the name that new addresses get
	// Aliases are further names with the same local parts, old names after a
	// rename among them.
	Aliases []string `cbor:"3,keyasint,omitempty"`
	// Postmaster is the user or group who gets mail for postmaster@ and abuse@
	// where no address of that name exists. Zero falls to Settings.Postmaster,
	// then to an administrator.
	Postmaster mesh.ID `cbor:"4,keyasint"`
}

// Node is an admitted or once admitted node.
type Node struct {
	ID   mesh.NodeID  `cbor:"1,keyasint"`
	Name string       `cbor:"2,keyasint"`
	Host string       `cbor:"3,keyasint,omitempty"`
	Key  mesh.KeyHash `cbor:"4,keyasint"`
	// Addresses are host:port under which other nodes dial it.
	Addresses []string `cbor:"5,keyasint,omitempty"`
	// Voter says that it is a candidate: it may hold the election, and all
	// secrets are sealed to it too. Gateway says that it has an MX record and
	// sends outside.
	Voter   bool `cbor:"6,keyasint"`
	Gateway bool `cbor:"7,keyasint"`
	// Priority orders voters and gateways: higher is preferred.
	Priority int `cbor:"8,keyasint,omitempty"`
	// ClientName is the host name that clients are told for this office; ""
	// means Settings.ClientName.
	ClientName string `cbor:"9,keyasint,omitempty"`
	Admitted   Time   `cbor:"10,keyasint"`
	AdmittedBy string `cbor:"11,keyasint,omitempty"`
	// Removed is set when the node left or was revoked; Revoked says that its
	// key shall never come back.
	Removed Time `cbor:"12,keyasint,omitempty"`
	Revoked bool `cbor:"13,keyasint,omitempty"`
	// Version is the software that the node last reported, Level the highest
	// command level that it knows.
	Version string `cbor:"14,keyasint,omitempty"`
	Level   uint32 `cbor:"15,keyasint"`
	// ReplacedBy is the node that took over the homes, or 0.
	ReplacedBy mesh.NodeID `cbor:"16,keyasint,omitempty"`
	// Incarnation grows when the node was restored from an older image of its
	// disk and has begun anew: what was known of it before does not count.
	Incarnation uint64 `cbor:"17,keyasint,omitempty"`
	// Seal is the key to which secrets for the node are sealed; it never changes.
	Seal mesh.SealKey `cbor:"18,keyasint"`
}

// Member reports whether the node is admitted now.
func (n *Node) Member() bool { return n.Removed == 0 }

// Role is what a user may do beyond his own mail.
type Role uint8

// The roles.
const (
	RoleUser Role = iota
	RoleHelpDesk
	RoleAuditor
	RoleDomainAdmin
	RoleMeshAdmin
	roleEnd
)

var roleNames = [...]string{"user", "help desk", "auditor", "domain admin", "mesh admin"}

func (r Role) String() string {
	if r < roleEnd {
		return roleNames[r]
	}
	return "unknown role"
}

// User is a person with a mailbox.
type User struct {
	ID      mesh.ID        `cbor:"1,keyasint"`
	Mailbox mesh.MailboxID `cbor:"2,keyasint"`
	// Address is the primary address as given; Aliases are further ones.
	Address string   `cbor:"3,keyasint"`
	Aliases []string `cbor:"4,keyasint,omitempty"`
	Name    string   `cbor:"5,keyasint,omitempty"` // display name
	// Home is the node where the mailbox lives and HomeVersion the number of
	// that belief; it only grows.
	Home        mesh.NodeID `cbor:"6,keyasint"`
	HomeVersion uint64      `cbor:"7,keyasint"`
	// Verifier is a sealed argon2id PHC string. Nil: the user cannot log in
	// with a password.
	Verifier    *Sealed `cbor:"8,keyasint,omitempty"`
	CredVersion uint64  `cbor:"9,keyasint,omitempty"` // grows with each change of the password
	Role        Role    `cbor:"10,keyasint,omitempty"`
	// SendAs are further addresses that the user may send from.
	SendAs   []string `cbor:"11,keyasint,omitempty"`
	Disabled bool     `cbor:"12,keyasint,omitempty"` // may not log in; mail is still kept
	Quota    int64    `cbor:"13,keyasint,omitempty"` // bytes; 0 means Settings.Quota
	Created  Time     `cbor:"14,keyasint,omitempty"`
}

// Target is a member of a group or the target of an alias: exactly one field
// is set.
type Target struct {
	ID      mesh.ID `cbor:"1,keyasint"`           // user or group
	Address string  `cbor:"2,keyasint,omitempty"` // any address, outside ones too
}

// Group is an address with many members.
type Group struct {
	ID      mesh.ID  `cbor:"1,keyasint"`
	Address string   `cbor:"2,keyasint"`
	Aliases []string `cbor:"3,keyasint,omitempty"`
	Name    string   `cbor:"4,keyasint,omitempty"`
	Members []Target `cbor:"5,keyasint,omitempty"`
	// Owner gets the bounces of mail sent to the group; "" leaves them to the
	// sender.
	Owner string `cbor:"6,keyasint,omitempty"`
	// Outside lets senders from outside the mesh write to the group.
	Outside bool `cbor:"7,keyasint,omitempty"`
}

// Alias is an address that stands for others.
type Alias struct {
	ID      mesh.ID  `cbor:"1,keyasint"`
	Address string   `cbor:"2,keyasint"`
	Targets []Target `cbor:"3,keyasint"`
}

// DeviceRule lets a scanner or printer submit without logging in.
type DeviceRule struct {
	ID      mesh.ID     `cbor:"1,keyasint"`
	Name    string      `cbor:"2,keyasint,omitempty"`
	Node    mesh.NodeID `cbor:"3,keyasint,omitempty"` // 0: at every node
	CIDR    string      `cbor:"4,keyasint"`
	Senders []string    `cbor:"5,keyasint,omitempty"` // addresses it may send from
}

// Settings are the values of the whole mesh.
type Settings struct {
	MaxMessage int64   `cbor:"1,keyasint"`           // bytes, default 72 MiB
	Smarthost  string  `cbor:"2,keyasint,omitempty"` // host:port; "" sends directly
	ClientName string  `cbor:"3,keyasint,omitempty"` // the stable host name that clients are told
	MeshName   string  `cbor:"4,keyasint,omitempty"` // what people call this mesh
	Postmaster mesh.ID `cbor:"5,keyasint"`           // user or group, see Domain.Postmaster
	Quota      int64   `cbor:"6,keyasint,omitempty"` // bytes a mailbox; 0 is unlimited
	// TakeBack is how long a node of higher priority must be in steady contact
	// before it gets the election back, in milliseconds; 0 means 60 s.
	TakeBack int64 `cbor:"7,keyasint,omitempty"`
}

// DefaultMaxMessage is 72 MiB: 50 MB attached.
const DefaultMaxMessage = 72 << 20

// Token is a join token: the state holds its public key, never its seed.
type Token struct {
	ID       mesh.ID       `cbor:"1,keyasint"`
	Public   []byte        `cbor:"2,keyasint"` // Ed25519, 32 bytes
	Created  Time          `cbor:"3,keyasint"`
	By       string        `cbor:"4,keyasint,omitempty"`
	Expires  Time          `cbor:"5,keyasint"`
	Reusable bool          `cbor:"6,keyasint,omitempty"`
	UsedBy   []mesh.NodeID `cbor:"7,keyasint,omitempty"`
	UsedAt   Time          `cbor:"8,keyasint,omitempty"`
	Revoked  Time          `cbor:"9,keyasint,omitempty"`
	RevokedB string        `cbor:"10,keyasint,omitempty"`
	Note     string        `cbor:"11,keyasint,omitempty"`
	Plain    bool          `cbor:"12,keyasint,omitempty"` // who joins with it is no candidate
}

// PendingState is where an application for admission stands.
type PendingState uint8

// The states of an application.
const (
	PendingOpen PendingState = iota
	PendingApproved
	PendingRefused
	PendingExpired
)

// Pending is a node that asked to be let in without a token.
type Pending struct {
	ID        mesh.ID      `cbor:"1,keyasint"`
	Key       mesh.KeyHash `cbor:"2,keyasint"`
	Name      string       `cbor:"3,keyasint"`
	Host      string       `cbor:"4,keyasint,omitempty"`
	Addresses []string     `cbor:"5,keyasint,omitempty"`
	Code      string       `cbor:"6,keyasint,omitempty"` // the short code that both sides show
	Asked     Time         `cbor:"7,keyasint"`
	Expires   Time         `cbor:"8,keyasint"`
	State     PendingState `cbor:"9,keyasint,omitempty"`
	Decided   Time         `cbor:"10,keyasint,omitempty"`
	By        string       `cbor:"11,keyasint,omitempty"`
	Node      mesh.NodeID  `cbor:"12,keyasint,omitempty"` // as the node asks for; surely its own once approved
	Seal      mesh.SealKey `cbor:"13,keyasint"`
	Plain     bool         `cbor:"14,keyasint,omitempty"` // wants to be no candidate
}

// StateAt is State, with an open application seen as expired after its time.
func (p *Pending) StateAt(now Time) PendingState {
	if p.State == PendingOpen && now >= p.Expires {
		return PendingExpired
	}
	return p.State
}

// Entry is one line of the journal: a command, who gave it and what came of
// it. The journal keeps the last JournalSize; it is the answer to repeated
// commands, the audit, and the list of what the other side of a fork did.
type Entry struct {
	Index uint64      `cbor:"1,keyasint"`
	Term  uint64      `cbor:"2,keyasint"`
	At    Time        `cbor:"3,keyasint"`
	ID    mesh.ID     `cbor:"4,keyasint"`
	Actor string      `cbor:"5,keyasint,omitempty"`
	Via   mesh.NodeID `cbor:"6,keyasint,omitempty"` // the node where it was made
	Kind  Kind        `cbor:"7,keyasint"`
	Text  string      `cbor:"8,keyasint,omitempty"` // one line for people
	Res   Result      `cbor:"9,keyasint"`
}

// JournalSize is how many commands the state remembers.
const JournalSize = 10_000
