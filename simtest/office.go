package simtest

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/quic-go/quic-go/testutils/simnet"

	"posthouse/appliance"
	"posthouse/appliance/admin"
	"posthouse/appliance/config"
	"posthouse/mailstore/kv"
	"posthouse/mailstore/log/simfs"
	"posthouse/mesh/election"
	"posthouse/simtest/record"
)

// Office is one node with everything that outlives its process.
type Office struct {
	w    *World
	Name string
	Addr netip.Addr
	cfg  *config.Config

	// What is on its machine. Only the driver of the scenario touches these,
	// and only while no process runs.
	drive atomic.Pointer[simfs.FS] // a power cut puts another in its place
	view  *kv.Memory
	votes *election.MemStorage
	// votesOnDisk has the election keep its files as real nodes do.
	votesOnDisk bool
	seed        uint64
	logs        *ring

	failSync atomic.Int32 // the next sync fails: 1 what it was to write is lost, 2 it is there
	crashAt  atomic.Int64 // operations until the disk stops; 0: never
	crash    func()       // what follows then
	stopped  atomic.Bool  // the disk has stopped by itself
	syncTime atomic.Int64 // a time.Duration: what each sync takes
	expected atomic.Bool  // the process may end by itself: its disk failed
	full     atomic.Bool
	apart    atomic.Bool // not a member: has not joined yet, is burnt or revoked
	burnt    atomic.Bool
	lost     atomic.Bool  // burnt or revoked
	emptied  atomic.Int64 // when nothing was seen to wait here last, Unix nanoseconds
	memory   memory

	hands      chan struct{} // held by whoever starts the node, or works on its disk
	kept       *image        // of its disk; nil: none
	clock      atomic.Int64  // how far its wall clock is off
	rolledBack atomic.Bool   // it was restored from an image
	gateway    bool          // may send mail to the outside by itself

	mu     sync.Mutex // guards run
	run    *process   // nil: down
	buried []*process // killed, perhaps not gone yet
}

// process is one life of a node.
type process struct {
	o      *Office
	node   *appliance.Node
	cancel context.CancelFunc
	socket *simnet.SimConn
	began  time.Time
	dead   atomic.Bool
	gone   chan struct{} // closed when nothing of it runs any more
	err    error
}

func newOffice(w *World, name string, addr netip.Addr, cfg *config.Config) *Office {
	view := &kv.Memory{}
	view.KeepHistory()
	o := &Office{w: w, Name: name, Addr: addr, cfg: cfg, view: view, votes: election.NewMemStorage(), logs: &ring{w: w, name: name}, hands: make(chan struct{}, 1)}
	o.setDisk(simfs.New())
	return o
}

// setDisk puts a disk in, with the hook through which a scenario breaks it.
func (o *Office) setDisk(d *simfs.FS) {
	d.SyncTime = time.Duration(o.syncTime.Load())
	d.Hook = func(op simfs.Op) simfs.Fault {
		if n := o.crashAt.Load(); n > 0 && o.crashAt.Add(-1) == 0 {
			o.expected.Store(true)
			o.stopped.Store(true)
			o.memory.broke()
			o.w.wg.Go(o.crash)
			return simfs.Fault{Crash: true}
		}
		if op.Name == "sync" {
			if how := o.failSync.Swap(0); how > 0 {
				o.expected.Store(true)
				o.memory.broke()
				return simfs.Fault{Err: syscall.EIO, Written: how == 2}
			}
		}
		return simfs.Fault{}
	}
	o.drive.Store(d)
}

func (o *Office) disk() *simfs.FS { return o.drive.Load() }

// Up reports whether the office's node runs.
func (o *Office) Up() bool { return o.process() != nil }

func (o *Office) process() *process {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.run
}

// Start starts an office's node; it returns at once. What is left of the life
// before is waited for.
func (o *Office) Start() {
	o.w.tb.Helper()
	unlock := o.lock()
	defer unlock()
	o.start()
}

