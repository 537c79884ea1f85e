package processes

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"posthouse/appliance/admin"
)

// sniffer looks at every UDP payload on lo. It needs root.
type sniffer struct {
	fd      int
	wg      sync.WaitGroup
	stop    atomic.Bool
	packets atomic.Int64
	bytes   atomic.Int64
	mu      sync.Mutex
	want    map[string][]byte // what must not be seen, by name
	seen    map[string]string // name -> first packet
}

func sniff(t *testing.T, want map[string][]byte) *sniffer {
	t.Helper()
	const all = 0x0300 // htons(ETH_P_ALL)
	fd, err := syscall.Socket(syscall.AF_PACKET, syscall.SOCK_DGRAM, all)
	if err != nil {
		t.Fatalf("raw packets: %v (the test runs as root)", err)
	}
	lo, err := net.InterfaceByName("lo")
	if err != nil {
		t.Fatal(err)
	}
	if err := syscall.Bind(fd, &syscall.SockaddrLinklayer{Protocol: all, Ifindex: lo.Index}); err != nil {
		t.Fatal(err)
	}
	syscall.SetsockoptInt(fd, syscall.SOL_SOCKET, syscall.SO_RCVBUFFORCE, 64<<20)
	syscall.SetsockoptTimeval(fd, syscall.SOL_SOCKET, syscall.SO_RCVTIMEO, &syscall.Timeval{Usec: 100_000})
	s := &sniffer{fd: fd, want: want, seen: map[string]string{}}
	s.wg.Go(s.run)
	return s
}

func (s *sniffer) run() {
	buf := make([]byte, 1<<17)
	for !s.stop.Load() {
		n, _, err := syscall.Recvfrom(s.fd, buf, 0)
		if err != nil || n < 28 || buf[0]>>4 != 4 || buf[9] != 17 {
			continue
		}
		head := int(buf[0]&15) * 4
		payload := buf[min(head+8, n):n]
		s.packets.Add(1)
		s.bytes.Add(int64(len(payload)))
		low := bytes.ToLower(payload)
		s.mu.Lock()
		for name, w := range s.want {
			if bytes.Contains(low, w) {
				s.seen[name] = fmt.Sprintf("port %d to %d", binary.BigEndian.Uint16(buf[head:]), binary.BigEndian.Uint16(buf[head+2:]))
			}
		}
		s.mu.Unlock()
	}
	syscall.Close(s.fd)
}

// end returns what was seen of the unwanted.
func (s *sniffer) end() map[string]string {
	s.stop.Store(true)
	s.wg.Wait()
	return s.seen
}

