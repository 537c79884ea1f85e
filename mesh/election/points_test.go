package election

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"path"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/raft"
	"github.com/hashicorp/raft-wal/types"

	"posthouse/mailstore/log/simfs"
	"posthouse/mesh"
)

// powered is a simulated disk whose power goes right before its operation at.
// The process is not ended there, since Raft has no way to be; what the disk
// would hold is kept, and what the process still does is not listened to.
type powered struct {
	fs   *simfs.FS
	mode simfs.Mode
	gone func() // called at that instant; may be nil

	mu   sync.Mutex // guards the rest
	n    int        // operations that there were
	at   int
	left *simfs.FS // by the cut
}

func power(mode simfs.Mode) *powered {
	disk := simfs.New()
	disk.WholeSectors = true // raft-wal writes behind what it has synced, in the same sector
	return &powered{fs: disk, mode: mode}
}

func (p *powered) step() *simfs.FS {
	p.mu.Lock()
	p.n++
	hit := p.n == p.at
	if hit {
		p.left = p.fs.Image(p.mode, uint64(p.at))
	}
	p.mu.Unlock()
	if hit && p.gone != nil {
		p.gone()
	}
	return p.fs
}

// cut returns what the power cut left on the disk; nil: it has not come.
func (p *powered) cut() *simfs.FS { p.mu.Lock(); defer p.mu.Unlock(); return p.left }

// in lets the power go k operations from now.
func (p *powered) in(k int) { p.mu.Lock(); p.at = p.n + k; p.mu.Unlock() }

func (p *powered) mkdir(dir string) error       { return p.step().MkdirAll(dir) }
func (p *powered) rename(from, to string) error { return p.step().Rename(from, to) }
func (p *powered) remove(name string) error     { return p.step().Remove(name) }
func (p *powered) sync(dir string) error        { return p.step().SyncDir(dir) }
func (p *powered) segments() types.VFS          { return segmentFiles{p} }

func (p *powered) open(name string) (file, error) {
	f, err := p.fs.OpenFile(name)
	if err != nil {
		return nil, err
	}
	return &poweredFile{logFile: f, p: p}, nil
}

func (p *powered) create(name string) (file, error) {
	if there, _ := p.exists(name); there {
		if err := p.remove(name); err != nil {
			return nil, err
		}
	}
	f, err := p.step().Create(name)
	if err != nil {
		return nil, err
	}
	return &poweredFile{logFile: f, p: p}, nil
}