// start is Start for who holds the office's hands.
func (o *Office) start() {
	o.bury()
	o.mu.Lock()
	if o.run != nil || o.burnt.Load() {
		o.mu.Unlock()
		return
	}
	o.w.note("%s starts", o.Name)
	o.keepState(record.On)
	p := &process{o: o, gone: make(chan struct{}), began: time.Now()}
	socket, open, unplug := o.plug()
	p.socket = socket
	open()
	o.expected.Store(false)
	ctx, cancel := context.WithCancel(context.Background())
	p.cancel, o.run = cancel, p
	env := appliance.Environment{
		Packet: func(string) (net.PacketConn, error) { return p.socket, nil },
		Listen: func(_ context.Context, _, address string) (net.Listener, error) {
			if p.dead.Load() {
				return nil, errDead
			}
			return o.w.listen(address)
		},
		Dial: func(ctx context.Context, _, address string) (net.Conn, error) {
			if p.dead.Load() {
				return nil, errDead
			}
			return o.w.dial(ctx, netip.AddrPortFrom(o.Addr, nodePort), address)
		},
		Resolver: names{o.w}, Disk: o.disk(), View: o.viewOptions(), Files: files{appliance.DiskFiles(), p}, Random: rand.Reader, Now: o.now,
		Election: func(dir string) (election.Storage, error) {
			if o.votesOnDisk {
				return election.NewFileStorage(dir)
			}
			return o.votes, nil
		},
		Logger: slog.New(&recorder{to: o.logs}),
	}
	node, err := appliance.New(o.cfg, env, "sim")
	p.node = node
	o.mu.Unlock()
	if err != nil {
		o.w.tb.Fatal(err)
	}
	go func() {
		defer close(p.gone)
		p.err = node.Run(ctx)
		cancel()
		p.socket.Close()
		unplug()
		o.mu.Lock()
		itself := o.run == p
		if itself {
			o.run = nil
			o.buried = append(o.buried, p)
		}
		o.mu.Unlock()
		if itself {
			o.ended(p)
		}
	}()
}

// The disk as statfs(2) shows it: small, and with the floor that a node of real
// size has in proportion.
const (
	diskSize  = 1 << 30
	diskFloor = 64 << 10
)

func (o *Office) viewOptions() kv.Options {
	disk := o.disk()
	return kv.Options{Memory: true, Kept: o.view, Floor: diskFloor, Statfs: func(string) (kv.FS, error) {
		free := disk.Free()
		if free < 0 {
			free = diskSize / 2
		}
		return kv.FS{Total: diskSize, Free: free}, nil
	}}
}

var errDead = errors.New("the node has lost its power")

// ended is what follows when a node ends though nobody asked it to: allowed
// only after its disk failed, and then its machine still has its page cache.
func (o *Office) ended(p *process) {
	o.w.note("%s ended by itself: %v", o.Name, p.err)
	o.keepState(record.Off)
	o.forgets(time.Now())
	if !o.expected.Load() && !errors.Is(p.err, simfs.ErrCrashed) && !strings.Contains(fmt.Sprint(p.err), simfs.ErrCrashed.Error()) {
		o.w.violation(NothingIsLeft, "%s ended by itself: %v", o.Name, p.err)
	}
	o.w.unlisten(o.Addr, o.cfg.ControlSocket)
	o.w.breakConns(func(from, to netip.Addr) bool { return from == o.Addr || to == o.Addr })
	o.seed++
	o.crashAt.Store(0)
	o.setDisk(o.disk().After(simfs.KeepAll, o.seed))
	o.w.wg.Go(func() { // as a supervisor does
		time.Sleep(time.Second)
		if !o.w.closing.Load() {
			o.Start()
		}
	})
}

// bury waits until nothing of earlier lives runs.
func (o *Office) bury() {
	for {
		o.mu.Lock()
		if len(o.buried) == 0 {
			o.mu.Unlock()
			return
		}
		p := o.buried[0]
		o.mu.Unlock()
		<-p.gone
		o.mu.Lock()
		o.buried = slices.DeleteFunc(o.buried, func(x *process) bool { return x == p })
		o.mu.Unlock()
	}
}

// take ends the office's present life and returns it; nil when it is down. done
// is to be called when the machine may be used by the next one.
func (o *Office) take() (p *process, done func()) {
	o.mu.Lock()
	defer o.mu.Unlock()
	p = o.run
	if p == nil {
		return nil, nil
	}
	o.run = nil
	grave := &process{gone: make(chan struct{})}
	o.buried = append(o.buried, grave)
	return p, func() { close(grave.gone) }
}

