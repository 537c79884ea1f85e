package link

import (
	"context"
	"crypto/rand"
	"io"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"posthouse/mesh"
)

// pair is two nodes on real sockets on loopback, connected.
func pair(tb testing.TB) (a, b *Endpoint) {
	tb.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	tb.Cleanup(func() { cancel(); wg.Wait() })
	var ends []*Endpoint
	var peers []Peer
	for id := mesh.NodeID(1); id <= 2; id++ {
		sock, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
		if err != nil {
			tb.Fatal(err)
		}
		sock.SetReadBuffer(7 << 20)
		sock.SetWriteBuffer(7 << 20)
		e, err := New(Config{}, Deps{Conn: sock, Identity: keyOf(id), Random: rand.Reader})
		if err != nil {
			tb.Fatal(err)
		}
		ends = append(ends, e)
		peers = append(peers, Peer{ID: id, Key: keyOf(id).Hash(), Addrs: []netip.AddrPort{sock.LocalAddr().(*net.UDPAddr).AddrPort()}})
		wg.Go(func() {
			defer sock.Close()
			if err := e.Run(ctx); err != nil {
				tb.Error(err)
			}
		})
	}
	up := make(chan struct{}, 2)
	for i, e := range ends {
		e.Watch(func(ev Event) {
			if ev.Up {
				up <- struct{}{}
			}
		})
		e.SetPeers(mesh.NodeID(i+1), peers)
	}
	for range ends {
		select {
		case <-up:
		case <-time.After(10 * time.Second):
			tb.Fatal("not connected on loopback")
		}
	}
	return ends[0], ends[1]
}

// answer offers a service that reads a stream to its end and answers one byte.
func answer(tb testing.TB, e *Endpoint, name string) {
	l, err := e.Listen(name)
	if err != nil {
		tb.Fatal(err)
	}
	go func() {
		for {
			c, err := l.Accept(context.Background())
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				buf := make([]byte, 64<<10)
				for {
					if _, err := c.Read(buf); err == io.EOF {
						break
					} else if err != nil {
						return
					}
				}
				c.Write([]byte{1})
				c.CloseWrite()
			}()
		}
	}()
}

// send makes one stream with body and waits for the answer.
func send(e *Endpoint, to mesh.NodeID, name string, class Class, body []byte, times int) error {
	c, err := e.Dial(context.Background(), to, name, class)
	if err != nil {
		return err
	}
	defer c.Close()
	for range times {
		if _, err := c.Write(body); err != nil {
			return err
		}
	}
	if err := c.CloseWrite(); err != nil {
		return err
	}
	_, err = io.ReadFull(c, make([]byte, 1))
	return err
}

func TestOverRealSockets(t *testing.T) {
	a, b := pair(t)
	answer(t, b, "answer/1")
	var wg sync.WaitGroup
	for i := range 200 {
		wg.Go(func() {
			class := Control
			if i%2 == 0 {
				class = Bulk
			}
			if err := send(a, 2, "answer/1", class, make([]byte, 4096), 1+i%10); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if err := send(a, 2, "answer/1", Bulk, make([]byte, 1<<20), 32); err != nil {
		t.Error(err)
	}
}

// BenchmarkStreams4KiB opens a stream for each 4 KiB and waits for its answer, 64 at a time.
func BenchmarkStreams4KiB(b *testing.B) {
	for name, class := range map[string]Class{"control": Control, "bulk": Bulk} {
		b.Run(name, func(b *testing.B) {
			x, y := pair(b)
			answer(b, y, "answer/1")
			body := make([]byte, 4096)
			b.SetBytes(4096)
			b.ReportAllocs()
			b.SetParallelism(32)
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					if err := send(x, 2, "answer/1", class, body, 1); err != nil {
						b.Error(err)
						return
					}
				}
			})
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "streams/s")
		})
	}
}

// BenchmarkBulk sends 64 MiB by one stream.
func BenchmarkBulk(b *testing.B) {
	x, y := pair(b)
	answer(b, y, "answer/1")
	body := make([]byte, 1<<20)
	b.SetBytes(64 << 20)
	for b.Loop() {
		if err := send(x, 2, "answer/1", Bulk, body, 64); err != nil {
			b.Fatal(err)
		}
	}
}
