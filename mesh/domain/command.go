package domain

import (
	"errors"
	"fmt"
	"time"

	"github.com/fxamacker/cbor/v2"

	"posthouse/mesh"
)

// Kind numbers a kind of command for ever.
type Kind uint16

// The kinds. Never renumber one; a new one gets a line in kinds too.
const (
	KindFound         Kind = 1
	KindPromote       Kind = 2
	KindAdmitNode     Kind = 10
	KindRevokeNode    Kind = 11
	KindUpdateNode    Kind = 12
	KindReplaceNode   Kind = 13
	KindReportVersion Kind = 14
	KindRenewNode     Kind = 15
	KindCreateUser    Kind = 20
	KindUpdateUser    Kind = 21
	KindDeleteUser    Kind = 22
	KindSetPassword   Kind = 23
	KindSetHome       Kind = 24
	KindPutGroup      Kind = 30
	KindDeleteGroup   Kind = 31
	KindPutAlias      Kind = 32
	KindDeleteAlias   Kind = 33
	KindPutDomain     Kind = 34
	KindDeleteDomain  Kind = 35
	KindCreateToken   Kind = 40
	KindRevokeToken   Kind = 41
	KindAskAdmission  Kind = 42
	KindRefusePending Kind = 43
	KindSetSettings   Kind = 50
	KindPutRule       Kind = 51
	KindDeleteRule    Kind = 52
	KindReseal        Kind = 60
)

// Level is the command level of this build: it knows every kind whose
// MinVersion is at most Level. A build that adds a kind, or a field to one,
// raises it.
const Level uint32 = 1

type kindInfo struct {
	name string
	min  uint32
	new  func() Body
}

// kinds is the table of what this build can apply.
var kinds = map[Kind]kindInfo{
	KindFound:         {"found", 1, func() Body { return new(Found) }},
	KindPromote:       {"promote", 1, func() Body { return new(Promote) }},
	KindAdmitNode:     {"admit node", 1, func() Body { return new(AdmitNode) }},
	KindRevokeNode:    {"revoke node", 1, func() Body { return new(RevokeNode) }},
	KindUpdateNode:    {"update node", 1, func() Body { return new(UpdateNode) }},
	KindReplaceNode:   {"replace node", 1, func() Body { return new(ReplaceNode) }},
	KindReportVersion: {"report version", 1, func() Body { return new(ReportVersion) }},
	KindRenewNode:     {"renew node", 1, func() Body { return new(RenewNode) }},
	KindCreateUser:    {"create user", 1, func() Body { return new(CreateUser) }},
	KindUpdateUser:    {"update user", 1, func() Body { return new(UpdateUser) }},
	KindDeleteUser:    {"delete user", 1, func() Body { return new(DeleteUser) }},
	KindSetPassword:   {"set password", 1, func() Body { return new(SetPassword) }},
	KindSetHome:       {"set home", 1, func() Body { return new(SetHome) }},
	KindPutGroup:      {"put group", 1, func() Body { return new(PutGroup) }},
	KindDeleteGroup:   {"delete group", 1, func() Body { return new(DeleteGroup) }},
	KindPutAlias:      {"put alias", 1, func() Body { return new(PutAlias) }},
	KindDeleteAlias:   {"delete alias", 1, func() Body { return new(DeleteAlias) }},
	KindPutDomain:     {"put domain", 1, func() Body { return new(PutDomain) }},
	KindDeleteDomain:  {"delete domain", 1, func() Body { return new(DeleteDomain) }},
	KindCreateToken:   {"create token", 1, func() Body { return new(CreateToken) }},
	KindRevokeToken:   {"revoke token", 1, func() Body { return new(RevokeToken) }},
	KindAskAdmission:  {"ask admission", 1, func() Body { return new(AskAdmission) }},
	KindRefusePending: {"refuse pending", 1, func() Body { return new(RefusePending) }},
	KindSetSettings:   {"set settings", 1, func() Body { return new(SetSettings) }},
	KindPutRule:       {"put device rule", 1, func() Body { return new(PutRule) }},
	KindDeleteRule:    {"delete device rule", 1, func() Body { return new(DeleteRule) }},
	KindReseal:        {"reseal", 1, func() Body { return new(Reseal) }},
}

