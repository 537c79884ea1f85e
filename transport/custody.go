package transport

// Fate is what a gateway says of a recipient that is offered to it.
type Fate struct {
	Kept   bool   `cbor:"1,keyasint"`           // it is on the gateway's disk, kept or already released
	Result Result `cbor:"2,keyasint,omitempty"` // otherwise: how it ended there, or why it is not kept
}

// Standing is how an outside recipient stands at its origin, towards a gateway
// that keeps it.
type Standing uint8

// The standings.
const (
	Undecided   Standing = iota + 1 // still the origin's: keep it, ask again later
	ReleasedYou                     // released to the asking gateway: send it
	NotYours                        // with another gateway, or ended: drop it
	NotKnown                        // the origin has never heard of it: a person must look
)

// KeptLeg is what a gateway keeps of one message without a release.
type KeptLeg struct {
	ID   MessageID `cbor:"1,keyasint"`
	Keys []string  `cbor:"2,keyasint"` // Recipient.Key
}

// FinalResult is how a recipient ended that a gateway sent for its origin.
type FinalResult struct {
	ID     MessageID `cbor:"1,keyasint"`
	Key    string    `cbor:"2,keyasint"` // Recipient.Key
	Result Result    `cbor:"3,keyasint"`
}
