package election

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/raft"

	"posthouse/mesh"
)

func openFiles(t testing.TB, dir string) (*stores, error) {
	s, err := NewFileStorage(dir)
	if err != nil {
		t.Fatal(err)
	}
	s.segmentSize = 64 << 10
	return s.open(slog.New(slog.DiscardHandler), func(error) {})
}

// filled writes n entries and a term, and returns the folder of a closed store.
func filled(t testing.TB, n int) string {
	dir := t.TempDir()
	st, err := openFiles(t, dir)
	if err != nil {
		t.Fatal(err)
	}
	for i := 1; i <= n; i++ {
		if err := st.log.StoreLog(entry(i)); err != nil {
			t.Fatal(err)
		}
	}
	if err := st.stable.SetUint64([]byte("CurrentTerm"), 42); err != nil {
		t.Fatal(err)
	}
	st.log.applied(uint64(n))
	if err := st.close(); err != nil {
		t.Fatal(err)
	}
	return dir
}

func entry(i int) *raft.Log {
	return &raft.Log{Index: uint64(i), Term: uint64(1 + i/10), Type: raft.LogCommand, Data: bytes.Repeat([]byte{byte(i)}, 50+i), Extensions: []byte("x"),
		AppendedAt: time.Unix(1_800_000_000, int64(i))}
}

// right reports whether the store holds what filled wrote, or says it is
// damaged; anything else fails the test.
func right(t testing.TB, dir string, n int, what string) (whole bool) {
	st, err := openFiles(t, dir)
	if err != nil {
		if !errors.Is(err, ErrDamaged) {
			t.Fatalf("%s: %v", what, err)
		}
		return false
	}
	defer st.close()
	last, err := st.log.LastIndex()
	if err != nil {
		t.Fatal(err)
	}
	for i := 1; i <= int(last); i++ {
		var e raft.Log
		if err := st.log.GetLog(uint64(i), &e); err != nil {
			t.Fatalf("%s: entry %d: %v", what, i, err)
		}
		w := entry(i)
		if e.Index != w.Index || e.Term != w.Term || e.Type != w.Type || !bytes.Equal(e.Data, w.Data) || !bytes.Equal(e.Extensions, w.Extensions) || !e.AppendedAt.Equal(w.AppendedAt) {
			t.Fatalf("%s: entry %d reads %+v", what, i, e)
		}
	}
	term, err := st.stable.GetUint64([]byte("CurrentTerm"))
	if err != nil || term != 42 {
		t.Fatalf("%s: term %d, %v", what, term, err)
	}
	if k, _ := st.log.known(); k > uint64(n) {
		t.Fatalf("%s: known %d", what, k)
	}
	return int(last) == n
}

func TestTheLogOpensAgainOverManySegments(t *testing.T) {
	dir := filled(t, 1500)
	es, _ := filepath.Glob(filepath.Join(dir, "raft", "*.wal"))
	if len(es) < 3 {
		t.Fatalf("%d segments", len(es))
	}
	for range 2 {
		if !right(t, dir, 1500, "reopened") {
			t.Fatal("not whole")
		}
	}
}

func TestAFlippedBitIsNeverWrongData(t *testing.T) {
	const n = 40
	dir := filled(t, n)
	files, _ := os.ReadDir(filepath.Join(dir, "raft"))
	noticed, harmless, cut := 0, 0, 0
	for _, f := range files {
		path := filepath.Join(dir, "raft", f.Name())
		whole, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		used := len(bytes.TrimRight(whole, "\x00"))
		for at := 0; at < used; at += 1 + used/150 {
			bad := bytes.Clone(whole)
			bad[at] ^= 1 << (at % 8)
			os.WriteFile(path, bad, 0o600)
			what := fmt.Sprintf("%s byte %d", f.Name(), at)
			switch ok := right(t, dir, n, what); {
			case ok:
				harmless++
			default:
				noticed++
				// raft-wal takes a bad last batch for a torn write; what was
				// committed is known, so that is noticed too.
				if st, err := openFiles(t, dir); err == nil {
					cut++
					st.close()
				}
			}
			os.WriteFile(path, whole, 0o600)
		}
	}
	t.Logf("%d noticed, %d harmless, %d cut", noticed, harmless, cut)
	if cut > 0 {
		t.Errorf("%d flips cut committed entries off in silence", cut)
	}
}

func TestOneDamagedSlotOfTheMetaFileCostsNothing(t *testing.T) {
	dir := filled(t, 5)
	path := filepath.Join(dir, "raft", "meta")
	whole, _ := os.ReadFile(path)
	for slot := range 2 {
		bad := bytes.Clone(whole)
		bad[slot*slotSize+30] ^= 4
		os.WriteFile(path, bad, 0o600)
		if !right(t, dir, 5, fmt.Sprint("slot ", slot)) {
			t.Errorf("slot %d cost something", slot)
		}
	}
	bad := bytes.Clone(whole)
	bad[30] ^= 4
	bad[slotSize+30] ^= 4
	os.WriteFile(path, bad, 0o600)
	if right(t, dir, 5, "both slots") {
		t.Error("both slots damaged, nothing noticed")
	}
}

