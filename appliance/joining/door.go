package joining

import (
	"context"
	"crypto/hmac"
	"fmt"
	"io"
	"net/netip"
	"time"

	"posthouse/appliance/login"
	"posthouse/mesh"
	"posthouse/mesh/identity"
)

// Verdict is what the domain state says of a request.
type Verdict struct {
	Code string // "admitted" or a failure's code
	Text string // a sentence, for a failure
	Node mesh.NodeID
}

// Door is the mesh's side.
type Door struct {
	Key *identity.Key
	// Current returns when this node's copy of the domain state is known to hold
	// all that the mesh had decided before the call; the error is a sentence
	// that says why that cannot be known now.
	Current func(ctx context.Context) error
	// Token finds the id of the token with that public key; ok is false for none.
	Token func(public []byte) (id mesh.ID, ok bool)
	// Admin returns the verifier of a mesh admin's password; "" when there is no
	// such admin.
	Admin func(name string) (verifier string)
	// Judges names the nodes that can check an admin's password, when this one
	// cannot; "" when it can.
	Judges func() string
	// Admit proposes the admission of the key: by a token, by an admin's word
	// (token zero, actor set), or as an application (both zero).
	Admit func(ctx context.Context, key mesh.KeyHash, q *Request, from netip.AddrPort, token mesh.ID, actor string) Verdict
	// Welcome fills in what an admitted node needs to know.
	Welcome func(a *Answer)
	// Fail is called after a wrong password and returns how long to wait.
	Fail func(admin string) time.Duration
	Name string
	// Software is this node's version.
	Software string
	// Now is the wall clock, UTC: the joiner compares its own with it.
	Now func() time.Time
	// Decoy is a secret of this process: it makes the salts of unknown admins.
	Decoy []byte
}

// Serve answers one joining node.
func (d *Door) Serve(ctx context.Context, s *Session, from netip.AddrPort) error {
	defer s.Conn.Close()
	s.Deadline(time.Now().Add(exchangeLimit))
	var q Request
	if err := readFrame(s.Conn, &q); err != nil {
		return err
	}
	a := d.decide(ctx, s, &q, from)
	a.Version, a.Name, a.Software, a.Clock = Service, d.Name, d.Software, d.Now()
	if err := writeFrame(s.Conn, a); err != nil {
		return err
	}
	io.Copy(io.Discard, io.LimitReader(s.Conn, 1)) // the joiner hangs up when it has the answer
	return nil
}

func refuse(code, format string, args ...any) *Answer {
	return &Answer{Code: code, Text: fmt.Sprintf(format, args...)}
}

func (d *Door) decide(ctx context.Context, s *Session, q *Request, from netip.AddrPort) *Answer {
	if q.Version != Service {
		return refuse("join.version", "The mesh speaks version %d of the join protocol, this node version %d.", Service, q.Version)
	}
	var (
		token  mesh.ID
		actor  string
		mutual []byte
	)
	switch {
	case len(q.Token) > 0:
		if err := identity.VerifyProof(q.Token, s.Exporter, s.Peer, q.Proof); err != nil {
			return refuse("join.token", "The node does not hold the token that it names.")
		}
		id, ok := d.Token(q.Token)
		if !ok && asksFirst { // it may have been made a moment ago, elsewhere
			if err := d.Current(ctx); err != nil {
				return refuse("join.no-master", "%s", err)
			}
			id, ok = d.Token(q.Token)
		}
		if !ok {
			return refuse("join.token", "The mesh does not know this token.")
		}
		token = id
	case q.Admin != "":
		if hosts := d.Judges(); hosts != "" { // whoever it is: it says nothing about the name
			return refuse("join.not-here", "%s cannot check an admin's password; ask at %s.", d.Name, hosts)
		}
		if asksFirst { // the admin, or the password, may be new
			if err := d.Current(ctx); err != nil {
				return refuse("join.no-master", "%s", err)
			}
		}
		verifier := d.Admin(q.Admin)
		secret, err := d.challenge(s, q.Admin, verifier)
		if err != nil {
			return refuse("join.password", "The admin's name or password is wrong.")
		}
		actor, mutual = q.Admin, mac(secret, "mesh", s.Exporter, s.Peer, d.Key.Hash())
	}
	v := d.Admit(ctx, s.Peer, q, from, token, actor)
	if v.Code != "admitted" {
		return &Answer{Code: v.Code, Text: v.Text}
	}
	a := &Answer{Code: "admitted", Node: v.Node, Mutual: mutual}
	d.Welcome(a)
	return a
}

// challenge lets the joiner prove an admin's password. The error says nothing.
func (d *Door) challenge(s *Session, name, verifier string) ([]byte, error) {
	var decoy [16]byte
	copy(decoy[:], mac(d.Decoy, "decoy "+name, nil, mesh.KeyHash{}, mesh.KeyHash{}))
	c, err := login.ChallengeOf(verifier, decoy)
	if err != nil {
		return nil, err
	}
	if err := writeFrame(s.Conn, &Answer{Version: Service, Code: "challenge", Challenge: &c}); err != nil {
		return nil, err
	}
	var p proof
	if err := readFrame(s.Conn, &p); err != nil {
		return nil, err
	}
	var secret []byte
	if verifier != "" {
		if secret, err = login.Secret(verifier); err != nil {
			return nil, err
		}
	}
	if verifier == "" || !hmac.Equal(p.MAC, mac(secret, "joiner", s.Exporter, s.Peer, d.Key.Hash())) {
		time.Sleep(d.Fail(name))
		return nil, errFrame
	}
	return secret, nil
}
