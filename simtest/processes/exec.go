package processes

import (
	"context"
	"errors"
	"net"
	"net/http"
	"os"
	"os/exec"
	"sync"
	"syscall"
	"time"
)

// Proc is one office's node as a child of the test, so that the test may kill it
// at any instant, also in the middle of its start, and sees how it ended.
type Proc struct {
	m      *Mesh
	Office string

	mu  sync.Mutex
	cmd *exec.Cmd
	end chan struct{} // closed when cmd has ended
	err error         // of it
}

// Adopt ends the office's process that the demo started, and returns the means
// to run it as a child; it runs again when Adopt returns.
func (m *Mesh) Adopt(office string) *Proc {
	m.tb.Helper()
	m.Kill(office)
	p := &Proc{m: m, Office: office}
	m.tb.Cleanup(p.Kill)
	p.Exec()
	return p
}

// Exec starts the node and does not wait for it.
func (p *Proc) Exec() {
	n := p.m.Node(p.Office)
	out, err := os.OpenFile(n.Log, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o644)
	if err != nil {
		p.m.tb.Error(err)
		return
	}
	defer out.Close()
	cmd := exec.Command(p.m.bin, "serve", "--config", n.Config)
	cmd.Stdout, cmd.Stderr = out, out
	if err := cmd.Start(); err != nil {
		p.m.tb.Error(err)
		return
	}
	end := make(chan struct{})
	p.mu.Lock()
	p.cmd, p.end = cmd, end
	p.mu.Unlock()
	go func() {
		err := cmd.Wait()
		p.mu.Lock()
		p.err = err
		p.mu.Unlock()
		close(end)
	}()
}

// Signal sends the running process a signal.
func (p *Proc) Signal(s syscall.Signal) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.cmd != nil {
		p.cmd.Process.Signal(s)
	}
}

// Kill ends it by SIGKILL and waits until it is gone.
func (p *Proc) Kill() {
	p.Signal(syscall.SIGKILL)
	p.mu.Lock()
	end := p.end
	p.mu.Unlock()
	if end != nil {
		<-end
	}
}

// Ended waits until the process ends by itself and returns its exit code; -1
// when a signal ended it, -2 when it still runs after limit.
func (p *Proc) Ended(limit time.Duration) int {
	p.mu.Lock()
	end := p.end
	p.mu.Unlock()
	select {
	case <-end:
	case <-time.After(limit):
		return -2
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	var exit *exec.ExitError
	if errors.As(p.err, &exit) {
		return exit.ExitCode()
	}
	return 0
}

// Pid is the process id of the node.
func (p *Proc) Pid() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.cmd.Process.Pid
}

// Ready waits until /readyz says that the node serves, and returns how long that
// took.
func (p *Proc) Ready(limit time.Duration) time.Duration {
	p.m.tb.Helper()
	began := time.Now()
	for !p.m.Serves(p.Office) {
		select {
		case <-p.end:
			p.m.tb.Errorf("%s ended while it started", p.Office)
			return time.Since(began)
		case <-time.After(5 * time.Millisecond):
		}
		if time.Since(began) > limit {
			p.m.tb.Errorf("%s does not serve after %v", p.Office, limit)
			return limit
		}
	}
	return time.Since(began)
}

// Serves asks an office's /readyz.
func (m *Mesh) Serves(office string) bool {
	socket := m.Node(office).Socket
	c := http.Client{Timeout: time.Second, Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", socket)
	}}}
	r, err := c.Get("http://node/readyz")
	if err != nil {
		return false
	}
	r.Body.Close()
	return r.StatusCode == http.StatusOK
}
