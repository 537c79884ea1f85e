// Package intake is everything between a message's last byte and its 250: the
// trace line, what submission mends, the walk over its MIME, the filter, the
// route, custody, and the archive.
//
// smtpd calls it for each message; what it needs from others it declares here
// and appliance plugs in. It promises nothing itself: Plan.Take returns only
// when the message is safe on disk.
package intake

import (
	"bytes"
	"context"
	"encoding/hex"
	"fmt"
	"io"
	"strings"
	"sync"
	"time"

	"posthouse/mailstore/log"
	"posthouse/mailstore/mime"
	"posthouse/mesh"
	"posthouse/transport"
)

// MaxReceived is the most hand-overs that a message may have behind it: more is
// a loop (RFC 5321 section 6.3).
const MaxReceived = 100

// Rcpt is one recipient as the client gave it.
type Rcpt struct {
	Address mesh.Address
	Notify  transport.Notify
	ORcpt   string
}

// Router says where a message would go. A fault refuses the whole message.
type Router interface {
	Route(env *transport.Envelope, rcpts []Rcpt) (Plan, *transport.Fault)
}

// Plan is a decided way.
type Plan interface {
	// Take puts the message into custody and returns its queue id once it is
	// on disk. draft is sealed and belongs to Take from the call on.
	Take(ctx context.Context, env *transport.Envelope, draft *log.Draft, s *mime.Structure) (queued string, err error)
}

// Filter looks at a message before it is taken: header lines to put on top, or
// a fault.
type Filter func(ctx context.Context, env *transport.Envelope, rcpts []Rcpt, body transport.Body) (header []string, fault *transport.Fault)

// Archive hears of what was accepted.
type Archive interface {
	// Passed is called once for each accepted message, when it is in custody on
	// disk and nobody was told so yet: never for a refused one, and not where
	// custody is uncertain. It must return at once and can neither refuse nor
	// change anything: who wants the text, or to write, does so on its own time,
	// from the log. After a crash just before the call, the message is in the log
	// and was not told of; an archive without gaps reads on from where it was.
	Passed(m transport.Passed)
}

// Deps are what Intake needs.
type Deps struct {
	Node     mesh.NodeID
	Host     func() string // this node's host name
	NewDraft func() *log.Draft
	// Admit waits until the store takes more, or fails (transport.ErrNoSpace).
	Admit  func(ctx context.Context, size int64) error
	Router Router
	Filter Filter // nil: everything passes
	// Archive may be nil: nothing is told of.
	Archive Archive
	// MaySend reports whether the user who logged in under that address may
	// write as a.
	MaySend func(login string, a mesh.Address) bool
	Random  io.Reader
	// Now is the wall clock, for Received and Date. Nil: time.Now.
	Now func() time.Time
}

// Intake takes messages. It is safe for concurrent use.
type Intake struct {
	d       Deps
	buffers sync.Pool     // of *[copySize]byte
	large   chan struct{} // holds one: who walks a large text
}

// New returns an Intake.
func New(d Deps) *Intake {
	if d.Now == nil {
		d.Now = time.Now
	}
	return &Intake{d: d, large: make(chan struct{}, 1)}
}

// Accept reads body to its clean end and takes the message into custody; the
// queue id is returned once it is on disk. Any error means that nothing was
// promised; it is a *transport.Fault or wraps one where the client may know why.
func (in *Intake) Accept(ctx context.Context, env *transport.Envelope, rcpts []Rcpt, body io.Reader) (queued string, err error) {
	if err := in.d.Admit(ctx, 0); err != nil {
		return "", err
	}
	if _, err := io.ReadFull(in.d.Random, env.ID[:]); err != nil {
		return "", fmt.Errorf("make message id: %w", err)
	}
	env.EntryNode, env.EntryTime = in.d.Node, in.d.Now().UTC()

	head, rest, err := readHeader(body)
	if err != nil {
		return "", err
	}
	if received(head) > MaxReceived && countsHops {
		drain(rest)
		return "", transport.Faultf(554, "5.4.6", "Routing loop: the message has passed more than %d systems", MaxReceived)
	}
	if env.Origin == transport.OriginSubmission || env.Origin == transport.OriginDevice {
		if head, err = in.mend(env, head); err != nil {
			drain(rest)
			return "", err
		}
	}
	draft := in.d.NewDraft()
	defer draft.Discard()
	if err := in.write(draft, in.trace(env, rcpts), head, rest); err != nil {
		return "", err
	}
	if err := draft.Seal(ctx); err != nil {
		return "", fmt.Errorf("keep message: %w", err)
	}
	if in.d.Filter != nil {
		add, fault := in.d.Filter(ctx, env, rcpts, draft)
		if fault != nil {
			return "", fault
		}
		if len(add) > 0 {
			if draft, err = in.prepend(ctx, draft, add); err != nil {
				return "", err
			}
		}
	}
	plan, fault := in.d.Router.Route(env, rcpts)
	if fault != nil {
		return "", fault
	}
	s, err := in.walk(ctx, draft)
	if err != nil {
		return "", fmt.Errorf("read message back: %w", err)
	}
	size := draft.Size()
	if queued, err = plan.Take(ctx, env, draft, s); err != nil {
		return "", err
	}
	if in.d.Archive != nil {
		m := transport.Passed{Envelope: *env, Size: size, Queue: queued}
		for _, r := range rcpts {
			m.Recipients = append(m.Recipients, r.Address.String())
		}
		in.d.Archive.Passed(m)
	}
	return queued, nil
}

