package kv

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/dgraph-io/badger/v4"
	"golang.org/x/sys/unix"
)

func fill(t testing.TB, v *View, from, n uint64, size int) {
	t.Helper()
	for seq := from; seq < from+n; seq++ {
		var b Batch
		b.Put(fmt.Appendf(nil, "k%08d", seq*7919%n), bytes.Repeat([]byte{byte(seq)}, size))
		if err := v.Apply(seq, &b); err != nil {
			t.Fatal(err)
		}
	}
	if err := v.Flush(context.Background()); err != nil {
		t.Fatal(err)
	}
}

func TestBadgerIsRunWithTheOptionsThatKeepData(t *testing.T) {
	o := badgerOptions("x", 4<<20, slog.New(slog.DiscardHandler), func() {})
	if !o.SyncWrites || o.ReadOnly || o.BypassLockGuard || o.NumCompactors != 2 || o.NumMemtables != 2 {
		t.Errorf("%+v", o)
	}
	if MaxValue >= o.ValueThreshold {
		t.Errorf("a value of %d bytes goes to the value log: threshold %d", MaxValue, o.ValueThreshold)
	}
}

func TestNothingReachesTheValueLog(t *testing.T) {
	o := Options{Dir: t.TempDir(), Ballast: -1, MemTable: 4 << 20}
	v, err := Open(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	defer v.Close()
	fill(t, v, 1, 50, MaxValue)
	logs, err := filepath.Glob(filepath.Join(o.Dir, rowsDir, "*.vlog"))
	if err != nil || len(logs) != 1 {
		t.Fatal(logs, err)
	}
	b, err := os.ReadFile(logs[0])
	if err != nil {
		t.Fatal(err)
	}
	if rest := bytes.TrimRight(b[20:], "\x00"); len(rest) > 0 {
		t.Fatalf("%d bytes in the value log", len(rest))
	}
}

func TestTheGateIsAskedByARealCompaction(t *testing.T) {
	var asked atomic.Int64
	db, err := badger.Open(badgerOptions(t.TempDir(), 4<<20, slog.New(slog.DiscardHandler), func() { asked.Add(1) }))
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	for i := range 60 {
		if err := setRaw(db, fmt.Appendf(nil, "%d", i), make([]byte, MaxValue)); err != nil {
			t.Fatal(err)
		}
	}
	if err := db.Flatten(1); err != nil { // what the compactors have left to do
		t.Fatal(err)
	}
	if asked.Load() == 0 {
		t.Fatal("Badger made tables without saying so: look for its new message before CreateTable")
	}
}

func TestTheWriteAheadFilesHaveTheirBlocksBeforeBadgerMapsThem(t *testing.T) {
	v, err := Open(t.Context(), Options{Dir: t.TempDir(), Ballast: -1, MemTable: 4 << 20, Delay: -1})
	if err != nil {
		t.Fatal(err)
	}
	defer v.Close()
	st := v.st.(*badgerStore)
	seq := uint64(1)
	for round := range 3 {
		first := st.nextMem
		for st.nextMem == first {
			fill(t, v, seq, 1, 400<<10)
			seq++
		}
		// first is the one in use now: Badger extended it, the blocks stayed.
		for n, size := range map[int]int64{first: 2 * st.memTable, st.nextMem: 0} {
			var s unix.Stat_t
			if err := unix.Stat(st.memPath(n), &s); err != nil {
				t.Fatal(err)
			}
			if s.Size != size || s.Blocks*512 < 2*st.memTable {
				t.Fatalf("round %d, file %d: length %d, %d bytes of blocks; want %d and %d", round, n, s.Size, s.Blocks*512, size, 2*st.memTable)
			}
		}
	}
}

// marks is a view's folder with what processes that were killed leave in it.
type marks struct {
	t    *testing.T
	opt  Options
	why  []string // it was set aside
	view *View
}

func newMarks(t *testing.T) *marks {
	m := &marks{t: t}
	m.opt = Options{Dir: t.TempDir(), Ballast: -1, MemTable: 4 << 20, Rebuilding: func(s string) { m.why = append(m.why, s) }}
	m.open()
	fill(t, m.view, 1, 10, 10)
	m.view.Close()
	if m.mark() != "" {
		t.Fatal("the mark stayed")
	}
	return m
}

func (m *marks) open() {
	m.t.Helper()
	v, err := Open(m.t.Context(), m.opt)
	if err != nil {
		m.t.Fatal(err)
	}
	m.view = v
}

func (m *marks) mark() string {
	b, _ := os.ReadFile(filepath.Join(m.opt.Dir, markFile))
	return string(b)
}

func (m *marks) leave(mark string) {
	if err := os.WriteFile(filepath.Join(m.opt.Dir, markFile), []byte(mark), 0o600); err != nil {
		m.t.Fatal(err)
	}
}

// kill ends a process that had the view open.
func (m *marks) kill() {
	mark := m.mark()
	m.view.Abort()
	if mark != "" {
		m.leave(mark)
	}
}

// whole checks that it is the view that was filled.
func (m *marks) whole() {
	m.t.Helper()
	if m.view.Applied() != 10 || len(m.why) != 0 {
		m.t.Fatalf("at record %d, set aside: %q", m.view.Applied(), m.why)
	}
}

func (m *marks) setAside(why string) {
	m.t.Helper()
	if m.view.Applied() != 0 || len(m.why) != 1 || m.why[0] != why {
		m.t.Fatalf("at record %d, set aside: %q; want %q", m.view.Applied(), m.why, why)
	}
}

func TestTheSecondCrashInOpenSetsTheViewAside(t *testing.T) {
	m := newMarks(t)
	for _, left := range []string{"opens 1 stands 0\n", "", "opens 1 stands 4\n"} { // "": it ended while it wrote
		m.leave(left)
		m.open()
		m.whole()
		m.view.Abort()
	}
	m.leave("opens 2 stands 1\n")
	m.open()
	m.setAside("opening it ended the process 2 times")
	fill(t, m.view, 1, 10, 10)
	m.view.Close()
	m.leave("opens 2 stands 0\n")
	m.open()
	m.view.Close()
	old, _ := filepath.Glob(filepath.Join(m.opt.Dir, asidePrefix+"-*"))
	if len(old) != 1 || !strings.HasSuffix(old[0], "-2") {
		t.Fatal("set aside:", old)
	}
}

func TestKillsOfAnIdleNodeLeaveTheViewAlone(t *testing.T) {
	m := newMarks(t)
	for range maxStands {
		m.open()
		m.whole()
		m.kill()
	}
	// Badger may end it again and again soon after the open, too.
	m.open()
	m.setAside("the process ended 5 times within 10s after it was opened")
	m.view.Close()
}

func TestAMarkThatCannotBeWrittenSetsNoViewAside(t *testing.T) {
	o := Options{Dir: t.TempDir(), Ballast: -1, MemTable: 4 << 20}
	o.ID = func() uint64 { // Badger is open by now, and the mark of the opening is written
		mark := filepath.Join(o.Dir, markFile)
		if err := errors.Join(os.Remove(mark), os.Mkdir(mark, 0o700)); err != nil {
			t.Error(err)
		}
		return 1
	}
	o.Rebuilding = func(why string) { t.Error("set aside:", why) }
	if v, err := Open(t.Context(), o); err == nil {
		v.Close()
		t.Error("opened without its mark")
	}
	if old, _ := filepath.Glob(filepath.Join(o.Dir, asidePrefix+"-*")); len(old) > 0 {
		t.Error("set aside:", old)
	}
}

func TestAViewThatHasStoodIsProven(t *testing.T) {
	m := newMarks(t)
	m.opt.standing = time.Nanosecond
	for range maxStands + 1 {
		m.open()
		m.whole()
		for m.mark() != "" {
			runtime.Gosched()
		}
		m.kill()
	}
}

func TestOpensWithNothingToWriteAreNoCrashes(t *testing.T) {
	o := Options{Dir: t.TempDir(), Ballast: -1, MemTable: 4 << 20}
	o.Rebuilding = func(why string) { t.Error("set aside:", why) }
	v, err := Open(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	fill(t, v, 1, 3, 10)
	for range 4 {
		if err := v.Close(); err != nil {
			t.Fatal(err)
		}
		if v, err = Open(t.Context(), o); err != nil {
			t.Fatal(err)
		}
		if v.Applied() != 3 {
			t.Fatal(v.Applied())
		}
	}
	v.Close()
}

func TestDamageIsReportedAndTheViewSetAside(t *testing.T) {
	for _, name := range []string{"MANIFEST", "while open"} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			var why []string
			var damage atomic.Int64
			o := Options{Dir: dir, Ballast: -1, MemTable: 4 << 20, Rebuilding: func(s string) { why = append(why, s) }, Damaged: func(error) { damage.Add(1) }}
			v, err := Open(t.Context(), o)
			if err != nil {
				t.Fatal(err)
			}
			fill(t, v, 1, 20_000, 500)
			v.Close()
			if name == "while open" {
				if v, err = Open(t.Context(), o); err != nil {
					t.Fatal(err)
				}
			}
			files, _ := filepath.Glob(filepath.Join(dir, rowsDir, "*"))
			for _, f := range files {
				if !strings.HasSuffix(f, ".sst") && name != "MANIFEST" || !strings.HasSuffix(f, "MANIFEST") && name == "MANIFEST" {
					continue
				}
				fd, err := os.OpenFile(f, os.O_RDWR, 0)
				if err != nil {
					t.Fatal(err)
				}
				fi, _ := fd.Stat()
				for off := int64(10); off < fi.Size()/2; off += 5000 {
					fd.WriteAt([]byte("damage"), off)
				}
				fd.Close()
			}
			if name == "while open" {
				err := v.Verify()
				if !errors.Is(err, ErrDamaged) || damage.Load() != 1 {
					t.Fatalf("damage was not found: %v, told %d times", err, damage.Load())
				}
				t.Log(err)
				v.Close()
			}
			if v, err = Open(t.Context(), o); err != nil {
				t.Fatal(err)
			}
			defer v.Close()
			if v.Applied() != 0 || len(why) != 1 {
				t.Fatal(v.Applied(), why)
			}
			t.Log(why)
		})
	}
}

