package domain

import (
	"bytes"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"posthouse/mesh"
)

var update = flag.Bool("update", false, "write the fixtures anew")

func id(n int) (i mesh.ID) { binary.BigEndian.PutUint64(i[8:], uint64(n)); i[0] = 1; return i }

func box(n int) mesh.MailboxID { return mesh.MailboxID(id(1_000_000 + n)) }

func key(n int) (k mesh.KeyHash) { binary.BigEndian.PutUint64(k[:], uint64(n)); k[31] = 1; return k }

// rig applies commands at growing indexes.
type rig struct {
	t     testing.TB
	m     *Machine
	index uint64
	next  int
	now   Time
}

const (
	founder = mesh.NodeID(0x11)
	branch  = mesh.NodeID(0x22)
)

func empty(t testing.TB) *rig {
	return &rig{t: t, m: NewMachine(), next: 1 << 20, now: 1_800_000_000_000}
}

func founded(t testing.TB) *rig {
	r := empty(t)
	r.ok(&Found{Lineage: id(1), Node: AdmitNode{ID: founder, Name: "praha", Key: key(1), Addresses: []string{"192.0.2.1:44337"}, Voter: true, Gateway: true, Seal: sealKey(founder)},
		Domain: Domain{ID: id(2), Name: "Company.com"}, Admin: User{ID: id(3), Mailbox: box(3), Address: "Admin@company.com", Name: "The Admin", Home: founder}, Key: firstKey,
		Authority: &Authority{Certificate: []byte("certificate"), Secret: Sealed{Candidates: []byte("box"), Key: 1}}})
	return r
}

func (r *rig) do(b Body) Result {
	r.t.Helper()
	r.next++
	r.index++
	r.now += 1000
	c := Command{ID: id(r.next), Actor: "admin@company.com", Via: founder, At: r.now, Body: b}
	res, err := r.m.ApplyResult(r.index, 7, c.Encode())
	if err != nil {
		r.t.Fatalf("%s: %v", b.kind(), err)
	}
	return res
}

func (r *rig) ok(b Body) Result {
	r.t.Helper()
	res := r.do(b)
	if res.Code != OK {
		r.t.Fatalf("%s: %s: %s", b.kind(), res.Code, res.Text)
	}
	return res
}

func (r *rig) no(want Code, b Body) {
	r.t.Helper()
	before := r.m.Snapshot().(*frozen)
	if res := r.do(b); res.Code != want || res.Text == "" {
		r.t.Errorf("%s: got %s %q, want %s", b.kind(), res.Code, res.Text, want)
	}
	after := r.m.Snapshot().(*frozen)
	before.head, before.journal = after.head, after.journal
	var x, y bytes.Buffer
	before.WriteTo(&x)
	after.WriteTo(&y)
	if !bytes.Equal(x.Bytes(), y.Bytes()) {
		r.t.Errorf("%s: a refused command changed the state", b.kind())
	}
}

func (r *rig) user(n int, address string, more ...string) mesh.ID {
	r.t.Helper()
	r.ok(&CreateUser{User{ID: id(n), Mailbox: box(n), Address: address, Aliases: more, Home: founder, Verifier: boxed(founder, "$argon2id$…")}})
	return id(n)
}

func addr(s string) mesh.Address {
	if s == "Postmaster" {
		return mesh.Address{Local: s}
	}
	a, err := mesh.ParseAddress(s)
	if err != nil {
		panic(err)
	}
	return a
}

func p[T any](v T) *T { return &v }

