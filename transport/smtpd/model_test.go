package smtpd

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"

	"posthouse/mesh"
)

// model is the reference state machine of a session on port 25 or 587: what
// code each command must get. ATTACKS A6.
type model struct {
	port                Port
	greeted, esmtp, tls bool
	login               bool
	mail, tried, spoilt bool
	chunking            bool // a BDAT row is open
	rcpts               int
	accepted            int
	closed              bool
}

func (m *model) reset() {
	m.mail, m.tried, m.spoilt, m.chunking, m.rcpts = false, false, false, false, 0
}

// step returns the codes that the command gets, in order.
func (m *model) step(cmd string) (codes []string) {
	one := func(c string) []string { return []string{c} }
	verb, arg, _ := strings.Cut(cmd, " ")
	switch {
	case verb == "NOOP":
		return one("250")
	case verb == "VRFY":
		return one("252")
	case verb == "BOGUS":
		return one("500")
	case verb == "QUIT":
		m.closed = true
		return one("221")
	case verb == "RSET":
		m.reset()
		return one("250")
	case verb == "EHLO" || verb == "HELO":
		m.reset()
		m.greeted, m.esmtp = true, verb == "EHLO"
		return one("250")
	case m.chunking && verb != "BDAT":
		return one("503")
	case verb == "STARTTLS":
		switch {
		case m.tls || m.mail:
			return one("503")
		}
		*m = model{port: m.port, tls: true, login: m.login, accepted: m.accepted}
		return one("220")
	case verb == "AUTH":
		switch {
		case m.port == PortMX:
			return one("502")
		case !m.tls:
			return one("530")
		case m.login || !m.esmtp || m.mail:
			return one("503")
		}
		m.login = true
		return one("235")
	case verb == "MAIL":
		if !m.greeted || m.mail {
			return one("503")
		}
		m.tried = true
		if arg == "FROM:bad" {
			return one("501")
		}
		if m.port != PortMX && !m.login {
			return one("530")
		}
		m.reset()
		m.mail = true
		return one("250")
	case verb == "RCPT":
		switch {
		case !m.mail || m.spoilt:
			return one("503")
		case arg == "TO:<who@here.test>":
			m.tried = true
			return one("550")
		}
		m.rcpts++
		return one("250")
	case verb == "DATA":
		switch {
		case m.spoilt || !m.mail || m.rcpts == 0 && !m.tried:
			return one("503")
		case m.rcpts == 0:
			return one("554")
		}
		m.reset()
		if arg == "bare" {
			return []string{"354", "550"}
		}
		m.accepted++
		return []string{"354", "250"}
	case verb == "BDAT":
		last := strings.HasSuffix(arg, "LAST")
		switch {
		case m.spoilt || !m.mail || m.rcpts == 0 && !m.tried:
			return one("503")
		case m.rcpts == 0:
			return one("554")
		case strings.HasPrefix(arg, "bare") && last:
			m.reset()
			return one("550")
		case strings.HasPrefix(arg, "bare"):
			m.chunking, m.spoilt = false, true
			return one("550")
		case last:
			m.reset()
			m.accepted++
			return one("250")
		}
		m.chunking = true
		return one("250")
	}
	panic(cmd)
}

// wire turns a model's command into what the client sends, text apart.
func wireForm(cmd string) (line, text string) {
	switch cmd {
	case "DATA":
		return "DATA\r\n", "a: b\r\n\r\n..x\r\n.\r\n"
	case "DATA bare":
		return "DATA\r\n", "a: b\nMAIL FROM:<evil@b.test>\r\nsome more of it\r\n.\r\n"
	case "BDAT":
		return "BDAT 12\r\nx: y\r\n\r\nAA\r\n", ""
	case "BDAT LAST":
		return "BDAT 6 LAST\r\nQUIT\r\n", ""
	case "BDAT bare":
		return "BDAT 6\r\nRS\nET\n", ""
	case "BDAT bareLAST":
		return "BDAT 6 LAST\r\nRS\nET\n", ""
	}
	return cmd + "\r\n", ""
}

