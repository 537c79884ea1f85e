package bench

import (
	"context"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"text/tabwriter"
	"time"

	"posthouse/appliance/demo"
	"posthouse/simtest/processes"
)

// table is what the benchmarks found, printed at the end.
var table []line

type line struct{ what, rate, wait, cost, rest string }

func TestMain(m *testing.M) {
	code := m.Run()
	processes.Clean()
	if len(table) > 0 {
		w := tabwriter.NewWriter(os.Stdout, 2, 0, 2, ' ', 0)
		fmt.Fprintf(w, "\nMEASURED\tRATE\tWAIT p50 / p99\tCPU OF THE NODES\t\n")
		for _, l := range table {
			fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\n", l.what, l.rate, l.wait, l.cost, l.rest)
		}
		w.Flush()
	}
	os.Exit(code)
}

// mesh is two offices under test: hq takes what goes to the people of plzen, or
// plzen itself.
type mesh struct {
	*processes.Mesh
	hq, plzen process
	users     []demo.User // of plzen
	to        []string
}

func up(b *testing.B) *mesh {
	m := &mesh{Mesh: processes.Up(b, "hq", "plzen")}
	m.find()
	for k := range 3 {
		m.users = append(m.users, m.User("plzen", k))
		m.to = append(m.to, m.users[k].Address)
	}
	return m
}

// find looks the processes up; their pids change with a restart.
func (m *mesh) find() {
	for office, p := range map[string]*process{"hq": &m.hq, "plzen": &m.plzen} {
		n := m.Node(office)
		*p = process{n.Pid, n.Socket}
	}
}

func (m *mesh) smtp(office string) string {
	n := m.Node(office)
	return net.JoinHostPort(n.Address, strconv.Itoa(n.Ports.SMTP))
}

func (m *mesh) imap(b *testing.B, u demo.User) *client {
	b.Helper()
	n := m.Node("plzen")
	c, err := dialIMAP(net.JoinHostPort(n.Address, strconv.Itoa(n.Ports.IMAPS)), m.TLS(n.Address), u.Address, u.Password)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { c.Close() })
	return c
}

// delivered counts the mail in plzen's inboxes.
func (m *mesh) delivered(b *testing.B, cs []*client) (n int) {
	b.Helper()
	for _, c := range cs {
		k, err := c.messages("INBOX")
		if err != nil {
			b.Fatal(err)
		}
		n += k
	}
	return n
}

func (m *mesh) inboxes(b *testing.B) (cs []*client) {
	for _, u := range m.users {
		cs = append(cs, m.imap(b, u))
	}
	return cs
}

func send(b *testing.B, l load) *outcome {
	b.Helper()
	o, err := l.run(context.Background())
	if err != nil {
		b.Fatal(err)
	}
	return o
}

func milliseconds(d time.Duration) string { return fmt.Sprintf("%.1f", float64(d.Microseconds())/1000) }

func waits(ws []time.Duration) string {
	return milliseconds(quantile(ws, 0.5)) + " / " + milliseconds(quantile(ws, 0.99)) + " ms"
}

func each(cpu time.Duration, n int) string {
	return fmt.Sprintf("%.3f ms each", cpu.Seconds()*1000/float64(n))
}

func mebibytes(n int64) string { return fmt.Sprintf("%.1f MiB", float64(n)/(1<<20)) }

func add(b *testing.B, l line) {
	table = append(table, l)
	b.ReportMetric(0, "ns/op") // the table has what counts
}

// BenchmarkNode runs everything on one mesh, from the smallest mailbox to the
// largest.
func BenchmarkNode(b *testing.B) {
	m := up(b)
	<-time.After(2 * time.Second) // what the founding left is done
	table = append(table, line{what: "memory of a node that idles", rest: "hq " + mebibytes(m.hq.memory("VmRSS")) + ", plzen " + mebibytes(m.plzen.memory("VmRSS")) + " resident"})
	for _, size := range []int{4 << 10, 100 << 10} {
		for _, sessions := range []int{1, 16, 128} {
			b.Run(fmt.Sprintf("accept/%dKiB/sessions=%d", size>>10, sessions), func(b *testing.B) { m.accept(b, size, sessions) })
		}
	}
	b.Run("deliver", m.deliver)
	b.Run("relay", m.relay)
	b.Run("relay-large", m.relayLarge)
	b.Run("relay-one", m.relayOne)
	b.Run("login", m.login)
	b.Run("idle", m.idle)
	b.Run("mailbox", m.mailbox)
	b.Run("start", m.start)
	b.Run("large", m.large)
}

