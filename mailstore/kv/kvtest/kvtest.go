// Package kvtest is the suite that every implementation behind kv.View passes.
// Only tests import it.
package kvtest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"sort"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"posthouse/mailstore/kv"
)

// Place is where a view is kept between two opens.
type Place interface {
	// Open opens the view; what the test sets in opt stays as it is.
	Open(opt kv.Options) (*kv.View, error)
}

// Run runs the suite; each call of place gives an empty one.
func Run(t *testing.T, place func(testing.TB) Place) {
	for _, c := range []struct {
		name string
		f    func(*testing.T, Place)
	}{
		{"a new view is empty at position 0", newView},
		{"rows are seen at once, before and after they are on disk", seenAtOnce},
		{"a deleted row is gone, in the overlay and below", deleted},
		{"a scan gives a prefix in order from a key until it is told to stop", scans},
		{"a scan shows one instant", oneInstant},
		{"rows and position survive a close", survivesClose},
		{"after an abort the view is as it was at some record", survivesAbort},
		{"a batch too big for one transaction is there as a whole", bigBatch},
		{"bounds and order are checked", bounds},
		{"a closed view answers with an error", closed},
		{"two opens of one view are refused", twice},
		{"reset begins a new view", reset},
		{"what is dumped can be loaded, whole or not at all", loads},
		{"the target marks a view that is being built", target},
		{"any sequence of operations reads like a map", model},
	} {
		t.Run(c.name, func(t *testing.T) { c.f(t, place(t)) })
	}
}

func open(t testing.TB, p Place) *kv.View {
	t.Helper()
	v, err := p.Open(kv.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { v.Close() })
	return v
}

func put(t testing.TB, v *kv.View, seq uint64, rows ...string) {
	t.Helper()
	var b kv.Batch
	for i := 0; i < len(rows); i += 2 {
		b.Put([]byte(rows[i]), []byte(rows[i+1]))
	}
	if err := v.Apply(seq, &b); err != nil {
		t.Fatal(err)
	}
}

func del(t testing.TB, v *kv.View, seq uint64, keys ...string) {
	t.Helper()
	var b kv.Batch
	for _, k := range keys {
		b.Delete([]byte(k))
	}
	if err := v.Apply(seq, &b); err != nil {
		t.Fatal(err)
	}
}

func flush(t testing.TB, v *kv.View) {
	t.Helper()
	if err := v.Flush(context.Background()); err != nil {
		t.Fatal(err)
	}
}

func scan(t testing.TB, v *kv.View, prefix, from string) (got []string) {
	t.Helper()
	var f []byte
	if from != "" {
		f = []byte(from)
	}
	if err := v.Scan([]byte(prefix), f, func(k, val []byte) bool {
		got = append(got, string(k)+"="+string(val))
		return true
	}); err != nil {
		t.Fatal(err)
	}
	return got
}

func want(t testing.TB, got []string, rows ...string) {
	t.Helper()
	if len(got) == 0 && len(rows) == 0 {
		return
	}
	if d := cmp.Diff(rows, got); d != "" {
		t.Fatalf("rows (-want +got):\n%s", d)
	}
}

func get(t testing.TB, v *kv.View, key, val string) {
	t.Helper()
	got, ok, err := v.Get([]byte(key))
	if err != nil {
		t.Fatal(err)
	}
	if ok != (val != "") || string(got) != val && ok {
		t.Fatalf("row %q is %q, %v; want %q", key, got, ok, val)
	}
}

func newView(t *testing.T, p Place) {
	v := open(t, p)
	if v.Applied() != 0 || v.Durable() != 0 || v.Building() || v.Full() {
		t.Fatal("not new:", v.Applied(), v.Durable(), v.Building(), v.Full())
	}
	get(t, v, "a", "")
	want(t, scan(t, v, "", ""))
	flush(t, v)
}

func seenAtOnce(t *testing.T, p Place) {
	v := open(t, p)
	put(t, v, 1, "a", "1", "b", "1")
	get(t, v, "a", "1")
	want(t, scan(t, v, "", ""), "a=1", "b=1")
	flush(t, v)
	if v.Durable() != 1 {
		t.Fatal("durable", v.Durable())
	}
	get(t, v, "a", "1")
	put(t, v, 2, "a", "2")
	get(t, v, "a", "2")
	get(t, v, "b", "1")
	want(t, scan(t, v, "", ""), "a=2", "b=1")
}