func (k Kind) String() string {
	if i, ok := kinds[k]; ok {
		return i.name
	}
	return fmt.Sprintf("kind(%d)", uint16(k))
}

// MinVersion returns the command level from which nodes know kind; ok is false
// for a kind that this build does not know itself.
func MinVersion(k Kind) (level uint32, ok bool) { i, ok := kinds[k]; return i.min, ok }

// Body is the part of a command that depends on its kind.
type Body interface {
	kind() Kind
	// check refuses what no state could accept.
	check() Result
	// apply changes s and returns the line for the journal. It changes nothing
	// unless the result is OK.
	apply(s *state, c *Command) (Result, string)
}

// Command is one change of the domain state.
type Command struct {
	ID    mesh.ID     // random; a repeated one is answered, not applied again
	Actor string      // who asked for it: "alice@company.com", "posthouse on plzen"
	Via   mesh.NodeID // the node where it was made; Prepare sets it
	At    Time        // the master's clock; Prepare sets it
	Body  Body
	// Seal is what the command changes in how secrets are sealed; the master
	// alone attaches it (Prepare). It holds if the command does.
	Seal *Reseal
}

type wireCommand struct {
	Version uint8           `cbor:"1,keyasint"`
	Kind    Kind            `cbor:"2,keyasint"`
	ID      mesh.ID         `cbor:"3,keyasint"`
	Actor   string          `cbor:"4,keyasint,omitempty"`
	Via     mesh.NodeID     `cbor:"5,keyasint,omitempty"`
	At      Time            `cbor:"6,keyasint,omitempty"`
	Body    cbor.RawMessage `cbor:"7,keyasint"`
	Seal    cbor.RawMessage `cbor:"8,keyasint,omitempty"`
}

const (
	commandVersion = 1
	// MaxCommand bounds a command: a group of 10,000 members fits.
	MaxCommand = 1 << 20
	maxActor   = 400
)

// Errors that are not results: the caller of Apply stops its Raft on them.
var (
	// ErrUnknownCommand means that a newer version made the command: applying
	// the rest without it would make this node's state another one.
	ErrUnknownCommand = errors.New("the domain state holds a command that this version does not know")
	// ErrIndex means that the command's index is not above the applied one.
	ErrIndex = errors.New("command index is not above the applied index")
	// ErrVersion means that some admitted node does not know the kind yet.
	ErrVersion = errors.New("not every node knows this kind of command yet")
	// ErrMalformed means that the bytes are no command.
	ErrMalformed = errors.New("malformed command")
)

// Encode returns the bytes to propose. A command with a zero ID or a nil Body
// is a bug and panics.
func (c *Command) Encode() []byte {
	if c.ID.IsZero() || c.Body == nil {
		panic("domain: command without id or body")
	}
	w := wireCommand{commandVersion, c.Body.kind(), c.ID, c.Actor, c.Via, c.At, mustEncode(c.Body), nil}
	if c.Seal != nil {
		w.Seal = mustEncode(c.Seal)
	}
	return mustEncode(w)
}

// Decode reads what Encode wrote, strictly: a kind or a field that this build
// does not know is ErrUnknownCommand, anything else that is wrong ErrMalformed.
func Decode(b []byte) (*Command, error) {
	if len(b) > MaxCommand {
		return nil, fmt.Errorf("%w: %d bytes", ErrMalformed, len(b))
	}
	var w wireCommand
	if err := decLax.Unmarshal(b, &w); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrMalformed, err)
	}
	info, ok := kinds[w.Kind]
	if w.Version > commandVersion || w.Version == commandVersion && !ok {
		return nil, fmt.Errorf("%w: kind %d, format %d", ErrUnknownCommand, w.Kind, w.Version)
	}
	if w.Version == 0 || w.ID.IsZero() || len(w.Actor) > maxActor {
		return nil, ErrMalformed
	}
	c := &Command{w.ID, w.Actor, w.Via, w.At, info.new(), nil}
	if err := decodePart(w.Kind, w.Body, c.Body); err != nil {
		return nil, err
	}
	if len(w.Seal) > 0 {
		c.Seal = new(Reseal)
		if err := decodePart(w.Kind, w.Seal, c.Seal); err != nil {
			return nil, err
		}
	}
	return c, nil
}