func TestAnAddressLeadsWhereMailShouldGo(t *testing.T) {
	r := founded(t)
	alice := r.user(10, "Alice@company.com", "a.liddell@company.com", "sales+eu@company.com")
	bob := r.user(11, "bob@company.com")
	carol := r.user(12, "žofie@company.com")
	r.ok(&PutGroup{Group{ID: id(20), Address: "all@company.com", Members: []Target{{ID: alice}, {ID: bob}, {Address: "x@else.net"}, {ID: alice}}, Owner: "bob@company.com"}})
	r.ok(&PutGroup{Group{ID: id(21), Address: "open@company.com", Outside: true, Members: []Target{{ID: id(20)}, {ID: carol}}}})
	r.ok(&PutGroup{Group{ID: id(22), Address: "empty@company.com"}})
	r.ok(&PutAlias{Alias{ID: id(30), Address: "info@company.com", Targets: []Target{{Address: "bob+info@company.com"}}}})
	r.ok(&PutAlias{Alias{ID: id(31), Address: "both@company.com", Targets: []Target{{ID: id(20)}, {Address: "open@company.com"}}}})
	r.ok(&PutAlias{Alias{ID: id(32), Address: "gone@company.com", Targets: []Target{{Address: "nobody@company.com"}}}})
	// Two that list each other, changed after both exist.
	r.ok(&PutGroup{Group{ID: id(23), Address: "loop1@company.com", Outside: true, Members: []Target{{ID: bob}}}})
	r.ok(&PutGroup{Group{ID: id(24), Address: "loop2@company.com", Outside: true, Members: []Target{{ID: id(23)}, {ID: alice}}}})
	r.ok(&PutGroup{Group{ID: id(23), Address: "loop1@company.com", Outside: true, Members: []Target{{ID: bob}, {ID: id(24)}}}})
	r.ok(&PutDomain{Domain{ID: id(2), Name: "company.com", Aliases: []string{"company.cz"}}})

	for _, c := range []struct {
		name, address string
		kind          Resolved
		to            []string
		detail        string
		expanded      bool
		membersOnly   bool
		owner         string
	}{
		{name: "a user", address: "alice@company.com", kind: Inside, to: []string{"Alice@company.com"}},
		{name: "in any case", address: "ALICE@COMPANY.COM", kind: Inside, to: []string{"Alice@company.com"}},
		{name: "a user's alias", address: "a.liddell@company.com", kind: Inside, to: []string{"Alice@company.com"}},
		{name: "under another name of the domain", address: "bob@Company.CZ", kind: Inside, to: []string{"bob@company.com"}},
		{name: "NFD finds NFC", address: "z\u030cofie@company.com", kind: Inside, to: []string{"žofie@company.com"}},
		{name: "a sub-address", address: "bob+Lists@company.com", kind: Inside, to: []string{"bob@company.com"}, detail: "Lists"},
		{name: "an alias with a plus of its own", address: "sales+eu@company.com", kind: Inside, to: []string{"Alice@company.com"}},
		{name: "another tag of it is nobody", address: "sales+us@company.com", kind: Unknown},
		{name: "quotes that say nothing", address: `"bob"@company.com`, kind: Inside, to: []string{"bob@company.com"}},
		{name: "a group, members once, the owner's bounces", address: "all@company.com", kind: Inside, to: []string{"Alice@company.com", "bob@company.com", "x@else.net"},
			expanded: true, membersOnly: true, owner: "bob@company.com"},
		{name: "a closed group inside an open one", address: "open@company.com", kind: Inside,
			to: []string{"Alice@company.com", "bob@company.com", "x@else.net", "žofie@company.com"}, expanded: true},
		{name: "an empty closed group", address: "empty@company.com", kind: Inside, expanded: true, membersOnly: true},
		{name: "an alias by address and tag", address: "info@company.com", kind: Inside, to: []string{"bob@company.com"}},
		{name: "closed by one way, open by the other", address: "both@company.com", kind: Inside,
			to: []string{"Alice@company.com", "bob@company.com", "x@else.net", "žofie@company.com"}, expanded: true},
		{name: "an alias to nobody", address: "gone@company.com", kind: Inside, expanded: true},
		{name: "groups that list each other", address: "loop1@company.com", kind: Inside, to: []string{"bob@company.com", "Alice@company.com"}, expanded: true},
		{name: "nobody", address: "mallory@company.com", kind: Unknown},
		{name: "another domain", address: "bob@else.net", kind: Outside},
		{name: "a literal", address: "bob@[192.0.2.1]", kind: Outside},
		{name: "the bare postmaster", address: "Postmaster", kind: Inside, to: []string{"Admin@company.com"}},
		{name: "postmaster of a domain", address: "postMaster@company.cz", kind: Inside, to: []string{"Admin@company.com"}},
		{name: "abuse with a tag", address: "abuse+x@company.com", kind: Inside, to: []string{"Admin@company.com"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			got := r.m.Resolve(addr(c.address))
			var to []string
			for _, x := range got.Recipients {
				to = append(to, x.Address)
				if x.Mailbox.IsZero() != x.User.IsZero() || !x.Mailbox.IsZero() && (x.Home != founder || x.HomeVersion != 1) {
					t.Errorf("recipient %+v", x)
				}
			}
			if d := cmp.Diff(c.to, to); d != "" || got.Kind != c.kind || got.Detail != c.detail || got.Expanded != c.expanded ||
				got.MembersOnly != c.membersOnly || got.Owner != c.owner {
				t.Errorf("got %+v\n%s", got, d)
			}
		})
	}

	t.Run("the nearest owner hears of failures", func(t *testing.T) {
		got := r.m.Resolve(addr("open@company.com"))
		var by []string
		for _, x := range got.Recipients {
			by = append(by, x.Bounces)
		}
		if d := cmp.Diff([]string{"bob@company.com", "bob@company.com", "bob@company.com", ""}, by); d != "" {
			t.Error(d)
		}
	})
	t.Run("eleven groups inside one another are too deep", func(t *testing.T) {
		last := Target{ID: bob}
		for i := range 11 {
			r.ok(&PutGroup{Group{ID: id(100 + i), Address: fmt.Sprintf("deep%d@company.com", i), Members: []Target{last}}})
			last = Target{ID: id(100 + i)}
		}
		if k := r.m.Resolve(addr("deep9@company.com")).Kind; k != Inside {
			t.Errorf("ten: %v", k)
		}
		if k := r.m.Resolve(addr("deep10@company.com")).Kind; k != TooMany {
			t.Errorf("eleven: %v", k)
		}
	})
	t.Run("more than 10,000 recipients are too many", func(t *testing.T) {
		var ms [2][]Target
		for i := range MaxMembers + 1 {
			ms[i%2] = append(ms[i%2], Target{Address: fmt.Sprintf("u%d@else.net", i)})
		}
		r.ok(&PutGroup{Group{ID: id(200), Address: "half@company.com", Members: ms[0]}})
		r.ok(&PutGroup{Group{ID: id(201), Address: "whole@company.com", Members: append(ms[1], Target{ID: id(200)})}})
		if k := r.m.Resolve(addr("whole@company.com")).Kind; k != TooMany {
			t.Errorf("got %v", k)
		}
	})
}

