package web

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"html/template"
	"math"
	"net/http"
	"strings"
	"time"

	"posthouse/appliance/admin"
)

// functions are what templates may call beside the built-in ones.
var functions = template.FuncMap{
	"ago":  ago,
	"utc":  func(t time.Time) string { return t.UTC().Format(time.RFC3339) },
	"ms":   func(f float64) string { return fmt.Sprintf("%.1f ms", f) },
	"age":  age,
	"join": strings.Join,
}

// ago prints how long ago a time was, in the unit that a person would use.
func ago(t time.Time) string {
	if t.IsZero() {
		return "–"
	}
	return admin.Spoken(time.Since(t))
}

// age prints how old the oldest of something is; nothing is no age.
func age(s int64) string {
	if s <= 0 {
		return "–"
	}
	return admin.Spoken(time.Duration(s) * time.Second)
}

// frame is what every page has.
type frame struct {
	Title, Page string
	Actor       admin.Actor
	Status      admin.Status
	Command     string // the page's twin on the command line
	JSON        string // and as JSON
	Body        any
}

// page wraps a page that needs a logged-in admin.
func (s *Server) page(name string, f func(context.Context, *frame) error) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		who := s.actor(r)
		if !who.Admin {
			http.Redirect(w, r, "/login", http.StatusSeeOther)
			return
		}
		ctx := admin.WithActor(r.Context(), who)
		x := &frame{Page: name, Actor: who}
		var err error
		if x.Status, err = s.d.Ops.Status(ctx); err == nil {
			err = f(ctx, x)
		}
		if err != nil {
			s.sorry(w, err)
			return
		}
		s.render(w, http.StatusOK, name, x)
	}
}

// act wraps a button: it does f and returns to the page that it stands on.
func (s *Server) act(f func(context.Context, *http.Request) error, back string) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		who := s.actor(r)
		if !who.Admin {
			http.Redirect(w, r, "/login", http.StatusSeeOther)
			return
		}
		r.Body = http.MaxBytesReader(w, r.Body, 64<<10)
		if err := f(admin.WithActor(r.Context(), who), r); err != nil {
			s.sorry(w, err)
			return
		}
		http.Redirect(w, r, back, http.StatusSeeOther)
	}
}

func (s *Server) sorry(w http.ResponseWriter, err error) {
	var e *admin.Error
	if !errors.As(err, &e) {
		s.d.Log.Error("page", "err", err)
		e = admin.Errorf(admin.Internal, "internal", "Something went wrong on this node; its log says what.")
	}
	s.render(w, e.Kind.HTTP(), "sorry", map[string]any{"Title": "Not done", "Error": e})
}

func (s *Server) render(w http.ResponseWriter, code int, name string, data any) {
	var b bytes.Buffer
	if err := s.pages.ExecuteTemplate(&b, name+".html", data); err != nil {
		s.d.Log.Error("render page", "page", name, "err", err)
		http.Error(w, "This page could not be drawn.", http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(code)
	w.Write(b.Bytes())
}

// dot is a node on the map.
type dot struct {
	admin.Member
	X, Y  float64
	Self  bool
	Label string
}

// line is a link on the map.
type line struct {
	X1, Y1, X2, Y2 float64
	Cut            bool
	Label          string
	LX, LY         float64
}

type meshBody struct {
	Dots    []dot
	Lines   []line
	Pending []admin.Pending
	Forked  []admin.ForkedCommand
}

// meshPage places this node in the middle and the others around it, in the
// order of their names so that nothing jumps, nearer when they are nearer.
func (s *Server) meshPage(ctx context.Context, x *frame) (err error) {
	x.Title, x.Command, x.JSON = "Mesh", "posthouse status", "/api/v1/status"
	var b meshBody
	if b.Pending, err = s.d.Ops.PendingNodes(ctx); err != nil {
		return err
	}
	if b.Forked, err = s.d.Ops.Forked(ctx); err != nil {
		return err
	}
	const cx, cy = 320.0, 170.0
	others := 0
	for _, m := range x.Status.Members {
		if m.Name != x.Status.Node {
			others++
		}
	}
	i := 0
	for _, m := range x.Status.Members {
		d := dot{Member: m, X: cx, Y: cy, Self: m.Name == x.Status.Node, Label: m.Role}
		if !d.Self {
			// From the left round, so that two lie beside each other, not above.
			angle := 2*math.Pi*float64(i)/float64(others) + math.Pi
			far := 0.55 + 0.45*math.Min(1, math.Log1p(m.RTT)/math.Log1p(300))
			d.X, d.Y = cx+far*270*math.Cos(angle), cy+far*130*math.Sin(angle)
			l := line{X1: cx, Y1: cy, X2: d.X, Y2: d.Y, Cut: m.State == "unreachable", LX: (cx+d.X)/2 - 22*math.Abs(math.Sin(angle)), LY: (cy+d.Y)/2 - 6} // beside the line
			if l.Label = fmt.Sprintf("%.1f ms", m.RTT); l.Cut {
				l.Label = "cut off"
			}
			b.Lines = append(b.Lines, l)
			i++
		}
		b.Dots = append(b.Dots, d)
	}
	x.Body = b
	return nil
}

// waiting sums the queue of one destination.
type waiting struct {
	To         string
	Messages   int
	Recipients int
	Oldest     time.Time
	Said       string
}

func (s *Server) mailPage(ctx context.Context, x *frame) error {
	x.Title, x.Command, x.JSON = "Mail", "posthouse queue list", "/api/v1/queue"
	es, err := s.d.Ops.Queue(ctx)
	if err != nil {
		return err
	}
	var sums []*waiting
	by := map[string]*waiting{}
	for _, e := range es {
		w := by[e.Destination]
		if w == nil {
			w = &waiting{To: e.Destination, Oldest: e.Accepted}
			by[e.Destination] = w
			sums = append(sums, w)
		}
		w.Messages++
		w.Recipients += len(e.Recipients)
		if e.Accepted.Before(w.Oldest) {
			w.Oldest = e.Accepted
		}
		for _, r := range e.Recipients {
			if r.Said != "" {
				w.Said = r.Said
			}
		}
	}
	x.Body = struct {
		Sums    []*waiting
		Entries []admin.QueueEntry
		More    int
	}{sums, es[:min(len(es), 200)], max(0, len(es)-200)}
	return nil
}

func (s *Server) peoplePage(ctx context.Context, x *frame) error {
	x.Title, x.Command, x.JSON = "People", "posthouse user list", "/api/v1/users"
	us, err := s.d.Ops.Users(ctx)
	if err != nil {
		return err
	}
	gs, err := s.d.Ops.Groups(ctx)
	if err != nil {
		return err
	}
	as, err := s.d.Ops.Aliases(ctx)
	if err != nil {
		return err
	}
	x.Body = struct {
		Users   []admin.User
		Groups  []admin.Group
		Aliases []admin.Alias
	}{us, gs, as}
	return nil
}
