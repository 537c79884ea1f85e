package smtpd

import (
	"context"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"posthouse/mesh"
	"posthouse/transport"
)

func TestTimeLimits(t *testing.T) {
	t.Run("a silent client hears 421 after five minutes", func(t *testing.T) {
		talk(t, PortMX, nil, func(t *testing.T, g *rig, c *client) {
			c.want("220", "")
			start := time.Now()
			c.want("421 4.4.2", "silence")
			if d := time.Since(start); d != 5*time.Minute {
				t.Fatal(d)
			}
		})
	})
	t.Run("a command that drips in is cut at the same time", func(t *testing.T) {
		talk(t, PortMX, nil, func(t *testing.T, g *rig, c *client) {
			c.want("220", "")
			start := time.Now()
			for range 10 {
				time.Sleep(time.Minute)
				c.conn.Write([]byte("x"))
			}
			c.want("421 4.4.2", "dripping")
			if d := time.Since(start); d != 10*time.Minute {
				t.Fatal(d)
			}
		})
	})
	t.Run("a text below the least rate is cut and never taken", func(t *testing.T) {
		talk(t, PortMX, nil, func(t *testing.T, g *rig, c *client) {
			c.ready()
			c.do("DATA", "354")
			start := time.Now()
			for {
				time.Sleep(10 * time.Second)
				if _, err := c.conn.Write([]byte("slow\r\n")); err != nil {
					break
				}
			}
			if d := time.Since(start); d < 5*time.Minute || d > 6*time.Minute || len(g.accepted()) != 0 || g.partial != 1 {
				t.Fatal(d, len(g.accepted()), g.partial)
			}
		})
	})
	t.Run("a fast text with long pauses goes through", func(t *testing.T) {
		talk(t, PortMX, nil, func(t *testing.T, g *rig, c *client) {
			c.ready()
			c.do("DATA", "354")
			for range 3 {
				c.send(strings.Repeat(strings.Repeat("x", 98)+"\r\n", 3000))
				time.Sleep(4 * time.Minute)
			}
			c.do(".", "250")
		})
	})
	t.Run("intake that takes too long is given up before the client gives up", func(t *testing.T) {
		talk(t, PortMX, func(g *rig, _ *Config, _ *Deps) { g.hold = make(chan struct{}) }, func(t *testing.T, g *rig, c *client) {
			c.ready()
			c.do("DATA", "354")
			start := time.Now()
			c.do("x: y\r\n.", "451 4.3.0")
			if d := time.Since(start); d != 9*time.Minute {
				t.Fatal(d)
			}
		})
	})
	t.Run("a session of four hours ends between two messages", func(t *testing.T) {
		talk(t, PortMX, func(_ *rig, c *Config, _ *Deps) { c.MaxIdleCommands = 1 << 20 }, func(t *testing.T, g *rig, c *client) {
			c.want("220", "")
			for range 60 {
				c.do("NOOP", "250")
				time.Sleep(4 * time.Minute)
			}
			c.do("NOOP", "250")
			time.Sleep(time.Minute)
			c.do("NOOP", "250")
			c.want("421 4.3.2", "four hours")
		})
	})
	t.Run("who speaks during the greeting delay is refused", func(t *testing.T) {
		bubble(t, func(t *testing.T) {
			delay := func(_ *rig, c *Config, _ *Deps) { c.GreetingDelay = 3 * time.Second }
			g := newRig(t, PortMX, delay)
			defer g.close()
			early := g.dial()
			defer early.close()
			early.do("EHLO x", "554 5.5.0")
			start := time.Now()
			c := g.dial()
			defer c.close()
			c.want("220", "")
			if d := time.Since(start); d != 3*time.Second {
				t.Fatal(d)
			}
			c.do("HELO x", "250")
		})
	})
}

