package election

import (
	"cmp"
	"slices"
	"time"

	"posthouse/mesh"
)

// Member is a node as the domain state has it.
type Member struct {
	ID       mesh.NodeID
	Name     string
	Voter    bool // may hold the election; false still lets it vote as a witness
	Priority int  // higher is preferred
}

// Server is a node as Raft's configuration has it.
type Server struct {
	ID    mesh.NodeID
	Voter bool
}

// Contact is what the master knows of another node's reachability.
type Contact struct {
	ID    mesh.NodeID
	Last  time.Time // last heard; zero when never
	Since time.Time // since when it was heard without a gap; zero when in one
	Index uint64    // what it said it has applied
}

// Facts is what the master decides on.
type Facts struct {
	Self     mesh.NodeID
	Members  []Member // admitted nodes
	Servers  []Server
	Contacts []Contact
	Commit   uint64        // our own applied index
	Leaving  []mesh.NodeID // about to be revoked: no vote for them
}

// Action is one kind of Effect.
type Action uint8

// The actions.
const (
	AddMember Action = iota + 1 // as a non-voter
	Promoted                    // non-voter to voter
	Demoted                     // voter to non-voter
	RemoveNode
	Transfer // leadership goes to Node
)

func (a Action) String() string {
	return [...]string{"", "add", "promote", "demote", "remove", "transfer"}[a]
}

// Effect is one step that the master is to take.
type Effect struct {
	Action Action
	Node   mesh.NodeID
	Why    string
}

// Rule is the master's policy on who votes and who leads. It is pure: the same
// calls give the same effects. One goroutine uses it.
//
// Voters follow the number of admitted nodes, never who is alive: 1 for 1 or 2,
// 3 for 3 or 4, else 5. A vote is given to a live, caught-up node only; it is
// taken from a dead one only when such a spare stands in.
type Rule struct {
	TakeBack time.Duration // steady contact before a node of higher priority leads again
	DeadFor  time.Duration // silence after which a voter is replaced by a spare

	leading  bool
	given    mesh.NodeID // to whom we last gave the lead
	givenAt  time.Time
	flaps    map[mesh.NodeID]int
	evenFrom time.Time // since when the voters are an even number
}

const (
	defaultTakeBack = 60 * time.Second
	defaultDeadFor  = 10 * time.Minute
	maxTakeBack     = time.Hour
	// liveFor is how long after its last sign a node counts as live: two polls
	// may be lost.
	liveFor = 3*pollEvery + pollTime
	// evenFor is how long an even number of voters is borne while the next one
	// catches up.
	evenFor = 30 * time.Second
	// lag is how far behind a node may be and still count as caught up.
	lag = 16
)

func target(admitted int) int {
	switch {
	case admitted <= 2:
		return 1
	case admitted <= 4:
		return 3
	}
	return 5
}

// NotLeading tells the rule that this node is not the master (any more).
func (r *Rule) NotLeading() { r.leading = false }

// Step returns what to do now, at most one effect: each changes the facts. now
// is monotonic.
func (r *Rule) Step(now time.Time, f Facts) []Effect {
	if r.flaps == nil {
		r.flaps = map[mesh.NodeID]int{}
	}
	if !r.leading {
		r.leading = true
		switch {
		case r.given == 0:
		case now.Sub(r.givenAt) < maxTakeBack: // it came back to us
			r.flaps[r.given]++
		default:
			delete(r.flaps, r.given)
		}
		r.given = 0
	}
	s := newView(now, cmp.Or(r.DeadFor, defaultDeadFor), f)
	if s.voters%2 == 1 {
		r.evenFrom = time.Time{}
	} else if r.evenFrom.IsZero() {
		r.evenFrom = now
	}
	for _, rule := range []func(time.Time, *view) *Effect{r.depart, r.arrive, r.grow, r.replace, r.shrink, r.lead} {
		if e := rule(now, s); e != nil {
			if e.Action == Transfer {
				r.given, r.givenAt = e.Node, now
			}
			return []Effect{*e}
		}
	}
	return nil
}