func TestAnUnknownFormatIsSetAside(t *testing.T) {
	var why []string
	o := Options{Dir: t.TempDir(), Ballast: -1, MemTable: 4 << 20, Rebuilding: func(s string) { why = append(why, s) }}
	v, err := Open(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	fill(t, v, 1, 10, 10)
	v.Close()
	db, err := badgerOpenRaw(filepath.Join(o.Dir, rowsDir))
	if err != nil {
		t.Fatal(err)
	}
	if err := setRaw(db, []byte{keyMeta}, []byte{0xff, 1, 2}); err != nil {
		t.Fatal(err)
	}
	db.Close()
	if v, err = Open(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	defer v.Close()
	if v.Applied() != 0 || len(why) != 1 || !strings.Contains(why[0], "format") {
		t.Fatal(v.Applied(), why)
	}
}

func TestNetworkFileSystemsAreRefused(t *testing.T) {
	for typ, name := range remoteFS {
		_, err := Open(t.Context(), Options{Dir: t.TempDir(), Statfs: func(string) (FS, error) {
			return FS{Total: 1 << 40, Free: 1 << 40, Type: typ}, nil
		}})
		if err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestAFullDiskIsNotOpened(t *testing.T) {
	dir := t.TempDir()
	_, err := Open(t.Context(), Options{Dir: dir, Statfs: func(string) (FS, error) {
		return FS{Total: 1 << 40, Free: 1 << 20}, nil
	}})
	if err == nil || !strings.Contains(err.Error(), "1 MiB free") {
		t.Fatal(err)
	}
}

func TestAnInterruptedBigCommitIsEndedAtOpen(t *testing.T) {
	dir := t.TempDir()
	o := Options{Dir: dir, Ballast: -1, MemTable: 4 << 20}
	rows := make([]row, 50_000)
	for i := range rows {
		rows[i] = row{key: fmt.Appendf(nil, "k%06d", i), value: []byte("new")}
	}
	for _, cut := range []string{"before the redo counts", "before the rows", "between the rows"} {
		t.Run(cut, func(t *testing.T) {
			o.Dir = filepath.Join(dir, cut)
			v, err := Open(t.Context(), o)
			if err != nil {
				t.Fatal(err)
			}
			fill(t, v, 1, 10, 10)
			st := v.st.(*badgerStore)
			m, _, err := st.read()
			if err != nil {
				t.Fatal(err)
			}
			var all []byte
			for _, r := range rows {
				all = appendRow(all, r)
			}
			n := uint32(0)
			for b := all; len(b) > 0; n++ {
				var part []byte
				for len(b) > 0 && len(part) < 100_000 {
					r, rest, err := cutRow(b)
					if err != nil {
						t.Fatal(err)
					}
					part, b = appendRow(part, r), rest
				}
				if err := setRaw(st.db, redoKey(n), part); err != nil {
					t.Fatal(err)
				}
			}
			want := 0
			if cut != "before the redo counts" {
				want = len(rows)
				m.redo, m.redoSeq = n, 11
				if err := setRaw(st.db, []byte{keyMeta}, m.encode()); err != nil {
					t.Fatal(err)
				}
			}
			if cut == "between the rows" {
				if err := setRaw(st.db, append([]byte{keyRow}, rows[0].key...), rows[0].value); err != nil {
					t.Fatal(err)
				}
			}
			v.Abort()
			if v, err = Open(t.Context(), o); err != nil {
				t.Fatal(err)
			}
			defer v.Close()
			got := 0
			v.Scan([]byte("k"), nil, func(_, val []byte) bool {
				if string(val) == "new" {
					got++
				}
				return true
			})
			if at := v.Applied(); got != want || at != uint64(10+min(want, 1)) {
				t.Fatalf("%d rows at position %d, want %d", got, at, want)
			}
		})
	}
}
