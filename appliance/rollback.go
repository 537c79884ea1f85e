package appliance

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/fxamacker/cbor/v2"

	"posthouse/appliance/health"
	"posthouse/mesh"
	"posthouse/mesh/domain"
	"posthouse/mesh/gossip"
	"posthouse/transport"
	"posthouse/transport/link"
	"posthouse/transport/queue"
)

// A node that was restored from an older image of its disk has forgotten what
// it told others: UIDs that it gave out, votes, mail that it sent. It cannot
// know by itself. Its peers keep how far each node was (witness), refuse the
// mail and the votes of one that is behind that, and tell it when it asks
// (vet). It then renews all UIDVALIDITYs, has Raft sent to it anew, and takes
// a new incarnation through the master, by which its peers trust it again. One
// of them may have missed that, and the node may lead by then: what it sends is
// refused until another member says that it was taken in (clearDoubts). Its own
// word would not do: a founder of two that was rolled back leads alone, and its
// log is not the one that counts.
//
// No new segment epoch of the log is needed: outside of the node nothing refers
// to its sequence numbers but what the peers keep here, and they begin anew
// with the incarnation.
//
// Neither kill -9 nor a power cut looks like this: a start is counted on disk
// before the link is up, and only what is synced counts as the log's end.

const (
	// vetWait is how long a starting node waits for the first word of a peer
	// before it opens its doors: three round trips of a slow line. It does not
	// wait for the mesh: alone it opens them after that.
	vetWait = 500 * time.Millisecond
	// vetAgain is how often a peer that is behind is asked again.
	vetAgain = 3 * time.Second
	// logTold is how often the others are told of a log that has grown.
	logTold = 10 * time.Second
	// seenKept is how often that is written down.
	seenKept  = time.Minute
	logDigest = "log"
)

// seen is how far a node was, as this one knows.
type seen struct {
	Boots       uint64 `json:"boots"`
	Boot        string `json:"boot"` // nonce of that start, in hex
	Log         uint64 `json:"log"`  // end of its message log
	Incarnation uint64 `json:"incarnation,omitempty"`
}

// witness keeps how far the others were.
type witness struct {
	n *Node

	mu       sync.Mutex
	seen     map[mesh.NodeID]seen
	suspects map[mesh.NodeID]seen // rolled back: how they stand now
	dirty    bool

	doubts chan mesh.NodeID // suspects that would send a leader's log
}

func newWitness(n *Node) *witness {
	w := &witness{n: n, seen: map[mesh.NodeID]seen{}, suspects: map[mesh.NodeID]seen{}, doubts: make(chan mesh.NodeID, 1)}
	for id, s := range n.rec.get().Seen {
		w.seen[id] = s
	}
	return w
}

func (w *witness) incarnation(id mesh.NodeID) uint64 {
	if x, ok := w.n.state.Node(id); ok {
		return x.Incarnation
	}
	return 0
}

// meet implements link.Deps.Meet. A suspect may connect: it has to hear what it
// is, and to reach the master.
func (w *witness) meet(id mesh.NodeID, f link.Facts) error {
	now := seen{Boots: f.BootCount, Boot: hex.EncodeToString(f.Boot[:]), Log: f.LogEnd, Incarnation: w.incarnation(id)}
	w.mu.Lock()
	old, known := w.seen[id]
	anew := false
	switch {
	case !known || old.Incarnation < now.Incarnation:
		anew = true
	case old.Boot == now.Boot: // the same life; hellos may overtake one another
		now.Log = max(now.Log, old.Log)
	case now.Boots <= old.Boots || now.Log < old.Log:
		w.suspects[id] = now
		w.mu.Unlock()
		w.n.part("mesh").Warn("a node runs on an older copy of its disk", "peer", w.n.nodeName(id), "boots", now.Boots, "seen_boots", old.Boots, "log", now.Log, "seen_log", old.Log)
		w.n.live.send()
		return nil
	default:
		anew = true
	}
	delete(w.suspects, id)
	w.dirty = w.dirty || old != now
	w.seen[id] = now
	w.mu.Unlock()
	if anew {
		return w.keep() // before anything is believed of this life
	}
	return nil
}

// heard notes what gossip says of a node's log.
func (w *witness) heard(e gossip.Event) {
	log := e.Tags.Digests[logDigest]
	w.mu.Lock()
	defer w.mu.Unlock()
	if s, ok := w.seen[e.Node]; ok && s.Boots == e.Tags.Boot && log > s.Log {
		if _, suspect := w.suspects[e.Node]; !suspect {
			s.Log = log
			w.seen[e.Node], w.dirty = s, true
		}
	}
}

