package joining

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"net"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"posthouse/appliance/login"
	"posthouse/mesh"
	"posthouse/mesh/identity"
)

// world is one door and one joiner with a pipe between them.
type world struct {
	door     *Door
	joiner   *Joiner
	token    identity.Token
	lines    []string
	failures []*Failure
	verdict  Verdict
	began    time.Time
	asked    []string // token or actor of each admission
	down     atomic.Bool
	ahead    time.Duration // how far the joiner's clock is off
	behind   error         // why the door cannot know whether its copy is current
	seen     mesh.KeyHash  // what the joiner sees instead of the door's key, if set
}

func newWorld(t *testing.T) *world {
	t.Helper()
	key := func() *identity.Key {
		k, err := identity.Generate(rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		return k
	}
	doorKey, joinKey := key(), key()
	tok, err := identity.NewToken(rand.Reader, []mesh.KeyHash{doorKey.Hash()})
	if err != nil {
		t.Fatal(err)
	}
	verifier, err := login.New("right", rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	w := &world{token: tok, began: time.Now(), verdict: Verdict{Code: "admitted", Node: 42}}
	w.door = &Door{Key: doorKey, Name: "hq", Software: "1.0", Decoy: []byte("x"), Now: time.Now, Judges: func() string { return "" },
		Fail:    func(string) time.Duration { return time.Second },
		Current: func(context.Context) error { return w.behind },
		Token:   func(p []byte) (mesh.ID, bool) { return mesh.ID{1}, bytes.Equal(p, tok.PublicKey()) },
		Admin: func(n string) string {
			if n == "admin@company.test" {
				return verifier
			}
			return ""
		},
		Admit: func(_ context.Context, k mesh.KeyHash, q *Request, _ netip.AddrPort, id mesh.ID, actor string) Verdict {
			if k != joinKey.Hash() || q.Name != "plzen" {
				t.Errorf("asked to admit %v %+v", k, q)
			}
			how := actor
			if !id.IsZero() {
				how = "token"
			}
			w.asked = append(w.asked, how)
			return w.verdict
		},
		Welcome: func(a *Answer) {
			a.Users, a.CA, a.Domain, a.Peers = 214, []byte("ca"), "company.test", []Peer{{ID: 1, Name: "hq"}, {ID: 42, Name: "plzen"}}
		}}
	w.joiner = &Joiner{Key: joinKey, Now: func() time.Time { return time.Now().Add(w.ahead) }, Self: func() Request {
		return Request{Node: 42, Name: "plzen", Host: "plzen.company.test", Software: "1.0"}
	},
		SRV: func(_ context.Context, name string) ([]string, error) {
			if name == "company.test" {
				return []string{"hq.company.test:44337"}, nil
			}
			return nil, errors.New("no SRV")
		},
		Host: func(_ context.Context, h string) ([]string, error) {
			if h == "hq.company.test" {
				return []string{"10.0.0.1"}, nil
			}
			return nil, errors.New("no such host")
		},
		Dial: func(ctx context.Context, addr string, expect func(mesh.KeyHash) error) (*Session, error) {
			if w.down.Load() || addr != "10.0.0.1:44337" {
				return nil, errors.New("timeout")
			}
			k := doorKey.Hash()
			if !w.seen.IsZero() {
				k = w.seen
			}
			if err := expect(k); err != nil {
				return nil, err
			}
			a, b := net.Pipe()
			go w.door.Serve(ctx, &Session{b, b.SetDeadline, joinKey.Hash(), []byte("exporter")}, netip.MustParseAddrPort("10.0.0.2:44337"))
			return &Session{a, a.SetDeadline, k, []byte("exporter")}, nil
		},
		Progress: func(l string) { w.lines = append(w.lines, l) }, Failed: func(f *Failure) { w.failures = append(w.failures, f) },
		Remember: func(string, []string) {}, Recall: func(string) []string { return nil }}
	return w
}

func TestThreeDoorsLeadIn(t *testing.T) {
	for _, tc := range []struct {
		name string
		in   func(*world) Intent
		how  string
	}{
		{"a token, by the own domain's SRV", func(w *world) Intent { return Intent{Target: w.token.Encode()} }, "token"},
		{"a token, at an address", func(w *world) Intent { return Intent{Target: w.token.Encode(), At: "10.0.0.1:44337"} }, "token"},
		{"an admin's password", func(*world) Intent {
			return Intent{Target: "hq.company.test", Admin: "admin@company.test", Password: "right"}
		}, "admin@company.test"},
		{"a name alone, once approved", func(*world) Intent { return Intent{Target: "company.test"} }, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				a, err := w.joiner.Run(t.Context(), tc.in(w))
				if err != nil || a.Node != 42 || len(a.Peers) != 2 || string(a.CA) != "ca" {
					t.Fatalf("%+v, %v, %v", a, err, w.failures)
				}
				if len(w.asked) != 1 || w.asked[0] != tc.how {
					t.Errorf("admitted by %q", w.asked)
				}
				if last := w.lines[len(w.lines)-1]; !strings.HasPrefix(last, "members: 2 … joined in 0.0 s") {
					t.Errorf("last line %q", last)
				}
			})
		})
	}
}

