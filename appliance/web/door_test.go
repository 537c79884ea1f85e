package web

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"posthouse/simtest/bufpipe"
)

// street is a door that clients of any address come to.
type street struct {
	t *testing.T
	l *bufpipe.Listener
}

func (s street) dial(from string) net.Conn {
	c, err := s.l.Dial(net.TCPAddrFromAddrPort(netip.MustParseAddrPort(from)))
	if err != nil {
		s.t.Fatal(err)
	}
	return c
}

func serveDoor(t *testing.T) (street, *Server) {
	s, _ := newServer(t)
	l := bufpipe.Listen(&net.TCPAddr{IP: net.IPv4(192, 0, 2, 1), Port: 443})
	srv := &http.Server{Handler: s.Public(), ReadHeaderTimeout: 10 * time.Second, IdleTimeout: 2 * time.Minute, ConnContext: s.ConnContext}
	done := make(chan struct{})
	go func() { srv.Serve(s.Limit(l)); close(done) }()
	t.Cleanup(func() { srv.Close(); <-done })
	return street{t, l}, s
}

// closedAfter reads until the end and says how long that took.
func closedAfter(c net.Conn) (answer string, took time.Duration) {
	began := time.Now()
	b, _ := io.ReadAll(c)
	return string(b), time.Since(began)
}

func TestStrangersHoldTwentyConnectionsAnAddress(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, s := serveDoor(t)
		var held []net.Conn
		for i := range strangersPerAddr {
			held = append(held, l.dial(fmt.Sprintf("10.0.0.7:%d", i+1)))
		}
		synctest.Wait()
		if _, took := closedAfter(l.dial("10.0.0.7:99")); took != 0 {
			t.Errorf("the 21st was closed after %v", took)
		}
		for _, other := range []string{"10.0.0.8:1", "127.0.0.1:1", "127.0.0.1:2"} {
			c := l.dial(other)
			io.WriteString(c, "GET /livez HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
			if got, _ := closedAfter(c); !strings.Contains(got, "200 OK") {
				t.Errorf("%s got %q", other, got)
			}
		}
		// Whoever logs in on one of them makes room.
		cookie := login(t, s.Public())
		fmt.Fprintf(held[0], "GET / HTTP/1.1\r\nHost: x\r\nCookie: %s=%s\r\n\r\n", cookieName, cookie)
		if resp, err := http.ReadResponse(bufio.NewReader(held[0]), nil); err != nil || resp.StatusCode != 200 {
			t.Fatal(resp, err)
		}
		c := l.dial("10.0.0.7:100")
		io.WriteString(c, "GET /livez HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
		if got, _ := closedAfter(c); !strings.Contains(got, "200 OK") {
			t.Errorf("after a log-in: %q", got)
		}
		for _, c := range held {
			c.Close()
		}
		synctest.Wait()
		s.door.mu.Lock()
		defer s.door.mu.Unlock()
		if s.door.total != 0 || len(s.door.strangers) != 0 {
			t.Errorf("%d connections, %d strangers are counted for ever", s.door.total, len(s.door.strangers))
		}
	})
}

func TestNobodyTakesForeverToSayWhatHeWants(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, _ := serveDoor(t)
		for _, c := range []struct {
			name, say string
			within    time.Duration
		}{
			{"nothing", "", 10 * time.Second},
			{"half a request line", "GET /", 10 * time.Second},
			{"a form that does not come", "POST /login HTTP/1.1\r\nHost: x\r\nContent-Type: application/x-www-form-urlencoded\r\nContent-Length: 100\r\n\r\nna", bodyTimeout},
			{"a body where none is wanted", "GET /login HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nna", bodyTimeout},
			{"a chunk that does not come", "POST /login HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nFF\r\n", bodyTimeout},
		} {
			conn := l.dial("127.0.0.1:1")
			io.WriteString(conn, c.say)
			if _, took := closedAfter(conn); took > c.within+time.Second {
				t.Errorf("%s: closed after %v", c.name, took)
			}
		}
	})
}