func TestWhoMaySendFromAnAddress(t *testing.T) {
	r := founded(t)
	alice := r.user(10, "alice@company.com", "al@company.com")
	bob := r.user(11, "bob@company.com")
	r.ok(&PutGroup{Group{ID: id(20), Address: "sales@company.com", Members: []Target{{ID: alice}}}})
	r.ok(&PutDomain{Domain{ID: id(2), Name: "company.com", Aliases: []string{"company.cz"}}})
	r.ok(&PutAlias{Alias{ID: id(30), Address: "info@company.com", Targets: []Target{{ID: alice}}}})
	r.ok(&PutAlias{Alias{ID: id(31), Address: "shop@company.com", Targets: []Target{{Address: "AL@company.cz"}}}})
	r.ok(&PutAlias{Alias{ID: id(32), Address: "both@company.com", Targets: []Target{{ID: alice}, {ID: bob}}}})
	r.ok(&PutAlias{Alias{ID: id(33), Address: "group@company.com", Targets: []Target{{ID: id(20)}}}})
	r.ok(&UpdateUser{User: bob, SendAs: &[]string{"Sales@company.com", "bob@private.net"}})
	for _, c := range []struct {
		name    string
		user    mesh.ID
		address string
		want    bool
	}{
		{"the own address", alice, "Alice@company.com", true},
		{"an alias", alice, "al@company.com", true},
		{"an alias that stands for one user", alice, "Info@company.com", true},
		{"its sub-address", alice, "info+x@company.com", true},
		{"an alias that stands for an address of that user", alice, "shop@company.com", true},
		{"an alias that others read too", alice, "both@company.com", false},
		{"an alias of a group", alice, "group@company.com", false},
		{"another's alias", bob, "info@company.com", false},
		{"a sub-address", alice, "alice+shop@company.com", true},
		{"under the domain's other name", alice, "alice@company.cz", true},
		{"somebody else's", alice, "bob@company.com", false},
		{"a group one is only a member of", alice, "sales@company.com", false},
		{"a send-as right", bob, "sales@company.cz", true},
		{"an outside send-as right", bob, "bob+x@private.net", true},
		{"nobody's", id(99), "alice@company.com", false},
	} {
		if got := r.m.MaySend(c.user, addr(c.address)); got != c.want {
			t.Errorf("%s: %v", c.name, got)
		}
	}
	for name, want := range map[string]mesh.ID{"alice": alice, "AL@company.cz": alice, "sales": {}, "nobody": {}, "": {}, "@": {}} {
		if u, ok := r.m.Login(name); ok != !want.IsZero() || ok && u.ID != want {
			t.Errorf("login %q: %v %v", name, u, ok)
		}
	}
}