func TestASnapshotIsWholeOrRefused(t *testing.T) {
	s := snapshotFiles{osDisk{}, t.TempDir()}
	conf := raft.Configuration{Servers: []raft.Server{{ID: "1", Address: "1"}}}
	for i := range uint64(4) {
		k, err := s.Create(1, 10+i, 3, conf, 1, nil)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(k, "state %d", i)
		if err := k.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if k, _ := s.Create(1, 99, 3, conf, 1, nil); k.Cancel() != nil {
		t.Error("cancel")
	}
	ms, err := s.List()
	if err != nil || len(ms) != 1 || ms[0].Index != 13 || ms[0].Term != 3 || len(ms[0].Configuration.Servers) != 1 || ms[0].Size != 7 {
		t.Fatalf("%+v %v", ms, err)
	}
	_, r, err := s.Open(ms[0].ID)
	if err != nil {
		t.Fatal(err)
	}
	b, _ := io.ReadAll(r)
	r.Close()
	if string(b) != "state 3" {
		t.Errorf("%q", b)
	}
	es, _ := os.ReadDir(s.dir)
	if len(es) != keepSnaps {
		t.Errorf("%d files", len(es))
	}
	path := filepath.Join(s.dir, ms[0].ID+snapSuffix)
	whole, _ := os.ReadFile(path)
	for i := range whole {
		bad := bytes.Clone(whole)
		bad[i] ^= 1
		os.WriteFile(path, bad, 0o600)
		if _, err := s.List(); !errors.Is(err, ErrDamaged) {
			t.Fatalf("byte %d: %v", i, err)
		}
	}
}

func onDisk(t *testing.T, dir string) func(mesh.NodeID) Storage {
	return func(id mesh.NodeID) Storage {
		s, err := NewFileStorage(filepath.Join(dir, id.String()))
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
}

func TestADamagedLogIsFetchedAnew(t *testing.T) {
	dir := t.TempDir()
	bubble(t, func(t *testing.T, w *world) {
		a := w.found(3, onDisk(t, dir))
		for i := range 5 {
			a.say("line %d", i)
		}
		c := w.nodes[3]
		w.until(10*time.Second, "equal", func() bool { return w.equal(1, 3) })
		before := c.m.text()
		c.shut()
		files, _ := filepath.Glob(filepath.Join(dir, c.id.String(), "raft", "*.wal"))
		b, _ := os.ReadFile(files[0])
		i := bytes.Index(b, []byte("line 1"))
		b[i] ^= 1
		os.WriteFile(files[0], b, 0o600)
		w.isolate(3, true)
		c = w.start(3, onDisk(t, dir)(3))
		w.isolate(3, true)
		time.Sleep(20 * time.Second)
		if s := c.State(); s.Stopped != "" || c.current() == nil || !c.current().trans.mute.Load() {
			t.Errorf("a wiped voter is not mute: %+v", s)
		}
		a.say("meanwhile")
		w.isolate(3, false)
		w.until(30*time.Second, "3 is equal again", func() bool { return w.equal(1, 3) && len(c.m.text()) > len(before) })
		w.until(30*time.Second, "3 votes again", func() bool { return !c.current().trans.mute.Load() })
		c.say("and takes part")
		c.shut()
		c = w.start(3, onDisk(t, dir)(3))
		w.until(5*time.Second, "3 is equal", func() bool { return w.equal(1, 3) })
	})
}

func FuzzHeader(f *testing.F) {
	f.Add([]byte{0xa0})
	f.Fuzz(func(t *testing.T, b []byte) {
		if c, err := parseHeader(b); err == nil {
			c.compare(chain{})
			(chain{}).compare(c)
			c.fork(c)
		}
	})
}

// A node may end while a snapshot comes in from another: it goes on with the one
// that it had, on every storage.
func TestASnapshotThatWasNotWrittenToItsEndIsNone(t *testing.T) {
	file, err := NewFileStorage(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	for name, s := range map[string]Storage{"files": file, "memory": NewMemStorage()} {
		t.Run(name, func(t *testing.T) {
			create := func(index uint64) raft.SnapshotSink {
				st, err := s.open(slog.New(slog.DiscardHandler), func(err error) { t.Error(err) })
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { st.close() })
				k, err := st.snapshots.Create(raft.SnapshotVersionMax, index, 1, raft.Configuration{}, 1, nil)
				if err == nil {
					_, err = io.WriteString(k, "the state")
				}
				if err != nil {
					t.Fatal(err)
				}
				return k
			}
			newest := func() uint64 {
				st, err := s.open(slog.New(slog.DiscardHandler), func(err error) { t.Error(err) })
				if err != nil {
					t.Fatal(err)
				}
				defer st.close()
				metas, err := st.snapshots.List()
				if err != nil || len(metas) == 0 {
					t.Fatalf("%d snapshots, %v", len(metas), err)
				}
				return metas[0].Index
			}
			if err := create(20).Close(); err != nil {
				t.Fatal(err)
			}
			create(30) // and the node ends
			if n := newest(); n != 20 {
				t.Errorf("the newest is of %d", n)
			}
			if err := create(40).Cancel(); err != nil {
				t.Fatal(err)
			}
			if n := newest(); n != 20 {
				t.Errorf("after one that was given up the newest is of %d", n)
			}
		})
	}
}

func FuzzEntry(f *testing.F) {
	var b bytes.Buffer
	codec{}.Encode(entry(3), &b)
	f.Add(b.Bytes())
	f.Fuzz(func(t *testing.T, b []byte) {
		var l raft.Log
		if (codec{}).Decode(b, &l) == nil {
			var again bytes.Buffer
			codec{}.Encode(&l, &again)
			if !bytes.Equal(again.Bytes(), b) {
				t.Fatal("another entry")
			}
		}
	})
}

func TestNamesReadAsASentence(t *testing.T) {
	for want, in := range map[string]string{"nobody": "", "a": "a", "a and b": "a b", "a, b and c": "a b c"} {
		if got := names(strings.Fields(in)); got != want {
			t.Errorf("%q", got)
		}
	}
}
