package intake

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"io"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/google/go-cmp/cmp"

	"posthouse/mailstore/journal/journaltest"
	"posthouse/mailstore/log"
	"posthouse/mailstore/mime"
	"posthouse/mesh"
	"posthouse/transport"
)

// taker keeps what is taken.
type taker struct {
	fault *transport.Fault
	err   error // of Take
	text  []byte
	env   transport.Envelope
	s     *mime.Structure
}

func (k *taker) Route(*transport.Envelope, []Rcpt) (Plan, *transport.Fault) { return k, k.fault }
func (k *taker) Take(_ context.Context, env *transport.Envelope, d *log.Draft, s *mime.Structure) (string, error) {
	if k.err != nil {
		return "", k.err
	}
	r, err := d.Open()
	if err != nil {
		return "", err
	}
	defer r.Close()
	k.env, k.s = *env, s
	k.text, err = io.ReadAll(r)
	return "q1", err
}

func newIntake(t *testing.T, k *taker, f Filter) *Intake {
	t.Helper()
	j := journaltest.NewDisk(t).Open(t)
	return New(Deps{Node: 7, Host: func() string { return "hq.company.test" }, NewDraft: j.NewDraft, Random: rand.Reader, Router: k, Filter: f,
		Admit:   func(context.Context, int64) error { return nil },
		MaySend: func(login string, a mesh.Address) bool { return a.Key() == "anna@company.test" }})
}

func accept(t *testing.T, k *taker, origin transport.Origin, body io.Reader) error {
	t.Helper()
	rcpt, _ := mesh.ParseAddress("boris@company.test")
	_, err := newIntake(t, k, nil).Accept(t.Context(), &transport.Envelope{Origin: origin, Helo: "pc", ClientAddr: "192.0.2.1", TLS: "TLS1.3", Login: "anna@company.test"}, []Rcpt{{Address: rcpt}}, body)
	return err
}

func TestSubmissionIsMendedAndOutsideMailIsNot(t *testing.T) {
	const text = "From: Anna <anna@company.test>\r\nBcc: secret@example.net\r\nSubject: x\r\n\r\nhello\r\n"
	var k taker
	if err := accept(t, &k, transport.OriginSubmission, iotest.OneByteReader(strings.NewReader(text))); err != nil {
		t.Fatal(err)
	}
	got := string(k.text)
	if strings.Contains(got, "secret") || !strings.Contains(got, "\r\nDate: ") || !strings.Contains(got, "\r\nMessage-ID: <"+k.env.ID.String()+"@hq.company.test>\r\n") ||
		!strings.HasPrefix(got, "Received: from pc ([192.0.2.1])\r\n\tby hq.company.test with ESMTPSA id ") || !strings.HasSuffix(got, "Subject: x\r\n\r\nhello\r\n") {
		t.Errorf("kept %q", got)
	}
	if k.s.Envelope.Subject != "x" || k.s.Received != 1 || k.env.EntryNode != 7 || k.env.EntryTime.IsZero() {
		t.Errorf("%+v %+v", k.s, k.env)
	}
	if err := accept(t, &k, transport.OriginOutside, strings.NewReader(text)); err != nil {
		t.Fatal(err)
	}
	if !bytes.HasSuffix(k.text, []byte(text)) {
		t.Errorf("mail from outside was changed: %q", k.text)
	}
}

func TestWhatIsNotTakenIsNotPromised(t *testing.T) {
	cut := errors.New("connection lost")
	for _, tc := range []struct {
		name, text string
		origin     transport.Origin
		err        error // of the reader, after text
		want       string
	}{
		{"somebody else's From", "From: boss@company.test\r\n\r\nx", transport.OriginSubmission, io.EOF, "553 5.7.1"},
		{"somebody else's Sender", "From: anna@company.test\r\nSender: boss@company.test\r\n\r\nx", transport.OriginSubmission, io.EOF, "553 5.7.1"},
		{"one's own and somebody else's From", "From: anna@company.test\r\nFrom: anna@company.test\r\n\r\nx", transport.OriginSubmission, io.EOF, "550 5.6.0"},
		{"a loop", strings.Repeat("Received: x\r\n", 101) + "\r\nx", transport.OriginOutside, io.EOF, "554 5.4.6"},
		{"a header without end", strings.Repeat("X: "+strings.Repeat("y", 997)+"\r\n", 300), transport.OriginOutside, io.EOF, "552 5.3.4"},
		{"a text that was cut in the header", "Subject: x\r\n", transport.OriginOutside, cut, "connection lost"},
		{"a text that was cut in the body", "Subject: x\r\n\r\nhel", transport.OriginOutside, cut, "connection lost"},
		{"a text that was cut after an empty header", "\r\nhel", transport.OriginOutside, cut, "connection lost"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var k taker
			err := accept(t, &k, tc.origin, io.MultiReader(strings.NewReader(tc.text), iotest.ErrReader(tc.err)))
			if err == nil || !strings.Contains(err.Error(), tc.want) || k.text != nil {
				t.Errorf("got %v, kept %q", err, k.text)
			}
		})
	}
	k := taker{fault: transport.Faultf(550, "5.1.1", "gone")}
	if err := accept(t, &k, transport.OriginOutside, strings.NewReader("\r\nx")); err != k.fault || k.text != nil {
		t.Errorf("router's fault: %v", err)
	}
}

