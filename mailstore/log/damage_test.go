package log_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"hash/crc32"
	"maps"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"posthouse/mailstore/log"
	"posthouse/mailstore/log/simfs"
)

var update = flag.Bool("update", false, "write the fixture anew")

// sample fills a log with everything that it may hold; sizes are its bodies.
func sample(t testing.TB, fs log.FS, dir string, sealed bool) (sizes []int) {
	t.Helper()
	opt := small(fs)
	opt.Dir = dir
	l := open(t, opt)
	for _, g := range [][]int{{10}, {100, 0, 700}, {3000}, {3000}, {3000, 2500}, {5000}, {0}, {100, 9000, 0}, {70_000}, {2000}, {10, 20}} {
		mustAppend(t, l, len(sizes), g...)
		sizes = append(sizes, g...)
		l.Mark(uint64(len(sizes)))
	}
	if sealed {
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
	}
	return sizes
}

// state is all that a reader can see of a log.
func state(t testing.TB, l *log.Log) map[string]string {
	out := map[string]string{}
	for _, r := range replay(t, l, 1) {
		b, err := readBody(l.Body(r.Ref))
		if err != nil && !errors.Is(err, log.ErrDamaged) {
			t.Errorf("record %d: %v, want damage", r.Seq, err)
		}
		out[fmt.Sprint(r.Seq)] = fmt.Sprintf("%d %q %d %x %v", r.Kind, r.Meta, r.BodySize, b, err != nil)
	}
	return out
}

func stateOf(t testing.TB, fs *simfs.FS, position uint64) (map[string]string, log.Report) {
	t.Helper()
	opt := small(fs)
	opt.Position = position
	l := open(t, opt)
	defer l.Close()
	s := state(t, l)
	return s, l.Report()
}

func names(t testing.TB, fs log.FS, dir, ext string) (out []string) {
	t.Helper()
	es, err := fs.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range es {
		if strings.HasSuffix(e.Name, ext) {
			out = append(out, e.Name)
		}
	}
	return out
}

func TestEveryFlippedBitIsNamedOrHarmless(t *testing.T) {
	fs := simfs.New()
	sample(t, fs, "/log", true)
	// One more segment, not sealed: a crash left it.
	l := open(t, small(fs))
	if err := compact(l, func(r log.Record) (bool, log.Kind, []byte) { return r.Seq != 3, r.Kind, r.Meta }, l.Segments()[0].Number); err != nil {
		t.Fatal(err)
	}
	mustAppend(t, l, 100, 500, 6000)
	mustAppend(t, l, 102, 600)
	disk := fs.After(simfs.KeepAll, 0)
	l.Close()
	want, _ := stateOf(t, disk.Copy(), 0)
	end := uint64(len(want) + 1) // record 3 was dropped
	files := map[string][]byte{}
	total := 0
	for _, n := range names(t, disk, "/log", "") {
		files[n] = disk.Peek("/log/" + n)
		total += len(files[n])
	}
	if _, err := log.Verify(ctx, disk, "/log", func(d log.Damage) { t.Errorf("clean log: %v", d) }); err != nil {
		t.Fatal(err)
	}
	rnd := rand.New(rand.NewPCG(1, 2))
	order := slices.Sorted(maps.Keys(files))
	named, harmless := 0, 0
	for range 2200 {
		name := order[rnd.IntN(len(order))]
		was := files[name]
		at, bit := rnd.IntN(len(was)), byte(1)<<rnd.IntN(8)
		if rnd.IntN(3) == 0 { // half of a file may be one body: headers matter more
			at = rnd.IntN(min(len(was), 2048))
		}
		b := slices.Clone(was)
		b[at] ^= bit
		disk.Poke("/log/"+name, b)
		hit := false
		if _, err := log.Verify(ctx, disk, "/log", func(d log.Damage) {
			hit = hit || d.File == name && d.Offset <= int64(at)
		}); err != nil {
			t.Fatal(err)
		}
		// Opening never gives wrong bytes either. The view stands at the end.
		got, rep := stateOf(t, disk.Copy(), end)
		for seq, s := range got {
			if want[seq] != s && !strings.HasSuffix(s, "true") {
				t.Fatalf("bit flipped in %s at %d: record %s reads wrong", name, at, seq)
			}
		}
		same := maps.Equal(got, want)
		switch {
		case hit:
			named++
		case same:
			harmless++
		default:
			t.Fatalf("bit %#x flipped in %s at %d of %d: not named, not harmless", bit, name, at, len(was))
		}
		if lost := len(want) - len(got); lost > 0 && len(rep.Damage) == 0 {
			t.Fatalf("bit flipped in %s at %d: %d records lost, and Open and Replay do not say so: %+v", name, at, lost, rep)
		}
		disk.Poke("/log/"+name, was)
	}
	t.Logf("%d bytes: %d flips named, %d harmless", total, named, harmless)
	if named < harmless {
		t.Errorf("%d flips named, %d harmless: too many", named, harmless)
	}
}

