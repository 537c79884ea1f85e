package smtpout

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"posthouse/transport"
)

const text = "Subject: x\r\n\r\nhello\r\n"

var all = []string{"PIPELINING", "SIZE 1000000", "8BITMIME", "SMTPUTF8", "DSN", "ENHANCEDSTATUSCODES"}

func ans(kv ...string) map[string]string {
	m := map[string]string{}
	for i := 0; i < len(kv); i += 2 {
		m[kv[i]] = kv[i+1]
	}
	return m
}

// TestOneLeg names what a host can do, and what is told of it. "S" stands for
// a result of success.
func TestOneLeg(t *testing.T) {
	const S = "relayed 250 2.0.0 stored as F1\n"
	long := strings.Repeat("x", 5000)
	for _, c := range []struct {
		name    string
		host    *fakeHost
		leg     *transport.Leg
		want    string
		wantErr string
		took    int // texts taken
		within  time.Duration
	}{
		{name: "a plain host", host: &fakeHost{}, want: S, took: 1},
		{name: "a host with everything", host: &fakeHost{ehlo: all}, want: S, took: 1},
		{name: "a host that knows only HELO", host: &fakeHost{answers: ans("EHLO", "502 what?")}, want: S, took: 1},
		{name: "a host that knows neither", host: &fakeHost{answers: ans("EHLO", "502 what?", "HELO", "550 5.7.1 go away")}, want: "failed 550 5.7.1 mx.away.test: go away\n"},
		{name: "greeting 554 on two lines", host: &fakeHost{answers: ans("", "554-5.7.1 you are\n554 5.7.1 on a list")}, want: "failed 554 5.7.1 mx.away.test: you are on a list\n"},
		{name: "greeting 421", host: &fakeHost{answers: ans("", "421 4.7.0 busy")}, wantErr: "421 4.7.0 mx.away.test: busy"},
		{name: "no greeting", host: &fakeHost{answers: ans("", "hang")}, wantErr: "did not answer in time", within: 5 * time.Minute},
		{name: "closed at once", host: &fakeHost{answers: ans("", "close")}, wantErr: "Connection lost"},
		{name: "nobody there", host: &fakeHost{unreachable: true}, wantErr: "No connection", within: 30 * time.Second},
		{name: "MAIL refused for now", host: &fakeHost{answers: ans("MAIL", "451 4.7.1 greylisted")}, want: "deferred 451 4.7.1 greylisted\n"},
		{name: "MAIL refused, pipelined", host: &fakeHost{ehlo: all, answers: ans("MAIL", "550 5.7.1 no", "RCPT", "503 5.5.1 no MAIL")}, want: "failed 550 5.7.1 no\n"},
		{name: "MAIL hangs", host: &fakeHost{answers: ans("MAIL", "hang")}, want: "deferred 0 4.4.2 The other side did not answer in time\n", within: 5 * time.Minute},
		{name: "MAIL closes", host: &fakeHost{answers: ans("MAIL", "close")}, want: "deferred 0 4.4.2 Connection lost in mid-transfer\n"},
		{name: "RCPT refused without an enhanced code", host: &fakeHost{answers: ans("RCPT", "550 no such user")}, want: "failed 550  no such user\n"},
		{name: "RCPT refused without a word", host: &fakeHost{answers: ans("RCPT", "550")}, want: "failed 550  refused without a reason (RCPT TO)\n"},
		{name: "two recipients, one refused", host: &fakeHost{ehlo: all, answers: ans("RCPT TO:<b@", "550 5.1.1 who?")}, leg: leg(text, "a@away.test", "b@away.test"), want: S + "failed 550 5.1.1 who?\n", took: 1},
		{name: "RCPT 421", host: &fakeHost{answers: ans("RCPT", "421 4.3.2 down")}, want: "deferred 421 4.3.2 down\n"},
		{name: "the enhanced code of another class is a word", host: &fakeHost{answers: ans("RCPT", "550 4.1.1 odd")}, want: "failed 550  4.1.1 odd\n"},
		{name: "DATA refused", host: &fakeHost{answers: ans("DATA", "452 4.3.1 full")}, want: "deferred 452 4.3.1 full\n"},
		{name: "DATA answered 250", host: &fakeHost{answers: ans("DATA", "250 ok")}, want: "deferred 451 4.5.0 ok\n"},
		{name: "DATA hangs", host: &fakeHost{answers: ans("DATA", "hang")}, want: "deferred 0 4.4.2 The other side did not answer in time\n", within: 2 * time.Minute},
		{name: "4xx after the dot", host: &fakeHost{answers: ans(".", "451 4.3.0 later")}, want: "deferred 451 4.3.0 later\n", took: 1},
		{name: "5xx after the dot", host: &fakeHost{answers: ans(".", "554 5.7.1 spam")}, want: "failed 554 5.7.1 spam\n", took: 1},
		{name: "lost after the dot is unknown, never failed", host: &fakeHost{answers: ans(".", "close")}, want: "deferred 0 4.4.2 No answer after the message was sent; it may have arrived\n", took: 1},
		{name: "silent after the dot", host: &fakeHost{answers: ans(".", "hang")}, want: "deferred 0 4.4.2 No answer after the message was sent; it may have arrived\n", took: 1, within: 10 * time.Minute},
		{name: "nonsense after the dot", host: &fakeHost{answers: ans(".", "hello")}, want: "deferred 0 4.4.2 No answer after the message was sent; it may have arrived\n", took: 1},
		{name: "a reply line without end", host: &fakeHost{answers: ans("RCPT", "550 "+long)}, want: "deferred 0 4.4.2 Connection lost in mid-transfer\n"},
		{name: "a reply of endless lines", host: &fakeHost{answers: ans("RCPT", strings.Repeat("550-x\n", 200)+"550 x")}, want: "deferred 0 4.4.2 Connection lost in mid-transfer\n"},
		{name: "a reply that harms terminals", host: &fakeHost{answers: ans("RCPT", "550 5.1.1 \x1b[31mred\u202e\x00\xff")}, want: "failed 550 5.1.1 [31mred?\n"},
		{name: "lines of different codes", host: &fakeHost{answers: ans("RCPT", "250-x\n550 x")}, want: "deferred 0 4.4.2 Connection lost in mid-transfer\n"},
		{name: "too large by SIZE", host: &fakeHost{ehlo: []string{"SIZE 10"}}, want: "failed 552 5.3.4 The message has 21 bytes, this host takes 10\n"},
		{name: "SIZE without a limit", host: &fakeHost{ehlo: []string{"SIZE"}}, want: S, took: 1},
		{name: "8-bit content and no 8BITMIME", host: &fakeHost{}, leg: leg("Subject: x\r\n\r\nh\xe9\r\n", "a@away.test"), want: "failed 554 5.6.3 The message has 8-bit content, which this host does not take\n"},
		{name: "8-bit content", host: &fakeHost{ehlo: all}, leg: leg("Subject: x\r\n\r\nh\xe9\r\n", "a@away.test"), want: S, took: 1},
		{name: "UTF-8 recipient and no SMTPUTF8", host: &fakeHost{}, leg: leg(text, "ž@away.test", "b@away.test"), want: "failed 553 5.6.7 The address needs SMTPUTF8, which this host does not take\n" + S, took: 1},
		{name: "a UTF-8 domain has an ASCII form", host: &fakeHost{answers: ans("RCPT TO:<a@xn--53h.test>", "250 ok", "RCPT", "550 no")}, leg: leg(text, "a@☕.test"), want: S, took: 1},
		{name: "a bare LF in the store never leaves", host: &fakeHost{}, leg: leg("Subject: x\r\n\r\nh\n.\r\n", "a@away.test"), want: "failed 554 5.6.0 The message has a CR or LF that is not part of a line end\n"},
		{name: "an address that is two commands", host: &fakeHost{}, leg: leg(text, "a@away.test>\r\nRCPT TO:<b@away.test"), want: "failed 553 5.1.3 Bad recipient address\n"},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				l := c.leg
				if l == nil {
					l = leg(text, "a@away.test")
				}
				start := time.Now()
				got, err := carry(t, one(c.host), nil, l)
				took := time.Since(start)
				if c.wantErr != "" {
					if err == nil || !strings.Contains(err.Error(), c.wantErr) || got != strings.Repeat("pending\n", len(l.Rcpts)) {
						t.Fatalf("%v; %s", err, got)
					}
				} else if err != nil || got != c.want {
					t.Fatalf("got %q (%v), want %q", got, err, c.want)
				}
				if len(c.host.taken()) != c.took || c.within > 0 && took != c.within {
					t.Fatalf("%d texts, after %v", len(c.host.taken()), took)
				}
			})
		})
	}
}