func TestJoinIsExact(t *testing.T) {
	r := founded(t)
	pub := bytes.Repeat([]byte{7}, 32)
	token := func(n int, b CreateToken) mesh.ID {
		b.ID, b.Public = id(n), pub
		r.ok(&b)
		return id(n)
	}
	admit := func(n int, name string, token mesh.ID) *AdmitNode {
		return &AdmitNode{ID: mesh.NodeID(n), Name: name, Key: key(n), Seal: sealKey(mesh.NodeID(n)), Voter: true, Token: token}
	}
	once := token(40, CreateToken{})
	r.no(NameTaken, admit(50, "Praha", once))
	r.no(TokenUnknown, admit(50, "plzen", id(99)))
	r.no(Invalid, admit(50, "pl zen", once))
	r.ok(admit(50, "plzen", once)) // a refused try did not use the token up
	if n, ok := r.m.NodeByKey(key(50)); !ok || n.Name != "plzen" {
		t.Fatal("plzen is not admitted")
	}
	again := admit(51, "plzen", once)
	again.Key = key(50)
	if res := r.ok(again); res.Node != 50 {
		t.Errorf("the same key again got node %s", res.Node)
	}
	r.no(TokenUsed, admit(52, "brno", once))
	many := token(41, CreateToken{Reusable: true})
	r.ok(admit(52, "brno", many))
	r.ok(admit(53, "ostrava", many))
	r.no(Conflict, admit(53, "zlin", many).withKey(key(99)))
	r.ok(&RevokeToken{many})
	r.no(TokenRevoked, admit(54, "zlin", many))
	short := token(42, CreateToken{Lifetime: 500})
	r.no(TokenExpired, admit(54, "zlin", short))

	r.ok(&RevokeNode{Node: 53})
	if _, ok := r.m.NodeByKey(key(53)); ok {
		t.Error("a revoked key is still admitted")
	}
	r.no(KeyRevoked, admit(55, "ostrava", id(0)).withKey(key(53)))
	r.ok(admit(55, "ostrava", token(43, CreateToken{}))) // the name is free again
	r.ok(&RevokeNode{Node: 55, Left: true})
	r.ok(admit(56, "ostrava", token(44, CreateToken{})).withKey(key(55))) // left in good order

	r.ok(admit(65, "jihlava", token(45, CreateToken{Plain: true})))
	if n, _ := r.m.Node(65); n.Candidate() {
		t.Error("a plain token made a candidate")
	}

	ask := &AskAdmission{ID: id(60), Key: key(57), Seal: mesh.SealKey{1}, Name: "cheb", Code: "123-456", Plain: true}
	r.ok(ask)
	if x, _ := r.m.Pending(id(60)); !x.Plain {
		t.Error("it is forgotten what was asked for")
	}
	r.ok(&AskAdmission{ID: id(61), Key: key(57), Seal: mesh.SealKey{1}, Name: "cheb"})
	if n := len(r.m.Applications()); n != 1 {
		t.Errorf("%d applications", n)
	}
	r.no(NotFound, &AdmitNode{ID: 58, Name: "cheb", Key: key(58), Seal: mesh.SealKey{1}, Pending: id(60)})
	r.no(NotFound, &AdmitNode{ID: 57, Name: "cheb", Key: key(57), Seal: mesh.SealKey{2}, Pending: id(60)})
	r.ok(&AdmitNode{ID: 57, Name: "cheb", Key: key(57), Seal: mesh.SealKey{1}, Pending: id(60)})
	r.no(NotPending, &RefusePending{id(60)})
	r.ok(&AskAdmission{ID: id(62), Key: key(59), Seal: mesh.SealKey{1}, Name: "tabor"})
	r.ok(&RefusePending{id(62)})
	r.no(NotPending, &AdmitNode{ID: 59, Name: "tabor", Key: key(59), Seal: mesh.SealKey{1}, Pending: id(62)})
	r.ok(&AskAdmission{ID: id(63), Key: key(59), Seal: mesh.SealKey{1}, Name: "tabor"})
	r.now += 8 * 24 * 3600 * 1000
	r.no(NotPending, &AdmitNode{ID: 59, Name: "tabor", Key: key(59), Seal: mesh.SealKey{1}, Pending: id(63)})
}

