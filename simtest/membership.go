package simtest

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"posthouse/appliance/admin"
	"posthouse/mailstore/log/simfs"
	"posthouse/mesh"
	"posthouse/simtest/record"
)

// Burn takes an office's power and everything that it kept, for ever.
func (w *World) Burn(office string) {
	o := w.Office(office)
	o.PowerCut(simfs.LoseAll, DropView)
	w.note("%s burns down", office)
	w.ledger.leaves(o, time.Time{}, nil)
	o.keepState(record.Burnt)
	o.lost.Store(true)
	o.burnt.Store(true)
}

// Revoke puts an office's node out of the mesh, by an admin at another one that
// can; the node goes on running. It returns who then knew at once.
func (w *World) Revoke(office string) (knew []string, err error) {
	o := w.Office(office)
	err = fmt.Errorf("nobody is there to revoke %s", office)
	for _, by := range w.belonging() {
		p := by.process()
		if by == o || p == nil {
			continue
		}
		o.lost.Store(true) // it may hear of it before this is answered
		ctx, cancel := context.WithTimeout(Ctx(), 20*time.Second)
		err = p.node.RevokeNode(ctx, office)
		cancel()
		if s := by.Status(); err != nil && s.Master != "" && !slices.ContainsFunc(s.Members, func(m admin.Member) bool { return m.Name == office }) {
			err = nil // it was carried out, and the answer was too late
		}
		if err != nil {
			o.lost.Store(false)
			continue
		}
		w.note("%s is revoked, at %s", office, by.Name)
		w.ledger.leaves(o, time.Time{}, nil)
		w.keeper.State(office, record.Revoked)
		o.apart.Store(true)
		for _, k := range w.component(by) {
			knew = append(knew, k.Name)
		}
		return knew, nil
	}
	return nil, err
}

// Join lets an office that was apart join with a token, at another office's
// door, and gives it its user. It waits for as long as the limit.
func (w *World) Join(office, at string, limit time.Duration) error {
	o := w.Office(office)
	o.Start()
	w.note("%s asks %s to let it join", office, at)
	err := fmt.Errorf("%s is down", office)
	w.within(time.Minute, func() bool { // until it has started
		if p := o.process(); p != nil {
			err = p.node.Join(Ctx(), admin.JoinRequest{Target: w.token, At: netip.AddrPortFrom(w.Office(at).Addr, 44337).String()})
		}
		return err == nil
	})
	if err != nil {
		return fmt.Errorf("join: %w", err)
	}
	took, ok := w.within(limit, func() bool {
		w.renewToken(o, w.Office(at))
		return o.Status().State == string(mesh.Serving)
	})
	if !ok {
		return fmt.Errorf("%s did not join within %v: %v", office, limit, o.Status().JoinProgress)
	}
	o.apart.Store(false)
	w.note("%s has joined after %v", office, took.Round(time.Second))
	w.learnNodes(o.Status())
	o.keepState(record.On)
	password := "secret"
	_, ok = w.within(limit, func() bool {
		for _, by := range w.belonging() {
			if p := by.process(); p != nil {
				ctx, cancel := context.WithTimeout(Ctx(), 20*time.Second)
				_, err := p.node.CreateUser(ctx, admin.UserChange{Address: office + "@" + Domain, Home: &office, Password: &password})
				cancel()
				if err == nil {
					return true
				}
			}
		}
		return false
	})
	if !ok {
		return fmt.Errorf("nobody could make %s's user", office)
	}
	return nil
}

// renewToken lets the admin of an office that joins at a door ask for another
// token when the mesh says that its own is no good: the clock of who leads now may
// be a day ahead of that of who led when it was made.
func (w *World) renewToken(o, door *Office) {
	if !o.has("join.token") {
		return
	}
	p, by := o.process(), door.process()
	if p == nil || by == nil {
		return
	}
	ctx, cancel := context.WithTimeout(Ctx(), 20*time.Second)
	defer cancel()
	if token, err := by.node.CreateToken(ctx, admin.TokenRequest{}); err == nil {
		w.note("%s gets another token: %v", o.Name, p.node.Join(Ctx(), admin.JoinRequest{Target: token.Secret, At: netip.AddrPortFrom(door.Addr, 44337).String()}))
	}
	time.Sleep(5 * time.Second)
}

// Promote lets an office take the lead without a majority. Those named in forget
// do not come back.
func (w *World) Promote(office string, forget ...string) error {
	p := w.Office(office).process()
	if p == nil {
		return fmt.Errorf("promote: %s is down", office)
	}
	w.promoting.Store(true)
	r, err := p.node.Promote(Ctx(), admin.PromoteRequest{Confirm: true, Forget: forget})
	if err == nil && !r.Done {
		err = fmt.Errorf("promote: not done")
	}
	if err != nil {
		return err
	}
	w.promoted.Store(r.Generation)
	w.note("%s is promoted: generation %d", office, r.Generation)
	return nil
}

// out is a node that was revoked, and how it was shortly after.
type out struct {
	o    *Office
	at   time.Time
	knew []string // the offices that heard of it at once
	hash string   // of its domain state, once all had time to hear of it
}

// hearsay is how long after a revocation a node that can be reached may still
// talk with the revoked one.
const hearsay = 10 * time.Second

// shownFor is how long a way through a third is shown after its last use.
const shownFor = time.Minute

func (x *player) join(o *Office, at ...string) {
	if len(at) == 0 {
		at = []string{x.w.Offices[0].Name}
	}
	x.mask(o, x.r.Plan.Length)
	if err := x.w.Join(o.Name, at[0], x.r.Plan.Length+10*time.Minute); err != nil {
		x.w.violation(HealsInTime, "%v", err)
	}
}