func TestWhatIsSaid(t *testing.T) {
	l := leg("Subject: ž\r\n\r\nx\r\n", "a@away.test", "ž@away.test")
	l.Envelope = transport.Envelope{From: "", Ret: "HDRS", EnvID: "e+2B1", SMTPUTF8: true}
	l.Rcpts[0].Notify = transport.NotifySuccess | transport.NotifyFailure
	l.Rcpts[0].ORcpt = "rfc822;a+40b"
	l.Rcpts[1].Notify = transport.NotifyNever
	plain := leg(text, "a@away.test")
	plain.Envelope = transport.Envelope{From: "joe@here.test", Ret: "FULL", EnvID: "x", SMTPUTF8: true, Body: transport.Body8Bit}
	plain.Rcpts[0].Notify = transport.NotifyDelay
	for _, c := range []struct {
		name string
		host *fakeHost
		leg  *transport.Leg
		want string
		dsn  bool
	}{
		{"everything that is offered is used", &fakeHost{ehlo: all}, l,
			"EHLO out.here.test\nMAIL FROM:<> SIZE=18 BODY=8BITMIME SMTPUTF8 RET=HDRS ENVID=e+2B1\nRCPT TO:<a@away.test> NOTIFY=SUCCESS,FAILURE ORCPT=rfc822;a+40b\nRCPT TO:<ž@away.test> NOTIFY=NEVER\nDATA\nQUIT", true},
		{"nothing that is not offered is used; SMTPUTF8 is decided by the content", &fakeHost{}, plain,
			"EHLO out.here.test\nMAIL FROM:<joe@here.test>\nRCPT TO:<a@away.test>\nDATA\nQUIT", false},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := one(c.host)
				src := &source{legs: []*transport.Leg{c.leg}}
				if err := carrier(t, w, nil).Carry(context.Background(), c.leg.Dest, src); err != nil {
					t.Fatal(err)
				}
				w.wg.Wait()
				if got := c.host.commands(); got != c.want {
					t.Fatalf("said\n%s\nwant\n%s", got, c.want)
				}
				if r := src.results[c.leg][0]; r.Outcome != transport.Relayed || r.DSN != c.dsn || r.By != "mx.away.test" {
					t.Fatalf("%+v", r)
				}
			})
		})
	}
}

