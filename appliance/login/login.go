// Package login makes and checks password verifiers: argon2id in the PHC string
// format. A success is remembered in memory for a while as an HMAC under a key
// that dies with the process, so that clients which log in every minute cost
// nothing.
package login

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"time"

	"golang.org/x/crypto/argon2"

	"posthouse/mesh"
)

// Parameters of new verifiers (RFC 9106 section 4; the OWASP minimum): one
// check takes about 20 ms, and two at once are the most that run.
const (
	memory    = 19 << 10 // KiB
	passes    = 2
	lanes     = 1
	keyLen    = 32
	saltLen   = 16
	atOnce    = 2
	rememberN = 10_000
	// MaxPassword bounds what is hashed, in bytes.
	MaxPassword = 1024
)

// remember is how long a success needs no new hash.
const remember = 10 * time.Minute

// ErrPassword is returned by New for a password that cannot be used.
var ErrPassword = errors.New("a password has 1 to 1024 bytes and no NUL")

// New returns the verifier of a password.
func New(password string, random io.Reader) (string, error) {
	if password == "" || len(password) > MaxPassword || strings.ContainsRune(password, 0) {
		return "", ErrPassword
	}
	salt := make([]byte, saltLen)
	if _, err := io.ReadFull(random, salt); err != nil {
		return "", fmt.Errorf("make salt: %w", err)
	}
	key := argon2.IDKey([]byte(password), salt, passes, memory, lanes, keyLen)
	b := base64.RawStdEncoding
	return fmt.Sprintf("$argon2id$v=19$m=%d,t=%d,p=%d$%s$%s", memory, passes, lanes, b.EncodeToString(salt), b.EncodeToString(key)), nil
}

// parse reads a PHC string with bounded parameters.
func parse(verifier string) (salt, key []byte, m, t uint32, p uint8, err error) {
	f := strings.Split(verifier, "$")
	if len(f) != 6 || f[1] != "argon2id" || f[2] != "v=19" {
		return nil, nil, 0, 0, 0, errors.New("not an argon2id verifier")
	}
	if _, err := fmt.Sscanf(f[3], "m=%d,t=%d,p=%d", &m, &t, &p); err != nil || m < 8 || m > 1<<20 || t < 1 || t > 16 || p < 1 || p > 8 {
		return nil, nil, 0, 0, 0, errors.New("verifier parameters out of range")
	}
	if salt, err = base64.RawStdEncoding.DecodeString(f[4]); err == nil {
		key, err = base64.RawStdEncoding.DecodeString(f[5])
	}
	if err == nil && (len(salt) < 8 || len(key) < 16 || len(key) > 64) {
		err = errors.New("verifier too short or too long")
	}
	return salt, key, m, t, p, err
}

// Checker checks passwords. It is safe for concurrent use.
type Checker struct {
	slots chan struct{}
	key   []byte

	mu    sync.Mutex
	known map[[sha256.Size]byte]time.Time // until when
}

// NewChecker returns a Checker with a process key from random.
func NewChecker(random io.Reader) (*Checker, error) {
	key := make([]byte, 32)
	if _, err := io.ReadFull(random, key); err != nil {
		return nil, fmt.Errorf("make process key: %w", err)
	}
	return &Checker{slots: make(chan struct{}, atOnce), key: key, known: map[[sha256.Size]byte]time.Time{}}, nil
}

// decoy costs what a real verifier costs, so that an unknown user takes the
// same time as a known one.
const decoy = "$argon2id$v=19$m=19456,t=2,p=1$AAAAAAAAAAAAAAAAAAAAAA$AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"

// Credential names one user's password as it is now.
type Credential struct {
	User    mesh.ID
	Version uint64 // grows with each change
	// Print differs between any two passwords that were ever set, even under one
	// Version on two sides of a split.
	Print []byte
}

func usable(password string) bool {
	return password != "" && len(password) <= MaxPassword && !strings.ContainsRune(password, 0)
}