func (x *player) revoke(o *Office) {
	w := x.w
	defer w.decide()()
	if o.apart.Load() {
		return
	}
	var u *out
	_, ok := w.within(x.r.Plan.Length+5*time.Minute, func() bool {
		knew, err := w.Revoke(o.Name)
		if err == nil {
			u = &out{o: o, at: time.Now(), knew: knew}
		}
		return err == nil
	})
	if !ok {
		w.violation(HealsInTime, "%s could not be revoked", o.Name)
		return
	}
	x.mask(o, 1000*time.Hour)
	time.Sleep(hearsay)
	u.hash = o.Status().StateHash
	x.mu.Lock()
	defer x.mu.Unlock()
	x.outs = append(x.outs, u)
}

// promote has an office's admin wait until nobody leads, for so long, and take
// the lead then, as the page says.
func (x *player) promote(o *Office, patience time.Duration, forget ...string) (done bool) {
	_, done = x.w.within(patience, func() bool {
		s := o.Status()
		return s.State == string(mesh.Serving) && s.Master == "" && x.w.Promote(o.Name, forget...) == nil
	})
	return done
}

// mustPromote is promote where nothing else helps.
func (x *player) mustPromote(o *Office, forget ...string) {
	if !x.promote(o, x.r.Plan.Length+5*time.Minute, forget...) {
		x.w.violation(MeshRules, "%s could not be promoted", o.Name)
	}
}

// checkLineage checks that all follow who was promoted.
func (x *player) checkLineage() {
	want := x.w.promoted.Load()
	if want == 0 {
		return
	}
	for _, o := range x.w.belonging() {
		x.w.checked(MeshRules, 1)
		if g := o.Status().Generation; g < want {
			x.w.violation(MeshRules, "%s is of generation %d, another office was promoted to %d", o.Name, g, want)
		}
	}
}

// checkOuts checks that revoked nodes got nothing: nobody lists them, their copy
// of the domain state stood still, and no mail reached them.
func (x *player) checkOuts() {
	w := x.w
	for _, u := range x.outs {
		name := u.o.Name
		for _, o := range w.belonging() {
			w.checked(RevokedIsOut, 1)
			for _, m := range o.Status().Members {
				if m.Name == name {
					w.violation(RevokedIsOut, "%s lists %s, which was revoked", o.Name, name)
				}
			}
		}
		if !u.o.Up() {
			continue
		}
		w.checked(RevokedIsOut, 1)
		if now := u.o.Status().StateHash; u.hash != "" && now != u.hash {
			w.violation(RevokedIsOut, "%s got domain state after it was revoked", name)
		}
		time.Sleep(time.Until(u.at.Add(hearsay + shownFor)))
		for _, m := range u.o.Status().Members {
			w.checked(RevokedIsOut, 1)
			if m.Path == "direct" || strings.HasPrefix(m.Path, "via ") {
				w.violation(RevokedIsOut, "%s still has a line to %s: %s", name, m.Name, m.Path)
			}
		}
		b, err := w.Open(name, false)
		if err != nil {
			continue
		}
		there := map[string]bool{}
		for _, l := range b.Letters {
			there[l.Subject] = true
		}
		w.ledger.mu.Lock()
		attempts := slices.Clone(w.ledger.attempts)
		w.ledger.mu.Unlock()
		for _, a := range attempts {
			if a.to != name+"@"+Domain || !slices.Contains(u.knew, a.at) || a.when.Before(u.at.Add(hearsay)) {
				continue
			}
			w.checked(RevokedIsOut, 1)
			if there[a.subject] {
				w.violation(RevokedIsOut, "%s reached %s, which was revoked", a.subject, name)
			}
		}
	}
}

// detourTime is how long after a line was cut both ends must show the way around.
const detourTime = time.Minute

// detours checks that two offices whose line is cut, and that a third reaches
// both of, go through it. since is when that became so, kept from look to look.
func (x *player) detours(since map[[2]string]time.Time) {
	w := x.w
	open := func(a, b *Office) bool {
		return w.lines[[2]netip.Addr{a.Addr, b.Addr}] == line{} && w.lines[[2]netip.Addr{b.Addr, a.Addr}] == line{}
	}
	var offices []*Office // asked before w.mu is taken: an office's own lock comes first
	for _, o := range w.belonging() {
		if o.settled() {
			offices = append(offices, o)
		}
	}
	for _, a := range offices {
		for _, b := range offices {
			k := [2]string{a.Name, b.Name}
			w.mu.Lock()
			around := a != b && w.lines[[2]netip.Addr{a.Addr, b.Addr}].cut && slices.ContainsFunc(offices, func(c *Office) bool {
				return c != a && c != b && open(a, c) && open(c, b)
			})
			w.mu.Unlock()
			if !around || x.isMasked(a) || x.isMasked(b) {
				delete(since, k)
				continue
			}
			if since[k].IsZero() {
				since[k] = time.Now()
			}
			if time.Since(since[k]) < detourTime {
				continue
			}
			w.checked(MeshRules, 1)
			for _, m := range a.Status().Members {
				if m.Name == b.Name && !strings.HasPrefix(m.Path, "via ") {
					w.violation(MeshRules, "the line between %s and %s is cut, a third reaches both, and %s shows the way as %q", a.Name, b.Name, a.Name, m.Path)
					delete(since, k)
				}
			}
		}
	}
}

// settled reports whether the office's node has run for a while.
func (o *Office) settled() bool {
	p := o.process()
	return p != nil && time.Since(p.began) > detourTime
}
