// Package demo runs a whole mesh on one machine: a process for each office on
// an address of its own, people with passwords, and a small outside world. It
// uses only what a person could use: the program itself, its configuration
// file, and the operations of its API.
package demo

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"posthouse/appliance/admin"
	"posthouse/appliance/api"
	"posthouse/appliance/demo/outside"
)

// Options configure a demo.
type Options struct {
	Dir     string   // made when absent, else empty or an earlier demo
	Offices []string // the first founds the mesh
	Domain  string
	Users   int    // people an office
	Net     string // "127.0.k.0/24"; "" finds a free one
	Exe     string // this program
	Out     io.Writer
}

// outsideDomain is the domain of the outside world.
const outsideDomain = "example.net"

// meshLimit bounds how long the mesh may take to be ready.
const meshLimit = 60 * time.Second

// Up starts a demo, or restarts one with its data, and returns when the mesh is
// ready. What it started goes on after it returns; Down ends it.
func Up(ctx context.Context, o Options) (*State, error) {
	if err := os.MkdirAll(o.Dir, 0o755); err != nil {
		return nil, fmt.Errorf("make demo folder: %w", err)
	}
	dir, err := filepath.Abs(o.Dir)
	if err != nil {
		return nil, fmt.Errorf("find demo folder: %w", err)
	}
	o.Dir = dir
	unlock, err := lock(o.Dir)
	if err != nil {
		return nil, err
	}
	defer unlock()
	s, err := Load(o.Dir)
	fresh := err != nil
	if fresh {
		if s, err = prepare(o); err != nil {
			return nil, err
		}
	}
	if err := startAll(ctx, o, s, fresh); err != nil {
		if fresh {
			for i := range s.Nodes {
				stop(s.Nodes[i].Pid, s.Nodes[i].Config)
			}
			stop(s.Outside.Pid, s.Outside.Config)
		}
		return nil, err
	}
	return s, nil
}

// prepare chooses addresses and writes every file of a new demo.
func prepare(o Options) (*State, error) {
	entries, err := os.ReadDir(o.Dir)
	if err != nil {
		return nil, fmt.Errorf("read demo folder: %w", err)
	}
	entries = slices.DeleteFunc(entries, func(e os.DirEntry) bool { return e.Name() == "demo.lock" })
	if len(entries) > 0 {
		return nil, fmt.Errorf("%s is neither empty nor a demo; name another folder with --dir", o.Dir)
	}
	if len(o.Offices) == 0 || len(o.Offices) > 80 {
		return nil, errors.New("a demo has 1 to 80 offices")
	}
	network, err := chooseNet(o.Net, len(o.Offices))
	if err != nil {
		return nil, err
	}
	at := func(i int) netip.Addr {
		b := network.Addr().As4()
		b[3] = byte(i)
		return netip.AddrFrom4(b)
	}
	s := &State{Domain: o.Domain, Net: network.String(), CAFile: filepath.Join(o.Dir, "ca.pem")}
	out := at(100).String()
	s.Outside = Outside{Name: "outside", SMTP: net.JoinHostPort(out, "2525"), DNS: net.JoinHostPort(out, "2553"), Domain: outsideDomain,
		Folder: filepath.Join(o.Dir, "outside"), Config: filepath.Join(o.Dir, "outside.json"), Log: filepath.Join(o.Dir, "outside.log")}
	records := []string{
		fmt.Sprintf("%s. 60 IN MX 10 mail.%s.", outsideDomain, outsideDomain), fmt.Sprintf("mail.%s. 60 IN A %s", outsideDomain, out)}
	for i, name := range o.Offices {
		addr := at(11 + i)
		host := name + "." + o.Domain
		n := Node{Name: name, Address: addr.String(), Ports: demoPorts, Data: filepath.Join(o.Dir, name),
			Log: filepath.Join(o.Dir, name+".log"), Socket: filepath.Join(o.Dir, name+".sock"), Config: filepath.Join(o.Dir, name+".toml")}
		if len(n.Socket) > 107 {
			return nil, fmt.Errorf("%s is too long a path for a control socket; name a shorter folder with --dir", n.Socket)
		}
		ptr, err := outside.PTR(addr, host)
		if err != nil {
			return nil, err
		}
		records = append(records, ptr, fmt.Sprintf("%s. 60 IN A %s", host, addr), fmt.Sprintf("%s. 60 IN MX %d %s.", o.Domain, 10*(i+1), host),
			fmt.Sprintf("_posthouse._udp.%s. 60 IN SRV %d 0 %d %s.", o.Domain, i, demoPorts.Mesh, host))
		if err := os.WriteFile(n.Config, []byte(nodeConfig(n, host, s.Outside.DNS, addr)), 0o600); err != nil {
			return nil, fmt.Errorf("write configuration of %s: %w", name, err)
		}
		s.Nodes = append(s.Nodes, n)
	}
	cfg, err := json.MarshalIndent(outside.Config{SMTP: s.Outside.SMTP, DNS: s.Outside.DNS, Host: "mail." + outsideDomain, Folder: s.Outside.Folder, Records: records}, "", "  ")
	if err != nil {
		return nil, fmt.Errorf("write outside world: %w", err)
	}
	if err := os.WriteFile(s.Outside.Config, cfg, 0o600); err != nil {
		return nil, fmt.Errorf("write outside world: %w", err)
	}
	return s, nil
}

