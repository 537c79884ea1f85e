package appliance

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"posthouse/appliance/admin"
	"posthouse/mesh"
	"posthouse/mesh/domain"
	"posthouse/mesh/identity"
)

// Tokens implements admin.Operations.
func (n *Node) Tokens(context.Context) ([]admin.Token, error) {
	out := []admin.Token{}
	for _, t := range n.state.Tokens() {
		x := admin.Token{ID: t.ID.String(), Reusable: t.Reusable, Expires: t.Expires.Std(), State: "open"}
		var used []string
		for _, id := range t.UsedBy {
			used = append(used, n.nodeName(id))
		}
		x.UsedBy = strings.Join(used, ", ")
		switch {
		case t.Revoked != 0:
			x.State = "revoked"
		case len(used) > 0 && !t.Reusable:
			x.State = "used"
		case n.now().After(t.Expires.Std()):
			x.State = "expired"
		}
		out = append(out, x)
	}
	return out, nil
}

// CreateToken implements admin.Operations: it pins the candidates that are most
// likely to be there.
func (n *Node) CreateToken(ctx context.Context, r admin.TokenRequest) (admin.Token, error) {
	if r.Hours == 0 {
		r.Hours = 24
	}
	if r.Hours < 0 || r.Hours > 24*30 {
		return admin.Token{}, admin.Errorf(admin.Usage, "token.hours", "A token is good for 1 to 720 hours.")
	}
	members := n.state.Members()
	slices.SortStableFunc(members, func(a, b *domain.Node) int { return b.Priority - a.Priority })
	keys := []mesh.KeyHash{n.key.Hash()}
	for _, x := range members {
		if x.ID != n.id && x.Voter {
			keys = append(keys, x.Key)
		}
	}
	t, err := identity.NewToken(n.env.Random, keys[:min(len(keys), identity.MaxPins)])
	if err != nil {
		return admin.Token{}, err
	}
	c := &domain.CreateToken{ID: newID(), Public: t.PublicKey(), Lifetime: int64(r.Hours) * 3600_000, Reusable: r.Reusable, Note: r.Name, Plain: r.Member}
	if _, err := n.propose(ctx, c); err != nil {
		return admin.Token{}, err
	}
	return admin.Token{ID: c.ID.String(), Secret: t.Encode(), Reusable: r.Reusable, Expires: n.now().Add(time.Duration(r.Hours) * time.Hour), State: "open"}, nil
}

// RevokeToken implements admin.Operations.
func (n *Node) RevokeToken(ctx context.Context, id string) error {
	t, err := mesh.ParseID(id)
	if err != nil {
		return admin.Errorf(admin.Usage, "token.id", "%q is not a token's id; see posthouse mesh token list.", id)
	}
	_, err = n.propose(ctx, &domain.RevokeToken{ID: t})
	return err
}

// PendingNodes implements admin.Operations.
func (n *Node) PendingNodes(context.Context) ([]admin.Pending, error) {
	out := []admin.Pending{}
	for _, p := range n.state.Applications() {
		if p.StateAt(domain.TimeOf(n.now())) != domain.PendingOpen {
			continue
		}
		x := admin.Pending{ID: p.ID.String(), Name: p.Name, Host: p.Host, From: strings.Join(p.Addresses, ", "), Code: p.Code, Since: p.Asked.Std(), State: "pending"}
		if old, ok := n.state.NodeByName(p.Name); ok {
			x.Clash = fmt.Sprintf("A node called %s exists; revoke it first if this one replaces it.", old.Name)
		}
		out = append(out, x)
	}
	return out, nil
}

func (n *Node) application(id string) (*domain.Pending, error) {
	p, err := mesh.ParseID(id)
	if err == nil {
		if x, ok := n.state.Pending(p); ok {
			return x, nil
		}
	}
	return nil, admin.Errorf(admin.NotFound, "pending.unknown", "No node with the id %q waits; see posthouse mesh pending.", id)
}

// Approve implements admin.Operations.
func (n *Node) Approve(ctx context.Context, id string) error {
	p, err := n.application(id)
	if err != nil {
		return err
	}
	if p.Node == 0 || p.Seal.IsZero() {
		return admin.Errorf(admin.Conflict, "pending.old", "That application does not say which node it is from: have %s ask again.", p.Name)
	}
	admission := &domain.AdmitNode{ID: p.Node, Name: p.Name, Host: p.Host, Key: p.Key, Addresses: p.Addresses, Voter: !p.Plain, Level: 1, Pending: p.ID, Seal: p.Seal}
	_, err = n.propose(ctx, admission)
	return err
}