// settle waits until plzen has delivered what it took.
func (m *mesh) settle(b *testing.B, cs []*client, want int) {
	b.Helper()
	m.WaitFor("delivery", time.Minute, func() bool { return m.delivered(b, cs) >= want })
}

func (m *mesh) accept(b *testing.B, size, sessions int) {
	messages := map[int]int{1: 1500, 16: 8000, 128: 16000}[sessions]
	if size > 64<<10 {
		messages /= 8
	}
	cs := m.inboxes(b)
	for b.Loop() {
		had := m.delivered(b, cs)
		before, err := m.plzen.figures()
		if err != nil {
			b.Fatal(err)
		}
		cpu := m.plzen.cpu()
		o := send(b, load{address: m.smtp("plzen"), sessions: sessions, messages: messages, size: size, to: m.to})
		m.settle(b, cs, had+messages)
		cpu = m.plzen.cpu() - cpu
		after, err := m.plzen.figures()
		if err != nil {
			b.Fatal(err)
		}
		syncs := after["posthouse_log_syncs_total"] - before["posthouse_log_syncs_total"]
		records := after["posthouse_log_records_total"] - before["posthouse_log_records_total"]
		rest := fmt.Sprintf("%.1f messages and their deliveries a sync", float64(messages)/syncs)
		if records < float64(2*messages) {
			b.Errorf("%d messages made %.0f records", messages, records)
		}
		if size > 64<<10 {
			rest = fmt.Sprintf("%.0f MB/s", o.rate()*float64(size)/1e6)
		}
		add(b, line{fmt.Sprintf("SMTP, %d KiB, %d sessions: on disk, then 250", size>>10, sessions), fmt.Sprintf("%.0f/s", o.rate()), waits(o.waits), each(cpu, messages) + ", delivery too", rest})
	}
}

func (m *mesh) deliver(b *testing.B) {
	const messages = 10000
	cs := m.inboxes(b)
	for b.Loop() {
		had, cpu, began := m.delivered(b, cs), m.plzen.cpu(), time.Now()
		send(b, load{address: m.smtp("plzen"), sessions: 64, messages: messages, size: 4 << 10, to: m.to})
		m.settle(b, cs, had+messages)
		took := time.Since(began)
		add(b, line{"into mailboxes of the same office, 4 KiB, 64 sessions", fmt.Sprintf("%.0f/s", messages/took.Seconds()), "", each(m.plzen.cpu()-cpu, messages), "from SMTP to a visible message"})
	}
}

func (m *mesh) relay(b *testing.B) {
	const messages = 8000
	cs := m.inboxes(b)
	for b.Loop() {
		had, cpu, began := m.delivered(b, cs), m.plzen.cpu()+m.hq.cpu(), time.Now()
		send(b, load{address: m.smtp("hq"), sessions: 64, messages: messages, size: 4 << 10, to: m.to})
		m.settle(b, cs, had+messages)
		took := time.Since(began)
		add(b, line{"into mailboxes of another office, 4 KiB, 64 sessions", fmt.Sprintf("%.0f/s", messages/took.Seconds()), "", each(m.plzen.cpu()+m.hq.cpu()-cpu, messages) + ", both nodes", "from SMTP to a visible message"})
	}
}

func (m *mesh) relayLarge(b *testing.B) {
	const messages, size = 32, 8 << 20
	cs := m.inboxes(b)
	for b.Loop() {
		had, cpu, began := m.delivered(b, cs), m.plzen.cpu()+m.hq.cpu(), time.Now()
		send(b, load{address: m.smtp("hq"), sessions: 4, messages: messages, size: size, to: m.to})
		m.settle(b, cs, had+messages)
		took := time.Since(began)
		add(b, line{"into mailboxes of another office, 8 MiB, 4 sessions", fmt.Sprintf("%.0f MB/s", messages*size/1e6/took.Seconds()), "", each(m.plzen.cpu()+m.hq.cpu()-cpu, messages) + ", both nodes", "from SMTP to a visible message"})
	}
}

