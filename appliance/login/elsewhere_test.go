package login

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"io"
	"net"
	"net/netip"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"posthouse/mesh"
)

var (
	anna   = Credential{User: mesh.ID{1}, Version: 3, Print: []byte("box")}
	client = netip.MustParseAddr("192.0.2.7")
)

// nobody stands for a name that no user has.
var nobody = mesh.ID{9}

const asking = mesh.NodeID(0x44)

// newDesk is the home of anna, whose password is "right".
func newDesk(t testing.TB) *Desk {
	t.Helper()
	v, err := New("right", rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c, err := NewChecker(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return NewDesk(c, func(u mesh.ID) (Credential, string, bool) { return anna, v, u == anna.User })
}

// ask puts a question through a pipe, as on a stream.
func ask(t testing.TB, d *Desk, peer mesh.NodeID, c Credential, password string, from netip.Addr) (Verdict, error) {
	t.Helper()
	here, there := net.Pipe()
	defer here.Close()
	done := make(chan error, 1)
	go func() {
		done <- d.Serve(t.Context(), there, peer)
		there.Close()
	}()
	q := About(c, password, from)
	if c.User == nobody {
		q = AboutNobody(c.User, password, from)
	}
	v, err := Ask(here, q)
	return v, errors.Join(err, <-done)
}

func TestAHomeJudges(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newDesk(t)
		old, other := anna, anna
		old.Version--
		other.User = mesh.ID{2}
		for _, tc := range []struct {
			name     string
			c        Credential
			password string
			from     netip.Addr
			want     Verdict
			late     time.Duration
		}{
			{"the right one", anna, "right", client, Right, 0},
			{"a wrong one", anna, "wrong", client, Wrong, time.Second},
			{"a second wrong one", anna, "wrong", client, Wrong, 2 * time.Second},
			{"the right one after wrong ones", anna, "right", client, Right, 0},
			{"a wrong one from elsewhere, by the same node", anna, "wrong", netip.MustParseAddr("2001:db8::1"), Wrong, 4 * time.Second},
			{"a wrong one without an address", anna, "wrong", netip.Addr{}, Wrong, 8 * time.Second},
			{"an empty one", anna, "", client, Wrong, 16 * time.Second},
			{"a name that nobody has", Credential{User: nobody}, "right", client, Wrong, time.Second},
			{"the same from elsewhere", Credential{User: nobody}, "wrong", netip.MustParseAddr("2001:db8::2"), Wrong, 2 * time.Second},
			{"an older password's version", old, "right", client, Unjudged, 0},
			{"somebody whose home is elsewhere", other, "right", client, Unjudged, 0},
		} {
			began := time.Now()
			if got, err := ask(t, d, asking, tc.c, tc.password, tc.from); err != nil || got != tc.want {
				t.Errorf("%s: %v, %v", tc.name, got, err)
			}
			if took := time.Since(began); took != tc.late {
				t.Errorf("%s: answered after %v, want %v", tc.name, took, tc.late)
			}
		}
		// Another node's failures do not slow this one down.
		began := time.Now()
		if got, err := ask(t, d, asking+1, anna, "wrong", netip.MustParseAddr("192.0.2.99")); err != nil || got != Wrong || time.Since(began) != time.Second {
			t.Errorf("another node: %v, %v after %v", got, err, time.Since(began))
		}
	})
}

func TestANodeThatFloodsAHomeIsToldSoAndOthersAreServed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newDesk(t)
		var wg sync.WaitGroup
		for range perPeer {
			wg.Go(func() { ask(t, d, asking, anna, "wrong", client) })
		}
		synctest.Wait() // they all wait for their late answers
		if v, err := ask(t, d, asking, anna, "right", client); v != Busy || err != nil {
			t.Errorf("one too many: %v, %v", v, err)
		}
		if v, err := ask(t, d, asking+1, anna, "right", client); v != Right || err != nil {
			t.Errorf("another node: %v, %v", v, err)
		}
		wg.Wait()
		if v, err := ask(t, d, asking, anna, "right", client); v != Right || err != nil {
			t.Errorf("afterwards: %v, %v", v, err)
		}
		if len(d.inHand) != 0 {
			t.Errorf("%v are still counted", d.inHand)
		}
	})
}

func TestQuestionsUseOnePlaceOfTwo(t *testing.T) {
	d := newDesk(t)
	d.turn <- struct{}{} // another node's question is being hashed
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if _, err := d.judge(ctx, &Question{Version: wireVersion, User: anna.User, Credential: anna.Version, Password: "right"}, asking); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a second question was hashed beside it: %v", err)
	}
	if ok, err := d.check.Check(t.Context(), Credential{}, "", "x"); ok || err != nil {
		t.Errorf("this node's own people: %v, %v", ok, err)
	}
}

func TestARightAnswerIsRememberedForItsPasswordAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, _ := NewChecker(rand.Reader)
		c.Remember(anna, "right")
		next, apart := anna, anna
		next.Version++
		apart.Print = []byte("another box")
		for _, x := range []struct {
			name     string
			c        Credential
			password string
			want     bool
		}{
			{"it", anna, "right", true}, {"another", anna, "wrong", false}, {"a changed one", next, "right", false},
			{"one of the same version on the other side of a split", apart, "right", false}, {"an empty one", anna, "", false},
		} {
			if got := c.Known(x.c, x.password); got != x.want {
				t.Errorf("%s: %v", x.name, got)
			}
		}
		time.Sleep(remember)
		if c.Known(anna, "right") {
			t.Error("it is remembered for ever")
		}
	})
}

// conn reads what somebody sent and keeps what is said.
type conn struct {
	io.Reader
	io.Writer
}

func FuzzQuestion(f *testing.F) {
	frame := func(v any) []byte {
		var b bytes.Buffer
		if err := writeFrame(&b, v); err != nil {
			f.Fatal(err)
		}
		return b.Bytes()
	}
	f.Add(frame(Question{wireVersion, anna.User, 3, "right", client.AsSlice(), true}))
	f.Add(frame(Question{wireVersion, anna.User, 2, "", []byte("seven b"), false}))
	f.Add(frame(Answer{wireVersion, Busy}))
	f.Add([]byte{0xff, 0xff, 0xa0})
	c, err := NewChecker(rand.Reader)
	if err != nil {
		f.Fatal(err)
	}
	d := NewDesk(c, func(mesh.ID) (Credential, string, bool) { return Credential{}, "", false })
	f.Fuzz(func(t *testing.T, raw []byte) {
		var out bytes.Buffer
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond) // a wrong one is answered late
		defer cancel()
		if err := d.Serve(ctx, conn{bytes.NewReader(raw), &out}, asking); err == nil {
			var a Answer
			if readFrame(&out, &a) != nil || a.Verdict != Unjudged {
				t.Errorf("%+v", a)
			}
		}
		if v, err := Ask(conn{bytes.NewReader(raw), &out}, About(anna, "x", client)); err == nil && (v < Right || v > Busy) {
			t.Errorf("verdict %d", v)
		}
	})
}
