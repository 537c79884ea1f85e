package appliance

import (
	"context"
	"crypto/rand"
	"errors"
	"slices"
	"strings"

	"posthouse/appliance/admin"
	"posthouse/appliance/login"
	"posthouse/mesh"
	"posthouse/mesh/domain"
)

// newID returns a random id.
func newID() (id mesh.ID) {
	rand.Read(id[:])
	return id
}

// propose gives a command to the mesh in the name of whoever asks in ctx and
// returns when it holds here. Refusals and a missing master become *admin.Error.
func (n *Node) propose(ctx context.Context, body domain.Body) (domain.Result, error) {
	actor := admin.ActorOf(ctx).Name
	if actor == "" || actor == "local" {
		actor = "posthouse on " + n.cfg.Name
	}
	return n.proposeAs(ctx, actor, body)
}

// refused turns a refusal of the domain state into an error for people.
func refused(err error) error {
	var r *domain.Refusal
	if !errors.As(err, &r) {
		return err
	}
	kind, code := admin.Usage, "domain."+strings.ReplaceAll(r.Result.Code.String(), " ", "-")
	switch r.Result.Code {
	case domain.NotFound, domain.TokenUnknown:
		kind = admin.NotFound
	case domain.NameTaken, domain.Conflict, domain.InUse, domain.Founded, domain.NotPending, domain.NotFounded:
		kind = admin.Conflict
	case domain.Limit:
		kind = admin.Unavailable
	}
	return &admin.Error{Kind: kind, Code: code, Text: sentence(r.Result.Text)}
}

// sentence makes a text a sentence.
func sentence(s string) string {
	if s == "" {
		return s
	}
	// An address or a quoted name at the beginning stays as it is.
	if first, _, _ := strings.Cut(s, " "); !strings.Contains(first, "@") {
		s = strings.ToUpper(s[:1]) + s[1:]
	}
	if !strings.HasSuffix(s, ".") {
		s += "."
	}
	return s
}

// user finds a user by any address, for a change.
func (n *Node) user(address string) (*domain.User, error) {
	if u, ok := n.state.Login(address); ok {
		return u, nil
	}
	return nil, admin.Errorf(admin.NotFound, "user.unknown", "There is no user %s.", address)
}

func (n *Node) nodeName(id mesh.NodeID) string {
	if x, ok := n.state.Node(id); ok {
		return x.Name
	}
	return id.String()
}

func (n *Node) nodeByName(name string) (*domain.Node, error) {
	if x, ok := n.state.NodeByName(name); ok {
		return x, nil
	}
	var names []string
	for _, x := range n.state.Members() {
		names = append(names, x.Name)
	}
	return nil, admin.Errorf(admin.NotFound, "node.unknown", "There is no node %q; its nodes are: %s.", name, strings.Join(names, ", "))
}

func (n *Node) apiUser(u *domain.User) admin.User {
	return admin.User{Address: u.Address, Name: u.Name, Home: n.nodeName(u.Home), Aliases: u.Aliases, Admin: u.Role == domain.RoleMeshAdmin, ID: u.ID.String(), Mailbox: u.Mailbox.String(),
		Full: n.ready() == nil && n.mailboxFull(u.Home, u.Mailbox)}
}

// Users implements admin.Operations.
func (n *Node) Users(context.Context) ([]admin.User, error) {
	us := n.state.Users()
	out := make([]admin.User, len(us))
	for i, u := range us {
		out[i] = n.apiUser(u)
	}
	return out, nil
}

// CreateUser implements admin.Operations.
func (n *Node) CreateUser(ctx context.Context, r admin.UserChange) (admin.User, error) {
	u := domain.User{ID: newID(), Mailbox: mesh.MailboxID(newID()), Address: r.Address, Home: n.id}
	if r.Name != nil {
		u.Name = *r.Name
	}
	if r.Home != nil {
		home, err := n.nodeByName(*r.Home)
		if err != nil {
			return admin.User{}, err
		}
		u.Home = home.ID
	}
	if r.Admin != nil && *r.Admin {
		u.Role = domain.RoleMeshAdmin
	}
	var v []byte
	if r.Password != nil {
		var err error
		if v, err = n.verifier(*r.Password); err != nil {
			return admin.User{}, err
		}
	}
	if err := n.proposeSealed(ctx, func() (domain.Body, error) {
		sealed, err := n.sealed(u.ID, v, u.Home)
		x := u
		x.Verifier = sealed
		return &domain.CreateUser{User: x}, err
	}); err != nil {
		return admin.User{}, err
	}
	got, err := n.user(r.Address)
	if err != nil {
		return admin.User{}, err
	}
	return n.apiUser(got), nil
}

