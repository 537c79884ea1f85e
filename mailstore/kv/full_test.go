package kv_test

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"posthouse/mailstore/kv"
)

// TestMain turns the test binary into the process that the tests below kill
// and starve.
func TestMain(m *testing.M) {
	if len(os.Args) == 4 && os.Args[1] == "kv-writer" {
		pace, _ := time.ParseDuration(os.Args[3])
		if err := writer(os.Args[2], pace); err != nil {
			fmt.Println("error", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// rowsOf are the rows of one record: enough of them, and big enough, that
// memtables rotate often.
func rowsOf(seq uint64) *kv.Batch {
	b := new(kv.Batch)
	val := bytes.Repeat(fmt.Appendf(nil, "%016d", seq), 40)
	for i := range 4 {
		b.Put(fmt.Appendf(nil, "row/%d/%012d", i, seq), val)
	}
	b.Put([]byte("last"), strconv.AppendUint(nil, seq, 10))
	return b
}

// writer applies records for ever, one each pace or, with 0, as fast as the
// overlay takes them, and prints how far they are on disk. It ends when its input does.
func writer(dir string, pace time.Duration) error {
	v, err := kv.Open(context.Background(), kv.Options{Dir: dir, Delay: 20 * time.Millisecond,
		Rebuilding: func(why string) { fmt.Println("rebuilding", why) },
		Logger:     slog.New(slog.NewTextHandler(os.Stderr, nil))})
	if err != nil {
		return err
	}
	var stop atomic.Bool
	go func() {
		bufio.NewReader(os.Stdin).ReadString('\n')
		stop.Store(true)
	}()
	fmt.Println("open", v.Applied())
	done := make(chan error, 1)
	go func() {
		for seq := v.Applied() + 1; !stop.Load(); seq++ {
			if err := v.Apply(seq, rowsOf(seq)); err != nil {
				done <- err
				return
			}
			if pace > 0 {
				time.Sleep(pace)
			}
		}
		done <- nil
	}()
	tick := time.NewTicker(10 * time.Millisecond)
	for {
		select {
		case err := <-done:
			if err != nil {
				return err
			}
			if err := v.Flush(context.Background()); err != nil {
				return err
			}
			fmt.Println("end", v.Durable())
			return v.Close()
		case <-tick.C:
			fmt.Println("at", v.Durable(), v.Full())
		}
	}
}

// child is a writer process.
type child struct {
	t     *testing.T
	cmd   *exec.Cmd
	stdin interface{ Close() error }
	lines chan string
	err   bytes.Buffer
	at    uint64 // durable, as last told
	full  bool
	open  uint64
	why   string
}

func start(t *testing.T, dir string, pace time.Duration) *child {
	t.Helper()
	c := &child{t: t, cmd: exec.Command(os.Args[0], "kv-writer", dir, pace.String()), lines: make(chan string, 1<<16)}
	in, err := c.cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	c.stdin = in
	out, err := c.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	c.cmd.Stderr = &c.err
	if err := c.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(c.lines)
		for s := bufio.NewScanner(out); s.Scan(); {
			c.lines <- s.Text()
		}
	}()
	t.Cleanup(func() { c.cmd.Process.Kill(); c.cmd.Wait() })
	return c
}

// until reads what the child says until ok, within a minute.
func (c *child) until(what string, ok func(*child) bool) {
	c.t.Helper()
	limit := time.After(time.Minute)
	for {
		select {
		case l, more := <-c.lines:
			if !more {
				err := c.cmd.Wait()
				c.t.Fatalf("the writer ended (%v) while waiting for %s:\n%s", err, what, tail(c.err.String()))
			}
			f := strings.Fields(l)
			switch f[0] {
			case "open":
				c.open, _ = strconv.ParseUint(f[1], 10, 64)
			case "at", "end":
				c.at, _ = strconv.ParseUint(f[1], 10, 64)
				c.full = f[len(f)-1] == "true"
			case "rebuilding":
				c.why = l
			case "error":
				c.t.Fatal(l)
			}
			if ok(c) {
				return
			}
		case <-limit:
			c.t.Fatalf("no %s within a minute; at %d, full %v\n%s", what, c.at, c.full, tail(c.err.String()))
		}
	}
}

// tail shows how a process ended: the fault and the first stack.
func tail(s string) string {
	if i := strings.Index(s, "unexpected fault"); i >= 0 {
		s = s[i:]
	}
	return s[:min(len(s), 3000)]
}

// end lets the child finish and waits for it.
func (c *child) end() {
	c.t.Helper()
	c.stdin.Close()
	for l := range c.lines {
		if f := strings.Fields(l); f[0] == "end" {
			c.at, _ = strconv.ParseUint(f[1], 10, 64)
		}
	}
	if err := c.cmd.Wait(); err != nil {
		c.t.Fatalf("the writer ended with %v\n%s", err, tail(c.err.String()))
	}
}

// verify checks that the view in dir holds exactly the records up to its
// position, which is at least least.
func verify(t *testing.T, dir string, least uint64) uint64 {
	t.Helper()
	v, err := kv.Open(t.Context(), kv.Options{Dir: dir, Rebuilding: func(why string) { t.Fatal("set aside:", why) }})
	if err != nil {
		t.Fatal(err)
	}
	defer v.Close()
	at := v.Applied()
	if at < least {
		t.Fatalf("position %d, was told %d", at, least)
	}
	for i := range 4 {
		n, prefix := uint64(0), fmt.Sprintf("row/%d/", i)
		if err := v.Scan([]byte(prefix), nil, func(k, val []byte) bool {
			n++
			if string(k) != fmt.Sprintf("%s%012d", prefix, n) || string(val[:16]) != fmt.Sprintf("%016d", n) {
				t.Fatalf("row %s at place %d holds %s", k, n, val[:16])
			}
			return true
		}); err != nil {
			t.Fatal(err)
		}
		if n != at {
			t.Fatalf("%d rows at position %d", n, at)
		}
	}
	if val, _, err := v.Get([]byte("last")); at > 0 && (err != nil || string(val) != fmt.Sprint(at)) {
		t.Fatalf("last is %s at position %d: %v", val, at, err)
	}
	return at
}

func TestKillsLeaveTheViewAtARecord(t *testing.T) {
	dir, least := t.TempDir(), uint64(0)
	for i := range 10 {
		c := start(t, dir, 0)
		c.until("the open", func(c *child) bool { return c.open > 0 || c.at > 0 || i == 0 })
		if c.why != "" || c.open < least {
			t.Fatalf("kill %d: %s; opened at %d, was told %d", i, c.why, c.open, least)
		}
		goal := c.open + uint64(300*(i+1))
		c.until("progress", func(c *child) bool { return c.at >= goal })
		c.cmd.Process.Kill()
		for range c.lines {
		}
		c.cmd.Wait()
		least = c.at
	}
	verify(t, dir, least)
}

// Badger dies, in a goroutine of its own, of some damage to a table while it
// opens it.
func TestAViewThatKillsItsOpenerIsSetAside(t *testing.T) {
	dir := t.TempDir()
	c := start(t, dir, 0)
	c.until("progress", func(c *child) bool { return c.at >= 3000 })
	c.end()
	tables, err := filepath.Glob(filepath.Join(dir, "db", "*.sst"))
	if err != nil || len(tables) == 0 {
		t.Fatal(tables, err)
	}
	for _, name := range tables {
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		for i := 10; i < len(b)/2; i += 5000 {
			copy(b[i:], "damage")
		}
		if err := os.WriteFile(name, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for try := range 3 {
		c = start(t, dir, 0)
		var opened, aside bool
		for l := range c.lines {
			opened = opened || strings.HasPrefix(l, "open")
			aside = aside || strings.HasPrefix(l, "rebuilding")
			if opened {
				c.stdin.Close()
			}
		}
		err := c.cmd.Wait()
		t.Logf("try %d: opened %v, set aside %v, %v", try, opened, aside, err)
		if opened {
			if !aside || err != nil {
				t.Fatal("damage went unnoticed")
			}
			return
		}
	}
	t.Fatal("never set aside")
}

// small mounts an ext4 of size MiB; ok is false where that is not allowed.
func small(t *testing.T, size int) (dir string, ok bool) {
	t.Helper()
	tmp := t.TempDir()
	img := filepath.Join(tmp, "img")
	dir = filepath.Join(tmp, "mnt")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{
		{"truncate", "-s", fmt.Sprintf("%dM", size), img},
		{"mkfs.ext4", "-q", "-m", "0", img},
		{"mount", "-o", "loop", img, dir},
	} {
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			t.Logf("cannot mount a small disk (%s: %v: %s)", args[0], err, out)
			return "", false
		}
	}
	t.Cleanup(func() {
		if out, err := exec.Command("umount", dir).CombinedOutput(); err != nil {
			t.Errorf("umount: %v: %s", err, out)
		}
	})
	return dir, true
}

// fill takes all space at once, as another process might.
func fill(t *testing.T, dir string) (free func()) {
	t.Helper()
	name := filepath.Join(dir, "filler")
	f, err := os.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	size := int64(0)
	for step := int64(1 << 30); step >= 4096; {
		switch err := unix.Fallocate(int(f.Fd()), 0, size, step); {
		case err == nil:
			size += step
		case errors.Is(err, unix.ENOSPC):
			step /= 2
		default:
			t.Fatal(err)
		}
	}
	f.Close()
	return func() {
		if err := os.Remove(name); err != nil {
			t.Fatal(err)
		}
	}
}

// The held time is short here: nothing in the view depends on its length.
func TestADiskFilledAtOnceAndFreedLosesNothingInTheSameProcess(t *testing.T) {
	mnt, ok := small(t, 512)
	if !ok {
		t.Log("a simulated statfs stands in: see TestBelowTheFloorTheOverlayHoldsAndCatchesUp")
		simulatedFull(t)
		return
	}
	t.Log("on a real ext4 of 512 MiB")
	dir := filepath.Join(mnt, "view")
	// A mail server's pace. At full speed, with Badger making tables all the
	// time, one fill in seven still hits one in the making: DESIGN.md.
	c := start(t, dir, 5*time.Millisecond)
	c.until("the open", func(c *child) bool { return c.at > 0 })
	for round := range 2 {
		goal := c.at + 300
		c.until("progress", func(c *child) bool { return c.at >= goal })
		free := fill(t, mnt)
		c.until("full", func(c *child) bool { return c.full })
		n := 0
		c.until("one held second", func(c *child) bool { n++; return n > 100 })
		at := c.at
		free()
		c.until("the catching up", func(c *child) bool { return !c.full && c.at > at+100 })
		t.Logf("round %d: full at %d, caught up to %d", round, at, c.at)
	}
	goal := c.at + 300
	c.until("progress", func(c *child) bool { return c.at >= goal })
	free := fill(t, mnt) // and now it is killed, and started, while the disk is full
	c.until("full", func(c *child) bool { return c.full })
	c.cmd.Process.Kill()
	for range c.lines {
	}
	c.cmd.Wait()
	least := c.at
	for range 3 {
		v, err := kv.Open(t.Context(), kv.Options{Dir: dir, Rebuilding: func(why string) { t.Fatal("set aside:", why) }})
		if err != nil && !errors.Is(err, kv.ErrNoSpace) {
			t.Fatal(err)
		}
		t.Log("open on the full disk:", err)
		if err == nil {
			v.Close()
			break
		}
	}
	free()
	verify(t, dir, least)
}

func TestBelowTheFloorTheOverlayHoldsAndCatchesUp(t *testing.T) { simulatedFull(t) }

func simulatedFull(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var free atomic.Int64
		free.Store(1 << 30)
		v, err := kv.Open(t.Context(), kv.Options{Memory: true, Floor: 256 << 20,
			Statfs: func(string) (kv.FS, error) { return kv.FS{Total: 8 << 30, Free: free.Load()}, nil }})
		if err != nil {
			t.Fatal(err)
		}
		defer v.Close()
		if err := v.Apply(1, rowsOf(1)); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second)
		if v.Durable() != 1 || v.Full() {
			t.Fatal(v.Durable(), v.Full())
		}
		free.Store(200 << 20)
		if err := v.Apply(2, rowsOf(2)); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute)
		if v.Durable() != 1 || !v.Full() {
			t.Fatal(v.Durable(), v.Full())
		}
		if val, _, _ := v.Get([]byte("last")); string(val) != "2" {
			t.Fatalf("last is %s", val)
		}
		free.Store(257 << 20) // not yet: it would flap
		time.Sleep(time.Minute)
		if v.Durable() != 1 || !v.Full() {
			t.Fatal(v.Durable(), v.Full())
		}
		free.Store(1 << 30)
		time.Sleep(2 * time.Second)
		if v.Durable() != 2 || v.Full() {
			t.Fatal(v.Durable(), v.Full())
		}
	})
}
