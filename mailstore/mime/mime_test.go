package mime

import (
	"bytes"
	"encoding/json"
	"flag"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/fxamacker/cbor/v2"
	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "rewrite the golden files")

// TestGolden compares what Parse finds in testdata/*.eml with the .json beside
// each, and the round trip through the stored form.
func TestGolden(t *testing.T) {
	files, err := filepath.Glob("testdata/*.eml")
	if err != nil || len(files) == 0 {
		t.Fatal("no samples", err)
	}
	for _, f := range files {
		t.Run(strings.TrimSuffix(filepath.Base(f), ".eml"), func(t *testing.T) {
			msg, err := os.ReadFile(f)
			if err != nil {
				t.Fatal(err)
			}
			s := parse(t, msg)
			got, err := json.MarshalIndent(describe(s, msg), "", " ")
			if err != nil {
				t.Fatal(err)
			}
			golden := strings.TrimSuffix(f, ".eml") + ".json"
			if *update {
				if err := os.WriteFile(golden, append(got, '\n'), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(string(bytes.TrimSpace(want)), string(got)); d != "" {
				t.Errorf("differs from %s (-want +got):\n%s", golden, d)
			}
		})
	}
}

// TestStoredForm opens what version 1 wrote.
func TestStoredForm(t *testing.T) {
	msg, err := os.ReadFile("testdata/mixed_with_attachment.eml")
	if err != nil {
		t.Fatal(err)
	}
	s := parse(t, msg)
	got, err := s.MarshalBinary()
	if err != nil {
		t.Fatal(err)
	}
	const name = "testdata/v1/mixed_with_attachment.bin"
	if *update {
		if err := os.WriteFile(name, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	old, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	var back Structure
	if err := back.UnmarshalBinary(old); err != nil {
		t.Fatal(err)
	}
	s.Clean = false // the fixture is older than this
	if d := cmp.Diff(s, &back); d != "" {
		t.Error(d)
	}
	for n := range old {
		if err := new(Structure).UnmarshalBinary(old[:n]); err == nil {
			t.Errorf("the first %d bytes alone are taken", n)
		}
	}
}

func TestAHeaderWithoutReturnPathIsCleanAndStaysSo(t *testing.T) {
	for _, c := range []struct {
		header string
		clean  bool
	}{
		{"Subject: a\r\n\r\n", true},
		{"Return-Path: <a@example.net>\r\nSubject: a\r\n\r\n", false},
		{"Subject: a\r\nRETURN-path  : <a@example.net>\r\n\r\n", false},
		{"Subject: a\r\nreturn-path: <a@example.net>", false},
		{"Subject: a\r\n return-path: in a folded line\r\n\r\n", true},
		{"Subject: a\r\n\r\nReturn-Path: in the body\r\n", true},
		{"X: " + strings.Repeat("x", MaxHeaderSize) + "\r\nReturn-Path: <a@example.net>\r\n\r\n", false},
	} {
		s := parse(t, []byte(c.header))
		if s.Clean != c.clean {
			t.Errorf("%.60q: clean is %v", c.header, s.Clean)
		}
		b, err := s.MarshalBinary()
		if err != nil {
			t.Fatal(err)
		}
		var back Structure
		if err := back.UnmarshalBinary(b); err != nil || back.Clean != c.clean {
			t.Errorf("%.60q: read back %v, %v", c.header, back.Clean, err)
		}
	}
}

func TestStoredFormWithinCBOR(t *testing.T) {
	type record struct {
		S *Structure `cbor:"1,keyasint"`
	}
	s := parse(t, sample(4<<10))
	b, err := cbor.Marshal(record{s})
	if err != nil {
		t.Fatal(err)
	}
	if len(b) > 400 {
		t.Errorf("an ordinary message takes %d bytes", len(b))
	}
	var back record
	if err := cbor.Unmarshal(b, &back); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(s, back.S); d != "" {
		t.Error(d)
	}
	if s.Envelope.Date.Format(time.RFC3339) != back.S.Envelope.Date.Format(time.RFC3339) {
		t.Error("the sender's zone is lost")
	}
	var e Envelope
	raw, _ := s.MarshalBinary()
	if err := UnmarshalEnvelope(raw, &e); err != nil || !cmp.Equal(e, s.Envelope) {
		t.Error("the envelope alone differs", err)
	}
}

func TestParseDate(t *testing.T) {
	for in, want := range map[string]string{
		"Fri, 21 Nov 1997 09:55:06 -0600":            "1997-11-21T09:55:06-06:00",
		"21 Nov 97 09:55:06 GMT":                     "1997-11-21T09:55:06Z",
		"Fri, 21 Nov 1997 09(comment):55 -0600":      "",
		"Fri,21 Nov 1997 9:55 (c (c)) +0100":         "1997-11-21T09:55:00+01:00",
		"Thu Feb  5 10:11:12 2026":                   "2026-02-05T10:11:12Z",
		"2026-02-05T10:11:12+02:00":                  "2026-02-05T10:11:12+02:00",
		"Thursday, 05-Feb-26 10:11:12 EST":           "2026-02-05T10:11:12-05:00",
		"5 February 2026 10:11:12 +01:00":            "2026-02-05T10:11:12+01:00",
		"Mon, 30 Feb 2026 10:11:12 +0000":            "2026-03-02T10:11:12Z",
		"Mon, 99 Feb 2026 10:11:12 +0000":            "",
		"":                                           "",
		"never":                                      "",
		"1 Jan 2026":                                 "",
		"Thu, 5 Feb 2026 10:11:60 +9999":             "2026-02-05T10:12:00Z",
		strings.Repeat("(", 1000) + "5 Feb 2026 1:2": "",
	} {
		got, ok := ParseDate([]byte(in))
		if ok != (want != "") || ok && got.Format(time.RFC3339) != want {
			t.Errorf("%q is %v %v, want %q", in, got.Format(time.RFC3339), ok, want)
		}
	}
}

func TestFieldsAndFilter(t *testing.T) {
	block := []byte("Received: a\r\n b\r\nBcc: hidden\r\nSubject : x\nX-Empty:\r\n\r\nbody: no\r\n")
	var names []string
	for f := range Fields(block) {
		names = append(names, string(f.Name)+"="+string(f.Value))
		if !bytes.HasPrefix(block[f.Start:], f.Name) || block[f.End-1] != '\n' {
			t.Errorf("%s stands elsewhere", f.Name)
		}
	}
	if d := cmp.Diff([]string{"Received= a\r\n b", "Bcc= hidden", "Subject= x", "X-Empty="}, names); d != "" {
		t.Error(d)
	}
	if got := string(AppendFields(nil, block, []string{"BCC", "subject"}, false)); got != "Bcc: hidden\r\nSubject : x\n\r\n" {
		t.Errorf("%q", got)
	}
	if got := string(AppendFields(nil, block, []string{"BCC", "received"}, true)); got != "Subject : x\nX-Empty:\r\n\r\n" {
		t.Errorf("%q", got)
	}
	h, cut, err := ReadHeader(bytes.NewReader(block), int64(len(block)))
	if want := string(block[:len(block)-10]); string(h) != want || cut || err != nil {
		t.Errorf("%q %v %v", h, cut, err)
	}
	long := append(bytes.Repeat([]byte("X: y\r\n"), MaxHeaderSize), block...)
	h, cut, err = ReadHeader(bytes.NewReader(long), int64(len(long)))
	if len(h) > MaxHeaderSize || len(h) < MaxHeaderSize-10 || !cut || err != nil {
		t.Errorf("%d bytes, %v %v", len(h), cut, err)
	}
}

func TestDecodedBodies(t *testing.T) {
	for _, c := range []struct{ name, encoding, charset, in, want string }{
		{"quoted-printable with soft breaks", "QUOTED-PRINTABLE", "utf-8", "caf=C3=\r\n=A9 =  \r\nx  \r\n=zz=", "café x\r\n=zz="},
		{"base64 with rubbish between", "BASE64", "", "aGVs\r\n!bG8=\r\nIQ==", "hello!"},
		{"Latin 2", "8BIT", "iso-8859-2", "\xb9ok", "šok"},
		{"no charset, no UTF-8", "8BIT", "", strings.Repeat("x", 5000) + "\xe9\xe8", strings.Repeat("x", 5000) + "éè"},
		{"UTF-8 without a word of it", "7BIT", "", strings.Repeat("ř", 5000), strings.Repeat("ř", 5000)},
		{"unknown encoding comes as it is", "X-UUE", "", "raw", "raw"},
	} {
		p := &Part{Encoding: c.encoding, Params: []Param{{"charset", c.charset}}}
		for _, r := range []io.Reader{strings.NewReader(c.in), &oneByte{s: c.in}} {
			got, err := io.ReadAll(p.Text(r))
			if string(got) != c.want || err != nil {
				t.Errorf("%s: %.60q, %v", c.name, got, err)
			}
		}
	}
}

type oneByte struct{ s string }

func (o *oneByte) Read(p []byte) (int, error) {
	if o.s == "" {
		return 0, io.EOF
	}
	p[0], o.s = o.s[0], o.s[1:]
	return 1, nil
}

func TestAnErrorOfTheReaderIsReturned(t *testing.T) {
	if _, err := Parse(bytes.NewReader(nil), 10); err == nil {
		t.Error("ten bytes of nothing are taken")
	}
}

// TestCosts is ATTACKS.md A9 and A10: at most 2 s of CPU and 64 MiB each.
func TestCosts(t *testing.T) {
	rep := strings.Repeat
	nested := func(depth int) []byte {
		var b bytes.Buffer
		for i := range depth {
			b.WriteString("Content-Type: multipart/mixed; boundary=b")
			b.WriteString(strings.ToLower(time.Duration(i).String()))
			b.WriteString("\r\n\r\n--b")
			b.WriteString(time.Duration(i).String())
			b.WriteString("\r\n")
		}
		return b.Bytes()
	}
	for name, msg := range map[string][]byte{
		"multiparts a million deep":        nested(1e6),
		"messages a million deep":          []byte(rep("Content-Type: message/rfc822\r\n\r\n", 1e6)),
		"a million parts":                  []byte("Content-Type: multipart/mixed; boundary=b\r\n\r\n" + rep("--b\r\n\r\nx\r\n", 1e6)),
		"a million parts of long headers":  []byte("Content-Type: multipart/mixed; boundary=b\r\n\r\n" + rep("--b\r\nContent-Description: "+rep("=?a?q?", 50)+"\r\n\r\nx\r\n", 1e5)),
		"lines that are nearly delimiters": []byte("Content-Type: multipart/mixed; boundary=" + rep("b", 200) + "\r\n\r\n" + rep("--"+rep("b", 199)+"\r\n", 2e5)),
		"a header of 30 MiB":               []byte(rep("X-Field: "+rep("x", 60)+"\r\n", 450_000) + "\r\nbody"),
		"one field of 30 MiB":              []byte("Subject: " + rep("=?utf-8?q?x?= ", 2_200_000) + "\r\n\r\nbody"),
		"one line of 30 MiB":               []byte(rep("x", 30<<20)),
		"half a million Received":          []byte(rep("Received: x\r\n", 500_000) + "\r\n"),
		"a hundred thousand To":            []byte(rep("To: a@b\r\n", 100_000) + "\r\n"),
		"a hundred thousand addresses":     []byte("To: " + rep("a@b,", 100_000) + "\r\n\r\n"),
		"comments in comments":             []byte("To: " + rep("(", 1e6) + "\r\nCc: " + rep("<", 1e5) + "\r\nFrom: " + rep(":;", 1e5) + "\r\n\r\n"),
		"unfinished encoded words":         []byte("Subject: " + rep("=?a?q?", 40_000) + "\r\nFrom: " + rep("=?a?q?", 30_000) + "\r\n\r\n"),
		"a hundred thousand name*N*":       []byte("Content-Type: text/plain" + rep("; name*1*=a", 100_000) + "\r\n\r\n"),
		"folded name*N*":                   []byte("Content-Type: text/plain" + rep(";\r\n name*1*=a", 20_000) + "\r\n\r\n"),
	} {
		t.Run(name, func(t *testing.T) {
			runtime.GC()
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			start := cpu(t)
			r := &countingReader{r: bytes.NewReader(msg)}
			s, err := Parse(r, int64(len(msg)))
			if err != nil {
				t.Fatal(err)
			}
			used := cpu(t) - start
			runtime.ReadMemStats(&after)
			if used > 2*time.Second {
				t.Errorf("%v of CPU", used)
			}
			if mem := after.TotalAlloc - before.TotalAlloc; mem > 64<<20 {
				t.Errorf("%d MiB allocated", mem>>20)
			}
			if r.n != int64(len(msg)) {
				t.Errorf("read %d bytes of %d", r.n, len(msg))
			}
			b, err := s.MarshalBinary()
			if err != nil || len(b) > 512<<10 {
				t.Errorf("stored in %d bytes, %v", len(b), err)
			}
			if err := new(Structure).UnmarshalBinary(b); err != nil {
				t.Error(err)
			}
		})
	}
}

func cpu(t *testing.T) time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		t.Fatal(err)
	}
	return time.Duration(u.Utime.Nano())
}

type countingReader struct {
	r io.ReaderAt
	n int64
}

func (c *countingReader) ReadAt(p []byte, off int64) (int, error) {
	c.n += int64(len(p))
	return c.r.ReadAt(p, off)
}

func parse(t testing.TB, msg []byte) *Structure {
	t.Helper()
	s, err := Parse(bytes.NewReader(msg), int64(len(msg)))
	if err != nil {
		t.Fatal(err)
	}
	checkTree(t, s.Root, 0, int64(len(msg)), 1)
	b, err := s.MarshalBinary()
	if err != nil {
		t.Fatal(err)
	}
	var back Structure
	if err := back.UnmarshalBinary(b); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(s, &back); d != "" {
		t.Fatalf("the stored form loses something:\n%s", d)
	}
	return s
}

func checkTree(t testing.TB, p *Part, from, end int64, depth int) {
	t.Helper()
	if depth > MaxDepth || p.Header < from || p.Body < p.Header || p.End < p.Body || p.End > end {
		t.Fatalf("part [%d %d %d) at depth %d lies outside of [%d %d)", p.Header, p.Body, p.End, depth, from, end)
	}
	from = p.Body
	for _, c := range p.Children {
		checkTree(t, c, from, p.End, depth+1)
		from = c.End
	}
}

type described struct {
	Structure *Structure
	Bodies    map[string]string
}

func describe(s *Structure, msg []byte) described {
	d := described{s, map[string]string{}}
	var walk func(p *Part, path string)
	walk = func(p *Part, path string) {
		d.Bodies[path] = string(msg[p.Body:p.End])
		for i, c := range p.Children {
			walk(c, path+"."+string(rune('1'+i)))
		}
	}
	walk(s.Root, "0")
	return d
}

func FuzzParse(f *testing.F) {
	files, _ := filepath.Glob("testdata/*.eml")
	for _, name := range files {
		if b, err := os.ReadFile(name); err == nil {
			f.Add(b)
		}
	}
	f.Fuzz(func(t *testing.T, msg []byte) {
		parse(t, msg)
		for field := range Fields(msg) {
			ParseAddresses(field.Value, 10)
			DecodeText(field.Value)
			ParseDate(field.Value)
		}
		p := Part{Encoding: "QUOTED-PRINTABLE"}
		if _, err := io.Copy(io.Discard, p.Text(bytes.NewReader(msg))); err != nil {
			t.Error(err)
		}
	})
}

func FuzzUnmarshal(f *testing.F) {
	b, _ := os.ReadFile("testdata/v1/mixed_with_attachment.bin")
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		var s Structure
		if s.UnmarshalBinary(b) == nil {
			if _, err := s.MarshalBinary(); err != nil {
				t.Error(err)
			}
		}
	})
}

