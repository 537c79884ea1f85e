package kv

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
)

// TestAFlippedBitOfATableIsFoundBeforeBadgerMeetsIt flips bits in a closed
// view's tables. Each that is not found must be harmless; none may end the
// process, which is what Badger itself does with most.
func TestAFlippedBitOfATableIsFoundBeforeBadgerMeetsIt(t *testing.T) {
	dir := t.TempDir()
	v, err := Open(context.Background(), Options{Dir: dir, Ballast: -1})
	if err != nil {
		t.Fatal(err)
	}
	for i := range uint64(2000) {
		var b Batch
		b.Put(fmt.Appendf(nil, "key %05d", i), fmt.Appendf(nil, "a value that fills some space %d", i))
		if err := v.Apply(i+1, &b); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(v.Flush(context.Background()), v.Close()); err != nil {
		t.Fatal(err)
	}
	tables, err := filepath.Glob(filepath.Join(dir, rowsDir, "*.sst"))
	if err != nil || len(tables) == 0 {
		t.Fatalf("tables: %v, %v", tables, err)
	}
	if err := checkTables(filepath.Join(dir, rowsDir)); err != nil {
		t.Fatalf("of whole tables: %v", err)
	}
	whole, err := os.ReadFile(tables[0])
	if err != nil {
		t.Fatal(err)
	}
	random := rand.New(rand.NewPCG(1, 2))
	found := 0
	for i := range 400 {
		at := random.IntN(len(whole))
		if i < 64 {
			at = len(whole) - 1 - i // the footer
		}
		b := append([]byte(nil), whole...)
		b[at] ^= 1 << random.IntN(8)
		if err := os.WriteFile(tables[0], b, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := checkTables(filepath.Join(dir, rowsDir)); errors.Is(err, ErrDamaged) {
			found++
			continue
		} else if err != nil {
			t.Errorf("a flip at %d of %d: %v", at, len(whole), err)
		}
		var why string
		v, err := Open(context.Background(), Options{Dir: dir, Ballast: -1, Rebuilding: func(r string) { why = r }})
		if err != nil || why != "" {
			t.Fatalf("a flip at %d of %d was not found, and the view opens with %q, %v", at, len(whole), why, err)
		}
		v.Close()
	}
	t.Logf("%d of 400 flips found", found)
}