// suspect reports whether a node is known to be rolled back.
func (w *witness) suspect(id mesh.NodeID) bool { return w.suspectAt(id, w.incarnation(id)) }

// suspectAt is suspect for a node whose incarnation is known to be inc.
func (w *witness) suspectAt(id mesh.NodeID, inc uint64) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	now, ok := w.suspects[id]
	if ok && inc > w.seen[id].Incarnation {
		// It has taken a new incarnation: what it is now is what counts.
		now.Incarnation = inc
		w.seen[id], w.dirty = now, true
		delete(w.suspects, id)
		return false
	}
	return ok
}

// doubt notes that a suspect would send what a leader sends. It does not wait.
func (w *witness) doubt(id mesh.NodeID) {
	select {
	case w.doubts <- id:
	default: // it comes again
	}
}

// clearDoubts asks the others about suspects that lead, until ctx ends.
func (w *witness) clearDoubts(ctx context.Context) error {
	for {
		select {
		case id := <-w.doubts:
			for _, m := range w.n.view.Load().Members {
				if m.ID == w.n.id || m.ID == id || m.State != mesh.Serving || w.suspect(m.ID) {
					continue
				}
				if a, err := w.n.askStanding(ctx, m.ID, id); err == nil && !a.Suspect && !w.suspectAt(id, a.Incarnation) {
					w.n.part("mesh").Info("a node that was rolled back has been taken in anew", "peer", w.n.nodeName(id), "by", m.Name)
					break
				}
			}
		case <-ctx.Done():
			return nil
		}
		select { // the suspect dials again and again
		case <-time.After(time.Second):
		case <-ctx.Done():
			return nil
		}
	}
}

// keep writes down what is known, if it has changed.
func (w *witness) keep() error {
	w.mu.Lock()
	if !w.dirty {
		w.mu.Unlock()
		return nil
	}
	w.dirty = false
	now := make(map[mesh.NodeID]seen, len(w.seen))
	for id, s := range w.seen {
		now[id] = s
	}
	w.mu.Unlock()
	return w.n.rec.change(func(r *record) { r.Seen = now })
}

// run tells how far this node is, and writes down how far the others are.
func (w *witness) run(ctx context.Context) error {
	tick := time.NewTicker(logTold)
	defer tick.Stop()
	told, kept := uint64(0), time.Now()
	for {
		select {
		case <-tick.C:
			if now := w.n.journal.Applied(); now != told {
				told = now
				w.n.tell()
			}
			if time.Since(kept) < seenKept {
				continue
			}
			kept = time.Now()
		case <-ctx.Done():
		}
		if err := w.keep(); err != nil {
			w.n.part("mesh").Warn("how far the others are was not written down", "err", err)
		}
		if ctx.Err() != nil {
			return nil
		}
	}
}

// standing is the answer to a node that asks how it stands.
type standing struct {
	Suspect     bool   `cbor:"1,keyasint"`
	Boots       uint64 `cbor:"2,keyasint"` // the highest that was seen
	Log         uint64 `cbor:"3,keyasint"`
	Incarnation uint64 `cbor:"4,keyasint"` // by the domain state here
	// Led: as is known here, others lead without that one, or can.
	Led bool `cbor:"5,keyasint,omitempty"`
}

// standing tells a peer how it stands here.
func (w *witness) standing(id mesh.NodeID) ([]byte, error) {
	a := standing{Suspect: w.suspect(id), Incarnation: w.incarnation(id)}
	if e := w.n.elected(); e != nil {
		a.Led = e.State().LedWithout(id)
	}
	w.mu.Lock()
	a.Boots, a.Log = w.seen[id].Boots, w.seen[id].Log
	w.mu.Unlock()
	return cbor.Marshal(a)
}

// vet asks each peer that comes up how this node stands with it. A peer that has
// not heard of this node's incarnation speaks of the one before: it may run on an
// older copy of its disk itself. It is asked again until it has caught up.
func (n *Node) vet(ctx context.Context, up <-chan mesh.NodeID) error {
	g := newGroup(func(error) {})
	defer g.stop()
	for {
		var id mesh.NodeID
		select {
		case id = <-up:
		case <-ctx.Done():
			return nil
		}
		g.run("vet", func(ctx context.Context) error {
			for {
				a, err := n.askStanding(ctx, id, 0)
				switch {
				case err != nil:
					return nil
				case !a.Suspect:
					n.vettedOnce()
					n.soundOnce()
					return nil
				case a.Incarnation >= n.witness.incarnation(n.id):
					n.reconcile(ctx, id, a)
					return nil
				}
				select {
				case <-time.After(vetAgain):
				case <-ctx.Done():
					return nil
				}
			}
		})
	}
}

