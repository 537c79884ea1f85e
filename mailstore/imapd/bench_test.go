package imapd

import (
	"bytes"
	"crypto/tls"
	"fmt"
	"io"
	"runtime"
	"strings"
	"testing"
	"time"

	"posthouse/mailstore"
)

// fill puts n messages of 4 KiB into a folder.
func (w *world) fill(f *mailstore.Folder, n int) {
	body := strings.Repeat(strings.Repeat("x", 70)+"\r\n", 52)
	for i := 0; i < n; i += 500 {
		var texts []string
		for k := range min(500, n-i) {
			texts = append(texts, fmt.Sprintf("From: Eva <eva%d@company.com>\r\nTo: ada@company.com, \"B, C\" <bc@company.com>\r\nSubject: report %d\r\nDate: Mon, 2 Feb 2026 09:59:58 +0100\r\nMessage-ID: <%d@company.com>\r\n\r\n%s", k, i+k, i+k, body))
		}
		w.put(f, texts...)
	}
}

// run sends a command and reads to its end without looking at what comes.
func (c *client) run(cmd string) int {
	c.say("q " + cmd + "\r\n")
	n := 0
	for {
		l, err := c.r.ReadSlice('\n')
		n += len(l)
		if err != nil && len(l) == 0 {
			c.t.Fatal(err)
		}
		if bytes.HasPrefix(l, []byte("q ")) {
			if !bytes.HasPrefix(l, []byte("q OK")) {
				c.t.Fatalf("%s", l)
			}
			return n
		}
	}
}

func BenchmarkFolder100k(b *testing.B) {
	w := newWorld(b, Config{})
	w.fill(w.folder("ada", "INBOX"), 100_000)
	c := w.login("ada")
	c.run("SELECT INBOX")
	for _, bm := range []struct{ name, cmd string }{
		{"select", "SELECT INBOX"},
		{"fetch 50 envelopes", "FETCH 1:50 ENVELOPE"},
		{"fetch 10k envelopes", "FETCH 1:10000 ENVELOPE"},
		{"fetch 100k flags", "FETCH 1:* (UID FLAGS)"},
		{"fetch 1k bodies", "FETCH 1:1000 BODY.PEEK[]"},
		{"fetch 1k list fields", "UID FETCH 1:1000 (UID RFC822.SIZE FLAGS BODY.PEEK[HEADER.FIELDS (From To Cc Bcc Subject Date Message-ID)])"},
		{"search unseen", "SEARCH UNSEEN"},
		{"search subject", "SEARCH SUBJECT 99999"},
		{"noop", "NOOP"},
	} {
		b.Run(bm.name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				b.SetBytes(int64(c.run(bm.cmd)))
			}
		})
	}
}

func BenchmarkAppend4KiB(b *testing.B) {
	w := newWorld(b, Config{})
	c := w.login("ada")
	text := simple + strings.Repeat(strings.Repeat("x", 70)+"\r\n", 56)
	cmd := fmt.Sprintf("APPEND Archive {%d+}\r\n%s", len(text), text)
	b.ReportAllocs()
	for b.Loop() {
		c.run(cmd)
	}
}

// BenchmarkIdleConnection reports what a connection costs that waits in IDLE.
func BenchmarkIdleConnection(b *testing.B) {
	for _, secure := range []bool{false, true} {
		b.Run(fmt.Sprintf("tls=%v", secure), func(b *testing.B) {
			const n = 200
			w := newWorld(b, Config{PerUser: n + 1})
			w.put(w.folder("ada", "INBOX"), simple)
			for b.Loop() {
				heap := func() uint64 {
					runtime.GC()
					runtime.GC()
					var m runtime.MemStats
					runtime.ReadMemStats(&m)
					return m.HeapInuse + m.StackInuse
				}
				before := heap()
				var open []io.Closer
				for range n {
					var c *client
					if secure {
						c = w.client(w.imaps.dial("127.0.0.1:1"))
						c.secure(&tls.Config{InsecureSkipVerify: true})
						c.line()
					} else {
						c = w.dial()
					}
					c.ok(`LOGIN ada "pw of ada"`)
					c.ok("SELECT INBOX")
					c.say("i IDLE\r\n")
					c.line()
					open = append(open, c)
				}
				time.Sleep(50 * time.Millisecond) // for the goroutines to settle; only a benchmark may
				b.ReportMetric(float64(heap()-before)/n/1024, "KiB/connection-pair")
				for _, c := range open {
					c.Close()
				}
			}
		})
	}
}