func TestRoute(t *testing.T) {
	mx := func(s ...any) (out []*net.MX) {
		for i := 0; i < len(s); i += 2 {
			out = append(out, &net.MX{Host: s[i].(string), Pref: uint16(s[i+1].(int))})
		}
		return out
	}
	for _, c := range []struct {
		name  string
		w     *world
		dom   string
		want  string // names in order, or the error's beginning
		perms int
	}{
		{name: "by preference", w: &world{mx: map[string][]*net.MX{"d": mx("c.", 30, "a.", 10, "b.", 20)}, addrs: map[string][]string{"a": {"192.0.2.1", "2001:db8::1"}, "b": {"192.0.2.2"}, "c": {"192.0.2.3"}}}, dom: "d", want: "a 192.0.2.1,a 2001:db8::1,b 192.0.2.2,c 192.0.2.3"},
		{name: "implicit MX", w: &world{addrs: map[string][]string{"d": {"192.0.2.1"}}}, dom: "D", want: "d 192.0.2.1"},
		{name: "no such domain", w: &world{}, dom: "d", want: "550 5.1.2"},
		{name: "null MX", w: &world{mx: map[string][]*net.MX{"d": mx(".", 0)}}, dom: "d", want: "556 5.1.10"},
		{name: "null MX among others is not one", w: &world{mx: map[string][]*net.MX{"d": mx(".", 0, "a.", 10)}, addrs: map[string][]string{"a": {"192.0.2.1"}}}, dom: "d", want: "a 192.0.2.1"},
		{name: "exchangers without address", w: &world{mx: map[string][]*net.MX{"d": mx("a.", 0)}}, dom: "d", want: "451 4.4.4"},
		{name: "DNS is away", w: &world{mxErr: map[string]error{"d": errors.New("servfail")}}, dom: "d", want: "451 4.4.3"},
		{name: "DNS of an exchanger hangs", w: &world{mx: map[string][]*net.MX{"d": mx("a.", 0)}, addrs: map[string][]string{"a": {"hang"}}}, dom: "d", want: "451 4.4.3"},
		{name: "we are the second: equal and worse are cut", w: &world{mx: map[string][]*net.MX{"d": mx("b.", 20, "Us.Here.", 20, "a.", 10, "c.", 30)}, addrs: map[string][]string{"a": {"192.0.2.1"}, "b": {"192.0.2.2"}, "c": {"192.0.2.3"}}}, dom: "d", want: "a 192.0.2.1"},
		{name: "we are the best", w: &world{mx: map[string][]*net.MX{"d": mx("us.here.", 5, "a.", 10)}}, dom: "d", want: "554 5.4.6"},
		{name: "our address under another name", w: &world{addrs: map[string][]string{"d": {"192.0.2.99"}}}, dom: "d", want: "554 5.4.6"},
		{name: "literal", w: &world{}, dom: "[192.0.2.7]", want: " 192.0.2.7"},
		{name: "IPv6 literal", w: &world{}, dom: "[IPv6:2001:db8::7]", want: " 2001:db8::7"},
		{name: "silly literal", w: &world{}, dom: "[0.0.0.0]", want: "550 5.1.2"},
		{name: "an address to everybody", w: &world{addrs: map[string][]string{"d": {"224.0.0.1"}}}, dom: "d", want: "550 5.1.2"},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ca := carrier(t, c.w, func(_ *Config, d *Deps) {
					d.OwnName = func(h string) bool { return h == "us.here" }
					d.OwnAddr = func(a netip.Addr) bool { return a.String() == "192.0.2.99" }
				})
				hs, err := ca.route(context.Background(), c.dom)
				var got []string
				for _, h := range hs {
					got = append(got, h.name+" "+h.addr.String())
				}
				s := strings.Join(got, ",")
				if err != nil {
					s = err.Error()
				}
				if err == nil && s != c.want || err != nil && !strings.HasPrefix(s, c.want) {
					t.Fatalf("got %s, want %s", s, c.want)
				}
			})
		})
	}
	t.Run("random among equals", func(t *testing.T) {
		w := &world{mx: map[string][]*net.MX{"d": mx("a.", 10, "b.", 10)}, addrs: map[string][]string{"a": {"192.0.2.1"}, "b": {"192.0.2.2"}}}
		first := map[string]int{}
		for range 100 {
			hs, err := carrier(t, w, nil).route(context.Background(), "d")
			if err != nil {
				t.Fatal(err)
			}
			first[hs[0].name]++
		}
		if first["a"] < 20 || first["b"] < 20 {
			t.Fatal(first)
		}
	})
}

