// Package identity is who a node is: its key, the certificate made from it, the
// TLS settings by which nodes know each other, and the tokens and codes by which
// a new node and its mesh come to trust each other.
//
// A node is its Ed25519 key. Certificates are self-signed wrapping; their names
// and dates say nothing and are not checked. Whether a key belongs to the mesh
// is decided elsewhere (the domain state) and asked through a callback.
//
// The package opens no connections and keeps no state beyond the key file. It is
// used by appliance (to load or make the key, to issue and use tokens) and, through
// an interface of its own, by transport/link.
package identity

import (
	"crypto/ed25519"
	"crypto/hkdf"
	"crypto/hpke"
	"crypto/sha256"
	"crypto/subtle"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"time"

	"posthouse/mesh"
)

// Key is a node's private key with everything that follows from it. It is
// immutable and safe for concurrent use. Printing or logging one shows its hash.
type Key struct {
	private ed25519.PrivateKey
	hash    mesh.KeyHash
	cert    tls.Certificate
	reset   [32]byte
	opener  hpke.PrivateKey
	sealKey mesh.SealKey
}

// ErrDamaged is wrapped by errors about a key file whose content cannot be used.
var ErrDamaged = errors.New("the key file is damaged")

// Generate makes a new key from 32 bytes of random.
func Generate(random io.Reader) (*Key, error) {
	seed := make([]byte, ed25519.SeedSize)
	if _, err := io.ReadFull(random, seed); err != nil {
		return nil, fmt.Errorf("make node key: %w", err)
	}
	return fromSeed(seed)
}

func fromSeed(seed []byte) (*Key, error) {
	k := &Key{private: ed25519.NewKeyFromSeed(seed)}
	pub := k.private.Public().(ed25519.PublicKey)
	hash, err := HashPublicKey(pub)
	if err != nil {
		return nil, err
	}
	k.hash = hash
	// The same key always gives the same certificate: nothing in it is random,
	// and Ed25519 signatures are deterministic (RFC 8032).
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1),
		Subject:      pkix.Name{CommonName: "posthouse node"},
		NotBefore:    time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC),
		NotAfter:     time.Date(9999, 12, 31, 23, 59, 59, 0, time.UTC), // RFC 5280 section 4.1.2.5: no well-defined expiration
		KeyUsage:     x509.KeyUsageDigitalSignature,
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.CreateCertificate(nil, template, template, pub, k.private)
	if err != nil {
		return nil, fmt.Errorf("make node certificate: %w", err)
	}
	k.cert = tls.Certificate{Certificate: [][]byte{der}, PrivateKey: k.private}
	reset, err := hkdf.Key(sha256.New, seed, nil, "posthouse stateless reset 1", len(k.reset))
	if err != nil {
		return nil, fmt.Errorf("derive stateless-reset key: %w", err)
	}
	copy(k.reset[:], reset)
	if k.opener, k.sealKey, err = opener(seed); err != nil {
		return nil, err
	}
	return k, nil
}

// Hash is the key's name in the mesh.
func (k *Key) Hash() mesh.KeyHash { return k.hash }

// StatelessResetKey is the secret of RFC 9000 section 10.3.2. It follows from the
// node key, so it survives restarts without a file of its own.
func (k *Key) StatelessResetKey() [32]byte { return k.reset }

// String shows the hash, never the key.
func (k *Key) String() string { return "node key " + k.hash.String() }

// LogValue implements slog.LogValuer.
func (k *Key) LogValue() slog.Value { return slog.StringValue(k.hash.String()) }

// HashPublicKey is the SHA-256 of the key's SubjectPublicKeyInfo (RFC 8410 section 4).
func HashPublicKey(pub ed25519.PublicKey) (mesh.KeyHash, error) {
	spki, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		return mesh.KeyHash{}, fmt.Errorf("hash public key: %w", err)
	}
	return sha256.Sum256(spki), nil
}

// The key file, version 1: three lines of text, each ended by a line feed.
//
//	posthouse node key 1
//	<32 bytes of seed, hexadecimal>
//	<first 8 bytes of the SHA-256 of the two lines above, hexadecimal>
const (
	fileHeader  = "posthouse node key "
	fileVersion = "1"
	fileMax     = 1024 // a larger file is something else
)

func encode(seed []byte) []byte {
	text := fileHeader + fileVersion + "\n" + hex.EncodeToString(seed) + "\n"
	sum := sha256.Sum256([]byte(text))
	return []byte(text + hex.EncodeToString(sum[:8]) + "\n")
}