func TestNothingSecretIsOnTheWireOrInTheLogs(t *testing.T) {
	t.Parallel()
	m := Up(t, three...)
	canary := "zz" + NewID()
	secret := map[string][]byte{
		"subject": []byte(canary + "subject"), "body": []byte(canary + "body"), "password of a new user": []byte(canary + "password"),
		"sender": []byte(canary + "sender"), "recipient": []byte(canary + "rcpt"), "admin's password": []byte(m.State().Admin.Password),
	}
	for _, u := range m.State().Users {
		secret["password of "+u.Address] = []byte(u.Password)
		secret["address "+u.Address] = []byte(u.Address)
	}
	wire := map[string][]byte{"control": []byte(canary + "control")}
	for k, v := range secret {
		wire[k] = v
	}
	s := sniff(t, wire)
	c, err := net.Dial("udp", m.Node("hq").Address+":44337")
	if err != nil {
		t.Fatal(err)
	}
	fmt.Fprintf(c, "this must be seen: %scontrol", canary)
	c.Close()

	password, name, home := canary+"password", "Canary", "praha"
	if _, err := m.API("plzen").CreateUser(t.Context(), admin.UserChange{Address: canary + "rcpt@company.test", Name: &name, Home: &home, Password: &password}); err != nil {
		t.Fatal(err)
	}
	token, err := m.API("plzen").CreateToken(t.Context(), admin.TokenRequest{})
	if err != nil {
		t.Fatal(err)
	}
	m.Spare("brno", 21)
	m.join("brno", admin.JoinRequest{Target: token.Secret, At: m.Node("plzen").Address + ":44337"})
	m.serves("brno", 4, 15*time.Second)
	send := func(x *Sender, err error, to string) {
		t.Helper()
		if err == nil {
			defer x.Close()
			err = x.sendText("Subject: "+canary+"subject\r\nFrom: <"+x.from+">\r\nTo: <"+to+">\r\n\r\n"+canary+"body\r\n", to)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	rcpt := canary + "rcpt@company.test"
	for _, o := range three {
		x, err := m.FromOutside(canary+"sender@example.net", o)
		send(x, err, rcpt)
		x, err = m.Submit(m.User(o, 0), o)
		send(x, err, rcpt)
		x, err = m.Submit(m.User(o, 1), o)
		send(x, err, canary+"rcpt@example.net")
	}
	u := m.User("praha", 0)
	u.Address, u.Password = rcpt, password
	m.WaitFor("all is there", 15*time.Second, func() bool {
		there, err := m.Inbox(u)
		return err == nil && len(there) == 6
	})
	m.Kill("hq") // an election, too
	m.Start("hq")
	m.agree(60*time.Second, three...)
	seen := s.end()
	t.Logf("%d UDP packets, %d bytes", s.packets.Load(), s.bytes.Load())
	if seen["control"] == "" {
		t.Error("the sniffer sees nothing: the test proves nothing")
	}
	delete(seen, "control")
	if len(seen) > 0 {
		t.Errorf("seen on the wire: %v", seen)
	}
	logs, _ := filepath.Glob(filepath.Join(m.Dir, "*.log"))
	if len(logs) < 5 {
		t.Errorf("only %v", logs)
	}
	for _, file := range logs {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		low := bytes.ToLower(text)
		for what, w := range secret {
			if what != "sender" && what != "recipient" && !strings.HasPrefix(what, "address") && bytes.Contains(low, w) {
				t.Errorf("%s stands in %s", what, filepath.Base(file))
			}
		}
		if bytes.Contains(text, []byte(token.Secret)) {
			t.Errorf("the join token stands in %s", filepath.Base(file))
		}
	}
}

// sendText sends one message as it stands.
func (s *Sender) sendText(text, to string) error {
	if err := s.c.Mail(s.from); err != nil {
		return err
	}
	if err := s.c.Rcpt(to); err != nil {
		return err
	}
	w, err := s.c.Data()
	if err != nil {
		return err
	}
	if _, err := w.Write([]byte(text)); err != nil {
		return err
	}
	return w.Close()
}

// sockets returns a process's listening TCP and unconnected UDP sockets.
func sockets(t *testing.T, pid int) (tcp, udp, unix []string) {
	t.Helper()
	mine := map[string]bool{}
	fds, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil {
		t.Fatal(err)
	}
	for _, fd := range fds {
		at, _ := os.Readlink(fmt.Sprintf("/proc/%d/fd/%s", pid, fd.Name()))
		if ino, ok := strings.CutPrefix(at, "socket:["); ok {
			mine[strings.TrimSuffix(ino, "]")] = true
		}
	}
	read := func(name string, inode int, f func([]string)) {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/net/%s", pid, name))
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(text)) {
			if x := strings.Fields(line); len(x) > inode && mine[x[inode]] {
				f(x)
			}
		}
	}
	for _, v := range []string{"", "6"} {
		read("tcp"+v, 9, func(x []string) {
			if x[3] == "0A" {
				tcp = append(tcp, socketAddr(x[1]))
			}
		})
		read("udp"+v, 9, func(x []string) {
			if strings.HasSuffix(x[2], ":0000") {
				udp = append(udp, socketAddr(x[1]))
			}
		})
	}
	read("unix", 6, func(x []string) {
		if x[3] == "00010000" && len(x) > 7 { // accepts connections
			unix = append(unix, x[7])
		}
	})
	slices.Sort(tcp)
	return tcp, udp, unix
}

// socketAddr reads the kernel's little-endian hexadecimal address.
func socketAddr(s string) string {
	host, port, _ := strings.Cut(s, ":")
	b, _ := hex.DecodeString(host)
	p, _ := strconv.ParseUint(port, 16, 16)
	if len(b) == 4 {
		slices.Reverse(b)
	}
	a, _ := netip.AddrFromSlice(b)
	return netip.AddrPortFrom(a, uint16(p)).String()
}

func TestANodeHasOneUDPPortAndTheDocumentedDoors(t *testing.T) {
	t.Parallel()
	m := Up(t, three...)
	tr := m.NewTraffic()
	ctx, cancel := context.WithCancel(t.Context())
	var load sync.WaitGroup
	load.Go(func() { tr.Run(ctx, m.person("hq", 0, []string{"hq"}, m.everybody()...), 1<<30) })
	for range 5 {
		for _, o := range three {
			n := m.Node(o)
			tcp, udp, unix := sockets(t, n.Pid)
			var want []string
			for _, p := range []int{n.Ports.SMTP, n.Ports.Submission, n.Ports.Submissions, n.Ports.IMAP, n.Ports.IMAPS, n.Ports.HTTPS} {
				want = append(want, fmt.Sprintf("%s:%d", n.Address, p))
			}
			slices.Sort(want)
			if !slices.Equal(tcp, want) {
				t.Errorf("%s listens at %v, documented are %v", o, tcp, want)
			}
			if mesh := fmt.Sprintf("%s:%d", n.Address, n.Ports.Mesh); !slices.Equal(udp, []string{mesh}) {
				t.Errorf("%s has the UDP sockets %v, documented is %s", o, udp, mesh)
			}
			if !slices.Equal(unix, []string{n.Socket}) {
				t.Errorf("%s listens at %v, documented is %s", o, unix, n.Socket)
			}
		}
		<-time.After(100 * time.Millisecond)
	}
	cancel()
	load.Wait()
	tr.Settle(15*time.Second, 0)
}
