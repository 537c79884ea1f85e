package simtest

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"time"

	"posthouse/appliance/admin"
	"posthouse/mailstore/kv"
	"posthouse/mailstore/log/simfs"
	"posthouse/mesh"
	"posthouse/mesh/election"
	"posthouse/simtest/record"
)

// image is a copy of all of a stopped office's disk.
type image struct {
	at    time.Time
	disk  *simfs.FS
	votes *election.MemStorage
	files map[string][]byte
	seen  map[string]bool // subjects that stood in its INBOX
}

// lock lets nobody else start the office's node until it is called again.
func (o *Office) lock() (unlock func()) {
	o.hands <- struct{}{}
	return func() { <-o.hands }
}

// copy makes an image of a machine on which nothing runs.
func (o *Office) copy() (i *image, err error) {
	o.bury()
	i = &image{at: time.Now(), disk: o.disk().Copy(), files: map[string][]byte{}, seen: map[string]bool{}}
	if i.votes, err = o.votes.Copy(); err != nil {
		return nil, fmt.Errorf("copy %s's votes: %w", o.Name, err)
	}
	err = o.smallFiles(func(name string) (err error) {
		i.files[filepath.Base(name)], err = os.ReadFile(name)
		return err
	})
	return i, err
}

// put writes an image to a machine on which nothing runs.
func (o *Office) put(i *image) error {
	o.bury()
	votes, err := i.votes.Copy()
	if err != nil {
		return fmt.Errorf("copy %s's votes: %w", o.Name, err)
	}
	o.wipe(i.disk.Copy(), votes)
	for name, b := range i.files {
		if err := os.WriteFile(filepath.Join(o.cfg.Data, name), b, 0o600); err != nil {
			return err
		}
	}
	return nil
}

// wipe gives the machine another disk; the view, which never is part of an
// image, is made anew from the log.
func (o *Office) wipe(d *simfs.FS, votes *election.MemStorage) {
	o.votes, o.view = votes, &kv.Memory{}
	o.view.KeepHistory()
	o.setDisk(d)
	if err := o.smallFiles(os.Remove); err != nil {
		o.w.tb.Error(err)
	}
}

// smallFiles calls f for each of the node's small files.
func (o *Office) smallFiles(f func(name string) error) error {
	names, err := os.ReadDir(o.cfg.Data)
	if err != nil && !os.IsNotExist(err) {
		return err
	}
	for _, x := range names {
		if x.IsDir() {
			continue
		}
		if err := f(filepath.Join(o.cfg.Data, x.Name())); err != nil {
			return err
		}
	}
	return nil
}

// Image stops an office's node, keeps an image of its disk, and starts it again:
// the cold backup of a careful admin. The newest image counts.
func (w *World) Image(office string) error {
	o := w.Office(office)
	unlock := o.lock()
	defer unlock()
	box, err := w.ledger.glance(o)
	if err != nil {
		return fmt.Errorf("look into %s's INBOX: %w", office, err)
	}
	w.ledger.see(o, box)
	ran := o.Up()
	o.Stop()
	i, err := o.copy()
	if err != nil {
		return err
	}
	for _, l := range box.Letters {
		i.seen[l.Subject] = true
	}
	o.kept = i
	w.note("%s: an image of its disk is kept", office)
	if ran {
		o.start()
	}
	return nil
}

// Restore takes an office's power, puts the image that was kept in place of its
// disk, and starts it. What the image does not hold is lost there.
func (w *World) Restore(office string) error {
	o := w.Office(office)
	unlock := o.lock()
	defer unlock()
	if o.kept == nil {
		return fmt.Errorf("no image of %s is kept", office)
	}
	o.PowerCut(simfs.LoseAll, DropView)
	w.note("%s is restored from its image of %v ago", office, time.Since(o.kept.at).Round(time.Second))
	w.ledger.loses(o, o.kept.at, o.kept.seen)
	o.rolledBack.Store(true)
	if err := o.put(o.kept); err != nil {
		return err
	}
	o.start()
	return nil
}