// Refuse implements admin.Operations.
func (n *Node) Refuse(ctx context.Context, id string) error {
	p, err := n.application(id)
	if err != nil {
		return err
	}
	_, err = n.propose(ctx, &domain.RefusePending{ID: p.ID})
	return err
}

// ChangeNode implements admin.Operations.
func (n *Node) ChangeNode(ctx context.Context, r admin.NodeChange) error {
	x, err := n.nodeByName(r.Name)
	if err != nil {
		return err
	}
	if r.Voter != nil || r.Gateway != nil || r.Priority != nil {
		if _, err := n.propose(ctx, &domain.UpdateNode{Node: x.ID, Voter: r.Voter, Gateway: r.Gateway, Priority: r.Priority}); err != nil {
			return err
		}
	}
	if r.Replaces != "" {
		return n.replace(ctx, r.Replaces, x)
	}
	return nil
}

// replace gives the people of nodes that were lost, all of one name, their home
// at another node.
func (n *Node) replace(ctx context.Context, lost string, by *domain.Node) error {
	found := false
	for _, old := range n.state.Nodes() {
		if _, people := n.state.UserCount(old.ID); old.Member() || people == 0 || !strings.EqualFold(old.Name, lost) {
			continue
		}
		found = true
		if _, err := n.propose(ctx, &domain.ReplaceNode{Old: old.ID, New: by.ID}); err != nil {
			return err
		}
	}
	if !found {
		return admin.Errorf(admin.NotFound, "node.nobody", "No node called %s was put out of the mesh with people whose home it was; a node that is gone is revoked first.", lost)
	}
	return nil
}

// onMaster runs f here if this node leads, else asks the master.
func (n *Node) onMaster(ctx context.Context, c call, f func() error) error {
	e := n.elected()
	if e == nil {
		return admin.Errorf(admin.Unavailable, "mesh.fresh", "This node belongs to no mesh yet.")
	}
	switch master := e.State().Master; master {
	case 0:
		return admin.Errorf(admin.Unavailable, "mesh.no-master", "No master can be reached now.")
	case n.id:
		return f()
	default:
		if _, err := n.ask(ctx, master, c); err != nil {
			return admin.Errorf(admin.Unavailable, "mesh.master", "The master could not do it: %v.", err)
		}
		return nil
	}
}

// Transfer implements admin.Operations.
func (n *Node) Transfer(ctx context.Context, name string) error {
	x, err := n.nodeByName(name)
	if err != nil {
		return err
	}
	if e := n.elected(); e != nil && e.State().Master == x.ID {
		return admin.Errorf(admin.Conflict, "mesh.leads", "%s leads the mesh already.", name)
	}
	return n.onMaster(ctx, call{What: callTransfer, Node: x.ID}, func() error { return n.elected().TransferTo(ctx, x.ID) })
}

// RevokeNode implements admin.Operations: the vote goes first, then the key.
func (n *Node) RevokeNode(ctx context.Context, name string) error {
	x, err := n.nodeByName(name)
	if err != nil {
		return err
	}
	if e := n.elected(); e != nil && e.State().Master == x.ID {
		if x.ID == n.id {
			return admin.Errorf(admin.Conflict, "mesh.self", "%s leads the mesh: hand the lead over first (posthouse mesh transfer), then revoke it from another node.", name)
		}
		heir := n.id
		if err := n.onMaster(ctx, call{What: callTransfer, Node: heir}, func() error { return nil }); err != nil {
			return err
		}
		if err := n.waitMaster(ctx, func(m mesh.NodeID) bool { return m != 0 && m != x.ID }); err != nil {
			return err
		}
	}
	if err := n.onMaster(ctx, call{What: callWithdraw, Node: x.ID}, func() error { return n.elected().Withdraw(ctx, x.ID) }); err != nil {
		return err
	}
	_, err = n.propose(ctx, &domain.RevokeNode{Node: x.ID})
	return err
}

// waitMaster waits until the master is as f wants it.
func (n *Node) waitMaster(ctx context.Context, f func(mesh.NodeID) bool) error {
	ctx, cancel := context.WithTimeout(ctx, callLimit)
	defer cancel()
	for {
		changed := n.live.wait()
		if f(n.elected().State().Master) {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return admin.Errorf(admin.Unavailable, "mesh.no-master", "The lead was not handed over in time.")
		}
	}
}