func (m *mesh) relayOne(b *testing.B) {
	c := m.imap(b, m.users[0])
	s, err := dialSMTP(m.smtp("hq"))
	if err != nil {
		b.Fatal(err)
	}
	defer s.Close()
	text := newText(4 << 10)
	for b.Loop() {
		var ws []time.Duration
		for range 50 {
			had, err := c.messages("INBOX")
			if err != nil {
				b.Fatal(err)
			}
			began := time.Now()
			if err := s.mail(m.to[0], text.next()); err != nil {
				b.Fatal(err)
			}
			for now := had; now == had; {
				if now, err = c.messages("INBOX"); err != nil || time.Since(began) > ioLimit {
					b.Fatal("not delivered: ", err)
				}
			}
			ws = append(ws, time.Since(began))
		}
		add(b, line{"one message to another office, 4 KiB", "", waits(ws), "", "from SMTP to a visible message"})
	}
}

func (m *mesh) login(b *testing.B) {
	const logins, sessions = 400, 4
	for b.Loop() {
		m.imap(b, m.users[0]).Close() // the first pays for the password
		cpu, began := m.plzen.cpu(), time.Now()
		var wg sync.WaitGroup
		for range sessions {
			wg.Go(func() {
				for range logins / sessions {
					m.imap(b, m.users[0]).Close()
				}
			})
		}
		wg.Wait()
		add(b, line{"IMAP login, a new TLS connection each, 4 at once", fmt.Sprintf("%.0f/s", logins/time.Since(began).Seconds()), "", each(m.plzen.cpu()-cpu, logins), "known password"})
	}
}

func (m *mesh) idle(b *testing.B) {
	const connections = 120 // of three users: 50 each are allowed
	for b.Loop() {
		before := m.plzen.memory("VmRSS")
		for i := range connections {
			c := m.imap(b, m.users[i%3])
			if _, err := c.do("EXAMINE Trash"); err != nil {
				b.Fatal(err)
			}
		}
		grown := m.plzen.memory("VmRSS") - before
		add(b, line{what: "120 IMAP connections over TLS that idle", rest: fmt.Sprintf("%.0f KiB each", float64(max(grown, 0))/1024/connections)})
	}
}

// timed runs a command and checks how many lines of the answer hold want.
func timed(b *testing.B, c *client, command, want string, lines int) time.Duration {
	b.Helper()
	n, began := 0, time.Now()
	if err := c.each(command, func(l []byte) {
		if strings.Contains(string(l), want) {
			n++
		}
	}); err != nil {
		b.Fatal(err)
	}
	took := time.Since(began)
	if n != lines {
		b.Fatalf("%s: %d lines have %q, want %d", command, n, want, lines)
	}
	return took
}

const bigBox = 100_000

