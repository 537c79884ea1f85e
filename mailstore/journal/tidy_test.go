package journal_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"posthouse/mailstore/journal"
	"posthouse/mailstore/journal/journaltest"
	"posthouse/mailstore/kv"
	"posthouse/mailstore/log"
	"posthouse/mailstore/log/simfs"
)

var update = flag.Bool("update", false, "write testdata anew")

// shelf is an engine that keeps things: an APPEND puts one, an EXPUNGE takes it
// away. Its rows say how often that was done, and where the body is.
type shelf struct {
	j       *journal.Journal
	renewed int
	wrong   error
	arrived []uint64 // replayed as arrivals
}

func (s *shelf) Apply(r log.Record, b *kv.Batch, live bool) error {
	if !live && !r.Compacted {
		s.arrived = append(s.arrived, r.Seq)
	}
	count := uint64(0)
	if v, ok, err := s.j.View().Get([]byte("count")); err != nil {
		return err
	} else if ok {
		count = binary.BigEndian.Uint64(v)
	}
	b.Put([]byte("count"), binary.BigEndian.AppendUint64(nil, count+1))
	if r.Kind == log.KindExpunge {
		b.Delete(append([]byte("thing/"), r.Meta...))
		return nil
	}
	b.Put(append([]byte("thing/"), r.Meta...), fmt.Appendf(nil, "%d %d %d %d %d", r.Ref.Segment, r.Ref.Offset, r.Ref.Seq, r.Ref.CRC, r.BodySize))
	return nil
}

func (s *shelf) Renew(context.Context) error { s.renewed++; return nil }
func (s *shelf) Lasting(log.Kind) bool       { return false }
func (s *shelf) Check() error                { return s.wrong }

func ref(v []byte) (r log.Ref, size int64) {
	fmt.Sscanf(string(v), "%d %d %d %d %d", &r.Segment, &r.Offset, &r.Seq, &r.CRC, &size)
	return r, size
}

func (s *shelf) Live(mark func(uint64, int64)) error {
	return s.j.View().Scan([]byte("thing/"), nil, func(_, v []byte) bool {
		r, size := ref(v)
		mark(r.Seq, size)
		return true
	})
}