// TestNextHost: whoever does not take the connection is passed over.
func TestNextHost(t *testing.T) {
	for name, bad := range map[string]*fakeHost{
		"unreachable":     {unreachable: true},
		"greeting 4xx":    {answers: ans("", "421 4.7.0 busy")},
		"greeting 5xx":    {answers: ans("", "554 5.7.1 no")},
		"EHLO 4xx":        {answers: ans("EHLO", "421 no")},
		"no SMTP":         {answers: ans("", "HTTP/1.1 400 Bad Request")},
		"closes":          {answers: ans("", "close")},
		"injected answer": {ehlo: []string{"STARTTLS"}, answers: ans("STARTTLS", "220 go\n250 evil")},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				good := &fakeHost{}
				w := &world{
					mx:    map[string][]*net.MX{"away.test": {{Host: "one.", Pref: 1}, {Host: "two.", Pref: 2}}},
					addrs: map[string][]string{"one": {"192.0.2.1"}, "two": {"192.0.2.2"}},
					hosts: map[string]*fakeHost{"192.0.2.1:25": bad, "192.0.2.2:25": good},
				}
				got, err := carry(t, w, nil, leg(text, "a@away.test"))
				if err != nil || !strings.HasPrefix(got, "relayed") || len(good.taken()) != 1 {
					t.Fatal(got, err)
				}
			})
		})
	}
}

