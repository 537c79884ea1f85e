package queue

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"posthouse/mailstore/journal"
	"posthouse/mailstore/log"
	"posthouse/mailstore/log/simfs"
	"posthouse/transport"
)

func (w *world) tidy() {
	w.t.Helper()
	for range 2 {
		if _, err := w.j.Tidy(context.Background(), journal.TidyOptions{Force: true}); err != nil {
			w.t.Fatal(err)
		}
	}
}

func TestATidiedLogSendsNothingAgainAndLosesNothingThatWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.disk.Options.Log.SegmentSize = 4 << 10
		w.start()
		w.carry(local, w.mailstore(nil))
		outside := 0
		w.carry(toFar, eachLeg(func(l *transport.Leg) []transport.Result {
			outside++
			return all(len(l.Rcpts), transport.Result{Outcome: transport.Delivered, Code: 250})
		}))
		for i := range 60 { // most of it ends, some waits for plzen
			switch {
			case i%10 == 0:
				w.accept(i, anna, transport.OriginSubmission, one(local, user(bob)), one(toPlzen, user(carl)))
			case i%3 == 0:
				w.accept(i, anna, transport.OriginSubmission, one(toFar, far("x@far.example")))
			default:
				w.accept(i, anna, transport.OriginSubmission, one(local, user(bob)))
			}
		}
		time.Sleep(time.Minute)
		synctest.Wait()
		sent, boxes := outside, len(w.boxes())
		before, _ := w.disk.FS.ReadDir("log")
		w.tidy()
		after, _ := w.disk.FS.ReadDir("log")
		var a, b int64
		for _, f := range before {
			b += f.Size
		}
		for _, f := range after {
			a += f.Size
		}
		if a > b/2 {
			t.Errorf("%d bytes were %d", a, b)
		}
		for range 2 {
			w.crash()
			w.disk.DropView(t)
			w.start()
			w.q.Wake(local)
			w.q.Wake(toFar)
			time.Sleep(time.Minute)
			synctest.Wait()
			want(t, []int{outside, len(w.boxes())}, []int{sent, boxes})
			want(t, len(w.j.Conditions()), 0)
		}
		var got []string
		w.carry(toPlzen, eachLeg(func(l *transport.Leg) []transport.Result {
			b, err := l.Body.Open()
			if err != nil {
				t.Error(err)
				return nil
			}
			text, _ := io.ReadAll(b)
			b.Close()
			got = append(got, strings.Fields(string(text))[1])
			return all(len(l.Rcpts), transport.Result{Outcome: transport.Delivered})
		}))
		w.q.PeerUp(plzen)
		synctest.Wait()
		want(t, got, []string{"0", "10", "20", "30", "40", "50"})
		want(t, w.left(), "")
		w.tidy()
		w.crash()
		w.disk.DropView(t)
		w.start()
		synctest.Wait()
		want(t, w.left(), "")
		want(t, len(got), 6)
		w.crash()
	})
}

// No view and no checkpoint: nobody knows what was sent, so nothing is.
func TestWithoutCheckpointsWhatWaitedIsHeld(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.disk.Options.Log.SegmentSize = 1 << 10
		w.start()
		for i := range 20 {
			w.accept(i, anna, transport.OriginSubmission, one(local, user(bob)), one(toPlzen, user(carl)))
		}
		w.carry(local, w.mailstore(nil))
		time.Sleep(time.Minute)
		synctest.Wait()
		boxes := len(w.boxes())
		w.tidy()
		w.accept(20, anna, transport.OriginSubmission, one(toPlzen, user(carl)))
		w.stop()
		w.disk.Close(t)
		w.disk.DropView(t)
		w.disk.FS = w.disk.FS.After(simfs.KeepAll, 0)
		l, err := log.Open(t.Context(), log.Options{Dir: "log", FS: w.disk.FS})
		if err != nil {
			t.Fatal(err)
		}
		spoiled := 0
		l.Latest(t.Context(), log.KindCheckpoint, func(r log.Record) bool {
			name := fmt.Sprintf("log/%012d.seg", r.Ref.Segment)
			b := w.disk.FS.Peek(name)
			b[r.Ref.Offset+int64(bytes.Index(b[r.Ref.Offset:], []byte("q/")))] ^= 1
			w.disk.FS.Poke(name, b)
			spoiled++
			return spoiled < 2
		})
		l.Close()
		w.start()
		w.carry(local, w.mailstore(nil))
		sent := 0
		w.carry(toPlzen, eachLeg(func(l *transport.Leg) []transport.Result {
			sent++
			return all(len(l.Rcpts), transport.Result{Outcome: transport.Delivered})
		}))
		w.q.PeerUp(plzen)
		time.Sleep(time.Hour)
		synctest.Wait()
		want(t, []int{sent, len(w.boxes())}, []int{1, boxes}) // only what came after
		held := 0
		rows, err := w.q.List()
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range rows {
			held += r.Held
		}
		if held < 20 {
			t.Errorf("%d held", held)
		}
		w.crash()
	})
}