// Promote implements admin.Operations.
func (n *Node) Promote(ctx context.Context, r admin.PromoteRequest) (admin.PromoteResult, error) {
	e := n.elected()
	if e == nil {
		return admin.PromoteResult{}, admin.Errorf(admin.Unavailable, "mesh.fresh", "This node belongs to no mesh yet.")
	}
	s := e.State()
	ids := func(names []string) (out []mesh.NodeID, err error) {
		for _, name := range names {
			x, err := n.nodeByName(name)
			if err != nil {
				return nil, err
			}
			if x.ID == n.id {
				return nil, admin.Errorf(admin.Usage, "mesh.self", "%s is the node that is to lead.", name)
			}
			out = append(out, x.ID)
		}
		return out, nil
	}
	revoke, err := ids(r.Revoke)
	if err != nil {
		return admin.PromoteResult{}, err
	}
	forget, err := ids(r.Forget)
	if err != nil {
		return admin.PromoteResult{}, err
	}
	if s.Master != 0 && s.Rival.Generation == 0 {
		return admin.PromoteResult{}, &admin.Error{Kind: admin.Conflict, Code: "mesh.has-master", Text: fmt.Sprintf("%s leads the mesh and can be reached: there is nothing to take over.", n.nodeName(s.Master)), Next: "To hand the lead over: posthouse mesh transfer."}
	}
	res := admin.PromoteResult{Generation: s.Authority.Generation + 1, MayLose: []string{
		fmt.Sprintf("This node's copy of the domain state stands at change %d, last confirmed %s.", s.Applied, when(s.Contact)),
		"Changes that the other nodes made since then will not hold; the page will list them when they return.",
		fmt.Sprintf("Mail is not affected: what waits at the others leaves when they return. Can be reached now: %d of %d nodes that vote.", s.Reached, len(s.Voters)),
	}}
	res.MayLose = append(res.MayLose, n.unreadable()...)
	if !r.Confirm {
		return res, nil
	}
	p, err := e.Promote(ctx)
	if err != nil {
		return res, admin.Errorf(admin.Conflict, "mesh.promote", "%s", sentence(err.Error()))
	}
	for _, c := range p.Uncommitted {
		res.MayLose = append(res.MayLose, "Now holds, though nobody knows whether it did before: "+c.Text)
	}
	if _, err := n.propose(ctx, &domain.Promote{Lineage: p.Lineage.ID, Generation: p.Lineage.Generation, Fork: p.Lineage.Fork, Revoke: revoke, Forget: forget}); err != nil {
		return res, err
	}
	res.Done, res.Generation, res.Term = true, p.Lineage.Generation, e.State().Authority.Term
	return res, nil
}

func when(t time.Time) string {
	if t.IsZero() {
		return "never since this start"
	}
	return t.UTC().Format(time.RFC3339)
}

// Forked implements admin.Operations.
func (n *Node) Forked(context.Context) ([]admin.ForkedCommand, error) {
	out := []admin.ForkedCommand{}
	if e := n.elected(); e != nil {
		for _, c := range e.State().Forked {
			out = append(out, admin.ForkedCommand{Index: c.Index, Time: c.At, Actor: c.Actor, What: c.Text})
		}
	}
	return out, nil
}

// Settings implements admin.Operations.
func (n *Node) Settings(context.Context) (admin.Settings, error) {
	s := n.state.Settings()
	return admin.Settings{MaxMessage: n.maxMessage(), Quota: s.Quota, Smarthost: s.Smarthost, ClientName: s.ClientName, Postmaster: n.targetAddress(domain.Target{ID: s.Postmaster})}, nil
}

// ChangeSettings implements admin.Operations.
func (n *Node) ChangeSettings(ctx context.Context, r admin.SettingsChange) (admin.Settings, error) {
	c := &domain.SetSettings{MaxMessage: r.MaxMessage, Quota: r.Quota, Smarthost: r.Smarthost, ClientName: r.ClientName}
	if r.Postmaster != nil {
		t := n.target(*r.Postmaster)
		if t.ID.IsZero() {
			return admin.Settings{}, admin.Errorf(admin.NotFound, "user.unknown", "There is no user or group %s.", *r.Postmaster)
		}
		c.Postmaster = &t.ID
	}
	if _, err := n.propose(ctx, c); err != nil {
		return admin.Settings{}, err
	}
	return n.Settings(ctx)
}