func TestTLS(t *testing.T) {
	requireTLS := leg(text, "a@away.test")
	requireTLS.Envelope.RequireTLS = true
	tls := []string{"STARTTLS", "REQUIRETLS"}
	for _, c := range []struct {
		name   string
		host   *fakeHost
		leg    *transport.Leg
		mxName string
		want   string
		conns  int
	}{
		{name: "used when offered", host: &fakeHost{ehlo: tls}, want: "relayed", conns: 1},
		{name: "a certificate for another name is taken, since nobody promised one", host: &fakeHost{ehlo: tls}, mxName: "other.test", want: "relayed", conns: 1},
		{name: "a failed handshake is repeated in the clear", host: &fakeHost{ehlo: tls, badTLS: true}, want: "relayed", conns: 2},
		{name: "a refusal goes on in the clear", host: &fakeHost{ehlo: tls, answers: ans("STARTTLS", "454 no")}, want: "relayed", conns: 1},
		{name: "injected answers are no reason to go on in the clear", host: &fakeHost{ehlo: tls, answers: ans("STARTTLS", "220 go\n250 evil")}, want: "451 4.7.0", conns: 1},
		{name: "required and good", host: &fakeHost{ehlo: tls}, leg: requireTLS, want: "relayed", conns: 1},
		{name: "required and not offered", host: &fakeHost{}, leg: requireTLS, want: "451 4.7.10", conns: 1},
		{name: "required and broken", host: &fakeHost{ehlo: tls, badTLS: true}, leg: requireTLS, want: "451 4.7.5", conns: 1},
		{name: "required and another name", host: &fakeHost{ehlo: tls}, leg: requireTLS, mxName: "other.test", want: "451 4.7.5", conns: 1},
		{name: "required and not promised further", host: &fakeHost{ehlo: tls[:1]}, leg: requireTLS, want: "failed 550 5.7.30", conns: 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := one(c.host)
				if c.mxName != "" {
					w.mx["away.test"][0].Host = c.mxName
					w.addrs[c.mxName] = []string{"192.0.2.1"}
				}
				l := c.leg
				if l == nil {
					l = leg(text, "a@away.test")
				}
				got, err := carry(t, w, nil, l)
				if err != nil {
					got = err.Error()
				}
				if !strings.HasPrefix(got, c.want) || c.host.conns != c.conns {
					t.Fatalf("got %q over %d connections, want %q over %d", got, c.host.conns, c.want, c.conns)
				}
			})
		})
	}
}

