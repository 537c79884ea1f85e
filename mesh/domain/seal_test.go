package domain

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"posthouse/mesh"
	"posthouse/mesh/identity"
)

// ring is the same key for a node in every run.
func ring(n mesh.NodeID) identity.Keyring {
	seed := sha256.Sum256([]byte(n.String()))
	k, err := identity.Generate(bytes.NewReader(seed[:]))
	if err != nil {
		panic(err)
	}
	return identity.Keyring{Key: k, Node: n}
}

func sealKey(n mesh.NodeID) mesh.SealKey { return ring(n).Key.SealKey() }

// boxed looks sealed: to a home and to the candidates' first key.
func boxed(home mesh.NodeID, text string) *Sealed {
	return &Sealed{Home: []byte("home " + text), To: home, Candidates: []byte("candidates " + text), Key: 1}
}

// firstKey looks like the founder's.
var firstKey = CandidateKey{Number: 1, Public: mesh.SealKey{1}, Wraps: []Wrap{{founder, []byte("wrap")}}}

// sealedMesh is a domain state on several nodes, each with its own machine, fed
// from one log as Raft does.
type sealedMesh struct {
	t        *testing.T
	machines map[mesh.NodeID]*Machine
	master   mesh.NodeID
	log      [][]byte
	next     int
	bulk     bool // the states are not compared after each command
}

// theVerifier is as long as a real one.
func theVerifier(n int) string { return fmt.Sprintf("$argon2id$verifier-%078d", n) }

const theAuthority = "PRIVATE KEY of the authority"

func newSealedMesh(t *testing.T) *sealedMesh {
	m := &sealedMesh{t: t, machines: map[mesh.NodeID]*Machine{}, master: founder}
	m.join(founder)
	k := ring(founder)
	first, err := NewCandidateKey(k, k.Key.SealKey())
	if err != nil {
		t.Fatal(err)
	}
	v, err := SealVerifier(k, id(3), []byte(theVerifier(3)), founder, k.Key.SealKey(), first)
	if err != nil {
		t.Fatal(err)
	}
	a, err := SealAuthority(k, []byte("CERTIFICATE"), []byte(theAuthority), first)
	if err != nil {
		t.Fatal(err)
	}
	m.ok(&Found{Lineage: id(1), Node: AdmitNode{ID: founder, Name: "praha", Key: key(1), Voter: true, Seal: sealKey(founder)}, Domain: Domain{ID: id(2), Name: "company.com"},
		Admin: User{ID: id(3), Mailbox: box(3), Address: "admin@company.com", Home: founder, Verifier: v}, Key: *first, Authority: a})
	return m
}

// join starts a node's machine; it gets all that was before.
func (m *sealedMesh) join(n mesh.NodeID) {
	x := NewMachine()
	x.SetKeyring(ring(n))
	for i, c := range m.log {
		if _, err := x.Apply(uint64(i+1), 1, c); err != nil {
			m.t.Fatal(err)
		}
	}
	m.machines[n] = x
}

func (m *sealedMesh) do(b Body) Result {
	m.t.Helper()
	return m.from(m.master, b)
}

func (m *sealedMesh) from(n mesh.NodeID, b Body) Result {
	m.t.Helper()
	m.next++
	c := Command{ID: id(1<<20 + m.next), Actor: "admin", Body: b}
	raw, err := m.machines[m.master].Prepare(c.Encode(), n, time.UnixMilli(1_800_000_000_000))
	var refusal *Refusal
	if errors.As(err, &refusal) {
		return refusal.Result
	}
	if err != nil {
		m.t.Fatal(err)
	}
	m.log = append(m.log, raw)
	var out Result
	for _, x := range m.machines {
		if out, err = x.ApplyResult(uint64(len(m.log)), 1, raw); err != nil {
			m.t.Fatal(err)
		}
	}
	if m.bulk {
		return out
	}
	hash := m.machines[m.master].Hash()
	for n, x := range m.machines {
		if x.Hash() != hash {
			m.t.Fatalf("node %s has another state", n)
		}
	}
	return out
}

func (m *sealedMesh) ok(b Body) {
	m.t.Helper()
	if r := m.do(b); r.Code != OK {
		m.t.Fatalf("%s: %s %s", b.kind(), r.Code, r.Text)
	}
}

func (m *sealedMesh) admit(n mesh.NodeID, candidate bool) {
	m.t.Helper()
	m.ok(&AdmitNode{ID: n, Name: fmt.Sprintf("n%x", uint64(n)), Key: key(int(n)), Seal: sealKey(n), Voter: candidate})
	m.join(n)
}

