package notice

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"posthouse/mesh"
)

// office is one node of a test: a Board and what it heard.
type office struct {
	*Board
	id mesh.NodeID

	mu    sync.Mutex
	heard []string
	conns []net.Conn // streams that it opened
	dials int
	down  bool // nobody is reached
}

// between ties two offices together; the calls of Serve end with the bubble.
func between(t *testing.T, ids ...mesh.NodeID) map[mesh.NodeID]*office {
	all := map[mesh.NodeID]*office{}
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	for _, id := range ids {
		o := &office{id: id}
		all[id] = o
		o.Board = New(Deps{
			Dial: func(_ context.Context, to mesh.NodeID, service string) (net.Conn, error) {
				o.mu.Lock()
				defer o.mu.Unlock()
				if o.dials++; o.down || service != Service {
					return nil, errors.New("nobody is there")
				}
				a, b := net.Pipe()
				o.conns = append(o.conns, a)
				wg.Go(func() { all[to].Serve(ctx, id, b) })
				return a, nil
			},
			Heard: func(peer mesh.NodeID, was, is Facts, first bool) {
				o.mu.Lock()
				defer o.mu.Unlock()
				o.heard = append(o.heard, fmt.Sprintf("%d: %v %d to %v %d, first %v", peer, was.Full, len(was.Mailboxes), is.Full, len(is.Mailboxes), first))
			},
			Name: func(n mesh.NodeID) string { return fmt.Sprint(n) },
		})
		wg.Go(func() { o.Run(ctx) })
	}
	t.Cleanup(func() { cancel(); wg.Wait() })
	return all
}

// said returns what was heard since the last call.
func (o *office) said() []string {
	synctest.Wait()
	o.mu.Lock()
	defer o.mu.Unlock()
	h := o.heard
	o.heard = nil
	return h
}

// cut ends all streams that o opened; with down nothing is reached from then on.
func (o *office) cut(down bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, c := range o.conns {
		c.Close()
	}
	o.conns, o.down = nil, down
}

func box(n byte) mesh.MailboxID { return mesh.MailboxID{n} }

func TestFactsAreToldWholeAtFirstAndThenAsTheyChange(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := between(t, 1, 2)
		w[1].Set(Facts{Mailboxes: []mesh.MailboxID{box(9), box(3), box(9)}})
		w[1].PeerUp(2)
		if d := cmp.Diff([]string{"1: false 0 to false 2, first true"}, w[2].said()); d != "" {
			t.Error(d)
		}
		if !w[2].MailboxFull(1, box(3)) || !w[2].MailboxFull(1, box(9)) || w[2].MailboxFull(1, box(4)) || w[2].Full(1) {
			t.Error("the facts are not what was told")
		}
		time.Sleep(time.Minute)
		w[1].Set(Facts{Mailboxes: []mesh.MailboxID{box(3), box(9)}}) // nothing new
		w[1].Set(Facts{Full: true, Mailboxes: []mesh.MailboxID{box(9)}})
		if d := cmp.Diff([]string{"1: false 2 to true 1, first false"}, w[2].said()); d != "" {
			t.Error(d)
		}
		if !w[2].Full(1) || w[2].MailboxFull(1, box(3)) {
			t.Error("the change did not arrive")
		}
	})
}

// A disk may be full and have room again between two frames: the peer still hears
// that it is worth a try.
func TestWhatPassedBetweenTwoFramesIsHeardOf(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := between(t, 1, 2)
		var last Facts
		w[2].d.Heard = func(_ mesh.NodeID, was, is Facts, first bool) {
			if !first && was.Again == is.Again {
				t.Error("told of nothing new")
			}
			last = is
		}
		w[1].PeerUp(2)
		synctest.Wait()
		w[1].Set(Facts{Full: true})
		w[1].Set(Facts{Again: 1})
		time.Sleep(2 * pause)
		w[1].Set(Facts{Again: 2})
		time.Sleep(2 * pause)
		synctest.Wait()
		if last.Again != 2 || last.Full {
			t.Errorf("heard of %+v", last)
		}
	})
}

func TestAHomeIsBelievedAboutItsOwnOnly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := between(t, 1, 2, 3)
		w[1].Set(Facts{Full: true, Mailboxes: []mesh.MailboxID{box(7)}})
		w[1].PeerUp(2)
		w[3].PeerUp(2)
		synctest.Wait()
		if w[2].MailboxFull(3, box(7)) || w[2].Full(3) {
			t.Error("one node's word counts for another's mailbox")
		}
	})
}

func TestWhatAPeerSaidIsForgottenWithItsStream(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := between(t, 1, 2)
		w[1].Set(Facts{Full: true})
		w[1].PeerUp(2)
		w[2].said()
		w[1].cut(true)
		time.Sleep(pause)
		synctest.Wait()
		if w[2].Full(1) {
			t.Error("the stream is gone and its facts stay")
		}
		// Three attempts, and then none until there is news of the peer.
		w[1].mu.Lock()
		w[1].dials = 0
		w[1].mu.Unlock()
		time.Sleep(time.Hour)
		w[1].mu.Lock()
		if w[1].dials != retries {
			t.Errorf("%d dials in an hour", w[1].dials)
		}
		w[1].down = false
		w[1].mu.Unlock()
		w[1].Set(Facts{})
		w[1].PeerUp(2)
		if d := cmp.Diff([]string{"1: false 0 to false 0, first true"}, w[2].said()); d != "" {
			t.Error(d)
		}
	})
}

func TestABrokenStreamIsOpenedAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := between(t, 1, 2)
		w[1].Set(Facts{Full: true})
		w[1].PeerUp(2)
		w[2].said()
		for range 10 {
			w[1].cut(false)
			time.Sleep(2*retry + 2*pause)
			synctest.Wait()
			if !w[2].Full(1) {
				t.Fatal("the facts were not told again")
			}
		}
	})
}

func TestAPeerThatRefusesTheServiceIsLeftAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dials := 0
		b := New(Deps{Name: func(mesh.NodeID) string { return "old" }, Dial: func(context.Context, mesh.NodeID, string) (net.Conn, error) {
			dials++
			near, far := net.Pipe()
			far.Close()
			return near, nil
		}})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { defer close(done); b.Run(ctx) }()
		b.PeerUp(4)
		time.Sleep(time.Hour)
		cancel()
		<-done
		if dials != 1+retries {
			t.Errorf("%d dials in an hour", dials)
		}
	})
}

func TestALaterStreamTakesOver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := New(Deps{Name: func(mesh.NodeID) string { return "peer" }})
		var wg sync.WaitGroup
		stream := func() net.Conn {
			near, far := net.Pipe()
			wg.Go(func() { b.Serve(t.Context(), 5, far) })
			return near
		}
		tell := func(c net.Conn, f Facts) {
			p, _ := encode(f)
			c.Write(p)
			synctest.Wait()
		}
		before, after := stream(), stream()
		tell(before, Facts{Full: true})
		tell(after, Facts{})
		if b.Full(5) {
			t.Error("the earlier stream's word stands")
		}
		before.Close() // and its end takes nothing away
		tell(after, Facts{Full: true})
		time.Sleep(2 * pause)
		if synctest.Wait(); !b.Full(5) {
			t.Error("the end of the earlier stream made the later one's facts forgotten")
		}
		after.Close()
		wg.Wait()
		if b.Full(5) {
			t.Error("facts without a stream")
		}
	})
}

func TestChangesAreToldOnceASecondAtMost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := between(t, 1, 2)
		w[1].PeerUp(2)
		w[2].said()
		for i := range 1000 {
			w[1].Set(Facts{Full: i%2 == 0})
			time.Sleep(10 * time.Millisecond)
		}
		if n := len(w[2].said()); n > 11 {
			t.Errorf("%d notices in ten seconds", n)
		}
		time.Sleep(2 * pause)
		w[2].said()
		if w[2].Full(1) {
			t.Error("the last word did not arrive")
		}
	})
}

func TestMoreThanTheBoundIsCutAndMoreThanThatRefused(t *testing.T) {
	var f Facts
	for i := range MaxMailboxes + 10 {
		f.Mailboxes = append(f.Mailboxes, mesh.MailboxID{byte(i >> 8), byte(i)})
	}
	p, err := encode(f.tidy())
	if err != nil {
		t.Fatal(err)
	}
	got, err := read(bytes.NewReader(p))
	if err != nil || len(got.Mailboxes) != MaxMailboxes {
		t.Fatalf("%d mailboxes, %v", len(got.Mailboxes), err)
	}
	if p, err = encode(f); err != nil {
		t.Fatal(err)
	}
	for _, b := range [][]byte{p, {0, 0, 0, 1, 0xff}, {0xff, 0xff, 0xff, 0xff}, {0, 0, 0, 1, 0xa0}} {
		if _, err := read(bytes.NewReader(b)); !errors.Is(err, errFrame) {
			t.Errorf("% x…: %v", b[:5], err)
		}
	}
	if _, err := read(bytes.NewReader(p[:20])); !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, errFrame) {
		t.Error(err)
	}
}

func FuzzFrame(f *testing.F) {
	for _, x := range []Facts{{}, {Full: true, Again: 1 << 40}, {Mailboxes: []mesh.MailboxID{box(1), box(2)}}} {
		p, err := encode(x)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(p)
	}
	f.Add([]byte{0, 1, 0, 1, 0xa1, 3, 0x58})
	f.Fuzz(func(t *testing.T, b []byte) {
		got, err := read(bytes.NewReader(b))
		if err != nil {
			return
		}
		if len(got.Mailboxes) > MaxMailboxes {
			t.Fatalf("%d mailboxes", len(got.Mailboxes))
		}
		p, err := encode(got)
		if err != nil {
			t.Fatal(err)
		}
		if again, err := read(bytes.NewReader(p)); err != nil || !again.equal(got) {
			t.Fatalf("%v became %v, %v", got, again, err)
		}
	})
}
