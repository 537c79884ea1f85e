package appliance

import (
	"context"
	"errors"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/fxamacker/cbor/v2"

	"posthouse/mesh"
	"posthouse/mesh/domain"
)

// An office that was away, or runs on an older copy of its disk, may come back to
// a master that joined meanwhile. Its copy of the domain state does not know that
// node's key, so it refuses it, and what would tell of the key comes from the
// master alone: it would stay behind for ever. So it asks the nodes that vote, as
// it knows them. What a majority of them says is what they could have committed in
// the same way (DESIGN.md); the key is let in until the domain state decides.

// vouch is a node that the domain state here does not know yet.
type vouch struct {
	ID        mesh.NodeID `cbor:"1,keyasint"`
	Addresses []string    `cbor:"2,keyasint,omitempty"`
	key       mesh.KeyHash
}

// vouches are those of now.
type vouches struct {
	mu sync.Mutex
	by map[mesh.NodeID]vouch
}

func (v *vouches) all() []vouch {
	v.mu.Lock()
	defer v.mu.Unlock()
	return slices.SortedFunc(maps.Values(v.by), func(a, b vouch) int { return slices.Compare(a.key[:], b.key[:]) })
}

func (v *vouches) put(x vouch) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.by == nil {
		v.by = map[mesh.NodeID]vouch{}
	}
	if len(v.by) < maxVouches {
		v.by[x.ID] = x
	}
}

func (v *vouches) drop(id mesh.NodeID) {
	v.mu.Lock()
	defer v.mu.Unlock()
	delete(v.by, id)
}

const (
	maxVouches = 64
	// vouchPause is the least between two questions: whoever knocks with a strange
	// key must not set the mesh talking.
	vouchPause = 3 * time.Second
	// vouchFor is how long a majority's word holds; then it is asked again.
	vouchFor = 5 * time.Minute
	// behindAfter is the age of the domain state here from which on a key that it
	// does not know may belong to a member.
	behindAfter = 10 * time.Second
)

// stranger hears of a key that was refused. It does not wait: the key comes again.
func (n *Node) stranger(key mesh.KeyHash) {
	select {
	case n.strangers <- key:
	default:
	}
}

// meetStrangers asks about refused keys, until ctx ends. changed lets the peers be
// looked at again.
func (n *Node) meetStrangers(ctx context.Context, changed func()) error {
	again := time.NewTicker(vouchFor)
	defer again.Stop()
	for {
		select {
		case key := <-n.strangers:
			if n.vouched(ctx, key) {
				changed()
			}
		case <-again.C:
			for _, x := range n.vouches.all() {
				if !n.vouched(ctx, x.key) {
					n.vouches.drop(x.ID)
				}
			}
			changed()
		case <-ctx.Done():
			return nil
		}
		select {
		case <-time.After(vouchPause):
		case <-ctx.Done():
			return nil
		}
	}
}

// vouched asks the nodes that vote whose key this is, and reports whether a
// majority names one node that the domain state here does not know.
func (n *Node) vouched(ctx context.Context, key mesh.KeyHash) bool {
	e := n.elected()
	if !asksAboutStrangers || e == nil || !n.state.Founded() || n.stateAge() < behindAfter {
		return false
	}
	if slices.ContainsFunc(n.state.Nodes(), func(x *domain.Node) bool { return x.Key == key }) {
		return false // a member, or revoked
	}
	voters := e.State().Voters
	if len(voters) == 0 { // its log was given up: see rollback
		for _, x := range n.state.Members() {
			voters = append(voters, x.ID)
		}
	}
	ctx, cancel := context.WithTimeout(ctx, callLimit/3)
	defer cancel()
	var mu sync.Mutex
	var wg sync.WaitGroup
	said := map[mesh.NodeID]int{}
	var who vouch
	for _, p := range n.link.Peers() {
		if !p.Connected || !slices.Contains(voters, p.ID) {
			continue
		}
		wg.Go(func() {
			var x vouch
			b, err := n.ask(ctx, p.ID, call{What: callWhose, Body: key[:]})
			if err == nil {
				err = callDecoder.Unmarshal(b, &x)
			}
			if err != nil || x.ID == 0 {
				return
			}
			mu.Lock()
			defer mu.Unlock()
			if said[x.ID]++; said[x.ID] >= said[who.ID] {
				who = x
			}
		})
	}
	wg.Wait()
	votes := said[who.ID]
	if slices.Contains(voters, n.id) {
		votes++
	}
	if _, known := n.state.Node(who.ID); who.ID == 0 || known || 2*votes <= len(voters) {
		return false
	}
	who.key = key
	n.vouches.put(who)
	n.part("mesh").Info("a node that is not known here is a member, say those that vote", "peer", who.ID.String())
	return true
}

// whose answers vouched: which member has that key, by the domain state here.
func (n *Node) whose(key []byte) ([]byte, error) {
	for _, x := range n.state.Members() {
		if slices.Equal(x.Key[:], key) {
			return cbor.Marshal(vouch{ID: x.ID, Addresses: x.Addresses})
		}
	}
	return nil, errors.New("nobody has that key")
}

// strangersLetIn hands add those that others vouch for, until the domain state
// here knows them or is current.
func (n *Node) strangersLetIn(add func(mesh.NodeID, mesh.KeyHash, []string)) {
	for _, x := range n.vouches.all() {
		if _, known := n.state.Node(x.ID); known || n.stateAge() < behindAfter && n.view.Load().Master != x.ID {
			n.vouches.drop(x.ID)
			continue
		}
		add(x.ID, x.key, x.Addresses[:min(len(x.Addresses), 8)])
	}
}
