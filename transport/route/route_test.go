package route

import (
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"posthouse/mesh"
	"posthouse/transport"
)

type directory struct {
	addrs map[string]Resolution
	homes map[mesh.MailboxID]mesh.NodeID
}

func (d directory) Resolve(a mesh.Address) Resolution {
	if r, ok := d.addrs[a.Key()]; ok {
		return r
	}
	if a.DomainKey() == "ours.example" {
		return Resolution{Kind: Unknown}
	}
	return Resolution{Kind: Outside}
}

func (d directory) Home(m mesh.MailboxID) (mesh.NodeID, uint64, bool) {
	n, ok := d.homes[m]
	return n, 1, ok
}

const (
	praha mesh.NodeID = 1
	plzen mesh.NodeID = 2
	brno  mesh.NodeID = 3
)

func box(b byte) mesh.MailboxID { return mesh.MailboxID{b} }

func person(b byte, name string, home mesh.NodeID) Target {
	return Target{Mailbox: box(b), Address: name + "@ours.example", Home: home, Version: 1}
}

func found(ts ...Target) Resolution { return Resolution{Kind: Found, Targets: ts} }

func world(self mesh.NodeID) State {
	anna, bob, cyril := person(1, "anna", praha), person(2, "bob", plzen), person(3, "cyril", plzen)
	full := person(4, "full", brno)
	full.Full = true
	out := Target{Address: "Guest@Far.Example"}
	return State{
		View: &mesh.View{Self: self, Master: praha, Members: []mesh.Member{
			{ID: brno, Name: "brno", State: mesh.Serving, Gateway: true},
			{ID: plzen, Name: "plzen", State: mesh.Serving},
			{ID: praha, Name: "praha", State: mesh.Serving, Gateway: true},
		}},
		Directory: directory{
			addrs: map[string]Resolution{
				"anna@ours.example":   found(anna),
				"alias@ours.example":  found(anna),
				"bob@ours.example":    found(bob),
				"cyril@ours.example":  found(cyril),
				"full@ours.example":   found(full),
				"all@ours.example":    {Kind: Found, Expanded: true, Closed: true, Targets: []Target{anna, bob, cyril, full, out}},
				"list@ours.example":   {Kind: Found, Expanded: true, Owner: "anna@ours.example", Targets: []Target{bob, out}},
				"loop@ours.example":   {Kind: Found, Expanded: true, TooMany: true},
				"nobody@ours.example": {Kind: Found, Expanded: true},
			},
			homes: map[mesh.MailboxID]mesh.NodeID{box(1): praha, box(2): plzen, box(3): brno},
		},
	}
}

func print(d Decision) string {
	var b strings.Builder
	for _, l := range d.Legs {
		b.WriteString(l.Dest.String() + ":")
		for _, r := range l.Rcpts {
			b.WriteString(" " + r.Address)
			if r.Bounces != "" {
				b.WriteString("(bounces " + r.Bounces + ")")
			}
			for i, n := range []string{"never", "success", "failure", "delay"} {
				if r.Notify&(1<<i) != 0 {
					b.WriteString("(" + n + ")")
				}
			}
			if r.ORcpt != "" {
				b.WriteString("(for " + r.ORcpt + ")")
			}
		}
		b.WriteString("\n")
	}
	for _, f := range d.Faults {
		if f != nil {
			b.WriteString(f.Error() + "\n")
		}
	}
	for _, n := range d.Notices {
		kind := "expanded "
		if n.List {
			kind = "list "
		}
		b.WriteString(kind + n.Rcpt.Address.String() + "\n")
	}
	return b.String()
}

