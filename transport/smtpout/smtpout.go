// Package smtpout carries legs to hosts of the outside world by SMTP: to the
// mail exchangers of a domain, or to the one smarthost that a site must use.
//
// It finds the hosts, speaks to them as a careful client, and reports what
// became of each recipient in the other side's own words. It never changes a
// message: what a host cannot take (8-bit content, UTF-8 addresses, size) is
// a failure with its own code, not a conversion. It keeps nothing between two
// Carry calls, and does not schedule, sign or write reports: queue, filter and
// dsn do. appliance plugs it into queue for transport.ScopeOutside.
//
// The client is our own: every reply is bounded, nothing read before TLS
// survives it, and the text leaves exactly as stored, dots doubled.
package smtpout

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"time"

	"posthouse/transport"
)

// Resolver finds mail exchangers and addresses; *net.Resolver is one. A name
// that does not exist is a *net.DNSError with IsNotFound.
type Resolver interface {
	LookupMX(ctx context.Context, domain string) ([]*net.MX, error)
	LookupNetIP(ctx context.Context, network, host string) ([]netip.Addr, error)
}

// Smarthost is a host that takes all mail for the outside.
type Smarthost struct {
	Host        string // name or address
	Port        uint16 // 587; 465 with ImplicitTLS
	ImplicitTLS bool
	// User and Password log in, over verified TLS only. Without User, TLS is
	// opportunistic as it is for everybody.
	User, Password string
}

// Config has the limits. The zero value of each field means its default.
type Config struct {
	Hostname  string     // what we call ourselves in EHLO; required
	Port      uint16     // of mail exchangers; 25
	Smarthost *Smarthost // nil: by MX
	MaxConns  int        // at once to one destination; 3
	MaxHosts  int        // addresses tried for one connection; 8

	// RFC 5321 section 4.5.3.2, each with the figure that it names.
	DialTimeout     time.Duration // 30 s
	GreetingTimeout time.Duration // 5 min
	CommandTimeout  time.Duration // EHLO, MAIL, RCPT, AUTH: 5 min
	DataTimeout     time.Duration // DATA until 354: 2 min
	BlockTimeout    time.Duration // one write of the text: 3 min
	TextTime        time.Duration // a whole text: 2 h
	DotTimeout      time.Duration // the answer to the text: 10 min
	TLSTimeout      time.Duration // handshake: 1 min
	LookupTimeout   time.Duration // all names of a destination: 1 min
	IdleTimeout     time.Duration // an open connection without a leg: 10 s
}

// Deps are what a Carrier is given.
type Deps struct {
	Resolver Resolver
	Dial     func(ctx context.Context, network, address string) (net.Conn, error)
	// TLS is the base of every client configuration (roots, clock); nil: the
	// system's. Its ServerName and verification are set here.
	TLS *tls.Config
	// OwnName and OwnAddr know this mesh's own mail exchangers: RFC 5321
	// section 5.1, mail must not loop. nil: nobody is us.
	OwnName func(host string) bool
	OwnAddr func(a netip.Addr) bool
	// Ready is asked before each transaction; an error, that of a full disk, says
	// that a host's answer could not be recorded: nothing is sent, and Carry ends
	// with it. Nil: always ready.
	Ready  func() error
	Logger *slog.Logger
	Rand   io.Reader // crypto/rand.Reader
}

// Carrier carries legs outside. It implements transport.Carrier and is safe
// for use by several goroutines.
type Carrier struct {
	cfg  Config
	deps Deps
}

var _ transport.Carrier = (*Carrier)(nil)

// New makes a Carrier. It starts nothing and needs no closing.
func New(cfg Config, deps Deps) (*Carrier, error) {
	if cfg.Hostname == "" {
		return nil, errors.New("smtpout: Config.Hostname is empty")
	}
	if deps.Resolver == nil || deps.Dial == nil || deps.Logger == nil || deps.Rand == nil {
		return nil, errors.New("smtpout: Resolver, Dial, Logger and Rand are required")
	}
	def(&cfg.Port, 25)
	def(&cfg.MaxConns, 3)
	def(&cfg.MaxHosts, 8)
	def(&cfg.DialTimeout, 30*time.Second)
	def(&cfg.GreetingTimeout, 5*time.Minute)
	def(&cfg.CommandTimeout, 5*time.Minute)
	def(&cfg.DataTimeout, 2*time.Minute)
	def(&cfg.BlockTimeout, 3*time.Minute)
	def(&cfg.TextTime, 2*time.Hour)
	def(&cfg.DotTimeout, 10*time.Minute)
	def(&cfg.TLSTimeout, time.Minute)
	def(&cfg.LookupTimeout, time.Minute)
	def(&cfg.IdleTimeout, 10*time.Second)
	if s := cfg.Smarthost; s != nil {
		c := *s
		if c.Port == 0 {
			c.Port = 587
			if c.ImplicitTLS {
				c.Port = 465
			}
		}
		cfg.Smarthost = &c
	}
	if deps.Ready == nil {
		deps.Ready = func() error { return nil }
	}
	if deps.TLS == nil {
		deps.TLS = &tls.Config{}
	}
	return &Carrier{cfg: cfg, deps: deps}, nil
}

func def[T ~int | ~int64 | ~uint16](v *T, d T) {
	if *v <= 0 {
		*v = d
	}
}