var modelCommands = []string{
	"EHLO client.test", "HELO client.test", "MAIL FROM:<joe@here.test>", "MAIL FROM:<joe@here.test>", "MAIL FROM:<joe@here.test>", "MAIL FROM:bad",
	"RCPT TO:<joe@here.test>", "RCPT TO:<jane@here.test>", "RCPT TO:<who@here.test>", "DATA", "DATA", "DATA bare",
	"BDAT", "BDAT", "BDAT LAST", "BDAT bare", "BDAT bareLAST", "RSET", "NOOP", "VRFY x", "BOGUS", "STARTTLS", "AUTH PLAIN AGpvZQBzZWNyZXQ=", "QUIT",
}

func modelRig(t *testing.T, port Port) *rig {
	return newRig(t, port, func(_ *rig, c *Config, _ *Deps) {
		c.MaxBadCommands, c.MaxIdleCommands = 1<<20, 1<<20
		c.Trusted = []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0")}
	})
}

func TestRandomSequencesAgainstTheModel(t *testing.T) {
	for seed := range uint64(150) {
		port := []Port{PortMX, PortSubmission}[seed%2]
		t.Run(fmt.Sprintf("%s seed %d", port, seed), func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				rnd := rand.New(rand.NewPCG(seed, 1))
				g := modelRig(t, port)
				defer g.close()
				c := g.dial()
				defer func() { c.close() }()
				c.want("220", "")
				m := &model{port: port}
				var trail []string
				for range 80 {
					cmd := modelCommands[rnd.IntN(len(modelCommands))]
					if cmd == "QUIT" && rnd.IntN(4) > 0 {
						continue
					}
					trail = append(trail, cmd)
					want := m.step(cmd)
					line, text := wireForm(cmd)
					// The chunk of a refused BDAT follows it in any case.
					c.send(line)
					for i, w := range want {
						if i == 1 {
							c.send(text)
						}
						if got := c.reply(); !strings.HasPrefix(got, w) {
							t.Fatalf("%s\ngot %q, want %v", strings.Join(trail, "\n"), got, want)
						}
					}
					if cmd == "STARTTLS" && want[0] == "220" {
						c.startTLS()
					}
					if n := len(g.accepted()); n != m.accepted {
						t.Fatalf("%s\n%d accepted, want %d", strings.Join(trail, "\n"), n, m.accepted)
					}
					if m.closed {
						if got := c.reply(); got != "EOF" {
							t.Fatal(got)
						}
						return
					}
				}
			})
		})
	}
}

// TestCutAnywhere closes the connection at every byte of a session with two
// messages, one by DATA and one by BDAT: a message is taken only when its last
// byte was sent.
func TestCutAnywhere(t *testing.T) {
	const head = "EHLO x\r\nMAIL FROM:<a@b.test>\r\nRCPT TO:<joe@here.test>\r\nDATA\r\n"
	first := head + "a: b\r\n\r\nc\r\n.\r\n"
	second := first + "MAIL FROM:<a@b.test>\r\nRCPT TO:<joe@here.test>\r\nBDAT 4\r\nab\r\nBDAT 3 LAST\r\nc\r\n"
	for cut := range len(second) + 1 {
		bubble(t, func(t *testing.T) {
			g := newRig(t, PortMX, nil)
			c := g.dial()
			c.send(second[:cut])
			c.raw.CloseWrite()
			synctest.Wait()
			c.close()
			g.close()
			want := 0
			if cut >= len(first) {
				want++
			}
			if cut == len(second) {
				want++
			}
			if n := len(g.accepted()); n != want {
				t.Fatalf("cut at %d: %d taken, want %d", cut, n, want)
			}
		})
	}
}

