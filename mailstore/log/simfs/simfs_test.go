package simfs_test

import (
	"bytes"
	"errors"
	"os"
	"syscall"
	"testing"

	"posthouse/mailstore/log"
	"posthouse/mailstore/log/simfs"
)

func must[T any](t *testing.T) func(T, error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

// prepared is a disk with a synced file "a" of "old", overwritten with "new"
// and renamed to "b", and a file "c" whose name was never synced.
func prepared(t *testing.T) *simfs.FS {
	fs := simfs.New()
	file := must[log.File](t)
	f := file(fs.Create("a"))
	must[int](t)(f.WriteAt([]byte("old"), 0))
	for _, err := range []error{f.Sync(), fs.SyncDir(".")} {
		if err != nil {
			t.Fatal(err)
		}
	}
	must[int](t)(f.WriteAt([]byte("new, longer"), 0))
	if err := fs.Rename("a", "b"); err != nil {
		t.Fatal(err)
	}
	c := file(fs.Create("c"))
	must[int](t)(c.WriteAt([]byte("c"), 0))
	if err := c.Sync(); err != nil {
		t.Fatal(err)
	}
	return fs
}

func TestWhatASyncDidNotCoverMayBeLost(t *testing.T) {
	fs := prepared(t)
	lost := fs.After(simfs.LoseAll, 0)
	if string(lost.Peek("a")) != "old" || lost.Peek("b") != nil || lost.Peek("c") != nil {
		t.Errorf("lose all: a %q, b %q, c %q", lost.Peek("a"), lost.Peek("b"), lost.Peek("c"))
	}
	kept := fs.After(simfs.KeepAll, 0)
	if kept.Peek("a") != nil || string(kept.Peek("b")) != "new, longer" || string(kept.Peek("c")) != "c" {
		t.Errorf("keep all: a %q, b %q, c %q", kept.Peek("a"), kept.Peek("b"), kept.Peek("c"))
	}
	seen := map[string]bool{}
	for seed := range uint64(200) {
		r := fs.After(simfs.Random, seed)
		if (r.Peek("a") == nil) == (r.Peek("b") == nil) {
			t.Fatalf("seed %d: a rename left %q and %q", seed, r.Peek("a"), r.Peek("b"))
		}
		switch b := append(r.Peek("a"), r.Peek("b")...); {
		case string(b) == "old":
			seen["lost"] = true
		case string(b) == "new, longer":
			seen["kept"] = true
		default:
			seen["garbled"] = true
		}
		seen["a"] = seen["a"] || r.Peek("a") != nil
		seen["b"] = seen["b"] || r.Peek("b") != nil
	}
	for _, what := range []string{"lost", "kept", "garbled", "a", "b"} {
		if !seen[what] {
			t.Errorf("200 seeds never showed %q", what)
		}
	}
	if _, err := fs.OpenFile("b"); !errors.Is(err, simfs.ErrCrashed) {
		t.Errorf("after the crash: %v", err)
	}
}

func TestAFailedSyncDropsWhatReadsGoOnShowing(t *testing.T) {
	fs := simfs.New()
	f := must[log.File](t)(fs.Create("a"))
	fs.SyncDir(".")
	f.WriteAt([]byte("lost"), 0)
	fs.Hook = func(o simfs.Op) simfs.Fault { return simfs.Fault{Err: syscall.EIO} }
	if err := f.Sync(); !errors.Is(err, syscall.EIO) {
		t.Fatal(err)
	}
	fs.Hook = nil
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
	p := make([]byte, 4)
	if _, err := f.ReadAt(p, 0); err != nil || string(p) != "lost" {
		t.Errorf("read %q, %v", p, err)
	}
	for _, m := range []simfs.Mode{simfs.LoseAll, simfs.KeepAll, simfs.Random} {
		if got := fs.After(m, 1).Peek("a"); bytes.Contains(got, []byte("lost")) {
			t.Errorf("%v: %q came back", m, got)
		}
	}
}

func TestAFullDiskTakesWhatFits(t *testing.T) {
	fs := simfs.New()
	f := must[log.File](t)(fs.Create("a"))
	fs.SetFree(5)
	if n, err := f.WriteAt([]byte("12345678"), 0); n != 5 || !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("%d, %v", n, err)
	}
	if err := f.Truncate(2); err != nil {
		t.Fatal(err)
	}
	if n, err := f.WriteAt([]byte("abc"), 2); n != 3 || err != nil {
		t.Errorf("%d, %v", n, err)
	}
	if err := fs.Remove("a"); err != nil {
		t.Fatal(err)
	}
	if _, err := fs.OpenFile("a"); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
}
