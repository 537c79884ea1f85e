package kv_test

import (
	"context"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"testing"

	"posthouse/mailstore/kv"
)

// A record of the benchmarks: five rows of 150 bytes, as a delivery has, one of
// them written by every record.
func delivery(seq uint64) *kv.Batch {
	b := new(kv.Batch)
	for i := range 4 {
		key := binary.BigEndian.AppendUint64([]byte{'m', byte(i)}, seq)
		b.Put(key, make([]byte, 150))
	}
	b.Put([]byte("folder"), binary.BigEndian.AppendUint64(nil, seq))
	return b
}

func openBench(b testing.TB, dir string) *kv.View {
	v, err := kv.Open(context.Background(), kv.Options{Dir: dir})
	if err != nil {
		b.Fatal(err)
	}
	return v
}

func filled(b testing.TB, dir string, records uint64) *kv.View {
	v := openBench(b, dir)
	for seq := uint64(1); seq <= records; seq++ {
		if err := v.Apply(seq, delivery(seq)); err != nil {
			b.Fatal(err)
		}
	}
	if err := v.Flush(context.Background()); err != nil {
		b.Fatal(err)
	}
	return v
}

func BenchmarkApplyAndCommit(b *testing.B) {
	v := openBench(b, b.TempDir())
	defer v.Close()
	seq := uint64(0)
	b.ReportAllocs()
	for b.Loop() {
		seq++
		if err := v.Apply(seq, delivery(seq)); err != nil {
			b.Fatal(err)
		}
	}
	if err := v.Flush(context.Background()); err != nil { // the last of it counts too
		b.Fatal(err)
	}
	b.ReportMetric(float64(seq)/b.Elapsed().Seconds(), "records/s")
}

func BenchmarkRead(b *testing.B) {
	const records = 25_000 // 100,000 rows and one
	for _, overlay := range []uint64{0, 2000} {
		v := filled(b, b.TempDir(), records)
		for seq := uint64(1); seq <= overlay; seq++ {
			k := delivery(seq * (records / 2000))
			if err := v.Apply(records+seq, k); err != nil {
				b.Fatal(err)
			}
		}
		b.Run(fmt.Sprintf("Get/overlay=%d", overlay), func(b *testing.B) {
			b.ReportAllocs()
			n := uint64(0)
			for b.Loop() {
				n = n*6364136223846793005 + 1442695040888963407
				if _, ok, err := v.Get(binary.BigEndian.AppendUint64([]byte{'m', 1}, 1+(n>>33)%records)); !ok || err != nil {
					b.Fatal(ok, err)
				}
			}
		})
		for _, rows := range []int{1, 100, 100_000} {
			b.Run(fmt.Sprintf("Scan/rows=%d/overlay=%d", rows, overlay), func(b *testing.B) {
				b.ReportAllocs()
				for b.Loop() {
					n := 0
					if err := v.Scan([]byte("m"), nil, func(_, _ []byte) bool { n++; return n < rows }); err != nil || n != rows {
						b.Fatal(n, err)
					}
				}
			})
		}
		v.Close()
	}
}

func BenchmarkOpen100kRows(b *testing.B) {
	dir := b.TempDir()
	filled(b, dir, 25_000).Close()
	for b.Loop() {
		openBench(b, dir).Close()
	}
	b.StopTimer()
	runtime.GC()
	v := openBench(b, dir)
	defer v.Close()
	var ms runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&ms)
	b.ReportMetric(float64(ms.HeapInuse)/(1<<20), "heapMiB")
	if s, err := os.ReadFile("/proc/self/statm"); err == nil {
		var size, rss, shared int
		fmt.Sscan(string(s), &size, &rss, &shared)
		b.ReportMetric(float64(rss*os.Getpagesize())/(1<<20), "rssMiB")
		b.ReportMetric(float64(shared*os.Getpagesize())/(1<<20), "ofwhichfilesMiB")
	}
	if fs, err := filepath.Glob(filepath.Join(dir, "db", "*.sst")); err == nil {
		b.ReportMetric(float64(len(fs)), "tables")
	}
}
