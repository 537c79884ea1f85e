package domain

import (
	"bytes"
	"fmt"
	"testing"

	"pgregory.net/rapid"

	"posthouse/mesh"
)

// anyBody draws a command over few identities and names, so that they meet.
func anyBody(t *rapid.T) Body {
	n := func(what string, max int) int { return rapid.IntRange(0, max).Draw(t, what) }
	node := func() mesh.NodeID { return []mesh.NodeID{founder, 0x22, 0x33, 0x44, 0}[n("node", 4)] }
	address := func() string {
		return fmt.Sprintf("%c@%s", 'a'+n("local", 7), []string{"company.com", "two.org", "Zwei.org", "else.net"}[n("domain", 3)])
	}
	addresses := func() (l []string) {
		for range n("count", 2) {
			l = append(l, address())
		}
		return l
	}
	targets := func() (l []Target) {
		for range n("count", 3) {
			if n("how", 1) == 0 {
				l = append(l, Target{Address: address()})
			} else {
				l = append(l, Target{ID: id(3 + n("who", 12))})
			}
		}
		return l
	}
	one := func() mesh.ID { return id(3 + n("id", 12)) }
	switch n("kind", 21) {
	case 0, 1, 2:
		i := 3 + n("user", 9)
		return &CreateUser{User{ID: id(i), Mailbox: box(i), Address: address(), Aliases: addresses(), Home: node(), Role: Role(n("role", 4)), Verifier: boxed(node(), "v")}}
	case 3:
		return &UpdateUser{User: one(), Address: p(address()), Aliases: p(addresses()), Role: p(Role(n("role", 4)))}
	case 4:
		return &DeleteUser{one()}
	case 5:
		return &SetPassword{User: one(), Verifier: boxed(node(), fmt.Sprint(n("v", 9)))}
	case 6:
		return &SetHome{User: one(), Home: node(), IfVersion: uint64(n("version", 2))}
	case 7, 8:
		return &PutGroup{Group{ID: one(), Address: address(), Members: targets(), Outside: n("outside", 1) == 1}}
	case 9:
		return &DeleteGroup{one()}
	case 10:
		return &PutAlias{Alias{ID: one(), Address: address(), Targets: targets()}}
	case 11:
		return &DeleteAlias{one()}
	case 12, 13:
		names := []string{"two.org", "zwei.org", "drei.org", "company.com", "firma.cz"}
		return &PutDomain{Domain{ID: []mesh.ID{id(2), id(90), id(91)}[n("domain id", 2)], Name: names[n("name", 4)], Aliases: names[:n("aliases", 2)]}}
	case 14:
		return &DeleteDomain{[]mesh.ID{id(2), id(90), id(91)}[n("domain id", 2)]}
	case 15:
		return &AdmitNode{ID: node(), Name: string(rune('a' + n("name", 3))), Key: key(n("key", 4)), Seal: mesh.SealKey{1}, Voter: n("voter", 1) == 1, Token: id(40 * n("token", 1)), Level: 1}
	case 16:
		return &RevokeNode{Node: node(), Left: n("left", 1) == 1, Rehome: node()}
	case 17:
		return &ReplaceNode{node(), node()}
	case 18:
		return &CreateToken{ID: id(40), Public: make([]byte, 32), Lifetime: int64(n("life", 5000))}
	case 19:
		return &AskAdmission{ID: id(60 + n("ask", 3)), Key: key(n("key", 4)), Seal: mesh.SealKey{1}, Name: "x"}
	case 20:
		r := &Reseal{Key: uint64(n("key number", 3)), Users: []ResealUser{{User: one(), Version: uint64(n("version", 2)), Candidates: []byte("c"), Home: []byte("h"), To: founder}}}
		if n("new", 1) == 1 {
			r.New = &CandidateKey{Number: r.Key + 1, Public: mesh.SealKey{1}, Wraps: []Wrap{{founder, []byte("w")}}}
			r.Links = []Link{{max(r.Key, 1), []byte("l")}}
		}
		return r
	default:
		return &SetSettings{Postmaster: p(one())}
	}
}

func TestStateIsAFunctionOfTheLog(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		a, b := founded(t).m, founded(t).m
		count := rapid.IntRange(1, 60).Draw(rt, "commands")
		for i := range count {
			c := Command{ID: id(500 + rapid.IntRange(0, 80).Draw(rt, "command id")), At: Time(1_800_000_100_000 + 700*i), Body: anyBody(rt)}
			raw := c.Encode()
			ra, err := a.ApplyResult(uint64(i+10), 3, raw)
			if err != nil {
				rt.Fatal(err)
			}
			rb, err := b.ApplyResult(uint64(i+10), 3, raw)
			if err != nil || ra != rb {
				rt.Fatalf("%+v differs from %+v (%v)", ra, rb, err)
			}
			if rapid.IntRange(0, 5).Draw(rt, "restart") == 0 {
				b = reopened(t, b)
			}
		}
		if a.Hash() != b.Hash() {
			rt.Fatal("equal logs, different states")
		}
		consistent(rt, a.s)
	})
}