func nodeConfig(n Node, host, resolver string, addr netip.Addr) string {
	at := func(port int) string { return netip.AddrPortFrom(addr, uint16(port)).String() }
	return fmt.Sprintf(`# An office of the demo. A real node needs name and host, seldom more.
name = %q
host = %q
data = %q
control_socket = %q
resolver = %q
smtp_out_port = %d
take_back = "10s"
advertise = [%q]

[listen]
smtp = %q
submission = %q
submissions = %q
imap = %q
imaps = %q
https = %q
mesh = %q
`, n.Name, host, n.Data, n.Socket, resolver, n.Ports.SMTP, at(n.Ports.Mesh),
		at(n.Ports.SMTP), at(n.Ports.Submission), at(n.Ports.Submissions), at(n.Ports.IMAP), at(n.Ports.IMAPS), at(n.Ports.HTTPS), at(n.Ports.Mesh))
}

// chooseNet returns the network asked for, or the first 127.0.k.0/24 in which
// the demo's ports are free.
func chooseNet(want string, offices int) (netip.Prefix, error) {
	if want != "" {
		p, err := netip.ParsePrefix(want)
		if err != nil || !p.Addr().Is4() || !p.Addr().IsLoopback() || p.Bits() != 24 {
			return p, fmt.Errorf("--net %q: want a loopback network such as 127.0.5.0/24", want)
		}
		return p.Masked(), nil
	}
	for k := 1; k < 255; k++ {
		p := netip.PrefixFrom(netip.AddrFrom4([4]byte{127, 0, byte(k), 0}), 24)
		if free(p, offices) {
			return p, nil
		}
	}
	return netip.Prefix{}, errors.New("no 127.0.k.0/24 is free on this machine; end an earlier demo, or name one with --net")
}

func free(p netip.Prefix, offices int) bool {
	for _, last := range []byte{11, byte(10 + offices), 100} {
		b := p.Addr().As4()
		b[3] = last
		addr := netip.AddrPortFrom(netip.AddrFrom4(b), uint16(demoPorts.SMTP))
		l, err := net.Listen("tcp", addr.String())
		if err != nil {
			return false
		}
		l.Close()
		u, err := net.ListenPacket("udp", netip.AddrPortFrom(addr.Addr(), uint16(demoPorts.Mesh)).String())
		if err != nil {
			return false
		}
		u.Close()
	}
	return true
}

// startAll starts what does not run; a fresh mesh is founded and filled.
func startAll(ctx context.Context, o Options, s *State, fresh bool) error {
	if !alive(s.Outside.Pid, s.Outside.Config) {
		pid, err := spawn(o.Exe, s.Outside.Log, "demo", "outside", s.Outside.Config)
		if err != nil {
			return err
		}
		s.Outside.Pid = pid
	}
	for i := range s.Nodes {
		if err := launch(o.Exe, &s.Nodes[i]); err != nil {
			return err
		}
	}
	if err := s.save(o.Dir); err != nil {
		return err
	}
	for i := range s.Nodes {
		if err := waitReady(ctx, &s.Nodes[i]); err != nil {
			return err
		}
	}
	ctx, cancel := context.WithTimeoutCause(ctx, meshLimit, fmt.Errorf("the mesh was not ready within %v", meshLimit))
	defer cancel()
	if fresh {
		if err := found(ctx, o, s); err != nil {
			return err
		}
		if err := s.save(o.Dir); err != nil {
			return err
		}
	}
	return waitMesh(ctx, s)
}

