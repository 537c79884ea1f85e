// Package route splits a message into legs: it says for each recipient who has
// to get a copy, where that copy goes next, or why it is refused.
//
// It is pure: the envelope, the mesh's View and the Directory in, a Decision
// out; no I/O, no clock. intake calls Decide before it accepts, smtpd's checks
// at RCPT are Check, and queue calls Next when a home or a gateway has changed.
package route

import (
	"fmt"
	"slices"
	"time"

	"posthouse/mesh"
	"posthouse/transport"
)

// Kind says what a Directory knows of an address.
type Kind uint8

// The kinds of a Resolution.
const (
	Unknown Kind = iota // a domain of ours, but nobody there
	Outside             // not a domain of ours
	Found               // somebody of ours, as Targets say
)

// Resolution is what a Directory knows of an address: the people behind it,
// with aliases and groups expanded (visited set, depth 10, 10,000 members).
type Resolution struct {
	Kind    Kind
	Targets []Target // for Found; may be empty: a group without members
	// Expanded is set when the address is a group, even of one member: NOTIFY
	// and ORCPT are then handled by RFC 3461 section 5.2.7.
	Expanded bool
	// Owner is who hears of failures instead of the envelope sender: an address
	// without brackets, or "".
	Owner string
	// Closed refuses senders who are not of this mesh (550 5.7.1).
	Closed bool
	// TooMany says that the expansion met its bounds: nobody gets a copy.
	TooMany bool
}

// Target is one final recipient of a Resolution.
type Target struct {
	Mailbox mesh.MailboxID // zero: outside, at Address
	Address string         // without brackets
	Home    mesh.NodeID    // where Mailbox lives
	Version uint64         // of that statement
	Full    bool           // the home says that the mailbox is over its quota
	Detail  string         // the sub-address that was cut
}

// Directory answers from this node's copy of the domain state.
type Directory interface {
	Resolve(a mesh.Address) Resolution
	// Home returns where a mailbox lives now; false when there is none.
	Home(m mesh.MailboxID) (home mesh.NodeID, version uint64, ok bool)
}

// State says what a decision stands on.
type State struct {
	View      *mesh.View
	Directory Directory
	// Age is how long ago the domain state was last known to be current: since
	// the master was heard.
	Age time.Duration
}

// CurrentFor is how long after the master was heard a missing recipient may be
// refused for good on port 25.
const CurrentFor = 60 * time.Second

// Rcpt is one recipient as the client gave it.
type Rcpt struct {
	Address mesh.Address
	Notify  transport.Notify
	ORcpt   string
}

// Leg is one destination with its recipients, in the order of the message.
type Leg struct {
	Dest  transport.Destination
	Rcpts []transport.Recipient
}

// Notice is a report that is due at acceptance, by RFC 3461 section 5.2.7: the
// address was expanded, or handed to a list.
type Notice struct {
	Rcpt Rcpt
	// List: the address has an owner, so for RFC 3461 section 5.2.7.3 it is a
	// mailing list: "delivered". Otherwise "expanded".
	List bool
}

// Decision is what becomes of a message.
type Decision struct {
	Legs    []Leg
	Faults  []*transport.Fault // one for each given recipient, nil where it is fine
	Notices []Notice
}

// Check says why a recipient cannot be accepted; nil when it can.
func (s State) Check(env *transport.Envelope, r Rcpt) *transport.Fault {
	_, f := s.resolve(env, r.Address)
	return f
}

// Decide splits the message among destinations. One copy goes to each mailbox
// and to each outside address, however often it is named; the first naming
// wins. Recipients with a fault get nothing. Legs come in the order in which
// their destinations are first met.
func (s State) Decide(env *transport.Envelope, rcpts []Rcpt) Decision {
	d := Decision{Faults: make([]*transport.Fault, len(rcpts))}
	seen := map[string]bool{}
	at := map[transport.Destination]int{}
	for i, r := range rcpts {
		res, f := s.resolve(env, r.Address)
		if f != nil {
			d.Faults[i] = f
			continue
		}
		if res.Kind == Outside {
			res.Targets = []Target{{Address: r.Address.String()}}
		}
		notify, orcpt := r.Notify, r.ORcpt
		if res.Owner != "" {
			// RFC 3461 section 5.2.7.3: a list sends under its own name, with
			// none of the sender's parameters.
			notify, orcpt = 0, ""
		} else if res.Expanded {
			// RFC 3461 section 5.2.7.2: success ends with "expanded".
			if notify &^= transport.NotifySuccess; notify == 0 && r.Notify != 0 {
				notify = transport.NotifyNever
			}
		}
		if res.Expanded && r.Notify&transport.NotifySuccess != 0 {
			d.Notices = append(d.Notices, Notice{Rcpt: r, List: res.Owner != ""})
		}
		for _, t := range res.Targets {
			rc := transport.Recipient{Mailbox: t.Mailbox, Address: t.Address, Notify: notify, ORcpt: orcpt,
				Bounces: res.Owner, Detail: t.Detail}
			key := rc.Key()
			if t.Mailbox.IsZero() {
				a, err := mesh.ParseAddress(t.Address)
				if err != nil {
					continue // the directory refuses such members; never a reason to stop the others
				}
				key = a.Local + "@" + a.DomainKey() // outside, the case of a local part may matter
			}
			if seen[key] {
				continue
			}
			seen[key] = true
			var dest transport.Destination
			if t.Mailbox.IsZero() {
				dest = s.outside(t.Address)
			} else {
				dest = s.home(t.Home)
			}
			n, ok := at[dest]
			if !ok {
				n = len(d.Legs)
				at[dest] = n
				d.Legs = append(d.Legs, Leg{Dest: dest})
			}
			d.Legs[n].Rcpts = append(d.Legs[n].Rcpts, rc)
		}
	}
	return d
}

