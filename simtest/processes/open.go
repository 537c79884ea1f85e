package processes

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// hold is what a process has open (invariant 8).
type hold struct {
	sockets int            // listeners and connections
	other   int            // what the runtime and its libraries hold: logs, event queues, /dev/null
	files   map[string]int // in the office's data folder: how often each is open, by what /proc calls it
}

// holdOf sorts the links of /proc/PID/fd of an office whose data lies there.
func holdOf(links []string, data string) hold {
	h := hold{files: map[string]int{}}
	for _, l := range links {
		name, ours := strings.CutPrefix(l, data+"/")
		switch {
		case ours:
			h.files[name]++
		case strings.HasPrefix(l, "socket:"):
			h.sockets++
		default:
			h.other++
		}
	}
	return h
}

// above says in what a quiet node holds more than a node that was just started.
//
// Sockets and what the runtime holds are counted: the same. Files are not, since
// they grow with the store: Badger maps each of its tables, and the log keeps its
// segments open for reading. But each is open once, and one of the log's twice:
// the one that is written, when somebody has read in it. None was removed: its
// room would stay taken until the node ends.
func (h hold) above(fresh hold) (out []string) {
	if h.sockets > fresh.sockets {
		out = append(out, fmt.Sprintf("%d sockets, %d after a start", h.sockets, fresh.sockets))
	}
	if h.other > fresh.other {
		out = append(out, fmt.Sprintf("%d other things, %d after a start", h.other, fresh.other))
	}
	var twice []string
	for name, n := range h.files {
		if strings.HasSuffix(name, " (deleted)") {
			out = append(out, name)
		}
		if n == 2 && strings.HasPrefix(name, "log/") {
			twice = append(twice, name)
		} else if n > 1 {
			out = append(out, fmt.Sprintf("%s %d times", name, n))
		}
	}
	if len(twice) > 1 {
		slices.Sort(twice)
		out = append(out, "twice "+strings.Join(twice, " and "))
	}
	slices.Sort(out)
	return out
}

const (
	// freshTime is how long nodes that have just started are looked at: what they
	// hold all that time is the level.
	freshTime = 2 * time.Second
	// levelLimit is how long quiet nodes may need until they hold no more than
	// after a start: smtpout may keep a connection without mail for ten seconds.
	levelLimit = 20 * time.Second
)

// Level looks at nodes that have started a moment ago, by their process ids, and
// returns the least that each holds.
func (m *Mesh) Level(pids map[string]int) map[string]hold {
	m.tb.Helper()
	level := map[string]hold{}
	for began := time.Now(); time.Since(began) < freshTime; time.Sleep(100 * time.Millisecond) {
		for office, pid := range pids {
			h := m.holds(office, pid)
			if was, ok := level[office]; ok {
				h.sockets, h.other = min(h.sockets, was.sockets), min(h.other, was.other)
			}
			level[office] = h
		}
	}
	return level
}

// BackTo waits until nodes that are quiet hold no more than that level, and fails
// the test when they do not. It returns how long it took.
func (m *Mesh) BackTo(level map[string]hold, pids map[string]int) time.Duration {
	m.tb.Helper()
	began := time.Now()
	for {
		late := ""
		for office, pid := range pids {
			if out := m.holds(office, pid).above(level[office]); len(out) > 0 {
				late = fmt.Sprintf("%s %s still has open: %s", late, office, strings.Join(out, "; "))
			}
		}
		if late == "" {
			return time.Since(began)
		}
		if time.Since(began) > levelLimit {
			m.tb.Errorf("invariant 8: %v after all is quiet%s", levelLimit, late)
			for office, pid := range pids {
				m.tb.Logf("%s:\n%s", office, strings.Join(m.sockets(pid), "\n"))
			}
			return levelLimit
		}
		time.Sleep(100 * time.Millisecond)
	}
}

// sockets are a process's, as the kernel's tables have them.
func (m *Mesh) sockets(pid int) (out []string) {
	m.tb.Helper()
	ours := m.links(pid)
	for _, table := range []string{"tcp", "tcp6", "udp", "udp6", "unix"} {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/net/%s", pid, table))
		if err != nil {
			m.tb.Fatal(err)
		}
		for line := range strings.Lines(string(b)) {
			if slices.ContainsFunc(strings.Fields(line), func(f string) bool { return slices.Contains(ours, "socket:["+f+"]") }) {
				out = append(out, table+" "+strings.TrimSpace(line))
			}
		}
	}
	return out
}

// holds counts what an office's process has open.
func (m *Mesh) holds(office string, pid int) hold {
	m.tb.Helper()
	return holdOf(m.links(pid), m.Node(office).Data)
}

// links are what a process has open, as /proc calls it.
func (m *Mesh) links(pid int) (links []string) {
	m.tb.Helper()
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	names, err := os.ReadDir(dir)
	if err != nil {
		m.tb.Fatal(err)
	}
	for _, n := range names {
		if l, err := os.Readlink(filepath.Join(dir, n.Name())); err == nil { // else it was closed meanwhile
			links = append(links, l)
		}
	}
	return links
}
