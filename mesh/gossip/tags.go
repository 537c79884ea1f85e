package gossip

import (
	"fmt"
	"strconv"
	"strings"

	"posthouse/mesh"
)

// Tags is what a node tells about itself: a few short facts, spread within seconds.
type Tags struct {
	Version string     // of the software
	State   mesh.State // as the node sees itself
	Boot    uint64     // boot count
	// Digests says how far the node is with something that others may want to pull:
	// a short name and a number that only grows.
	Digests map[string]uint64
}

const (
	// maxTags bounds the encoded size: Serf's limit is 512 bytes of meta data.
	maxTags      = 400
	maxTag       = 64
	digestPrefix = "d."
)

// encode gives Serf's form: v, s, b (decimal), and d.<name> (decimal) for digests.
func (t Tags) encode() (map[string]string, error) {
	m := map[string]string{"v": t.Version, "s": string(t.State), "b": strconv.FormatUint(t.Boot, 10)}
	for name, n := range t.Digests {
		m[digestPrefix+name] = strconv.FormatUint(n, 10)
	}
	size := 0
	for k, v := range m {
		if len(k) > maxTag || len(v) > maxTag {
			return nil, fmt.Errorf("tag %.20q is longer than %d bytes", k, maxTag)
		}
		size += len(k) + len(v) + 4
	}
	if size > maxTags {
		return nil, fmt.Errorf("tags of %d bytes: at most %d", size, maxTags)
	}
	return m, nil
}

// decodeTags reads what a peer says; what makes no sense is left out.
func decodeTags(m map[string]string) Tags {
	var t Tags
	for k, v := range m {
		if len(k) > maxTag || len(v) > maxTag {
			continue
		}
		n, err := strconv.ParseUint(v, 10, 64)
		name, digest := strings.CutPrefix(k, digestPrefix)
		switch {
		case k == "v":
			t.Version = v
		case k == "s":
			t.State = mesh.State(v)
		case k == "b" && err == nil:
			t.Boot = n
		case digest && err == nil:
			if t.Digests == nil {
				t.Digests = map[string]uint64{}
			}
			t.Digests[name] = n
		}
	}
	return t
}