func sample(size int) []byte {
	b := []byte("Received: from mail.example.net (mail.example.net [192.0.2.1])\r\n by plzen.company.com with ESMTPS id 12345; Mon, 2 Feb 2026 10:00:00 +0100\r\n" +
		"Date: Mon, 2 Feb 2026 09:59:58 +0100\r\nFrom: =?utf-8?Q?Eva_Nov=C3=A1kov=C3=A1?= <eva@company.com>\r\nTo: \"Doe, John\" <john@example.net>, b@example.net\r\n" +
		"Subject: Weekly report and some other words\r\nMessage-ID: <20260202095958.12345@company.com>\r\nMIME-Version: 1.0\r\n" +
		"Content-Type: multipart/alternative; boundary=\"=_boundary\"\r\n\r\n--=_boundary\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Transfer-Encoding: 8bit\r\n\r\n")
	line := []byte(strings.Repeat("x", 70) + "\r\n")
	for len(b) < size/2 {
		b = append(b, line...)
	}
	b = append(b, "--=_boundary\r\nContent-Type: text/html; charset=utf-8\r\n\r\n"...)
	for len(b) < size-15 {
		b = append(b, line...)
	}
	return append(b, "--=_boundary--\r\n"...)
}

func benchmarkParse(b *testing.B, size int) {
	msg := sample(size)
	b.SetBytes(int64(len(msg)))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := Parse(bytes.NewReader(msg), int64(len(msg))); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkParse4KiB(b *testing.B)   { benchmarkParse(b, 4<<10) }
func BenchmarkParse100KiB(b *testing.B) { benchmarkParse(b, 100<<10) }

func BenchmarkUnmarshal(b *testing.B) {
	s := parse(b, sample(4<<10))
	raw, err := s.MarshalBinary()
	if err != nil {
		b.Fatal(err)
	}
	b.SetBytes(int64(len(raw)))
	b.ReportAllocs()
	for b.Loop() {
		var back Structure
		if err := back.UnmarshalBinary(raw); err != nil {
			b.Fatal(err)
		}
	}
}