func (b *AdmitNode) withKey(k mesh.KeyHash) *AdmitNode { b.Key = k; return b }

func TestHomesFollowTheNodes(t *testing.T) {
	r := founded(t)
	r.ok(&AdmitNode{ID: branch, Name: "plzen", Key: key(2), Seal: sealKey(branch)})
	alice := r.user(10, "alice@company.com")
	home := func(want mesh.NodeID, version uint64) {
		t.Helper()
		if h, v, ok := r.m.Home(box(10)); h != want || v != version || !ok {
			t.Errorf("home %s version %d %v, want %s %d", h, v, ok, want, version)
		}
	}
	home(founder, 1)
	r.ok(&SetHome{User: alice, Home: branch, IfVersion: 1})
	home(branch, 2)
	r.no(Conflict, &SetHome{User: alice, Home: founder, IfVersion: 1})
	r.no(NotFound, &SetHome{User: alice, Home: 99})
	r.ok(&AdmitNode{ID: 0x33, Name: "brno", Key: key(3), Seal: sealKey(0x33)})
	r.no(NotFound, &ReplaceNode{branch, branch})
	r.ok(&ReplaceNode{branch, 0x33})
	home(0x33, 3)
	if n, _ := r.m.Node(branch); n.Member() || n.ReplacedBy != 0x33 {
		t.Errorf("the replaced node is %+v", n)
	}
	r.ok(&RevokeNode{Node: 0x33, Rehome: founder})
	home(founder, 4)
	r.no(InUse, &RevokeNode{Node: founder})
}

