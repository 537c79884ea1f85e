package appliance

import (
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"path/filepath"
	"slices"
	"sync"

	"posthouse/appliance/joining"
	"posthouse/mesh"
)

// record is node.json: the few facts about itself that a node keeps beside its
// key, before and beside the domain state.
type record struct {
	Version int            `json:"version"` // 1
	Node    mesh.NodeID    `json:"node"`    // its own, chosen at first start
	Boots   uint64         `json:"boots"`   // starts so far
	Member  bool           `json:"member"`  // was admitted
	Intent  joining.Intent `json:"intent,omitzero"`
	// Peers are the members that the join told of: known until the domain
	// state is there.
	Peers []joining.Peer `json:"peers,omitempty"`
	// Learned is where each peer was met last; Doors the last good addresses of
	// a name that was joined.
	Learned map[mesh.NodeID]netip.AddrPort `json:"learned,omitempty"`
	Doors   map[string][]string            `json:"doors,omitempty"`
	Domain  string                         `json:"domain,omitempty"`
	// Seen is how far each peer was: see witness.
	Seen map[mesh.NodeID]seen `json:"seen,omitempty"`
}

// keeper reads and writes the record.
type keeper struct {
	files Files
	name  string

	mu  sync.Mutex
	rec record
}

func newKeeper(files Files, dir string) *keeper {
	return &keeper{files: files, name: filepath.Join(dir, "node.json")}
}

// open loads the record, or makes one with a random node id. It writes
// nothing: boot does.
func (k *keeper) open(random io.Reader) error {
	var rec record
	b, err := k.files.Read(k.name)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		var id [8]byte
		for rec.Node == 0 {
			if _, err := io.ReadFull(random, id[:]); err != nil {
				return fmt.Errorf("make node id: %w", err)
			}
			rec.Node = mesh.NodeID(binary.BigEndian.Uint64(id[:]))
		}
		rec.Version = 1
	case err != nil:
		return fmt.Errorf("read %s: %w", k.name, err)
	default:
		if err := json.Unmarshal(b, &rec); err != nil {
			return fmt.Errorf("%s is damaged (%w): restore it from a backup, or remove the data folder and join anew", k.name, err)
		}
		if rec.Version != 1 {
			return fmt.Errorf("%s was written by a newer version (format %d): install that version again", k.name, rec.Version)
		}
	}
	for i := range rec.Peers {
		p := &rec.Peers[i]
		if _, err := hex.Decode(p.Key[:], []byte(p.KeyHex)[:min(len(p.KeyHex), 2*len(p.Key))]); err != nil || len(p.KeyHex) != 2*len(p.Key) {
			return fmt.Errorf("%s is damaged: peer key %q", k.name, p.KeyHex)
		}
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.rec = rec
	return nil
}

// boot counts this start, durably.
func (k *keeper) boot() error {
	boots := k.get().Boots + 1
	return k.change(func(r *record) { r.Boots = boots })
}

// get returns the record as it is now; what it refers to does not change.
func (k *keeper) get() record {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.rec
}

// change alters the record and writes it.
func (k *keeper) change(f func(*record)) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.rec.Peers = slices.Clone(k.rec.Peers) // who was given the record before may still read its peers
	f(&k.rec)
	k.rec.Peers = slices.Clone(k.rec.Peers) // get has handed the old ones out
	for i := range k.rec.Peers {
		k.rec.Peers[i].KeyHex = k.rec.Peers[i].Key.String()
	}
	b, err := json.MarshalIndent(k.rec, "", "  ")
	if err != nil {
		return fmt.Errorf("write %s: %w", k.name, err)
	}
	return k.files.Write(k.name, append(b, '\n'), 0o600)
}
