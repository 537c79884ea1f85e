package web

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"posthouse/appliance/admin"
	"posthouse/appliance/api"
	"posthouse/appliance/health"
)

const evil = `<script>alert(1)</script>"'&`

// fakeOps answers reads with hostile texts and records changes.
type fakeOps struct {
	admin.Operations
	approved string
}

func (f *fakeOps) Status(context.Context) (admin.Status, error) {
	return admin.Status{Node: "hq", Domain: evil, Master: "hq", Term: 3, Health: admin.Health{Sentence: evil},
		Conditions: []health.Condition{{Name: "x", Text: evil, Next: evil}},
		Members:    []admin.Member{{Name: "hq", State: "serving", Role: "master"}, {Name: evil, State: "unreachable", Role: "voter", RTT: 12}}, JoinProgress: []string{evil}}, nil
}
func (f *fakeOps) PendingNodes(context.Context) ([]admin.Pending, error) {
	return []admin.Pending{{ID: "1", Name: evil, Code: "AB-CD"}}, nil
}
func (f *fakeOps) Forked(context.Context) ([]admin.ForkedCommand, error) {
	return []admin.ForkedCommand{{What: evil}}, nil
}
func (f *fakeOps) Queue(context.Context) ([]admin.QueueEntry, error) {
	return []admin.QueueEntry{{ID: "q", From: evil, Destination: evil, Recipients: []admin.QueueRcpt{{Address: evil, Said: evil}}}}, nil
}
func (f *fakeOps) Users(context.Context) ([]admin.User, error) {
	return []admin.User{{Address: evil, Name: evil}}, nil
}
func (f *fakeOps) Groups(context.Context) ([]admin.Group, error) {
	return []admin.Group{{Name: evil, Members: []string{evil}}}, nil
}
func (f *fakeOps) Aliases(context.Context) ([]admin.Alias, error) {
	return []admin.Alias{{Address: evil}}, nil
}
func (f *fakeOps) Approve(_ context.Context, id string) error { f.approved = id; return nil }

func newServer(t *testing.T) (*Server, *fakeOps) {
	t.Helper()
	ops := &fakeOps{}
	s, err := New(Deps{Ops: ops, Metrics: prometheus.NewRegistry(), Version: evil, Log: slog.New(slog.NewTextHandler(io.Discard, nil)),
		Ready: func() error { return errors.New("the store is not open yet") },
		Login: func(_ context.Context, name, password string, _ netip.Addr) (admin.Actor, error) {
			if password != "right" {
				return admin.Actor{}, errors.New("wrong")
			}
			return admin.Actor{Name: name, Admin: true}, nil
		}})
	if err != nil {
		t.Fatal(err)
	}
	return s, ops
}

// browser does one request as a browser on the node's own network would.
func browser(h http.Handler, method, path, form, cookie string, headers ...string) *http.Response {
	r := httptest.NewRequest(method, "https://hq.company.test"+path, strings.NewReader(form))
	r.RemoteAddr = "10.1.2.3:4444"
	if form != "" {
		r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	}
	if cookie != "" {
		r.AddCookie(&http.Cookie{Name: cookieName, Value: cookie})
	}
	for i := 0; i+1 < len(headers); i += 2 {
		r.Header.Set(headers[i], headers[i+1])
	}
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	return w.Result()
}

func login(t *testing.T, h http.Handler) string {
	t.Helper()
	resp := browser(h, "POST", "/login", url.Values{"name": {"admin@company.test"}, "password": {"right"}}.Encode(), "")
	if resp.StatusCode != http.StatusSeeOther || len(resp.Cookies()) != 1 {
		t.Fatal(resp.Status)
	}
	c := resp.Cookies()[0]
	if !c.HttpOnly || !c.Secure || c.SameSite != http.SameSiteStrictMode {
		t.Errorf("cookie %+v", c)
	}
	return c.Value
}