func TestDamageToAFileHasADefinedOutcome(t *testing.T) {
	// The sample's files: 1 to 3 and more are log segments between bodies.
	flip := func(at int) func([]byte) []byte {
		return func(b []byte) []byte { b[at] ^= 1; return b }
	}
	base := simfs.New()
	sizes := sample(t, base, "/log", true)
	all := uint64(len(sizes))
	segs, bodies := names(t, base, "/log", ".seg"), names(t, base, "/log", ".body")
	if len(segs) < 3 || len(bodies) != 3 {
		t.Fatalf("sample: %v %v", segs, bodies)
	}
	first, middle, last := segs[0], segs[1], segs[len(segs)-1]
	for _, c := range []struct {
		name    string
		file    string
		do      func([]byte) []byte
		damaged string // file named by Open or Replay; "" for none
		lost    bool   // records are missing
		check   func(t *testing.T, rep log.Report)
	}{
		{"one copy of a header is damaged", middle, flip(100), middle, false, nil},
		{"the other copy of a header is damaged", middle, flip(612), middle, false, nil},
		{"both copies of a header are damaged", middle, func(b []byte) []byte { b[20] ^= 1; b[532] ^= 1; return b }, middle, true, nil},
		{"a segment in the middle is missing", middle, func([]byte) []byte { return nil }, middle, true, nil},
		{"the first segment is missing", first, func([]byte) []byte { return nil }, first, true, nil},
		{"a segment is empty", middle, func([]byte) []byte { return []byte{} }, middle, true, nil},
		{"a segment is garbage", middle, func(b []byte) []byte { return content(7, len(b)) }, middle, true, nil},
		{"a segment in the middle is cut short", middle, func(b []byte) []byte { return b[:len(b)*2/3] }, middle, true, nil},
		{"the last segment is missing: the log lost its end", last, func([]byte) []byte { return nil }, "", true, func(t *testing.T, rep log.Report) {
			if !rep.LostEnd {
				t.Errorf("report %+v", rep)
			}
		}},
		{"a group header is damaged: its records are found all the same", first, flip(1024 + 9), first, false, nil},
		{"a record header is damaged: only that record is lost", first, flip(1024 + 56 + 9), first, true, nil},
		{"a meta is damaged", first, flip(1024 + 56 + 48 + 2), first, true, nil},
		{"the seal is damaged: it looks like an unfinished write and is cut", last, func(b []byte) []byte { b[len(b)-50] ^= 1; return b }, "", false, func(t *testing.T, rep log.Report) {
			if len(rep.Cut) != 1 || rep.Sealed {
				t.Errorf("report %+v", rep)
			}
		}},
		{"bytes stand after the seal", last, func(b []byte) []byte { return append(b, 1, 2, 3) }, last, false, nil},
		{"a spool file is left over", "000000000077.tmp", func([]byte) []byte { return []byte("half a body") }, "", false, func(t *testing.T, rep log.Report) {
			if rep.Leftovers != 1 {
				t.Errorf("report %+v", rep)
			}
		}},
		{"a body that no record names is left over", "000000000078.body", func([]byte) []byte { return []byte("a body") }, "", false, func(t *testing.T, rep log.Report) {
			if rep.Orphans != 1 {
				t.Errorf("report %+v", rep)
			}
		}},
		{"a file of somebody else stays", "README", func([]byte) []byte { return []byte("hello") }, "", false, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			fs := base.Copy()
			fs.Poke("/log/"+c.file, c.do(fs.Peek("/log/"+c.file)))
			opt := small(fs)
			opt.Position = all
			l := open(t, opt)
			got := replay(t, l, 1)
			for _, r := range got {
				if err := holds(l, r, int(r.Seq-1), sizes[r.Seq-1]); err != nil {
					t.Error(err)
				}
			}
			rep := l.Report()
			if lost := len(got) < len(sizes); lost != c.lost {
				t.Errorf("%d of %d records, report %+v", len(got), len(sizes), rep)
			}
			found := ""
			for _, d := range rep.Damage {
				if found == "" || d.File == c.damaged {
					found = d.File
				}
			}
			if found != c.damaged {
				t.Errorf("damage is named in %q, want %q: %v", found, c.damaged, rep.Damage)
			}
			if c.check != nil {
				c.check(t, rep)
			}
			// It goes on, with numbers never used.
			if n := mustAppend(t, l, 50, 10, 5000); n != all+1 {
				t.Errorf("next sequence is %d, want %d", n, all+1)
			}
			if err := l.Close(); err != nil {
				t.Fatal(err)
			}
			l = open(t, opt)
			if again := replay(t, l, 1); len(again) != len(got)+2 {
				t.Errorf("%d records after the next start, want %d: %v", len(again), len(got)+2, seqs(again))
			}
			l.Close()
			if c.file == "README" && string(fs.Peek("/log/README")) != "hello" {
				t.Error("it is gone")
			}
		})
	}
	t.Run("a body is missing, cut, damaged or another one", func(t *testing.T) {
		other := base.Peek("/log/" + bodies[1])
		for name, do := range map[string]func([]byte) []byte{
			"missing": func([]byte) []byte { return nil },
			"cut":     func(b []byte) []byte { return b[:len(b)-1] },
			"damaged": flip(2000),
			"another": func([]byte) []byte { return other },
			"empty":   func([]byte) []byte { return []byte{} },
		} {
			fs := base.Copy()
			fs.Poke("/log/"+bodies[0], do(fs.Peek("/log/"+bodies[0])))
			l := open(t, small(fs))
			bad := 0
			for _, r := range replay(t, l, 1) {
				if err := holds(l, r, int(r.Seq-1), sizes[r.Seq-1]); err != nil {
					if bad++; !errors.Is(err, log.ErrDamaged) || !strings.Contains(err.Error(), bodies[0]) {
						t.Errorf("%s: %v does not name the damage", name, err)
					}
				}
			}
			if bad != 1 {
				t.Errorf("%s: %d bodies cannot be read, want 1", name, bad)
			}
			l.Close()
		}
	})
}