// consistent compares the running look-ups with ones made from nothing, and
// checks that nothing points into the void.
func consistent(t *rapid.T, s *state) {
	fresh := *s
	fresh.rebuild()
	if fmt.Sprint(s.names) != fmt.Sprint(fresh.names) || fmt.Sprint(s.mailboxes) != fmt.Sprint(fresh.mailboxes) ||
		fmt.Sprint(s.nodeNames) != fmt.Sprint(fresh.nodeNames) || fmt.Sprint(s.keys) != fmt.Sprint(fresh.keys) || len(s.domainNames) != len(fresh.domainNames) {
		t.Fatalf("look-ups drifted:\n%v\n%v", s.names, fresh.names)
	}
	addresses := 0
	for _, u := range s.users {
		addresses += 1 + len(u.Aliases)
		if s.nodes[u.Home] == nil {
			t.Fatalf("%s lives nowhere", u.Address)
		}
		if u.Verifier != nil && s.numbered(u.Verifier.Key) == nil {
			t.Fatalf("the password of %s is sealed to a key that is gone", u.Address)
		}
	}
	for _, g := range s.groups {
		addresses += 1 + len(g.Aliases)
		for _, m := range g.Members {
			if s.target(m).Code != OK {
				t.Fatalf("%s has a member that is gone", g.Address)
			}
		}
	}
	if addresses += len(s.aliases); addresses != len(s.names) {
		t.Fatalf("%d addresses, %d look-ups: somebody shares one", addresses, len(s.names))
	}
	if r := s.postmaster(nil); r.Kind != Inside {
		t.Fatalf("nobody is postmaster: %+v", r)
	}
}

func FuzzApply(f *testing.F) {
	for _, b := range []Body{&DeleteUser{id(3)}, &PutAlias{Alias{ID: id(5), Address: "x@company.com", Targets: []Target{{ID: id(3)}}}},
		&CreateUser{User{ID: id(6), Mailbox: box(6), Address: "x+y@company.com", Home: founder}}, &PutDomain{Domain{ID: id(2), Name: "x.org"}},
		&Reseal{Key: 1, Wraps: []Wrap{{branch, []byte("wrap")}}, Authority: []byte("box")}, &UpdateNode{Node: founder, Name: p("x")}, &SetSettings{Quota: p(int64(1))}} {
		f.Add((&Command{ID: id(9), Actor: "a", At: 1, Body: b}).Encode())
		f.Add((&Command{ID: id(9), At: 1, Body: b, Seal: &Reseal{Key: 1, New: &CandidateKey{Number: 2, Public: mesh.SealKey{1}}, Links: []Link{{1, []byte("link")}},
			Users: []ResealUser{{User: id(3), Version: 1, Candidates: []byte("x"), Home: []byte("y"), To: founder}}}}).Encode())
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		a, b := founded(t), founded(t)
		ra, ea := a.m.ApplyResult(9, 3, raw)
		rb, eb := b.m.ApplyResult(9, 3, raw)
		if ra != rb || (ea == nil) != (eb == nil) || a.m.Hash() != b.m.Hash() {
			t.Fatal("not deterministic")
		}
		if ea == nil && reopened(t, a.m).Hash() != b.m.Hash() {
			t.Fatal("the state does not survive a snapshot")
		}
	})
}

func FuzzRestore(f *testing.F) {
	var b bytes.Buffer
	sample(f).m.Snapshot().WriteTo(&b)
	f.Add(b.Bytes())
	f.Fuzz(func(t *testing.T, raw []byte) {
		if m := NewMachine(); m.Restore(bytes.NewReader(raw)) == nil {
			m.Resolve(addr("a@company.com"))
			m.Hash()
		}
	})
}

func company(b testing.TB, users int) *rig {
	r := founded(b)
	for i := range users {
		r.user(1000+i, fmt.Sprintf("user%05d@company.com", i))
	}
	return r
}

func BenchmarkResolve10000Users(b *testing.B) {
	m := company(b, 10_000).m
	a := addr("user07777@company.com")
	b.ReportAllocs()
	for b.Loop() {
		if m.Resolve(a).Kind != Inside {
			b.Fatal("not found")
		}
	}
}

func BenchmarkHome10000Users(b *testing.B) {
	m := company(b, 10_000).m
	for b.Loop() {
		m.Home(box(8000))
	}
}

func BenchmarkApplySetHome(b *testing.B) {
	r := company(b, 10_000)
	b.ReportAllocs()
	for b.Loop() {
		r.do(&SetHome{User: id(5000), Home: founder})
	}
}

func BenchmarkSnapshot10000Users(b *testing.B) {
	m := company(b, 10_000).m
	var buf bytes.Buffer
	b.ReportAllocs()
	for b.Loop() {
		buf.Reset()
		m.Snapshot().WriteTo(&buf)
	}
	b.SetBytes(int64(buf.Len()))
}

func BenchmarkRestore10000Users(b *testing.B) {
	var buf bytes.Buffer
	company(b, 10_000).m.Snapshot().WriteTo(&buf)
	m := NewMachine()
	b.ReportAllocs()
	for b.Loop() {
		if err := m.Restore(bytes.NewReader(buf.Bytes())); err != nil {
			b.Fatal(err)
		}
	}
}
