package simtest

import (
	"testing"
	"testing/synctest"
	"time"
)

func TestMailForTheOutsideLeavesThroughTheGateway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := NewWorld(t, "hq", "plzen", "praha") // hq alone is a gateway
		defer w.Close()
		w.Found()
		send := func(to, subject string) {
			t.Helper()
			c, err := w.smtp("plzen", 587, "plzen@"+Domain, "secret")
			if err != nil {
				t.Fatal(err)
			}
			defer c.close()
			if answers, err := c.send("plzen@"+Domain, []string{to}, text("plzen@"+Domain, to, subject)); err != nil || answers[0] != 250 {
				t.Fatal(answers, err)
			}
		}
		taken := func(to, subject string) (n int) {
			w.Outside.mu.Lock()
			defer w.Outside.mu.Unlock()
			for _, x := range w.Outside.got[delivery{subject, to}] {
				if x.from != w.Office("hq").Addr {
					t.Errorf("%s was brought by %v", subject, x.from)
				}
				n++
			}
			return n
		}
		send("keep@example.net", "one")
		took := w.Until("the message is outside", 10*time.Second, func() bool { return taken("keep@example.net", "one") == 1 })
		t.Logf("it took %v", took)
		w.Until("its origin knows", 30*time.Second, func() bool { return w.Office("plzen").Status().QueueOutside == 0 })

		// The gateway dies with a message that it has answered for; it leaves
		// when the gateway is back, once.
		w.Outside.Shut()
		send("keep@example.net", "two")
		time.Sleep(5 * time.Second)
		w.Kill("hq")
		time.Sleep(time.Minute)
		w.Outside.Open()
		w.Start("hq")
		w.Until("what the dead gateway held is outside", 10*time.Minute, func() bool { return taken("keep@example.net", "two") > 0 })
		time.Sleep(10 * time.Minute)
		if n := taken("keep@example.net", "two"); n != 1 {
			t.Errorf("it was sent %d times", n)
		}

		// A refusal comes back to the sender as one report.
		send("refuse@example.net", "three")
		w.Until("the report is in the sender's mailbox", time.Minute, func() bool {
			there, err := w.Inbox("plzen")
			return err == nil && len(there) == 1
		})
	})
}
