// Package web serves a node's pages, its API, and what machines ask of it:
// /livez, /readyz and /metrics. Pages are complete without JavaScript; with it
// they follow the mesh live.
//
// It decides who may see what and renders; everything it shows or changes goes
// through admin.Operations.
package web

import (
	"context"
	"crypto/rand"
	"embed"
	"errors"
	"html/template"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"posthouse/appliance/admin"
	"posthouse/appliance/api"
)

//go:embed static
var static embed.FS

//go:embed pages
var pages embed.FS

// Session lengths.
const (
	sessionLife = 12 * time.Hour
	sessionIdle = 2 * time.Hour
	maxSessions = 1000
	cookieName  = "__Host-posthouse"
)

// Deps are what the pages need.
type Deps struct {
	Ops admin.Operations
	// Login checks an admin's name and password; a nil error admits.
	Login func(ctx context.Context, name, password string, from netip.Addr) (admin.Actor, error)
	// Ready returns nil when the node takes mail.
	Ready   func() error
	Metrics prometheus.Gatherer
	Version string
	Log     *slog.Logger
}

// Server holds the sessions of the people who are logged in.
type Server struct {
	d     Deps
	pages *template.Template
	door  door

	mu       sync.Mutex
	sessions map[string]*session
}

type session struct {
	actor       admin.Actor
	made, until time.Time
}

// New returns the pages of a node.
func New(d Deps) (*Server, error) {
	t, err := template.New("").Funcs(functions).ParseFS(pages, "pages/*.html")
	if err != nil {
		return nil, err
	}
	return &Server{d: d, pages: t, sessions: map[string]*session{}}, nil
}

// Control is the handler of the control socket: whoever can open the socket is
// the machine's administrator.
func (s *Server) Control() http.Handler {
	mux := http.NewServeMux()
	s.machines(mux)
	calls := api.Handler(s.d.Ops)
	mux.HandleFunc(api.Prefix, func(w http.ResponseWriter, r *http.Request) {
		calls.ServeHTTP(w, r.WithContext(admin.WithActor(r.Context(), admin.Actor{Name: "local", Admin: true})))
	})
	return mux
}

// Public is the handler of the HTTPS port.
func (s *Server) Public() http.Handler {
	mux := http.NewServeMux()
	s.machines(mux)
	assets, err := fs.Sub(static, "static")
	if err != nil {
		panic(err) // the folder is compiled in
	}
	mux.Handle("GET /static/", http.StripPrefix("/static/", http.FileServerFS(assets)))
	mux.HandleFunc("GET /login", s.loginPage)
	mux.HandleFunc("POST /login", s.login)
	mux.HandleFunc("POST /logout", s.logout)
	mux.HandleFunc("GET /{$}", s.page("mesh", s.meshPage))
	mux.HandleFunc("GET /mail", s.page("mail", s.mailPage))
	mux.HandleFunc("GET /people", s.page("people", s.peoplePage))
	mux.HandleFunc("POST /act/approve", s.act(func(ctx context.Context, r *http.Request) error { return s.d.Ops.Approve(ctx, r.PostFormValue("id")) }, "/"))
	mux.HandleFunc("POST /act/refuse", s.act(func(ctx context.Context, r *http.Request) error { return s.d.Ops.Refuse(ctx, r.PostFormValue("id")) }, "/"))
	mux.HandleFunc("POST /act/retry", s.act(func(ctx context.Context, r *http.Request) error {
		_, err := s.d.Ops.QueueRetry(ctx, admin.QueueAction{Destination: r.PostFormValue("to"), ID: r.PostFormValue("id")})
		return err
	}, "/mail"))
	calls := api.Handler(s.d.Ops)
	mux.HandleFunc(api.Prefix, func(w http.ResponseWriter, r *http.Request) {
		calls.ServeHTTP(w, r.WithContext(admin.WithActor(r.Context(), s.actor(r))))
	})
	guard := http.NewCrossOriginProtection()
	return near(headers(hurry(guard.Handler(mux))))
}

