package processes

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/emersion/go-imap/v2"
	"github.com/google/go-cmp/cmp"

	"posthouse/appliance/demo"
)

// Folder is a folder as a client sees it.
type Folder struct {
	Name     string
	Validity uint32
	Next     uint32
	Messages []Message
}

// office is all that must not change when an index is made anew.
type office struct {
	Folders map[string][]Folder // by person
	Queue   []string
	Outside []string
}

// see reads everything at an office that people and peers can see.
func see(t *testing.T, m *Mesh, name string) office {
	t.Helper()
	out := office{Folders: map[string][]Folder{}, Outside: m.OutsideMail()}
	slices.Sort(out.Outside)
	for _, u := range m.State().Users {
		if u.Home == name {
			fs, err := folders(m, u)
			if err != nil {
				t.Errorf("%s: %v", u.Address, err)
			}
			out.Folders[u.Address] = fs
		}
	}
	var err error
	if out.Queue, err = waiting(m, name); err != nil {
		t.Fatal(err)
	}
	return out
}

// waiting lists what waits at an office.
func waiting(m *Mesh, name string) (out []string, err error) {
	es, err := m.API(name).Queue(context.Background())
	if err != nil {
		return nil, fmt.Errorf("queue list: %w", err)
	}
	for _, e := range es {
		var rcpts []string
		for _, r := range e.Recipients {
			rcpts = append(rcpts, r.Address)
		}
		out = append(out, fmt.Sprintf("%s from %s for %s, %d bytes: %v", e.ID, e.From, e.Destination, e.Size, rcpts))
	}
	return out, nil
}

// folders reads all of a person's folders whole.
func folders(m *Mesh, u demo.User) ([]Folder, error) {
	c, _, err := m.folder(u, "INBOX")
	if err != nil {
		return nil, err
	}
	list, err := c.List("", "*", nil).Collect()
	c.Close()
	if err != nil {
		return nil, err
	}
	var out []Folder
	for _, x := range list {
		if slices.Contains(x.Attrs, imap.MailboxAttrNoSelect) {
			continue
		}
		c, box, err := m.folder(u, x.Mailbox)
		if err != nil {
			return nil, err
		}
		c.Close()
		ms, err := m.messages(u, x.Mailbox)
		if err != nil {
			return nil, err
		}
		out = append(out, Folder{x.Mailbox, box.UIDValidity, uint32(box.UIDNext), ms})
	}
	return out, nil
}

// work has a person read, flag, file, copy and expunge.
func work(t *testing.T, m *Mesh, u demo.User) {
	t.Helper()
	c, box, err := m.folder(u, "INBOX")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	if box.NumMessages < 10 {
		t.Fatalf("%s has %d messages", u.Address, box.NumMessages)
	}
	set := func(nums ...uint32) imap.SeqSet { return imap.SeqSetNum(nums...) }
	flags := func(op imap.StoreFlagsOp, s imap.SeqSet, f ...imap.Flag) {
		t.Helper()
		check(c.Store(s, &imap.StoreFlags{Op: op, Flags: f, Silent: true}, nil).Close())
	}
	flags(imap.StoreFlagsAdd, set(1, 2, 3, 4), imap.FlagSeen)
	flags(imap.StoreFlagsAdd, set(2, 5), imap.FlagFlagged, "$Later")
	flags(imap.StoreFlagsDel, set(3), imap.FlagSeen)
	check(c.Create("Projects", nil).Wait())
	check(c.Create("Projects/Bridge", nil).Wait())
	_, err = c.Copy(set(4, 6), "Projects").Wait()
	check(err)
	_, err = c.Move(set(7), "Projects/Bridge").Wait()
	check(err)
	flags(imap.StoreFlagsAdd, set(5), imap.FlagDeleted)
	check(c.Expunge().Close())
	check(c.Rename("Projects/Bridge", "Projects/Tunnel", nil).Wait())
}

// serve starts an office's process as a supervisor would, and returns it.
func serve(t *testing.T, m *Mesh, office string) *exec.Cmd {
	t.Helper()
	c := exec.Command(m.bin, "serve", "--config", m.Node(office).Config)
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	return c
}

