package joining

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"strings"
	"time"

	"posthouse/mesh"
	"posthouse/mesh/identity"
)

// Failure is a named reason why a node is not in the mesh yet.
type Failure struct {
	Code  string // "join.dns", …
	Text  string // one sentence
	Next  string // the next step
	Final bool   // trying the same again soon cannot help
	Cause error
}

func (f *Failure) Error() string {
	if f.Next != "" {
		return f.Text + " " + f.Next
	}
	return f.Text
}

func (f *Failure) Unwrap() error { return f.Cause }

// failures are the causes that the mesh itself can name, with the next step and
// whether they are final.
var failures = map[string]struct {
	next  string
	final bool
}{
	"join.token":      {"Ask an admin for a new token: posthouse mesh token create.", true},
	"join.clock":      {"Set this machine's clock; it should follow a time server.", false},
	"join.version":    {"Install the same version as the mesh runs.", true},
	"join.pending":    {"An admin of the mesh compares the code and approves: posthouse mesh approve.", false},
	"join.no-master":  {"It goes on trying; nothing needs to be done here.", false},
	"join.name-taken": {"Choose another name in the configuration, or revoke the old node of that name first.", true},
	"join.refused":    {"Ask an admin of the mesh why.", true},
	"join.password":   {"Check the admin's address and password.", true},
	"join.not-here":   {"Join at one of those nodes, or with a token.", true},
}

// Intent is what the admin of a joining node asked for.
type Intent struct {
	Target   string `json:"target"`             // name, host:port or token
	At       string `json:"at,omitempty"`       // where to knock with a token
	Admin    string `json:"admin,omitempty"`    // the admin's door
	Password string `json:"password,omitempty"` // never stored
	Member   bool   `json:"member,omitempty"`   // no candidate
}

// Session is a stream to a door.
type Session struct {
	Conn     io.ReadWriteCloser
	Deadline func(time.Time) error
	Peer     mesh.KeyHash
	Exporter []byte // of the TLS session, 32 bytes
}

// Admission is what a successful join gives.
type Admission struct {
	Node   mesh.NodeID
	Peers  []Peer
	CA     []byte
	Domain string
}

// Joiner is the loop of a node that wants in.
type Joiner struct {
	Self func() Request // all but the door's fields
	Key  *identity.Key
	Now  func() time.Time // the wall clock, UTC
	// SRV and Host look names up; a host may give several addresses.
	SRV  func(ctx context.Context, name string) ([]string, error) // host:port, best first
	Host func(ctx context.Context, host string) ([]string, error)
	Dial func(ctx context.Context, addr string, expect func(mesh.KeyHash) error) (*Session, error)
	// Progress is called for each step, in the words of the page and the log;
	// Failed for each failure. Neither may block.
	Progress func(line string)
	Failed   func(*Failure)
	// Remember keeps the last good addresses of a name; Recall gives them.
	Remember func(name string, addrs []string)
	Recall   func(name string) []string
}

// Waiting times between tries, and the limit of one exchange.
const (
	againSoon     = 2 * time.Second
	againLater    = 60 * time.Second
	exchangeLimit = 30 * time.Second
	defaultPort   = "44337"
	maxSkew       = 5 * time.Minute
)