// standing is one node with all that is known of it.
type standing struct {
	Member
	admitted, server, votes, self bool
	live, dead, fresh             bool
	since                         time.Time
}

type view struct {
	all    []*standing // best first
	voters int
	want   int
}

func newView(now time.Time, deadFor time.Duration, f Facts) *view {
	by := map[mesh.NodeID]*standing{}
	s := &view{want: target(len(f.Members))}
	at := func(id mesh.NodeID) *standing {
		if by[id] == nil {
			by[id] = &standing{Member: Member{ID: id}, self: id == f.Self}
			s.all = append(s.all, by[id])
		}
		return by[id]
	}
	for _, m := range f.Members {
		n := at(m.ID)
		n.Member, n.admitted = m, !slices.Contains(f.Leaving, m.ID)
	}
	for _, x := range f.Servers {
		n := at(x.ID)
		n.server, n.votes = true, x.Voter
		if x.Voter {
			s.voters++
		}
	}
	for _, c := range f.Contacts {
		if by[c.ID] == nil {
			continue
		}
		n := by[c.ID]
		n.live = !c.Last.IsZero() && now.Sub(c.Last) <= liveFor
		n.dead = now.Sub(c.Last) >= deadFor
		n.fresh = n.live && c.Index+lag >= f.Commit
		if n.live {
			n.since = c.Since
		}
	}
	for _, n := range s.all {
		if n.self {
			n.live, n.dead, n.fresh = true, false, true
		}
	}
	// Candidates before witnesses, then priority, then id.
	slices.SortFunc(s.all, func(a, b *standing) int {
		return cmp.Or(boolCmp(a.Voter, b.Voter), cmp.Compare(b.Priority, a.Priority), cmp.Compare(a.ID, b.ID))
	})
	return s
}

func boolCmp(a, b bool) int {
	if a == b {
		return 0
	}
	if a {
		return -1
	}
	return 1
}

// fresh reports whether a node is live and caught up.
func (s *view) fresh(id mesh.NodeID) bool {
	return slices.ContainsFunc(s.all, func(n *standing) bool { return n.ID == id && n.fresh })
}

// spares returns the live, caught-up nodes without a vote, the best first.
func (s *view) spares() (out []*standing) {
	for _, n := range s.all {
		if n.admitted && n.server && !n.votes && n.fresh {
			out = append(out, n)
		}
	}
	return out
}

// least returns the voter whose vote is worth least: a dead one, else the last
// in order; never ourselves.
func (s *view) least() (out *standing) {
	for _, n := range s.all {
		if n.votes && !n.self && (out == nil || n.dead || !out.dead) {
			out = n
		}
	}
	return out
}

// heir returns the best live, caught-up voter other than ourselves.
func (s *view) heir() *standing {
	for _, n := range s.all {
		if n.admitted && n.votes && !n.self && n.fresh {
			return n
		}
	}
	return nil
}

// depart removes what is no member any more.
func (r *Rule) depart(_ time.Time, s *view) *Effect {
	for _, n := range s.all {
		if !n.server || n.admitted {
			continue
		}
		if !n.self {
			return &Effect{RemoveNode, n.ID, "it is no member any more"}
		}
		if h := s.heir(); h != nil {
			return &Effect{Transfer, h.ID, "this node leaves"}
		}
	}
	return nil
}

// arrive adds new members, without a vote.
func (r *Rule) arrive(_ time.Time, s *view) *Effect {
	for _, n := range s.all {
		if n.admitted && !n.server {
			return &Effect{AddMember, n.ID, "it was admitted"}
		}
	}
	return nil
}

// grow gives votes when enough nodes stand ready to reach an odd number.
func (r *Rule) grow(_ time.Time, s *view) *Effect {
	spares := s.spares()
	if s.voters >= s.want || len(spares) == 0 {
		return nil
	}
	if s.voters%2 == 1 && len(spares) < 2 {
		return nil
	}
	return &Effect{Promoted, spares[0].ID, "more nodes, more votes"}
}

