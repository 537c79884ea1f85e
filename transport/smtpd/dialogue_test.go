package smtpd

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

// Dialogues are files in testdata:
//
//	# comment          port mx|submission|submissions (default mx)
//	C: line            sent with CRLF; \xNN, \r, \n, \\ as in Go
//	C> bytes           sent without CRLF
//	S: line            what the server says; a trailing * matches any rest,
//	                   S: EOF means that it closed
//	S* text            any further lines of this reply are skipped up to one that begins so
//	TLS                the client's handshake
//	REPEAT n text      sent n times, with CRLF
//	ACCEPTED n         so many messages were taken so far
//	BODY "..."         text of the last message
//	RCPT a b           its recipients
//	ENV text           its sender, origin, ret, envid, body, utf8, tls?, login
func TestDialogues(t *testing.T) {
	files, err := filepath.Glob("testdata/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatal("no dialogues", err)
	}
	for _, f := range files {
		raw, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		t.Run(strings.TrimSuffix(filepath.Base(f), ".txt"), func(t *testing.T) {
			bubble(t, func(t *testing.T) { playDialogue(t, f, string(raw)) })
		})
	}
}

func playDialogue(t *testing.T, file, text string) {
	port := PortMX
	lines := strings.Split(text, "\n")
	for _, l := range lines {
		switch l {
		case "port submission":
			port = PortSubmission
		case "port submissions":
			port = PortSubmissions
		}
	}
	g := newRig(t, port, func(g *rig, c *Config, d *Deps) {
		for _, l := range lines {
			switch l {
			case "no tls":
				d.TLS = nil
			case "no auth":
				d.Authenticator = nil
			case "trusted":
				c.Trusted = []netip.Prefix{netip.MustParsePrefix("198.51.100.0/24")}
			}
		}
	})
	defer g.close()
	c := g.dial()
	defer c.close()
	var held []string // lines of the reply being matched
	next := func() string {
		if len(held) == 0 {
			held = strings.Split(c.reply(), "\n")
		}
		l := held[0]
		held = held[1:]
		return l
	}
	for i, l := range lines {
		at := fmt.Sprintf("%s:%d: ", file, i+1)
		word, arg, _ := strings.Cut(l, " ")
		switch word {
		case "", "#", "port", "no", "trusted":
		case "C:", "C>":
			s, err := strconv.Unquote(`"` + strings.ReplaceAll(arg, `"`, `\"`) + `"`)
			if err != nil {
				t.Fatal(at, err)
			}
			if word == "C:" {
				s += "\r\n"
			}
			c.send(s)
		case "REPEAT":
			n, rest, _ := strings.Cut(arg, " ")
			k, _ := strconv.Atoi(n)
			for range k {
				c.send(rest + "\r\n")
			}
		case "S:":
			got := next()
			if p, ok := strings.CutSuffix(arg, "*"); ok && strings.HasPrefix(got, p) || got == arg {
				continue
			}
			t.Fatalf("%sgot %q, want %q", at, got, arg)
		case "S*":
			for {
				got := next()
				if strings.HasPrefix(got, arg) {
					break
				}
				if len(held) == 0 {
					t.Fatalf("%sreply ends with %q, want a line %q", at, got, arg)
				}
			}
		case "SX": // this reply's lines hold no such text
			for _, h := range held {
				if strings.Contains(h, arg) {
					t.Fatalf("%s%q holds %q", at, h, arg)
				}
			}
			held = nil
		case "TLS":
			c.startTLS()
		case "ACCEPTED":
			if got := strconv.Itoa(len(g.accepted())); got != arg {
				t.Fatalf("%saccepted %s, want %s", at, got, arg)
			}
		case "BODY":
			m := g.accepted()
			if got := strconv.Quote(m[len(m)-1].body); got != arg {
				t.Fatalf("%sbody %s, want %s", at, got, arg)
			}
		case "RCPT":
			m := g.accepted()
			if got := strings.Join(m[len(m)-1].to(), " "); got != arg {
				t.Fatalf("%srecipients %s, want %s", at, got, arg)
			}
		case "ENV":
			m := g.accepted()
			e := m[len(m)-1].env
			got := fmt.Sprintf("<%s> %s ret=%s envid=%s body=%s utf8=%v tls=%v login=%s helo=%s client=%s", e.From, e.Origin, e.Ret, e.EnvID, e.Body, e.SMTPUTF8, e.TLS != "", e.Login, e.Helo, e.ClientAddr)
			if got != arg {
				t.Fatalf("%senvelope\n%s, want\n%s", at, got, arg)
			}
		default:
			t.Fatalf("%sunknown directive %q", at, l)
		}
	}
}