func TestDamageBeforeThePositionIsNeverCut(t *testing.T) {
	fs := simfs.New()
	sizes := sample(t, fs, "/log", false)
	disk := fs.After(simfs.LoseAll, 0) // not sealed
	segs := names(t, disk, "/log", ".seg")
	last := segs[len(segs)-1]
	all := uint64(len(sizes))
	name := "/log/" + last
	was := disk.Peek(name)
	at := bytes.LastIndex(was, []byte("meta "))
	was[at] ^= 1
	disk.Poke(name, was)
	for position, want := range map[uint64]string{all: "damage", all - 2: "cut"} {
		fs := disk.Copy()
		opt := small(fs)
		opt.Position = position
		l := open(t, opt)
		got, rep := replay(t, l, 1), l.Report()
		l.Close()
		switch want {
		case "damage":
			if len(rep.Cut) > 0 || len(rep.Damage) == 0 || rep.Damage[0].File != last || !bytes.Equal(fs.Peek(name), was) || rep.LostEnd || len(got) != len(sizes)-1 {
				t.Errorf("view at %d: %d records, %+v", position, len(got), rep)
			}
		case "cut":
			// The last group held the last two records: none of it was told.
			if len(rep.Cut) != 1 || len(rep.Damage) > 0 || rep.LostEnd || len(got) != len(sizes)-2 {
				t.Errorf("view at %d: %d records, %+v", position, len(got), rep)
			}
		}
	}
}

func TestTheMarkTellsAViewThatIsOlder(t *testing.T) {
	fs := simfs.New()
	l := open(t, small(fs))
	mustAppend(t, l, 1, 10)
	mustAppend(t, l, 2, 10)
	l.Mark(2)
	l.Mark(1)
	l.Close()
	for _, c := range []struct{ position, mark, next uint64 }{{2, 2, 3}, {0, 2, 3}, {9, 2, 10}} {
		fs := fs.Copy()
		opt := small(fs)
		opt.Position = c.position
		l := open(t, opt)
		if rep := l.Report(); rep.Mark != c.mark || l.End()+1 != c.next || rep.LostEnd != (c.position > 2) {
			t.Errorf("position %d: end %d, %+v", c.position, l.End(), rep)
		}
		l.Close()
	}
}

func TestANewEpochStandsInNewSegments(t *testing.T) {
	fs := simfs.New()
	for _, epoch := range []uint64{0, 5, 0} {
		opt := small(fs)
		opt.Epoch = epoch
		l := open(t, opt)
		mustAppend(t, l, 1, 10)
		l.Close()
	}
	var got []byte
	for _, n := range names(t, fs, "/log", ".seg") {
		got = append(got, fs.Peek("/log/" + n)[24])
	}
	if !bytes.Equal(got, []byte{1, 5, 5}) {
		t.Errorf("epochs %v", got)
	}
}