func TestEveryFailureHasAName(t *testing.T) {
	for _, tc := range []struct {
		name, code string
		set        func(*world) Intent
	}{
		{"a name that does not exist", "join.dns", func(*world) Intent { return Intent{Target: "nowhere.test"} }},
		{"nobody answers", "join.unreachable", func(w *world) Intent { w.down.Store(true); return Intent{Target: "company.test"} }},
		{"a clock that is three days off", "join.clock", func(w *world) Intent {
			w.ahead, w.verdict = -72*time.Hour, Verdict{Code: "join.pending", Text: "It waits."}
			return Intent{Target: "company.test"}
		}},
		{"the node itself", "join.self", func(w *world) Intent { w.seen = w.joiner.Key.Hash(); return Intent{Target: "company.test"} }},
		{"another mesh than the token's", "join.fingerprint", func(w *world) Intent { w.seen[0] = 1; return Intent{Target: w.token.Encode()} }},
		{"a mistyped token", "join.token", func(w *world) Intent { return Intent{Target: "PH1-ABCDEF"} }},
		{"a token that the mesh does not know", "join.token", func(w *world) Intent {
			w.door.Token = func([]byte) (mesh.ID, bool) { return mesh.ID{}, false }
			return Intent{Target: w.token.Encode()}
		}},
		{"a token that a door does not know whose copy may be behind", "join.no-master", func(w *world) Intent {
			w.door.Token = func([]byte) (mesh.ID, bool) { return mesh.ID{}, false }
			w.behind = errors.New("Nobody can say now.")
			return Intent{Target: w.token.Encode()}
		}},
		{"a wrong password at a door whose copy may be behind", "join.no-master", func(w *world) Intent {
			w.behind = errors.New("Nobody can say now.")
			return Intent{Target: "company.test", Admin: "admin@company.test", Password: "new"}
		}},
		{"a wrong password", "join.password", func(*world) Intent {
			return Intent{Target: "company.test", Admin: "admin@company.test", Password: "wrong"}
		}},
		{"an unknown admin", "join.password", func(*world) Intent {
			return Intent{Target: "company.test", Admin: "boss@company.test", Password: "right"}
		}},
		{"an admin at a node that cannot check passwords", "join.not-here", func(w *world) Intent {
			w.door.Judges = func() string { return "praha.company.test" }
			return Intent{Target: "company.test", Admin: "admin@company.test", Password: "right"}
		}},
		{"waiting for approval", "join.pending", func(w *world) Intent {
			w.verdict = Verdict{Code: "join.pending", Text: "The node waits for approval."}
			return Intent{Target: "company.test"}
		}},
		{"no master", "join.no-master", func(w *world) Intent {
			w.verdict = Verdict{Code: "join.no-master", Text: "Nobody can admit you now."}
			return Intent{Target: "company.test"}
		}},
		{"a host that is no mesh", "join.notmesh", func(w *world) Intent {
			w.joiner.Dial = func(_ context.Context, _ string, expect func(mesh.KeyHash) error) (*Session, error) {
				expect(mesh.KeyHash{9})
				return nil, errors.New("no application protocol")
			}
			return Intent{Target: "company.test"}
		}},
		{"a version that the mesh cannot take", "join.version", func(w *world) Intent {
			w.verdict = Verdict{Code: "join.version", Text: "This node's version is too old for the mesh."}
			return Intent{Target: "company.test"}
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
				defer cancel()
				in := tc.set(w)
				if _, err := w.joiner.Run(ctx, in); err == nil {
					t.Fatal("it joined")
				}
				if len(w.failures) == 0 || w.failures[0].Code != tc.code || w.failures[0].Text == "" {
					t.Errorf("failures %+v", w.failures)
				}
				time.Sleep(time.Minute)
			})
		})
	}
}

func TestItGoesOnTryingUntilTheMeshIsThere(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.down.Store(true)
		time.AfterFunc(3*time.Hour, func() { w.down.Store(false) })
		began := time.Now()
		if _, err := w.joiner.Run(t.Context(), Intent{Target: "company.test"}); err != nil {
			t.Fatal(err)
		}
		if d := time.Since(began); d < 3*time.Hour || d > 3*time.Hour+5*time.Second {
			t.Errorf("joined after %v", d)
		}
	})
}

func TestATokenThatTheDoorHearsOfLateLeadsIn(t *testing.T) {
	for _, tc := range []struct {
		name    string
		current func(w *world, heard *bool) error
		within  time.Duration
	}{
		{"the copy was behind, and has caught up", func(_ *world, heard *bool) error { *heard = true; return nil }, 0},
		{"there is no master for an hour", func(w *world, heard *bool) error {
			if time.Since(w.began) < time.Hour {
				return errors.New("Nobody can say now.")
			}
			*heard = true
			return nil
		}, time.Hour + 5*time.Second},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				var heard bool
				w.door.Current = func(context.Context) error { return tc.current(w, &heard) }
				w.door.Token = func([]byte) (mesh.ID, bool) { return mesh.ID{1}, heard }
				ctx, cancel := context.WithTimeout(t.Context(), 2*time.Hour)
				defer cancel()
				if _, err := w.joiner.Run(ctx, Intent{Target: w.token.Encode()}); err != nil {
					t.Fatal(err)
				}
				if took := time.Since(w.began); took > tc.within {
					t.Errorf("joined after %v", took)
				}
			})
		})
	}
}

func FuzzReadFrame(f *testing.F) {
	var b bytes.Buffer
	writeFrame(&b, Request{Version: 1, Name: "plzen", Addresses: []string{"a:1"}, Clock: time.Unix(0, 0)})
	f.Add(b.Bytes())
	f.Add([]byte{0xff, 0xff, 0xff, 0xff})
	f.Fuzz(func(t *testing.T, b []byte) {
		var q Request
		if readFrame(bytes.NewReader(b), &q) == nil && len(b) > 4+maxFrame {
			t.Error("took more than a frame")
		}
		var a Answer
		readFrame(bytes.NewReader(b), &a)
	})
}