// Carry implements transport.Carrier. What concerns the whole destination and
// may pass (no host answers, DNS is away, the smarthost refuses our log-in)
// ends it with a *transport.Fault; everything else is a result of a leg.
func (c *Carrier) Carry(ctx context.Context, dest transport.Destination, src transport.Source) error {
	r := &run{c: c, dest: dest, src: src, gate: make(chan struct{}, 1)}
	pull, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	var wg sync.WaitGroup
	for range c.cfg.MaxConns {
		wg.Go(func() {
			if err := r.work(ctx, pull); err != nil {
				stop(err) // the others finish what they have and pull no more
			}
		})
	}
	wg.Wait()
	if err := context.Cause(pull); err != nil {
		return err
	}
	if len(r.back) > 0 {
		return r.why
	}
	return nil
}

// run is one Carry.
type run struct {
	c    *Carrier
	dest transport.Destination
	src  transport.Source

	mu    sync.Mutex
	open  int              // connections that work
	back  []*transport.Leg // of workers that got no connection beside the open ones
	why   error            // why they got none
	gate  chan struct{}    // one looks the hosts up
	hosts []host           // once looked up
	fatal *transport.Fault // nobody will ever take mail for the destination
}

// work pulls legs and sends them, one connection at a time. ctx ends
// everything, pull only the pulling.
func (r *run) work(ctx, pull context.Context) error {
	var cn *conn
	defer func() {
		if cn != nil {
			cn.quit()
		}
	}()
	for {
		leg, err := r.next(pull, cn != nil)
		switch {
		case err == errIdle:
			cn.quit()
			cn = nil
			continue
		case err == io.EOF:
			return nil
		case err != nil:
			return err
		}
		if cn, err = r.send(ctx, cn, leg); err != nil {
			if r.giveBack(leg, err) {
				return nil
			}
			return err
		}
	}
}

var errIdle = errors.New("no leg for a while")

// next waits for a leg; with an open connection not for long.
func (r *run) next(ctx context.Context, open bool) (*transport.Leg, error) {
	if !open {
		return r.src.Next(ctx)
	}
	if leg := r.takeBack(); leg != nil {
		return leg, nil
	}
	nctx, cancel := context.WithTimeoutCause(ctx, r.c.cfg.IdleTimeout, errIdle)
	defer cancel()
	leg, err := r.src.Next(nctx)
	if err == nil {
		return leg, nil
	}
	if leg := r.takeBack(); leg != nil {
		return leg, nil
	}
	if err != io.EOF && ctx.Err() == nil && context.Cause(nctx) == errIdle {
		return nil, errIdle
	}
	return nil, err
}

// giveBack leaves a leg to a worker whose connection works: many hosts take
// only so many connections from one address, which is no failure.
func (r *run) giveBack(leg *transport.Leg, why error) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.open == 0 {
		return false
	}
	r.back, r.why = append(r.back, leg), why
	return true
}

func (r *run) takeBack() *transport.Leg {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.back) == 0 {
		return nil
	}
	leg := r.back[0]
	r.back = r.back[1:]
	return leg
}

// send brings one leg to an end, over cn if it is not nil, and returns the
// connection to go on with. An error leaves the leg pending.
func (r *run) send(ctx context.Context, cn *conn, leg *transport.Leg) (*conn, error) {
	t := newTransfer(leg)
	t.scan()
	fresh := false // cn was opened for this try
	for !t.done() {
		// What a host has taken and nobody can note is sent again after a crash.
		if err := r.c.deps.Ready(); err != nil && waitsForRoom {
			if cn != nil {
				cn.quit()
				cn = nil
			}
			if !t.any() {
				return nil, err
			}
			t.rest(transport.AsFault(err).Result(r.dest.String()))
			break
		}
		if cn == nil {
			var err error
			if cn, err = r.connect(ctx, leg.Envelope.RequireTLS); err != nil {
				if !t.any() && (ctx.Err() != nil || transport.AsFault(err).Temporary()) {
					return nil, err
				}
				t.rest(transport.AsFault(err).Result(r.dest.String()))
				break
			}
			fresh = true
		}
		err := cn.transact(t)
		if err == nil && !cn.closing {
			fresh = false
			continue // whoever was beyond the host's recipient limit goes now
		}
		by := cn.host
		cn.close()
		cn = nil
		switch {
		case err == nil: // all is said
		case ctx.Err() != nil && !t.any():
			return nil, context.Cause(ctx)
		case ctx.Err() == nil && !fresh: // the host had enough of the old connection
		default:
			f := lost(err)
			t.rest(transport.Result{Outcome: transport.Deferred, Enhanced: f.Enhanced, Text: f.Text, By: by})
		}
	}
	r.src.Finish(leg, t.results)
	return cn, nil
}

// lost is what is told of a connection that broke.
func lost(err error) *transport.Fault {
	var f *transport.Fault
	if errors.As(err, &f) {
		return f
	}
	var ne net.Error
	if errors.As(err, &ne) && ne.Timeout() {
		return &transport.Fault{Code: 451, Enhanced: "4.4.2", Text: "The other side did not answer in time", Cause: err}
	}
	return &transport.Fault{Code: 451, Enhanced: "4.4.2", Text: "Connection lost in mid-transfer", Cause: err}
}
