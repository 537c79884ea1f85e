package imapd

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"strconv"
	"strings"
	"sync"
	"time"
)

// What a connection may send. Before login only what a login needs.
const (
	maxCommand        = 48 << 10 // bytes of one command without its literals; the library gives up at 50 KiB
	maxCommandEarly   = 8 << 10
	maxLiteral        = 4096     // bytes of a literal but APPEND's message; the library's own limit
	maxLiterals       = 64 << 10 // bytes of all literals of one command, APPEND's message apart
	maxLiteralsEarly  = 1 << 10
	maxLiteralCount   = 256
	maxEarlyCommands  = 50
	outputBuffer      = 32 << 10
	literalStall      = time.Minute // an upload in which nothing comes for so long has ended
	writeStall        = time.Minute // a client that takes no 32 KiB in that time is gone
	maxLiteralInteger = 1 << 40
)

// guard stands between TLS and the library and keeps both of one mind about
// what is command and what is data: it hands out one checked line at a time,
// and a literal only after the library has accepted it. Where the two could
// differ (an over-long command, a literal that was refused but sent, an open
// quote at a line's end, a bare CR) it says BYE and closes, so that no text of
// a message is ever read as a command (ATTACKS.md A8, A8b).
//
// It also collects output and writes it when the library waits for input, or
// when Flush is called. Read is for one goroutine, all else for any.
type guard struct {
	net.Conn
	appendLimit func() int64
	onClose     func() // once, when the connection is closed

	// The reader's own.
	in       []byte // bytes from the client, not handed out yet
	ready    int    // of them, those that are checked
	scanned  int    // of them, those without a line end
	early    bool   // not logged in
	commands int    // before login
	literal  int64  // bytes of an accepted literal still to be handed out
	size     int    // bytes of the command's lines so far
	literals int64  // bytes of its literals so far
	count    int    // of literals
	pending  int64  // announced literal that the library has not seen to yet, or -1
	sync     bool   // the client waits for "+" before it sends the pending one
	inside   bool   // a command has begun and is not complete
	idle     bool   // the command before was IDLE

	mu       sync.Mutex
	verb     string // of the current command, upper case
	tag      string
	watching bool   // inside a command: look for its answer
	answered bool   // the library answered the command before its end
	goOn     bool   // the library wrote "+"
	reading  bool   // waiting for a new command
	farewell string // the reason to end when at rest, or ""
	closed   bool

	write   chan struct{} // held by who writes
	out     []byte
	swallow bool // drop the first line: a greeting after STARTTLS
	failed  error
}

func newGuard(c net.Conn, appendLimit func() int64, onClose func()) *guard {
	return &guard{Conn: c, appendLimit: appendLimit, onClose: onClose, early: true, pending: -1, write: make(chan struct{}, 1)}
}

var errGuard = errors.New("connection ended by its guard")

// command returns the verb that is being executed, such as "CLOSE".
func (g *guard) command() string { g.mu.Lock(); defer g.mu.Unlock(); return g.verb }

// loggedIn lifts the limits of a connection that nobody logged in on. It is
// called while the library executes the login.
func (g *guard) loggedIn() { g.early = false }

// Read implements net.Conn.
func (g *guard) Read(p []byte) (int, error) {
	if !guarded {
		if err := g.Flush(); err != nil {
			return 0, err
		}
		return g.Conn.Read(p)
	}
	for {
		if g.ready > 0 {
			n := copy(p, g.in[:g.ready])
			g.take(n)
			g.ready -= n
			return n, nil
		}
		answered, goOn := g.answer()
		switch {
		case !g.inside:
		case g.pending >= 0 && !answered && (goOn || !g.sync):
			g.literal, g.pending = g.pending, -1
		case g.pending >= 0 && !answered:
			return 0, g.violation("Literal out of place")
		case g.pending >= 0 && !g.sync:
			// The client has sent it already: what follows is data, not commands.
			return 0, g.violation("Literal refused")
		case g.pending >= 0: // refused, and the client knows it
			g.end()
		case answered && g.literal > 0:
			return 0, g.violation("Command refused within a literal")
		case answered: // the rest of the line belongs to the refused command
			line, err := g.line()
			if err != nil {
				return 0, err
			}
			if _, sync, lit, bad := announced(line); bad || lit && !sync {
				return 0, g.violation("Command refused before its literal")
			}
			g.take(len(line))
			g.end()
		}
		if g.literal > 0 {
			return g.readLiteral(p)
		}
		line, err := g.line()
		if err != nil {
			return 0, err
		}
		if g.idle {
			// The answer above may be older than the line.
			if _, idling := g.answer(); idling && !bytes.EqualFold(bytes.TrimRight(line, "\r\n"), []byte("DONE")) {
				// The library would go on beside its own idling.
				return 0, g.violation("DONE was expected")
			} else if idling {
				copy(line, "DONE") // RFC 9051 section 9: in any case; the library knows one
			}
			g.idle = false
			g.end()
		}
		if reason := g.check(line); reason != "" {
			return 0, g.violation(reason)
		}
		g.ready = len(line)
	}
}

