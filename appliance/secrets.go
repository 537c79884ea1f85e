package appliance

import (
	"context"
	"time"

	"posthouse/appliance/admin"
	"posthouse/appliance/login"
	"posthouse/mesh"
	"posthouse/mesh/domain"
	"posthouse/mesh/identity"
	"posthouse/transport/link"
)

// serviceLogin has log-ins judged by the user's home: one question a stream.
const serviceLogin = "login/1"

// keyring is this node's key for what the domain state holds sealed.
func (n *Node) keyring() identity.Keyring { return identity.Keyring{Key: n.key, Node: n.id} }

// keepSealed puts right what is sealed to the wrong nodes, as far as this node
// is the one to do it. The command that changed a home or the candidates mostly
// did so itself; what is left is: more users than go into one command, commands
// that were under way together, and a mesh that was promoted on a node which
// could not open everything.
func (n *Node) keepSealed(ctx context.Context) error {
	actor := "posthouse on " + n.cfg.Name
	for {
		var again <-chan time.Time
		if e := n.elected(); e != nil {
			if master := e.State().Master; master != 0 {
				r, err := n.state.Mend(master)
				if err == nil && r != nil {
					_, err = n.proposeAs(ctx, actor, r)
					again = time.After(time.Second) // there may be more
				}
				if err != nil && ctx.Err() == nil {
					n.part("secrets").Warn("secrets could not be sealed anew", "err", err)
					again = time.After(10 * time.Second)
				}
			}
		}
		select {
		case <-n.seals:
		case <-again:
		case <-ctx.Done():
			return nil
		}
	}
}

// pokeSeals has keepSealed look again.
func (n *Node) pokeSeals() {
	select {
	case n.seals <- struct{}{}:
	default:
	}
}

// proposeSealed proposes a command with a password in it. make seals it by what
// holds now; when that changed in between, it is sealed once more.
func (n *Node) proposeSealed(ctx context.Context, make func() (domain.Body, error)) error {
	for try := 0; ; try++ {
		body, err := make()
		if err != nil {
			return err
		}
		r, err := n.propose(ctx, body)
		if r.Code != domain.Resealed || try == 3 {
			return err
		}
	}
}

// verifierHere is what this node knows of a user's password for the questions of
// others: only the home answers, and only if it can open the verifier.
func (n *Node) verifierHere(user mesh.ID) (login.Credential, string, bool) {
	u, ok := n.state.User(user)
	if !ok || u.Home != n.id || u.Disabled || u.Verifier == nil {
		return login.Credential{}, "", false
	}
	v, err := n.state.Verifier(u)
	return credential(u), v, err == nil
}

// askHome has a home judge a password.
func (n *Node) askHome(ctx context.Context, home mesh.NodeID, q login.Question) (login.Verdict, error) {
	if home == n.id {
		return 0, domain.ErrSealed // it was re-pointed here by somebody who could not open it
	}
	ctx, cancel := context.WithTimeout(ctx, login.AnswerLimit)
	defer cancel()
	conn, err := n.link.Dial(ctx, home, serviceLogin, link.Control)
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	stop := endWith(ctx, conn)
	defer stop()
	return login.Ask(conn, q)
}

// judge serves the questions of other nodes until ctx ends.
func (n *Node) judge(ctx context.Context) error {
	l, err := n.link.Listen(serviceLogin)
	if err != nil {
		return err
	}
	return n.serveStreams(ctx, l, "login", func(ctx context.Context, conn *link.Conn) error {
		ctx, cancel := context.WithTimeout(ctx, login.AnswerLimit)
		defer cancel()
		defer conn.Close()
		stop := endWith(ctx, conn)
		defer stop()
		return n.desk.Serve(ctx, conn, conn.Peer())
	})
}

// unreadable says what a node that becomes master by hand cannot do without the
// candidates; nothing where it is one.
func (n *Node) unreadable() []string {
	if n.state.Holds() {
		return nil
	}
	all, home := n.state.UserCount(n.id)
	return []string{admin.Errorf(admin.Conflict, "mesh.sealed",
		"This node was no candidate: it can check the passwords of its own %d of %d users only. Each of the others logs in at his own office, and elsewhere when that office is reached; no mail client's certificate is signed until a node that could lead before is back.", home, all).Text}
}
