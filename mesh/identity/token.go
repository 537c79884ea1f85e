package identity

import (
	"crypto/ed25519"
	"crypto/pbkdf2"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base32"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"strings"

	"posthouse/mesh"
)

// Token is a join token: one line that an admin carries from a page of the mesh to a new
// node. It lets both sides trust each other: the node dials only keys that the
// token pins, and proves by the token's seed that it was invited. The mesh keeps the
// seed's public key alone, so that nobody who reads the domain state can join.
//
// Version 1 is "PH1-" and, in Crockford's base 32 (no I, L, O, U; read in either
// case; hyphens and white space anywhere are ignored):
//
//	seed      32 bytes   Ed25519 seed
//	pins      10 bytes   each: the first bytes of a candidate's key hash; one to three
//	checksum   4 bytes   first bytes of SHA-256("posthouse join token 1" + all before)
//
// Ten bytes: an impostor must find a key for one of at most three given 80-bit
// values within the token's short life.
type Token struct {
	Seed [ed25519.SeedSize]byte
	Pins []Pin // one to MaxPins
}

// Pin is the beginning of a candidate's key hash.
type Pin [10]byte

// MaxPins is how many candidates a token may name.
const MaxPins = 3

const (
	tokenPrefix   = "PH1-"
	tokenLabel    = "posthouse join token 1"
	checksumSize  = 4
	tokenMaxInput = 1024 // characters looked at; a whole token has at most 110
)

var crockford = base32.NewEncoding("0123456789ABCDEFGHJKMNPQRSTVWXYZ").WithPadding(base32.NoPadding)

// NewToken makes a token from random that pins the first MaxPins of the candidates,
// who are the nodes that may be dialled to join; at least one is needed.
func NewToken(random io.Reader, candidates []mesh.KeyHash) (Token, error) {
	if len(candidates) == 0 {
		return Token{}, errors.New("make join token: no node can be named that admits others")
	}
	var t Token
	if _, err := io.ReadFull(random, t.Seed[:]); err != nil {
		return Token{}, fmt.Errorf("make join token: %w", err)
	}
	for _, c := range candidates[:min(len(candidates), MaxPins)] {
		t.Pins = append(t.Pins, Pin(c[:len(Pin{})]))
	}
	return t, nil
}

// Encode returns the line to hand over. It is a secret.
func (t Token) Encode() string {
	b := slices.Clone(t.Seed[:])
	for _, p := range t.Pins {
		b = append(b, p[:]...)
	}
	return tokenPrefix + crockford.EncodeToString(append(b, checksum(b)...))
}

// String hides the secret.
func (t Token) String() string { return tokenPrefix + "(hidden)" }

// GoString hides the secret.
func (t Token) GoString() string { return t.String() }

// LogValue implements slog.LogValuer; it hides the secret.
func (t Token) LogValue() slog.Value { return slog.StringValue(t.String()) }

func checksum(b []byte) []byte {
	h := sha256.New()
	io.WriteString(h, tokenLabel)
	h.Write(b)
	return h.Sum(nil)[:checksumSize]
}

