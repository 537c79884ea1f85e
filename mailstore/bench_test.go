package mailstore_test

import (
	"bytes"
	"context"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"

	"posthouse/mailstore"
	"posthouse/mailstore/journal"
	"posthouse/mailstore/kv"
	"posthouse/mailstore/log"
	"posthouse/transport"
)

// onDisk is a store on a real folder.
func onDisk(b *testing.B) *world {
	b.Helper()
	dir := b.TempDir()
	j, err := journal.Open(context.Background(), journal.Options{
		Log:  log.Options{Dir: dir + "/log"},
		View: kv.Options{Dir: dir + "/view"},
	})
	if err != nil {
		b.Fatal(err)
	}
	w := &world{t: b, j: j, s: mailstore.New(j, mailstore.Options{})}
	if err := j.Start(context.Background()); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { j.Close(); w.s.Close() })
	return w
}

var body4K = text(strings.Repeat("x", 60)) + strings.Repeat(strings.Repeat("y", 70)+"\r\n", 56)

func BenchmarkDeliver4KiB64AtOnce(b *testing.B) {
	w := onDisk(b)
	for n := byte(1); n <= 32; n++ {
		w.create(n)
	}
	st := structure(body4K)
	var next atomic.Uint32
	b.SetParallelism(32)
	b.SetBytes(int64(len(body4K)))
	b.ReportAllocs()
	b.ResetTimer()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			n := next.Add(1)
			d := w.j.NewDraft()
			d.Write([]byte(body4K))
			d.Seal(context.Background())
			_, err := w.s.Deliver(context.Background(), &mailstore.Delivery{
				Envelope: transport.Envelope{ID: transport.MessageID{0: byte(n), 1: byte(n >> 8), 2: byte(n >> 16), 3: 1}, From: "ada@example.net"},
				Rcpts:    []transport.Recipient{{Mailbox: boxID(byte(1 + n%32))}},
				Draft:    d, Structure: st,
			})
			if err != nil {
				b.Error(err)
			}
		}
	})
}

func fill(b *testing.B, w *world, n int) *mailstore.Folder {
	b.Helper()
	w.create(1)
	st := structure(body4K)
	f := w.folder(1, "INBOX")
	for have := 0; have < n; have += 500 {
		msgs := make([]mailstore.AppendMessage, min(500, n-have))
		for i := range msgs {
			d := w.j.NewDraft()
			d.Write([]byte(body4K))
			d.Seal(context.Background())
			msgs[i] = mailstore.AppendMessage{Draft: d, Structure: st}
		}
		if _, _, err := f.Append(context.Background(), msgs); err != nil {
			b.Fatal(err)
		}
	}
	return f
}

func copies(b *testing.B, w *world, n int) *mailstore.Folder {
	f := fill(b, w, 1000)
	for have := 1000; have < n; {
		uids := make([]mailstore.UID, min(have, n-have))
		for i := range uids {
			uids[i] = mailstore.UID(i + 1)
		}
		if _, err := f.Copy(context.Background(), uids, "INBOX"); err != nil {
			b.Fatal(err)
		}
		have += len(uids)
	}
	if err := w.j.View().Flush(context.Background()); err != nil {
		b.Fatal(err)
	}
	return f
}

func heap() uint64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

// A store with nothing loaded, on the same journal's rows.
func BenchmarkOpenFolderOf100k(b *testing.B) {
	w := onDisk(b)
	copies(b, w, 100000)
	b.ReportAllocs()
	var kept *mailstore.Folder
	before := heap()
	for b.Loop() {
		b.StopTimer()
		w.s = mailstore.Reader(w.j)
		b.StartTimer()
		kept = w.folder(1, "INBOX")
		if _, err := kept.Infos([]mailstore.UID{1}); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(heap()-before)/100000, "B/message")
	runtime.KeepAlive(kept)
}

func BenchmarkListOf100k(b *testing.B) {
	w := onDisk(b)
	f := copies(b, w, 100000)
	b.ReportAllocs()
	for b.Loop() {
		if _, infos, err := f.List(); err != nil || len(infos) != 100000 {
			b.Fatal(len(infos), err)
		}
	}
}

func BenchmarkSetFlagsOneAtATimeIn100k(b *testing.B) {
	w := onDisk(b)
	f := copies(b, w, 100000)
	uid, op := mailstore.UID(0), mailstore.FlagsAdd
	b.ReportAllocs()
	for b.Loop() {
		if uid++; uid > 100000 {
			uid, op = 1, mailstore.FlagsAdd+mailstore.FlagsRemove-op
		}
		if _, _, err := f.SetFlags(context.Background(), []mailstore.UID{uid}, op, []mailstore.Flag{mailstore.Seen}, 0); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkMessagesOf10k(b *testing.B) {
	w := onDisk(b)
	f := fill(b, w, 10000)
	buf := make([]byte, 64<<10)
	b.Run("structure", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			for uid := mailstore.UID(1); uid <= 10000; uid++ {
				if _, err := f.Message(uid); err != nil {
					b.Fatal(err)
				}
			}
		}
	})
	b.Run("body", func(b *testing.B) {
		b.SetBytes(int64(len(body4K)) * 10000)
		for b.Loop() {
			for uid := mailstore.UID(1); uid <= 10000; uid++ {
				m, err := f.Message(uid)
				if err != nil {
					b.Fatal(err)
				}
				r, err := m.Body.Open()
				if err != nil {
					b.Fatal(err)
				}
				n, err := r.Read(buf)
				r.Close()
				if err != nil || !bytes.Equal(buf[:n], []byte(body4K)[:n]) {
					b.Fatal(n, err)
				}
			}
		}
	})
}

func BenchmarkChangesSinceAfterOneChangeIn100k(b *testing.B) {
	w := onDisk(b)
	f := copies(b, w, 100000)
	st, _ := f.Status()
	if _, _, err := f.SetFlags(context.Background(), []mailstore.UID{50000}, mailstore.FlagsAdd, []mailstore.Flag{mailstore.Seen}, 0); err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		if c, err := f.ChangesSince(st.HighestModSeq); err != nil || len(c.Changed) != 1 {
			b.Fatal(c, err)
		}
	}
}
