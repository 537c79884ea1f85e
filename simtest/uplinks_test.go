package simtest

import (
	"net"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/quic-go/quic-go/testutils/simnet"
)

// What an office sends to all others waits for one line, and so does what they
// send to it; what does not fit before it is lost.
func TestAllThatAnOfficeSendsAndGetsSharesItsLine(t *testing.T) {
	const bandwidth, latency, size = 1_000_000, 10 * time.Millisecond, 1000
	each := time.Duration((size + headers) * 8 * int64(time.Second) / bandwidth)
	buffer := int(lineBuffer/each) + 1 // packets that are taken at one moment
	for _, tc := range []struct {
		name     string
		from, to []string
		packets  int // from each to each
		come     int
	}{
		{"from it to two", []string{"hq"}, []string{"plzen", "praha"}, 10, 20},
		{"from two to it", []string{"plzen", "praha"}, []string{"hq"}, 10, 20},
		{"from it, more than fits", []string{"hq"}, []string{"plzen", "praha"}, 30, buffer},
		{"to it, more than fits", []string{"plzen", "praha"}, []string{"hq"}, 30, buffer},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := NewWorld(t, "hq", "plzen", "praha")
				defer w.Close()
				w.Latency = latency
				w.SetUplink("hq", bandwidth)
				var wg sync.WaitGroup
				var mu sync.Mutex
				var ends []func()
				came, last, sockets, began := 0, time.Duration(0), map[string]*simnet.SimConn{}, time.Now()
				for _, o := range w.Offices {
					socket, open, end := o.plug()
					open()
					sockets[o.Name], ends = socket, append(ends, end)
					wg.Go(func() {
						for b := make([]byte, 2000); ; {
							n, _, err := socket.ReadFrom(b)
							if err != nil {
								return
							}
							mu.Lock()
							came, last = came+1, time.Since(began)
							mu.Unlock()
							if n != size {
								t.Errorf("a packet of %d bytes came", n)
							}
						}
					})
				}
				for range tc.packets {
					for _, a := range tc.from {
						for _, b := range tc.to {
							if _, err := sockets[a].WriteTo(make([]byte, size), &net.UDPAddr{IP: w.Office(b).Addr.AsSlice(), Port: 44337}); err != nil {
								t.Fatal(err)
							}
						}
					}
				}
				time.Sleep(time.Minute)
				for _, s := range sockets {
					s.Close()
				}
				wg.Wait()
				for _, end := range ends {
					end()
				}
				if want := latency + time.Duration(tc.come)*each; came != tc.come || last != want {
					t.Errorf("%d packets came, the last after %v; want %d and %v", came, last, tc.come, want)
				}
			})
		})
	}
}
