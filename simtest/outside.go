package simtest

import (
	"bufio"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"sync"
	"time"
)

const outsideDomain = "example.net"

var outsideAddr = netip.MustParseAddr("203.0.113.25")

// Outside is the rest of the Internet: one mail exchanger for example.net that
// does to each recipient what its local part says: keep, refuse (550), later
// (451 until it has come three times), drop (takes the first one and hangs up
// instead of answering).
type Outside struct {
	w *World

	mu    sync.Mutex
	l     net.Listener
	wg    sync.WaitGroup
	got   map[delivery][]taking
	tries map[delivery]int
}

// delivery is one message to one recipient.
type delivery struct{ subject, to string }

// taking is one time that the outside took a delivery.
type taking struct {
	at       time.Time
	from     netip.Addr // of the node that brought it
	answered bool       // and the answer was read, as far as the outside can know
}

func newOutside(w *World) *Outside {
	o := &Outside{w: w, got: map[delivery][]taking{}, tries: map[delivery]int{}}
	o.Open()
	return o
}

// Open lets the exchanger listen.
func (o *Outside) Open() {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.l != nil {
		return
	}
	l, err := o.w.listen(netip.AddrPortFrom(outsideAddr, 25).String())
	if err != nil {
		o.w.tb.Fatal(err)
	}
	o.l = l
	o.wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			o.wg.Go(func() { o.serve(c) })
		}
	})
}

// Shut lets nobody in any more; sessions in hand go on.
func (o *Outside) Shut() {
	o.mu.Lock()
	l := o.l
	o.l = nil
	o.mu.Unlock()
	if l != nil {
		l.Close()
	}
}

func (o *Outside) close() {
	o.Shut()
	o.w.breakConns(func(_, to netip.Addr) bool { return to == outsideAddr })
	o.wg.Wait()
}

func (o *Outside) serve(c net.Conn) {
	defer c.Close()
	from := c.RemoteAddr().(*net.TCPAddr).AddrPort().Addr().Unmap()
	r := bufio.NewReader(c)
	say := func(s string) bool { _, err := fmt.Fprintf(c, "%s\r\n", s); return err == nil }
	say("220 mx." + outsideDomain + " ESMTP")
	var rcpts []string
	for {
		c.SetReadDeadline(time.Now().Add(5 * time.Minute))
		line, err := r.ReadString('\n')
		if err != nil {
			return
		}
		line = strings.TrimRight(line, "\r\n")
		switch verb, arg, _ := strings.Cut(line, " "); strings.ToUpper(verb) {
		case "EHLO":
			say("250-mx." + outsideDomain + "\r\n250-PIPELINING\r\n250-8BITMIME\r\n250-ENHANCEDSTATUSCODES\r\n250 SIZE 100000000")
		case "HELO", "NOOP":
			say("250 2.0.0 fine")
		case "MAIL", "RSET":
			rcpts = nil
			say("250 2.0.0 fine")
		case "RCPT":
			_, to, _ := strings.Cut(arg, "<")
			to, _, _ = strings.Cut(to, ">")
			if strings.HasPrefix(to, "refuse") {
				say("550 5.1.1 nobody here")
				continue
			}
			rcpts = append(rcpts, to)
			say("250 2.1.5 fine")
		case "DATA":
			if len(rcpts) == 0 {
				say("503 5.5.1 no recipients")
				continue
			}
			say("354 go on")
			subject, text, inBody := "", []byte(nil), false
			for {
				line, err := r.ReadString('\n')
				if err != nil {
					return
				}
				line = strings.TrimRight(line, "\r\n")
				if line == "." {
					break
				}
				if inBody {
					text = append(append(text, strings.TrimPrefix(line, ".")...), "\r\n"...)
				} else if s, ok := strings.CutPrefix(line, "Subject: "); ok && subject == "" {
					subject = s
				}
				inBody = inBody || line == ""
			}
			if isTest(subject) && string(text) != body(subject, o.w.ledger.size(subject)) {
				o.w.violation(OneOutcome, "%s came to %v outside not as it was sent (%d bytes)", subject, rcpts, len(text))
			}
			switch answer := o.take(subject, from, rcpts); answer {
			case "":
				return
			default:
				if !say(answer) {
					o.unanswered(subject, rcpts)
					return
				}
			}
			rcpts = nil
		case "QUIT":
			say("221 2.0.0 bye")
			return
		default:
			say("500 5.5.2 what?")
		}
	}
}

// take decides about a text; "" hangs up.
func (o *Outside) take(subject string, from netip.Addr, rcpts []string) string {
	o.mu.Lock()
	defer o.mu.Unlock()
	later, drop := false, false
	for _, to := range rcpts {
		d := delivery{subject, to}
		o.tries[d]++
		later = later || strings.HasPrefix(to, "later") && o.tries[d] < 3
		drop = drop || strings.HasPrefix(to, "drop") && o.tries[d] == 1
	}
	if later {
		return "451 4.7.1 come again"
	}
	for _, to := range rcpts {
		d := delivery{subject, to}
		o.got[d] = append(o.got[d], taking{time.Now(), from, !drop})
	}
	if drop {
		return ""
	}
	return "250 2.0.0 kept"
}

func (o *Outside) unanswered(subject string, rcpts []string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, to := range rcpts {
		if t := o.got[delivery{subject, to}]; len(t) > 0 {
			t[len(t)-1].answered = false
		}
	}
}

// takings returns what the outside took of one delivery.
func (o *Outside) takings(d delivery) []taking {
	o.mu.Lock()
	defer o.mu.Unlock()
	return append([]taking(nil), o.got[d]...)
}