func deleted(t *testing.T, p Place) {
	v := open(t, p)
	put(t, v, 1, "a", "1", "b", "1", "c", "1")
	del(t, v, 2, "b")
	want(t, scan(t, v, "", ""), "a=1", "c=1")
	flush(t, v)
	want(t, scan(t, v, "", ""), "a=1", "c=1")
	del(t, v, 3, "a", "never")
	get(t, v, "a", "")
	want(t, scan(t, v, "", ""), "c=1")
	flush(t, v)
	get(t, v, "a", "")
	put(t, v, 4, "a", "4")
	flush(t, v)
	want(t, scan(t, v, "", ""), "a=4", "c=1")
}

func scans(t *testing.T, p Place) {
	v := open(t, p)
	put(t, v, 1, "a/1", "x", "a/3", "x", "b/1", "x", "\xff\xff/1", "x")
	flush(t, v)
	put(t, v, 2, "a/2", "y", "a/3", "y", "a", "y", "\xff\xff\xff", "y")
	want(t, scan(t, v, "a/", ""), "a/1=x", "a/2=y", "a/3=y")
	want(t, scan(t, v, "a/", "a/2"), "a/2=y", "a/3=y")
	want(t, scan(t, v, "a/", "a/20"), "a/3=y")
	want(t, scan(t, v, "a/", "b"))
	want(t, scan(t, v, "b", "a"), "b/1=x")
	want(t, scan(t, v, "\xff\xff", ""), "\xff\xff/1=x", "\xff\xff\xff=y")
	n := 0
	if err := v.Scan(nil, nil, func(k, _ []byte) bool { n++; return n < 3 }); err != nil || n != 3 {
		t.Fatal(n, err)
	}
}

func oneInstant(t *testing.T, p Place) {
	v := open(t, p)
	for i := range 100 {
		put(t, v, uint64(i+1), fmt.Sprintf("%03d", 2*i), "old")
	}
	seq := uint64(100)
	var got int
	if err := v.Scan(nil, nil, func(k, val []byte) bool {
		if got == 10 {
			done := make(chan struct{})
			go func() { // Apply belongs to another goroutine
				defer close(done)
				for i := range 100 {
					seq++
					put(t, v, seq, fmt.Sprintf("%03d", 2*i), "new", fmt.Sprintf("%03d", 2*i+1), "new")
				}
				flush(t, v)
			}()
			<-done
		}
		if string(val) != "old" {
			t.Fatalf("row %s is %s", k, val)
		}
		got++
		return true
	}); err != nil || got != 100 {
		t.Fatal(got, err)
	}
	if got := len(scan(t, v, "", "")); got != 200 {
		t.Fatal(got)
	}
}

func survivesClose(t *testing.T, p Place) {
	v := open(t, p)
	id := v.ID()
	put(t, v, 7, "a", "1", "b", "2")
	if err := v.Close(); err != nil {
		t.Fatal(err)
	}
	v = open(t, p)
	if v.Applied() != 7 || v.Durable() != 7 || v.ID() != id {
		t.Fatal(v.Applied(), v.Durable(), v.ID(), id)
	}
	want(t, scan(t, v, "", ""), "a=1", "b=2")
}

func survivesAbort(t *testing.T, p Place) {
	v := open(t, p)
	put(t, v, 1, "a", "1")
	flush(t, v)
	for i := range 2000 {
		put(t, v, uint64(i+2), "a", fmt.Sprint(i+2), fmt.Sprintf("k%05d", i+2), "x")
	}
	if err := v.Abort(); err != nil {
		t.Fatal(err)
	}
	v = open(t, p)
	at := v.Applied()
	if at < 1 {
		t.Fatal("position", at)
	}
	get(t, v, "a", fmt.Sprint(at))
	if got := len(scan(t, v, "k", "")); got != int(at)-1 {
		t.Fatalf("%d rows at position %d", got, at)
	}
}

func bigBatch(t *testing.T, p Place) {
	v := open(t, p)
	put(t, v, 1, "gone", "1")
	var b kv.Batch
	for i := range 60_000 {
		b.Put(fmt.Appendf(nil, "k%06d", i), bytes.Repeat([]byte{byte(i)}, 100))
	}
	b.Delete([]byte("gone"))
	if err := v.Apply(2, &b); err != nil {
		t.Fatal(err)
	}
	get(t, v, "gone", "")
	if err := v.Close(); err != nil {
		t.Fatal(err)
	}
	v = open(t, p)
	if v.Applied() != 2 {
		t.Fatal(v.Applied())
	}
	get(t, v, "gone", "")
	if got := len(scan(t, v, "k", "")); got != 60_000 {
		t.Fatal(got)
	}
	put(t, v, 3, "after", "1")
	flush(t, v)
	get(t, v, "after", "1")
}