func TestRefusalsAndTheirReasons(t *testing.T) {
	r := empty(t)
	r.no(NotFounded, &DeleteUser{id(3)})
	r = founded(t)
	r.no(Founded, &Found{Lineage: id(9), Node: AdmitNode{ID: 9, Name: "x", Key: key(9), Seal: sealKey(9)}, Domain: Domain{ID: id(8), Name: "x.org"},
		Admin: User{ID: id(7), Mailbox: box(7), Address: "a@x.org", Home: 9}, Key: firstKey})
	alice := r.user(10, "alice@company.com")
	r.no(NameTaken, &CreateUser{User{ID: id(11), Mailbox: box(11), Address: "ALICE@company.com", Home: founder}})
	r.no(NameTaken, &PutAlias{Alias{ID: id(30), Address: "alice@company.com", Targets: []Target{{ID: alice}}}})
	r.no(Invalid, &CreateUser{User{ID: id(11), Mailbox: box(11), Address: "x@else.net", Home: founder}})
	r.no(Conflict, &CreateUser{User{ID: id(11), Mailbox: box(10), Address: "x@company.com", Home: founder}})
	r.no(NotFound, &CreateUser{User{ID: id(11), Mailbox: box(11), Address: "x@company.com", Home: 99}})
	r.no(NotFound, &PutGroup{Group{ID: id(20), Address: "g@company.com", Members: []Target{{ID: id(99)}}}})
	r.no(InUse, &DeleteUser{id(3)}) // the last administrator
	r.no(InUse, &UpdateUser{User: id(3), Role: p(RoleUser)})
	r.ok(&UpdateUser{User: alice, Role: p(RoleMeshAdmin)})
	r.no(InUse, &DeleteUser{id(3)}) // still the postmaster
	r.ok(&SetSettings{Postmaster: p(alice)})
	r.ok(&DeleteUser{id(3)})
	r.no(InUse, &DeleteDomain{id(2)})
	r.no(WrongLineage, &Promote{Lineage: id(5), Generation: 1})
	r.ok(&AdmitNode{ID: branch, Name: "plzen", Key: key(2), Seal: sealKey(branch)})
	r.ok(&Promote{Lineage: id(5), Generation: 2, Fork: 9, Revoke: []mesh.NodeID{branch}})
	if l := r.m.Lineages(); len(l) != 2 || l[1].ID != id(5) || l[1].Fork != 9 {
		t.Errorf("lineages %+v", l)
	}
	r.no(Invalid, &PutRule{DeviceRule{ID: id(70), CIDR: "0.0.0.0/0"}})
	r.ok(&PutRule{DeviceRule{ID: id(70), CIDR: "192.168.0.0/16", Senders: []string{"alice@company.com"}}})
	if n := len(r.m.Rules(founder)); n != 1 {
		t.Errorf("%d rules", n)
	}
	r.no(Conflict, &SetPassword{User: alice, Verifier: boxed(founder, "x"), IfVersion: 7})
	r.ok(&SetPassword{User: alice, Verifier: boxed(founder, "x"), IfVersion: 1})
	r.no(Resealed, &SetPassword{User: alice, Verifier: boxed(branch, "y")})
	r.no(Resealed, &SetPassword{User: alice, Verifier: &Sealed{Home: []byte("y"), To: founder, Candidates: []byte("y"), Key: 2}})
	r.no(Invalid, &SetPassword{User: alice, Verifier: &Sealed{Home: []byte("y"), To: founder}})
	r.no(Invalid, &SetPassword{User: alice, Verifier: &Sealed{Candidates: []byte("y"), Key: 1}})
	if u, _ := r.m.User(alice); u.CredVersion != 2 || string(u.Verifier.Home) != "home x" {
		t.Errorf("user %+v", u)
	}
}

func TestRenamingADomainKeepsOldAddresses(t *testing.T) {
	r := founded(t)
	r.user(10, "alice@company.com", "al@company.com")
	r.ok(&PutDomain{Domain{ID: id(2), Name: "firma.cz"}})
	for _, a := range []string{"alice@firma.cz", "alice@company.com", "al@firma.cz"} {
		if got := r.m.Resolve(addr(a)); got.Kind != Inside || got.Recipients[0].Address != "alice@firma.cz" {
			t.Errorf("%s: %+v", a, got)
		}
	}
	r.no(NameTaken, &CreateUser{User{ID: id(11), Mailbox: box(11), Address: "alice@company.com", Home: founder}})
	r.no(NameTaken, &PutDomain{Domain{ID: id(5), Name: "x.org", Aliases: []string{"company.com"}}})
	r.ok(&PutDomain{Domain{ID: id(2), Name: "firma.cz"}}) // the old name goes: nobody ends in it by now
	if got := r.m.Resolve(addr("alice@company.com")); got.Kind != Outside {
		t.Errorf("%+v", got)
	}
}