func (n *Node) verifier(password string) ([]byte, error) {
	v, err := login.New(password, n.env.Random)
	if errors.Is(err, login.ErrPassword) {
		return nil, admin.Errorf(admin.Usage, "user.password", "A password has 1 to 1024 bytes.")
	}
	return []byte(v), err
}

// sealed seals a new verifier; nil stays nil.
func (n *Node) sealed(user mesh.ID, verifier []byte, home mesh.NodeID) (*domain.Sealed, error) {
	if verifier == nil {
		return nil, nil
	}
	if !n.state.Founded() {
		return nil, noMeshYet
	}
	return n.state.SealVerifier(user, verifier, home)
}

// ChangeUser implements admin.Operations.
func (n *Node) ChangeUser(ctx context.Context, r admin.UserChange) (admin.User, error) {
	u, err := n.user(r.Address)
	if err != nil {
		return admin.User{}, err
	}
	if r.Home != nil {
		home, err := n.nodeByName(*r.Home)
		if err != nil {
			return admin.User{}, err
		}
		if was, ok := n.state.Node(u.Home); home.ID != u.Home && ok && was.Member() {
			return admin.User{}, admin.Errorf(admin.Usage, "user.move", "Moving a mailbox to another office is not possible yet: %s stays at %s.", u.Address, n.nodeName(u.Home))
		}
		if home.ID != u.Home { // what is there is lost: an empty mailbox
			if _, err := n.propose(ctx, &domain.SetHome{User: u.ID, Home: home.ID, IfVersion: u.HomeVersion}); err != nil {
				return admin.User{}, err
			}
		}
	}
	if r.Password != nil {
		v, err := n.verifier(*r.Password)
		if err != nil {
			return admin.User{}, err
		}
		if err := n.proposeSealed(ctx, func() (domain.Body, error) {
			x, ok := n.state.User(u.ID)
			if !ok {
				x = u // the master will refuse it
			}
			sealed, err := n.sealed(u.ID, v, x.Home)
			return &domain.SetPassword{User: u.ID, Verifier: sealed}, err
		}); err != nil {
			return admin.User{}, err
		}
	}
	if r.Name != nil || r.Admin != nil {
		c := domain.UpdateUser{User: u.ID, Name: r.Name}
		if r.Admin != nil {
			role := domain.RoleUser
			if *r.Admin {
				role = domain.RoleMeshAdmin
			}
			c.Role = &role
		}
		if _, err := n.propose(ctx, &c); err != nil {
			return admin.User{}, err
		}
	}
	if u, err = n.user(r.Address); err != nil {
		return admin.User{}, err
	}
	return n.apiUser(u), nil
}

// DeleteUser implements admin.Operations.
func (n *Node) DeleteUser(ctx context.Context, address string) error {
	u, err := n.user(address)
	if err != nil {
		return err
	}
	if u.Role == domain.RoleMeshAdmin && !slices.ContainsFunc(n.state.Users(), func(x *domain.User) bool { return x.ID != u.ID && x.Role == domain.RoleMeshAdmin }) {
		return admin.Errorf(admin.Conflict, "user.last-admin", "%s is the last admin of the mesh; make another one first.", u.Address)
	}
	_, err = n.propose(ctx, &domain.DeleteUser{User: u.ID})
	return err
}

// target names somebody for a group or alias: a user or group of ours by id,
// anybody else by address.
func (n *Node) target(address string) domain.Target {
	if u, ok := n.state.Login(address); ok {
		return domain.Target{ID: u.ID}
	}
	if g := n.groupByAddress(address); g != nil {
		return domain.Target{ID: g.ID}
	}
	return domain.Target{Address: address}
}

