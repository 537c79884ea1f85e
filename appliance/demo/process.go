package demo

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// Waiting times. A node that starts on its data is up in well under a second.
const (
	startLimit = 15 * time.Second
	stopLimit  = 15 * time.Second
	step       = 20 * time.Millisecond
)

// spawn starts this program with args as a process of its own session that
// holds nothing of ours; what it prints goes to the end of logFile.
func spawn(exe, logFile string, args ...string) (pid int, err error) {
	out, err := os.OpenFile(logFile, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return 0, fmt.Errorf("open log: %w", err)
	}
	defer out.Close()
	c := exec.Command(exe, args...)
	c.Stdout, c.Stderr = out, out
	c.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	c.Dir = "/"
	if err := c.Start(); err != nil {
		return 0, fmt.Errorf("start %s: %w", exe, err)
	}
	go c.Wait() // reaps it if it ends while we live; it may outlive us
	return c.Process.Pid, nil
}

// alive reports whether pid is a living process that was started with word
// among its arguments: a pid that was reused by another program is not ours.
func alive(pid int, word string) bool {
	if pid <= 0 {
		return false
	}
	args, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/cmdline")
	if err != nil || !bytes.Contains(args, []byte(word)) {
		return false // a zombie has an empty command line
	}
	return true
}

// signal sends sig to a process of ours and waits until it is gone.
func signal(pid int, word string, sig syscall.Signal, limit time.Duration) bool {
	if !alive(pid, word) {
		return true
	}
	syscall.Kill(pid, sig)
	for end := time.Now().Add(limit); time.Now().Before(end); time.Sleep(step) {
		if gone(pid) {
			return true
		}
	}
	return false
}

// gone reports whether a process that was signalled holds nothing any more. A
// dying one loses its command line first and is called a zombie next, while its
// other threads still hold its ports and locks: the next start would find them
// taken.
func gone(pid int) bool {
	dir := "/proc/" + strconv.Itoa(pid)
	stat, err := os.ReadFile(dir + "/stat")
	if err != nil {
		return true
	}
	_, after, _ := strings.Cut(string(stat), ") ") // the name before it may hold anything
	threads, _ := os.ReadDir(dir + "/task")
	return len(threads) <= 1 && (strings.HasPrefix(after, "Z") || strings.HasPrefix(after, "X"))
}

// stop ends a process of ours: it may finish what it does, then it must go.
func stop(pid int, word string) {
	if !signal(pid, word, syscall.SIGTERM, stopLimit) {
		signal(pid, word, syscall.SIGKILL, stopLimit)
	}
}

// waitReady waits until a node's ports and /readyz answer.
func waitReady(ctx context.Context, n *Node) error {
	ctx, cancel := context.WithTimeout(ctx, startLimit)
	defer cancel()
	client := &http.Client{Timeout: time.Second, Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", n.Socket)
	}}}
	ready := func() bool {
		resp, err := client.Get("http://node/readyz")
		if err != nil {
			return false
		}
		resp.Body.Close()
		if resp.StatusCode != http.StatusOK {
			return false
		}
		for _, p := range []int{n.Ports.SMTP, n.Ports.Submission, n.Ports.IMAP, n.Ports.HTTPS} {
			c, err := net.DialTimeout("tcp", net.JoinHostPort(n.Address, strconv.Itoa(p)), time.Second)
			if err != nil {
				return false
			}
			c.Close()
		}
		return true
	}
	for !ready() {
		if !alive(n.Pid, n.Config) {
			return fmt.Errorf("%s ended while it started; its last words: %s", n.Name, lastWords(n.Log))
		}
		select {
		case <-time.After(step):
		case <-ctx.Done():
			return fmt.Errorf("%s did not come up within %v; see %s", n.Name, startLimit, n.Log)
		}
	}
	return nil
}

// lastWords returns the end of a log file.
func lastWords(file string) string {
	b, err := os.ReadFile(file)
	if err != nil {
		return "(no log)"
	}
	lines := strings.Split(strings.TrimSpace(string(b)), "\n")
	return lines[len(lines)-1]
}