// sendWork fills hq: mail that was delivered and worked on, mail that left, and
// mail that waits: for plzen, which is down afterwards, if there is one, else for
// the outside, which is.
func sendWork(t *testing.T, m *Mesh) *Ledger {
	t.Helper()
	l := NewLedger()
	s, err := m.Submit(m.User("hq", 0), "hq")
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	send := func(to string, n, size int) {
		for range n {
			id := NewID()
			err := s.SendText(id, filled(id, s.from, to, size), to)
			l.Sent(id, to, err)
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	for k := range 3 {
		send(m.User("hq", k).Address, 30, 0)
		send(m.User("hq", k).Address, 3, 300<<10)
	}
	send("friend@example.net", 10, 0)
	settle(t, m, l, 30*time.Second)
	if len(m.State().Nodes) > 1 {
		m.Kill("plzen")
		send(m.User("plzen", 0).Address, 10, 0)
	} else {
		pid := m.State().Outside.Pid
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		m.WaitFor("the outside is gone", 5*time.Second, func() bool { return !running(pid) })
		send("friend@example.net", 10, 0)
	}
	for k := range 3 {
		work(t, m, m.User("hq", k))
	}
	return l
}

func TestTheIndexIsMadeAnewFromTheLog(t *testing.T) {
	m := Up(t, "hq", "plzen")
	l := sendWork(t, m)
	before := see(t, m, "hq")
	hq := m.Node("hq")
	view := filepath.Join(hq.Data, "view")
	same := func(t *testing.T) {
		t.Helper()
		if d := cmp.Diff(before, see(t, m, "hq")); d != "" {
			t.Errorf("not as it was (-before +after):\n%.4000s", d)
		}
	}
	store := func(t *testing.T, what string, want int) string {
		t.Helper()
		out, err := m.Command("store", what, "--data", hq.Data)
		var exit *exec.ExitError
		if got := 0; errors.As(err, &exit) && exit.ExitCode() != want || err == nil && want != got {
			t.Errorf("store %s: %v, want exit code %d\n%s", what, err, want, out)
		}
		return out
	}
	stop := func(t *testing.T, sig syscall.Signal) {
		t.Helper()
		pid := m.Node("hq").Pid
		if err := syscall.Kill(pid, sig); err != nil {
			t.Fatal(err)
		}
		m.WaitFor("hq ends", 30*time.Second, func() bool { return !running(pid) })
	}

	t.Run("verify and rebuild refuse while the node runs", func(t *testing.T) {
		if out := store(t, "verify", 75); !strings.Contains(out, "running") {
			t.Errorf("verify says %q", out)
		}
		if out := store(t, "rebuild", 75); !strings.Contains(out, "stop it first") {
			t.Errorf("rebuild says %q", out)
		}
		same(t)
	})
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL} {
		t.Run(fmt.Sprintf("rebuilt by hand after signal %d", sig), func(t *testing.T) {
			stop(t, sig)
			if sig == syscall.SIGTERM {
				store(t, "verify", 0)
			}
			if err := os.RemoveAll(view); err != nil {
				t.Fatal(err)
			}
			store(t, "rebuild", 0)
			m.Start("hq")
			same(t)
		})
		t.Run(fmt.Sprintf("rebuilt by the start after signal %d", sig), func(t *testing.T) {
			stop(t, sig)
			if err := os.RemoveAll(view); err != nil {
				t.Fatal(err)
			}
			m.Start("hq")
			same(t)
		})
	}
	random := rand.New(rand.NewPCG(5, 6))
	t.Run("killed while it is rebuilt", func(t *testing.T) {
		stop(t, syscall.SIGKILL)
		for k := range Count(6, 40) {
			if k%5 == 0 {
				if err := os.RemoveAll(view); err != nil {
					t.Fatal(err)
				}
			}
			c := exec.Command(m.bin, "store", "rebuild", "--data", hq.Data)
			if err := c.Start(); err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Duration(random.IntN(100)) * time.Millisecond)
			c.Process.Kill()
			c.Wait()
		}
		m.Start("hq")
		same(t)
	})
	t.Run("killed while it starts", func(t *testing.T) {
		stop(t, syscall.SIGKILL)
		for k := range Count(15, 150) {
			if k%10 == 0 {
				if err := os.RemoveAll(view); err != nil {
					t.Fatal(err)
				}
			}
			c := serve(t, m, "hq")
			time.Sleep(time.Duration(random.IntN(150)) * time.Millisecond)
			c.Process.Kill()
			c.Wait()
		}
		if took := m.Start("hq"); took > 5*time.Second {
			t.Errorf("it started in %v", took)
		}
		same(t)
	})
	// What waited leaves, once.
	m.Start("plzen")
	far := m.User("plzen", 0)
	m.WaitFor("the mail for plzen is there", 30*time.Second, func() bool {
		there, err := m.Inbox(far)
		missing, doubled := l.Missing(far.Address, there)
		if len(doubled) > 0 {
			t.Fatalf("%s has these twice: %v", far.Address, doubled)
		}
		return err == nil && len(missing) == 0
	})
	after := see(t, m, "hq")
	if len(after.Queue) > 0 || !slices.Equal(after.Outside, before.Outside) {
		t.Errorf("%d messages wait, the outside has %d messages and had %d", len(after.Queue), len(after.Outside), len(before.Outside))
	}
	checkBodies(t, m, l)
	if b, err := json.Marshal(before); err == nil {
		t.Logf("%d bytes of mailboxes and queue were the same after every rebuild", len(b))
	}
}
