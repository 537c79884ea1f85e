package smtpd

import (
	"context"
	"fmt"
	"io"
	"strings"
	"testing"
	"time"

	"posthouse/transport"
)

type accessFunc func(ctx context.Context, s *Session) error

func (f accessFunc) Connect(ctx context.Context, s *Session) error { return f(ctx, s) }

func TestAThousandRecipients(t *testing.T) {
	talk(t, PortMX, nil, func(t *testing.T, g *rig, c *client) {
		c.greet("x")
		c.do("MAIL FROM:<>", "250")
		for i := range 1000 {
			c.do(fmt.Sprintf("RCPT TO:<j%d@here.test>", i), "250 2.1.5")
		}
		for range 20 { // no misuse: the rest goes in another message
			c.do("RCPT TO:<joe@here.test>", "452 4.5.3")
		}
		c.do("DATA", "354")
		c.do(".", "250 2.0.0")
		if n := len(g.accepted()[0].rcpts); n != 1000 {
			t.Fatal(n)
		}
	})
}

func TestGuessingRecipientsEndsTheSession(t *testing.T) {
	talk(t, PortMX, nil, func(t *testing.T, g *rig, c *client) {
		c.greet("x")
		c.do("MAIL FROM:<>", "250")
		for range 50 {
			c.do("RCPT TO:<who@here.test>", "550 5.1.1")
		}
		c.want("421 4.7.0", "the fiftieth in a row")
	})
}

func TestAccessMayRefuseTheConnection(t *testing.T) {
	for err, want := range map[*transport.Fault]string{
		transport.Faultf(550, "5.7.1", "Not from there"): "554 5.7.1 Not from there",
		transport.Faultf(451, "4.3.0", "Not now"):        "421 4.3.0 Not now",
	} {
		change := func(_ *rig, _ *Config, d *Deps) {
			d.Access = accessFunc(func(context.Context, *Session) error { return err })
		}
		talk(t, PortMX, change, func(t *testing.T, g *rig, c *client) {
			c.want(want, "connect")
			c.want("EOF", "connect")
		})
	}
}

// TestIntakeThatMisbehaves: whatever Intake does, a text that was not read to
// its clean end is never acknowledged, and the session stays in step.
func TestIntakeThatMisbehaves(t *testing.T) {
	text := strings.Repeat("0123456789\r\n", 10000)
	for _, c := range []struct {
		name  string
		err   error
		sleep time.Duration
		want  string
	}{
		{"says yes without reading", nil, 0, "451 4.3.0"},
		{"refuses without reading", transport.ErrNoSpace, 0, "452 4.3.1"},
		{"refuses after a long thought", transport.ErrNoSpace, 8 * time.Minute, "452 4.3.1"},
		{"does not know", fmt.Errorf("accept message: %w", transport.ErrUncertain), 0, "EOF"},
	} {
		for _, how := range []string{"DATA", "BDAT"} {
			t.Run(c.name+" "+how, func(t *testing.T) {
				deaf := func(_ *rig, _ *Config, d *Deps) { d.Intake = deafIntake{c.err, c.sleep} }
				talk(t, PortMX, deaf, func(t *testing.T, g *rig, cl *client) {
					cl.ready()
					if how == "DATA" {
						cl.send("DATA\r\n" + text + ".\r\nNOOP\r\n")
						cl.want("354", "DATA")
					} else {
						cl.send(fmt.Sprintf("BDAT %d LAST\r\n%sNOOP\r\n", len(text), text))
					}
					cl.want(c.want, "the text")
					if c.want == "EOF" {
						return
					}
					cl.want("250 2.0.0 Here", "NOOP")
				})
			})
		}
	}
}

type deafIntake struct {
	err   error
	sleep time.Duration
}

// A store that fails takes the node with it: sessions are cut in the moment in
// which an intake says that it does not know.
func TestNothingIsSaidWhereNobodyKnowsWhileTheServerEnds(t *testing.T) {
	bubble(t, func(t *testing.T) {
		var g *rig
		g = newRig(t, PortMX, func(_ *rig, _ *Config, d *Deps) { d.Intake = failingStore{func() { g.stop() }} })
		c := g.dial()
		defer c.close()
		c.ready()
		c.do("DATA", "354")
		c.send("x: y\r\n.\r\n")
		c.want("EOF", "the text")
		<-g.done
	})
}

// failingStore ends the server, and does not know.
type failingStore struct{ stop func() }

func (f failingStore) Accept(_ context.Context, _ *transport.Envelope, _ []Rcpt, text io.Reader) (string, error) {
	io.Copy(io.Discard, text)
	f.stop()
	return "", fmt.Errorf("accept message: %w", transport.ErrUncertain)
}

func (d deafIntake) Accept(context.Context, *transport.Envelope, []Rcpt, io.Reader) (string, error) {
	time.Sleep(d.sleep)
	return "q", d.err
}