func bounds(t *testing.T, p Place) {
	v := open(t, p)
	put(t, v, 5, "a", "1")
	for name, f := range map[string]func() error{
		"a value over MaxValue": func() error {
			var b kv.Batch
			b.Put([]byte("k"), make([]byte, kv.MaxValue+1))
			return v.Apply(6, &b)
		},
		"a key over MaxKey": func() error {
			var b kv.Batch
			b.Put(make([]byte, kv.MaxKey+1), nil)
			return v.Apply(6, &b)
		},
		"an empty key":    func() error { var b kv.Batch; b.Put(nil, nil); return v.Apply(6, &b) },
		"a record again":  func() error { return v.Apply(5, new(kv.Batch)) },
		"an older record": func() error { return v.Apply(4, new(kv.Batch)) },
	} {
		if f() == nil {
			t.Error(name, "was taken")
		}
	}
	big := string(bytes.Repeat([]byte("v"), kv.MaxValue))
	put(t, v, 6, string(bytes.Repeat([]byte("k"), kv.MaxKey)), big)
	if err := v.Apply(9, new(kv.Batch)); err != nil { // gaps and records without rows are fine
		t.Fatal(err)
	}
	flush(t, v)
	if v.Durable() != 9 {
		t.Fatal(v.Durable())
	}
	get(t, v, string(bytes.Repeat([]byte("k"), kv.MaxKey)), big)
}

func closed(t *testing.T, p Place) {
	v := open(t, p)
	put(t, v, 1, "a", "1")
	if err := v.Close(); err != nil {
		t.Fatal(err)
	}
	if err := v.Close(); err != nil {
		t.Fatal("second close:", err)
	}
	if _, _, err := v.Get([]byte("a")); !errors.Is(err, kv.ErrClosed) {
		t.Error("get:", err)
	}
	if err := v.Scan(nil, nil, func(_, _ []byte) bool { return true }); !errors.Is(err, kv.ErrClosed) {
		t.Error("scan:", err)
	}
	if err := v.Apply(2, new(kv.Batch)); !errors.Is(err, kv.ErrClosed) {
		t.Error("apply:", err)
	}
	if err := v.Flush(context.Background()); err != nil {
		t.Error("flush of what is on disk:", err)
	}
}

func twice(t *testing.T, p Place) {
	open(t, p)
	if _, err := p.Open(kv.Options{}); !errors.Is(err, kv.ErrLocked) {
		t.Fatal(err)
	}
}

