package simtest

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"
)

// level is what nodes have in hand that must come back to what it was before
// the faults (invariant 8): it is counted outside of them.
type level struct {
	offices    []string       // that run and belong to the mesh
	losses     int            // nodes that began anew
	goroutines map[string]int // of the whole bubble, by who started them
	quic       int            // ends of QUIC connections
	conns      map[string]conns
	files      map[string]int // of the log that are open
	kept       map[string]int // files that the disk holds
}

// conns are an office's open TCP connections.
type conns struct {
	dialled  int // by its node
	accepted int // by its node, those of its control socket too
}

const (
	// levelTime is until what ended has let go: a bulk connection idles for half a
	// minute, a QUIC connection drains, memberlist's probes run out.
	levelTime = 2 * time.Minute
	// levelSlack is how many goroutines an office may have more: a service that
	// nobody had used before.
	levelSlack = 4
	// quicEnds is how many ends of connections a pair may keep: two of each
	// connection for control and for bulk, and as many more when both had dialled
	// and a stream, Raft's for one, goes on in the one that is let end.
	quicEnds = 8
	// quicCosts is how many goroutines an end is, its streams included.
	quicCosts = 8
	// raftStreams is how many idle streams Raft keeps from one node to another
	// (its pool in mesh/election): one for each exchange that once ran beside
	// another, as they do when lines are slow. A leader has two more in use.
	raftStreams = 3
	raftEnd     = "github.com/hashicorp/raft.(*NetworkTransport).handleConn"
	// carriedCosts is how many goroutines one of those is at a third node that
	// carries it: it was opened while the line, a full one perhaps, was doubted.
	carriedCosts = 3
	carriedEnd   = "posthouse/transport/link.(*Endpoint).carry.func2"
)

// level counts what all nodes have in hand now.
func (w *World) level() level {
	l := level{conns: map[string]conns{}, files: map[string]int{}, kept: map[string]int{}}
	l.goroutines, l.quic = inBubble()
	w.ledger.mu.Lock()
	l.losses = len(w.ledger.losses)
	w.ledger.mu.Unlock()
	for _, o := range w.belonging() {
		if !o.Up() {
			continue
		}
		l.offices = append(l.offices, o.Name)
		l.files[o.Name], l.kept[o.Name] = o.disk().Handles(), o.disk().Files()
		w.mu.Lock()
		var c conns
		for x := range w.conns {
			if x.node && x.from == o.Addr {
				c.dialled++
			}
		}
		for x := range w.served {
			if a, err := netip.ParseAddrPort(x.at); err == nil && a.Addr() == o.Addr || x.at == o.cfg.ControlSocket {
				c.accepted++
			}
		}
		w.mu.Unlock()
		l.conns[o.Name] = c
	}
	return l
}

// checkLevel checks that the nodes came back to what they had in hand before
// the faults, once no client of ours is there any more.
func (x *player) checkLevel() {
	w := x.w
	time.Sleep(levelTime)
	for _, what := range w.level().above(x.before) {
		w.violation(NothingIsLeft, "%s", what)
	}
	w.checked(NothingIsLeft, 3)
}

// above says in what the level is above the one before.
func (l level) above(before level) (out []string) {
	say := func(format string, args ...any) { out = append(out, fmt.Sprintf(format, args...)) }
	for _, n := range l.offices {
		if a, b := l.conns[n].dialled, before.conns[n].dialled; a > b {
			say("%s still has %d connections that it opened, and had %d before the faults", n, a, b)
		}
		if a, b := l.conns[n].accepted, before.conns[n].accepted; a > b {
			say("%s still has %d connections that it accepted, and had %d before the faults", n, a, b)
		}
		// The log keeps a segment open to read once somebody has read in it, and
		// the last one to write.
		if a, b := l.files[n], l.kept[n]+1; a > b {
			say("%s has %d files open, its disk holds %d", n, a, l.kept[n])
		}
	}
	// Who came or went took its goroutines along.
	if !slices.Equal(l.offices, before.offices) {
		return out
	}
	n := len(l.offices)
	if l.quic > quicEnds*n*(n-1)/2 {
		say("%d ends of QUIC connections for %d offices, %d before the faults", l.quic, n, before.quic)
	}
	if most := raftStreams*n*(n-1) + 2*(n-1); l.goroutines[raftEnd] > most {
		say("%d streams of Raft for %d offices, %d before the faults", l.goroutines[raftEnd], n, before.goroutines[raftEnd])
	}
	is, was := sum(l.goroutines)-l.goroutines[raftEnd], sum(before.goroutines)-before.goroutines[raftEnd]
	carried := min(raftStreams*n*(n-1), max(0, l.goroutines[carriedEnd]-before.goroutines[carriedEnd]))
	if is > was+levelSlack*(n+l.losses)+quicCosts*max(0, l.quic-before.quic)+carriedCosts*carried {
		say("%d goroutines run, %d did before the faults: %s", is, was, grown(before.goroutines, l.goroutines))
	}
	return out
}

// grown says of what there is more than before.
func grown(before, now map[string]int) string {
	var more []string
	for _, what := range slices.Sorted(maps.Keys(now)) {
		if d := now[what] - before[what]; d > 0 {
			more = append(more, fmt.Sprintf("%d more of %s", d, what))
		}
	}
	return strings.Join(more, ", ")
}

func sum(counts map[string]int) (n int) {
	for _, c := range counts {
		n += c
	}
	return n
}
