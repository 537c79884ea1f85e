package identity

import (
	"crypto/ecdh"
	"crypto/hkdf"
	"crypto/hpke"
	"crypto/sha256"
	"fmt"
	"slices"

	"posthouse/mesh"
)

// Secrets of the domain state are sealed with HPKE (RFC 9180) in base mode:
// DHKEM(X25519, HKDF-SHA256), HKDF-SHA256, ChaCha20Poly1305. A box is the
// encapsulated key (32 bytes), then the ciphertext (the secret's length and 16).
// What a box is about goes in as HPKE's info, so that nobody can put the box of
// one secret in the place of another's.

const (
	// SealOverhead is how many bytes a box has more than what is in it.
	SealOverhead = 32 + 16
	sealLabel    = "posthouse sealed 1\x00"
)

func sealKDF() hpke.KDF   { return hpke.HKDFSHA256() }
func sealAEAD() hpke.AEAD { return hpke.ChaCha20Poly1305() }

// opener derives a node's decryption key from its seed: no second file that
// could be lost, and no second secret to back up. The public half is admitted
// with the node.
func opener(seed []byte) (hpke.PrivateKey, mesh.SealKey, error) {
	secret, err := hkdf.Key(sha256.New, seed, nil, "posthouse seal key 1", 32)
	if err != nil {
		return nil, mesh.SealKey{}, fmt.Errorf("derive seal key: %w", err)
	}
	return openerOf(secret)
}

func openerOf(secret []byte) (hpke.PrivateKey, mesh.SealKey, error) {
	k, err := hpke.DHKEM(ecdh.X25519()).NewPrivateKey(secret)
	if err != nil {
		return nil, mesh.SealKey{}, fmt.Errorf("seal key: %w", err)
	}
	return k, mesh.SealKey(k.PublicKey().Bytes()), nil
}

// Seal seals a secret to the holder of the private half of to. about names what
// the secret is; it is not secret, and is needed to open the box.
func Seal(to mesh.SealKey, about string, secret []byte) ([]byte, error) {
	if !sealing {
		return slices.Clone(secret), nil
	}
	k, err := hpke.DHKEM(ecdh.X25519()).NewPublicKey(to[:])
	if err != nil {
		return nil, fmt.Errorf("seal key: %w", err)
	}
	box, err := hpke.Seal(k, sealKDF(), sealAEAD(), []byte(sealLabel+about), secret)
	if err != nil {
		return nil, fmt.Errorf("seal the %.30q: %w", about, err)
	}
	return box, nil
}

// SealKey is the public key to which secrets for this node are sealed.
func (k *Key) SealKey() mesh.SealKey { return k.sealKey }

// Open opens a box that was sealed to this node's SealKey, about the same.
func (k *Key) Open(about string, box []byte) ([]byte, error) { return open(k.opener, about, box) }

func open(k hpke.PrivateKey, about string, box []byte) ([]byte, error) {
	if !sealing {
		return slices.Clone(box), nil
	}
	secret, err := hpke.Open(k, sealKDF(), sealAEAD(), []byte(sealLabel+about), box)
	if err != nil {
		return nil, fmt.Errorf("open the sealed %.30q: %w", about, err)
	}
	return secret, nil
}

// OpenWith is Key.Open with a private key that NewSealPair made.
func OpenWith(private []byte, about string, box []byte) ([]byte, error) {
	k, _, err := openerOf(private)
	if err != nil {
		return nil, err
	}
	return open(k, about, box)
}

// NewSealPair makes a key pair that several nodes are to share. The private half
// is a secret and is kept sealed.
func NewSealPair() (private []byte, public mesh.SealKey, err error) {
	k, err := hpke.DHKEM(ecdh.X25519()).GenerateKey()
	if err == nil {
		private, err = k.Bytes()
	}
	if err != nil {
		return nil, public, fmt.Errorf("make seal key: %w", err)
	}
	return private, mesh.SealKey(k.PublicKey().Bytes()), nil
}

// Keyring is a node's key as the domain state uses it (domain.Keyring).
type Keyring struct {
	Key  *Key
	Node mesh.NodeID
}

// Self is the node whose key it is.
func (k Keyring) Self() mesh.NodeID { return k.Node }

// Open is Key.Open.
func (k Keyring) Open(about string, box []byte) ([]byte, error) { return k.Key.Open(about, box) }

// OpenWith is the function OpenWith.
func (Keyring) OpenWith(private []byte, about string, box []byte) ([]byte, error) {
	return OpenWith(private, about, box)
}

// Seal is the function Seal.
func (Keyring) Seal(to mesh.SealKey, about string, secret []byte) ([]byte, error) {
	return Seal(to, about, secret)
}

// NewSealPair is the function NewSealPair.
func (Keyring) NewSealPair() ([]byte, mesh.SealKey, error) { return NewSealPair() }