func TestOddShapesOfHeadersAreKeptWhole(t *testing.T) {
	for _, text := range []string{"", "\r\n", "\r\nbody", "no header at all\r\n", "Subject: only\r\n", "Subject: a\r\n\r\n", "X: " + strings.Repeat("y", 9000) + "\r\n\r\nz"} {
		var k taker
		if err := accept(t, &k, transport.OriginOutside, strings.NewReader(text)); err != nil {
			t.Errorf("%q: %v", text, err)
		}
		if !strings.HasSuffix(string(k.text), "\r\n"+text) {
			t.Errorf("%q became %q", text, k.text)
		}
	}
}

func TestAFilterMayRefuseOrAddLines(t *testing.T) {
	var k taker
	in := newIntake(t, &k, func(_ context.Context, _ *transport.Envelope, _ []Rcpt, b transport.Body) ([]string, *transport.Fault) {
		return []string{"Authentication-Results: hq"}, nil
	})
	if _, err := in.Accept(t.Context(), &transport.Envelope{Origin: transport.OriginOutside}, nil, strings.NewReader("\r\nx")); err != nil || !bytes.HasPrefix(k.text, []byte("Authentication-Results: hq\r\nReceived:")) {
		t.Errorf("%v, kept %q", err, k.text)
	}
	k = taker{}
	in = newIntake(t, &k, func(context.Context, *transport.Envelope, []Rcpt, transport.Body) ([]string, *transport.Fault) {
		return nil, transport.Faultf(550, "5.7.1", "spam")
	})
	if _, err := in.Accept(t.Context(), &transport.Envelope{}, nil, strings.NewReader("\r\nx")); err == nil || k.text != nil {
		t.Errorf("refused mail was kept: %v %q", err, k.text)
	}
}

// passed is an Archive that notes what it is told, and what was taken by then.
type passed struct {
	k     *taker
	told  []transport.Passed
	taken []bool
}

func (p *passed) Passed(m transport.Passed) {
	p.told, p.taken = append(p.told, m), append(p.taken, p.k.text != nil)
}

func TestTheArchiveHearsOnceOfWhatWasAcceptedAndOfNothingElse(t *testing.T) {
	var addrs []Rcpt
	for _, a := range []string{"Boris@company.test", "all+x@company.test"} {
		addr, err := mesh.ParseAddress(a)
		if err != nil {
			t.Fatal(err)
		}
		addrs = append(addrs, Rcpt{Address: addr})
	}
	refused := transport.Faultf(550, "5.7.1", "no")
	for _, tc := range []struct {
		name   string
		k      taker
		filter Filter
		body   io.Reader
		told   int
	}{
		{"accepted", taker{}, nil, strings.NewReader("Subject: x\r\n\r\nhello\r\n"), 1},
		{"accepted with lines of the filter's", taker{}, func(context.Context, *transport.Envelope, []Rcpt, transport.Body) ([]string, *transport.Fault) {
			return []string{"X-Checked: yes"}, nil
		}, strings.NewReader("Subject: x\r\n\r\nhello\r\n"), 1},
		{"refused by the filter", taker{}, func(context.Context, *transport.Envelope, []Rcpt, transport.Body) ([]string, *transport.Fault) {
			return nil, refused
		}, strings.NewReader("\r\nx"), 0},
		{"refused by the route", taker{fault: refused}, nil, strings.NewReader("\r\nx"), 0},
		{"not kept", taker{err: transport.ErrNoSpace}, nil, strings.NewReader("\r\nx"), 0},
		{"perhaps kept", taker{err: transport.ErrUncertain}, nil, strings.NewReader("\r\nx"), 0},
		{"cut off", taker{}, nil, io.MultiReader(strings.NewReader("\r\nx"), iotest.ErrReader(io.ErrUnexpectedEOF)), 0},
	} {
		t.Run(tc.name, func(t *testing.T) {
			k := tc.k
			p := &passed{k: &k}
			in := newIntake(t, &k, tc.filter)
			in.d.Archive = p
			env := &transport.Envelope{Origin: transport.OriginOutside, From: "a@example.net", Helo: "pc", ClientAddr: "192.0.2.1"}
			queued, err := in.Accept(t.Context(), env, addrs, tc.body)
			if len(p.told) != tc.told || (err == nil) != (tc.told == 1) {
				t.Fatalf("told of %d messages, %v", len(p.told), err)
			}
			if tc.told == 0 {
				return
			}
			want := transport.Passed{Envelope: k.env, Recipients: []string{"Boris@company.test", "all+x@company.test"}, Size: int64(len(k.text)), Queue: queued}
			if d := cmp.Diff(want, p.told[0]); d != "" || !p.taken[0] || k.env.ID.IsZero() {
				t.Errorf("on disk %v; %s", p.taken[0], d)
			}
		})
	}
}