func (n *Node) groupByAddress(address string) *domain.Group {
	a, err := mesh.ParseAddress(address)
	if err != nil {
		return nil
	}
	for _, g := range n.state.Groups() {
		if b, err := mesh.ParseAddress(g.Address); err == nil && b.Key() == a.Key() {
			return g
		}
	}
	return nil
}

// targetAddress is target the other way round.
func (n *Node) targetAddress(t domain.Target) string {
	if u, ok := n.state.User(t.ID); ok {
		return u.Address
	}
	if g, ok := n.state.Group(t.ID); ok {
		return g.Address
	}
	return t.Address
}

func (n *Node) apiGroup(g *domain.Group) admin.Group {
	out := admin.Group{Address: g.Address, Name: g.Name, Owner: g.Owner, Outside: g.Outside}
	for _, t := range g.Members {
		out.Members = append(out.Members, n.targetAddress(t))
	}
	return out
}

// Groups implements admin.Operations.
func (n *Node) Groups(context.Context) ([]admin.Group, error) {
	gs := n.state.Groups()
	out := make([]admin.Group, len(gs))
	for i, g := range gs {
		out[i] = n.apiGroup(g)
	}
	return out, nil
}

// PutGroup implements admin.Operations.
func (n *Node) PutGroup(ctx context.Context, r admin.Group) (admin.Group, error) {
	g := domain.Group{ID: newID(), Address: r.Address, Name: r.Name, Owner: r.Owner, Outside: r.Outside}
	if old := n.groupByAddress(r.Address); old != nil {
		g.ID, g.Aliases = old.ID, old.Aliases
	}
	for _, m := range r.Members {
		g.Members = append(g.Members, n.target(m))
	}
	if _, err := n.propose(ctx, &domain.PutGroup{Group: g}); err != nil {
		return admin.Group{}, err
	}
	got, ok := n.state.Group(g.ID)
	if !ok {
		return admin.Group{}, admin.Errorf(admin.Conflict, "group.gone", "Somebody removed %s at the same time.", r.Address)
	}
	return n.apiGroup(got), nil
}

// DeleteGroup implements admin.Operations.
func (n *Node) DeleteGroup(ctx context.Context, address string) error {
	g := n.groupByAddress(address)
	if g == nil {
		return admin.Errorf(admin.NotFound, "group.unknown", "There is no group %s.", address)
	}
	_, err := n.propose(ctx, &domain.DeleteGroup{ID: g.ID})
	return err
}

// Aliases implements admin.Operations.
func (n *Node) Aliases(context.Context) ([]admin.Alias, error) {
	out := []admin.Alias{}
	for _, a := range n.state.Aliases() {
		for _, t := range a.Targets {
			out = append(out, admin.Alias{Address: a.Address, Target: n.targetAddress(t)})
		}
	}
	return out, nil
}

// CreateAlias implements admin.Operations.
func (n *Node) CreateAlias(ctx context.Context, r admin.Alias) (admin.Alias, error) {
	t := n.target(r.Target)
	if _, err := n.propose(ctx, &domain.PutAlias{Alias: domain.Alias{ID: newID(), Address: r.Address, Targets: []domain.Target{t}}}); err != nil {
		return admin.Alias{}, err
	}
	return admin.Alias{Address: r.Address, Target: n.targetAddress(t)}, nil
}

// DeleteAlias implements admin.Operations.
func (n *Node) DeleteAlias(ctx context.Context, address string) error {
	a, err := mesh.ParseAddress(address)
	if err != nil {
		return admin.Errorf(admin.Usage, "alias.address", "%q is not an address.", address)
	}
	for _, x := range n.state.Aliases() {
		if b, err := mesh.ParseAddress(x.Address); err == nil && b.Key() == a.Key() {
			_, err := n.propose(ctx, &domain.DeleteAlias{ID: x.ID})
			return err
		}
	}
	return admin.Errorf(admin.NotFound, "alias.unknown", "There is no alias %s.", address)
}
