package simtest

import (
	"testing"
	"testing/synctest"
	"time"

	"posthouse/appliance/admin"
)

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
