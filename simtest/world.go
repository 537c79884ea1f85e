// Package simtest runs whole nodes, the same that ship, in virtual time over a
// simulated network, and checks from outside what must hold. It also holds the
// tests of the house itself: who may import whom.
//
// A World lives inside one testing/synctest bubble. Its nodes have a simulated
// UDP socket each, simulated TCP, a disk in memory that loses what was not
// synced, and a DNS that knows the world's names.
package simtest

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/quic-go/quic-go/testutils/simnet"

	"posthouse/appliance"
	"posthouse/appliance/admin"
	"posthouse/appliance/config"
	"posthouse/mailstore/kv"
	"posthouse/mailstore/log/simfs"
	"posthouse/mesh/election"
	"posthouse/simtest/bufpipe"
)

// Domain is the mail domain of every World.
const Domain = "company.test"

// World is a few offices on a simulated network. Make it inside a bubble.
type World struct {
	tb      testing.TB
	Latency time.Duration // one way, between any two nodes
	Offices []*Office

	mu  sync.Mutex
	cut map[[2]netip.Addr]bool // from, to
	simnet.PerfectRouter
	tcp map[string]*bufpipe.Listener // by "address:port" or socket path
}

// Office is one node with everything that outlives its process.
type Office struct {
	w    *World
	Name string
	Addr netip.Addr
	cfg  *config.Config

	disk   *simfs.FS
	view   *kv.Memory
	votes  *election.MemStorage
	seed   uint64
	line   *simnet.Simnet
	socket *simnet.SimConn
	node   *appliance.Node
	cancel context.CancelFunc
	done   chan error
}

// NewWorld makes offices that are not started; the first is to found the mesh.
func NewWorld(tb testing.TB, offices ...string) *World {
	w := &World{tb: tb, Latency: 10 * time.Millisecond, cut: map[[2]netip.Addr]bool{}, tcp: map[string]*bufpipe.Listener{}}
	for i, name := range offices {
		addr := netip.AddrFrom4([4]byte{10, 0, byte(i + 1), 1})
		at := func(port int) string { return netip.AddrPortFrom(addr, uint16(port)).String() }
		dir := filepath.Join(tb.TempDir(), name)
		cfg, problems := config.Parse(fmt.Sprintf("name=%q\nhost=%q\ndata=%q\ncontrol_socket=%q\ntake_back=\"10s\"\nadvertise=[%q]\n[listen]\nsmtp=%q\nsubmission=%q\nsubmissions=\"off\"\nimap=%q\nimaps=\"off\"\nhttps=\"off\"\nmesh=%q\n",
			name, name+"."+Domain, dir, "/"+name+".sock", at(44337), at(25), at(587), at(143), at(44337)))
		if len(problems) > 0 {
			tb.Fatal(problems)
		}
		w.Offices = append(w.Offices, &Office{w: w, Name: name, Addr: addr, cfg: cfg, disk: simfs.New(), view: &kv.Memory{}, votes: election.NewMemStorage()})
	}
	return w
}

// Office returns an office by name.
func (w *World) Office(name string) *Office {
	w.tb.Helper()
	for _, o := range w.Offices {
		if o.Name == name {
			return o
		}
	}
	w.tb.Fatalf("no office %s", name)
	return nil
}

// SendPacket implements simnet.Router: cut lines lose everything.
func (w *World) SendPacket(p simnet.Packet) error {
	from, to := udpAddr(p.From), udpAddr(p.To)
	w.mu.Lock()
	cut := w.cut[[2]netip.Addr{from, to}]
	w.mu.Unlock()
	if cut {
		return nil
	}
	w.PerfectRouter.SendPacket(p) // nobody there: lost, as on a real network
	return nil
}

func udpAddr(a net.Addr) netip.Addr { return a.(*net.UDPAddr).AddrPort().Addr().Unmap() }

// Cut cuts the lines between each office of a and each of b, both ways.
func (w *World) Cut(a, b []string) { w.setCut(a, b, true) }

// Heal mends them.
func (w *World) Heal(a, b []string) { w.setCut(a, b, false) }

func (w *World) setCut(a, b []string, cut bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, x := range a {
		for _, y := range b {
			p, q := w.Office(x).Addr, w.Office(y).Addr
			w.cut[[2]netip.Addr{p, q}], w.cut[[2]netip.Addr{q, p}] = cut, cut
		}
	}
}