func (p *powered) read(name string) ([]byte, error) {
	f, err := p.fs.OpenFile(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	size, err := f.Size()
	if err != nil {
		return nil, err
	}
	b := make([]byte, size)
	if n, err := f.ReadAt(b, 0); n < len(b) {
		return nil, err
	}
	return b, nil
}

func (p *powered) exists(name string) (bool, error) {
	_, err := p.fs.Stat(name)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil, err
}

func (p *powered) list(dir string) (names []string, _ error) {
	es, err := p.fs.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	for _, e := range es {
		names = append(names, e.Name)
	}
	return names, err
}

func (p *powered) removeAll(dir string) error {
	names, err := p.list(dir)
	if there, e := p.exists(dir); !there {
		return e
	}
	for _, n := range names {
		if err == nil {
			err = p.remove(path.Join(dir, n))
		}
	}
	if err == nil {
		err = p.remove(dir)
	}
	return err
}

type logFile interface {
	file
	Truncate(int64) error
}

type poweredFile struct {
	logFile
	p   *powered
	dir string // of a new file of raft-wal, until its first sync; guarded by raft-wal
}

func (f *poweredFile) WriteAt(b []byte, off int64) (int, error) {
	f.p.step()
	return f.logFile.WriteAt(b, off)
}

func (f *poweredFile) Sync() error {
	f.p.step()
	err := f.logFile.Sync()
	if err == nil && f.dir != "" {
		err = f.p.sync(f.dir)
		f.dir = ""
	}
	return err
}

// segmentFiles does what raft-wal's own file system does.
type segmentFiles struct{ p *powered }

func (s segmentFiles) ListDir(dir string) ([]string, error) { return s.p.list(dir) }
func (s segmentFiles) Create(dir, name string, size uint64) (types.WritableFile, error) {
	f, err := s.p.step().Create(path.Join(dir, name))
	if err != nil {
		return nil, err
	}
	s.p.step()
	return &poweredFile{logFile: f, p: s.p, dir: dir}, f.Truncate(int64(size))
}
func (s segmentFiles) Delete(dir, name string) error {
	if err := s.p.remove(path.Join(dir, name)); err != nil {
		return err
	}
	return s.p.sync(dir)
}
func (s segmentFiles) OpenReader(dir, name string) (types.ReadableFile, error) {
	return s.p.open(path.Join(dir, name))
}
func (s segmentFiles) OpenWriter(dir, name string) (types.WritableFile, error) {
	return s.p.open(path.Join(dir, name))
}

func on(t testing.TB, p *powered) *FileStorage {
	t.Helper()
	s, err := newFileStorage(p, "/election")
	if err != nil {
		t.Fatal(err)
	}
	s.segmentSize = 2 << 10
	return s
}

// kept is what was answered for, and what was asked for last.
type kept struct {
	done, asked struct {
		term  uint64
		voted string
		first uint64
		last  uint64
		snap  uint64
		value string
	}
}

// storesAt uses the stores as Raft and the election do, on a disk whose power
// goes before operation k, and checks what is there afterwards: all that was
// answered for, and nothing that was never asked for.
func storesAt(t *testing.T, k int, mode simfs.Mode) (met bool) {
	p := power(mode)
	p.in(k)
	var s kept
	do := func(f func() error) {
		if err := f(); err != nil {
			t.Fatal(err)
		}
		if p.cut() == nil {
			s.done = s.asked
		}
	}
	ask := func(f func() error) {
		if p.cut() == nil {
			do(f)
		}
	}
	quiet := slog.New(slog.DiscardHandler)
	files := on(t, p)
	st, err := files.open(quiet, func(error) {})
	if err != nil {
		t.Fatal(err)
	}
	next := uint64(1)
	for i := range uint64(12) {
		ask(func() error { s.asked.term = i + 1; return st.stable.SetUint64([]byte("CurrentTerm"), i+1) })
		ask(func() error {
			s.asked.voted = fmt.Sprint("node ", i)
			return st.stable.Set([]byte("LastVoteCand"), []byte(s.asked.voted))
		})
		ask(func() error {
			s.asked.last = next + 1
			return st.log.StoreLogs([]*raft.Log{entry(int(next)), entry(int(next + 1))})
		})
		next += 2
		if p.cut() == nil {
			st.log.applied(s.done.last)
		}
		switch i {
		case 4, 9:
			ask(func() error {
				s.asked.value = fmt.Sprint("value ", i)
				return files.save("record", []byte(s.asked.value))
			})
			time.Sleep(time.Second) // the commit index is synced
		case 6:
			ask(func() error {
				s.asked.snap = next - 3
				k, err := st.snapshots.Create(1, next-3, 1, raft.Configuration{}, 1, nil)
				if err != nil {
					return err
				}
				if _, err := io.WriteString(k, "the state"); err != nil {
					return err
				}
				return k.Close()
			})
			ask(func() error { s.asked.first = next - 3; return st.log.DeleteRange(1, next-4) })
		}
	}
	if err := st.close(); err != nil {
		t.Fatal(err)
	}
	left := p.cut()
	if left == nil {
		return false
	}
	p = &powered{fs: left}
	files = on(t, p)
	st, err = files.open(quiet, func(err error) { t.Error(err) })
	if err != nil {
		t.Errorf("open: %v", err)
		return true
	}
	defer st.close()
	among := func(what string, got, done, asked any) {
		t.Helper()
		if got != done && got != asked {
			t.Errorf("%s is %v, answered was %v, asked for last %v", what, got, done, asked)
		}
	}
	term, err := st.stable.GetUint64([]byte("CurrentTerm"))
	if err != nil && s.done.term > 0 {
		t.Error(err)
	}
	among("term", term, s.done.term, s.asked.term)
	voted, err := st.stable.Get([]byte("LastVoteCand"))
	if err != nil && s.done.voted != "" {
		t.Error(err)
	}
	among("vote", string(voted), s.done.voted, s.asked.voted)
	value, err := files.load("record")
	if err != nil {
		t.Error(err)
	}
	among("record", string(value), s.done.value, s.asked.value)
	last, err := st.log.LastIndex()
	if err != nil {
		t.Error(err)
	}
	if last < s.done.last || last > s.asked.last {
		t.Errorf("the log ends at %d, answered was %d, asked for %d", last, s.done.last, s.asked.last)
	}
	first, err := st.log.FirstIndex()
	if err != nil {
		t.Error(err)
	}
	for i := max(first, 1); i <= last; i++ {
		var e raft.Log
		if err := st.log.GetLog(i, &e); err != nil || !bytes.Equal(e.Data, entry(int(i)).Data) {
			t.Errorf("entry %d: %v", i, err)
		}
	}
	if at, err := st.log.known(); err != nil || at > s.done.last {
		t.Errorf("known %d, %v", at, err)
	}
	snaps, err := st.snapshots.List()
	if err != nil {
		t.Error(err)
	}
	snap := uint64(0)
	if len(snaps) > 0 {
		snap = snaps[0].Index
	}
	among("snapshot", snap, s.done.snap, s.asked.snap)
	if first > max(snap+1, s.done.first, 1) && first > s.asked.first {
		t.Errorf("the log begins at %d, the snapshot is at %d", first, snap)
	}
	if err := st.log.StoreLogs([]*raft.Log{entry(int(last + 1))}); err != nil {
		t.Errorf("the log does not go on: %v", err)
	}
	return true
}

// say names the point at which a test has failed.
func say(t *testing.T, k int, mode simfs.Mode) {
	if t.Failed() {
		t.Logf("the power went before operation %d, %s", k, mode)
	}
}

var modes = []simfs.Mode{simfs.LoseAll, simfs.KeepAll, simfs.Random, simfs.Torn}

// FAULTS I3: what Raft and the election were told is on disk is there.
func TestEveryDiskOperationOfTheStoresIsACrashPoint(t *testing.T) {
	points := 0
	for _, mode := range modes {
		for k, met := 1, true; met && !t.Failed(); k++ {
			synctest.Test(t, func(t *testing.T) {
				defer say(t, k, mode)
				met = storesAt(t, k, mode)
			})
			points++
		}
	}
	if t.Logf("%d points", points); points < 400 {
		t.Error("too few")
	}
}

// script is what people ask of the domain state while the power goes.
type script struct {
	p        *powered
	answered []string
	tried    []string
}

// say makes a command at a node. It counts as answered when the victim's power
// was still there after the answer, or the node is another.
func (s *script) say(n *node, victim bool) {
	n.w.n++
	id := fmt.Sprintf("c%d", n.w.n)
	s.tried = append(s.tried, id)
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	_, err := n.Propose(ctx, []byte(id+" x"))
	if err == nil && (!victim || s.p.cut() == nil) {
		s.answered = append(s.answered, id)
	}
}

// check wants what was answered once, and what was not at most once.
func (s *script) check(t *testing.T, n *node) {
	t.Helper()
	text := n.m.text()
	for _, id := range s.tried {
		count := strings.Count(text, " "+id+" ")
		if count > 1 || count == 0 && slices.Contains(s.answered, id) {
			t.Errorf("%s stands %d times in the state of %s; answered %v", id, count, n.id, s.answered)
		}
	}
}

// aloneAt founds a mesh of one node and makes commands there.
func aloneAt(t *testing.T, k int, mode simfs.Mode) (met bool) {
	bubble(t, func(t *testing.T, w *world) {
		defer say(t, k, mode)
		p := power(mode)
		p.in(k)
		s := &script{p: p}
		n := w.start(1, on(t, p))
		if _, err := n.Bootstrap(t.Context()); err != nil {
			t.Fatal(err)
		}
		founded := p.cut() == nil
		n.say("admit %s 0", n.id)
		admitted := p.cut() == nil
		for range 3 {
			s.say(n, true)
		}
		time.Sleep(time.Second)
		s.say(n, true)
		n.shut()
		if met = p.cut() != nil; !met {
			return
		}
		n = w.start(1, on(t, &powered{fs: p.cut()}))
		time.Sleep(time.Second)
		if n.State().Authority.Generation == 0 {
			if founded {
				t.Error("it has forgotten that it was founded")
			}
			if _, err := n.Bootstrap(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		if !strings.Contains(n.m.text(), "admit") {
			if admitted {
				t.Error("it has forgotten that it was admitted")
			}
			n.say("admit %s 0", n.id)
		}
		n.say("goes on")
		s.check(t, n)
	})
	return met
}

// threeAt takes the power of one of three voters, node 1 leading, while
// commands are made and the lead changes.
func threeAt(t *testing.T, victim mesh.NodeID, k int, mode simfs.Mode) (met bool) {
	bubble(t, func(t *testing.T, w *world) {
		defer say(t, k, mode)
		p := power(mode)
		others := slices.DeleteFunc([]mesh.NodeID{1, 2, 3}, func(id mesh.NodeID) bool { return id == victim })
		p.gone = func() {
			for _, o := range others {
				w.net.cut(victim, o, true)
			}
		}
		w.found(3, func(id mesh.NodeID) Storage {
			if id == victim {
				return on(t, p)
			}
			return NewMemStorage()
		})
		s := &script{p: p}
		p.in(k)
		s.say(w.nodes[3], victim == 3)
		s.say(w.nodes[victim], true)
		if m := w.master(1, 2, 3); m != nil {
			m.TransferTo(t.Context(), others[0])
		}
		s.say(w.nodes[others[1]], false)
		time.Sleep(time.Second)
		s.say(w.nodes[victim], true)
		if met = p.cut() != nil; !met {
			return
		}
		w.nodes[victim].shut()
		s.say(w.nodes[others[0]], false)
		w.start(victim, on(t, &powered{fs: p.cut()}))
		w.isolate(victim, false)
		w.until(time.Minute, "all agree", func() bool { return w.master(1, 2, 3) != nil && w.equal(1, 2, 3) })
		s.say(w.nodes[victim], true)
		for _, id := range []mesh.NodeID{1, 2, 3} {
			s.check(t, w.nodes[id])
		}
	})
	return met
}

// FAULTS I3 for a command of the domain state, on the whole election.
func TestEveryDiskOperationOfACommandIsACrashPoint(t *testing.T) {
	for name, at := range map[string]func(*testing.T, int, simfs.Mode) bool{
		"alone":    aloneAt,
		"leader":   func(t *testing.T, k int, m simfs.Mode) bool { return threeAt(t, 1, k, m) },
		"follower": func(t *testing.T, k int, m simfs.Mode) bool { return threeAt(t, 2, k, m) },
	} {
		t.Run(name, func(t *testing.T) {
			points := 0
			for _, mode := range modes {
				for k, met := 1, true; met && !t.Failed(); k++ {
					met = at(t, k, mode)
					points++
				}
			}
			if t.Logf("%d points", points); points < 100 {
				t.Error("too few")
			}
		})
	}
}
