package journal_test

import (
	"context"
	"encoding/binary"
	"path/filepath"
	"sync"
	"testing"

	"posthouse/mailstore/journal"
	"posthouse/mailstore/kv"
	"posthouse/mailstore/log"
)

// rows is an engine that writes what a delivery writes.
type rows struct{}

func (e *rows) Apply(r log.Record, b *kv.Batch, live bool) error {
	for i := range 4 {
		b.Put(binary.BigEndian.AppendUint64([]byte{'m', byte(i)}, r.Seq), r.Meta)
	}
	b.Put([]byte("folder"), binary.BigEndian.AppendUint64(nil, r.Seq))
	return nil
}

func onDisk(b *testing.B, dir string) *journal.Journal {
	var opt journal.Options
	opt.Log.Dir, opt.View.Dir = filepath.Join(dir, "log"), filepath.Join(dir, "view")
	j, err := journal.Open(context.Background(), opt)
	if err != nil {
		b.Fatal(err)
	}
	j.Register(&rows{}, log.KindAppend)
	return j
}

func BenchmarkAppendApplied(b *testing.B) {
	for _, writers := range []int{1, 64} {
		b.Run(map[int]string{1: "writers=1", 64: "writers=64"}[writers], func(b *testing.B) {
			j := onDisk(b, b.TempDir())
			defer j.Close()
			if err := j.Start(context.Background()); err != nil {
				b.Fatal(err)
			}
			meta := make([]byte, 150)
			b.ReportAllocs()
			b.ResetTimer()
			var wg sync.WaitGroup
			for w := range writers {
				wg.Go(func() {
					for range (b.N + w) / writers {
						if err := j.Append(log.Entry{Kind: log.KindAppend, Meta: meta}).Applied(context.Background()); err != nil {
							b.Error(err)
							return
						}
					}
				})
			}
			wg.Wait()
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "records/s")
		})
	}
}

// One operation is the rebuild of the view from 200,000 records.
func BenchmarkRebuild(b *testing.B) {
	const records = 200_000
	dir := b.TempDir()
	j := onDisk(b, dir)
	if err := j.Start(context.Background()); err != nil {
		b.Fatal(err)
	}
	meta := make([]byte, 150)
	for i := range records {
		if i%1000 == 0 {
			if err := j.Admit(context.Background(), 150_000); err != nil {
				b.Fatal(err)
			}
		}
		j.Append(log.Entry{Kind: log.KindAppend, Meta: meta})
	}
	if err := j.Close(); err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		j := onDisk(b, dir)
		if err := j.Rebuild(context.Background(), func(_, _ uint64) {}); err != nil {
			b.Fatal(err)
		}
		if err := j.Close(); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(records*b.N)/b.Elapsed().Seconds(), "records/s")
}