func (m *sealedMesh) user(n int, home mesh.NodeID) {
	m.t.Helper()
	// Made at any node: a plain one can seal what it cannot open.
	x := m.machines[home]
	v, err := x.SealVerifier(id(n), []byte(theVerifier(n)), home)
	if err != nil {
		m.t.Fatal(err)
	}
	m.ok(&CreateUser{User{ID: id(n), Mailbox: box(n), Address: fmt.Sprintf("u%d@company.com", n), Home: home, Verifier: v}})
}

// opens checks which users' verifiers a node can open now.
func (m *sealedMesh) opens(n mesh.NodeID, want ...int) {
	m.t.Helper()
	var got []int
	for _, u := range m.machines[n].Users() {
		v, err := m.machines[n].Verifier(u)
		if err == nil {
			i := int(u.ID[15]) + int(u.ID[14])<<8
			if v != theVerifier(i) {
				m.t.Errorf("node %s reads %q of user %d", n, v, i)
			}
			got = append(got, i)
		} else if !errors.Is(err, ErrSealed) {
			m.t.Error(err)
		}
	}
	slices.Sort(got)
	if !slices.Equal(got, want) {
		m.t.Errorf("node %s opens the passwords of %v, want %v", n, got, want)
	}
}

func (m *sealedMesh) signs(n mesh.NodeID, want bool) {
	m.t.Helper()
	got, err := m.machines[n].AuthoritySecret()
	if (err == nil) != want || want && string(got) != theAuthority {
		m.t.Errorf("node %s: the authority's key %q, %v", n, got, err)
	}
}

// mended checks that nobody has anything left to put right.
func (m *sealedMesh) mended() {
	m.t.Helper()
	for n, x := range m.machines {
		if r, err := x.Mend(m.master); err != nil || r != nil {
			m.t.Errorf("node %s would mend %+v, %v", n, r, err)
		}
	}
}

// mend lets every node put right what it can, until nothing is left.
func (m *sealedMesh) mend() {
	m.t.Helper()
	for range 20 {
		found := false
		for n, x := range m.machines {
			r, err := x.Mend(m.master)
			if err != nil {
				m.t.Fatal(err)
			}
			if r != nil {
				found = true
				if res := m.from(n, r); res.Code != OK && res.Code != Resealed {
					m.t.Fatalf("node %s: %s", n, res.Text)
				}
			}
		}
		if !found {
			return
		}
	}
	m.t.Fatal("mending does not end")
}

const (
	second = mesh.NodeID(0x33)
	plain  = mesh.NodeID(0x44)
	plain2 = mesh.NodeID(0x55)
)

// theOffices is a mesh of two candidates and two plain members with a user each.
func theOffices(t *testing.T) *sealedMesh {
	m := newSealedMesh(t)
	m.admit(second, true)
	m.admit(plain, false)
	m.admit(plain2, false)
	m.user(10, founder)
	m.user(11, second)
	m.user(12, plain)
	m.user(13, plain2)
	return m
}

func TestSecretsOpenAtTheHomeAndAtTheCandidatesAlone(t *testing.T) {
	m := theOffices(t)
	m.opens(founder, 3, 10, 11, 12, 13)
	m.opens(second, 3, 10, 11, 12, 13)
	m.opens(plain, 12)
	m.opens(plain2, 13)
	for n, want := range map[mesh.NodeID]bool{founder: true, second: true, plain: false, plain2: false} {
		m.signs(n, want)
		if m.machines[n].Holds() != want {
			t.Errorf("node %s holds all secrets: %v", n, !want)
		}
	}
	m.mended()
}

func TestNothingThatAPlainMemberKeepsShowsASecret(t *testing.T) {
	m := theOffices(t)
	m.ok(&UpdateNode{Node: second, Voter: p(false)})
	m.ok(&SetHome{User: id(11), Home: plain2})
	var kept bytes.Buffer // its log and its snapshot
	for _, c := range m.log {
		kept.Write(c)
	}
	m.machines[plain].Snapshot().WriteTo(&kept)
	for i := range 14 {
		if bytes.Contains(kept.Bytes(), []byte(theVerifier(i))) {
			t.Errorf("the verifier of user %d stands in the clear", i)
		}
	}
	if bytes.Contains(kept.Bytes(), []byte(theAuthority)) {
		t.Error("the authority's key stands in the clear")
	}
	// Nor does its key open any box of another's, under any name.
	k := ring(plain)
	for _, u := range m.machines[plain].Users() {
		if u.Home == plain {
			continue
		}
		for _, box := range [][]byte{u.Verifier.Home, u.Verifier.Candidates} {
			if _, err := k.Open(aboutVerifier(u.ID), box); err == nil {
				t.Errorf("it opens a box of %s", u.Address)
			}
		}
	}
	for _, x := range m.machines[plain].s.candidateKeys {
		for _, w := range x.Wraps {
			if _, err := k.Open(aboutCandidates(x.Number), w.Box); err == nil {
				t.Error("it opens the candidates' key")
			}
		}
	}
}