func TestFailedLoginsWaitLongerAndLonger(t *testing.T) {
	bubble(t, func(t *testing.T) {
		g := newRig(t, PortSubmissions, nil)
		defer g.close()
		want := []time.Duration{1, 2, 3, 4, 5, 6, 7}
		for i := range want {
			c := g.dial()
			c.startTLS()
			c.greet("x")
			start := time.Now()
			c.do("AUTH PLAIN AGpvZQB3cm9uZw==", "535 5.7.8")
			if d := time.Since(start); d != want[i]*time.Second {
				t.Fatal(i, d)
			}
			c.close()
		}
		c := g.dial()
		defer c.close()
		c.startTLS()
		c.greet("x")
		start := time.Now()
		c.do("AUTH PLAIN AGphbmUAd3Jvbmc=", "535") // another user is not delayed by it
		if d := time.Since(start); d != time.Second {
			t.Fatal(d)
		}
		start = time.Now()
		c.do("AUTH PLAIN AGpvZQBzZWNyZXQ=", "235") // the right password never waits
		if d := time.Since(start); d != 0 {
			t.Fatal(d)
		}
	})
}

func TestConnectionsPerAddress(t *testing.T) {
	bubble(t, func(t *testing.T) {
		g := newRig(t, PortMX, func(_ *rig, c *Config, _ *Deps) {
			c.Trusted = []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}
		})
		defer g.close()
		var open []*client
		for range 50 {
			c := g.dial()
			c.want("220", "")
			open = append(open, c)
		}
		over := g.dial()
		over.want("421 4.7.0", "the 51st")
		over.want("EOF", "the 51st")
		for _, from := range []string{"127.0.0.1:1", "10.1.2.3:1", "198.51.100.8:1"} {
			for range 51 {
				if from == "198.51.100.8:1" && len(open) > 152 {
					break
				}
				c := g.dialFrom(from)
				c.want("220", from)
				open = append(open, c)
			}
		}
		open[0].do("QUIT", "221")
		synctest.Wait()
		again := g.dial()
		again.want("220", "a place got free")
		for _, c := range append(open, over, again) {
			c.close()
		}
	})
}

func TestSubmissionCountsOnlyThoseNotLoggedIn(t *testing.T) {
	bubble(t, func(t *testing.T) {
		g := newRig(t, PortSubmissions, func(_ *rig, c *Config, _ *Deps) { c.PendingPerAddr = 2 })
		defer g.close()
		var open []*client
		for range 5 {
			c := g.dial()
			c.startTLS()
			c.greet("x")
			c.do("AUTH PLAIN AGpvZQBzZWNyZXQ=", "235")
			open = append(open, c)
		}
		for range 2 {
			c := g.dial()
			c.startTLS()
			c.want("220", "")
			open = append(open, c)
		}
		over := g.dial()
		over.want("EOF", "the third")
		for _, c := range append(open, over) {
			c.close()
		}
	})
}