// askStanding asks a node how another one stands with it; 0: this one.
func (n *Node) askStanding(ctx context.Context, id, about mesh.NodeID) (a standing, err error) {
	b, err := n.ask(ctx, id, call{What: callStanding, Node: about})
	if err != nil {
		return a, err
	}
	return a, callDecoder.Unmarshal(b, &a)
}

// waitVetted gives the peers a moment to say that this node was rolled back,
// before it serves.
func (n *Node) waitVetted(ctx context.Context) {
	if len(n.state.Members()) < 2 {
		return
	}
	timer := time.NewTimer(vetWait)
	defer timer.Stop()
	select {
	case <-n.vetted:
	case <-timer.C:
		n.mu.Lock()
		busy := n.reconciling
		n.mu.Unlock()
		if busy { // a peer has spoken: it takes a sync or two
			select {
			case <-n.vetted:
			case <-ctx.Done():
			}
		}
	case <-ctx.Done():
	}
}

var errRolledBack = errors.New("this node runs on an older copy of its disk")

// reconcile brings a rolled-back node into a state in which it may serve, and
// stays with it until the peer that said so trusts it again.
func (n *Node) reconcile(ctx context.Context, peer mesh.NodeID, a standing) {
	n.mu.Lock()
	first := !n.reconciling
	n.reconciling = true
	n.mu.Unlock()
	if !first {
		return
	}
	log := n.part("mesh")
	log.Error("this node runs on an older copy of its disk", "by", n.nodeName(peer), "boots", n.rec.get().Boots, "seen_boots", a.Boots, "log", n.journal.Applied(), "seen_log", a.Log)
	n.board.Set(health.Condition{Name: "node.rolled-back", Severity: health.Problem, Text: "This node runs on an older copy of its disk. Mail programs will load their mailboxes again; what came after the copy is lost here.", Next: "Mail to the outside that may have been sent before is held: see posthouse queue list, then release or delete it."})
	if err := n.holdOutside(ctx); err != nil {
		log.Warn("mail to the outside may be sent twice", "err", err)
	}
	if err := n.store.RenewAt(ctx, uint32(a.Incarnation)+1); err != nil {
		if ctx.Err() == nil {
			n.meshes.fail(fmt.Errorf("renew the mailboxes after a rollback: %w", err))
		}
		return
	}
	n.mu.Lock()
	end := n.cutSessions
	n.mu.Unlock()
	if end != nil {
		end()
	}
	err := n.fetchAnew(ctx, peer, a)
	if err != nil {
		log.Warn("the domain state was not fetched anew", "err", err)
	}
	fetched := err == nil
	n.vettedOnce()
	for ctx.Err() == nil {
		var err error
		if fetched { // in a log of its own alone it would prove nothing
			_, err = n.proposeAs(ctx, "posthouse on "+n.cfg.Name, &domain.RenewNode{Node: n.id, Incarnation: a.Incarnation + 1})
		}
		if err == nil {
			var now standing
			if now, err = n.askStanding(ctx, peer, 0); err == nil {
				a = now
			}
		}
		if err == nil && !a.Suspect {
			break
		}
		if err == nil && !fetched {
			fetched = n.fetchAnew(ctx, peer, a) == nil
		}
		select {
		case <-time.After(3 * time.Second):
		case <-ctx.Done():
			return
		}
	}
	// Later starts shall outnumber all that were seen.
	if err := n.rec.change(func(r *record) { r.Boots = max(r.Boots, a.Boots) }); err != nil {
		log.Warn("starts not counted", "err", err)
	}
	log.Warn("this node was taken in again", "incarnation", a.Incarnation)
	n.mu.Lock()
	n.reconciling = false
	n.mu.Unlock()
}

// fetchAnew has Raft sent to this node anew, by the word of a peer that is not
// rolled back itself. A node with the only vote keeps what it has as long as that
// peer knows nobody else who leads, or can.
func (n *Node) fetchAnew(ctx context.Context, peer mesh.NodeID, a standing) error {
	e := n.elected()
	if e == nil {
		return noMeshYet
	}
	return e.FetchAnew(ctx, errRolledBack, a.Led && !n.witness.suspect(peer))
}

// holdOutside holds mail to the outside: some of it may have been sent in the
// time that this node has forgotten.
func (n *Node) holdOutside(ctx context.Context) error {
	var ids []queue.ID
	if err := n.queued(ctx, func(d queue.DestRow, l queue.LegRow) bool {
		if d.Key.Scope == transport.ScopeOutside || d.Key.Scope == transport.ScopeGateway {
			ids = append(ids, l.Queue)
		}
		return true
	}); err != nil {
		return err
	}
	for _, id := range ids {
		if _, err := n.queue.Hold(ctx, id); err != nil {
			return err
		}
	}
	return nil
}
