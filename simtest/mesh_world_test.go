package simtest

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"posthouse/appliance/admin"
	"posthouse/mesh"
)

// story runs a test of the mesh in a bubble: offices that have founded it.
func story(t *testing.T, offices []string, f func(t *testing.T, w *World)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		w := NewWorld(t, offices...)
		defer w.Close()
		w.Found()
		f(t, w)
	})
}

var (
	two   = []string{"hq", "plzen"}
	three = []string{"hq", "plzen", "praha"}
)

// sees is how an office shows a node; the zero Member when it does not.
func (o *Office) sees(name string) admin.Member {
	for _, m := range o.Status().Members {
		if m.Name == name {
			return m
		}
	}
	return admin.Member{}
}

func (o *Office) condition(name string) string {
	o.w.tb.Helper()
	for _, c := range o.Status().Conditions {
		if c.Name == name {
			return c.Text
		}
	}
	return ""
}

// mail sends messages from an office to another's user and returns how many
// the user then has to have.
func (w *World) mail(from, to, subject string, n int) {
	w.tb.Helper()
	for i := range n {
		if err := w.Submit(from, "somebody@example.net", to+"@"+Domain, fmt.Sprintf("%s %d", subject, i)); err != nil {
			w.tb.Fatalf("send %s %d: %v", subject, i, err)
		}
	}
}

// got reports whether a user has exactly these subjects with the numbers 0 to
// n-1, in order, each once.
func (w *World) got(office, subject string, n int) bool {
	w.tb.Helper()
	all, err := w.Inbox(office)
	if err != nil {
		return false
	}
	var want, have []string
	for i := range n {
		want = append(want, fmt.Sprintf("%s %d", subject, i))
	}
	for _, s := range all {
		if len(s) > len(subject) && s[:len(subject)+1] == subject+" " {
			have = append(have, s)
		}
	}
	if len(have) > n {
		w.tb.Fatalf("%s has %q, want %d", office, have, n)
	}
	ok := slices.Equal(have, want)
	if !ok && len(have) == n { // time does not mend it
		w.tb.Fatalf("%s has them in another order: %q", office, have)
	}
	return ok
}

// works checks that the mesh is whole and that each office's mail reaches each.
func (w *World) works(subject string) {
	w.tb.Helper()
	w.Until("the mesh is whole: "+subject, time.Minute, w.whole)
	w.Until("all copies of the domain state are equal: "+subject, 15*time.Second, w.Equal)
	for _, a := range w.Offices {
		for _, b := range w.Offices {
			w.mail(a.Name, b.Name, subject+" from "+a.Name, 2)
		}
	}
	for _, a := range w.Offices {
		for _, b := range w.Offices {
			w.Until("mail from "+a.Name+" to "+b.Name+": "+subject, 15*time.Second, func() bool { return w.got(b.Name, subject+" from "+a.Name, 2) })
		}
	}
}

// addUser makes a user at an office, by an admin who sits at another.
func (w *World) addUser(at, name, home string) error {
	password := "secret"
	_, err := w.Office(at).Ops().CreateUser(Ctx(), admin.UserChange{Address: name + "@" + Domain, Home: &home, Password: &password})
	return err
}

// moves gives a stopped office another address: 10.0.net.1.
func (w *World) moves(name string, net byte) {
	w.tb.Helper()
	o := w.Office(name)
	old := o.Addr.String() + ":"
	o.Addr = netip.AddrFrom4([4]byte{10, 0, net, 1})
	w.note("%s moves from %s to %s", name, old, o.Addr)
	c := *o.cfg
	for _, at := range []*string{&c.Listen.SMTP, &c.Listen.Submission, &c.Listen.IMAP, &c.Listen.Mesh} {
		*at = strings.Replace(*at, old, o.Addr.String()+":", 1)
	}
	c.Advertise = []string{c.Listen.Mesh}
	o.cfg = &c
}

const (
	unreachable = string(mesh.Unreachable)
	serving     = string(mesh.Serving)
	left        = string(mesh.Left)
)
