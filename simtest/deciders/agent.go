package deciders

import (
	"context"
	"time"

	"posthouse/mesh"
	"posthouse/transport"
	"posthouse/transport/relay"
)

// The gateway's duty towards origins: relay.Run and its settle, over the
// model's streams.

const (
	askAfter = 10 * time.Second
	batch    = 256
)

// visit is what is to be done with one origin.
type visit struct {
	doing, todo bool
	age         time.Duration
}

func (n *node) every() {
	for _, o := range n.q.Origins() {
		n.see(o, askAfter)
	}
}

func (n *node) see(o mesh.NodeID, age time.Duration) {
	v := n.agent[o]
	if v == nil {
		v = &visit{}
		n.agent[o] = v
	}
	if !v.todo || age < v.age {
		v.todo, v.age = true, age
	}
	if !v.doing {
		v.doing = true
		boot := n.boot
		n.w.after(time.Millisecond, func() { n.step(boot, func() { n.visit(o, v) }) })
	}
}

func (n *node) visit(o mesh.NodeID, v *visit) {
	if !v.todo {
		v.doing = false
		return
	}
	v.todo = false
	over := func() {
		if v.doing = v.todo; v.doing {
			boot := n.boot
			n.w.after(time.Second, func() { n.step(boot, func() { n.visit(o, v) }) })
		}
	}
	finals, err := n.q.Finals(o, batch)
	if err != nil {
		over()
		return
	}
	kept, err := n.q.Kept(o, v.age, batch)
	if err != nil || len(finals)+len(kept) == 0 {
		over()
		return
	}
	if n.putOut(o) {
		if err := relay.Orphans(context.Background(), n.q, o, finals, kept); err != nil {
			n.w.note("%s: what it keeps for %v: %v", n.name, o, err)
		}
		over()
		return
	}
	origin := n.w.byID(o)
	n.w.links.dial(n, origin, func(st *stream) {
		st.failed = func(error) { over() }
		n.tellFinals(st, o, finals, func(ok bool) {
			if !ok || len(kept) == 0 {
				st.closed = true
				over()
				return
			}
			n.askStanding(st, o, kept, func() {
				st.closed = true
				over()
			})
		})
	}, over)
}

func (n *node) tellFinals(st *stream, o mesh.NodeID, finals []transport.FinalResult, then func(ok bool)) {
	if len(finals) == 0 {
		then(true)
		return
	}
	st.ask(func() {
		ok := true
		for _, f := range finals {
			if err := st.server.q.Final(context.Background(), n.id, f); err != nil {
				ok = false
				break
			}
		}
		st.answer(nil, func() {
			if !ok || n.q.Told(context.Background(), o, finals) != nil {
				then(false)
				return
			}
			more, err := n.q.Finals(o, batch)
			if err != nil {
				then(false)
				return
			}
			n.tellFinals(st, o, more, then)
		})
	})
}

func (n *node) askStanding(st *stream, o mesh.NodeID, kept []transport.KeptLeg, then func()) {
	st.ask(func() {
		standings := make([][]transport.Standing, len(kept))
		for i, k := range kept {
			s, err := st.server.q.Ask(n.id, k.ID, k.Keys)
			if err != nil {
				s = make([]transport.Standing, len(k.Keys))
				for j := range s {
					s[j] = transport.Undecided
				}
			}
			standings[i] = s
		}
		st.answer(nil, func() {
			for i, k := range kept {
				if _, err := relay.Stand(context.Background(), n.q, o, k, standings[i]); err != nil {
					break
				}
			}
			then()
		})
	})
}