func TestPagesShowHostileTextsAsTexts(t *testing.T) {
	s, _ := newServer(t)
	h := s.Public()
	cookie := login(t, h)
	for _, path := range []string{"/", "/mail", "/people"} {
		resp := browser(h, "GET", path, "", cookie)
		body, _ := io.ReadAll(resp.Body)
		if resp.StatusCode != 200 || strings.Contains(string(body), "<script>alert") || !strings.Contains(string(body), "alert(1)") {
			t.Errorf("%s: %s\n%s", path, resp.Status, body)
		}
		if csp := resp.Header.Get("Content-Security-Policy"); !strings.HasPrefix(csp, "default-src 'self'") {
			t.Errorf("%s: CSP %q", path, csp)
		}
	}
}

func TestNobodySeesOrDoesAnythingWithoutLogin(t *testing.T) {
	s, ops := newServer(t)
	h := s.Public()
	for _, tc := range []struct {
		method, path string
		want         int
	}{
		{"GET", "/", 303}, {"GET", "/mail", 303}, {"POST", "/act/approve", 303}, {"GET", "/api/v1/status", 403}, {"GET", "/api/v1/events", 403},
		{"POST", "/api/v1/mesh/approve", 403}, {"GET", "/livez", 200}, {"GET", "/readyz", 503}, {"GET", "/metrics", 200}, {"GET", "/nowhere", 404},
	} {
		if got := browser(h, tc.method, tc.path, "", "").StatusCode; got != tc.want {
			t.Errorf("%s %s: %d, want %d", tc.method, tc.path, got, tc.want)
		}
	}
	if resp := browser(h, "POST", "/login", "name=a&password=wrong", ""); resp.StatusCode != 401 || len(resp.Cookies()) != 0 {
		t.Errorf("wrong password: %s", resp.Status)
	}
	if ops.approved != "" {
		t.Error("a stranger admitted a node")
	}
}

func TestAForeignPageCannotPressAButton(t *testing.T) {
	s, ops := newServer(t)
	h := s.Public()
	cookie := login(t, h)
	if got := browser(h, "POST", "/act/approve", "id=7", cookie, "Sec-Fetch-Site", "cross-site").StatusCode; got != 403 || ops.approved != "" {
		t.Errorf("cross-site button: %d, approved %q", got, ops.approved)
	}
	if got := browser(h, "POST", "/act/approve", "id=7", cookie, "Sec-Fetch-Site", "same-origin").StatusCode; got != 303 || ops.approved != "7" {
		t.Errorf("own button: %d, approved %q", got, ops.approved)
	}
}

func TestASessionEndsByLogoutAndByTime(t *testing.T) {
	s, _ := newServer(t)
	h := s.Public()
	cookie := login(t, h)
	browser(h, "POST", "/logout", "x=1", cookie)
	if got := browser(h, "GET", "/", "", cookie).StatusCode; got != 303 {
		t.Errorf("after logout: %d", got)
	}
	cookie = login(t, h)
	s.mu.Lock()
	s.sessions[cookie].made = time.Now().Add(-sessionLife - time.Second)
	s.mu.Unlock()
	if got := browser(h, "GET", "/", "", cookie).StatusCode; got != 303 {
		t.Errorf("after %v: %d", sessionLife, got)
	}
}

func TestOnlyTheOwnNetworkMayKnock(t *testing.T) {
	s, _ := newServer(t)
	r := httptest.NewRequest("GET", "https://hq.company.test/login", nil)
	r.RemoteAddr = "192.0.2.7:999"
	w := httptest.NewRecorder()
	s.Public().ServeHTTP(w, r)
	if w.Code != 403 {
		t.Errorf("a public address got %d", w.Code)
	}
}

func TestTheCommandLineSpeaksTheSameCalls(t *testing.T) {
	s, ops := newServer(t)
	socket := t.TempDir() + "/c.sock"
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: s.Control()}
	done := make(chan struct{})
	go func() { srv.Serve(l); close(done) }()
	t.Cleanup(func() { srv.Close(); <-done })
	c := api.Local(socket)
	st, err := c.Status(t.Context())
	if err != nil || st.Master != "hq" || len(st.Members) != 2 {
		t.Errorf("%+v, %v", st, err)
	}
	if err := c.Approve(t.Context(), "9"); err != nil || ops.approved != "9" {
		t.Errorf("%v, %q", err, ops.approved)
	}
	if _, err := api.Local(socket + "x").Status(t.Context()); !errors.Is(err, api.ErrNoAnswer) {
		t.Errorf("no node there: %v", err)
	}
}
