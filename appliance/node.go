// Package appliance is one Posthouse node: it wires the engines of mesh,
// transport and mailstore together, starts and stops them in order, and does
// what people ask of a node (admin.Operations). It holds no protocol and no
// rule of its own beyond that; a node is built from a configuration and an
// Environment, so that the simulator runs the same node that ships.
package appliance

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"posthouse/appliance/admin"
	"posthouse/appliance/config"
	"posthouse/appliance/health"
	"posthouse/appliance/login"
	"posthouse/appliance/metrics"
	"posthouse/appliance/web"
	"posthouse/mailstore"
	"posthouse/mailstore/journal"
	"posthouse/mesh"
	"posthouse/mesh/domain"
	"posthouse/mesh/election"
	"posthouse/mesh/gossip"
	"posthouse/mesh/identity"
	"posthouse/transport/link"
	"posthouse/transport/notice"
	"posthouse/transport/queue"
	"posthouse/transport/relay"
)

// Node is one running Posthouse. Make it with New, then Run it once.
type Node struct {
	cfg     *config.Config
	env     Environment
	log     *slog.Logger
	version string
	began   time.Time // of New

	board *health.Board
	live  broadcast
	// stage says how far the start is, for /readyz; "" when the node is ready.
	stage atomic.Pointer[string]
	phase atomic.Pointer[mesh.State]

	rec   *keeper
	key   *identity.Key
	id    mesh.NodeID
	boots uint64 // this start's number
	state *domain.Machine
	check *login.Checker
	desk  *login.Desk
	dir   *directory
	view  atomic.Pointer[mesh.View]
	// viewing is held while a view is made; nothing under it waits.
	viewing sync.Mutex
	// admitting is held while the link is told who belongs to the mesh: an older list
	// must not replace a newer one.
	admitting sync.Mutex

	journal  *journal.Journal
	store    *mailstore.Store
	queue    *queue.Queue
	link     *link.Endpoint
	relay    *relay.Relay
	notices  *notice.Board
	gossip   *gossip.Gossip
	certs    *certificates
	failures login.Failures // at all doors of this node
	meshes   *group         // of Run

	gossipDoor *link.Listener
	noticed    chan struct{} // a token: what this node says of itself may have changed
	diskFull   atomic.Bool   // as the store said last
	turned     turned
	strangers  chan mesh.KeyHash // that were refused
	vouches    vouches
	// parting says that the node stops because it was asked to.
	parting atomic.Bool
	witness *witness
	// vetted is closed when a peer has said that this node may serve.
	vetted     chan struct{}
	vettedOnce func()
	// sound is closed when a peer has said that its disk is the one that it had.
	sound     chan struct{}
	soundOnce func()
	// seals is poked when secrets may be sealed to the wrong nodes.
	seals chan struct{}

	mu       sync.Mutex // guards what follows
	election *election.Election
	ledBy    mesh.NodeID // as last logged
	ledIn    uint64
	progress []string // of a join
	joinStop context.CancelFunc
	member   bool
	// reconciling: this node was found to be rolled back, and is not taken in yet.
	reconciling bool
	// cutSessions cuts all IMAP sessions: their mailboxes have changed.
	cutSessions func()
	startup     chan struct{} // closed once the member part may start
	restored    chan struct{} // closed once the state is what it was at the last stop
}

// Limits of a stop: the whole of it stays below what systemd allows.
const (
	drainLimit = 20 * time.Second
)

