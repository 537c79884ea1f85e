package processes

import (
	"context"
	"crypto/rand"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"posthouse/appliance/admin"
	"posthouse/appliance/demo"
	"posthouse/mesh/identity"
)

// Spare starts one more node beside the demo's offices; it belongs to no mesh.
func (m *Mesh) Spare(name string, last int) *Proc {
	m.tb.Helper()
	like := m.State().Nodes[0]
	n := like
	n.Name, n.Address = name, like.Address[:strings.LastIndexByte(like.Address, '.')+1]+fmt.Sprint(last)
	n.Data, n.Log, n.Socket, n.Config = filepath.Join(m.Dir, name), filepath.Join(m.Dir, name+".log"), filepath.Join(m.Dir, name+".sock"), filepath.Join(m.Dir, name+".toml")
	text, err := os.ReadFile(like.Config)
	if err != nil {
		m.tb.Fatal(err)
	}
	cfg := strings.NewReplacer(like.Address+":", n.Address+":", like.Data, n.Data, like.Socket, n.Socket, fmt.Sprintf("name = %q", like.Name), fmt.Sprintf("name = %q", name),
		like.Name+".company.test", name+".company.test").Replace(string(text))
	if err := os.WriteFile(n.Config, []byte(cfg), 0o600); err != nil {
		m.tb.Fatal(err)
	}
	if m.spares == nil {
		m.spares = map[string]demo.Node{}
	}
	m.spares[name] = n
	p := &Proc{m: m, Office: name}
	m.tb.Cleanup(p.Kill)
	p.Exec()
	p.Ready(5 * time.Second)
	return p
}

// says waits until a node's join says something with want in it.
func (m *Mesh) says(office, want string, limit time.Duration) string {
	m.tb.Helper()
	var said string
	m.WaitFor(office+" says "+want, limit, func() bool {
		s, err := m.Status(office)
		if err != nil {
			return false
		}
		for _, l := range s.JoinProgress {
			if strings.Contains(l, want) {
				said = l
				return true
			}
		}
		return false
	})
	return said
}

// serves waits until a node is a member and knows so many.
func (m *Mesh) serves(office string, members int, limit time.Duration) time.Duration {
	m.tb.Helper()
	return m.WaitFor(fmt.Sprintf("%s serves among %d", office, members), limit, func() bool {
		s, err := m.Status(office)
		return err == nil && s.State == "serving" && len(s.Members) == members && s.Master != ""
	})
}

func (m *Mesh) join(office string, r admin.JoinRequest) {
	m.tb.Helper()
	if err := m.API(office).Join(context.Background(), r); err != nil {
		m.tb.Fatalf("%s joins: %v", office, err)
	}
}

func (m *Mesh) hasMember(office, member string) bool {
	s, err := m.Status(office)
	return err != nil || slices.ContainsFunc(s.Members, func(x admin.Member) bool { return x.Name == member })
}