// ParseToken reads a token as people paste it. Its error is one sentence for them.
func ParseToken(s string) (Token, error) {
	s = strings.TrimSpace(s)
	if s == "" {
		return Token{}, errors.New("the join token is empty: copy the whole line that begins with PH1-")
	}
	if len(s) > tokenMaxInput {
		return Token{}, errors.New("this is too long for a join token: copy only the line that begins with PH1-")
	}
	s = strings.ToUpper(s)
	rest, ok := strings.CutPrefix(s, tokenPrefix)
	if !ok {
		if len(s) > 4 && s[:2] == "PH" && s[2] >= '2' && s[2] <= '9' && s[3] == '-' {
			return Token{}, fmt.Errorf("the join token was made by a newer Posthouse (%s): update this node, then join", s[:4])
		}
		return Token{}, errors.New("this is not a join token: it must begin with PH1-")
	}
	text := make([]byte, 0, len(rest))
	for _, r := range rest {
		switch {
		case r == '-' || r == ' ' || r == '\t' || r == '\r' || r == '\n' || r == '\u00a0':
		case r == 'O':
			text = append(text, '0')
		case r == 'I' || r == 'L':
			text = append(text, '1')
		case r >= '0' && r <= '9' || r >= 'A' && r <= 'Z' && r != 'U':
			text = append(text, byte(r))
		default:
			return Token{}, fmt.Errorf("the join token cannot contain %q: copy it again", r)
		}
	}
	b := make([]byte, crockford.DecodedLen(len(text)))
	n, err := crockford.Decode(b, text)
	b = b[:max(n, 0)]
	short := len(b) < ed25519.SeedSize+len(Pin{})+checksumSize
	if err == nil && !short {
		body, sum := b[:len(b)-checksumSize], b[len(b)-checksumSize:]
		pins := body[ed25519.SeedSize:]
		if len(pins)%len(Pin{}) == 0 && len(pins) <= MaxPins*len(Pin{}) && subtle.ConstantTimeCompare(sum, checksum(body)) == 1 {
			t := Token{Seed: [ed25519.SeedSize]byte(body)}
			for p := range slices.Chunk(pins, len(Pin{})) {
				t.Pins = append(t.Pins, Pin(p))
			}
			// One token has one spelling: bits that the last character has too many must be zero.
			if t.Encode() == tokenPrefix+string(text) {
				return t, nil
			}
		}
	}
	if short {
		return Token{}, errors.New("the join token is incomplete: copy the whole line")
	}
	return Token{}, errors.New("the join token is mistyped, or a part of it is missing: copy the whole line again")
}

// PublicKey is what the domain state keeps of a token: 32 bytes.
func (t Token) PublicKey() ed25519.PublicKey {
	return ed25519.NewKeyFromSeed(t.Seed[:]).Public().(ed25519.PublicKey)
}

// Expect is the joiner's check of the node that it has dialled.
func (t Token) Expect(peer mesh.KeyHash) error {
	for _, p := range t.Pins {
		if subtle.ConstantTimeCompare(p[:], peer[:len(p)]) == 1 {
			return nil
		}
	}
	return errors.New("the node that answered is not one that this join token names: check the address, or ask for a new token if the mesh's nodes were replaced")
}

// Prove signs for the joiner: the holder of the token asks to admit the key joiner
// within the TLS session that exporter comes from (RFC 8446 section 7.5), and in no other.
func (t Token) Prove(exporter []byte, joiner mesh.KeyHash) []byte {
	return ed25519.Sign(ed25519.NewKeyFromSeed(t.Seed[:]), proof(exporter, joiner))
}

// VerifyProof is the admitting node's side of Prove: public is from the domain
// state, exporter and joiner from its own end of the session.
func VerifyProof(public ed25519.PublicKey, exporter []byte, joiner mesh.KeyHash, signature []byte) error {
	if len(public) != ed25519.PublicKeySize || !ed25519.Verify(public, proof(exporter, joiner), signature) {
		return errors.New("the join token does not fit: it is wrong, or was used or has expired")
	}
	return nil
}

func proof(exporter []byte, joiner mesh.KeyHash) []byte {
	// The exporter's length goes first, so that no two pairs give the same bytes.
	b := append([]byte("posthouse join 1\x00"), byte(len(exporter)>>8), byte(len(exporter)))
	b = append(b, exporter...)
	return append(b, joiner[:]...)
}

// comparisonRounds makes each guess at a comparison code cost about as much as two
// hundred thousand hashes.
const comparisonRounds = 200_000

// ComparisonCode is what two people read to each other when a node joins without a
// token: both sides show the code of the two key hashes that they see, in either
// order. Equal codes mean that nobody sits in between.
//
// Who wants to sit in between may try keys on both sides until two codes agree: 2^30
// tries a side for these 60 bits. Each try is made slow by PBKDF2 (tens of
// milliseconds), which makes that decades of one processor for one join.
func ComparisonCode(a, b mesh.KeyHash) string {
	if slices.Compare(a[:], b[:]) > 0 {
		a, b = b, a
	}
	secret := string(a[:]) + string(b[:])
	raw, err := pbkdf2.Key(sha256.New, secret, []byte("posthouse comparison code 1"), comparisonRounds, 8)
	if err != nil {
		panic(err) // only for lengths that are constants here
	}
	code := crockford.EncodeToString(raw)[:12]
	return code[:4] + "-" + code[4:8] + "-" + code[8:]
}