// Start starts an office's node; it returns at once.
func (o *Office) Start() {
	o.w.tb.Helper()
	o.line = &simnet.Simnet{Router: o.w}
	o.socket = o.line.NewEndpoint(&net.UDPAddr{IP: o.Addr.AsSlice(), Port: 44337}, simnet.NodeBiDiLinkSettings{Latency: o.w.Latency})
	o.line.Start()
	env := appliance.Environment{
		Packet: func(string) (net.PacketConn, error) { return o.socket, nil },
		Listen: func(_ context.Context, _, address string) (net.Listener, error) { return o.w.listen(address) },
		Dial: func(_ context.Context, _, address string) (net.Conn, error) {
			return o.w.dial(netip.AddrPortFrom(o.Addr, 40000), address)
		},
		Resolver: names{o.w}, Disk: o.disk, View: kv.Options{Memory: true, Kept: o.view}, Files: appliance.DiskFiles(), Random: rand.Reader,
		Election: func(string) (election.Storage, error) { return o.votes, nil },
		Logger:   slog.New(slog.DiscardHandler),
	}
	node, err := appliance.New(o.cfg, env, "sim")
	if err != nil {
		o.w.tb.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	o.node, o.cancel, o.done = node, cancel, make(chan error, 1)
	go func() { o.done <- node.Run(ctx) }()
}

// Stop ends the node as SIGTERM does.
func (o *Office) Stop() {
	o.w.tb.Helper()
	if o.node == nil {
		return
	}
	o.cancel()
	if err := <-o.done; err != nil {
		o.w.tb.Errorf("%s ended with: %v", o.Name, err)
	}
	o.unplug()
}

// Kill ends the node as a power cut does: its packets stop, its disk answers
// nothing any more, and what was not synced is lost.
func (o *Office) Kill() {
	if o.node == nil {
		return
	}
	o.disk.Crash()
	o.socket.Close()
	o.cancel()
	<-o.done // whatever it says: it is dead
	o.unplug()
	o.seed++
	o.disk = o.disk.After(simfs.Random, o.seed)
}

func (o *Office) unplug() {
	o.socket.Close()
	o.line.Close()
	o.node = nil
}

// Ops are the operations of a running node.
func (o *Office) Ops() admin.Operations { return o.node }

// Ctx is a context in which an admin acts.
func Ctx() context.Context {
	return admin.WithActor(context.Background(), admin.Actor{Name: "local", Admin: true})
}

// Status asks a running node.
func (o *Office) Status() admin.Status {
	o.w.tb.Helper()
	s, err := o.node.Status(Ctx())
	if err != nil {
		o.w.tb.Fatal(err)
	}
	return s
}

// Until waits, in virtual time, until f is true; it fails the test after limit
// and returns how long it took.
func (w *World) Until(what string, limit time.Duration, f func() bool) time.Duration {
	w.tb.Helper()
	began := time.Now()
	for !f() {
		if time.Since(began) > limit {
			for _, o := range w.Offices {
				if o.node != nil {
					s := o.Status()
					w.tb.Logf("%s: %s, master %q, term %d, %s, joining %v", o.Name, s.State, s.Master, s.Term, s.Health.Sentence, s.JoinProgress)
				}
			}
			w.tb.Fatalf("%s: not within %v", what, limit)
		}
		time.Sleep(50 * time.Millisecond)
	}
	return time.Since(began)
}

// Found starts all offices, founds the mesh at the first, and lets the others
// join. Each office gets one user, named as the office.
func (w *World) Found() {
	w.tb.Helper()
	for _, o := range w.Offices {
		o.Start()
	}
	w.Until("all nodes have started", time.Minute, func() bool {
		for _, o := range w.Offices {
			if o.Status().Health.Sentence == "" || o.node == nil || o.Status().State == "" || len(o.Status().Conditions) == 0 {
				return false
			}
		}
		return true
	})
	first := w.Offices[0]
	if _, err := first.Ops().Init(Ctx(), admin.InitRequest{Domain: Domain, AdminName: "admin", AdminPassword: "secret"}); err != nil {
		w.tb.Fatal(err)
	}
	token, err := first.Ops().CreateToken(Ctx(), admin.TokenRequest{Reusable: true})
	if err != nil {
		w.tb.Fatal(err)
	}
	for _, o := range w.Offices[1:] {
		if err := o.Ops().Join(Ctx(), admin.JoinRequest{Target: token.Secret, At: netip.AddrPortFrom(first.Addr, 44337).String()}); err != nil {
			w.tb.Fatal(err)
		}
	}
	w.Until("all nodes serve", time.Minute, w.whole)
	for _, o := range w.Offices {
		password := "secret"
		if _, err := first.Ops().CreateUser(Ctx(), admin.UserChange{Address: o.Name + "@" + Domain, Home: &o.Name, Password: &password}); err != nil {
			w.tb.Fatal(err)
		}
	}
	w.Until("all copies of the domain state are equal", 10*time.Second, w.Equal)
}

// Equal reports whether all running nodes have the same domain state.
func (w *World) Equal() bool {
	hash := ""
	for _, o := range w.Offices {
		if o.node == nil {
			continue
		}
		s := o.Status()
		if hash != "" && s.StateHash != hash {
			return false
		}
		hash = s.StateHash
	}
	return true
}

// whole reports whether all running nodes serve, see each other, agree about
// the master, and as many vote as should.
func (w *World) whole() bool {
	master := ""
	for _, o := range w.Offices {
		if o.node == nil {
			return false
		}
		s := o.Status()
		if s.State != "serving" || s.Master == "" || len(s.Members) != len(w.Offices) || master != "" && s.Master != master {
			return false
		}
		master = s.Master
		votes := 0
		for _, m := range s.Members {
			if m.State != "serving" {
				return false
			}
			if m.Role != "member" {
				votes++
			}
		}
		if want := map[bool]int{len(w.Offices) < 3: 1, len(w.Offices) == 3 || len(w.Offices) == 4: 3, len(w.Offices) > 4: 5}[true]; votes != want {
			return false
		}
	}
	return true
}

// Close ends all nodes and lets what they leave behind run out.
func (w *World) Close() {
	for _, o := range w.Offices {
		o.Stop()
	}
	time.Sleep(2 * time.Minute)
}

// Send submits one message at an office's port 25 from outside, and returns
// what the node answered to the text.
func (w *World) Send(office, from, to, subject string) error {
	c, err := w.dial(netip.MustParseAddrPort("192.0.2.1:40000"), netip.AddrPortFrom(w.Office(office).Addr, 25).String())
	if err != nil {
		return err
	}
	defer c.Close()
	return converse(c, from, to, "Subject: "+subject+"\r\n\r\nThe body of "+subject+".\r\n")
}

// listener is a TCP port of the simulated network, or a control socket.
type listener struct {
	*bufpipe.Listener
	closed func()
}

func (l *listener) Close() error {
	l.closed()
	return l.Listener.Close()
}

func (w *World) listen(address string) (net.Listener, error) {
	var addr net.Addr = &net.UnixAddr{Name: address, Net: "unix"}
	if a, err := netip.ParseAddrPort(address); err == nil {
		addr = net.TCPAddrFromAddrPort(a)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.tcp[address] != nil {
		return nil, fmt.Errorf("listen %s: address in use", address)
	}
	l := bufpipe.Listen(addr)
	w.tcp[address] = l
	return &listener{l, sync.OnceFunc(func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		delete(w.tcp, address)
	})}, nil
}

var errRefused = errors.New("connection refused")

// dial connects to a port that somebody listens on. A line that is cut does not
// cut TCP: mail between nodes goes by UDP, and clients sit in their office.
func (w *World) dial(from netip.AddrPort, address string) (net.Conn, error) {
	w.mu.Lock()
	l := w.tcp[address]
	w.mu.Unlock()
	if l == nil {
		return nil, errRefused
	}
	return l.Dial(net.TCPAddrFromAddrPort(from))
}

// names is the world's DNS: the offices' hosts, and nothing else.
type names struct{ w *World }

func (n names) notFound(name string) error {
	return &net.DNSError{Err: "no such host", Name: name, IsNotFound: true}
}

func (n names) LookupMX(_ context.Context, name string) ([]*net.MX, error) {
	return nil, n.notFound(name)
}

func (n names) LookupSRV(_ context.Context, _, _, name string) (string, []*net.SRV, error) {
	return "", nil, n.notFound(name)
}

func (n names) LookupAddr(_ context.Context, addr string) ([]string, error) {
	return nil, n.notFound(addr)
}

func (n names) LookupHost(ctx context.Context, host string) ([]string, error) {
	addrs, err := n.LookupNetIP(ctx, "ip", host)
	if err != nil {
		return nil, err
	}
	return []string{addrs[0].String()}, nil
}

func (n names) LookupNetIP(_ context.Context, _, host string) ([]netip.Addr, error) {
	for _, o := range n.w.Offices {
		if o.cfg.Host == host {
			return []netip.Addr{o.Addr}, nil
		}
	}
	return nil, n.notFound(host)
}