func TestNodesJoinByThreeDoorsAndArePutOutAgain(t *testing.T) {
	t.Parallel()
	m := Up(t, "hq", "plzen")
	at := func(office string) string {
		return fmt.Sprintf("%s:%d", m.Node(office).Address, m.Node(office).Ports.Mesh)
	}

	// A token: once, not twice, not revoked, not invented.
	token, err := m.API("hq").CreateToken(t.Context(), admin.TokenRequest{})
	if err != nil {
		t.Fatal(err)
	}
	m.Spare("brno", 21)
	m.join("brno", admin.JoinRequest{Target: token.Secret, At: at("plzen")})
	t.Logf("by token at plzen: %v", m.serves("brno", 3, 15*time.Second).Round(time.Millisecond))
	m.Spare("cheb", 22)
	m.join("cheb", admin.JoinRequest{Target: token.Secret, At: at("hq")})
	t.Logf("used: %s", m.says("cheb", "join.token", 10*time.Second))
	revoked, err := m.API("plzen").CreateToken(t.Context(), admin.TokenRequest{})
	if err == nil {
		err = m.API("plzen").RevokeToken(t.Context(), revoked.ID)
	}
	if err != nil {
		t.Fatal(err)
	}
	m.join("cheb", admin.JoinRequest{Target: revoked.Secret, At: at("hq")})
	t.Logf("revoked: %s", m.says("cheb", "revoked", 10*time.Second))
	real, err := identity.ParseToken(token.Secret)
	if err != nil {
		t.Fatal(err)
	}
	forged := identity.Token{Pins: real.Pins}
	rand.Read(forged.Seed[:])
	m.join("cheb", admin.JoinRequest{Target: forged.Encode(), At: at("hq")})
	t.Logf("invented: %s", m.says("cheb", "does not know this token", 10*time.Second))
	out, err := m.Command("join", token.Secret[:len(token.Secret)-3]+"AAA", "--socket", m.Node("cheb").Socket)
	if err == nil || strings.Count(strings.TrimSpace(out), "\n") > 0 {
		t.Errorf("a mistyped token: %v, %q", err, out)
	}
	t.Logf("mistyped: %s", strings.TrimSpace(out))

	// A name: an admin compares the code.
	m.join("cheb", admin.JoinRequest{Target: "company.test"})
	said := m.says("cheb", "its code is", 10*time.Second)
	var pending []admin.Pending
	m.WaitFor("it is listed", 5*time.Second, func() bool {
		pending, err = m.API("plzen").PendingNodes(t.Context())
		return err == nil && len(pending) == 1
	})
	if !strings.Contains(said, pending[0].Code) {
		t.Errorf("it says %q, the list says %q", said, pending[0].Code)
	}
	if err := m.API("plzen").Approve(t.Context(), pending[0].ID); err != nil {
		t.Fatal(err)
	}
	t.Logf("by name: %q, approved: %v", said, m.serves("cheb", 4, 15*time.Second).Round(time.Millisecond))

	// An admin's password, while no master can be reached at first.
	hq := m.Adopt("hq")
	hq.Ready(5 * time.Second)
	m.agree(60*time.Second, "hq", "plzen", "brno", "cheb")
	voters := []string{}
	s, err := m.Status("cheb")
	if err != nil {
		t.Fatal(err)
	}
	for _, x := range s.Members {
		if x.Role == "voter" && x.Name != "cheb" {
			voters = append(voters, x.Name)
		}
	}
	t.Logf("%s leads, voters beside it %v", s.Master, voters)
	m.Spare("decin", 23)
	m.join("decin", admin.JoinRequest{Target: at("plzen"), Admin: m.State().Admin.Name, Password: "wrong"})
	t.Logf("wrong password: %s", m.says("decin", "join.password", 15*time.Second))
	m.join("decin", admin.JoinRequest{Target: "company.test", Admin: m.State().Admin.Name, Password: m.State().Admin.Password})
	t.Logf("by password: %v", m.serves("decin", 5, 20*time.Second).Round(time.Millisecond))
	m.agree(30*time.Second, "hq", "plzen", "brno", "cheb", "decin")

	// Put out: a branch that goes on running, and the master, from another node.
	tr := m.NewTraffic()
	for _, gone := range []string{"cheb", "hq"} {
		m.WaitFor("hq leads", 60*time.Second, func() bool { s, err := m.Status("hq"); return err == nil && s.Master == "hq" })
		began := time.Now()
		if out, err := m.Command("mesh", "revoke", gone, "--socket", m.Node("plzen").Socket); err != nil {
			t.Fatalf("revoke %s: %v\n%s", gone, err, out)
		}
		left := slices.DeleteFunc([]string{"hq", "plzen", "brno", "cheb", "decin"}, func(o string) bool { return o == gone || o == "cheb" })
		for _, o := range left {
			m.WaitFor(o+" has forgotten "+gone, 10*time.Second, func() bool { return !m.hasMember(o, gone) })
		}
		took := time.Since(began)
		m.WaitFor(gone+" is cut off", 20*time.Second, func() bool {
			s, err := m.Status(gone)
			return err == nil && !slices.ContainsFunc(s.Members, func(x admin.Member) bool { return x.Name != gone && x.State == "serving" })
		})
		m.WaitFor(gone+" has no master", 20*time.Second, func() bool {
			s, err := m.Status(gone)
			return err == nil && (s.Master == "")
		})
		s, err := m.Status(gone)
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("%s is out after %v; it says: %s", gone, took.Round(time.Millisecond), s.Health.Sentence)
		if err := m.newUser(gone, "ghost"); err == nil {
			t.Errorf("%s can still change the domain", gone)
		}
		_, term := m.agree(30*time.Second, left...)
		t.Logf("the others agree in term %d", term)
	}
	// hq's people cannot reach the others any more; the others go on.
	before, err := m.Inbox(m.User("plzen", 0))
	if err != nil {
		t.Fatal(err)
	}
	if s, err := m.Submit(m.User("hq", 0), "hq"); err == nil {
		err = s.Send("from-the-revoked", m.User("plzen", 0).Address)
		t.Logf("mail at the revoked node: %v", err)
		s.Close()
	}
	tr.runAll(t.Context(), 10, m.person("plzen", 1, []string{"plzen"}, m.User("plzen", 0).Address, Friend))
	tr.Settle(10*time.Second, 0)
	after, err := m.Inbox(m.User("plzen", 0))
	if err != nil || len(after) != len(before)+5 || slices.Contains(after, "from-the-revoked") {
		t.Errorf("%d messages after %d: %v, %v", len(after), len(before), after, err)
	}
	if err := m.newUser("plzen", "later"); err != nil {
		t.Error(err)
	}
	for _, o := range []string{"plzen", "brno", "decin"} {
		m.serves(o, 3, 10*time.Second)
	}
}