func TestSmarthost(t *testing.T) {
	smart := func(cfg *Config, _ *Deps) {
		cfg.Smarthost = &Smarthost{Host: "mx.away.test", User: "joe", Password: "secret"}
	}
	for _, c := range []struct {
		name string
		host *fakeHost
		want string
	}{
		{"PLAIN", &fakeHost{ehlo: []string{"STARTTLS", "AUTH LOGIN PLAIN"}}, "relayed"},
		{"LOGIN", &fakeHost{ehlo: []string{"STARTTLS", "AUTH LOGIN"}, answers: ans("AUTH LOGIN", "334 VXNlcm5hbWU6", "am9l", "334 UGFzc3dvcmQ6", "c2VjcmV0", "235 ok")}, "relayed"},
		{"never without TLS", &fakeHost{ehlo: []string{"AUTH PLAIN"}}, "451 4.7.10"},
		{"refused log-in waits, it bounces nothing", &fakeHost{ehlo: []string{"STARTTLS", "AUTH PLAIN"}, answers: ans("AUTH", "535 5.7.8 wrong")}, "451 4.7.8"},
		{"no mechanism", &fakeHost{ehlo: []string{"STARTTLS", "AUTH GSSAPI"}}, "451 4.7.0"},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := one(nil)
				w.hosts = map[string]*fakeHost{"192.0.2.1:587": c.host}
				w.mx = nil
				got, err := carry(t, w, smart, leg(text, "a@anywhere.test"))
				if err != nil {
					got = err.Error()
				}
				if !strings.HasPrefix(got, c.want) {
					t.Fatal(got)
				}
				if c.name == "never without TLS" && strings.Contains(c.host.commands(), "AUTH") {
					t.Fatal("password in the clear")
				}
			})
		})
	}
}

func TestManyLegs(t *testing.T) {
	t.Run("one after the other over few connections", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			h := &fakeHost{ehlo: all}
			w := one(h)
			var legs []*transport.Leg
			for i := range 20 {
				legs = append(legs, leg(text, fmt.Sprintf("u%d@away.test", i)))
			}
			got, err := carry(t, w, nil, legs...)
			if err != nil || strings.Count(got, "relayed") != 20 || h.conns > 3 || len(h.taken()) != 20 {
				t.Fatal(err, got, h.conns)
			}
		})
	})
	t.Run("a host that takes one connection takes all over it", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			h := &fakeHost{ehlo: all, limitConns: 1}
			w := one(h)
			var legs []*transport.Leg
			for i := range 9 {
				legs = append(legs, leg(text, fmt.Sprintf("u%d@away.test", i)))
			}
			got, err := carry(t, w, nil, legs...)
			n := strings.Count(got, "relayed")
			if n+strings.Count(got, "pending") != 9 || n != len(h.taken()) || n < 9 && err == nil || n == 0 {
				t.Fatal(err, got, h.conns)
			}
		})
	})
	t.Run("a reused connection that broke is replaced", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			h := &fakeHost{answers: ans("MAIL{2}", "close")}
			got, err := carry(t, one(h), func(c *Config, _ *Deps) { c.MaxConns = 1 }, leg(text, "a@away.test"), leg(text, "b@away.test"))
			if err != nil || strings.Count(got, "relayed") != 2 || h.conns != 2 {
				t.Fatal(got, err, h.conns)
			}
		})
	})
	t.Run("beyond the host's recipient limit goes in further transactions", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			h := &fakeHost{ehlo: all, answers: ans("RCPT{3}", "452 4.5.3 too many", "RCPT{4}", "452 4.5.3 too many")}
			got, err := carry(t, one(h), nil, leg(text, "a@away.test", "b@away.test", "c@away.test", "d@away.test"))
			if err != nil || strings.Count(got, "relayed") != 4 || len(h.taken()) != 2 || h.conns != 1 {
				t.Fatal(got, err, h.commands())
			}
		})
	})
	t.Run("500 recipients are pipelined in groups", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			h := &fakeHost{ehlo: all}
			l := leg(text)
			for i := range 500 {
				l.Rcpts = append(l.Rcpts, transport.Recipient{Address: fmt.Sprintf("u%d@away.test", i)})
			}
			got, err := carry(t, one(h), nil, l)
			if err != nil || strings.Count(got, "relayed") != 500 || len(h.taken()) != 1 {
				t.Fatal(err)
			}
		})
	})
	t.Run("an idle connection is given up", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			h := &fakeHost{}
			w := one(h)
			ctx, cancel := context.WithCancel(context.Background())
			src := &source{legs: []*transport.Leg{leg(text, "a@away.test")}, wait: true}
			done := make(chan error)
			c := carrier(t, w, nil)
			go func() {
				done <- c.Carry(ctx, transport.Destination{Scope: transport.ScopeOutside, Domain: "away.test"}, src)
			}()
			time.Sleep(9 * time.Second)
			if w.openNow() != 1 {
				t.Error("closed too early")
			}
			time.Sleep(2 * time.Second)
			if w.openNow() != 0 || !strings.HasSuffix(h.commands(), "QUIT") {
				t.Error("still open", h.commands())
			}
			cancel()
			if err := <-done; err != context.Canceled {
				t.Error(err)
			}
			w.wg.Wait()
		})
	})
}

