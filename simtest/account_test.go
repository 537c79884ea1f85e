package simtest

import (
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"posthouse/appliance/admin"
)

func TestWhoGuessesAtSeveralDoorsIsSlowedAsAtOne(t *testing.T) {
	tale(t, 1, func(w *World) {
		for i, want := range []time.Duration{1, 2, 4, 8} {
			began := time.Now()
			if i%2 == 0 {
				if _, err := w.LogInAs("hq", "hq", "wrong"); err == nil || !strings.Contains(err.Error(), "AUTHENTICATIONFAILED") {
					t.Errorf("a wrong password at IMAP: %v", err)
				}
			} else if _, err := w.smtpFrom(w.Office("hq").Addr, "hq", 587, "HQ@"+Domain, "wrong"); err == nil || !strings.Contains(err.Error(), "535") {
				t.Errorf("a wrong password at submission: %v", err)
			}
			if took := time.Since(began).Truncate(time.Second); took != want*time.Second {
				t.Errorf("failure %d was answered after %v, want %d s", i+1, took, want)
			}
		}
		began := time.Now()
		c, err := w.smtpFrom(w.Office("hq").Addr, "hq", 587, "hq@"+Domain, "secret")
		if err != nil || time.Since(began) > time.Second {
			t.Fatalf("the right password: %v after %v", err, time.Since(began))
		}
		c.close()
	})
}

func TestAChangedPasswordEndsOpenSessions(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := NewWorld(t, "hq", "plzen")
		defer w.Close()
		w.Found()
		c, err := w.Login("plzen", "secret")
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if err := c.Noop().Wait(); err != nil {
			t.Fatal(err)
		}
		// The change is made at the other office.
		password := "another"
		if _, err := w.Office("hq").Ops().ChangeUser(Ctx(), admin.UserChange{Address: "plzen@" + Domain, Password: &password}); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second)
		if err := c.Noop().Wait(); err == nil {
			t.Error("the session goes on under the old password")
		}
		if _, err := w.Login("plzen", "secret"); err == nil {
			t.Error("the old password still works")
		}
		again, err := w.Login("plzen", "another")
		if err != nil {
			t.Fatal(err)
		}
		again.Close()
	})
}