// A clean stop ends what is under way, writes down where it stands and seals
// the log: it may take stopTime, and stopSyncs syncs of a slow disk.
const (
	stopTime  = 10 * time.Second
	stopSyncs = 7
)

// Stop ends the node as SIGTERM does.
func (o *Office) Stop() {
	o.w.tb.Helper()
	p, done := o.take()
	if p == nil {
		return
	}
	defer done()
	o.w.note("%s is stopped", o.Name)
	o.keepState(record.Off)
	began, slow := time.Now(), o.syncTime.Load()
	p.cancel()
	<-p.gone
	o.forgets(began)
	if p.err != nil && !o.expected.Load() {
		o.w.tb.Errorf("%s ended with: %v", o.Name, p.err)
	}
	o.w.checked(NothingIsLeft, 1)
	if took := time.Since(began); took > stopTime+stopSyncs*time.Duration(max(slow, o.syncTime.Load())) {
		o.w.violation(NothingIsLeft, "%s took %v to stop", o.Name, took)
	}
	if n := o.disk().Handles(); n > 0 {
		o.w.violation(NothingIsLeft, "%s left %d files open", o.Name, n)
	}
	o.crashAt.Store(0)
	if o.stopped.Swap(false) || p.err != nil {
		o.seed++
		o.setDisk(o.disk().After(simfs.Random, o.seed))
	}
}

// Kill ends the node as a power cut does; some of what was not synced is lost.
func (o *Office) Kill() { o.PowerCut(simfs.Random, KeepView) }

// View says what a power cut does to the view.
type View int

// What a power cut does to the view.
const (
	KeepView   View = iota // as far as it was committed
	DropView               // gone
	RewindView             // as it was some commits ago
)

func (v View) String() string { return [...]string{"view kept", "view gone", "view rewound"}[v] }

// PowerCut ends the node at this instant: its packets stop, its connections
// break, its disk answers nothing any more. What was not synced is lost by the
// mode.
func (o *Office) PowerCut(mode simfs.Mode, view View) {
	p, done := o.take()
	if p == nil {
		return
	}
	defer done()
	o.w.note("%s loses its power (%v, %v)", o.Name, mode, view)
	o.keepState(record.Dead)
	p.dead.Store(true)
	o.disk().Crash()
	o.forgets(time.Now())
	applied := o.view.Applied()
	p.socket.Close()
	o.w.unlisten(o.Addr, o.cfg.ControlSocket)
	o.w.breakConns(func(from, to netip.Addr) bool { return from == o.Addr || to == o.Addr })
	p.cancel()
	<-p.gone // whatever it says: it is dead
	o.w.PerfectRouter.RemoveNode(&net.UDPAddr{IP: o.Addr.AsSlice(), Port: 44337})
	o.seed++
	o.crashAt.Store(0)
	o.failSync.Store(0)
	o.stopped.Store(false)
	o.setDisk(o.disk().After(mode, o.seed))
	switch view {
	case KeepView:
		o.view.Rewind(applied)
	case DropView:
		o.view.Rewind(0)
	case RewindView:
		o.view.Rewind(applied - applied/8)
	}
}

// CrashAtOp lets the power fail at the disk's n-th operation from now; then
// follows. A clean stop or another power cut before that calls it off.
func (o *Office) CrashAtOp(n int, mode simfs.Mode, view View, then func()) {
	o.w.note("%s: its power fails at disk operation %d from now", o.Name, n)
	o.crash = func() {
		o.PowerCut(mode, view)
		then()
	}
	o.crashAt.Store(int64(n))
}

// FailSync lets the next sync of the log fail; the node is to end and to be
// started again.
func (o *Office) FailSync() { o.w.note("%s: the next sync fails", o.Name); o.failSync.Store(1) }

// FailWrittenSync is FailSync of a disk that writes and yet says that it could not.
func (o *Office) FailWrittenSync() {
	o.w.note("%s: the next sync fails, though it writes", o.Name)
	o.failSync.Store(2)
}