// launch starts a node that does not run.
func launch(exe string, n *Node) error {
	if alive(n.Pid, n.Config) {
		return nil
	}
	pid, err := spawn(exe, n.Log, "serve", "--config", n.Config)
	if err != nil {
		return err
	}
	n.Pid = pid
	return nil
}

// found founds the mesh at the first office, lets the others join by token, and
// makes the people.
func found(ctx context.Context, o Options, s *State) error {
	s.Admin = Admin{Name: "admin@" + s.Domain, Password: password()}
	first := api.Local(s.Nodes[0].Socket)
	got, err := first.Init(ctx, admin.InitRequest{Domain: s.Domain, AdminName: "admin", AdminPassword: s.Admin.Password, Networks: []string{s.Net}})
	if err != nil {
		return fmt.Errorf("found the mesh: %w", err)
	}
	if err := os.WriteFile(s.CAFile, []byte(got.CA), 0o644); err != nil {
		return fmt.Errorf("write authority: %w", err)
	}
	token, err := first.CreateToken(ctx, admin.TokenRequest{Reusable: true, Hours: 1})
	if err != nil {
		return fmt.Errorf("make join token: %w", err)
	}
	at := fmt.Sprintf("%s:%d", s.Nodes[0].Address, s.Nodes[0].Ports.Mesh)
	for _, n := range s.Nodes[1:] {
		if err := api.Local(n.Socket).Join(ctx, admin.JoinRequest{Target: token.Secret, At: at}); err != nil {
			return fmt.Errorf("%s joins: %w", n.Name, err)
		}
	}
	if err := waitMesh(ctx, s); err != nil {
		return err
	}
	yes := true
	for i, n := range s.Nodes {
		priority := 100 - i
		if err := first.ChangeNode(ctx, admin.NodeChange{Name: n.Name, Gateway: &yes, Priority: &priority}); err != nil {
			return fmt.Errorf("make %s a gateway: %w", n.Name, err)
		}
	}
	return people(ctx, o, s, first)
}

// firstNames are the people of the demo; more than these are numbered.
var firstNames = []string{"anna", "boris", "clara", "david", "eva", "filip", "gita", "hugo", "ida", "jan", "karla", "lukas"}

func people(ctx context.Context, o Options, s *State, ops admin.Operations) error {
	var group []string
	for i, n := range s.Nodes {
		for j := range o.Users {
			k := i*o.Users + j
			local := fmt.Sprintf("user%d", k+1)
			if k < len(firstNames) {
				local = firstNames[k]
			}
			u := User{Address: local + "@" + s.Domain, Password: password(), Home: n.Name}
			name := strings.ToUpper(local[:1]) + local[1:] + " of " + n.Name
			if _, err := ops.CreateUser(ctx, admin.UserChange{Address: u.Address, Name: &name, Home: &u.Home, Password: &u.Password}); err != nil {
				return fmt.Errorf("make %s: %w", u.Address, err)
			}
			s.Users = append(s.Users, u)
			if j == 0 {
				group = append(group, u.Address)
			}
		}
	}
	s.Group, s.Alias = "everyone@"+s.Domain, "info@"+s.Domain
	if len(group) == 0 {
		return nil
	}
	if _, err := ops.PutGroup(ctx, admin.Group{Address: s.Group, Name: "One of each office", Members: group, Outside: true}); err != nil {
		return fmt.Errorf("make group: %w", err)
	}
	if _, err := ops.CreateAlias(ctx, admin.Alias{Address: s.Alias, Target: group[0]}); err != nil {
		return fmt.Errorf("make alias: %w", err)
	}
	return nil
}

// waitMesh waits until every node serves and all name the same master and term.
func waitMesh(ctx context.Context, s *State) error {
	for {
		why := disagreement(ctx, s)
		if why == "" {
			return nil
		}
		select {
		case <-time.After(5 * step):
		case <-ctx.Done():
			return fmt.Errorf("%w: %s", context.Cause(ctx), why)
		}
	}
}