func (s *shelf) put(t testing.TB, name string, size int) {
	t.Helper()
	d := s.j.NewDraft()
	io.WriteString(d, strings.Repeat(name[:1], size))
	if err := d.Seal(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := s.j.Append(log.Entry{Kind: log.KindAppend, Meta: []byte(name), Body: d}).Applied(t.Context()); err != nil {
		t.Fatal(err)
	}
}

func (s *shelf) take(t testing.TB, name string) {
	t.Helper()
	if err := s.j.Append(log.Entry{Kind: log.KindExpunge, Meta: []byte(name)}).Applied(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// things are the names, each with the first byte of its body and how many.
func (s *shelf) things(t testing.TB) (out []string) {
	t.Helper()
	var refs []log.Ref
	if err := s.j.View().Scan([]byte("thing/"), nil, func(k, v []byte) bool {
		r, size := ref(v)
		out, refs = append(out, fmt.Sprintf("%s %d", k[6:], size)), append(refs, r)
		return true
	}); err != nil {
		t.Fatal(err)
	}
	for i, r := range refs {
		body, err := s.j.Body(r).Open()
		if err != nil {
			t.Fatalf("%s: %v", out[i], err)
		}
		b, err := io.ReadAll(body)
		body.Close()
		if err != nil || len(bytes.TrimLeft(b, out[i][:1])) > 0 || !strings.HasSuffix(out[i], fmt.Sprint(" ", len(b))) {
			t.Fatalf("body of %s: %d bytes, %v", out[i], len(b), err)
		}
	}
	v, _, _ := s.j.View().Get([]byte("count"))
	return append(out, fmt.Sprintf("%x", v))
}

func shelved(t testing.TB, d *journaltest.Disk) *shelf {
	t.Helper()
	s := &shelf{j: d.Open(t)}
	s.j.Register(s, log.KindAppend, log.KindExpunge)
	if err := s.j.Start(context.Background()); err != nil {
		t.Fatal(err)
	}
	return s
}

func (s *shelf) tidy(t testing.TB) journal.Tidied {
	t.Helper()
	got, err := s.j.Tidy(t.Context(), journal.TidyOptions{Force: true})
	if err != nil {
		t.Fatal(err)
	}
	return got
}

// full is a disk with a shelf of which most was taken away.
func full(t testing.TB) (*journaltest.Disk, *shelf) {
	d := journaltest.NewDisk(t)
	d.Options.Log.SegmentSize, d.Options.Log.SpoolThreshold = 4<<10, 2<<10
	s := shelved(t, d)
	for i := range 40 {
		s.put(t, fmt.Sprintf("%c%02d", 'a'+i%26, i), 100<<(i%6))
		if i >= 5 && i%4 != 0 {
			s.take(t, fmt.Sprintf("%c%02d", 'a'+(i-5)%26, i-5))
		}
	}
	return d, s
}

func segments(t testing.TB, d *journaltest.Disk, ext string) (names []string) {
	t.Helper()
	infos, err := d.FS.ReadDir("log")
	if err != nil {
		t.Fatal(err)
	}
	for _, fi := range infos {
		if strings.HasSuffix(fi.Name, ext) {
			names = append(names, fi.Name)
		}
	}
	return names
}

func TestTidyKeepsStateAndContentAndNothingElse(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d, s := full(t)
		want := s.things(t)
		got := s.tidy(t)
		if got.Checkpoints != 2 || got.Segments < 3 || got.After >= got.Before {
			t.Fatalf("%+v", got)
		}
		if u := s.j.Disk(); u.Live <= 0 || u.Live > u.Bytes || u.Checkpoint == 0 || u.Bytes != got.After {
			t.Errorf("%+v", u)
		}
		for _, rebuild := range []bool{false, true, true} {
			if now := s.things(t); !slices.Equal(now, want) {
				t.Fatalf("rebuild %v: %v, want %v", rebuild, now, want)
			}
			d.Crash(t)
			if rebuild {
				d.DropView(t)
			}
			s = shelved(t, d)
		}
		if ns := names(s.j); len(ns) > 0 || s.renewed > 0 {
			t.Error(ns)
		}
		s.tidy(t)
		s.tidy(t)
		if got := s.tidy(t); got.Segments > 0 || got.Checkpoints > 0 {
			t.Errorf("it does not come to rest: %+v", got)
		}
	})
}

// spoil flips a bit in the bodies of the checkpoints that which names, the
// oldest of those in the log being 0.
func spoil(t testing.TB, d *journaltest.Disk, which ...int) {
	t.Helper()
	l, err := log.Open(t.Context(), log.Options{Dir: "log", FS: d.FS})
	if err != nil {
		t.Fatal(err)
	}
	var found []log.Ref
	l.Latest(t.Context(), log.KindCheckpoint, func(r log.Record) bool { found = append(found, r.Ref); return len(found) < 2 })
	l.Close()
	slices.Reverse(found)
	for _, i := range which {
		name := fmt.Sprintf("log/%012d.seg", found[i].Segment)
		b := d.FS.Peek(name)
		at := bytes.Index(b[found[i].Offset:], []byte("count"))
		if at < 0 {
			t.Fatal("no rows there")
		}
		b[found[i].Offset+int64(at)] ^= 1
		d.FS.Poke(name, b)
	}
}

func TestADamagedCheckpointIsNamedAndTheOneBeforeItUsed(t *testing.T) {
	for name, c := range map[string]struct {
		spoiled []int
		lost    bool
		names   []string
	}{
		"the newest": {[]int{1}, false, []string{journal.CondDamaged}},
		"the older":  {[]int{0}, false, nil},
		"both":       {[]int{0, 1}, true, []string{journal.CondDamaged, journal.CondDamaged, journal.CondHistoryLost}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				d := journaltest.NewDisk(t)
				d.Options.Log.SegmentSize = 4 << 10
				s := shelved(t, d)
				for i := range 20 {
					s.put(t, fmt.Sprintf("%c%02d", 'a'+i, i), 800)
					if i%3 > 0 && i > 8 { // the first segments stay as they are
						s.take(t, fmt.Sprintf("%c%02d", 'a'+i, i))
					}
				}
				s.j.Checkpoint(t.Context(), func(int) error { return nil })
				s.take(t, "g06")
				s.put(t, "y98", 900)
				s.put(t, "x97", 900)
				s.take(t, "x97")
				s.j.Checkpoint(t.Context(), func(int) error { return nil })
				if got, err := s.j.Tidy(t.Context(), journal.TidyOptions{Growth: 1 << 40}); err != nil || got.Checkpoints > 0 || got.Segments == 0 {
					t.Fatalf("%+v %v", got, err)
				}
				s.take(t, "d03")
				s.put(t, "z99", 30)
				want := s.things(t)
				d.Close(t)
				spoil(t, d, c.spoiled...)

				s = shelved(t, d) // nobody needs them yet
				if got := s.things(t); !slices.Equal(got, want) || len(names(s.j)) > 0 {
					t.Fatal(got, names(s.j))
				}
				kept := d.FS.Copy()
				got := s.tidy(t) // it is found, and replaced by two good ones
				if got.Checkpoints != 2 || !slices.Contains(names(s.j), journal.CondDamaged) {
					t.Fatalf("%+v %v", got, names(s.j))
				}
				d.Close(t)
				d.DropView(t)
				s = shelved(t, d)
				if got := s.things(t); !slices.Equal(got, want) || len(names(s.j)) > 0 {
					t.Fatal("after it was replaced:", got, names(s.j))
				}
				d.Close(t)

				d.FS = kept
				d.DropView(t)
				s = shelved(t, d)
				if got := names(s.j); !slices.Equal(got, c.names) {
					t.Errorf("%v, want %v", got, c.names)
				}
				if (s.renewed > 0) != c.lost {
					t.Errorf("renewed %d times", s.renewed)
				}
				things := s.things(t)
				if len(s.arrived) == 0 || s.arrived[0] <= 20 {
					t.Errorf("arrivals: %v", s.arrived)
				}
				if c.lost { // everything that was there, but not what was done to it
					things, want = things[:len(things)-1], want[:len(want)-1]
				}
				if !slices.Equal(things, want) {
					t.Errorf("%v, want %v", things, want)
				}
			})
		})
	}
}

