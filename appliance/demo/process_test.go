package demo

import (
	"net"
	"os"
	"os/exec"
	"syscall"
	"testing"
	"time"
)

// A process with many threads and a port that is killed: once signal says that
// it is gone, the port is free.
func TestAKilledProcessHoldsNoPortAnyMore(t *testing.T) {
	if at := os.Getenv("DEMO_TEST_HOLD"); at != "" {
		l, err := net.Listen("tcp", at)
		if err != nil {
			t.Fatal(err)
		}
		for range 50 {
			go func() { syscall.Select(0, nil, nil, nil, nil) }() // a thread each
		}
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			c.Close()
		}
	}
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	at := free.Addr().String()
	free.Close()
	for range 10 {
		c := exec.Command(os.Args[0], "-test.run=^TestAKilledProcessHoldsNoPortAnyMore$")
		c.Env = append(os.Environ(), "DEMO_TEST_HOLD="+at)
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		for end := time.Now().Add(10 * time.Second); ; {
			if x, err := net.Dial("tcp", at); err == nil {
				x.Close()
				break
			}
			if time.Now().After(end) {
				t.Fatal("the process holds no port")
			}
		}
		if signal(c.Process.Pid, os.Args[0], syscall.SIGKILL, 5*time.Second); !gone(c.Process.Pid) {
			t.Fatal("not gone")
		}
		l, err := net.Listen("tcp", at)
		if err != nil {
			t.Fatal(err)
		}
		l.Close()
		c.Wait()
	}
}