// New prepares a node. It starts nothing and touches no disk.
func New(cfg *config.Config, env Environment, version string) (*Node, error) {
	check, err := login.NewChecker(env.Random)
	if err != nil {
		return nil, err
	}
	n := &Node{cfg: cfg, env: env, version: version, check: check, state: domain.NewMachine(), startup: make(chan struct{}), restored: make(chan struct{}), seals: make(chan struct{}, 1)}
	if n.env.Now == nil {
		n.env.Now = func() time.Time { return time.Now().Round(0) }
	}
	n.env.Files = newTwofold(env.Files, n.mended)
	n.began, n.rec = time.Now(), newKeeper(n.env.Files, cfg.Data)
	n.vetted = make(chan struct{})
	n.vettedOnce = sync.OnceFunc(func() { close(n.vetted) })
	n.sound = make(chan struct{})
	n.soundOnce = sync.OnceFunc(func() { close(n.sound) })
	n.log = env.Logger.With("node", cfg.Name)
	n.board = health.New(n.live.send)
	n.setStage("the node is starting")
	n.setPhase(mesh.Fresh)
	n.view.Store(&mesh.View{})
	n.noticed, n.strangers = make(chan struct{}, 1), make(chan mesh.KeyHash, 4)
	n.buildNotices()
	n.dir = &directory{state: n.state, node: func() mesh.NodeID { return n.id }, view: n.view.Load, age: n.stateAge, check: check, full: n.mailboxFull, ask: n.askHome}
	n.desk = login.NewDesk(check, n.verifierHere)
	return n, nil
}

// now is what the wall clock shows, UTC: see Environment.Now.
func (n *Node) now() time.Time { return n.env.Now().UTC() }

func (n *Node) part(name string) *slog.Logger { return n.log.With("part", name) }

func (n *Node) setStage(s string) { n.stage.Store(&s); n.live.send() }

func (n *Node) setPhase(s mesh.State) {
	n.phase.Store(&s)
	n.tell()
	n.live.send()
}

// ready returns nil when the node takes mail.
func (n *Node) ready() error {
	if s := *n.stage.Load(); s != "" {
		return errors.New(s)
	}
	return nil
}

// started is ready in the words of an operation: while the node starts, its parts
// are not all there.
func (n *Node) started() error {
	if err := n.ready(); err != nil {
		return &admin.Error{Kind: admin.Unavailable, Code: "node.starting", Text: sentence(err.Error()), Next: "Try again when posthouse status says that mail is flowing."}
	}
	return nil
}

// part is a group of goroutines that is stopped as one.
type group struct {
	ctx    context.Context
	cancel context.CancelCauseFunc
	wg     sync.WaitGroup
	fail   func(error)
}

func newGroup(fail func(error)) *group {
	g := &group{fail: fail}
	g.ctx, g.cancel = context.WithCancelCause(context.Background())
	return g
}

// run starts f; an error of it before the group is stopped ends the node.
func (g *group) run(what string, f func(context.Context) error) {
	g.wg.Go(func() {
		if err := f(g.ctx); err != nil && g.ctx.Err() == nil {
			g.fail(fmt.Errorf("%s: %w", what, err))
		}
	})
}

var errStopping = errors.New("the node is stopping")

// stop ends the group and waits for it.
func (g *group) stop() {
	g.cancel(errStopping)
	g.wg.Wait()
}