func TestNothingIsSentWhileTheAnswerCouldNotBeRecorded(t *testing.T) {
	for _, conns := range []int{1, 3} {
		synctest.Test(t, func(t *testing.T) {
			h := &fakeHost{ehlo: all}
			w := one(h)
			var asked atomic.Int32
			var legs []*transport.Leg
			for i := range 12 {
				legs = append(legs, leg(text, fmt.Sprintf("u%d@away.test", i)))
			}
			got, err := carry(t, w, func(c *Config, d *Deps) {
				c.MaxConns = conns
				d.Ready = func() error { // the disk is full from the sixth message on
					if asked.Add(1) > 5 {
						return transport.ErrNoSpace
					}
					return nil
				}
			}, legs...)
			if err != transport.ErrNoSpace || strings.Count(got, "relayed") != 5 || strings.Count(got, "pending") != 7 || len(h.taken()) != 5 || w.openNow() != 0 {
				t.Fatal(err, got, len(h.taken()), w.openNow())
			}
		})
	}
	synctest.Test(t, func(t *testing.T) { // full from the start: nobody is even called
		h := &fakeHost{ehlo: all}
		got, err := carry(t, one(h), func(_ *Config, d *Deps) { d.Ready = func() error { return transport.ErrNoSpace } }, leg(text, "a@away.test"))
		if err != transport.ErrNoSpace || h.conns != 0 || !strings.HasPrefix(got, "pending") {
			t.Fatal(err, got, h.conns)
		}
	})
}

// TestStopping: the end of ctx leaves legs pending, but for one whose text may
// have arrived: its answer is waited for a moment.
func TestStopping(t *testing.T) {
	for _, c := range []struct {
		name, cmd string
		want      string
		after     time.Duration
	}{
		{"in MAIL", "MAIL", "pending\n", time.Minute},
		{"in DATA", "DATA", "pending\n", time.Minute},
		{"after the dot", ".", "deferred 0 4.4.2 No answer after the message was sent; it may have arrived\n", time.Minute + 10*time.Second},
		{"in the greeting", "", "pending\n", time.Minute},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				h := &fakeHost{answers: ans(c.cmd, "hang")}
				w := one(h)
				l := leg(text, "a@away.test")
				src := &source{legs: []*transport.Leg{l}}
				ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
				defer cancel()
				start := time.Now()
				err := carrier(t, w, nil).Carry(ctx, l.Dest, src)
				w.wg.Wait()
				got := "pending\n"
				if r := src.results[l]; r != nil {
					got = fmt.Sprintf("%s %d %s %s\n", r[0].Outcome, r[0].Code, r[0].Enhanced, r[0].Text)
				}
				if got != c.want || time.Since(start) != c.after || got == "pending\n" && !errors.Is(err, context.DeadlineExceeded) {
					t.Fatalf("%s %v after %v", got, err, time.Since(start))
				}
			})
		})
	}
}