// replace gives a vote to a spare that is worth more than some voter; shrink
// then takes the other's.
func (r *Rule) replace(_ time.Time, s *view) *Effect {
	spares := s.spares()
	if s.voters != s.want || len(spares) == 0 {
		return nil
	}
	worst := s.least()
	if worst == nil {
		return r.soleVoter(s, spares[0])
	}
	best := spares[0]
	switch {
	case worst.dead:
		return &Effect{Promoted, best.ID, "it stands in for a dead voter"}
	case best.Voter && !worst.Voter:
		return &Effect{Promoted, best.ID, "it replaces a witness"}
	case best.Voter && best.Priority > worst.Priority && best.live:
		return &Effect{Promoted, best.ID, "it has a higher priority than a voter"}
	}
	return nil
}

// soleVoter moves the only vote of a small mesh: to a member that is leaving's
// heir, or to the one candidate when we are none.
func (r *Rule) soleVoter(s *view, best *standing) *Effect {
	for _, n := range s.all {
		if n.self && (!n.admitted || !n.Voter && best.Voter) {
			return &Effect{Promoted, best.ID, "it takes over the only vote"}
		}
	}
	return nil
}

// shrink takes votes: too many, or an even number that nobody completes.
func (r *Rule) shrink(now time.Time, s *view) *Effect {
	stuck := s.voters < s.want && s.voters%2 == 0 && now.Sub(r.evenFrom) >= evenFor
	if s.voters <= s.want && !stuck {
		return nil
	}
	for _, n := range s.all { // as the only candidate's witness we go first
		if n.self && s.voters == 2 && s.want == 1 && (!n.Voter || !n.admitted) {
			if h := s.heir(); h != nil && h.Voter {
				return &Effect{Transfer, h.ID, "a witness does not lead"}
			}
		}
	}
	if n := s.least(); n != nil {
		return &Effect{Demoted, n.ID, "fewer nodes, fewer votes"}
	}
	return nil
}

// lead hands the lead to who should have it: at once when we are but a
// witness, after steady contact when it goes by priority.
func (r *Rule) lead(now time.Time, s *view) *Effect {
	var self *standing
	for _, n := range s.all {
		if n.self {
			self = n
		}
	}
	h := s.heir()
	if self == nil || h == nil || !h.Voter {
		return nil
	}
	if !self.Voter {
		return &Effect{Transfer, h.ID, "a witness does not lead"}
	}
	if h.Priority <= self.Priority || h.since.IsZero() || now.Sub(h.since) < r.hold(h.ID) {
		return nil
	}
	return &Effect{Transfer, h.ID, "it has the higher priority"}
}

// hold is how long id must have been in steady contact: doubled for each time
// that it lost the lead again.
func (r *Rule) hold(id mesh.NodeID) time.Duration {
	h := cmp.Or(r.TakeBack, defaultTakeBack)
	for range min(r.flaps[id], 10) {
		h = min(2*h, maxTakeBack)
	}
	return h
}

// before returns what has to be done before the vote of id can be taken: a
// silent voter whose vote would leave the rest without a majority loses its own.
// Only who answered since a time counts as live. Each change has to be committed
// by those who vote after it; where they could not, the effect is to do nothing.
func before(since time.Time, f Facts, id mesh.NodeID) (Effect, bool) {
	answered := map[mesh.NodeID]bool{f.Self: true}
	for _, c := range f.Contacts {
		answered[c.ID] = answered[c.ID] || !c.Last.Before(since)
	}
	rest, live, votes := 0, 0, 0 // of the voters without id; id's own vote
	var silent mesh.NodeID
	for _, n := range f.Servers {
		switch {
		case !n.Voter:
			continue
		case n.ID == id:
			votes = 1
			continue
		case answered[n.ID]:
			live++
		default:
			silent = n.ID
		}
		rest++
	}
	if votes == 0 || live > rest/2 {
		return Effect{}, false
	}
	if answered[id] {
		live++
	}
	if silent == 0 || live <= (rest-1+votes)/2 {
		return Effect{}, true
	}
	return Effect{Demoted, silent, "it is silent, and its vote is needed"}, true
}