func disagreement(ctx context.Context, s *State) string {
	var first admin.Status
	for i, n := range s.Nodes {
		st, err := api.Local(n.Socket).Status(ctx)
		switch {
		case err != nil:
			return fmt.Sprintf("%s: %v", n.Name, err)
		case st.State != "serving":
			return n.Name + " is " + st.State + ": " + strings.Join(st.JoinProgress, "; ")
		case st.Master == "":
			return n.Name + " knows no master"
		case len(st.Members) < len(s.Nodes):
			return fmt.Sprintf("%s knows %d of %d nodes", n.Name, len(st.Members), len(s.Nodes))
		}
		votes := 0
		for _, m := range st.Members {
			if m.State != "serving" {
				return fmt.Sprintf("%s sees %s as %s", n.Name, m.Name, m.State)
			}
			if m.Role != "member" {
				votes++
			}
		}
		if votes < voters(len(s.Nodes)) {
			return fmt.Sprintf("%s sees %d nodes that vote", n.Name, votes)
		}
		if i == 0 {
			first = st
		} else if st.Master != first.Master || st.Term != first.Term {
			return fmt.Sprintf("%s and %s disagree about the master", s.Nodes[0].Name, n.Name)
		}
		if err := certified(ctx, s, &n); err != nil {
			return fmt.Sprintf("%s has no certificate for mail clients yet: %v", n.Name, err)
		}
	}
	return ""
}

// certified reports whether an office shows mail clients what they trust.
func certified(ctx context.Context, s *State, n *Node) error {
	roots, err := s.roots()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	d := tls.Dialer{Config: &tls.Config{RootCAs: roots, ServerName: n.Address}}
	c, err := d.DialContext(ctx, "tcp", net.JoinHostPort(n.Address, strconv.Itoa(n.Ports.IMAPS)))
	if err != nil {
		return err
	}
	return c.Close()
}

// roots are the authorities that clients of the demo trust.
func (s *State) roots() (*x509.CertPool, error) {
	pem, err := os.ReadFile(s.CAFile)
	if err != nil {
		return nil, fmt.Errorf("read authority: %w", err)
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(pem)
	return pool, nil
}

// voters is how many nodes vote in a mesh of that size.
func voters(nodes int) int {
	switch {
	case nodes < 3:
		return 1
	case nodes < 5:
		return 3
	}
	return 5
}

// password returns 10 letters and digits that are easy to type.
func password() string {
	return strings.ToLower(rand.Text()[:10])
}

// Down ends all processes of a demo and waits until they are gone.
func Down(dir string) error {
	return change(dir, func(s *State) error {
		done := make(chan struct{}, len(s.Nodes))
		for i := range s.Nodes {
			go func() { stop(s.Nodes[i].Pid, s.Nodes[i].Config); done <- struct{}{} }()
		}
		for range s.Nodes {
			<-done
		}
		stop(s.Outside.Pid, s.Outside.Config)
		for i := range s.Nodes {
			s.Nodes[i].Pid = 0
		}
		s.Outside.Pid = 0
		return nil
	})
}

// Kill ends an office as a power cut would: SIGKILL. Nothing restarts it.
func Kill(dir, office string) error {
	return change(dir, func(s *State) error {
		n, err := s.node(office)
		if err != nil {
			return err
		}
		if !alive(n.Pid, n.Config) {
			return fmt.Errorf("%s does not run", office)
		}
		if !signal(n.Pid, n.Config, syscall.SIGKILL, stopLimit) {
			return fmt.Errorf("%s (pid %d) does not die", office, n.Pid)
		}
		n.Pid = 0
		return nil
	})
}

// Start starts an office and returns when its ports and /readyz answer.
func Start(ctx context.Context, dir, exe, office string) error {
	return change(dir, func(s *State) error {
		n, err := s.node(office)
		if err != nil {
			return err
		}
		if err := launch(exe, n); err != nil {
			return err
		}
		if err := s.save(dir); err != nil {
			return err
		}
		return waitReady(ctx, n)
	})
}

// change loads the state, lets f act on it, and saves it.
func change(dir string, f func(*State) error) error {
	if _, err := Load(dir); err != nil {
		return err
	}
	unlock, err := lock(dir)
	if err != nil {
		return err
	}
	defer unlock()
	s, err := Load(dir)
	if err != nil {
		return err
	}
	if err := f(s); err != nil {
		return err
	}
	return s.save(dir)
}
