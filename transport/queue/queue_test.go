package queue

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"posthouse/transport"
)

type ctx = context.Context

const anna, bob, carl = "anna@ours.example", "bob@ours.example", "carl@ours.example"

func one(d transport.Destination, rs ...transport.Recipient) Leg { return Leg{Dest: d, Rcpts: rs} }

func far(a string) transport.Recipient { return transport.Recipient{Address: a} }

func want(t *testing.T, got, want any) {
	t.Helper()
	if diff := cmp.Diff(want, got); diff != "" {
		t.Fatal(diff)
	}
}

func TestALocalMessageEndsByItsDeliverRecord(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.start()
		w.carry(local, w.mailstore(nil))
		w.accept(1, anna, transport.OriginSubmission, one(local, user(bob), user(carl)))
		w.accept(2, anna, transport.OriginSubmission, one(local, user(bob)))
		synctest.Wait()
		want(t, w.boxes(), []string{bob + " 0001", carl + " 0001", bob + " 0002"})
		want(t, w.left(), "")
		w.crash()
		w.disk.DropView(t)
		w.start() // replay everything: nothing is sent again
		synctest.Wait()
		want(t, w.boxes(), []string{bob + " 0001", carl + " 0001", bob + " 0002"})
		want(t, w.left(), "")
		w.crash()
	})
}

func TestWhatWaitsForANodeLeavesAtPeerUpInOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.start()
		up := false
		var got []string
		w.carry(toPlzen, func(ctx ctx, d transport.Destination, s transport.Source) error {
			if !up {
				return fmt.Errorf("no path to plzen")
			}
			return eachLeg(func(l *transport.Leg) []transport.Result {
				b, _ := l.Body.Open()
				text, _ := io.ReadAll(b)
				got = append(got, strings.Fields(string(text))[1])
				return all(len(l.Rcpts), transport.Result{Outcome: transport.Delivered})
			})(ctx, d, s)
		})
		for i := range 5 {
			w.accept(i, anna, transport.OriginSubmission, one(toPlzen, user(bob)))
		}
		time.Sleep(10*time.Minute + 7*time.Second)
		synctest.Wait()
		want(t, len(got), 0)
		rows, err := w.q.List()
		if err != nil || len(rows) != 1 {
			t.Fatal(rows, err)
		}
		want(t, []any{rows[0].Destination, rows[0].Waiting, rows[0].Error, rows[0].Oldest}, []any{"node:0000000000000002", 5, "no path to plzen", 10*time.Minute + 7*time.Second})
		w.crash() // and it survives a restart
		w.disk.DropView(t)
		w.start()
		synctest.Wait()
		up = true
		at := time.Now()
		w.q.PeerUp(plzen)
		synctest.Wait()
		want(t, got, []string{"0", "1", "2", "3", "4"})
		want(t, time.Since(at), time.Duration(0))
		want(t, w.left(), "")
		w.crash()
	})
}

// A line may pass the small packets that show a node alive, and lose the large ones
// with mail in them. When it is whole again nobody tells.
func TestANodeThatIsSeenAliveIsTriedEveryFewSeconds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.start()
		var mu sync.Mutex
		var tries int
		var last time.Time
		var longest time.Duration
		w.carry(toPlzen, func(context.Context, transport.Destination, transport.Source) error {
			mu.Lock()
			defer mu.Unlock()
			if tries++; tries > 1 {
				longest = max(longest, time.Since(last))
			}
			last = time.Now()
			return errors.New("no bulk connection")
		})
		pass := func(seen bool, d time.Duration) (int, time.Duration) {
			w.seen.Store(seen)
			mu.Lock()
			tries, longest = 0, 0
			mu.Unlock()
			time.Sleep(d)
			mu.Lock()
			defer mu.Unlock()
			return tries, longest
		}
		w.accept(1, anna, transport.OriginSubmission, one(toPlzen, user(bob)))
		if n, longest := pass(true, time.Hour); n < 600 || longest > 6*time.Second {
			t.Errorf("%d attempts in an hour, at most %v apart", n, longest)
		}
		if n, longest := pass(false, time.Hour); n > 80 || longest < 48*time.Second {
			t.Errorf("%d attempts in an hour when it is not seen, at most %v apart", n, longest)
		}
		w.crash()
	})
}