// Run serves until ctx ends, then stops in the reverse order of its start. It
// returns nil after a stop that was asked for. Nothing of the node runs when it
// returns.
//
// Order of the start: pages first, so that a node which cannot start still
// explains itself; then the store (which repairs itself), the link, the mesh,
// the queue, and the doors for mail last.
func (n *Node) Run(ctx context.Context) (err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	fail := func(err error) { cancel(err) }

	data := n.cfg.Data
	if err := n.env.Files.MkdirAll(data); err != nil {
		return fmt.Errorf("make data folder: %w", err)
	}
	var broken error
	if broken = n.rec.open(n.env.Random); broken == nil {
		n.id = n.rec.get().Node
	}
	n.certs = &certificates{n: n}
	if err := n.certs.open(); err != nil {
		return err
	}
	pages := newGroup(fail)
	defer pages.stop()
	if err := n.servePages(pages); err != nil {
		return err
	}
	if broken == nil {
		broken = n.openSelf(ctx)
	}
	if broken == nil {
		n.setStage("the store is being opened")
		broken = n.patiently(ctx, func() error { return n.openStore(ctx) })
	}
	if broken != nil {
		return n.explain(ctx, broken)
	}
	closeStore := sync.OnceFunc(n.closeStore)
	defer closeStore()

	socket, err := n.env.Packet(n.cfg.Listen.Mesh)
	if err != nil {
		return fmt.Errorf("open the mesh port: %w", err)
	}
	defer socket.Close()
	if err := n.buildLink(socket); err != nil {
		return err
	}
	n.buildRelay()
	// The offers stand before the first peer can ask: its streams wait until this
	// node is so far.
	offers, err := n.offer()
	if err != nil {
		return err
	}
	links := newGroup(fail)
	defer links.stop()
	links.run("link", n.link.Run)
	defer closeStore() // before the link

	n.meshes = newGroup(fail)
	defer n.meshes.stop()
	if err := n.runMesh(ctx, n.meshes, offers); err != nil {
		return asked(err)
	}
	n.waitVetted(ctx)

	carriers := newGroup(fail)
	defer carriers.stop()
	carriers.run("queue", n.queue.Run)
	carriers.run("relay", n.relay.Run)
	carriers.run("housekeeping", n.housekeep)

	doors := newGroup(fail)
	drain, err := n.openDoors(doors)
	defer func() {
		drain()
		doors.stop()
	}()
	if err != nil {
		return err
	}
	n.setStage("")
	n.log.Info("ready", "version", n.version, "after", time.Since(n.began).Round(time.Millisecond).String(), "node_id", n.id.String())

	select {
	case <-ctx.Done():
		err = context.Cause(ctx)
	case <-n.journal.Done():
		err = fmt.Errorf("the store stopped: %w", n.journal.Err())
	}
	n.parting.Store(errors.Is(err, context.Canceled))
	n.setStage("the node is stopping")
	n.setPhase(mesh.Draining)
	if err = asked(err); err != nil {
		n.log.Error("node fails", "err", err)
	}
	return err
}

// asked is nil for a stop that was asked for.
func asked(err error) error {
	if errors.Is(err, context.Canceled) {
		return nil
	}
	return err
}

// servePages opens the control socket and the HTTPS port.
func (n *Node) servePages(g *group) error {
	server, err := web.New(web.Deps{Ops: n, Login: n.adminLogin, Ready: n.ready, Metrics: metrics.New(n.Status, n.figures), Version: n.version, Log: n.part("web")})
	if err != nil {
		return err
	}
	control, err := n.env.Listen(g.ctx, "unix", n.cfg.ControlSocket)
	if err != nil {
		return fmt.Errorf("open the control socket: %w", err)
	}
	serve := func(l net.Listener, h http.Handler) {
		s := &http.Server{Handler: h, ReadHeaderTimeout: 10 * time.Second, IdleTimeout: 2 * time.Minute, MaxHeaderBytes: 64 << 10,
			ErrorLog: slog.NewLogLogger(n.part("web").Handler(), slog.LevelDebug), BaseContext: func(net.Listener) context.Context { return g.ctx }, ConnContext: server.ConnContext}
		g.run("pages", func(ctx context.Context) error {
			stop := context.AfterFunc(ctx, func() { s.Close() })
			defer stop()
			if err := s.Serve(l); !errors.Is(err, http.ErrServerClosed) {
				return err
			}
			return nil
		})
	}
	serve(control, server.Control())
	if n.cfg.Listen.HTTPS == config.Off {
		return nil
	}
	l, err := n.env.Listen(g.ctx, "tcp", n.cfg.Listen.HTTPS)
	if err != nil {
		return fmt.Errorf("open the HTTPS port: %w", err)
	}
	serve(tls.NewListener(server.Limit(l), n.certs.config("h2", "http/1.1")), server.Public())
	return nil
}

// broadcast tells several waiters that something changed.
type broadcast struct {
	mu sync.Mutex
	ch chan struct{}
}

func (b *broadcast) send() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.ch != nil {
		close(b.ch)
		b.ch = nil
	}
}

// wait returns a channel that is closed at the next change.
func (b *broadcast) wait() <-chan struct{} {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.ch == nil {
		b.ch = make(chan struct{})
	}
	return b.ch
}