func reset(t *testing.T, p Place) {
	for _, keep := range []bool{true, false, true} {
		v := open(t, p)
		id := v.ID()
		put(t, v, v.Applied()+1, "a", "1")
		flush(t, v)
		put(t, v, v.Applied()+1, "b", "1")
		if err := v.Reset(context.Background(), "test", keep); err != nil {
			t.Fatal(err)
		}
		if v.Applied() != 0 || v.ID() == id {
			t.Fatal(v.Applied(), v.ID())
		}
		want(t, scan(t, v, "", ""))
		put(t, v, 1, "c", "1")
		flush(t, v)
		want(t, scan(t, v, "", ""), "c=1")
		if err := v.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

func target(t *testing.T, p Place) {
	v := open(t, p)
	v.Target(3)
	put(t, v, 1, "a", "1")
	flush(t, v)
	if !v.Building() {
		t.Fatal("not building")
	}
	if err := v.Close(); err != nil {
		t.Fatal(err)
	}
	v = open(t, p)
	if !v.Building() {
		t.Fatal("not building after a reopen")
	}
	put(t, v, 3, "a", "3")
	flush(t, v)
	if v.Building() {
		t.Fatal("still building")
	}
}

// model compares a view with a map over random operations, reopens and aborts.
func model(t *testing.T, p Place) {
	v := open(t, p)
	defer func() { v.Close() }()
	seq := v.Applied()
	rows := map[string]string{}
	rapid.Check(t, func(rt *rapid.T) {
		key := rapid.Custom(func(rt *rapid.T) string {
			return rapid.SampledFrom([]string{"a", "a/", "b", "\xff", "\x00"}).Draw(rt, "p") +
				string(rapid.SliceOfN(rapid.SampledFrom([]byte{0, 1, 'x', 0xff}), 0, 2).Draw(rt, "k"))
		})
		rt.Repeat(map[string]func(*rapid.T){
			"apply": func(rt *rapid.T) {
				var b kv.Batch
				for range rapid.IntRange(0, 4).Draw(rt, "n") {
					k := key.Draw(rt, "key")
					if rapid.Bool().Draw(rt, "del") {
						b.Delete([]byte(k))
						delete(rows, k)
					} else {
						val := fmt.Sprint(rapid.IntRange(0, 9).Draw(rt, "v"))
						b.Put([]byte(k), []byte(val))
						rows[k] = val
					}
				}
				seq++
				if err := v.Apply(seq, &b); err != nil {
					rt.Fatal(err)
				}
			},
			"flush": func(rt *rapid.T) {
				if rapid.IntRange(0, 3).Draw(rt, "seldom") == 0 {
					flush(t, v)
				}
			},
			"": func(rt *rapid.T) {
				k := key.Draw(rt, "get")
				val, ok, err := v.Get([]byte(k))
				if w, has := rows[k]; err != nil || ok != has || ok && w != string(val) {
					rt.Fatalf("get %q: %q %v %v, want %q %v", k, val, ok, err, w, has)
				}
				prefix, from := key.Draw(rt, "prefix"), key.Draw(rt, "from")
				if rapid.Bool().Draw(rt, "all") {
					prefix = ""
				}
				max := rapid.IntRange(1, 20).Draw(rt, "max")
				var got, exp []string
				for k, val := range rows {
					if bytes.HasPrefix([]byte(k), []byte(prefix)) && k >= from {
						exp = append(exp, k+"="+val)
					}
				}
				sort.Slice(exp, func(i, j int) bool { return exp[i][:len(exp[i])-2] < exp[j][:len(exp[j])-2] })
				exp = exp[:min(len(exp), max)]
				if err := v.Scan([]byte(prefix), []byte(from), func(k, val []byte) bool {
					got = append(got, string(k)+"="+string(val))
					return len(got) < max
				}); err != nil {
					rt.Fatal(err)
				}
				if len(got)+len(exp) > 0 && !cmp.Equal(got, exp) {
					rt.Fatal(cmp.Diff(exp, got))
				}
			},
		})
	})
	flush(t, v)
}

func loads(t *testing.T, p Place) {
	ctx := context.Background()
	v := open(t, p)
	for i := range uint64(2000) {
		put(t, v, 2*i+1, fmt.Sprintf("k%05d", i), fmt.Sprint("value ", i))
		if i == 900 {
			flush(t, v)
		}
		del(t, v, 2*i+2, fmt.Sprintf("k%05d", i/3))
	}
	rows := scan(t, v, "", "")
	type pair struct{ k, v []byte }
	var dump []pair
	at, err := v.Dump(func(k, val []byte) bool {
		dump = append(dump, pair{bytes.Clone(k), bytes.Clone(val)})
		return true
	})
	if err != nil || at != 4000 {
		t.Fatal(at, err)
	}
	if err := v.Load(ctx, at, nil); err == nil {
		t.Fatal("loaded into a view that has rows")
	}
	from := func(n int, end error) func() ([]byte, []byte, bool, error) {
		i := -1
		return func() ([]byte, []byte, bool, error) {
			if i++; i < n {
				return dump[i].k, dump[i].v, true, nil
			}
			return nil, nil, false, end
		}
	}
	stop := errors.New("stop")
	for n, end := range map[int]error{len(dump): nil, len(dump) - 1: stop} {
		if err := v.Reset(ctx, "test", false); err != nil {
			t.Fatal(err)
		}
		if err := v.Load(ctx, at, from(n, end)); !errors.Is(err, end) {
			t.Fatal(err)
		}
		for range 2 { // and as it is on disk
			if end != nil && v.Applied() != 0 {
				t.Fatal(v.Applied())
			}
			if end == nil {
				if v.Applied() != at || v.Durable() != at {
					t.Fatal(v.Applied(), v.Durable())
				}
				if diff := cmp.Diff(rows, scan(t, v, "", "")); diff != "" {
					t.Fatal(diff)
				}
			}
			if err := v.Close(); err != nil {
				t.Fatal(err)
			}
			v = open(t, p)
		}
	}
	if err := v.Reset(ctx, "test", false); err != nil {
		t.Fatal(err)
	}
	if err := v.Load(ctx, at, from(len(dump), nil)); err != nil {
		t.Fatal(err)
	}
	put(t, v, at+1, "z", "1")
	flush(t, v)
	want(t, scan(t, v, "z", ""), "z=1")
}