// machines adds what other machines ask.
func (s *Server) machines(mux *http.ServeMux) {
	mux.HandleFunc("GET /livez", func(w http.ResponseWriter, _ *http.Request) { w.Write([]byte("ok\n")) })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		if err := s.d.Ready(); err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
			return
		}
		w.Write([]byte("ok\n"))
	})
	mux.Handle("GET /metrics", promhttp.HandlerFor(s.d.Metrics, promhttp.HandlerOpts{}))
}

// near lets only loopback and private addresses in: MAIL.md, Limits. Pages for
// the whole Internet are a decision that an admin has to take.
func near(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if a := remote(r); !a.IsLoopback() && !a.IsPrivate() && !a.IsLinkLocalUnicast() {
			http.Error(w, "The pages of this node answer only addresses of its own network.", http.StatusForbidden)
			return
		}
		h.ServeHTTP(w, r)
	})
}

// headers sets what keeps a browser from doing harm with our pages.
func headers(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		k := w.Header()
		k.Set("Content-Security-Policy", "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'")
		k.Set("X-Content-Type-Options", "nosniff")
		k.Set("Referrer-Policy", "no-referrer")
		k.Set("Strict-Transport-Security", "max-age=31536000")
		h.ServeHTTP(w, r)
	})
}

func remote(r *http.Request) netip.Addr { return addrOf(r.RemoteAddr) }

func addrOf(hostPort string) netip.Addr {
	host, _, err := net.SplitHostPort(hostPort)
	if err != nil {
		return netip.Addr{}
	}
	a, err := netip.ParseAddr(host)
	if err != nil {
		return netip.Addr{}
	}
	return a.Unmap()
}

// actor returns who a request belongs to; the zero Actor when nobody is logged
// in or the session has ended.
func (s *Server) actor(r *http.Request) admin.Actor {
	c, err := r.Cookie(cookieName)
	if err != nil {
		return admin.Actor{}
	}
	now := time.Now()
	s.mu.Lock()
	defer s.mu.Unlock()
	x := s.sessions[c.Value]
	if x == nil || now.After(x.until) || now.Sub(x.made) > sessionLife {
		delete(s.sessions, c.Value)
		return admin.Actor{}
	}
	x.until = now.Add(sessionIdle)
	if v, ok := r.Context().Value(visitorKey{}).(*visitor); ok {
		v.known()
	}
	return x.actor
}

func (s *Server) loginPage(w http.ResponseWriter, r *http.Request) {
	s.render(w, http.StatusOK, "login", map[string]any{"Title": "Log in"})
}

func (s *Server) login(w http.ResponseWriter, r *http.Request) {
	r.Body = http.MaxBytesReader(w, r.Body, 8<<10)
	name := r.PostFormValue("name")
	a, err := s.d.Login(r.Context(), name, r.PostFormValue("password"), remote(r))
	if err != nil {
		text := "The name or the password is wrong."
		var e *admin.Error
		if errors.As(err, &e) {
			text = e.Error()
		}
		s.render(w, http.StatusUnauthorized, "login", map[string]any{"Title": "Log in", "Name": name, "Wrong": text})
		return
	}
	id, now := rand.Text(), time.Now()
	s.mu.Lock()
	if len(s.sessions) >= maxSessions {
		for k, x := range s.sessions {
			if now.After(x.until) {
				delete(s.sessions, k)
			}
		}
		if len(s.sessions) >= maxSessions {
			clear(s.sessions)
		}
	}
	s.sessions[id] = &session{actor: a, made: now, until: now.Add(sessionIdle)}
	s.mu.Unlock()
	http.SetCookie(w, &http.Cookie{Name: cookieName, Value: id, Path: "/", Secure: true, HttpOnly: true, SameSite: http.SameSiteStrictMode, MaxAge: int(sessionLife.Seconds())})
	http.Redirect(w, r, "/", http.StatusSeeOther)
}

func (s *Server) logout(w http.ResponseWriter, r *http.Request) {
	if c, err := r.Cookie(cookieName); err == nil {
		s.mu.Lock()
		delete(s.sessions, c.Value)
		s.mu.Unlock()
	}
	http.SetCookie(w, &http.Cookie{Name: cookieName, Path: "/", Secure: true, HttpOnly: true, MaxAge: -1})
	http.Redirect(w, r, "/login", http.StatusSeeOther)
}
