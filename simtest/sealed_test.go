package simtest

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"posthouse/appliance/admin"
)

// plainOne runs a story of two candidates and one office, praha, that never was
// one: it joined with a token for plain members. Its election keeps its files on
// the real disk.
func plainOne(t *testing.T, f func(t *testing.T, w *World)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		w := NewWorld(t, "hq", "plzen", "praha")
		defer w.Close()
		all := w.Offices
		w.Offices = all[:2]
		w.Found()
		w.Offices = all
		praha := w.Office("praha")
		praha.votesOnDisk = true
		praha.Start()
		w.Until("praha has started", time.Minute, func() bool { return praha.Status().State == "fresh" && len(praha.Status().Conditions) > 0 })
		token, err := w.Office("hq").Ops().CreateToken(Ctx(), admin.TokenRequest{Member: true})
		if err != nil {
			t.Fatal(err)
		}
		w.join(t, "praha", admin.JoinRequest{Target: token.Secret, At: w.door("hq")})
		w.Until("praha serves", time.Minute, func() bool { return praha.Status().State == serving && w.Equal() })
		w.userAt(t, "praha")
		w.Until("all copies are equal", 10*time.Second, w.Equal)
		f(t, w)
	})
}

// submits logs in at an office's submission port; "" when that worked, else what
// the office said.
func (w *World) submits(office, user, password string) string {
	c, err := w.smtp(office, 587, user+"@"+Domain, password)
	if err != nil {
		return err.Error()
	}
	c.close()
	return ""
}

// everybody checks that each of the users logs in at each of the offices now.
func (w *World) everybody(t *testing.T, offices, users []string) {
	t.Helper()
	for _, o := range offices {
		for _, u := range users {
			if said := w.submits(o, u, "secret"); said != "" {
				t.Errorf("%s does not log in at %s: %s", u, o, said)
			}
		}
	}
}

// An office that asks others about their people must not tell by its answers
// which names there are.
func TestANameThatNobodyHasIsAnsweredLikeOneThatSomebodyHas(t *testing.T) {
	plainOne(t, func(t *testing.T, w *World) {
		// Two wrong passwords, each from an address of its own: the home counts
		// the office that asks, too.
		n := 0
		once := func(user string) (said string, took time.Duration) {
			n++
			began := time.Now()
			_, err := w.smtpFrom(netip.AddrFrom4([4]byte{203, 0, 113, byte(n)}), "praha", 587, user+"@"+Domain, "wrong")
			if err == nil {
				t.Fatalf("%s logged in", user)
			}
			_, said, _ = strings.Cut(err.Error(), ": ") // after the command
			return said, time.Since(began).Truncate(500 * time.Millisecond)
		}
		guess := func(user string) (said string, took [2]time.Duration) {
			_, took[0] = once(user)
			said, took[1] = once(user)
			return said, took
		}
		wants := map[[2]time.Duration]string{}
		for _, user := range []string{"hq", "praha"} {
			said, took := guess(user)
			wants[took] = said
		}
		seen := map[[2]time.Duration]bool{}
		for i := range 30 {
			user := fmt.Sprintf("nobody%d", i)
			said, took := guess(user)
			if wants[took] != said {
				t.Errorf("%s: %q after %v; people have %v", user, said, took, wants)
			}
			seen[took] = true
		}
		if len(wants) != 2 || len(seen) != 2 {
			t.Errorf("people of here and of elsewhere: %v; names that nobody has: %v", wants, seen)
		}
		w.Cut("praha").FromAll()
		time.Sleep(20 * time.Second)
		said := map[bool]int{}
		for i := range 30 {
			s, _ := once(fmt.Sprintf("nobody%d", i))
			said[strings.Contains(s, "454 4.7.0")]++
		}
		if said[true] == 0 || said[false] == 0 {
			t.Errorf("cut off: %d of 30 names cannot be checked, %d are wrong", said[true], said[false])
		}
	})
}