// TestRelayMatrix: only who logged in, a device let in by rule, or mail for our
// own domain gets past RCPT. ATTACKS A13.
func TestRelayMatrix(t *testing.T) {
	local := []string{"<joe@here.test>", "<JOE@HERE.TEST>", "<\"joe\"@here.test>", "<joe+tag@here.test>", "<postmaster>", "<@away.test:joe@here.test>"}
	away := []string{
		"<ann@away.test>", "<@here.test:ann@away.test>", "<@here.test,@here.test:ann@away.test>", "<joe%here.test@away.test>",
		"<\"joe@here.test\"@away.test>", "<here.test!ann@away.test>", "<joe@here.test.away.test>", "<joe@away.test.>",
		"<joe@[198.51.100.7]>", "<joe@[IPv6:::1]>", "<joe@xhere.test>", "<joe@here.testx>", "<joe@here_test>",
		"<ann%away.test@here.test>", "<away.test!ann@here.test>", "<\"ann@away.test\"@here.test>", "<ann@away.test@here.test>", "<@away.test>",
		"<ann@away.test,joe@here.test>", "<ann@away.test> <joe@here.test>",
	}
	for _, s := range []struct {
		name      string
		port      Port
		from      string
		login     bool
		relays    bool
		mailFails bool
	}{
		{name: "stranger", port: PortMX, from: "<ann@away.test>"},
		{name: "null sender", port: PortMX, from: "<>"},
		{name: "stranger as one of us", port: PortMX, from: "<joe@here.test>"},
		{name: "device", port: PortMX, from: "<scanner@here.test>", relays: true},
		{name: "user", port: PortSubmissions, from: "<joe@here.test>", login: true, relays: true},
		{name: "submission without login", port: PortSubmissions, from: "<joe@here.test>", mailFails: true},
		{name: "user as another", port: PortSubmissions, from: "<jane@here.test>", login: true, mailFails: true},
	} {
		t.Run(s.name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				for i, to := range append(local, away...) {
					g := modelRig(t, s.port)
					c := g.dial()
					if s.port == PortSubmissions {
						c.startTLS()
					}
					c.greet("x")
					if s.login {
						c.do("AUTH PLAIN AGpvZQBzZWNyZXQ=", "235")
					}
					c.send("MAIL FROM:" + s.from + "\r\nRCPT TO:" + to + "\r\n")
					mail, rcpt := c.reply(), c.reply()
					if s.mailFails != (mail[0] == '5') || s.mailFails && rcpt[0] != '5' {
						t.Errorf("%s to %s: %s, %s", s.from, to, mail, rcpt)
					}
					if !s.mailFails && i < len(local) && rcpt[0] != '2' {
						t.Errorf("local %s: %s", to, rcpt)
					}
					// ann… at our own domain is unknown there, not relayed.
					if !s.relays && i >= len(local) && rcpt[0] == '2' {
						t.Errorf("relays %s: %s", to, rcpt)
					}
					c.close()
					g.close()
				}
			})
		})
	}
}

// FuzzCommand: any line either fails or means what it prints as. ATTACKS A12.
func FuzzCommand(f *testing.F) {
	for _, s := range []string{
		"MAIL FROM:<a@b> SIZE=1 BODY=8BITMIME", "RCPT TO:<@a,@b:\"x y\"@c> NOTIFY=NEVER ORCPT=rfc822;a+2Bb", "EHLO [IPv6:::1]", "BDAT 12 LAST",
		"RCPT TO:<a@b> SIZE=1", "MAIL FROM:<a@b>> X", "rcpt to:<postmaster>", "MAIL FROM:<\"\\\"\"@x>", "MAIL FROM:<ž@č> SMTPUTF8",
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, line []byte) {
		v, arg := parseLine(line)
		check := func(a mesh.Address) {
			s := a.String()
			b, err := mesh.ParseAddress(s)
			if err != nil || b != a || strings.ContainsAny(s, "\r\n\x00") {
				t.Fatalf("%q: %q, %v", line, s, err)
			}
		}
		switch v {
		case verbMAIL:
			if a, rest, f := parseReverse(arg); f == nil {
				if a != (mesh.Address{}) {
					check(a)
				}
				if p, f := parseMailParams(rest, 1000, true); f == nil && (p.Size < 0 || p.Size > 1000 || strings.ContainsAny(p.EnvID, " \r\n")) {
					t.Fatalf("%q: %+v", line, p)
				}
			}
		case verbRCPT:
			if a, bare, rest, f := parseForward(arg); f == nil {
				if !bare {
					check(a)
				}
				var r Rcpt
				if f := parseRcptParams(rest, true, &r); f == nil && strings.ContainsAny(r.ORcpt, " \r\n") {
					t.Fatalf("%q: %+v", line, r)
				}
			}
		case verbEHLO, verbHELO:
			if s := string(arg); validHelo(s) && strings.ContainsAny(s, " \r\n\x00()<>") {
				t.Fatalf("%q", s)
			}
		case verbBDAT:
			if n, _, ok := parseBDAT(arg); ok && n < -1 {
				t.Fatal(n)
			}
		}
		if s := clean(string(line)); strings.ContainsAny(s, "\r\n\x1b") {
			t.Fatalf("%q", s)
		}
	})
}

