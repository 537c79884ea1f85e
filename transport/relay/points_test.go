package relay

import (
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"posthouse/mailstore"
	"posthouse/mailstore/log/simfs"
	"posthouse/mesh"
	"posthouse/transport"
)

// place is a crash point of the way between two nodes, with real streams, queues,
// mailboxes and logs: the power of a node goes at a disk operation.
type place struct {
	victim mesh.NodeID
	op     int
	mode   simfs.Mode
	view   string
}

func (p place) String() string {
	return fmt.Sprintf("node %d, operation %d, %s, view %s", p.victim, p.op, p.mode, p.view)
}

var viewsLeft = []string{"as committed", "older", "gone"}

// wayAt sends mail to a home and outside by the gateway that the home is, with
// a crash at a place, and reports whether there was such a place.
func wayAt(t *testing.T, p place) (met bool) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, origin, gw1)
		w.gateways = []mesh.NodeID{gw1}
		o, h, v := w.nodes[origin], w.nodes[gw1], w.nodes[p.victim]
		h.store = new(mailstore.Store) // made by start
		var at atomic.Int64
		v.disk.View.KeepHistory()
		v.disk.Mode, v.disk.Seed = p.mode, uint64(p.op)
		v.disk.FS.Hook = func(op simfs.Op) simfs.Fault {
			if int64(op.N) != at.Load() {
				return simfs.Fault{}
			}
			close(w.crash)
			return simfs.Fault{Crash: true}
		}
		o.start()
		h.start()
		boxes := []string{"bob@ours.example", "cyril@ours.example"}
		for _, b := range boxes {
			if err := h.store.Create(t.Context(), user(b).Mailbox, 0); err != nil {
				t.Fatal(err)
			}
		}
		synctest.Wait()
		at.Store(int64(v.disk.FS.Ops() + p.op))
		power := func() {
			v.kill()
			switch p.view {
			case "older":
				v.disk.View.Rewind(v.disk.View.Applied() / 2)
			case "gone":
				v.disk.DropView(t)
			}
			v.start()
			met = true
		}
		// What was shown to readers and told to clients.
		shown := map[string]string{} // "mailbox UID" -> message
		read := func() map[string]int {
			counts := map[string]int{}
			for _, b := range boxes {
				for _, l := range inbox(t, h.store, b) {
					k := fmt.Sprint(b, " ", l.uid)
					if was, ok := shown[k]; ok && was != l.id {
						t.Errorf("UID %s was message %s and is %s", k, was, l.id)
					}
					shown[k] = l.id
					counts[l.id+" "+b]++
				}
			}
			return counts
		}
		answered := map[byte]bool{}
		for i := range byte(6) {
			to := []transport.Recipient{user(boxes[0]), user(boxes[1])}
			dest := toHome
			if i%3 == 1 {
				dest, to = toGateway, []transport.Recipient{far("x@a.example"), far("y@b.example")}
			}
			answered[i] = o.tryAccept(i, "anna@ours.example", dest, to...) == nil
			if i%2 == 1 {
				time.Sleep(time.Second)
			}
			select {
			case <-w.crash:
				if !met {
					power()
				}
			default:
				if i == 3 {
					synctest.Wait()
					select {
					case <-w.crash:
					default:
						read()
					}
				}
			}
		}
		if !met {
			select {
			case <-w.crash:
				power()
			case <-time.After(time.Minute):
			}
		}
		time.Sleep(time.Hour)
		synctest.Wait()
		got := read()
		for k, n := range w.tried() {
			got[k] = n
		}
		for i := range byte(6) {
			for _, to := range []string{boxes[0], boxes[1], "x@a.example", "y@b.example"} {
				outside := strings.HasSuffix(to, ".example") && !strings.HasSuffix(to, "@ours.example")
				n, least, most := got[fmt.Sprintf("%d %s", i, to)], 0, 1
				if outside != (i%3 == 1) {
					most = 0
				} else if answered[i] {
					least = 1
				}
				if outside && met && p.victim == gw1 {
					most++ // it went out, and that could not be noted
				}
				if n < least || n > max(most, least) {
					t.Errorf("message %d, answered %v, came to %s %d times", i, answered[i], to, n)
				}
			}
		}
		for _, bad := range w.quiet() {
			t.Error(bad)
		}
		if t.Failed() {
			t.Logf("%s\n%s", p, strings.Join(w.trace, "\n"))
		}
		for _, n := range w.nodes {
			n.kill()
		}
	})
	return met
}

// FAULTS I3 for the streams between nodes; simtest/deciders has it for all that
// is below them.
func TestEveryDiskOperationOfEitherEndIsACrashPoint(t *testing.T) {
	points := 0
	for _, victim := range []mesh.NodeID{origin, gw1} {
		op := 1
		for met := true; met && !t.Failed(); op++ {
			for mode := simfs.LoseAll; mode <= simfs.Torn && !t.Failed(); mode++ {
				for _, view := range viewsLeft {
					met = wayAt(t, place{victim, op, mode, view})
					points++
				}
			}
		}
		if t.Logf("node %d: %d operations", victim, op-2); op < 15 {
			t.Error("too few")
		}
	}
	t.Logf("%d points", points)
}
