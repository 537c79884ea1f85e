// Package mesh is the vocabulary of the mesh: who is a node, what a node knows
// of the others, and the identities that everything else refers to.
//
// It holds no behaviour beyond parsing and printing, imports nothing of this
// project and may be imported by every package of it.
package mesh

import (
	"encoding/hex"
	"errors"
	"fmt"
	"strconv"
	"time"
)

// NodeID names a node for ever. It is 64 random bits given at admission and
// never reused; a node's name and key are attributes that may change.
// The zero NodeID means "no node".
type NodeID uint64

// String returns 16 lower-case hexadecimal digits.
func (n NodeID) String() string { return fmt.Sprintf("%016x", uint64(n)) }

// ParseNodeID reads what String prints.
func ParseNodeID(s string) (NodeID, error) {
	v, err := strconv.ParseUint(s, 16, 64)
	if err != nil || len(s) != 16 {
		return 0, fmt.Errorf("node id %q: want 16 hexadecimal digits", s)
	}
	return NodeID(v), nil
}

// MarshalText implements encoding.TextMarshaler.
func (n NodeID) MarshalText() ([]byte, error) { return []byte(n.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (n *NodeID) UnmarshalText(b []byte) (err error) { *n, err = ParseNodeID(string(b)); return err }

// ID is a random 128-bit identity of a user, group, alias, domain, lineage or
// command. Nothing on disk or on the wire is keyed by an address or a name.
type ID [16]byte

var errID = errors.New("want 32 hexadecimal digits")

// String returns 32 lower-case hexadecimal digits.
func (i ID) String() string { return hex.EncodeToString(i[:]) }

// IsZero reports whether i is "none".
func (i ID) IsZero() bool { return i == ID{} }

// ParseID reads what String prints.
func ParseID(s string) (i ID, err error) {
	if n, err := hex.Decode(i[:], []byte(s)); err != nil || n != len(i) || len(s) != 2*len(i) {
		return ID{}, fmt.Errorf("id %q: %w", s, errID)
	}
	return i, nil
}

// MarshalText implements encoding.TextMarshaler.
func (i ID) MarshalText() ([]byte, error) { return []byte(i.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (i *ID) UnmarshalText(b []byte) (err error) { *i, err = ParseID(string(b)); return err }

// MailboxID names one user's (later also one resource's) whole mailbox: all its
// folders. It stays the same through renames and moves between nodes.
type MailboxID ID

// String returns 32 lower-case hexadecimal digits.
func (m MailboxID) String() string { return ID(m).String() }

// IsZero reports whether m is "none".
func (m MailboxID) IsZero() bool { return m == MailboxID{} }

// MarshalText implements encoding.TextMarshaler.
func (m MailboxID) MarshalText() ([]byte, error) { return ID(m).MarshalText() }

// UnmarshalText implements encoding.TextUnmarshaler.
func (m *MailboxID) UnmarshalText(b []byte) error { return (*ID)(m).UnmarshalText(b) }

// KeyHash is the SHA-256 of a node's public key in its PKIX (SubjectPublicKeyInfo)
// form. A peer is admitted if and only if its KeyHash stands as admitted in the
// applied domain state.
type KeyHash [32]byte

// String returns 64 lower-case hexadecimal digits.
func (k KeyHash) String() string { return hex.EncodeToString(k[:]) }

// IsZero reports whether k is "none".
func (k KeyHash) IsZero() bool { return k == KeyHash{} }

// SealKey is the public key (X25519) to which secrets for one node, or for the
// candidates together, are sealed. It says nothing about who is admitted.
type SealKey [32]byte

// IsZero reports whether k is "none".
func (k SealKey) IsZero() bool { return k == SealKey{} }

// Authority says which election a master's act stands on. It orders first by
// Generation, then by Term. Two authorities of one generation but different
// lineages have no order: both stop writing until a person picks one.
type Authority struct {
	Lineage    ID     // random, made by founding or by `posthouse mesh promote`
	Generation uint64 // 1 for a founded mesh; each promote adds one
	Term       uint64 // the election within the lineage; only grows
}

// State is where a node stands in its life, as others see it.
type State string

// The states of a node. Unreachable is the one that only others can see.
const (
	Fresh       State = "fresh"
	Joining     State = "joining"
	Serving     State = "serving"
	Draining    State = "draining"
	Left        State = "left"
	Unreachable State = "unreachable"
)

// Role is a node's part in the election.
type Role string

// The roles. Plain members hold a full copy of the domain state without a vote.
const (
	RoleMaster Role = "master"
	RoleVoter  Role = "voter"
	RoleMember Role = "member"
)

// Member is what a node knows of one node, itself included.
type Member struct {
	ID      NodeID
	Name    string // label, such as "plzen"
	Host    string // host name, such as "plzen.company.com"
	State   State
	Role    Role
	Gateway bool          // sends to and receives from the Internet
	Version string        // of the software; "" when never heard
	RTT     time.Duration // 0 when not measured
	Since   time.Time     // when State was last seen to change, by this node's clock
}

// View is an immutable picture of the mesh as one node sees it. Nobody writes
// to a View after it was published; a new one replaces it.
type View struct {
	Self      NodeID
	Members   []Member // every node of the domain state, ordered by name
	Master    NodeID   // 0 when nobody is known to hold the election now
	Authority Authority
}

// Member returns the member with that id.
func (v *View) Member(id NodeID) (Member, bool) {
	for _, m := range v.Members {
		if m.ID == id {
			return m, true
		}
	}
	return Member{}, false
}
