package kv

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// The folder of a view.
const (
	rowsDir     = "db"       // Badger's own folder
	asidePrefix = "db.aside" // db.aside-N: the one view that was set aside last
	markFile    = "opening"  // there while a view is not proven; holds a trial
	damageFile  = "damaged"  // there when a read met damage; holds what was met
	ballastFile = "ballast"
	lockName    = "lock"
)

// When a process ends that has a view open, nobody can say whether the view was
// the cause. So a view is on trial until it was written, was closed in good
// order, or has stood for a while; ends in a row during a trial set it aside.
const (
	// maxOpens is how many may fall into the opening itself, which is short:
	// that was hardly somebody's kill.
	maxOpens = 2
	// maxStands is how many may follow within standing after an open that was
	// done: a node that is killed and started again and again looks the same,
	// and a view is not made anew for nothing.
	maxStands = 5
	// standing is by when Badger has done what it does of itself after an open:
	// its compactors begin within a second.
	standing = 10 * time.Second
)

// trial counts the ends in a row of processes whose view was not proven.
type trial struct{ opens, stands int }

// guilty says why a view is to be set aside, or "".
func (t trial) guilty() string {
	switch {
	case t.opens >= maxOpens:
		return fmt.Sprintf("opening it ended the process %d times", t.opens)
	case t.stands >= maxStands:
		return fmt.Sprintf("the process ended %d times within %v after it was opened", t.stands, standing)
	}
	return ""
}

// files is the folder of a view, locked against other processes.
type files struct {
	dir    string
	lock   *os.File
	marked atomic.Bool
}

// lockFiles makes and locks the folder.
func lockFiles(opt Options) (*files, error) {
	if err := os.MkdirAll(opt.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("make view folder: %w", err)
	}
	fs, err := opt.Statfs(opt.Dir)
	if err != nil {
		return nil, fmt.Errorf("statfs %s: %w", opt.Dir, err)
	}
	if name, bad := remoteFS[fs.Type]; bad {
		return nil, fmt.Errorf("open view %s on %s: %w", opt.Dir, name, ErrFS)
	}
	l, err := os.OpenFile(filepath.Join(opt.Dir, lockName), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock view: %w", err)
	}
	if err := unix.Flock(int(l.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		l.Close()
		return nil, fmt.Errorf("open %s: %w", opt.Dir, ErrLocked)
	}
	return &files{dir: opt.Dir, lock: l}, nil
}

func (f *files) release() { f.lock.Close() }

func (f *files) path(name string) string { return filepath.Join(f.dir, name) }

// trial returns what the last processes left.
func (f *files) trial() (t trial) {
	b, err := os.ReadFile(f.path(markFile))
	if err != nil {
		return trial{}
	}
	if n, _ := fmt.Sscanf(string(b), "opens %d stands %d\n", &t.opens, &t.stands); n != 2 {
		return trial{opens: 1} // the process ended while the mark was written
	}
	return t
}

// mark notes, on disk, how the trial stands should the process end now.
func (f *files) mark(t trial) error {
	if err := writeSynced(f.path(markFile), fmt.Sprintf("opens %d stands %d\n", t.opens, t.stands)); err != nil {
		return fmt.Errorf("mark view: %w", err)
	}
	f.marked.Store(true)
	return nil
}

// proven removes the mark.
func (f *files) proven() {
	if f.marked.CompareAndSwap(true, false) {
		os.Remove(f.path(markFile))
	}
}

// noteDamage makes the next open set the view aside.
func (f *files) noteDamage(err error) { _ = writeSynced(f.path(damageFile), err.Error()+"\n") }

// damage returns what a read met, or "".
func (f *files) damage() string {
	b, err := os.ReadFile(f.path(damageFile))
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b)) + " "
}

