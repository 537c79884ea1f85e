package smtpd

import (
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
)

// lineEnds are the ways to end a line that somebody's mail server takes for
// one.
var lineEnds = []string{"\r\n", "\n", "\r", "\r\r\n", "\n\r", "\r\n\r", "\n\n", "\x00\r\n", "\r\x00\n", "\r\n\x00", "\x00\n", "\n\x00"}

// TestSmuggling sends one text that holds ".", framed by every pair of line
// ends, with commands of an attacker behind it, in one write and byte by byte.
// The attacker's message must never be taken. ATTACKS A1.
func TestSmuggling(t *testing.T) {
	const evil = "MAIL FROM:<evil@here.test>\r\nRCPT TO:<joe@here.test>\r\nDATA\r\nevil\r\n.\r\n"
	n := 0
	for _, a := range lineEnds {
		for _, b := range lineEnds {
			if a == "\r\n" && strings.HasPrefix(b, "\r\n") {
				continue // that is the true end: what follows are commands
			}
			n++
			for _, step := range []int{0, 1} {
				t.Run(fmt.Sprintf("DATA %q.%q by %d", a, b, step), func(t *testing.T) {
					talk(t, PortMX, nil, func(t *testing.T, g *rig, c *client) {
						c.ready()
						c.do("DATA", "354")
						if step > 0 {
							for _, x := range []byte("Subject: x\r\n\r\nfirst" + a + "." + b + evil) {
								if _, err := c.conn.Write([]byte{x}); err != nil {
									break
								}
								synctest.Wait()
							}
						} else {
							c.send("Subject: x\r\n\r\nfirst" + a + "." + b + evil)
						}
						synctest.Wait()
						checkTaken(t, g)
					})
				})
			}
			t.Run(fmt.Sprintf("BDAT %q.%q", a, b), func(t *testing.T) {
				talk(t, PortMX, nil, func(t *testing.T, g *rig, c *client) {
					c.ready()
					text := "Subject: x\r\n\r\nfirst" + a + "." + b + evil
					c.send(fmt.Sprintf("BDAT %d LAST\r\n%sVRFY next\r\n", len(text), text))
					if got := c.reply(); !strings.HasPrefix(got, "250 2.0.0 Queued") && !strings.HasPrefix(got, "550 5.6.") {
						t.Errorf("answer %q", got)
					}
					c.want("252", "the chunk: the next command seen is the next command sent")
					checkTaken(t, g)
				})
			})
		}
	}
	if n < 60 {
		t.Fatalf("only %d variants", n)
	}
}

func checkTaken(t *testing.T, g *rig) {
	t.Helper()
	m := g.accepted()
	if len(m) > 1 {
		t.Fatalf("%d messages taken", len(m))
	}
	for _, x := range m {
		if strings.HasPrefix(x.env.From, "evil") {
			t.Fatalf("smuggled: %q", x.body)
		}
		if s := strings.ReplaceAll(x.body, "\r\n", ""); strings.ContainsAny(s, "\r\n\x00") {
			t.Fatalf("taken with a bare CR, LF or NUL: %q", x.body)
		}
	}
}

// TestTextSplitAnywhere reads one text through every split of the wire and
// every size of the reader's buffer.
func TestTextSplitAnywhere(t *testing.T) {
	const wire = "a: b\r\n\r\n..x\r\n.y\r\n...\r\n\r\nend of it\r\n.\r\nQUIT\r\n"
	const want = "a: b\r\n\r\n.x\r\ny\r\n..\r\n\r\nend of it\r\n"
	for split := 1; split < len(wire); split++ {
		talk(t, PortMX, nil, func(t *testing.T, g *rig, c *client) {
			c.ready()
			c.do("DATA", "354")
			c.send(wire[:split])
			synctest.Wait()
			c.send(wire[split:])
			c.want("250 2.0.0 Queued", "text")
			c.want("221", "QUIT")
			if m := g.accepted(); len(m) != 1 || m[0].body != want {
				t.Fatalf("split at %d: %v", split, m)
			}
		})
	}
	for size := 1; size < 12; size++ {
		d := dotText{text: text{w: &wireOf(wire, 3).wire, limit: 1000}}
		var got []byte
		var err error
		for p := make([]byte, size); err == nil; {
			var n int
			n, err = d.Read(p)
			got = append(got, p[:n]...)
		}
		if string(got) != want || err.Error() != "EOF" {
			t.Fatalf("buffer of %d: %q %v", size, got, err)
		}
	}
}