func TestARepeatedCommandIsAnsweredNotApplied(t *testing.T) {
	r := founded(t)
	c := Command{ID: id(77), At: r.now, Body: &CreateUser{User{ID: id(10), Mailbox: box(10), Address: "alice@company.com", Home: founder}}}
	first, err := r.m.ApplyResult(2, 7, c.Encode())
	if err != nil || first.Code != OK {
		t.Fatal(first, err)
	}
	if again, err := r.m.ApplyResult(3, 7, c.Encode()); err != nil || again != first {
		t.Errorf("got %+v %v, first %+v", again, err, first)
	}
	if res, ok := r.m.Known(id(77)); !ok || res != first {
		t.Error("not known")
	}
	if es, whole := r.m.CommandsSince(1); len(es) != 1 || !whole || es[0].Text != "created user alice@company.com at praha" {
		t.Errorf("journal %+v", es)
	}
}

func TestTheJournalKeepsTheLastTenThousand(t *testing.T) {
	r := founded(t)
	for range JournalSize + 5 {
		r.ok(&ReportVersion{Node: founder, Version: "1.0", Level: 1})
	}
	if _, ok := r.m.Known(id(1<<20 + 1)); ok {
		t.Error("the oldest command is still known")
	}
	es, whole := r.m.CommandsSince(0)
	if len(es) != JournalSize || whole || es[0].Index != r.index-JournalSize+1 || es[len(es)-1].Index != r.index {
		t.Errorf("%d entries from %d to %d", len(es), es[0].Index, es[len(es)-1].Index)
	}
	if _, whole := r.m.CommandsSince(r.index - 10); !whole {
		t.Error("the last ten are there")
	}
	m := reopened(t, r.m)
	if m.Hash() != r.m.Hash() {
		t.Error("a full journal does not survive a snapshot")
	}
}

func TestWhatThisVersionDoesNotKnowStopsTheMachine(t *testing.T) {
	r := founded(t)
	before := r.m.Hash()
	for name, b := range map[string][]byte{
		"a kind":   mustEncode(wireCommand{Version: 1, Kind: 9999, ID: id(1), Body: mustEncode(struct{}{})}),
		"a format": mustEncode(wireCommand{Version: 2, Kind: KindFound, ID: id(1), Body: mustEncode(struct{}{})}),
		"a field":  mustEncode(wireCommand{Version: 1, Kind: KindDeleteUser, ID: id(1), Body: mustEncode(map[int]any{1: id(3), 44: "x"})}),
	} {
		if _, err := r.m.Apply(r.index+1, 7, b); !errors.Is(err, ErrUnknownCommand) {
			t.Errorf("%s: %v", name, err)
		}
		if _, err := r.m.Prepare(b, founder, time.Now()); !errors.Is(err, ErrUnknownCommand) {
			t.Errorf("prepare %s: %v", name, err)
		}
	}
	if r.m.Hash() != before {
		t.Error("the state changed")
	}
	if _, err := r.m.Apply(r.index, 7, nil); !errors.Is(err, ErrIndex) {
		t.Errorf("an old index: %v", err)
	}
}

func TestTheMasterPreparesACommand(t *testing.T) {
	r := founded(t)
	r.ok(&AdmitNode{ID: branch, Name: "plzen", Key: key(2), Seal: sealKey(branch)})
	now := time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC)
	raw := (&Command{ID: id(5), Actor: "alice", Via: founder, At: 1, Body: &ReportVersion{Node: branch, Version: "2", Level: 1}}).Encode()
	if _, err := r.m.Prepare(raw, founder, now); err == nil {
		t.Error("one node may report another's version")
	}
	b, err := r.m.Prepare(raw, branch, now)
	if err != nil {
		t.Fatal(err)
	}
	if c, err := Decode(b); err != nil || c.Via != branch || !c.At.Std().Equal(now) {
		t.Errorf("%+v %v", c, err)
	}
	if _, err := r.m.Prepare([]byte{1}, branch, now); !errors.Is(err, ErrMalformed) {
		t.Errorf("%v", err)
	}
	kinds[9998] = kindInfo{"future", 2, func() Body { return new(DeleteUser) }}
	defer delete(kinds, 9998)
	if err := r.m.MayPropose(9998); !errors.Is(err, ErrVersion) {
		t.Errorf("%v", err)
	}
}