// setAside renames the rows, in place of those that were set aside before.
func (f *files) setAside(reason string) error {
	old, err := filepath.Glob(f.path(asidePrefix + "-*"))
	if err != nil {
		return err
	}
	n := 0
	for _, o := range old {
		i, _ := strconv.Atoi(strings.TrimPrefix(filepath.Base(o), asidePrefix+"-"))
		n = max(n, i)
		if err := os.RemoveAll(o); err != nil {
			return fmt.Errorf("remove old view: %w", err)
		}
	}
	to := f.path(asidePrefix + "-" + strconv.Itoa(n+1))
	if err := os.Rename(f.path(rowsDir), to); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("set view aside: %w", err)
	} else if err == nil {
		_ = writeSynced(filepath.Join(to, "WHY"), reason+"\n") // for a person only
	}
	return f.fresh()
}

// drop deletes the rows.
func (f *files) drop() error {
	if err := os.RemoveAll(f.path(rowsDir)); err != nil {
		return fmt.Errorf("remove view: %w", err)
	}
	return f.fresh()
}

// dropAside gives back the space of what was set aside.
func (f *files) dropAside() {
	old, _ := filepath.Glob(f.path(asidePrefix + "-*"))
	for _, o := range old {
		os.RemoveAll(o)
	}
}

func (f *files) fresh() error {
	for _, n := range []string{markFile, damageFile} {
		if err := os.Remove(f.path(n)); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	return syncDir(f.dir)
}

func writeSynced(path, text string) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.WriteString(text)
	if e := f.Sync(); err == nil {
		err = e
	}
	if e := f.Close(); err == nil {
		err = e
	}
	if e := syncDir(filepath.Dir(path)); err == nil {
		err = e
	}
	return err
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	err = d.Sync()
	if e := d.Close(); err == nil {
		err = e
	}
	return err
}

// openStore opens what opt names and sets v to it.
func (v *View) openStore() error {
	if v.opt.Memory {
		return v.openMemory()
	}
	f, err := lockFiles(v.opt)
	if err != nil {
		return err
	}
	if err := v.openFiles(f); err != nil {
		f.release()
		return fmt.Errorf("open view %s: %w", v.opt.Dir, err)
	}
	return nil
}

func (v *View) openMemory() error {
	if v.opt.Kept == nil {
		v.opt.Kept = new(Memory)
	}
	st, err := openMemory(v.opt.Kept)
	if err != nil {
		return err
	}
	m, ok, err := st.meta()
	if err != nil {
		v.opt.Kept.clear()
		v.opt.Rebuilding(err.Error())
		st.close()
		if st, err = openMemory(v.opt.Kept); err != nil {
			return err
		}
	}
	if !ok {
		m = meta{ID: v.opt.ID()}
	}
	v.st = st
	if v.opt.Statfs != nil {
		if v.space, err = newSpace(v.opt, ""); err != nil {
			return err
		}
	}
	return v.begin(m)
}

func (v *View) openFiles(f *files) error {
	sp, err := newSpace(v.opt, f.path(ballastFile))
	if err != nil {
		return err
	}
	if !sp.enough() {
		f.dropAside()
		sp.sink()
	}
	if !sp.enough() {
		return fmt.Errorf("%d MiB free, %d needed: %w", sp.free()>>20, sp.need>>20, ErrNoSpace)
	}
	again := func(reason string) error {
		v.opt.Logger.Warn("view set aside, it will be rebuilt from the log", "reason", reason)
		v.opt.Rebuilding(reason)
		return f.setAside(reason)
	}
	t := f.trial()
	why := t.guilty()
	if d := f.damage(); d != "" {
		why = "damaged: " + d
	}
	if why != "" {
		if err := again(why); err != nil {
			return err
		}
		t = trial{}
	}
	for first := true; ; first = false {
		if err := f.mark(trial{t.opens + 1, t.stands}); err != nil {
			return err
		}
		st, m, err := openBadger(f.path(rowsDir), sp.memTable, v.opt, sp)
		if err == nil {
			v.st, v.files, v.space, v.opened = st, f, sp, time.Now()
			if err = v.begin(m); err == nil {
				if err = f.mark(trial{0, t.stands + 1}); err != nil {
					st.close()
					return err // the view is sound: it is not set aside for that
				}
				sp.float()
				sp.watch()
				return nil
			}
			st.close()
		}
		if !first || sp.low() {
			return err
		}
		if err := again(err.Error()); err != nil {
			return err
		}
		t = trial{}
	}
}
