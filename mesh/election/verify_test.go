package election

import (
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/hashicorp/raft"
)

// storeSome fills a folder as a node's life does.
func storeSome(t *testing.T) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "election")
	s, err := NewFileStorage(dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.save(recordName, []byte("a record")); err != nil {
		t.Fatal(err)
	}
	st, err := s.open(slog.New(slog.DiscardHandler), func(error) {})
	if err != nil {
		t.Fatal(err)
	}
	for i := range uint64(40) {
		if err := st.log.StoreLog(&raft.Log{Index: i + 1, Term: 1, Type: raft.LogCommand, Data: fmt.Append(nil, "a command with number ", i)}); err != nil {
			t.Fatal(err)
		}
	}
	if err := st.log.applied(40); err != nil {
		t.Fatal(err)
	}
	sink, err := st.snapshots.Create(raft.SnapshotVersionMax, 20, 1, raft.Configuration{}, 1, nil)
	if err == nil {
		_, err = sink.Write([]byte("the state"))
	}
	if err == nil {
		err = sink.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
	if err := st.close(); err != nil {
		t.Fatal(err)
	}
	return dir
}

func TestWholeFilesAreFoundWhole(t *testing.T) {
	if d, err := VerifyFiles(storeSome(t)); err != nil || len(d) > 0 {
		t.Errorf("found %v, %v", d, err)
	}
	if d, err := VerifyFiles(filepath.Join(t.TempDir(), "none")); err != nil || len(d) > 0 {
		t.Errorf("of a missing folder: %v, %v", d, err)
	}
}

// TestAFlippedBitOfTheElectionsFilesIsNamedOrHarmless flips bits all over the
// files: each that is not named must leave what is read as it was.
func TestAFlippedBitOfTheElectionsFilesIsNamedOrHarmless(t *testing.T) {
	dir := storeSome(t)
	random := rand.New(rand.NewPCG(1, 1))
	named := map[string]int{}
	for _, name := range []string{"record", "record.copy", "raft/meta", "raft/commit", "raft/*.wal", "raft/*.snapshot"} {
		paths, err := filepath.Glob(filepath.Join(dir, name))
		if err != nil || len(paths) == 0 {
			t.Fatalf("%s: %v, %v", name, paths, err)
		}
		path := paths[0]
		whole, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		used := len(whole)
		for used > 0 && whole[used-1] == 0 {
			used--
		}
		for range 60 {
			at := random.IntN(used)
			b := append([]byte(nil), whole...)
			b[at] ^= 1 << random.IntN(8)
			if err := os.WriteFile(path, b, 0o600); err != nil {
				t.Fatal(err)
			}
			d, err := VerifyFiles(dir)
			if err != nil {
				t.Fatal(err)
			}
			if len(d) > 0 {
				named[name]++
				continue
			}
			s, _ := NewFileStorage(dir)
			st, err := s.open(slog.New(slog.DiscardHandler), func(error) {})
			if err != nil {
				t.Errorf("%s at %d: not named, and it does not open: %v", path, at, err)
				continue
			}
			var e raft.Log
			for i := range uint64(40) {
				if err := st.log.GetLog(i+1, &e); err != nil || string(e.Data) != fmt.Sprint("a command with number ", i) {
					t.Errorf("%s at %d: not named, and entry %d is %q, %v", path, at, i+1, e.Data, err)
				}
			}
			if got, err := s.load(recordName); err != nil || string(got) != "a record" || st.log.commit.get() != 40 {
				t.Errorf("%s at %d: not named, and the record is %q, %v", path, at, got, err)
			}
			st.close()
		}
		if err := os.WriteFile(path, whole, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("of 60 flips each were named: %v", named)
}

func TestANodeAloneWithADamagedLogStillKnowsWhatItKnew(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "election")
	bubble(t, func(t *testing.T, w *world) {
		open := func() Storage {
			s, err := NewFileStorage(dir)
			if err != nil {
				t.Fatal(err)
			}
			return s
		}
		a := w.start(1, open())
		if _, err := a.Bootstrap(context.Background()); err != nil {
			t.Fatal(err)
		}
		a.say("admit %s 0", a.id)
		a.say("user anna")
		time.Sleep(2 * pollEvery)
		before := a.m.text()
		a.shut()
		logs, err := filepath.Glob(filepath.Join(dir, "raft", "*.wal"))
		if err != nil || len(logs) == 0 {
			t.Fatal(logs, err)
		}
		b, err := os.ReadFile(logs[0])
		if err != nil {
			t.Fatal(err)
		}
		b[segmentHeader+frameHeader+5] ^= 1
		if err := os.WriteFile(logs[0], b, 0o600); err != nil {
			t.Fatal(err)
		}
		for range 2 {
			a = w.start(1, open())
			<-a.Ready()
			if got := a.m.text(); got != before {
				t.Errorf("it knows %q, and knew %q", got, before)
			}
			a.shut()
		}
		// A person makes it a mesh again.
		a = w.start(1, open())
		<-a.Ready()
		if _, err := a.Promote(context.Background()); err != nil {
			t.Fatal(err)
		}
		a.say("user boris")
	})
}
