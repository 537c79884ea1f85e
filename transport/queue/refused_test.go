package queue

import (
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"posthouse/mailstore/log/simfs"
	"posthouse/transport"
)

// While the disk is full the answers of other nodes cannot be recorded. The
// queue keeps them, and goes on when there is room.
func TestAnAnswerThatAFullDiskRefusedIsRecordedLater(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		var full atomic.Bool
		w.disk.FS.Hook = func(op simfs.Op) simfs.Fault {
			if op.Name == "write" && full.Load() {
				return simfs.Fault{Err: syscall.ENOSPC}
			}
			return simfs.Fault{}
		}
		w.start()
		offers := 0
		w.carry(toPlzen, eachLeg(func(l *transport.Leg) []transport.Result {
			offers++
			full.Store(true)
			return all(len(l.Rcpts), transport.Result{Outcome: transport.Delivered, Code: 250})
		}))
		w.accept(1, anna, transport.OriginSubmission, one(toPlzen, user(bob)))
		time.Sleep(time.Minute)
		full.Store(false)
		time.Sleep(time.Minute)
		want(t, w.left(), "")
		want(t, offers, 1)
		w.crash()
	})
}

// A leg whose record is on its way to a slow disk starts no carry: a carry that
// finds nothing to do would be started again at once, for ever.
func TestALegWhoseRecordIsOnItsWayStartsNoCarry(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.start()
		var carries atomic.Int32
		w.carry(toPlzen, func(ctx ctx, d transport.Destination, s transport.Source) error {
			carries.Add(1)
			l, err := s.Next(ctx)
			if err != nil {
				return err
			}
			s.Finish(l, all(len(l.Rcpts), transport.Result{Outcome: transport.Deferred, Code: 450}))
			return nil
		})
		w.disk.FS.SetSyncTime(5 * time.Second)
		w.accept(1, anna, transport.OriginSubmission, one(toPlzen, user(bob)))
		time.Sleep(20 * time.Second)
		want(t, int(carries.Load()), 1)
		w.crash()
	})
}