func TestALoadThatWasCutShortBeginsAnew(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d, s := full(t)
		s.tidy(t)
		want := s.things(t)
		d.Close(t)
		d.DropView(t)
		ctx, cancel := context.WithCancel(t.Context())
		reads := 0
		d.FS.Hook = func(o simfs.Op) simfs.Fault { reads++; return simfs.Fault{} }
		j := d.Open(t)
		if err := j.View().Load(ctx, 7, func() ([]byte, []byte, bool, error) { // what a load leaves behind
			cancel()
			return nil, nil, false, errors.New("stop")
		}); err == nil {
			t.Fatal("no error")
		}
		i := 0
		_ = j.View().Load(t.Context(), 7, func() ([]byte, []byte, bool, error) {
			if i++; i > 20_000 {
				return nil, nil, false, errors.New("stop")
			}
			return fmt.Appendf(nil, "thing/old %06d", i), []byte("1 2 3 4 5"), true, nil
		})
		d.Crash(t)
		if d.View.Applied() != 0 {
			t.Fatal(d.View.Applied())
		}
		s = shelved(t, d)
		if got := s.things(t); !slices.Equal(got, want) {
			t.Errorf("%v, want %v", got, want)
		}
	})
}

func TestAViewFromBeforeTheHistoryThatIsLeftIsMadeAnew(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := journaltest.NewDisk(t)
		d.View.KeepHistory()
		d.Options.Log.SegmentSize = 2 << 10
		s := shelved(t, d)
		for i := range 10 {
			s.put(t, fmt.Sprintf("%c", 'a'+i), 600)
			time.Sleep(time.Second)
		}
		for i := range 8 {
			s.take(t, fmt.Sprintf("%c", 'a'+i))
		}
		s.tidy(t)
		want := s.things(t)
		d.Crash(t)
		if at := d.View.Rewind(6); at == 0 || at > 6 {
			t.Fatal(at)
		}
		s = shelved(t, d)
		if got := s.things(t); !slices.Equal(got, want) || !slices.Equal(names(s.j), []string{journal.CondViewOld}) {
			t.Errorf("%v %v, want %v", got, names(s.j), want)
		}
	})
}