// Next says where a recipient that waits goes now; false when nobody here
// knows the mailbox any more.
func (s State) Next(r *transport.Recipient) (transport.Destination, bool) {
	if r.Mailbox.IsZero() {
		return s.outside(r.Address), true
	}
	home, _, ok := s.Directory.Home(r.Mailbox)
	if !ok || home == 0 {
		return transport.Destination{}, false
	}
	return s.home(home), true
}

// ToDomain returns the destination of an outside address at a gateway.
func ToDomain(address string) transport.Destination {
	d := transport.Destination{Scope: transport.ScopeOutside}
	if a, err := mesh.ParseAddress(address); err == nil {
		d.Domain = a.DomainKey()
	}
	return d
}

func (s State) home(n mesh.NodeID) transport.Destination {
	if n == s.View.Self {
		return transport.Destination{Scope: transport.ScopeLocal}
	}
	return transport.Destination{Scope: transport.ScopeNode, Node: n}
}

func (s State) outside(address string) transport.Destination {
	if self, ok := s.View.Member(s.View.Self); ok && self.Gateway {
		return ToDomain(address)
	}
	return transport.Destination{Scope: transport.ScopeGateway}
}

// Gateways returns the gateways that an outside leg may be offered to, best
// first: the master if it is one, then the other serving ones, then those that
// are not known to serve; each group in the order of rank, which gives a
// node's priority (smaller is better; nil: all alike), then of name. This node
// itself is never among them.
func Gateways(v *mesh.View, rank func(mesh.NodeID) int) []mesh.NodeID {
	class := func(m mesh.Member) int {
		switch {
		case m.State != mesh.Serving:
			return 2
		case m.ID == v.Master:
			return 0
		}
		return 1
	}
	var ms []mesh.Member
	for _, m := range v.Members {
		if m.Gateway && m.ID != v.Self && m.State != mesh.Left {
			ms = append(ms, m)
		}
	}
	slices.SortStableFunc(ms, func(a, b mesh.Member) int {
		if c := class(a) - class(b); c != 0 || rank == nil {
			return c
		}
		return rank(a.ID) - rank(b.ID)
	})
	ids := make([]mesh.NodeID, len(ms))
	for i, m := range ms {
		ids[i] = m.ID
	}
	return ids
}

// inside reports whether the message comes from somebody of this mesh.
func inside(o transport.Origin) bool { return o != transport.OriginOutside && o != 0 }

func (s State) resolve(env *transport.Envelope, a mesh.Address) (Resolution, *transport.Fault) {
	res := s.Directory.Resolve(a)
	switch {
	case res.Kind == Outside:
		if relaysForOwnOnly && !inside(env.Origin) {
			return res, transport.Faultf(550, "5.7.1", "Relaying denied: log in to send to other domains")
		}
	case res.Kind == Unknown, !knownAreTaken && s.Age > CurrentFor:
		return res, s.unknown(env)
	case res.Closed && !inside(env.Origin):
		return res, transport.Faultf(550, "5.7.1", "This group takes mail from inside only")
	case res.TooMany:
		return res, transport.Faultf(550, "5.4.6", "This address leads to too many others, or back to itself: its administrator must mend it")
	// Not a report: it is made for mail that was accepted, and waits as that does.
	case env.Origin != transport.OriginLocal && !res.Expanded && len(res.Targets) == 1 && res.Targets[0].Full:
		return res, transport.Faultf(452, "4.2.2", "Mailbox full, try again later")
	}
	return res, nil
}

// unknown refuses for good only what this node can know: its copy of the domain
// state may be older than the user.
func (s State) unknown(env *transport.Envelope) *transport.Fault {
	switch {
	case s.Age <= CurrentFor:
		return transport.Faultf(550, "5.1.1", "No such user here")
	case inside(env.Origin):
		return transport.Faultf(550, "5.1.1", "No such user in this office's copy of the directory, which is %s old", age(s.Age))
	}
	return transport.Faultf(450, "4.1.1", "User not known here yet, try again later")
}

func age(d time.Duration) string {
	switch {
	case d < 2*time.Hour:
		return fmt.Sprintf("%d min", int(d.Minutes()))
	case d < 48*time.Hour:
		return fmt.Sprintf("%d h", int(d.Hours()))
	}
	return fmt.Sprintf("%d days", int(d.Hours()/24))
}