// TestPipeliningSplitAnywhere sends a whole session in one go, cut in two at
// every byte: the answers are the same, each once.
func TestPipeliningSplitAnywhere(t *testing.T) {
	const all = "EHLO client.test\r\nMAIL FROM:<a@b.test>\r\nRCPT TO:<joe@here.test>\r\nRCPT TO:<nobody@here.test>\r\nBDAT 4\r\n\r\n\r\nBDAT 3 LAST\r\nx\r\nNOOP\r\nQUIT\r\n"
	var first string
	for split := 0; split < len(all); split++ {
		talk(t, PortMX, nil, func(t *testing.T, g *rig, c *client) {
			c.send(all[:split])
			synctest.Wait()
			c.send(all[split:])
			var got strings.Builder
			for {
				r := c.reply()
				got.WriteString(r + "\n")
				if strings.HasSuffix(r, "EOF") {
					break
				}
			}
			if split == 0 {
				first = got.String()
				if !strings.Contains(first, "Queued") || !strings.Contains(first, "221") {
					t.Fatal(first)
				}
			}
			if got.String() != first || len(g.accepted()) != 1 || g.accepted()[0].body != "\r\n\r\nx\r\n" {
				t.Fatalf("split at %d:\n%s\nwant\n%s", split, got.String(), first)
			}
		})
	}
}

// TestOneWriteForAPipelinedGroup: RFC 2920 section 3.2.
func TestOneWriteForAPipelinedGroup(t *testing.T) {
	talk(t, PortMX, nil, func(t *testing.T, g *rig, c *client) {
		c.want("220", "")
		c.send("HELO x\r\nMAIL FROM:<a@b.test>\r\nRCPT TO:<joe@here.test>\r\nDATA\r\n")
		synctest.Wait()
		b := make([]byte, 4096)
		n, _ := c.r.Read(b)
		if got := strings.Count(string(b[:n]), "\r\n"); got != 4 {
			t.Fatalf("%d replies at once: %q", got, b[:n])
		}
	})
}

// TestSTARTTLSInjection: commands sent in the clear with or after STARTTLS
// never take effect, wherever the packets are cut. ATTACKS A3.
func TestSTARTTLSInjection(t *testing.T) {
	const flight = "EHLO client.test\r\nSTARTTLS\r\nMAIL FROM:<evil@b.test>\r\nRCPT TO:<joe@here.test>\r\nDATA\r\nevil\r\n.\r\n"
	for split := 0; split < len(flight); split++ {
		talk(t, PortMX, nil, func(t *testing.T, g *rig, c *client) {
			c.send(flight[:split])
			synctest.Wait()
			if split < len(flight) {
				c.conn.Write([]byte(flight[split:]))
			}
			synctest.Wait()
			var all string
			for !strings.HasSuffix(all, "EOF") {
				all += c.reply()
			}
			if len(g.accepted()) != 0 || g.partial != 0 || strings.Contains(all, "250 2.1.0") || strings.Contains(all, "354") {
				t.Fatalf("split at %d: %q", split, all)
			}
		})
	}
}

// TestSTARTTLSInjectionWithHandshake: the victim's own handshake follows what
// the attacker put in front of it.
func TestSTARTTLSInjectionWithHandshake(t *testing.T) {
	talk(t, PortMX, nil, func(t *testing.T, g *rig, c *client) {
		c.greet("client.test")
		c.send("STARTTLS\r\nEHLO evil\r\nMAIL FROM:<evil@b.test>\r\n")
		c.want("501 5.5.4", "injection")
		c.want("EOF", "injection")
	})
}

// TestSTARTTLSForgetsEverything: HELO and errors said in the clear are gone.
func TestSTARTTLSForgetsEverything(t *testing.T) {
	talk(t, PortMX, nil, func(t *testing.T, g *rig, c *client) {
		c.greet("liar.test")
		c.do("STARTTLS", "220")
		c.startTLS()
		c.do("RCPT TO:<joe@here.test>", "503")
		c.do("MAIL FROM:<a@b.test>", "503")
		c.do("EHLO honest.test", "250")
		c.do("MAIL FROM:<a@b.test>", "250")
		c.do("RCPT TO:<joe@here.test>", "250")
		c.do("DATA", "354")
		c.do("x: y\r\n.", "250")
		if e := g.accepted()[0].env; e.Helo != "honest.test" || e.TLS != "TLS1.3 TLS_AES_128_GCM_SHA256" {
			t.Fatalf("%+v", e)
		}
	})
}
