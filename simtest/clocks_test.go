package simtest

import (
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/emersion/go-imap/v2"

	"posthouse/appliance/admin"
)

const year = 365 * 24 * time.Hour

// Invariants 1, 5 and 6, F16. Clocks jump by hours and years while mail waits for
// an office that is cut off and for an outside that is shut, over stops and power
// cuts: nothing is given up early, and mail inside goes as ever.
func TestMailFlowsWhateverTheClocksSay(t *testing.T) {
	tale(t, 3, func(w *World) {
		x := &player{w: w}
		w.Outside.Shut()
		w.Send(5).By("hq").To("keep@" + outsideDomain)
		w.Cut("praha").FromAll()
		w.Send(5).By("hq").To("praha")
		for i, by := range []time.Duration{9 * year, -3 * year, 4 * time.Hour, -time.Minute} {
			for j, o := range w.Offices {
				o.Clock(by * time.Duration(1-2*(j&1))) // not all the same way
			}
			time.Sleep(time.Minute)
			for _, o := range w.Offices {
				x.probe(o)
				w.Send(2).From(o.Name).To("hq", "plzen", "praha")
			}
			switch i {
			case 0:
				w.Stop("hq")
				w.Start("hq")
			case 1:
				w.Kill("hq", "plzen")
				w.Start("hq", "plzen")
			}
			time.Sleep(20 * time.Minute)
		}
		w.HealAll()
		w.Until("what waited for praha is there", time.Minute, func() bool { return w.whole() && w.drained() })
		w.Outside.Open()
		w.Until("what waited for the outside has gone", 2*time.Hour, func() bool { return w.Office("hq").Status().QueueOutside == 0 })
	})
}

// What people read is the time that the office's own clock shows.
func TestDatesAreThoseOfTheOfficesClock(t *testing.T) {
	tale(t, 2, func(w *World) {
		w.Office("plzen").Clock(5 * year)
		w.Send(1).By("hq").To("plzen")
		w.Until("it is there", time.Minute, func() bool { in, err := w.Inbox("plzen"); return err == nil && len(in) == 1 })
		c, err := w.Login("plzen", "secret")
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if _, err := c.Select("INBOX", nil).Wait(); err != nil {
			t.Fatal(err)
		}
		section := &imap.FetchItemBodySection{Specifier: imap.PartSpecifierHeader, Peek: true}
		got, err := c.Fetch(imap.SeqSetNum(1), &imap.FetchOptions{InternalDate: true, BodySection: []*imap.FetchItemBodySection{section}}).Collect()
		if err != nil {
			t.Fatal(err)
		}
		right, later := time.Now().Format(" Jan 2006 "), time.Now().Add(5*year).Format(" Jan 2006 ")
		if d := time.Until(got[0].InternalDate); d < 5*year-time.Hour || d > 5*year {
			t.Errorf("INTERNALDATE is %v", got[0].InternalDate)
		}
		header := string(got[0].FindBodySection(section))
		if strings.Count(header, right) == 0 || strings.Count(header, later) == 0 {
			t.Errorf("it passed an office in%sand one in%s:\n%s", right, later, header)
		}
	})
}

// A token is good for a day by the clock of who leads. When that was set, the
// node that joins is told so, and another token leads in; that its own clock is
// years off it is told too, and keeps it from nothing.
func TestATokenOfAnotherDayIsNamedAndAnotherOneLeadsIn(t *testing.T) {
	founded(t, []string{"hq", "plzen"}, 1, func(t *testing.T, w *World) {
		hq, plzen := w.Office("hq"), w.Office("plzen")
		token := func() string {
			x, err := hq.Ops().CreateToken(Ctx(), admin.TokenRequest{})
			if err != nil {
				t.Fatal(err)
			}
			return x.Secret
		}
		old := token()
		hq.Clock(3 * 24 * time.Hour)
		plzen.Clock(-8 * year)
		w.join(t, "plzen", admin.JoinRequest{Target: old, At: w.door("hq")})
		w.Until("plzen is told", time.Minute, func() bool { return plzen.has("join.token") })
		said := plzen.Status().JoinProgress
		for _, want := range []string{"join.clock: This machine's clock differs from the mesh's by", "expired"} {
			if !slices.ContainsFunc(said, func(l string) bool { return strings.Contains(l, want) }) {
				t.Errorf("plzen's admin reads %q", said)
			}
		}
		if x, err := hq.Ops().Tokens(Ctx()); err != nil || x[0].State != "expired" {
			t.Errorf("the list of tokens says %+v, %v", x, err)
		}
		w.join(t, "plzen", admin.JoinRequest{Target: token(), At: w.door("hq")})
		w.Until("plzen is in", time.Minute, w.whole)
	})
}