func decode(data []byte) (*Key, error) {
	rest, ok := strings.CutPrefix(string(data), fileHeader)
	if !ok {
		return nil, fmt.Errorf("%w: it does not begin as a node key", ErrDamaged)
	}
	version, rest, ok := strings.Cut(rest, "\n")
	if !ok {
		return nil, fmt.Errorf("%w: it is cut short", ErrDamaged)
	}
	if version != fileVersion {
		return nil, fmt.Errorf("the key file has version %.10q, and this program reads version %s: start the version of the program that wrote it", version, fileVersion)
	}
	line, _, _ := strings.Cut(rest, "\n")
	seed, err := hex.DecodeString(line)
	if err != nil || len(seed) != ed25519.SeedSize {
		return nil, fmt.Errorf("%w: it is cut short or altered", ErrDamaged)
	}
	if subtle.ConstantTimeCompare(data, encode(seed)) != 1 {
		return nil, fmt.Errorf("%w: its checksum does not match", ErrDamaged)
	}
	return fromSeed(seed)
}

// Load reads the key file. The error wraps fs.ErrNotExist when there is none, and
// ErrDamaged when its content cannot be used; both texts say what to do.
func Load(path string) (*Key, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("load node key: %w", err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("load node key: %w", err)
	}
	if info.Mode().Perm()&0o077 != 0 {
		return nil, fmt.Errorf("node key %s: %w (mode %04o): run chmod 600 on it, and think about whether somebody has copied it", path, errOpen, info.Mode().Perm())
	}
	data, err := io.ReadAll(io.LimitReader(f, fileMax+1))
	if err != nil {
		return nil, fmt.Errorf("load node key %s: %w", path, err)
	}
	k, err := decode(data)
	if errors.Is(err, ErrDamaged) {
		return nil, fmt.Errorf("load node key %s: %w; restore it from a backup, or move it away and join the mesh as a new node", path, err)
	}
	if err != nil {
		return nil, fmt.Errorf("load node key %s: %w", path, err)
	}
	return k, nil
}

// Save writes the key file with mode 0600 such that after a crash at any instant
// there is either the whole file or none. It never replaces an existing one: the
// error then wraps fs.ErrExist.
func (k *Key) Save(path string) error {
	if _, err := os.Lstat(path); err == nil {
		return fmt.Errorf("save node key %s: %w", path, fs.ErrExist)
	} else if !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("save node key: %w", err)
	}
	half := path + ".new" // left over by a crash: nothing refers to it
	if err := os.Remove(half); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("save node key: %w", err)
	}
	if err := writeSynced(half, encode(k.private.Seed())); err != nil {
		return fmt.Errorf("save node key: %w", err)
	}
	if err := os.Rename(half, path); err != nil {
		return fmt.Errorf("save node key: %w", err)
	}
	return syncDir(filepath.Dir(path))
}

func syncDir(path string) error {
	dir, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("save node key: %w", err)
	}
	defer dir.Close()
	if err := dir.Sync(); err != nil {
		return fmt.Errorf("save node key: sync folder: %w", err)
	}
	return nil
}

func writeSynced(path string, data []byte) (err error) {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if _, err := f.Write(data); err != nil {
		return err
	}
	return f.Sync()
}

// copySuffix marks the second copy of the key file: the one file of a node that
// nothing else could bring back.
const copySuffix = ".copy"

// errOpen is wrapped when others may read the key file.
var errOpen = errors.New("others may read it")

// Check reads the key file and its copy and says what is wrong with each; nil
// for a whole one, and for a copy that was never made.
func Check(path string) (file, second error) {
	_, file = Load(path)
	if _, second = Load(path + copySuffix); errors.Is(second, fs.ErrNotExist) {
		second = nil
	}
	return file, second
}

// LoadOrCreate loads the key at path, or makes and saves one if there is none;
// created tells which. A key is kept twice: a damaged file is made whole from
// its copy. When neither can be used it is an error, never a reason for a new
// key: that would silently make this another node.
func LoadOrCreate(path string, random io.Reader) (k *Key, created bool, err error) {
	k, err = Load(path)
	if errors.Is(err, errOpen) {
		return nil, false, err
	}
	if err != nil {
		second, err2 := Load(path + copySuffix)
		switch {
		case err2 == nil:
			// A full disk may leave it as it is: the next start tries again.
			_ = second.replace(path)
			return second, false, nil
		case !errors.Is(err, fs.ErrNotExist):
			return nil, false, err
		case !errors.Is(err2, fs.ErrNotExist):
			return nil, false, err2
		}
		if k, err = Generate(random); err != nil {
			return nil, false, err
		}
		if err := k.Save(path); err != nil {
			return nil, false, err
		}
		created = true
	}
	if second, err := Load(path + copySuffix); err != nil || second.hash != k.hash {
		if err := k.replace(path + copySuffix); err != nil && created {
			return nil, false, err
		}
	}
	return k, created, nil
}

// replace is Save over what is there.
func (k *Key) replace(path string) error {
	half := path + ".old" // for the moment between two names
	if err := os.Remove(half); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("save node key: %w", err)
	}
	if err := k.Save(half); err != nil {
		return err
	}
	if err := os.Rename(half, path); err != nil {
		return fmt.Errorf("save node key: %w", err)
	}
	return syncDir(filepath.Dir(path))
}
