package dsn

import (
	"bytes"
	"flag"
	"io"
	"mime"
	"mime/multipart"
	"net/mail"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"posthouse/transport"
)

var update = flag.Bool("update", false, "rewrite testdata")

type body string

func (b body) Size() int64 { return int64(len(b)) }
func (b body) Open() (transport.BodyReader, error) {
	return struct {
		*strings.Reader
		io.Closer
	}{strings.NewReader(string(b)), io.NopCloser(nil)}, nil
}

const original = "Received: from a by b\r\nFrom: Anna <anna@ours.example>\r\nTo: bob@far.example\r\nSubject: Contract\r\n\r\nHello Bob,\r\nsee you.\r\n"

func base() *Report {
	at := time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC)
	return &Report{
		Kind: Failed, To: "anna@ours.example", Sender: "anna@ours.example", From: "postmaster@ours.example", Reporter: "praha.ours.example",
		ID: "0123456789abcdef0123456789abcdef", Date: at, Arrived: at.Add(-5 * time.Minute), Original: body(original),
		Recipients: []Recipient{{Address: "bob@far.example", Result: transport.Result{Outcome: transport.Failed, Code: 550, Enhanced: "5.1.1", Text: "No such user here", By: "mx.far.example"}}},
	}
}

func TestReports(t *testing.T) {
	tests := map[string]func(*Report){
		"failed": func(r *Report) {},
		"failed-full": func(r *Report) {
			r.Ret, r.EnvID = "FULL", "QQ+2B314159"
			r.Recipients[0].ORcpt = "rfc822;Bob+40alias.example"
		},
		"failed-many": func(r *Report) {
			r.Recipients = append(r.Recipients, Recipient{Address: "carl@far.example", Result: transport.Result{Code: 552, Enhanced: "5.2.2", Text: "Quota\r\nexceeded \x1b[31mred\u202e" + strings.Repeat(" very", 200), By: "mx.far.example"}},
				Recipient{Address: "dora@far.example", Result: transport.Result{Enhanced: "5.4.7", Text: "not delivered within 5 days; last heard: nothing"}})
		},
		"failed-eightbit": func(r *Report) {
			r.Ret, r.Original = "FULL", body(strings.Replace(original, "see you", "na vid\u011bnou", 1))
		},
		"delayed": func(r *Report) {
			r.Kind, r.Ret, r.Until = Delayed, "FULL", time.Date(2026, 11, 27, 12, 0, 0, 0, time.UTC)
			r.Recipients[0].Result = transport.Result{Outcome: transport.Deferred, Text: "connection refused"}
		},
		"delivered": func(r *Report) {
			r.Kind = Delivered
			r.Recipients[0].Result = transport.Result{Outcome: transport.Delivered, Enhanced: "2.0.0"}
		},
		"relayed": func(r *Report) {
			r.Kind = Relayed
			r.Recipients[0].Result = transport.Result{Outcome: transport.Relayed, Code: 250, Text: "ok queued", By: "mx.far.example"}
		},
		"expanded": func(r *Report) {
			r.Kind = Expanded
			r.Recipients[0] = Recipient{Address: "all@ours.example", Result: transport.Result{Outcome: transport.Relayed, Enhanced: "2.1.5"}}
		},
		"utf8": func(r *Report) {
			r.To, r.Ret = "anička@ours.example", "FULL"
			r.Recipients[0].Address = "józef@far.example"
			r.Recipients[0].Result.Text = "žádný takový uživatel\u2066"
		},
	}
	for name, change := range tests {
		t.Run(name, func(t *testing.T) {
			r := base()
			change(r)
			var b bytes.Buffer
			if err := Write(&b, r); err != nil {
				t.Fatal(err)
			}
			checkForm(t, r, b.Bytes())
			file := filepath.Join("testdata", name+".eml")
			if *update {
				if err := os.WriteFile(file, b.Bytes(), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(string(want), b.String()); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// checkForm reads the report as a stranger would.
func checkForm(t *testing.T, r *Report, b []byte) {
	t.Helper()
	for _, line := range strings.Split(string(b), "\r\n") {
		if len(line) > 998 || strings.ContainsAny(line, "\r\n\x1b") {
			t.Errorf("bad line %q", line)
		}
	}
	if !r.NeedsUTF8() && r.Ret != "FULL" && !ascii(string(b)) {
		t.Error("not ASCII")
	}
	m, err := mail.ReadMessage(bytes.NewReader(b))
	if err != nil {
		t.Fatal(err)
	}
	typ, params, err := mime.ParseMediaType(m.Header.Get("Content-Type"))
	if err != nil || typ != "multipart/report" || params["report-type"] != "delivery-status" {
		t.Fatal(typ, params, err)
	}
	mr := multipart.NewReader(m.Body, params["boundary"])
	for i := 0; i < 3; i++ {
		p, err := mr.NextPart()
		if err != nil {
			t.Fatalf("part %d: %v", i+1, err)
		}
		c, err := io.ReadAll(p)
		if err != nil {
			t.Fatal(err)
		}
		if i == 1 {
			groups := strings.Split(strings.TrimRight(string(c), "\r\n"), "\r\n\r\n")
			if len(groups) != 1+len(r.Recipients) {
				t.Errorf("%d groups for %d recipients", len(groups), len(r.Recipients))
			}
			for _, g := range groups[1:] {
				for _, f := range []string{"Final-Recipient: ", "Action: " + string(r.Kind) + "\r\n", "Status: "} {
					if !strings.Contains(g+"\r\n", f) {
						t.Errorf("group lacks %q:\n%s", f, g)
					}
				}
			}
		}
	}
	if _, err := mr.NextPart(); err != io.EOF {
		t.Errorf("after the last part: %v", err)
	}
}

func TestAMessageTooLargeComesBackAsItsHeader(t *testing.T) {
	r := base()
	r.Ret = "FULL"
	r.Original = body(original + strings.Repeat("x\r\n", MaxFull))
	var b bytes.Buffer
	if err := Write(&b, r); err != nil {
		t.Fatal(err)
	}
	if b.Len() > 8<<10 || !strings.Contains(b.String(), "text/rfc822-headers") {
		t.Errorf("%d bytes", b.Len())
	}
	r.Original = body("Subject: " + strings.Repeat("a\r\n b", 1<<20))
	b.Reset()
	if err := Write(&b, r); err != nil {
		t.Fatal(err)
	}
	if b.Len() > MaxHeaders+8<<10 {
		t.Errorf("%d bytes of an endless header", b.Len())
	}
}

func TestForeignWordsCannotAddLinesOrFields(t *testing.T) {
	r := base()
	evil := strings.Repeat("far ", 16) + "x\r\nAction: delivered\r\n\r\n--=_report_0123456789abcdef0123456789abcdef--\r\n\x00\x7f\u0085"
	r.EnvID, r.Recipients[0].ORcpt = evil, evil+";"+evil
	r.Recipients[0].Result = transport.Result{Code: 550, Enhanced: evil, Text: evil, By: evil}
	var b bytes.Buffer
	if err := Write(&b, r); err != nil {
		t.Fatal(err)
	}
	checkForm(t, r, b.Bytes())
	if strings.Contains(b.String(), "\nAction: delivered") || !strings.Contains(b.String(), "Status: 5.0.0") {
		t.Error(b.String())
	}
}
