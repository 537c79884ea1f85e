package log_test

import (
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"testing"

	"posthouse/mailstore/log"
)

// BenchmarkAppend appends 4 KiB mails on the real disk, each writer waiting
// for its own. records/sync is how many one sync served.
func BenchmarkAppend(b *testing.B) {
	meta, data := content(1, 400), content(2, 4096)
	for _, writers := range []int{1, 16, 64, 128} {
		b.Run(fmt.Sprintf("writers=%d", writers), func(b *testing.B) {
			l, err := log.Open(b.Context(), log.Options{Dir: b.TempDir()})
			if err != nil {
				b.Fatal(err)
			}
			one := func() error {
				d := l.NewDraft()
				d.Write(data)
				if err := d.Seal(ctx); err != nil {
					return err
				}
				if err := l.Admit(ctx, d.Size()); err != nil {
					return err
				}
				tk := l.Append(log.Entry{Kind: log.KindAccept, Meta: meta, Body: d})
				<-tk.Done()
				return tk.Err()
			}
			if err := one(); err != nil {
				b.Fatal(err)
			}
			before := l.Stats()
			b.SetBytes(int64(len(data)))
			b.ReportAllocs()
			var left atomic.Int64
			var wg sync.WaitGroup
			b.ResetTimer()
			left.Store(int64(b.N))
			for range writers {
				wg.Go(func() {
					for left.Add(-1) >= 0 {
						if err := one(); err != nil {
							b.Error(err)
							return
						}
					}
				})
			}
			wg.Wait()
			b.StopTimer()
			s := l.Stats()
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "records/s")
			b.ReportMetric(float64(s.Records-before.Records)/float64(s.Syncs-before.Syncs), "records/sync")
			if err := l.Close(); err != nil {
				b.Fatal(err)
			}
		})
	}
}

func filled(b *testing.B, n, size int) (*log.Log, []log.Record, string) {
	dir := b.TempDir()
	var recs []log.Record
	l, err := log.Open(b.Context(), log.Options{Dir: dir, Synced: func(rs []log.Record) { recs = append(recs, rs...) }})
	if err != nil {
		b.Fatal(err)
	}
	var last *log.Ticket
	for i := range n {
		e, err := entry(l, i, size)
		if err != nil {
			b.Fatal(err)
		}
		if err := l.Admit(ctx, int64(size)); err != nil {
			b.Fatal(err)
		}
		last = l.Append(e)
	}
	<-last.Done()
	if err := l.Close(); err != nil {
		b.Fatal(err)
	}
	if l, err = log.Open(b.Context(), log.Options{Dir: dir}); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { l.Close() })
	return l, recs, dir
}

func BenchmarkBody(b *testing.B) {
	for _, size := range []int{4 << 10, 100 << 10, 4 << 20} {
		b.Run(fmt.Sprintf("bytes=%d", size), func(b *testing.B) {
			l, recs, _ := filled(b, 16, size)
			b.SetBytes(int64(size))
			b.ReportAllocs()
			i := 0
			for b.Loop() {
				r, err := l.Body(recs[i%len(recs)].Ref).Open()
				if err != nil {
					b.Fatal(err)
				}
				if _, err := io.Copy(io.Discard, r); err != nil {
					b.Fatal(err)
				}
				r.Close()
				i++
			}
		})
	}
}

func BenchmarkReplay(b *testing.B) {
	const n = 20_000
	l, _, _ := filled(b, n, 4096)
	b.ReportAllocs()
	for b.Loop() {
		seen := 0
		if err := l.Replay(ctx, 1, func(log.Record) error { seen++; return nil }); err != nil || seen != n {
			b.Fatal(seen, err)
		}
	}
	b.ReportMetric(float64(n)*float64(b.N)/b.Elapsed().Seconds(), "records/s")
}