func TestVersion1IsStillRead(t *testing.T) {
	const dir = "testdata/v1"
	if *update {
		os.RemoveAll(dir)
		fs := simfs.New()
		sample(t, fs, "/log", true)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		for _, n := range names(t, fs, "/log", "") {
			if err := os.WriteFile(filepath.Join(dir, n), fs.Peek("/log/"+n), 0o644); err != nil {
				t.Fatal(err)
			}
		}
	}
	fs := simfs.New()
	if err := fs.MkdirAll("/log"); err != nil {
		t.Fatal(err)
	}
	es, err := os.ReadDir(dir)
	if err != nil || len(es) < 6 {
		t.Fatal(len(es), err)
	}
	for _, e := range es {
		b, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if err != nil {
			t.Fatal(err)
		}
		fs.Poke("/log/"+e.Name(), b)
	}
	l := open(t, small(fs))
	defer l.Close()
	sizes := []int{10, 100, 0, 700, 3000, 3000, 3000, 2500, 5000, 0, 100, 9000, 0, 70_000, 2000, 10, 20}
	got := replay(t, l, 1)
	if len(got) != len(sizes) {
		t.Fatalf("%d records, want %d: %+v", len(got), len(sizes), l.Report())
	}
	for i, r := range got {
		if err := holds(l, r, i, sizes[i]); err != nil {
			t.Error(err)
		}
	}
	if sum, err := log.Verify(ctx, fs, "/log", func(d log.Damage) { t.Error(d) }); err != nil || sum.Records != len(sizes) || sum.First != 1 || sum.Last != 17 {
		t.Errorf("%+v %v", sum, err)
	}
}

// forge makes a segment of data: with a good header, and with the salt and the
// checksums set right wherever data says that a group or a record begins, so
// that what lies behind the checksums is reached.
func forge(data []byte) []byte {
	table := crc32.MakeTable(crc32.Castagnoli)
	le := binary.LittleEndian
	b := make([]byte, 1024, 1024+len(data))
	copy(b, "PHOUSLOG")
	le.PutUint16(b[8:], 1)
	le.PutUint32(b[12:], 512)
	le.PutUint64(b[16:], 1)  // number
	le.PutUint64(b[32:], 42) // salt
	le.PutUint64(b[40:], 1)  // first
	le.PutUint32(b[508:], crc32.Checksum(b[:508], table))
	copy(b[512:], b[:512])
	seed := crc32.Checksum(append(slices.Clone(b[32:40]), b[16:24]...), table)
	b = append(b, data...)
	record := func(at int) {
		if at+48 <= len(b) {
			b[at+4] = 1
			if meta := int(le.Uint32(b[at+16:])); meta < len(b)-at-48 {
				le.PutUint32(b[at+20:], crc32.Checksum(b[at+48:at+48+meta], table))
			}
			le.PutUint32(b[at:], crc32.Update(seed, table, b[at+4:at+48]))
		}
	}
	for at := 1024; at+56 <= len(b); at += 512 {
		how := b[at]
		if how&2 != 0 {
			record(at + 56)
		}
		if how&4 != 0 {
			record(at + 56 + 48 + int(how>>3)*8)
		}
		if how&1 != 0 {
			le.PutUint64(b[at:], 42)
			le.PutUint32(b[at+8:], crc32.Update(seed, table, b[at+12:at+56]))
		}
	}
	return b
}

// FuzzSegment reads a folder with one foreign segment and one foreign body.
func FuzzSegment(f *testing.F) {
	fs := simfs.New()
	sample(f, fs, "/log", true)
	for _, n := range names(f, fs, "/log", ".seg") {
		b := fs.Peek("/log/" + n)[1024:]
		for at := 0; at < len(b); at += 512 {
			b[at] = 3
		}
		f.Add(b[:1536], fs.Peek("/log/" + names(f, fs, "/log", ".body")[0])[:1200])
	}
	f.Fuzz(func(t *testing.T, seg, body []byte) {
		fs := simfs.New()
		fs.MkdirAll("/log")
		fs.Poke("/log/000000000001.seg", forge(seg))
		fs.Poke("/log/000000000002.body", body)
		if _, err := log.Verify(ctx, fs, "/log", func(log.Damage) {}); err != nil {
			t.Fatal(err)
		}
		l := open(t, small(fs))
		state(t, l)
		if l.End() < math.MaxUint64-1 {
			mustAppend(t, l, 1, 10)
		}
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
	})
}