func TestNoCheckpointIsMadeOfAViewThatIsWrong(t *testing.T) {
	for name, harm := range map[string]func(*journaltest.Disk, *shelf){
		"damaged":            func(d *journaltest.Disk, s *shelf) { d.View.Damage() },
		"contradicts itself": func(d *journaltest.Disk, s *shelf) { s.wrong = errors.New("two and two is five") },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				d, s := full(t)
				s.j.View().Flush(t.Context())
				before := segments(t, d, ".seg")
				harm(d, s)
				if got, err := s.j.Tidy(t.Context(), journal.TidyOptions{Force: true}); err == nil || got.Checkpoints+got.Segments > 0 {
					t.Errorf("%+v %v", got, err)
				}
				if now := segments(t, d, ".seg"); len(now) < len(before) || len(names(s.j)) != 1 {
					t.Error(now, names(s.j))
				}
			})
		})
	}
}

func TestOnAFullDiskOnlyWhatFreesMuchIsDone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var free atomic.Int64
		free.Store(1 << 40)
		d := journaltest.NewDisk(t)
		d.Options.Log.SegmentSize, d.Options.Log.SpoolThreshold = 4<<10, 2<<10
		d.Options.View.Statfs = func(string) (kv.FS, error) { return kv.FS{Total: 1 << 41, Free: free.Load()}, nil }
		s := shelved(t, d)
		for i := range 40 {
			s.put(t, fmt.Sprintf("%c%02d", 'a'+i%26, i), 100<<(i%6))
		}
		for range 2 {
			if err := s.j.Checkpoint(t.Context(), func(int) error { return nil }); err != nil {
				t.Fatal(err)
			}
		}
		for i := range 38 {
			s.take(t, fmt.Sprintf("%c%02d", 'a'+i%26, i))
		}
		want := s.things(t)
		time.Sleep(time.Second) // the view is on disk
		free.Store(0)
		time.Sleep(10 * time.Second)
		if !s.j.View().Full() {
			t.Fatal("not full")
		}
		got, err := s.j.Tidy(t.Context(), journal.TidyOptions{})
		if err != nil || got.Checkpoints != 0 || got.Segments == 0 || got.After > got.Before/2 {
			t.Errorf("%+v %v", got, err)
		}
		if now := s.things(t); !slices.Equal(now, want) {
			t.Errorf("%v, want %v", now, want)
		}
		free.Store(1 << 40)
		time.Sleep(10 * time.Second)
		d.Crash(t)
		d.DropView(t)
		s = shelved(t, d)
		if now := s.things(t); !slices.Equal(now, want) {
			t.Errorf("rebuilt: %v, want %v", now, want)
		}
	})
}

func TestTidyKeepsItsRate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, s := full(t)
		begun := time.Now()
		if _, err := s.j.Tidy(t.Context(), journal.TidyOptions{Force: true, Rate: 1 << 10}); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(begun); took < 10*time.Second || took > 10*time.Minute {
			t.Errorf("took %v", took)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		s.put(t, "y", 4000)
		s.put(t, "z", 4000)
		if _, err := s.j.Tidy(ctx, journal.TidyOptions{Force: true, Rate: 10}); !errors.Is(err, context.DeadlineExceeded) {
			t.Error(err)
		}
	})
}

// A checkpoint of version 1, as it stands in the log: later versions read it.
func TestTheFormatOfACheckpointStays(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := journaltest.NewDisk(t)
		s := shelved(t, d)
		s.put(t, "thing", 3)
		s.take(t, "thing")
		s.put(t, "x", 1)
		if err := s.j.Checkpoint(t.Context(), func(int) error { return nil }); err != nil {
			t.Fatal(err)
		}
		d.Close(t)
		l, err := log.Open(t.Context(), log.Options{Dir: "log", FS: d.FS})
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		var got string
		l.Latest(t.Context(), log.KindCheckpoint, func(r log.Record) bool {
			b, err := l.Body(r.Ref).Open()
			if err != nil {
				t.Fatal(err)
			}
			body, _ := io.ReadAll(b)
			b.Close()
			body = body[:bytes.Index(body, []byte("thing/"))-1] // the next row's value has a checksum with a random salt
			got = fmt.Sprintf("meta %s\nrows %s\n", hex.EncodeToString(r.Meta), hex.EncodeToString(body))
			return false
		})
		if *update {
			if err := os.WriteFile("testdata/v1/checkpoint.txt", []byte(got), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		want, err := os.ReadFile("testdata/v1/checkpoint.txt")
		if err != nil || got != string(want) {
			t.Errorf("%v: got\n%swant\n%s", err, got, want)
		}
	})
}
