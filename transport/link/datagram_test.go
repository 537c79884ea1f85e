package link

import (
	"bytes"
	"fmt"
	"io"
	"testing"
	"testing/synctest"
	"time"
)

func (n *node) receive() (got []string) {
	synctest.Wait()
	for {
		select {
		case d := <-n.Datagrams():
			got = append(got, fmt.Sprintf("%d:%.20s", d.From, d.Data))
		default:
			return got
		}
	}
}

func TestDatagramsArriveSmallAndLarge(t *testing.T) {
	run(t, 2, func(t *testing.T, w *world) {
		a, b := w.nodes[0], w.nodes[1]
		w.startAll()
		w.connected()
		time.Sleep(time.Second)
		large := bytes.Repeat([]byte("large"), MaxDatagram/5)
		for _, b := range [][]byte{[]byte("small"), large, {}} {
			if err := a.SendDatagram(2, b); err != nil {
				t.Fatal(err)
			}
		}
		time.Sleep(time.Second)
		got := b.receive()
		if len(got) != 3 || got[0] != "1:small" {
			t.Errorf("got %q", got)
		}
		if a.SendDatagram(2, make([]byte, MaxDatagram+1)) == nil {
			t.Error("one that is too large was taken")
		}
	})
}

func TestADatagramToAnUnconnectedPeerStartsAConnection(t *testing.T) {
	run(t, 2, func(t *testing.T, w *world) {
		a, b := w.nodes[0], w.nodes[1]
		w.startAll()
		w.connected()
		w.cutBetween(a, b)
		time.Sleep(2 * time.Hour)
		w.setCut(nil)
		time.Sleep(datagramGap)
		if err := a.SendDatagram(b.id, []byte("lost")); err != nil {
			t.Fatal(err)
		}
		if d := w.connected(); d > 8*latency {
			t.Errorf("took %v", d)
		}
	})
}

func TestTheDatagramQueueNeverBlocksWhenTheLineIsCutInMidTransfer(t *testing.T) {
	run(t, 3, func(t *testing.T, w *world) {
		a, b, c := w.nodes[0], w.nodes[1], w.nodes[2]
		l := b.listen("sink/1")
		go func() {
			for {
				s, err := l.Accept(t.Context())
				if err != nil {
					return
				}
				go io.Copy(io.Discard, s)
			}
		}()
		w.startAll()
		w.connected()
		for _, class := range []Class{Bulk, Control} { // Control: so that its own window is full
			s, err := a.Dial(t.Context(), b.id, "sink/1", class)
			if err != nil {
				t.Fatal(err)
			}
			go func() {
				defer s.Close()
				for {
					if _, err := s.Write(make([]byte, 32<<10)); err != nil {
						return
					}
				}
			}()
		}
		time.Sleep(100 * time.Millisecond)
		w.cutBetween(a, b)
		start := time.Now()
		for i := range 1000 {
			if err := a.SendDatagram(b.id, fmt.Appendf(nil, "%d", i)); err != nil {
				t.Fatal(err)
			}
			if err := a.SendDatagram(c.id, fmt.Appendf(nil, "%d", i)); err != nil {
				t.Fatal(err)
			}
		}
		if d := time.Since(start); d != 0 {
			t.Errorf("sending took %v", d)
		}
		time.Sleep(time.Second)
		if got := c.receive(); len(got) == 0 || got[len(got)-1] != "1:999" {
			t.Errorf("a healthy peer got %q", got)
		}
		w.until("cut is noticed", 20*time.Second, func() bool { return !a.up(b.id) })
	})
}

func TestOfTooManyDatagramsTheOldestAreLost(t *testing.T) {
	q := newDatagramQueue()
	for i := range 40 {
		q.put([]byte{byte(i)})
	}
	for i := 40 - datagramsWaiting; i < 40; i++ {
		if b, ok := q.take(); !ok || b[0] != byte(i) {
			t.Fatalf("got %v, want %d", b, i)
		}
	}
	if _, ok := q.take(); ok {
		t.Error("there is more")
	}
}