func TestWatchersHearWhatChanged(t *testing.T) {
	r := founded(t)
	var got []Change
	cancel := r.m.Watch(func(c Change) { got = append(got, c) })
	alice := r.user(10, "alice@company.com")
	r.no(NotFound, &SetHome{User: alice, Home: 99})
	r.ok(&SetHome{User: alice, Home: founder})
	cancel()
	r.ok(&DeleteUser{alice})
	if d := cmp.Diff([]Change{{2, Users}, {4, Users | Homes}}, got); d != "" {
		t.Error(d)
	}
}

func reopened(t testing.TB, m *Machine) *Machine {
	t.Helper()
	var b bytes.Buffer
	if _, err := m.Snapshot().WriteTo(&b); err != nil {
		t.Fatal(err)
	}
	n := NewMachine()
	if err := n.Restore(&b); err != nil {
		t.Fatal(err)
	}
	return n
}

func sample(t testing.TB) *rig {
	r := founded(t)
	r.ok(&AdmitNode{ID: branch, Name: "plzen", Key: key(2), Seal: sealKey(branch), Addresses: []string{"192.0.2.2:44337"}, Voter: true, Priority: 5, Version: "0.1"})
	alice := r.user(10, "alice@company.com", "al@company.com")
	r.ok(&PutGroup{Group{ID: id(20), Address: "all@company.com", Members: []Target{{ID: alice}, {Address: "x@else.net"}}, Owner: "alice@company.com", Outside: true}})
	r.ok(&PutAlias{Alias{ID: id(30), Address: "info@company.com", Targets: []Target{{ID: alice}}}})
	r.ok(&PutRule{DeviceRule{ID: id(70), CIDR: "192.168.0.0/16"}})
	r.ok(&CreateToken{ID: id(40), Public: bytes.Repeat([]byte{7}, 32)})
	r.ok(&AskAdmission{ID: id(60), Key: key(57), Seal: mesh.SealKey{1}, Name: "cheb"})
	r.no(NotFound, &DeleteUser{id(99)})
	r.ok(&Reseal{Key: 1, New: &CandidateKey{Number: 2, Public: mesh.SealKey{2}, Wraps: []Wrap{{founder, []byte("wrap")}, {branch, []byte("wrap")}}},
		Links: []Link{{1, []byte("link")}}, Authority: []byte("box")})
	r.ok(&Promote{Lineage: id(5), Generation: 2, Fork: 9})
	return r
}

func TestTheFirstFormatOpensForEver(t *testing.T) {
	r := sample(t)
	path := filepath.Join("testdata", "v1", "domain.snapshot")
	var b bytes.Buffer
	r.m.Snapshot().WriteTo(&b)
	if *update {
		if err := os.WriteFile(path, b.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	old, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	m := NewMachine()
	if err := m.Restore(bytes.NewReader(old)); err != nil {
		t.Fatal(err)
	}
	if got := m.Resolve(addr("info@company.com")); got.Kind != Inside || got.Recipients[0].Address != "alice@company.com" {
		t.Errorf("%+v", got)
	}
	if !bytes.Equal(old, b.Bytes()) {
		t.Error("the same commands write another snapshot than version 1 did")
	}
}

func TestADamagedSnapshotIsNeverRestored(t *testing.T) {
	r := sample(t)
	var b bytes.Buffer
	r.m.Snapshot().WriteTo(&b)
	m := NewMachine()
	blank := m.Hash()
	for i := range b.Len() {
		bad := bytes.Clone(b.Bytes())
		bad[i] ^= 1 << (i % 8)
		if m.Restore(bytes.NewReader(bad)) == nil || m.Restore(bytes.NewReader(b.Bytes()[:i])) == nil {
			t.Fatalf("byte %d: restored", i)
		}
	}
	if m.Hash() != blank {
		t.Error("a refused snapshot changed the state")
	}
}