func (g *guard) answer() (answered, goOn bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.answered, g.goOn
}

// end forgets the current command.
func (g *guard) end() {
	g.inside, g.pending = false, -1
	g.mu.Lock()
	g.watching, g.answered, g.goOn = false, false, false
	g.mu.Unlock()
}

// take drops n bytes of the input, and the buffer with the last of them.
func (g *guard) take(n int) {
	g.in = g.in[n:]
	g.scanned = 0
	if len(g.in) == 0 {
		g.in = nil
	}
}

func (g *guard) readLiteral(p []byte) (int, error) {
	p = p[:min(int64(len(p)), g.literal)]
	if len(g.in) > 0 {
		n := copy(p, g.in)
		g.take(n)
		g.literal -= int64(n)
		return n, nil
	}
	if err := g.Flush(); err != nil {
		return 0, err
	}
	// The library allows a whole upload five minutes; a slow line needs more.
	if err := g.Conn.SetReadDeadline(time.Now().Add(literalStall)); err != nil {
		return 0, err
	}
	n, err := g.Conn.Read(p)
	g.literal -= int64(n)
	return n, err
}

// line waits for a whole line and returns it with its end; it stays in g.in.
func (g *guard) line() ([]byte, error) {
	for {
		if i := bytes.IndexByte(g.in[g.scanned:], '\n'); i >= 0 {
			return g.in[:g.scanned+i+1], nil
		}
		g.scanned = len(g.in)
		limit := maxCommand
		if g.early {
			limit = maxCommandEarly
		}
		if g.size+len(g.in) > limit {
			return nil, g.violation("Command too long")
		}
		if err := g.fill(); err != nil {
			return nil, err
		}
	}
}

// fill reads more, after the answers so far went out.
func (g *guard) fill() error {
	if err := g.Flush(); err != nil {
		return err
	}
	if cap(g.in)-len(g.in) < 512 {
		g.in = append(make([]byte, 0, 2*len(g.in)+1024), g.in...)
	}
	atRest := !g.inside && len(g.in) == 0
	g.mu.Lock()
	g.reading = atRest
	bye := g.farewell
	g.mu.Unlock()
	if atRest && bye != "" {
		return g.violation(bye)
	}
	n, err := g.Conn.Read(g.in[len(g.in):cap(g.in)])
	g.in = g.in[:len(g.in)+n]
	g.mu.Lock()
	g.reading = false
	bye = g.farewell
	g.mu.Unlock()
	switch {
	case atRest && n == 0 && bye != "":
		return g.violation(bye)
	case n > 0:
		return nil
	case isTimeout(err):
		return g.violation("Nothing heard for too long") // RFC 9051 section 5.4
	}
	return err
}

func isTimeout(err error) bool {
	var ne net.Error
	return errors.As(err, &ne) && ne.Timeout()
}

// check looks at a line before the library sees it and returns why it must not.
func (g *guard) check(line []byte) (reason string) {
	if g.inside {
		g.size += len(line)
	} else {
		if !g.begin(line) {
			return "Line not understood"
		}
		if g.early {
			if g.commands++; g.commands > maxEarlyCommands {
				return "Too many commands without a login"
			}
		}
	}
	limit := maxCommand
	if g.early {
		limit = maxCommandEarly
	}
	if g.size > limit {
		return "Command too long"
	}
	size, sync, lit, bad := announced(line)
	switch {
	case bad:
		return "Line not understood"
	case !lit:
		g.end() // complete: the next line is another command
		if g.command() == "IDLE" {
			g.idle = true
			g.mu.Lock()
			g.watching = true
			g.mu.Unlock()
		}
		return ""
	}
	if g.count++; g.count > maxLiteralCount {
		return "Too many literals"
	}
	message := g.count > 1 || bytes.Count(bytes.TrimSpace(line), []byte(" ")) > 2
	if g.command() == "APPEND" && message && !g.early {
		if size > g.appendLimit() && !sync {
			return "Literal too large" // a client that waits is told NO by the library, and stays
		}
	} else {
		// The library reads on in a literal that it found too large: it never
		// gets to see one.
		most := int64(maxLiterals)
		if g.early {
			most = maxLiteralsEarly
		}
		if g.literals += size; g.literals > most || size > maxLiteral {
			return "Literal too large"
		}
	}
	g.pending, g.sync, g.inside = size, sync, true
	g.mu.Lock()
	g.watching, g.answered, g.goOn = true, false, false
	g.mu.Unlock()
	return ""
}