// LoseDisk takes an office's power and its disk. What comes next is Replace.
func (w *World) LoseDisk(office string) {
	o := w.Office(office)
	unlock := o.lock()
	defer unlock()
	o.PowerCut(simfs.LoseAll, DropView)
	o.bury()
	w.note("%s: its disk is gone", office)
	w.ledger.loses(o, time.Time{}, nil)
	o.wipe(simfs.New(), election.NewMemStorage())
	o.kept = nil // of a node that is put out now
	o.apart.Store(true)
	o.keepState(record.Off)
}

// Replace lets an office whose disk is gone join as a new node of the same name,
// as its admin does: the lost one is revoked, the new one joins with a token,
// and its people get their home there. It waits for as long as the limit.
func (w *World) Replace(office string, limit time.Duration) error {
	o := w.Office(office)
	var token admin.Token
	asked := func(what string, f func(ctx context.Context, by *Office, ops admin.Operations) error) error {
		err := fmt.Errorf("nobody is there")
		_, ok := w.within(limit, func() bool {
			for _, by := range w.belonging() {
				if p := by.process(); p != nil && by != o {
					ctx, cancel := context.WithTimeout(Ctx(), 20*time.Second)
					err = f(ctx, by, p.node)
					cancel()
					if err == nil {
						return true
					}
				}
			}
			return false
		})
		if !ok {
			return fmt.Errorf("%s: %w", what, err)
		}
		return nil
	}
	var door *Office
	if err := asked("revoke "+office, func(ctx context.Context, by *Office, ops admin.Operations) error {
		for _, m := range by.Status().Members {
			if m.Name == office {
				return ops.RevokeNode(ctx, office)
			}
		}
		if by.Status().Master == "" {
			return fmt.Errorf("nobody leads")
		}
		return nil // a person has put it out already
	}); err != nil {
		return err
	}
	w.note("%s, the lost one, is revoked", office)
	if err := asked("make a token for "+office, func(ctx context.Context, by *Office, ops admin.Operations) (err error) {
		door = by
		token, err = ops.CreateToken(ctx, admin.TokenRequest{})
		return err
	}); err != nil {
		return err
	}
	o.Start()
	w.note("%s asks %s to let it join in place of the lost one", office, door.Name)
	var err error
	if _, ok := w.within(limit, func() bool {
		if p := o.process(); p != nil {
			err = p.node.Join(Ctx(), admin.JoinRequest{Target: token.Secret, At: netip.AddrPortFrom(door.Addr, 44337).String()})
			return err == nil
		}
		return false
	}); !ok {
		return fmt.Errorf("join: %w", err)
	}
	took, ok := w.within(limit, func() bool {
		if !o.Up() { // its admin stands before it
			time.Sleep(5 * time.Second)
			o.Start()
		}
		w.renewToken(o, door)
		return o.Status().State == string(mesh.Serving)
	})
	if !ok {
		return fmt.Errorf("%s did not join within %v: %v", office, limit, o.Status().JoinProgress)
	}
	w.note("%s has joined after %v", office, took.Round(time.Second))
	moved := false // an answer may be lost though it was done
	if err := asked("give "+office+" its people", func(ctx context.Context, by *Office, ops admin.Operations) error {
		err := ops.ChangeNode(ctx, admin.NodeChange{Name: office, Replaces: office, Gateway: &o.gateway})
		if e := (*admin.Error)(nil); moved && errors.As(err, &e) && e.Code == "node.nobody" {
			return nil
		}
		moved = true
		return err
	}); err != nil {
		return err
	}
	o.apart.Store(false)
	o.keepState(record.On)
	return nil
}

// steady is how long an office's peers must have seen it before its disk is made
// an older one: they could not tell otherwise, as the appliance's DESIGN.md says.
const steady = 15 * time.Second