func TestAFailureOutsideIsReportedOnceToTheSender(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.start()
		w.carry(toFar, eachLeg(func(l *transport.Leg) []transport.Result {
			return all(len(l.Rcpts), transport.Result{Outcome: transport.Failed, Code: 550, Enhanced: "5.1.1", Text: "who?", By: "mx"})
		}))
		w.carry(local, w.mailstore(nil))
		w.accept(1, anna, transport.OriginSubmission, one(toFar, far("x@far.example"), far("y@far.example")))
		w.accept(2, "", transport.OriginSubmission, one(toFar, far("x@far.example")))
		quiet := far("z@far.example")
		quiet.Notify = transport.NotifyNever
		w.accept(3, anna, transport.OriginSubmission, one(toFar, quiet))
		synctest.Wait()
		want(t, w.boxes(), []string{anna + " report"})
		want(t, w.left(), "")
		w.crash()
		w.disk.DropView(t)
		w.start()
		synctest.Wait()
		want(t, w.boxes(), []string{anna + " report"})
		w.crash()
	})
}

func TestMailFromOutsideThatFailsInsideWaitsForAPerson(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.start()
		gone := true
		w.carry(local, w.mailstore(func(l *transport.Leg, r *transport.Recipient) *transport.Result {
			if gone {
				return &transport.Result{Outcome: transport.Failed, Code: 550, Enhanced: "5.2.1", Text: "disabled"}
			}
			return nil
		}))
		id := w.accept(1, "forged@victim.example", transport.OriginOutside, one(local, user(bob)))
		time.Sleep(100 * day)
		synctest.Wait()
		rows, err := w.q.Show(id)
		if err != nil || len(rows) != 1 {
			t.Fatal(rows, err)
		}
		want(t, rows[0].Recipients, []RcptRow{{Address: bob, State: Aside, Attempts: 1, Error: "550 disabled"}})
		gone = false
		n, err := w.q.Unhold(t.Context(), id)
		want(t, []any{n, err}, []any{1, nil})
		synctest.Wait()
		want(t, w.boxes(), []string{bob + " 0001"})
		want(t, w.left(), "")
		w.crash()
	})
}

func TestAReportThatCannotBeDeliveredWaitsForAPerson(t *testing.T) {
	refused := transport.Result{Outcome: transport.Failed, Code: 550, Enhanced: "5.2.1", Text: "disabled"}
	for _, tc := range []struct {
		name string
		life time.Duration
		said *transport.Result // of anna's mailbox
		text string
	}{
		{"refused for good", 0, &refused, "550 disabled"},
		{"given up after its lifetime", 3 * day, &transport.Result{Outcome: transport.Deferred, Code: 452, Enhanced: "4.2.2", Text: "full"}, "452 not delivered within 3 days; last heard: full"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				w.policy = Policy{MeshLife: tc.life}
				w.start()
				shut := true
				w.carry(local, w.mailstore(func(*transport.Leg, *transport.Recipient) *transport.Result {
					if shut {
						return tc.said
					}
					return nil
				}))
				w.carry(toFar, eachLeg(func(l *transport.Leg) []transport.Result { return all(len(l.Rcpts), refused) }))
				w.accept(1, anna, transport.OriginSubmission, one(toFar, far("x@far.example")))
				time.Sleep(10 * day)
				synctest.Wait()
				held := func() []LegRow {
					rows, err := w.q.Legs(t.Context(), local, 0, 10)
					if err != nil {
						t.Fatal(err)
					}
					return rows
				}
				rows := held()
				if len(rows) != 1 || len(rows[0].Recipients) != 1 || rows[0].Recipients[0].State != Aside || rows[0].Recipients[0].Error != tc.text {
					t.Fatalf("the hold has %+v", rows)
				}
				w.crash()
				w.disk.DropView(t)
				w.start()
				want(t, len(held()), 1)
				shut = false
				if n, err := w.q.Unhold(t.Context(), rows[0].Queue); n != 1 || err != nil {
					t.Fatal(n, err)
				}
				synctest.Wait()
				want(t, w.boxes(), []string{anna + " report"})
				want(t, w.left(), "")
				w.crash()
			})
		})
	}
}

func TestAFailureThatNobodyCanBeToldOfWaitsForAPerson(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.start()
		w.mu.Lock()
		w.nobody = anna // whose account was removed meanwhile
		w.mu.Unlock()
		gone := true
		w.carry(toFar, eachLeg(func(l *transport.Leg) []transport.Result {
			if gone {
				return all(len(l.Rcpts), transport.Result{Outcome: transport.Failed, Code: 550, Enhanced: "5.1.1", Text: "who?", By: "mx"})
			}
			return all(len(l.Rcpts), transport.Result{Outcome: transport.Relayed, Code: 250})
		}))
		id := w.accept(1, anna, transport.OriginSubmission, one(toFar, far("x@far.example"), far("y@far.example")))
		synctest.Wait()
		w.crash()
		w.disk.DropView(t)
		w.start()
		synctest.Wait()
		rows, err := w.q.Show(id)
		if err != nil || len(rows) != 1 {
			t.Fatal(rows, err)
		}
		want(t, rows[0].Recipients, []RcptRow{{Address: "x@far.example", State: Aside, Attempts: 1, Error: "mx: 550 who?"}, {Address: "y@far.example", State: Aside, Attempts: 1, Error: "mx: 550 who?"}})
		gone = false
		if n, err := w.q.Unhold(t.Context(), id); n != 2 || err != nil {
			t.Fatal(n, err)
		}
		synctest.Wait()
		want(t, w.left(), "")
		w.crash()
	})
}