func (c *Checker) tag(of Credential, password string) (tag [sha256.Size]byte) {
	mac := hmac.New(sha256.New, c.key)
	fmt.Fprintf(mac, "%s\x00%d\x00%x\x00%s", of.User, of.Version, of.Print, password)
	mac.Sum(tag[:0])
	return tag
}

// StandIn returns what stands for a name that no user has: an id that means
// nobody, and a number to choose a home by. It is the same for a name as long as
// the process lives, and known to nobody else.
func (c *Checker) StandIn(name string) (id mesh.ID, n uint64) {
	mac := hmac.New(sha256.New, c.key)
	fmt.Fprintf(mac, "nobody\x00%s", strings.ToLower(name))
	sum := mac.Sum(nil)
	copy(id[:], sum)
	return id, binary.BigEndian.Uint64(sum[len(id):])
}

// Known reports whether the password was found right a while ago, here or by
// another node. A changed password forgets that at once.
func (c *Checker) Known(of Credential, password string) bool {
	if !usable(password) {
		return false
	}
	tag, now := c.tag(of, password), time.Now()
	c.mu.Lock()
	defer c.mu.Unlock()
	until, ok := c.known[tag]
	return ok && now.Before(until)
}

// Remember notes that the password was found right.
func (c *Checker) Remember(of Credential, password string) {
	tag, until := c.tag(of, password), time.Now().Add(remember)
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.known) >= rememberN {
		clear(c.known)
	}
	c.known[tag] = until
}

// Check reports whether password fits the verifier. An empty verifier (unknown
// user) takes the usual time and never fits.
func (c *Checker) Check(ctx context.Context, of Credential, verifier, password string) (bool, error) {
	if !usable(password) {
		return false, nil
	}
	real := verifier != ""
	if real && c.Known(of, password) {
		return true, nil
	}
	if !real {
		verifier = decoy
	}
	salt, key, m, t, p, err := parse(verifier)
	if err != nil {
		return false, fmt.Errorf("verifier of %s: %w", of.User, err)
	}
	select {
	case c.slots <- struct{}{}:
	case <-ctx.Done():
		return false, context.Cause(ctx)
	}
	got := argon2.IDKey([]byte(password), salt, t, m, p, uint32(len(key)))
	<-c.slots
	if subtle.ConstantTimeCompare(got, key) != 1 || !real {
		return false, nil
	}
	c.Remember(of, password)
	return true, nil
}

// Challenge is what somebody needs to prove a password without sending it: the
// public half of a verifier.
type Challenge struct {
	_      struct{} `cbor:",toarray"`
	Salt   []byte
	Memory uint32 // KiB
	Passes uint32
	Lanes  uint8
	KeyLen uint32
}

// ChallengeOf returns the challenge of a verifier; of none, one that nobody can
// answer and that looks like any other.
func ChallengeOf(verifier string, unknown [saltLen]byte) (Challenge, error) {
	if verifier == "" {
		return Challenge{Salt: unknown[:], Memory: memory, Passes: passes, Lanes: lanes, KeyLen: keyLen}, nil
	}
	salt, key, m, t, p, err := parse(verifier)
	return Challenge{Salt: salt, Memory: m, Passes: t, Lanes: p, KeyLen: uint32(len(key))}, err
}

// Secret returns what a verifier and the password have in common.
func Secret(verifier string) ([]byte, error) {
	_, key, _, _, _, err := parse(verifier)
	return key, err
}

// Derive computes the secret from the password. It refuses challenges that are
// cheaper than what New makes, which would give the password away.
func (c Challenge) Derive(password string) ([]byte, error) {
	if len(c.Salt) < 8 || c.Memory < memory || c.Memory > 1<<20 || c.Passes < passes || c.Passes > 16 || c.Lanes < 1 || c.Lanes > 8 || c.KeyLen < 16 || c.KeyLen > 64 {
		return nil, errors.New("the other side asks for the password in an unsafe way")
	}
	return argon2.IDKey([]byte(password), c.Salt, c.Passes, c.Memory, c.Lanes, c.KeyLen), nil
}