func TestDecide(t *testing.T) {
	const notGateway = plzen
	tests := []struct {
		name   string
		self   mesh.NodeID
		origin transport.Origin
		age    time.Duration
		rcpts  string // address[,NOTIFY...]
		want   string
	}{
		{name: "homes here, there and outside at a gateway", self: praha, origin: transport.OriginSubmission,
			rcpts: "anna@ours.example bob@OURS.example x@Far.example y@far.EXAMPLE z@other.example cyril@ours.example",
			want:  "local: anna@ours.example\nnode:0000000000000002: bob@ours.example cyril@ours.example\nfar.example: x@Far.example y@far.EXAMPLE\nother.example: z@other.example\n"},
		{name: "elsewhere the outside goes to a gateway in one leg", self: notGateway, origin: transport.OriginSubmission,
			rcpts: "x@far.example z@other.example", want: "gateway: x@far.example z@other.example\n"},
		{name: "one copy for each mailbox however it is named", self: praha, origin: transport.OriginOutside,
			rcpts: "alias@ours.example anna@ours.example Anna@ours.example", want: "local: anna@ours.example\n"},
		{name: "outside local parts differ by case, domains do not", self: praha, origin: transport.OriginSubmission,
			rcpts: "A@far.example a@far.example A@FAR.example", want: "far.example: A@far.example a@far.example\n"},
		{name: "nobody relays through port 25", self: praha, origin: transport.OriginOutside,
			rcpts: "x@far.example", want: "550 5.7.1 Relaying denied: log in to send to other domains\n"},
		{name: "an alias may lead outside for anybody", self: praha, origin: transport.OriginOutside,
			rcpts: "list@ours.example",
			want:  "node:0000000000000002: bob@ours.example(bounces anna@ours.example)\nfar.example: Guest@Far.Example(bounces anna@ours.example)\n"},
		{name: "a list takes over from the sender, success is due at once", self: praha, origin: transport.OriginSubmission,
			rcpts: "list@ours.example,success,failure",
			want:  "node:0000000000000002: bob@ours.example(bounces anna@ours.example)\nfar.example: Guest@Far.Example(bounces anna@ours.example)\nlist list@ours.example\n"},
		{name: "a group keeps the sender, success ends with expanded", self: brno, origin: transport.OriginSubmission,
			rcpts: "all@ours.example,success,delay bob@ours.example",
			want: "node:0000000000000001: anna@ours.example(delay)(for rfc822;x)\n" +
				"node:0000000000000002: bob@ours.example(delay)(for rfc822;x) cyril@ours.example(delay)(for rfc822;x)\n" +
				"local: full@ours.example(delay)(for rfc822;x)\nfar.example: Guest@Far.Example(delay)(for rfc822;x)\nexpanded all@ours.example\n"},
		{name: "success alone through a group becomes never, not the default", self: plzen, origin: transport.OriginSubmission,
			rcpts: "nobody@ours.example,success bob@ours.example,success",
			want:  "local: bob@ours.example(success)(for rfc822;x)\nexpanded nobody@ours.example\n"},
		{name: "a closed group refuses outside senders", self: praha, origin: transport.OriginOutside,
			rcpts: "all@ours.example", want: "550 5.7.1 This group takes mail from inside only\n"},
		{name: "a full mailbox says so", self: praha, origin: transport.OriginOutside,
			rcpts: "full@ours.example anna@ours.example", want: "local: anna@ours.example\n452 4.2.2 Mailbox full, try again later\n"},
		{name: "expansion out of bounds delivers to nobody", self: praha, origin: transport.OriginSubmission,
			rcpts: "loop@ours.example", want: "550 5.4.6 This address leads to too many others, or back to itself: its administrator must mend it\n"},
		{name: "unknown while current", self: praha, origin: transport.OriginOutside, age: 60 * time.Second,
			rcpts: "who@ours.example anna@ours.example", want: "local: anna@ours.example\n550 5.1.1 No such user here\n"},
		{name: "unknown while the copy may be old", self: praha, origin: transport.OriginOutside, age: 61 * time.Second,
			rcpts: "who@ours.example anna@ours.example", want: "local: anna@ours.example\n450 4.1.1 User not known here yet, try again later\n"},
		{name: "unknown to a user names the age", self: praha, origin: transport.OriginSubmission, age: 3 * time.Hour,
			rcpts: "who@ours.example", want: "550 5.1.1 No such user in this office's copy of the directory, which is 3 h old\n"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s := world(tt.self)
			s.Age = tt.age
			var rs []Rcpt
			for _, f := range strings.Fields(tt.rcpts) {
				words := strings.Split(f, ",")
				a, err := mesh.ParseAddress(words[0])
				if err != nil {
					t.Fatal(err)
				}
				r := Rcpt{Address: a}
				for _, w := range words[1:] {
					r.Notify |= map[string]transport.Notify{"success": transport.NotifySuccess, "failure": transport.NotifyFailure, "delay": transport.NotifyDelay}[w]
					r.ORcpt = "rfc822;x"
				}
				rs = append(rs, r)
			}
			env := &transport.Envelope{Origin: tt.origin}
			d := s.Decide(env, rs)
			if diff := cmp.Diff(tt.want, print(d)); diff != "" {
				t.Error(diff)
			}
			for i, r := range rs {
				if diff := cmp.Diff(d.Faults[i], s.Check(env, r)); diff != "" {
					t.Errorf("Check differs from Decide: %s", diff)
				}
			}
		})
	}
}

func TestNextFollowsHomesAndGateways(t *testing.T) {
	s := world(plzen)
	check := func(r transport.Recipient, want string, ok bool) {
		t.Helper()
		if d, k := s.Next(&r); d.String() != want || k != ok {
			t.Errorf("%s: %s %v, want %s %v", r.Key(), d, k, want, ok)
		}
	}
	check(transport.Recipient{Mailbox: box(1)}, "node:0000000000000001", true)
	check(transport.Recipient{Mailbox: box(2)}, "local", true)
	check(transport.Recipient{Mailbox: box(9)}, "nowhere", false)
	check(transport.Recipient{Address: "x@Far.example"}, "gateway", true)
	s.View.Members[1].Gateway = true
	check(transport.Recipient{Address: "x@Far.example"}, "far.example", true)
}

func TestGatewaysMasterFirstThenRankThenName(t *testing.T) {
	v := &mesh.View{Self: 9, Master: 4, Members: []mesh.Member{
		{ID: 1, Name: "a", Gateway: true, State: mesh.Unreachable},
		{ID: 2, Name: "b", Gateway: true, State: mesh.Serving},
		{ID: 3, Name: "c", Gateway: true, State: mesh.Serving},
		{ID: 4, Name: "d", Gateway: true, State: mesh.Serving},
		{ID: 5, Name: "e", State: mesh.Serving},
		{ID: 6, Name: "f", Gateway: true, State: mesh.Left},
		{ID: 9, Name: "z", Gateway: true, State: mesh.Serving},
	}}
	if diff := cmp.Diff([]mesh.NodeID{4, 2, 3, 1}, Gateways(v, nil)); diff != "" {
		t.Error(diff)
	}
	rank := func(n mesh.NodeID) int { return -int(n) }
	if diff := cmp.Diff([]mesh.NodeID{4, 3, 2, 1}, Gateways(v, rank)); diff != "" {
		t.Error(diff)
	}
	v.Master = 5 // a master that is no gateway
	if diff := cmp.Diff([]mesh.NodeID{2, 3, 4, 1}, Gateways(v, nil)); diff != "" {
		t.Error(diff)
	}
}
