package domain

import (
	"fmt"

	"posthouse/mesh"
)

// Code is what became of a command. It is part of the state: the same on
// every node.
type Code uint16

// The codes. Never renumber one.
const (
	OK           Code = 0
	Invalid      Code = 1  // malformed or against a rule; Text says which
	NotFound     Code = 2  // what it is about does not exist
	NameTaken    Code = 3  // a name or address is somebody else's
	Conflict     Code = 4  // the object is not in the version that the command expects
	InUse        Code = 5  // other objects still need it
	TokenUnknown Code = 6  // no such join token
	TokenExpired Code = 7  // past its time
	TokenUsed    Code = 8  // single-use, and another node used it
	TokenRevoked Code = 9  // taken back
	KeyRevoked   Code = 10 // that node key was revoked
	NotPending   Code = 11 // the application was refused or has expired
	NotFounded   Code = 12 // the mesh has to be founded first
	Founded      Code = 13 // it was founded before
	WrongLineage Code = 14 // not the successor of the present lineage
	Limit        Code = 15 // there are too many of these already
	Resealed     Code = 16 // sealed for nodes that are not the ones any more: seal again and repeat
)

var codeNames = map[Code]string{
	OK: "ok", Invalid: "invalid", NotFound: "not found", NameTaken: "name taken", Conflict: "conflict", InUse: "in use",
	TokenUnknown: "token unknown", TokenExpired: "token expired", TokenUsed: "token used", TokenRevoked: "token revoked",
	KeyRevoked: "key revoked", NotPending: "not pending", NotFounded: "not founded", Founded: "already founded",
	WrongLineage: "wrong lineage", Limit: "limit", Resealed: "resealed",
}

func (c Code) String() string {
	if s, ok := codeNames[c]; ok {
		return s
	}
	return fmt.Sprintf("code(%d)", uint16(c))
}

// Result is the answer to a command.
type Result struct {
	Code  Code        `cbor:"1,keyasint"`
	Text  string      `cbor:"2,keyasint,omitempty"` // a sentence for people; "" with OK
	Index uint64      `cbor:"3,keyasint"`           // where the command was first applied
	Node  mesh.NodeID `cbor:"4,keyasint,omitempty"` // of an admission: who it is, also for a repeated one
}

// Err returns nil for OK and the result as an error otherwise; match codes
// with errors.As.
func (r Result) Err() error {
	if r.Code == OK {
		return nil
	}
	return &Refusal{r}
}

// Refusal is a command's result other than OK.
type Refusal struct{ Result Result }

func (r *Refusal) Error() string { return r.Result.Text }

func no(c Code, format string, args ...any) Result {
	return Result{Code: c, Text: fmt.Sprintf(format, args...)}
}

// EncodeResult and DecodeResult carry a result from the master to the node
// where the command was made.
func EncodeResult(r Result) []byte { return mustEncode(r) }

// DecodeResult reads what EncodeResult wrote.
func DecodeResult(b []byte) (r Result, err error) {
	if err := decLax.Unmarshal(b, &r); err != nil {
		return Result{}, fmt.Errorf("read the result of a command: %w", err)
	}
	return r, nil
}
