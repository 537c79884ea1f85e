package queue

import (
	"testing"
	"testing/synctest"
	"time"

	"posthouse/transport"
)

// TestAGatewayTriesNothingThatItsOriginHasNotReleased is the second of the two
// phases: what is kept waits for its origin through retries, a day and a crash,
// goes out once when it is released, and is gone when it is dropped.
func TestAGatewayTriesNothingThatItsOriginHasNotReleased(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.start()
		var sent []string
		carry := eachLeg(func(l *transport.Leg) []transport.Result {
			for _, r := range l.Rcpts {
				sent = append(sent, r.Address)
			}
			return all(len(l.Rcpts), transport.Result{Outcome: transport.Relayed, Code: 250, Enhanced: "2.0.0", Text: "taken"})
		})
		w.carry(toFar, carry)
		x, y := far("x@far.example"), far("y@far.example")
		env := transport.Envelope{ID: msgID(1), From: anna, Origin: transport.OriginSubmission, EntryTime: time.Now()}
		keep := func() {
			body := w.draft("Subject: 1\r\n\r\nbody\r\n")
			fates, err := w.q.Keep(t.Context(), plzen, env, []transport.Recipient{x, y}, body, structure(t, body))
			if err != nil || len(fates) != 2 || !fates[0].Kept || !fates[1].Kept {
				t.Fatal(fates, err)
			}
		}
		keep()
		keep() // the offer again, for its answer was lost
		time.Sleep(24 * time.Hour)
		synctest.Wait()
		want(t, len(sent), 0)

		w.crash()
		w.start()
		w.carry(toFar, carry)
		time.Sleep(time.Hour)
		synctest.Wait()
		want(t, len(sent), 0)

		if err := w.q.Let(t.Context(), brno, env.ID, []string{x.Key()}); err != nil { // not the origin
			t.Fatal(err)
		}
		synctest.Wait()
		want(t, len(sent), 0)
		for range 2 {
			if err := w.q.Let(t.Context(), plzen, env.ID, []string{x.Key()}); err != nil {
				t.Fatal(err)
			}
		}
		if err := w.q.Drop(t.Context(), plzen, env.ID, []string{y.Key()}); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Hour)
		synctest.Wait()
		want(t, sent, []string{"x@far.example"})
		w.crash()
	})
}