func TestALogInElsewhereIsJudgedByTheHome(t *testing.T) {
	plainOne(t, func(t *testing.T, w *World) {
		w.everybody(t, []string{"praha"}, []string{"praha", "plzen"})
		began := time.Now()
		if said := w.submits("praha", "hq", "wrong"); !strings.Contains(said, "535") {
			t.Errorf("a wrong password: %q", said)
		}
		if took := time.Since(began); took < time.Second {
			t.Errorf("a wrong password is answered after %v", took)
		}
		if _, err := w.LogInAs("praha", "hq", "wrong"); err == nil || !strings.Contains(err.Error(), "AUTHENTICATIONFAILED") {
			t.Errorf("a wrong password at another office's IMAP: %v", err)
		}
		began = time.Now()
		w.Cut("praha").FromAll()
		time.Sleep(20 * time.Second)
		// Found right a while ago: it still is. Who never logged in has to wait.
		w.everybody(t, []string{"praha"}, []string{"praha", "plzen"})
		if said := w.submits("praha", "hq", "secret"); !strings.Contains(said, "454 4.7.0") {
			t.Errorf("nobody to ask: %q", said)
		}
		if said := w.submits("praha", "plzen", "wrong"); !strings.Contains(said, "454 4.7.0") {
			t.Errorf("a wrong password, nobody to ask: %q", said)
		}
		if _, err := w.LogInAs("praha", "hq", "secret"); err == nil || !strings.Contains(err.Error(), "UNAVAILABLE") {
			t.Errorf("nobody to ask for an IMAP log-in: %v", err)
		}
		time.Sleep(10*time.Minute - time.Since(began))
		if said := w.submits("praha", "plzen", "secret"); !strings.Contains(said, "454") {
			t.Errorf("after ten minutes: %q", said)
		}
		w.everybody(t, []string{"praha"}, []string{"praha"})
		w.HealAll()
		w.Until("log-ins work again", 10*time.Second, func() bool { return w.submits("praha", "hq", "secret") == "" })
		// A changed password holds at once, and the old one is not remembered.
		w.everybody(t, []string{"praha"}, []string{"plzen"})
		password := "another"
		if _, err := w.Office("praha").Ops().ChangeUser(Ctx(), admin.UserChange{Address: "plzen@" + Domain, Password: &password}); err != nil {
			t.Fatal(err)
		}
		if said := w.submits("praha", "plzen", "secret"); said == "" {
			t.Error("the old password still works")
		}
		w.Until("the new password works", time.Second, func() bool { return w.submits("praha", "plzen", "another") == "" })
	})
}

func TestEverybodyLogsInAtOnceWhenTheCandidatesChange(t *testing.T) {
	plainOne(t, func(t *testing.T, w *World) {
		yes, no := true, false
		offices := w.Names()
		for _, step := range []admin.NodeChange{{Name: "praha", Voter: &yes}, {Name: "plzen", Voter: &no}, {Name: "praha", Voter: &no}, {Name: "plzen", Voter: &yes}} {
			if err := w.Office("praha").Ops().ChangeNode(Ctx(), step); err != nil {
				t.Fatal(err)
			}
			w.Cut("praha").FromAll() // what it needs for its own people it has
			w.everybody(t, []string{"praha"}, []string{"praha"})
			if *step.Voter && step.Name == "praha" {
				w.everybody(t, []string{"praha"}, offices)
			}
			w.HealAll()
			w.Until("the line is back", time.Minute, func() bool { return w.submits("praha", "hq", "secret") == "" })
			w.everybody(t, offices, offices)
		}
		if err := w.Office("hq").Ops().RevokeNode(Ctx(), "plzen"); err != nil {
			t.Fatal(err)
		}
		w.everybody(t, []string{"hq", "praha"}, []string{"hq", "praha"})
		if err := w.Office("hq").Ops().ChangeNode(Ctx(), admin.NodeChange{Name: "hq", Voter: &no}); err == nil {
			t.Error("nobody is left who may lead")
		}
	})
}

func TestAPlainMembersDiskHoldsNobodyElsesSecrets(t *testing.T) {
	plainOne(t, func(t *testing.T, w *World) {
		password := "changed"
		if _, err := w.Office("praha").Ops().ChangeUser(Ctx(), admin.UserChange{Address: "plzen@" + Domain, Password: &password}); err != nil {
			t.Fatal(err)
		}
		w.everybody(t, []string{"praha"}, []string{"praha", "hq"})
		w.Office("praha").Stop()
		dir, seen := w.Office("praha").cfg.Data, 0
		authority := w.authority(t, "hq")
		if err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			if err != nil || !d.Type().IsRegular() {
				return err
			}
			seen++
			b, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			if bytes.Contains(b, []byte("$argon2id$")) {
				t.Errorf("%s holds a verifier", path)
			}
			for rest := b; ; {
				at := bytes.Index(rest, []byte("-----BEGIN PRIVATE KEY"))
				if at < 0 {
					return nil
				}
				block, after := pem.Decode(rest[at:])
				if block == nil {
					t.Errorf("%s holds a part of a private key", path)
					return nil
				}
				key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
				if err != nil || authority.PublicKey.(*ecdsa.PublicKey).Equal(key.(*ecdsa.PrivateKey).Public()) {
					t.Errorf("%s holds the authority's key (%v)", path, err)
				}
				rest = after
			}
		}); err != nil {
			t.Fatal(err)
		}
		if logs, _ := filepath.Glob(filepath.Join(dir, "election", "*", "*")); len(logs) == 0 || seen < 5 {
			t.Errorf("only %d files were looked at, of the election %q", seen, logs)
		}
		w.Start("praha")
	})
}