// Fill leaves n bytes of the disk; -1 makes room again.
func (o *Office) Fill(n int64) {
	o.w.note("%s: %d bytes of its disk are left", o.Name, n)
	o.full.Store(n >= 0)
	if o.Up() {
		o.keepState(map[bool]record.Power{true: record.Full, false: record.On}[n >= 0])
	}
	o.memory.filled(n >= 0)
	o.disk().SetFree(n)
}

// SlowDisk makes each sync take d.
func (o *Office) SlowDisk(d time.Duration) {
	o.w.note("%s: a sync takes %v", o.Name, d)
	o.syncTime.Store(int64(d))
	if o.Up() {
		o.keepState(map[bool]record.Power{true: record.SlowIO, false: record.On}[d > 0])
	}
	o.memory.slowed(d)
	o.disk().SetSyncTime(d)
}

// keepState writes down how the office is from now on.
func (o *Office) keepState(p record.Power) {
	if !o.lost.Load() {
		o.w.keeper.State(o.Name, p)
	}
}

// Ops are the operations of a running node.
func (o *Office) Ops() admin.Operations {
	o.w.tb.Helper()
	if p := o.process(); p != nil {
		return p.node
	}
	o.w.tb.Fatalf("%s is down", o.Name)
	return nil
}

// Ctx is a context in which an admin acts.
func Ctx() context.Context {
	return admin.WithActor(context.Background(), admin.Actor{Name: "local", Admin: true})
}

// Status asks a running node; the zero Status when it is down.
func (o *Office) Status() admin.Status {
	p := o.process()
	if p == nil {
		return admin.Status{}
	}
	s, err := p.node.Status(Ctx())
	if err != nil && o.process() == p {
		o.w.note("%s: status: %v", o.Name, err)
	}
	return s
}

// files are the node's small files, on the real disk: they are written whole
// or not at all. A dead process writes none.
type files struct {
	appliance.Files
	p *process
}

func (f files) Write(name string, content []byte, mode fs.FileMode) error {
	if f.p.dead.Load() {
		return errDead
	}
	return f.Files.Write(name, content, mode)
}

// ring keeps the last lines that a node logged.
type ring struct {
	w    *World
	name string

	mu    sync.Mutex
	lines []logLine
}

type logLine struct {
	at   time.Time
	text string
}

const ringSize = 2000

func (r *ring) add(text string) {
	if r.w.trace != nil {
		fmt.Fprintf(r.w.trace, "%12s  %s: %s\n", time.Since(r.w.began).Round(time.Millisecond), r.name, text)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.lines) >= 2*ringSize {
		r.lines = append(r.lines[:0], r.lines[ringSize:]...)
	}
	r.lines = append(r.lines, logLine{time.Now(), text})
}

// since returns the lines from t on, at most n of them.
func (r *ring) since(t time.Time, n int) (out []logLine) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, l := range r.lines {
		if !l.at.Before(t) {
			out = append(out, l)
		}
	}
	return out[max(0, len(out)-n):]
}

// recorder is a slog.Handler that writes to a ring.
type recorder struct {
	to    *ring
	attrs []slog.Attr
}

func (h *recorder) Enabled(_ context.Context, l slog.Level) bool { return l >= slog.LevelInfo }

func (h *recorder) WithAttrs(a []slog.Attr) slog.Handler {
	return &recorder{h.to, append(h.attrs[:len(h.attrs):len(h.attrs)], a...)}
}

func (h *recorder) WithGroup(string) slog.Handler { return h }

func (h *recorder) Handle(_ context.Context, r slog.Record) error {
	var b bytes.Buffer
	b.WriteString(r.Level.String() + " " + r.Message)
	add := func(a slog.Attr) bool {
		if a.Key != "node" && a.Value.String() != "" {
			fmt.Fprintf(&b, " %s=%v", a.Key, a.Value)
		}
		return true
	}
	for _, a := range h.attrs {
		add(a)
	}
	r.Attrs(add)
	if r.Message == "destination waits" {
		r.Attrs(func(a slog.Attr) bool {
			if a.Key == "dest" {
				h.to.w.keeper.Retry(h.to.name, h.to.w.called(a.Value.String()))
			}
			return true
		})
	}
	h.to.add(b.String())
	return nil
}