// watched waits until an office and all others have run, with good lines between
// them, for long enough that they know how far it is.
func (w *World) watched(o *Office, limit time.Duration) bool {
	var since time.Time
	_, ok := w.within(limit, func() bool {
		others := w.belonging()
		ok := o.Up() && o.kept != nil
		for _, x := range others {
			p := x.process()
			ok = ok && p != nil && time.Since(p.began) > steady
		}
		w.mu.Lock()
		for _, x := range others {
			ok = ok && w.lines[[2]netip.Addr{x.Addr, o.Addr}] == line{} && w.lines[[2]netip.Addr{o.Addr, x.Addr}] == line{}
		}
		w.mu.Unlock()
		if !ok {
			since = time.Time{}
		} else if since.IsZero() {
			since = time.Now()
		}
		return ok && time.Since(since) > steady
	})
	return ok
}

func (x *player) image(o *Office) {
	defer x.w.decide()()
	if o.apart.Load() || !o.Up() {
		return
	}
	x.mask(o, 40*time.Second)
	if err := x.w.Image(o.Name); err != nil {
		x.w.note("no image: %v", err)
	}
}

// patience is how long a person waits until the mesh is as he needs it.
func (x *player) patience() time.Duration { return x.r.Plan.Length + 10*time.Minute }

func (x *player) restore(o *Office) {
	w := x.w
	defer w.decide()()
	if o.apart.Load() || o.kept == nil {
		return
	}
	if !w.watched(o, x.patience()) {
		w.note("%s is not restored: the others never knew how far it was", o.Name)
		return
	}
	x.mask(o, 40*time.Second)
	alone := w.onlyVoter(o)
	if err := w.Restore(o.Name); err != nil {
		w.violation(MeshRules, "%v", err)
		return
	}
	if alone != nil { // what it forgot only the other one has
		x.mustPromote(alone)
	}
	w.checked(MeshRules, 1)
	if took, ok := w.within(x.patience(), func() bool { return o.has("node.rolled-back") || !o.Up() }); ok {
		w.note("%s knows after %v that its disk is an older one", o.Name, took)
	} else {
		w.violation(MeshRules, "%s never heard that its disk is an older one", o.Name)
	}
	w.within(2*time.Minute, w.whole) // before anybody does the like to another
}

func (x *player) loseDisk(o *Office, away time.Duration) {
	w := x.w
	defer w.decide()()
	if o.apart.Load() || len(w.belonging()) < 2 {
		return
	}
	x.mask(o, 2*x.patience())
	w.LoseDisk(o.Name)
	time.Sleep(away)
	if others := w.belonging(); len(others) == 1 { // it may have had the only vote
		x.promote(others[0], time.Minute, o.Name)
	}
	if err := w.Replace(o.Name, x.patience()); err != nil {
		w.violation(HealsInTime, "%v", err)
	}
	w.within(2*time.Minute, w.whole)
	x.mu.Lock()
	defer x.mu.Unlock()
	x.masked[o.Name] = time.Now().Add(10 * time.Second)
}

// onlyVoter returns the other office of a mesh of two in which this one has the
// only vote; nil in all others.
func (w *World) onlyVoter(o *Office) *Office {
	offices := w.belonging()
	if len(offices) != 2 {
		return nil
	}
	other := offices[0]
	if other == o {
		other = offices[1]
	}
	alone := false
	w.within(time.Minute, func() bool { // it may be starting
		members := other.Status().Members
		alone = slices.ContainsFunc(members, func(m admin.Member) bool { return m.Name == o.Name && m.Role != string(mesh.RoleMember) })
		return len(members) == 2
	})
	if !alone {
		return nil
	}
	return other
}

// has reports whether an office's page shows a condition.
func (o *Office) has(condition string) bool {
	for _, c := range o.Status().Conditions {
		if c.Name == condition {
			return true
		}
	}
	return false
}