func TestDelayNoticeAtFourHoursAndFailureAfterFiveDays(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.start()
		w.carry(local, w.mailstore(nil))
		attempts := 0
		w.carry(toFar, func(ctx ctx, d transport.Destination, s transport.Source) error {
			attempts++
			return transport.Faultf(421, "4.4.1", "connection refused")
		})
		w.accept(1, anna, transport.OriginSubmission, one(toFar, far("x@far.example")))
		time.Sleep(4*time.Hour - time.Minute)
		synctest.Wait()
		want(t, len(w.boxes()), 0)
		time.Sleep(7 * time.Minute)
		synctest.Wait()
		want(t, w.boxes(), []string{anna + " report"})
		time.Sleep(115*time.Hour + 50*time.Minute)
		synctest.Wait()
		want(t, len(w.boxes()), 1)
		time.Sleep(10 * time.Minute)
		synctest.Wait()
		want(t, w.boxes(), []string{anna + " report", anna + " report"})
		want(t, w.left(), "")
		if attempts < 30 || attempts > 60 {
			t.Errorf("%d attempts in five days", attempts)
		}
		w.crash()
	})
}

func TestAMemberThatNeverAnswersIsNeverAFailure(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.policy = Policy{MeshLife: 3 * day, AsideAfter: 9 * day}
		w.start()
		w.carry(local, w.mailstore(nil))
		w.carry(toPlzen, func(ctx ctx, d transport.Destination, s transport.Source) error {
			if _, err := s.Next(ctx); err != nil {
				return err
			}
			return fmt.Errorf("no progress")
		})
		id := w.accept(1, anna, transport.OriginSubmission, one(toPlzen, user(bob)))
		time.Sleep(8 * day)
		synctest.Wait()
		want(t, w.boxes(), []string{anna + " report"}) // delayed
		time.Sleep(2 * day)
		synctest.Wait()
		rows, _ := w.q.Show(id)
		want(t, rows[0].Recipients[0].State, Aside)
		w.crash()
	})
}

func TestSuccessReportsSurviveTheCrashAfterTheDelivery(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.start()
		r := user(bob)
		r.Notify = transport.NotifySuccess
		w.accept(1, anna, transport.OriginSubmission, one(local, r))
		synctest.Wait()
		w.stop() // nobody makes reports now
		w.carry(local, w.mailstore(nil))
		src := &source{q: w.q, d: w.q.dests[local]}
		l, err := src.Next(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		// the same steps as the carrier, up to the crash
		w.mailstore(nil)(t.Context(), local, &fixed{l: l})
		w.disk.Crash(t)
		w.start()
		synctest.Wait()
		want(t, w.boxes(), []string{bob + " 0001", anna + " report"})
		want(t, w.left(), "")
		w.crash()
	})
}

// fixed is a Source of one leg whose results nobody hears.
type fixed struct{ l *transport.Leg }

func (f *fixed) Next(ctx) (*transport.Leg, error) {
	l := f.l
	if f.l = nil; l == nil {
		return nil, io.EOF
	}
	return l, nil
}
func (f *fixed) Finish(*transport.Leg, []transport.Result) {}

func TestPeopleHoldReleaseAndDelete(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.start()
		held := w.accept(1, anna, transport.OriginSubmission, one(local, user(bob)))
		gone := w.accept(2, anna, transport.OriginSubmission, one(local, user(carl)), one(toFar, far("x@far.example")))
		synctest.Wait()
		w.q.Hold(t.Context(), held)
		n, err := w.q.Delete(t.Context(), gone)
		want(t, []any{n, err}, []any{2, nil})
		w.crash()
		w.start()
		w.carry(local, w.mailstore(nil))
		synctest.Wait()
		want(t, len(w.boxes()), 0)
		w.q.Unhold(t.Context(), held)
		synctest.Wait()
		want(t, w.boxes(), []string{bob + " 0001"})
		want(t, w.left(), "")
		w.crash()
	})
}