func TestAChangeOfHomeSealsAnewInTheSameCommand(t *testing.T) {
	m := theOffices(t)
	m.ok(&SetHome{User: id(12), Home: plain2})
	m.opens(plain2, 12, 13)
	m.opens(founder, 3, 10, 11, 12, 13)
	m.mended()
	// The old home still has the old box in its log: what it has seen it knows.
	// A new password it does not see.
	v, err := m.machines[plain].SealVerifier(id(12), []byte(theVerifier(12)), plain2)
	if err != nil {
		t.Fatal(err)
	}
	m.ok(&SetPassword{User: id(12), Verifier: v})
	m.opens(plain)
	m.opens(plain2, 12, 13)
}

func TestAReplacedNodesPeopleLogInAtTheNewOneAtOnce(t *testing.T) {
	m := theOffices(t)
	m.ok(&ReplaceNode{Old: plain, New: plain2})
	m.opens(plain2, 12, 13)
	m.ok(&RevokeNode{Node: second, Rehome: plain2})
	m.opens(plain2, 11, 12, 13)
	m.opens(founder, 3, 10, 11, 12, 13)
	m.mended()
}

func TestACandidateMoreOpensEverythingAtOnceAndOneLessNothingNew(t *testing.T) {
	m := theOffices(t)
	m.ok(&UpdateNode{Node: plain, Voter: p(true)})
	m.opens(plain, 3, 10, 11, 12, 13)
	m.signs(plain, true)
	m.mended()
	first := m.machines[plain].s.candidateKey().Number
	m.ok(&UpdateNode{Node: plain, Voter: p(false)})
	m.opens(plain, 12)
	m.signs(plain, false)
	m.mended()
	if k := m.machines[founder].s.candidateKeys; len(k) != 1 || k[0].Number != first+1 {
		t.Errorf("keys %+v", k)
	}
	m.opens(second, 3, 10, 11, 12, 13)
	m.signs(second, true)
	m.ok(&RevokeNode{Node: second})
	m.opens(founder, 3, 10, 11, 12, 13)
	if m.machines[second].Holds() { // if it heard of the new key at all
		t.Error("a revoked candidate holds the new key")
	}
}

func TestSomebodyMayAlwaysLead(t *testing.T) {
	m := theOffices(t)
	m.ok(&UpdateNode{Node: second, Voter: p(false)})
	for _, b := range []Body{&UpdateNode{Node: founder, Voter: p(false)}, &RevokeNode{Node: founder}, &ReplaceNode{founder, plain}} {
		if r := m.do(b); r.Code != InUse || r.Text == "" {
			t.Errorf("%s: %s %s", b.kind(), r.Code, r.Text)
		}
	}
}

func TestCommandsUnderWayTogetherAreMendedAfterwards(t *testing.T) {
	m := theOffices(t)
	// Both are made ready before either is applied, as a busy master does.
	var raw [][]byte
	for i, b := range []Body{&UpdateNode{Node: second, Voter: p(false)}, &AdmitNode{ID: 0x66, Name: "brno", Key: key(0x66), Seal: sealKey(0x66), Voter: true}, &SetHome{User: id(12), Home: plain2}} {
		c := Command{ID: id(2<<20 + i), Body: b}
		x, err := m.machines[m.master].Prepare(c.Encode(), m.master, time.UnixMilli(1_800_000_000_000))
		if err != nil {
			t.Fatal(err)
		}
		raw = append(raw, x)
	}
	for _, x := range raw {
		m.log = append(m.log, x)
		for _, y := range m.machines {
			if r, err := y.ApplyResult(uint64(len(m.log)), 1, x); err != nil || r.Code != OK {
				t.Fatal(r, err)
			}
		}
	}
	m.join(0x66)
	m.mend()
	m.opens(0x66, 3, 10, 11, 12, 13)
	m.opens(plain2, 12, 13)
	m.opens(second, 11)
	m.mended()
}