// FuzzSession feeds a whole session: no panic, no goroutine left behind, and
// what is taken was ended properly and has only CRLF line ends.
func FuzzSession(f *testing.F) {
	f.Add([]byte("EHLO x\r\nMAIL FROM:<a@b.test>\r\nRCPT TO:<joe@here.test>\r\nDATA\r\na: b\r\n.\r\nQUIT\r\n"), uint8(0))
	f.Add([]byte("EHLO x\r\nMAIL FROM:<a@b.test>\r\nRCPT TO:<joe@here.test>\r\nBDAT 3\r\na\r\nBDAT 2 LAST\r\n\r\nSTARTTLS\r\n"), uint8(3))
	f.Add([]byte("HELO x\nMAIL"), uint8(1))
	f.Add([]byte("EHLO x\r\nMAIL FROM:<a@b.test>\r\nRCPT TO:<joe@here.test>\r\nDATA\r\n\r\r\n.\r\r\n.\r\nMAIL FROM:<evil@b.test>\r\n"), uint8(2))
	f.Fuzz(func(t *testing.T, in []byte, step uint8) {
		synctest.Test(t, func(t *testing.T) {
			g := modelRig(t, PortMX)
			c := g.dial()
			for p := in; len(p) > 0; {
				n := len(p)
				if step > 0 {
					n = min(n, int(step))
				}
				if _, err := c.conn.Write(p[:n]); err != nil {
					break
				}
				if step > 0 {
					synctest.Wait()
				}
				p = p[n:]
			}
			c.raw.CloseWrite()
			synctest.Wait()
			c.close()
			g.close()
			if n := g.srv.Sessions(); n != 0 {
				t.Fatal(n)
			}
			ends := strings.Count(string(in), ".\r\n") + strings.Count(strings.ToUpper(string(in)), "LAST")
			m := g.accepted()
			if len(m) > ends {
				t.Fatalf("%d messages, %d ends", len(m), ends)
			}
			for _, x := range m {
				if strings.ContainsAny(strings.ReplaceAll(x.body, "\r\n", ""), "\r\n\x00") || len(x.rcpts) == 0 {
					t.Fatalf("%q", x.body)
				}
			}
		})
	})
}

// TestDrainWhileBusy drains in the midst of many sessions: every message that
// was answered 250 was taken, and nothing is left.
func TestDrainWhileBusy(t *testing.T) {
	bubble(t, func(t *testing.T) {
		g := modelRig(t, PortMX)
		done := make(chan int)
		for i := range 20 {
			go func() {
				raw, err := g.ln.Dial(addr(fmt.Sprintf("10.0.0.%d:1", i+1)))
				if err != nil {
					done <- 0
					return
				}
				c := newClient(t, raw)
				n := 0
				for range 50 {
					fmt.Fprintf(raw, "HELO x\r\nMAIL FROM:<a@b.test>\r\nRCPT TO:<joe@here.test>\r\nDATA\r\na: b\r\n.\r\n")
					r := ""
					for strings.HasPrefix(r, "2") || strings.HasPrefix(r, "3") || r == "" {
						if r = c.reply(); strings.HasPrefix(r, "250 2.0.0 Queued") {
							n++
							break
						}
					}
					if strings.HasPrefix(r, "421") || strings.HasSuffix(r, "EOF") {
						break
					}
				}
				raw.Close()
				done <- n
			}()
		}
		if err := g.srv.Drain(context.Background()); err != nil {
			t.Error(err)
		}
		if err := <-g.done; err != ErrDraining {
			t.Error(err)
		}
		sum := 0
		for range 20 {
			sum += <-done
		}
		if sum != len(g.accepted()) {
			t.Errorf("%d answered, %d taken", sum, len(g.accepted()))
		}
	})
}