func decodePart(kind Kind, b []byte, to any) error {
	err := decStrict.Unmarshal(b, to)
	if err == nil {
		return nil
	}
	if _, unknown := errors.AsType[*cbor.UnknownFieldError](err); unknown {
		return fmt.Errorf("%w: %s with a new field", ErrUnknownCommand, kind)
	}
	return fmt.Errorf("%w: %s: %w", ErrMalformed, kind, err)
}

// Prepare makes command ready to be proposed: the master calls it with its own
// clock and the authenticated node that the command came from. It refuses what
// is malformed, what some admitted node does not know yet, and what a node may
// not say for another. To a command that changes a home or the candidates it
// attaches the secrets, sealed anew, as far as this node can open them. It
// changes no state, and is the only place with randomness in it: the Keyring's.
func (m *Machine) Prepare(command []byte, from mesh.NodeID, now time.Time) ([]byte, error) {
	c, err := Decode(command)
	if err != nil {
		return nil, err
	}
	if r := c.Body.check(); r.Code != OK {
		return nil, r.Err()
	}
	if err := m.MayPropose(c.Body.kind()); err != nil {
		return nil, err
	}
	if v, ok := c.Body.(*ReportVersion); ok && v.Node != from {
		return nil, no(Invalid, "a node reports its own version only").Err()
	}
	if v, ok := c.Body.(*RenewNode); ok && v.Node != from {
		return nil, no(Invalid, "a node renews itself only").Err()
	}
	if v, ok := c.Body.(*Reseal); ok {
		if r := m.mayReseal(v, from); r.Code != OK {
			return nil, r.Err()
		}
	}
	c.Via, c.At, c.Seal = from, TimeOf(now), nil
	if err := m.attach(c); err != nil {
		return nil, fmt.Errorf("seal the secrets anew: %w", err)
	}
	return c.Encode(), nil
}

// MayPropose reports whether every admitted node knows kind; the error names
// one that does not and wraps ErrVersion.
func (m *Machine) MayPropose(k Kind) error {
	level, ok := MinVersion(k)
	if !ok {
		return fmt.Errorf("%w: kind %d", ErrUnknownCommand, k)
	}
	for _, n := range m.Nodes() {
		if n.Member() && n.Level < level {
			return fmt.Errorf("%w: update node %s first (it runs %s)", ErrVersion, n.Name, n.Version)
		}
	}
	return nil
}

// Coding: deterministic output, bounded input.

const (
	maxElements = 131_072 // of an array; twice the largest list that a command may carry
	maxNesting  = 8
)

var (
	encMode, _ = cbor.EncOptions{
		Sort: cbor.SortCoreDeterministic, ShortestFloat: cbor.ShortestFloat16, NaNConvert: cbor.NaNConvert7e00,
		InfConvert: cbor.InfConvertFloat16, IndefLength: cbor.IndefLengthForbidden, TagsMd: cbor.TagsForbidden,
	}.EncMode()
	decLax, _    = decOptions(cbor.ExtraDecErrorNone).DecMode()
	decStrict, _ = decOptions(cbor.ExtraDecErrorUnknownField).DecMode()
)

func decOptions(extra cbor.ExtraDecErrorCond) cbor.DecOptions {
	return cbor.DecOptions{
		DupMapKey: cbor.DupMapKeyEnforcedAPF, IndefLength: cbor.IndefLengthForbidden, TagsMd: cbor.TagsForbidden,
		MaxArrayElements: maxElements, MaxMapPairs: 64, MaxNestedLevels: maxNesting, ExtraReturnErrors: extra, UTF8: cbor.UTF8RejectInvalid,
	}
}

func mustEncode(v any) []byte {
	b, err := encMode.Marshal(v)
	if err != nil {
		panic(fmt.Sprintf("domain: encode %T: %v", v, err))
	}
	return b
}