func TestAPlainMemberThatIsPromotedHoldsItsOwnPeoplesSecretsUntilOthersReturn(t *testing.T) {
	m := theOffices(t)
	lost := map[mesh.NodeID]*Machine{founder: m.machines[founder], second: m.machines[second], plain2: m.machines[plain2]}
	for n := range lost {
		delete(m.machines, n)
	}
	m.master = plain
	m.ok(&Promote{Lineage: id(99), Generation: 2})
	m.opens(plain, 12)
	m.signs(plain, false)
	m.mend() // its own people's, for the new key
	// A new candidate of the new side can open those as well.
	m.admit(0x66, true)
	m.opens(0x66, 12)
	// Another home comes back, then a candidate.
	m.join(plain2)
	m.mend()
	m.opens(0x66, 12, 13)
	m.opens(plain2, 13)
	m.signs(plain, false)
	m.join(second)
	m.mend()
	m.opens(plain, 3, 10, 11, 12, 13)
	m.opens(0x66, 3, 10, 11, 12, 13)
	m.signs(plain, true)
	m.join(founder)
	m.mended()
	if k := m.machines[plain].s.candidateKeys; len(k) != 1 {
		t.Errorf("%d keys are kept", len(k))
	}
}

func TestThousandsOfSecretsAreSealedAnewInBoundedCommands(t *testing.T) {
	m := newSealedMesh(t)
	m.admit(second, true)
	const users = resealAtOnce + 100
	m.bulk = true
	for i := range users {
		m.user(1000+i, second)
	}
	m.bulk = false
	before := len(m.log)
	m.ok(&RevokeNode{Node: second, Rehome: founder})
	if n := len(m.log[before]); n > MaxCommand*9/10 {
		t.Errorf("the command has %d bytes of %d", n, MaxCommand)
	} else {
		t.Logf("%d users in a command of %d bytes", resealAtOnce, n)
	}
	delete(m.machines, second)
	m.mend()
	m.mended()
	if n := len(m.log) - before; n != 2 {
		t.Errorf("%d commands", n)
	}
}

func TestWhoMayAskForWhatToBeSealedAnew(t *testing.T) {
	m := theOffices(t)
	key := m.machines[founder].s.candidateKey().Number
	for _, c := range []struct {
		name string
		from mesh.NodeID
		b    *Reseal
		want Code
	}{
		{"a plain node, its own people's", plain, &Reseal{Key: key, Users: []ResealUser{{User: id(12), Version: 1, Candidates: []byte("x")}}}, OK},
		{"a plain node, another's", plain, &Reseal{Key: key, Users: []ResealUser{{User: id(13), Version: 1, Candidates: []byte("x")}}}, Invalid},
		{"a plain node, the authority", plain, &Reseal{Key: key, Authority: []byte("x")}, Invalid},
		{"a plain node, a new key", plain, &Reseal{Key: key, New: &CandidateKey{Number: key + 1, Public: mesh.SealKey{1}}}, Invalid},
		{"a candidate that does not lead, a new key", second, &Reseal{Key: key, New: &CandidateKey{Number: key + 1, Public: mesh.SealKey{1}}}, Invalid},
		{"a stranger", 0x99, &Reseal{Key: key, Users: []ResealUser{{User: id(12), Version: 1, Candidates: []byte("x")}}}, Invalid},
		{"for a key that is not in use", second, &Reseal{Key: key + 7, Authority: []byte("x")}, Resealed},
	} {
		if r := m.from(c.from, c.b); r.Code != c.want {
			t.Errorf("%s: %s %s", c.name, r.Code, r.Text)
		}
	}
	// Nobody but the master attaches anything: what a node sends along is cut.
	c := Command{ID: id(77), Body: &UpdateUser{User: id(12), Name: p("x")}, Seal: &Reseal{Key: key, Authority: []byte("mine")}}
	raw, err := m.machines[founder].Prepare(c.Encode(), plain, time.Now())
	if err != nil || strings.Contains(string(raw), "mine") {
		t.Errorf("%v", err)
	}
}

func BenchmarkMend10000Users(b *testing.B) {
	m := company(b, 10_000).m
	m.SetKeyring(ring(founder))
	for b.Loop() {
		if r, err := m.Mend(founder); r != nil || err != nil {
			b.Fatal(r, err)
		}
	}
}