// authority is the certificate that has signed what an office shows to clients.
func (w *World) authority(t *testing.T, office string) *x509.Certificate {
	t.Helper()
	c, err := w.smtp(office, 587, office+"@"+Domain, "secret")
	if err != nil {
		t.Fatal(err)
	}
	defer c.close()
	chain := c.c.(*tls.Conn).ConnectionState().PeerCertificates
	if len(chain) != 2 || chain[0].CheckSignatureFrom(chain[1]) != nil {
		t.Fatalf("%s shows %d certificates", office, len(chain))
	}
	return chain[1]
}

func TestAnyCandidateSignsForClientsAndChecksAnAdminsPassword(t *testing.T) {
	founded(t, []string{"hq", "plzen", "praha", "brno", "cheb"}, 3, func(t *testing.T, w *World) {
		ca := w.authority(t, "hq")
		token, err := w.Office("hq").Ops().CreateToken(Ctx(), admin.TokenRequest{Member: true})
		if err != nil {
			t.Fatal(err)
		}
		w.Until("all copies are equal", 10*time.Second, func() bool { return w.Office("hq").Status().StateHash == w.Office("plzen").Status().StateHash })
		w.Kill("hq") // the founder, for good
		w.Until("another node leads", time.Minute, func() bool { m := w.Office("plzen").Status().Master; return m != "" && m != "hq" })
		w.join(t, "brno", admin.JoinRequest{Target: token.Secret, At: netip.AddrPortFrom(w.Office("plzen").Addr, 44337).String()})
		w.Until("brno serves", time.Minute, func() bool {
			return w.Office("brno").Status().State == serving && w.Office("brno").Status().StateHash == w.Office("plzen").Status().StateHash
		})
		w.userAt(t, "brno")
		w.Until("brno has its certificate", time.Minute, func() bool {
			return w.Office("brno").condition("tls.certificate") == "" && w.submits("brno", "brno", "secret") == ""
		})
		if got := w.authority(t, "brno"); !got.Equal(ca) {
			t.Errorf("brno's certificate is from %s", got.Subject)
		}
		// The admin's home is gone too: a candidate judges, a plain member says who does.
		at := func(office string) admin.JoinRequest {
			return admin.JoinRequest{Target: w.door(office), Admin: "admin@" + Domain, Password: "secret", Member: true}
		}
		cheb := w.Office("cheb")
		w.join(t, "cheb", at("brno"))
		w.Until("brno says who checks passwords", time.Minute, func() bool {
			said := strings.Join(cheb.Status().JoinProgress, "\n")
			return strings.Contains(said, "join.not-here") && strings.Contains(said, "plzen."+Domain)
		})
		w.join(t, "cheb", at("praha"))
		w.Until("cheb serves", time.Minute, func() bool { return cheb.Status().State == serving && w.Equal() })
		w.everybody(t, []string{"cheb"}, []string{"brno", "plzen"})
		if said := w.submits("cheb", "admin", "secret"); !strings.Contains(said, "454") {
			t.Errorf("cheb, a plain member, judges itself: %q", said)
		}
	})
}

func TestAPlainMemberIsPromotedAndOthersSecretsComeBackWithThem(t *testing.T) {
	plainOne(t, func(t *testing.T, w *World) {
		praha := w.Office("praha")
		w.Kill("hq", "plzen")
		w.Until("no master", time.Minute, func() bool { return praha.Status().Master == "" })
		r := w.promote(t, "praha")
		if all := strings.Join(r.MayLose, "\n"); !strings.Contains(all, "its own 1 of 4 users only") {
			t.Errorf("it does not say what it cannot do:\n%s", all)
		}
		w.everybody(t, []string{"praha"}, []string{"praha"})
		if said := w.submits("praha", "plzen", "secret"); !strings.Contains(said, "454") {
			t.Errorf("somebody whose office is away: %q", said)
		}
		if err := w.addUser("praha", "eva", "praha"); err != nil {
			t.Fatal(err)
		}
		w.everybody(t, []string{"praha"}, []string{"eva"})
		w.Start("plzen", "hq")
		w.works("after their return")
		w.everybody(t, w.Names(), []string{"hq", "plzen", "praha", "eva"})
		// Now praha holds them itself.
		w.Cut("praha").FromAll()
		time.Sleep(11 * time.Minute)
		w.everybody(t, []string{"praha"}, []string{"hq", "plzen", "praha", "eva"})
		w.HealAll()
		w.Until("all copies are equal", time.Minute, w.Equal)
	})
}
