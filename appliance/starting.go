package appliance

import (
	"context"
	"errors"
	"path/filepath"
	"syscall"
	"time"

	"posthouse/appliance/health"
	"posthouse/mailstore/journal"
	"posthouse/mailstore/kv"
	"posthouse/mesh/identity"
	"posthouse/transport"
)

// openSelf counts this start and loads the node's key.
func (n *Node) openSelf(ctx context.Context) error {
	if err := n.patiently(ctx, n.rec.boot); err != nil {
		return err
	}
	n.boots = n.rec.get().Boots
	file := filepath.Join(n.cfg.Data, "node.key")
	first, second := identity.Check(file)
	created := false
	err := n.patiently(ctx, func() (err error) {
		n.key, created, err = identity.LoadOrCreate(file, n.env.Random)
		return err
	})
	if err != nil {
		return err
	}
	n.state.SetKeyring(n.keyring())
	switch {
	case created && n.rec.get().Member:
		return errors.New("the node's key is gone but its record says that it is a member: restore node.key from a backup, or remove the data folder and join anew")
	case created:
	case first != nil:
		n.mended(Flaw{filepath.Base(file), 0, "it is not what was written; its copy is whole"})
	case second != nil:
		n.mended(Flaw{filepath.Base(file) + copySuffix, 0, "the copy is not what was written"})
	}
	return nil
}

// mended says that a small file was made whole.
func (n *Node) mended(f Flaw) {
	n.log.Warn("a file of the node was damaged and has been made whole", "file", f.File, "offset", f.Offset, "what", f.What)
	n.board.Set(health.Condition{Name: "node.file-mended", About: f.File, Severity: health.Notice, Text: sentence("a file of this node was damaged and has been made whole: " + f.String()), Next: "Look after the disk."})
}

// A node that starts on a full disk looks again every spacePoll; on one that
// fails, after failedPoll, twice as long each time, up to failedPollMax.
const (
	spacePoll     = time.Second
	failedPoll    = time.Second
	failedPollMax = time.Minute
)

// viewDir is where the view lies.
func (n *Node) viewDir() string { return filepath.Join(n.cfg.Data, "view") }

// noRoom reports whether an error means that the disk is full.
func noRoom(err error) bool {
	return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) || errors.Is(err, kv.ErrNoSpace) || errors.Is(err, transport.ErrNoSpace)
}

// failing reports whether an error means that the disk did not do what it was
// told: it may do so the next time, or once a person has looked after it.
func failing(err error) bool { return errors.Is(err, syscall.EIO) || errors.Is(err, syscall.EROFS) }

// patiently does a step of the start, again and again while the disk is full or
// fails: the pages say so meanwhile, and it goes on by itself. The first step
// that finds no room gives the ballast up, whichever it is: a few blocks are
// enough for most of them.
func (n *Node) patiently(ctx context.Context, step func() error) error {
	was := *n.stage.Load()
	full := health.Condition{Name: journal.CondNoSpace, About: "start", Severity: health.Problem,
		Text: "This node cannot start because its disk is full.", Next: "Make room on the disk; the node goes on by itself."}
	fails := health.Condition{Name: "node.disk-fails", About: "start", Severity: health.Problem,
		Next: "Look after the disk; the node tries again by itself, at least every minute."}
	pause := failedPoll / 2
	for {
		err := step()
		var wait time.Duration
		switch {
		case noRoom(err):
			if freed, sunk := kv.GiveUpBallast(n.viewDir()); sunk != nil {
				n.log.Error("the ballast cannot be given up", "err", sunk)
			} else if freed {
				n.log.Warn("the disk is full; the ballast is given up for the start", "err", err)
				continue
			}
			n.setStage("the disk is full: " + err.Error())
			n.board.Set(full)
			n.board.Clear(fails.Name, fails.About)
			wait = spacePoll
		case failing(err):
			n.log.Error("the disk fails; the start is tried again", "err", err)
			n.setStage("the disk fails: " + err.Error())
			fails.Text = sentence("this node cannot start because its disk fails: " + err.Error())
			n.board.Set(fails)
			n.board.Clear(full.Name, full.About)
			pause = min(2*pause, failedPollMax)
			wait = pause
		default:
			n.board.Clear(full.Name, full.About)
			n.board.Clear(fails.Name, fails.About)
			n.setStage(was)
			return err
		}
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// explain keeps the pages of a node up that cannot start, so that a person sees
// why, until the node is told to stop. What may pass by itself, and what a
// second process holds, ends the node at once: its supervisor tries again.
func (n *Node) explain(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return asked(context.Cause(ctx))
	}
	if errors.Is(err, kv.ErrLocked) || errors.Is(err, syscall.EWOULDBLOCK) {
		return err
	}
	n.log.Error("the node cannot start", "err", err)
	n.board.Set(health.Condition{Name: "node.cannot-start", Severity: health.Problem, Text: sentence("this node cannot start: " + err.Error()), Next: "Mend it and start the node again; other offices go on."})
	n.setStage("this node cannot start: " + err.Error())
	<-ctx.Done()
	return asked(context.Cause(ctx))
}