func (m *mesh) mailbox(b *testing.B) {
	u := m.users[2]
	for b.Loop() {
		c := m.imap(b, u)
		had, err := c.messages("INBOX")
		if err != nil {
			b.Fatal(err)
		}
		if n := bigBox - had; n > 0 {
			began := time.Now()
			send(b, load{address: m.smtp("plzen"), sessions: 64, messages: n, size: 1 << 10, to: []string{u.Address}})
			m.settle(b, []*client{c}, bigBox)
			add(b, line{what: "into one mailbox, 1 KiB, 64 sessions", rate: fmt.Sprintf("%.0f/s", float64(n)/time.Since(began).Seconds()), rest: fmt.Sprintf("%d messages in it at the end", bigBox)})
		}
		// A restart: nothing is in memory.
		m.Kill("plzen")
		m.Start("plzen")
		m.find()
		c = m.imap(b, u)
		first := timed(b, c, "SELECT INBOX", "EXISTS", 1)
		second := timed(b, m.imap(b, u), "SELECT INBOX", "EXISTS", 1)
		add(b, line{what: "SELECT of 100,000 messages", rest: "first after a start " + milliseconds(first) + " ms, then " + milliseconds(second) + " ms"})
		first = timed(b, c, "FETCH 99951:* (FLAGS ENVELOPE)", "ENVELOPE (", 50)
		add(b, line{what: "FETCH of 50 envelopes of 100,000", rest: milliseconds(first) + " ms"})
		cpu := m.plzen.cpu()
		first = timed(b, c, "FETCH 1:10000 (ENVELOPE)", "ENVELOPE (", 10000)
		used := m.plzen.cpu() - cpu
		second = timed(b, c, "FETCH 1:10000 (ENVELOPE)", "ENVELOPE (", 10000)
		add(b, line{"FETCH of 10,000 envelopes", fmt.Sprintf("%.0f/s", 10000/first.Seconds()), "", each(used, 10000), "first " + milliseconds(first) + " ms, then " + milliseconds(second) + " ms"})
		first = timed(b, c, "FETCH 1:* (ENVELOPE)", "ENVELOPE (", bigBox)
		second = timed(b, c, "FETCH 1:* (ENVELOPE)", "ENVELOPE (", bigBox)
		add(b, line{what: "FETCH of 100,000 envelopes", rate: fmt.Sprintf("%.0f/s", bigBox/first.Seconds()), rest: "first " + milliseconds(first) + " ms, then " + milliseconds(second) + " ms"})
		first = timed(b, c, `SEARCH SUBJECT "number 0000"`, "* SEARCH", 1)
		second = timed(b, c, "SEARCH UNSEEN", "* SEARCH", 1)
		add(b, line{what: "SEARCH SUBJECT, SEARCH UNSEEN in 100,000", rest: milliseconds(first) + " ms, " + milliseconds(second) + " ms"})
	}
}

func (m *mesh) start(b *testing.B) {
	for b.Loop() {
		m.Kill("plzen")
		killed := m.Start("plzen")
		m.find()
		<-time.After(3 * time.Second) // the mesh is whole again
		add(b, line{what: "start after a kill until all ports answer", rest: milliseconds(killed) + " ms with 100,000 messages and more on disk; idles with " + mebibytes(m.plzen.memory("VmRSS")) + " resident"})
	}
}

// large sends 64 messages of 50 MiB at once, and small mail beside them.
func (m *mesh) large(b *testing.B) {
	const sessions, size = 64, 50 << 20
	var fs syscall.Statfs_t
	if err := syscall.Statfs(m.Dir, &fs); err != nil {
		b.Fatal(err)
	}
	if free := int64(fs.Bavail) * fs.Bsize; free < 4*sessions*size {
		table = append(table, line{what: "64 sessions of 50 MiB at once", rest: "not measured: only " + mebibytes(free) + " of the disk are free"})
		return
	}
	small := load{address: m.smtp("plzen"), sessions: 2, size: 4 << 10, to: m.to[:1]}
	for b.Loop() {
		small.messages = 2000
		alone := send(b, small)
		if err := m.plzen.forgetPeak(); err != nil {
			b.Fatal(err)
		}
		var done atomic.Bool
		var wg sync.WaitGroup
		cpu, began := m.plzen.cpu(), time.Now()
		for range sessions {
			wg.Go(func() {
				c, err := dialSMTP(m.smtp("plzen"))
				if err == nil {
					defer c.Close()
					err = c.large(m.to[1], size)
				}
				if err != nil {
					b.Error(err)
				}
			})
		}
		var beside []time.Duration
		stopped := make(chan struct{})
		go func() {
			defer close(stopped)
			small.messages = 50
			for !done.Load() {
				o, err := small.run(context.Background())
				if err != nil {
					b.Error(err)
					return
				}
				beside = append(beside, o.waits...)
			}
		}()
		wg.Wait()
		took := time.Since(began)
		done.Store(true)
		<-stopped
		cpu = m.plzen.cpu() - cpu
		add(b, line{"64 sessions of 50 MiB at once", fmt.Sprintf("%.0f MB/s", float64(sessions)*size/1e6/took.Seconds()), "", each(cpu, sessions), mebibytes(m.plzen.memory("VmHWM")) + " resident at most"})
		add(b, line{"  4 KiB beside them, 2 sessions", "", waits(beside), "", "alone " + waits(alone.waits)})
	}
}