func TestAJoinWaitsForAMaster(t *testing.T) {
	t.Parallel()
	m := Up(t, "hq", "plzen")
	token, err := m.API("hq").CreateToken(t.Context(), admin.TokenRequest{})
	if err != nil {
		t.Fatal(err)
	}
	m.Kill("hq")
	m.Spare("brno", 21)
	m.join("brno", admin.JoinRequest{Target: token.Secret, At: fmt.Sprintf("%s:%d", m.Node("plzen").Address, m.Node("plzen").Ports.Mesh)})
	t.Logf("without a master: %s", m.says("brno", "join.no-master", 60*time.Second))
	if out, err := m.Command("status", "--json", "--socket", m.Node("brno").Socket); err != nil {
		t.Errorf("status: %v %s", err, out)
	}
	m.Start("hq")
	took := m.serves("brno", 3, 60*time.Second)
	t.Logf("a member %v after the master came back", took.Round(time.Millisecond))
}

func TestEachNodeRestartsWhileAnotherIsCutOff(t *testing.T) {
	t.Parallel()
	m := Up(t, three...)
	procs := map[string]*Proc{}
	for _, o := range three {
		procs[o] = m.Adopt(o)
		procs[o].Ready(5 * time.Second)
	}
	m.agree(30*time.Second, three...)
	tr := m.NewTraffic()
	all := m.everybody()
	for i := range Count(1, 3) {
		cut, again, rest := three[i], three[(i+1)%3], three[(i+2)%3]
		procs[cut].Signal(syscall.SIGSTOP)
		procs[again].Kill()
		procs[again].Exec()
		start := procs[again].Ready(3 * time.Second)
		tr.runAll(t.Context(), 10, m.person(again, i, []string{again}, all...), m.person(rest, i, []string{rest}, all...))
		began := time.Now()
		master, _ := m.agree(40*time.Second, again, rest)
		t.Logf("%s is cut off, %s restarted in %v; %s led %v later", cut, again, start.Round(time.Millisecond), master, time.Since(began).Round(time.Millisecond))
		procs[cut].Signal(syscall.SIGCONT)
		m.agree(60*time.Second, three...)
		took := tr.Settle(30*time.Second, 0)
		t.Logf("after the heal all mail was there within %v", took.Round(time.Millisecond))
	}
}
