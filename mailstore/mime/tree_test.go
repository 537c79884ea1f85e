package mime

import (
	"fmt"
	"math/rand/v2"
	"net/mail"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// grown is a message that was made from a known tree.
type grown struct {
	header, body string
	typ          string
	kids         []*grown
}

// grow makes a random tree of parts with line ends, boundaries that are each
// other's beginnings, and bodies longer than the walk's buffer.
func grow(rnd *rand.Rand, depth int, boundary string) *grown {
	g := &grown{}
	pad := strings.Repeat("X-Pad: "+strings.Repeat("p", rnd.IntN(200))+"\r\n", rnd.IntN(4))
	switch k := rnd.IntN(6); {
	case k < 3 && depth > 0:
		g.typ = "multipart/mixed"
		g.header = pad + fmt.Sprintf("Content-Type: multipart/mixed; boundary=%q\r\n\r\n", boundary)
		var b strings.Builder
		if rnd.IntN(2) == 0 {
			b.WriteString("preamble\r\n" + strings.Repeat("--"+boundary+"x\r\n", rnd.IntN(3)))
		}
		for range 1 + rnd.IntN(4) {
			kid := grow(rnd, depth-1, boundary+string(rune('a'+rnd.IntN(3))))
			g.kids = append(g.kids, kid)
			b.WriteString("--" + boundary + strings.Repeat(" ", rnd.IntN(2)) + "\r\n" + kid.header + kid.body + "\r\n")
		}
		b.WriteString("--" + boundary + "--")
		if rnd.IntN(2) == 0 {
			b.WriteString("\r\nepilogue\r\n--" + boundary + "\r\nof it")
		}
		g.body = b.String()
	case k == 3 && depth > 0:
		g.typ = "message/rfc822"
		g.header = pad + "Content-Type: message/rfc822\r\n\r\n"
		kid := grow(rnd, depth-1, boundary)
		g.kids = []*grown{kid}
		g.body = kid.header + kid.body
	default:
		g.typ = "text/plain"
		g.header = pad + "\r\n"
		g.body = strings.Repeat(strings.Repeat("-", rnd.IntN(100))+"\r\n", rnd.IntN(40)) + strings.Repeat("y", rnd.IntN(3)*rnd.IntN(40_000))
	}
	return g
}

func TestAGrownTreeIsFoundAgain(t *testing.T) {
	for seed := range uint64(120) {
		rnd := rand.New(rand.NewPCG(seed, 7))
		g := grow(rnd, 5, "b")
		msg := g.header + g.body
		s := parse(t, []byte(msg))
		var compare func(g *grown, p *Part, path string)
		compare = func(g *grown, p *Part, path string) {
			if got := p.Type + "/" + p.Subtype; got != g.typ || len(p.Children) != len(g.kids) {
				t.Fatalf("seed %d, part %s: %s with %d children, want %s with %d", seed, path, got, len(p.Children), g.typ, len(g.kids))
			}
			if msg[p.Header:p.Body] != g.header {
				t.Fatalf("seed %d, part %s: header %q, want %q", seed, path, msg[p.Header:p.Body], g.header)
			}
			if msg[p.Body:p.End] != g.body {
				t.Fatalf("seed %d, part %s: body of %d bytes, want %d", seed, path, p.End-p.Body, len(g.body))
			}
			if p.Type != "multipart" && p.Lines != int64(strings.Count(g.body, "\n")) {
				t.Fatalf("seed %d, part %s: %d lines", seed, path, p.Lines)
			}
			for i, k := range g.kids {
				compare(k, p.Children[i], fmt.Sprintf("%s.%d", path, i+1))
			}
		}
		compare(g, s.Root, "0")
		if s.Cut {
			t.Fatalf("seed %d: cut", seed)
		}
	}
}

// TestWhatTheStandardLibraryReadsWeReadAlike compares well-formed fields.
func TestWhatTheStandardLibraryReadsWeReadAlike(t *testing.T) {
	for _, v := range []string{
		"a@b.example", "<a@b.example>", "Ann <a@b.example>, Bob B <b@c.example>", `"Q, uoted" <q@x.example>`, "=?utf-8?q?=C5=BDofie?= <z@x.example>",
		"=?iso-8859-2?b?rmx1dm91?= =?iso-8859-2?b?6GVr?= <z@x.example>", `"a b"@c.example`, "A (comment) <a@b.example>", "a.b.c@d.example", "Ann\r\n <a@b.example>",
		"x@[192.0.2.1]", `"back\\slash \"quote\"" <a@b.example>`, "Žofie <žofie@příklad.example>",
	} {
		want, err := (&mail.AddressParser{}).ParseList(strings.ReplaceAll(v, "\r\n", ""))
		if err != nil {
			if !strings.Contains(v, "iso-8859-2") {
				t.Errorf("%q: the reference refuses it: %v", v, err)
			}
			continue
		}
		var ws, gs []string
		for _, a := range want {
			i := strings.LastIndexByte(a.Address, '@')
			ws = append(ws, a.Name+"|"+strings.Trim(a.Address[:i], `"`)+"|"+a.Address[i+1:])
		}
		got, _ := ParseAddresses([]byte(v), 100)
		for _, a := range got {
			gs = append(gs, a.Name+"|"+a.Mailbox+"|"+a.Host)
		}
		if d := cmp.Diff(ws, gs); d != "" {
			t.Errorf("%q: %s", v, d)
		}
	}
	rnd := rand.New(rand.NewPCG(1, 1))
	for range 300 {
		at := time.Unix(rnd.Int64N(4e9), 0).In(time.FixedZone("", (rnd.IntN(26*4)-12*4)*900))
		v := at.Format([...]string{time.RFC1123Z, "2 Jan 2006 15:04:05 -0700", "Mon, _2 Jan 2006 15:04:05 -0700 (XYZ)"}[rnd.IntN(3)])
		got, ok := ParseDate([]byte(v))
		if !ok || !got.Equal(at) || got.Format(time.RFC3339) != at.Format(time.RFC3339) {
			t.Errorf("%q: %v %v", v, got, ok)
		}
	}
}