func TestDrain(t *testing.T) {
	t.Run("idle sessions hear 421, a running transaction ends", func(t *testing.T) {
		bubble(t, func(t *testing.T) {
			g := newRig(t, PortMX, nil)
			idle, busy := g.dial(), g.dial()
			defer idle.close()
			defer busy.close()
			idle.want("220", "")
			busy.ready()
			busy.do("DATA", "354")
			synctest.Wait()
			drained := make(chan error)
			go func() { drained <- g.srv.Drain(context.Background()) }()
			idle.want("421 4.3.2", "drain")
			idle.want("EOF", "drain")
			if _, err := g.ln.Dial(addr("192.0.2.9:1")); err == nil {
				t.Error("took a connection while draining")
			}
			time.Sleep(time.Second)
			busy.do("x: y\r\n.", "250 2.0.0")
			busy.want("421 4.3.2", "the message")
			if err := <-drained; err != nil {
				t.Error(err)
			}
			if err := <-g.done; err != ErrDraining {
				t.Error(err)
			}
		})
	})
	t.Run("nobody waits for the answer to a wrong password", func(t *testing.T) {
		bubble(t, func(t *testing.T) {
			g := newRig(t, PortSubmissions, nil)
			c := g.dial()
			c.startTLS()
			c.greet("x")
			c.send("AUTH PLAIN AGpvZQB3cm9uZw==\r\n") // answered after a second
			synctest.Wait()
			start := time.Now()
			drained := make(chan error)
			go func() { drained <- g.srv.Drain(context.Background()) }()
			c.want("421 4.3.2", "drain")
			c.close()
			if err := <-drained; err != nil || time.Since(start) != 0 {
				t.Error(err, time.Since(start))
			}
			<-g.done
		})
	})
	t.Run("what does not end in time is cut", func(t *testing.T) {
		bubble(t, func(t *testing.T) {
			g := newRig(t, PortMX, nil)
			busy := g.dial()
			defer busy.close()
			busy.ready()
			busy.do("DATA", "354")
			ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
			defer cancel()
			start := time.Now()
			if err := g.srv.Drain(ctx); err != context.DeadlineExceeded || time.Since(start) != 10*time.Second {
				t.Error(err, time.Since(start))
			}
			<-g.done
			if len(g.accepted()) != 0 {
				t.Error("took half a message")
			}
		})
	})
	t.Run("the end of Serve's context cuts, too", func(t *testing.T) {
		bubble(t, func(t *testing.T) {
			g := newRig(t, PortMX, nil)
			c := g.dial()
			defer c.close()
			c.ready()
			g.stop()
			c.want("421", "the end")
			if err := <-g.done; err != nil {
				t.Error(err)
			}
		})
	})
}

// TestReverseName: the look-up runs beside the session and is bounded.
func TestReverseName(t *testing.T) {
	for _, c := range []struct {
		name string
		look func(context.Context, netip.Addr) string
		want string
	}{
		{"a name", func(context.Context, netip.Addr) string { return "client.example" }, "client.example"},
		{"no name in time", func(ctx context.Context, _ netip.Addr) string { <-ctx.Done(); return "late" }, "late"},
		{"a name that is none", func(context.Context, netip.Addr) string { return "a b\r\nX: y" }, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			talk(t, PortMX, func(_ *rig, _ *Config, d *Deps) { d.Reverse = c.look }, func(t *testing.T, g *rig, cl *client) {
				cl.ready()
				start := time.Now()
				cl.do("DATA", "354")
				cl.do("x: y\r\n.", "250")
				if m := g.accepted()[0]; m.env.ClientName != c.want || time.Since(start) > 5*time.Second {
					t.Fatalf("%q after %v", m.env.ClientName, time.Since(start))
				}
			})
		})
	}
}

// TestLogIsOneLineAnEvent: ATTACKS A31.
func TestLogIsOneLineAnEvent(t *testing.T) {
	for in, want := range map[string]string{
		"plain":              "plain",
		"a\r\nb\x1b[31m":     `a\r\nb\x1b[31m`,
		"rtl \u202e gnp":     `rtl \u202e gnp`,
		"broken \xff\xfe":    `broken \xff\xfe`,
		"čeština is welcome": "čeština is welcome",
	} {
		if got := clean(in); got != want {
			t.Errorf("clean(%q) = %q, want %q", in, got, want)
		}
	}
	change := func(_ *rig, _ *Config, d *Deps) {
		d.Senders = sendersFunc(func(context.Context, *Session, mesh.Address, MailParams) (transport.Origin, error) {
			return 0, transport.Faultf(550, "5.7.1", "no\r\n250 injected\x1b")
		})
	}
	talk(t, PortMX, change, func(t *testing.T, g *rig, c *client) {
		c.want("220", "")
		c.do("HELO x", "250")
		c.do("MAIL FROM:<a@b.test>", "550 5.7.1 no  250 injected?")
		c.do("NOOP", "250 2.0.0")
		if logs := strings.TrimSpace(g.logs.String()); strings.Count(logs, "\n") != 0 || strings.Contains(logs, "\x1b") {
			t.Fatal(logs)
		}
	})
}