// largeText is the size from which texts are walked one at a time: a walk never
// waits for anything, so many at once would keep small mail from its turn.
const largeText = 1 << 20

func (in *Intake) walk(ctx context.Context, draft *log.Draft) (*mime.Structure, error) {
	if draft.Size() >= largeText {
		select {
		case in.large <- struct{}{}:
			defer func() { <-in.large }()
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
	r, err := draft.Open()
	if err != nil {
		return nil, err
	}
	s, err := mime.Parse(r, draft.Size())
	if e := r.Close(); err == nil {
		err = e
	}
	return s, err
}

// copySize is how much of a text is moved at once: less than smtpd's own buffer
// gives nothing, more is only memory.
const copySize = 32 << 10

// write puts the text together. One buffer serves many texts: most are smaller
// than the buffer that io.Copy would make for each.
func (in *Intake) write(draft *log.Draft, trace string, head []byte, rest io.Reader) error {
	if _, err := io.WriteString(draft, trace); err != nil {
		return err
	}
	if _, err := draft.Write(head); err != nil {
		return err
	}
	b, ok := in.buffers.Get().(*[copySize]byte)
	if !ok {
		b = new([copySize]byte)
	}
	defer in.buffers.Put(b)
	for {
		n, err := rest.Read(b[:])
		if n > 0 {
			if _, err := draft.Write(b[:n]); err != nil {
				return err
			}
		}
		switch {
		case err == io.EOF:
			return nil
		case err != nil:
			return err
		}
	}
}

// prepend puts header lines on top of a sealed draft.
func (in *Intake) prepend(ctx context.Context, old *log.Draft, lines []string) (*log.Draft, error) {
	r, err := old.Open()
	if err != nil {
		return nil, fmt.Errorf("read message back: %w", err)
	}
	defer r.Close()
	d := in.d.NewDraft()
	_, err = io.Copy(d, io.MultiReader(strings.NewReader(strings.Join(lines, "\r\n")+"\r\n"), r))
	if err == nil {
		err = d.Seal(ctx)
	}
	old.Discard()
	if err != nil {
		d.Discard()
		return nil, fmt.Errorf("keep message: %w", err)
	}
	return d, nil
}

// errHeader refuses a header that nobody could work with.
var errHeader = transport.Faultf(552, "5.3.4", "The header of the message is larger than %d bytes", mime.MaxHeaderSize)

// readHeader returns the header block with its empty line, and the rest. A
// message without an empty line is all header.
func readHeader(body io.Reader) (head []byte, rest io.Reader, err error) {
	buf := make([]byte, 0, 4096)
	seen := 0
	for {
		if len(buf) == cap(buf) {
			buf = append(buf, 0)[:len(buf)]
		}
		n, err := body.Read(buf[len(buf):cap(buf)])
		buf = buf[:len(buf)+n]
		if bytes.HasPrefix(buf, []byte("\r\n")) {
			return buf[:2], io.MultiReader(bytes.NewReader(buf[2:]), after{body, err}), nil
		}
		if i := bytes.Index(buf[max(0, seen-3):], []byte("\r\n\r\n")); i >= 0 {
			end := max(0, seen-3) + i + 4
			return buf[:end], io.MultiReader(bytes.NewReader(buf[end:]), after{body, err}), nil
		}
		seen = len(buf)
		if err == io.EOF {
			return buf, bytes.NewReader(nil), nil
		}
		if err != nil {
			return nil, nil, err
		}
		if len(buf) > mime.MaxHeaderSize {
			drain(body)
			return nil, nil, errHeader
		}
	}
}

// after reads r, unless the read before ended with err already.
type after struct {
	r   io.Reader
	err error
}

func (a after) Read(p []byte) (int, error) {
	if a.err != nil {
		return 0, a.err
	}
	return a.r.Read(p)
}

// drain reads the rest of a refused message, so that the session stays in step.
// smtpd bounds how much and how long.
func drain(r io.Reader) { io.Copy(io.Discard, r) }

func received(head []byte) (n int) {
	for f := range mime.Fields(head) {
		if f.Is("Received") {
			n++
		}
	}
	return n
}

// mend checks and completes a submitted message's header: MAIL.md, Submission;
// RFC 6409 sections 6.1 and 8.
func (in *Intake) mend(env *transport.Envelope, head []byte) ([]byte, error) {
	var hasDate, hasID bool
	froms := 0
	out := make([]byte, 0, len(head)+128)
	last := 0
	for f := range mime.Fields(head) {
		switch {
		case f.Is("Date"):
			hasDate = true
		case f.Is("Message-ID"):
			hasID = true
		case f.Is("From"), f.Is("Sender"):
			if f.Is("From") {
				froms++
			}
			if err := in.mayWrite(env, f.Value); err != nil {
				return nil, err
			}
		case f.Is("Bcc") && hidesBcc:
			out = append(out, head[last:f.Start]...)
			last = f.End
		}
	}
	if froms > 1 {
		return nil, transport.Faultf(550, "5.6.0", "The message has more than one From field")
	}
	out = append(out, head[last:]...)
	var top []byte
	if !hasDate {
		top = fmt.Appendf(top, "Date: %s\r\n", env.EntryTime.Format(dateLayout))
	}
	if !hasID {
		top = fmt.Appendf(top, "Message-ID: <%s@%s>\r\n", hex.EncodeToString(env.ID[:]), in.d.Host())
	}
	return append(top, out...), nil
}

// mayWrite checks the addresses of a From or Sender field.
func (in *Intake) mayWrite(env *transport.Envelope, value []byte) error {
	list, cut := mime.ParseAddresses(value, mime.MaxAddresses)
	if cut {
		return transport.Faultf(550, "5.6.0", "The From field has too many addresses")
	}
	for _, a := range list {
		if a.Host == "" { // the start or end of a group
			continue
		}
		addr, err := mesh.ParseAddress(a.Mailbox + "@" + a.Host)
		if err != nil || env.Origin == transport.OriginSubmission && checksFrom && !in.d.MaySend(env.Login, addr) {
			return transport.Faultf(553, "5.7.1", "You may not write as the address in the From or Sender field")
		}
	}
	return nil
}

const dateLayout = "Mon, 02 Jan 2006 15:04:05 -0700" // RFC 5322 section 3.3

// trace is the Received line of this hop: RFC 5321 section 4.4, RFC 3848.
func (in *Intake) trace(env *transport.Envelope, rcpts []Rcpt) string {
	var b strings.Builder
	helo := env.Helo
	if helo == "" {
		helo = "unknown"
	}
	fmt.Fprintf(&b, "Received: from %s", helo)
	if env.ClientAddr != "" {
		literal := env.ClientAddr
		if strings.Contains(literal, ":") {
			literal = "IPv6:" + literal // RFC 5321 section 4.1.3
		}
		if env.ClientName != "" {
			fmt.Fprintf(&b, " (%s [%s])", env.ClientName, literal)
		} else {
			fmt.Fprintf(&b, " ([%s])", literal)
		}
	}
	fmt.Fprintf(&b, "\r\n\tby %s with %s id %s", in.d.Host(), protocol(env), hex.EncodeToString(env.ID[:8]))
	if len(rcpts) == 1 && rcpts[0].Address.IsASCII() { // more would tell one recipient of the others
		fmt.Fprintf(&b, "\r\n\tfor <%s>", rcpts[0].Address)
	}
	fmt.Fprintf(&b, ";\r\n\t%s\r\n", env.EntryTime.Format(dateLayout))
	return b.String()
}

// protocol is the "with" keyword: RFC 3848, RFC 6531 section 4.3.
func protocol(env *transport.Envelope) string {
	p := "ESMTP"
	if env.SMTPUTF8 {
		p = "UTF8SMTP"
	}
	if env.TLS != "" {
		p += "S"
	}
	if env.Login != "" {
		p += "A"
	}
	return p
}