// Run tries until the node is admitted or ctx ends.
func (j *Joiner) Run(ctx context.Context, in Intent) (*Admission, error) {
	began := time.Now()
	for {
		a, err := j.try(ctx, in)
		if err == nil {
			j.Progress(fmt.Sprintf("members: %d … joined in %.1f s", len(a.Peers), time.Since(began).Seconds()))
			return a, nil
		}
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		var f *Failure
		if !errors.As(err, &f) {
			f = &Failure{Code: "join.unreachable", Text: err.Error() + ".", Cause: err}
		}
		j.Failed(f)
		wait := againSoon + rand.N(againSoon)
		if f.Final {
			wait = againLater
		}
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// try knocks once at every address that it finds.
func (j *Joiner) try(ctx context.Context, in Intent) (*Admission, error) {
	var token *identity.Token
	name := in.Target
	if strings.HasPrefix(strings.ToUpper(strings.TrimSpace(in.Target)), "PH1") {
		t, err := identity.ParseToken(in.Target)
		if err != nil {
			return nil, &Failure{Code: "join.token", Text: sentence(err), Next: failures["join.token"].next, Final: true, Cause: err}
		}
		token, name = &t, in.At
		if name == "" {
			_, name, _ = strings.Cut(j.Self().Host, ".") // the token does not say where; the own domain's SRV does
		}
	}
	addrs, err := j.resolve(ctx, name)
	if err != nil {
		return nil, err
	}
	var first error
	for _, addr := range addrs {
		a, err := j.knock(ctx, addr, in, token)
		if err == nil {
			j.Remember(name, addrs)
			return a, nil
		}
		var f *Failure
		if errors.As(err, &f) && f.Code != "join.unreachable" && f.Code != "join.no-master" && f.Code != "join.not-here" && f.Code != "join.fingerprint" {
			return nil, err // it answered: another door of the same mesh says the same
		}
		if first == nil {
			first = err
		}
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
	}
	return nil, first
}

// resolve finds where to knock: SRV, then the host's addresses with the default
// port, then the last good ones.
func (j *Joiner) resolve(ctx context.Context, name string) ([]string, error) {
	j.Progress("resolving " + name)
	ctx, cancel := context.WithTimeout(ctx, exchangeLimit)
	defer cancel()
	if host, port, err := net.SplitHostPort(name); err == nil {
		return j.hosts(ctx, []string{net.JoinHostPort(host, port)}, name)
	}
	if srv, err := j.SRV(ctx, name); err == nil && len(srv) > 0 {
		return j.hosts(ctx, srv, name)
	}
	return j.hosts(ctx, []string{net.JoinHostPort(name, defaultPort)}, name)
}

func (j *Joiner) hosts(ctx context.Context, hostports []string, name string) ([]string, error) {
	var addrs []string
	var last error
	for _, hp := range hostports {
		host, port, err := net.SplitHostPort(hp)
		if err != nil {
			last = err
			continue
		}
		if net.ParseIP(host) != nil {
			addrs = append(addrs, hp)
			continue
		}
		found, err := j.Host(ctx, host)
		if err != nil {
			last = err
			continue
		}
		for _, a := range found {
			addrs = append(addrs, net.JoinHostPort(a, port))
		}
	}
	if len(addrs) == 0 {
		addrs = j.Recall(name)
	}
	if len(addrs) == 0 {
		return nil, &Failure{Code: "join.dns", Text: fmt.Sprintf("The name %q does not lead to an address.", name), Next: "Check the spelling, or give host:port.", Cause: last}
	}
	return addrs, nil
}

// knock does one exchange with one door.
func (j *Joiner) knock(ctx context.Context, addr string, in Intent, token *identity.Token) (*Admission, error) {
	j.Progress("reaching " + addr)
	ctx, cancel := context.WithTimeout(ctx, exchangeLimit)
	defer cancel()
	own := j.Key.Hash()
	var seen mesh.KeyHash
	s, err := j.Dial(ctx, addr, func(k mesh.KeyHash) error {
		seen = k
		if k == own {
			return &Failure{Code: "join.self", Text: addr + " is this node itself.", Next: "Give the name of a node that is in the mesh.", Final: true}
		}
		if token != nil {
			if err := token.Expect(k); err != nil {
				return &Failure{Code: "join.fingerprint", Text: fmt.Sprintf("%s answers with another key than the token names.", addr), Next: "Check that the name leads to your mesh, or ask for a new token.", Cause: err}
			}
		}
		return nil
	})
	if err != nil {
		var f *Failure
		if errors.As(err, &f) {
			return nil, f
		}
		if !seen.IsZero() {
			return nil, &Failure{Code: "join.notmesh", Text: addr + " answered, but is no member of a mesh that takes nodes.", Next: "Give the name of a node that is in the mesh.", Cause: err}
		}
		return nil, &Failure{Code: "join.unreachable", Text: addr + " does not answer.", Next: "Check the address, and that UDP port 44337 is open on the way.", Cause: err}
	}
	defer s.Conn.Close()
	if d, ok := ctx.Deadline(); ok {
		s.Deadline(d)
	}
	stop := context.AfterFunc(ctx, func() { s.Deadline(time.Unix(1, 0)) })
	defer stop()
	j.Progress("key ok")
	q := j.Self()
	q.Version, q.Clock = Service, j.Now()
	switch {
	case token != nil:
		q.Token, q.Proof = token.PublicKey(), token.Prove(s.Exporter, own)
	case in.Admin != "":
		q.Admin = in.Admin
	default:
		j.Progress("this node's code is " + identity.ComparisonCode(own, s.Peer))
	}
	var a Answer
	if err := exchange(s.Conn, q, &a); err != nil {
		if ctx.Err() != nil { // it speaks our language: its key was asked for in it
			return nil, &Failure{Code: "join.unreachable", Text: addr + " did not answer in time.", Next: "Check that it has a master, or wait.", Cause: err}
		}
		return nil, &Failure{Code: "join.notmesh", Text: addr + " does not speak the language of a mesh.", Next: "Give the name of a node that is in the mesh.", Cause: err}
	}
	var secret []byte
	if a.Code == "challenge" && a.Challenge != nil && in.Admin != "" {
		if secret, err = a.Challenge.Derive(in.Password); err != nil {
			return nil, &Failure{Code: "join.password", Text: sentence(err), Final: true, Cause: err}
		}
		if err := exchange(s.Conn, proof{mac(secret, "joiner", s.Exporter, own, s.Peer)}, &a); err != nil {
			return nil, &Failure{Code: "join.unreachable", Text: addr + " stopped answering.", Cause: err}
		}
	}
	if skew := j.Now().Sub(a.Clock); !a.Clock.IsZero() {
		j.Progress(fmt.Sprintf("clock %+.1f s … version %s", skew.Seconds(), a.Software))
		if skew > maxSkew || skew < -maxSkew {
			j.Failed(&Failure{Code: "join.clock", Text: fmt.Sprintf("This machine's clock differs from the mesh's by %v.", skew.Round(time.Second)), Next: failures["join.clock"].next})
		}
	}
	if a.Code != "admitted" {
		known := failures[a.Code]
		return nil, &Failure{Code: a.Code, Text: a.Text, Next: known.next, Final: known.final}
	}
	if secret != nil && !hmac.Equal(a.Mutual, mac(secret, "mesh", s.Exporter, own, s.Peer)) {
		return nil, &Failure{Code: "join.fingerprint", Text: addr + " does not know the admin's password either: it is not your mesh.", Next: "Check that the name leads to your mesh.", Final: true}
	}
	j.Progress(fmt.Sprintf("admitted as %s … domain state: %d users", q.Name, a.Users))
	return &Admission{Node: a.Node, Peers: a.Peers, CA: a.CA, Domain: a.Domain}, nil
}

func exchange(c io.ReadWriter, q any, a *Answer) error {
	if err := writeFrame(c, q); err != nil {
		return err
	}
	*a = Answer{}
	return readFrame(c, a)
}

// mac binds a password's secret to one TLS session and one direction.
func mac(secret []byte, who string, exporter []byte, joiner, door mesh.KeyHash) []byte {
	h := hmac.New(sha256.New, secret)
	for _, b := range [][]byte{[]byte("posthouse join 1\x00" + who + "\x00"), exporter, joiner[:], door[:]} {
		h.Write(b)
	}
	return h.Sum(nil)
}

// sentence makes an error's text a sentence.
func sentence(err error) string {
	s := err.Error()
	return strings.ToUpper(s[:1]) + s[1:] + "."
}