// begin starts a command with its first line.
func (g *guard) begin(line []byte) (ok bool) {
	g.size, g.literals, g.count = len(line), 0, 0
	text := string(bytes.TrimRight(line[:min(len(line), 256)], "\r\n"))
	tag, rest, _ := strings.Cut(text, " ")
	verb, _, _ := strings.Cut(rest, " ")
	g.mu.Lock()
	g.tag, g.verb = tag, strings.ToUpper(verb)
	g.mu.Unlock()
	return tag != "+" // it could not be told from a continuation
}

// announced checks a line's quotes and finds the literal at its end: "{n}",
// or "{n+}" which is sent without waiting (RFC 7888). bad is a line that the
// library and we could read differently.
func announced(line []byte) (size int64, sync, lit, bad bool) {
	text := line[:len(line)-1]
	if n := len(text); n > 0 && text[n-1] == '\r' {
		text = text[:n-1]
	}
	quoted := false
	for i := 0; i < len(text); i++ {
		switch c := text[i]; {
		case c == 0 || c == '\r':
			return 0, false, false, true
		case c == '"':
			quoted = !quoted
		case c == '\\' && quoted:
			i++
		case c == '{' && !quoted:
			spec := bytes.TrimSuffix(text[i+1:], []byte(" "))
			digits, ok := bytes.CutSuffix(spec, []byte("}"))
			if !ok {
				return 0, false, false, true
			}
			digits, plus := bytes.CutSuffix(digits, []byte("+"))
			if len(digits) == 0 || len(digits) > 20 || len(bytes.Trim(digits, "0123456789")) > 0 {
				return 0, false, false, true
			}
			n, err := strconv.ParseInt(string(digits), 10, 64)
			if err != nil || n > maxLiteralInteger {
				n = maxLiteralInteger
			}
			return n, !plus, true, false
		}
	}
	return 0, false, false, quoted
}

// violation says BYE, closes, and returns what Read returns from then on.
func (g *guard) violation(reason string) error {
	g.put([]byte("* BYE " + reason + "\r\n"))
	g.Close()
	return fmt.Errorf("%w: %s: %w", errGuard, reason, net.ErrClosed)
}

// Write implements net.Conn. It keeps the bytes for the next flush.
func (g *guard) Write(b []byte) (int, error) {
	g.watch(b)
	if err := g.put(b); err != nil {
		return 0, err
	}
	return len(b), nil
}

// watch looks for the answer to a command of which more is to come. The library
// writes whole lines then.
func (g *guard) watch(b []byte) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if !g.watching {
		return
	}
	for line := range bytes.Lines(b) {
		if bytes.HasPrefix(line, []byte("+ ")) {
			g.goOn = true
		} else if len(line) > len(g.tag) && line[len(g.tag)] == ' ' && string(line[:len(g.tag)]) == g.tag {
			g.answered = true
		}
	}
}

func (g *guard) put(b []byte) error {
	g.write <- struct{}{}
	defer func() { <-g.write }()
	if g.swallow {
		i := bytes.IndexByte(b, '\n')
		if i < 0 {
			return g.failed
		}
		g.swallow, b = false, b[i+1:]
	}
	if g.failed == nil && len(g.out) > 0 && len(g.out)+len(b) > outputBuffer {
		g.send()
	}
	if g.failed == nil {
		g.out = append(g.out, b...)
		if len(g.out) >= outputBuffer {
			g.send()
		}
	}
	return g.failed
}

// send writes what is collected. The caller holds g.write.
func (g *guard) send() {
	if len(g.out) == 0 || g.failed != nil {
		return
	}
	if g.failed = g.Conn.SetWriteDeadline(time.Now().Add(writeStall)); g.failed == nil {
		_, g.failed = g.Conn.Write(g.out)
	}
	g.out = g.out[:0]
}

// Flush writes what is collected and gives the buffer back.
func (g *guard) Flush() error {
	g.write <- struct{}{}
	defer func() { <-g.write }()
	g.send()
	if cap(g.out) > 0 {
		g.out = nil
	}
	return g.failed
}

// SetWriteDeadline implements net.Conn; the guard sets its own when it writes.
func (g *guard) SetWriteDeadline(time.Time) error { return nil }

// Close implements net.Conn. It writes what is collected first.
func (g *guard) Close() error {
	g.mu.Lock()
	was := g.closed
	g.closed = true
	g.mu.Unlock()
	if was {
		return nil
	}
	g.Flush()
	err := g.Conn.Close()
	g.onClose()
	return err
}

// abort closes without another byte: the peer must see that what it got is
// not whole.
func (g *guard) abort() {
	g.write <- struct{}{}
	g.out = nil
	if g.failed == nil {
		g.failed = errGuard
	}
	<-g.write
	g.Close()
}

// drain ends the connection with that reason when no command is under way: at
// once if it is at rest (an IDLE is rest), else after the command in hand.
func (g *guard) drain(reason string) {
	g.mu.Lock()
	g.farewell = reason
	reading := g.reading
	g.mu.Unlock()
	if reading {
		g.Conn.SetReadDeadline(time.Unix(1, 0)) // wakes the reader, which says BYE
	}
}