// TestWire: what leaves is the text with its dots doubled and nothing else;
// hosts that take LF, or CR, for a line end see one message, too. ATTACKS A2.
func TestWire(t *testing.T) {
	for in, want := range map[string]string{
		"":                      ".\r\n",
		"a\r\n":                 "a\r\n.\r\n",
		"a":                     "a\r\n.\r\n",
		".\r\n":                 "..\r\n.\r\n",
		"..a\r\n.b\r\nc.\r\n":   "...a\r\n..b\r\nc.\r\n.\r\n",
		"a\r\n.\r\nMAIL\r\n":    "a\r\n..\r\nMAIL\r\n.\r\n",
		"a\r\n.":                "a\r\n..\r\n.\r\n",
		"h: v\r\n\r\n\x00.\r\n": "h: v\r\n\r\n\x00.\r\n.\r\n",
	} {
		var out strings.Builder
		if err := writeText(func(b []byte) error { out.Write(b); return nil }, memBody(in), func() {}); err != nil || out.String() != want {
			t.Errorf("%q leaves as %q, want %q", in, out.String(), want)
		}
		if _, err := scan(memBody(in)); err != nil {
			t.Errorf("%q: %v", in, err)
		}
	}
	ends := []string{"\r\n", "\n", "\r", "\r\r\n", "\n\r", "\r\n\r", "\n\n"}
	for _, a := range ends {
		for _, b := range ends {
			body := "x: y\r\n\r\nfirst" + a + "." + b + "MAIL FROM:<evil@b.test>\r\n"
			_, err := scan(memBody(body))
			if bare := strings.ContainsAny(strings.ReplaceAll(body, "\r\n", ""), "\r\n"); bare != (err != nil) {
				t.Errorf("%q: %v", body, err)
			}
		}
	}
	// Across the buffers of scan and writeText.
	for _, pad := range []int{32<<10 - 3, 32<<10 - 2, 32<<10 - 1, 64<<10 - 2, 64<<10 - 1} {
		body := strings.Repeat("x", pad) + "\r\n.\r\n.y\r\n"
		var out strings.Builder
		if err := writeText(func(b []byte) error { out.Write(b); return nil }, memBody(body), func() {}); err != nil || out.String() != strings.Repeat("x", pad)+"\r\n..\r\n..y\r\n.\r\n" {
			t.Errorf("pad %d", pad)
		}
		if _, err := scan(memBody(body)); err != nil {
			t.Errorf("pad %d: %v", pad, err)
		}
		if _, err := scan(memBody(strings.Repeat("x", pad) + "\r\r\n")); err == nil {
			t.Errorf("pad %d: bare CR unseen", pad)
		}
	}
}

// FuzzReply: no bytes of a host make the reader panic or keep more than its
// bounds.
func FuzzReply(f *testing.F) {
	f.Add([]byte("250 ok\r\n"))
	f.Add([]byte("250-a\r\n250 2.1.0 b\r\n"))
	f.Add([]byte("550 5.1.1 \xff\xfe\r\n"))
	f.Add([]byte("99999\n\n"))
	f.Fuzz(func(t *testing.T, in []byte) {
		rd := reader{conn: stringConn{strings.NewReader(string(in))}}
		for {
			rp, err := rd.read()
			if err != nil {
				return
			}
			enhanced, words := rp.words()
			if len(rp.lines) > maxReplyLines || len(words) > maxWords || strings.ContainsAny(words, "\r\n\x1b\x00") || len(enhanced) > 9 {
				t.Fatalf("%q %q", enhanced, words)
			}
		}
	})
}

type stringConn struct{ *strings.Reader }

func (stringConn) Write(p []byte) (int, error)        { return len(p), nil }
func (stringConn) Close() error                       { return nil }
func (stringConn) LocalAddr() net.Addr                { return nil }
func (stringConn) RemoteAddr() net.Addr               { return nil }
func (stringConn) SetDeadline(t time.Time) error      { return nil }
func (stringConn) SetReadDeadline(t time.Time) error  { return nil }
func (stringConn) SetWriteDeadline(t time.Time) error { return nil }
