package smtpd

import (
	"context"
	"errors"
	"io"
	"time"

	"posthouse/mesh"
	"posthouse/transport"
)

// authOffered reports whether AUTH is in the EHLO answer: never on 25, never
// without TLS (RFC 4954 section 4, RFC 8314).
func (s *session) authOffered() bool {
	return s.Port != PortMX && s.TLS != "" && s.srv.deps.Authenticator != nil
}

// mailFrom begins a transaction: RFC 5321 section 4.1.1.2.
func (s *session) mailFrom(arg []byte) {
	switch {
	case !s.greeted:
		s.misuse(503, "5.5.1", "Say EHLO first")
		return
	case s.mail:
		s.misuse(503, "5.5.1", "A message is already under way; finish it or send RSET")
		return
	}
	s.tried = true // until it is accepted
	from, rest, f := parseReverse(arg)
	if f != nil {
		s.syntax(f)
		return
	}
	limit := s.srv.deps.MaxSize()
	p, f := parseMailParams(rest, limit, s.authOffered())
	if f == nil && !from.IsASCII() && !p.SMTPUTF8 {
		f = faultUTF8 // RFC 6531 section 3.5
	}
	if f != nil {
		s.syntax(f)
		return
	}
	s.params = p
	origin, err := s.srv.deps.Senders.Check(s.ctx, &s.Session, from, p)
	if s.Port != PortMX && s.Login == nil && origin != transport.OriginDevice && (err == nil || transport.AsFault(err).Code >= 500) {
		// RFC 3207 section 4, RFC 6409 section 4.3.
		f = &transport.Fault{Code: 530, Enhanced: "5.7.0", Text: "Log in first"}
		if s.TLS == "" {
			f.Text = "Send STARTTLS and log in first"
		}
		err = f
	}
	if err != nil {
		s.refuse("sender refused", from.String(), err)
		s.reset()
		s.tried = true
		return
	}
	s.mail, s.tried, s.limit = true, false, limit
	s.From, s.Origin = from, origin
	s.w.reply(250, "2.1.0", "Sender ok")
}

// syntax answers a fault of the parser.
func (s *session) syntax(f *transport.Fault) {
	if f == faultTooBig { // no misuse: the client asked, we answered
		s.w.reply(f.Code, f.Enhanced, f.Text)
		return
	}
	s.misuse(f.Code, f.Enhanced, f.Text)
}

// refuse tells a decider's refusal and logs it.
func (s *session) refuse(what, who string, err error) {
	f := transport.AsFault(err)
	attrs := []any{"session", s.ID, "client", s.Remote.String(), "address", clean(who), "err", clean(f.Error())}
	if f.Temporary() {
		s.srv.deps.Logger.Warn(what, attrs...)
	} else {
		s.srv.deps.Logger.Info(what, attrs...)
	}
	s.fault(f)
}

// rcptTo adds a recipient: RFC 5321 section 4.1.1.3.
func (s *session) rcptTo(arg []byte) {
	if !s.mail {
		s.outOfOrder(503, "Send MAIL FROM first")
		return
	}
	if s.spoilt {
		s.misuse(503, "5.5.1", "The message failed already; send RSET")
		return
	}
	if len(s.rcpts) >= s.srv.cfg.MaxRecipients {
		// RFC 5321 section 4.5.3.1.10: 452, and the client sends the rest later.
		s.w.reply(452, "4.5.3", "Too many recipients, send the rest in another message")
		return
	}
	a, domainless, rest, f := parseForward(arg)
	r := Rcpt{Address: a, Domainless: domainless}
	if f == nil {
		f = parseRcptParams(rest, s.params.SMTPUTF8, &r)
	}
	if f == nil && !a.IsASCII() && !s.params.SMTPUTF8 {
		f = faultUTF8
	}
	if f != nil {
		s.tried = true
		s.syntax(f)
		return
	}
	if err := s.srv.deps.Recipients.Check(s.ctx, &s.Session, r); err != nil {
		s.tried = true
		s.refuse("recipient refused", a.String(), err)
		if s.refused++; s.refused >= s.srv.cfg.MaxRefusedRcpts && !s.Trusted && s.ending == nil {
			s.abuse("Too many refused recipients")
		}
		return
	}
	s.refused = 0
	s.rcpts = append(s.rcpts, r)
	s.w.reply(250, "2.1.5", "Recipient ok")
}

// ready reports whether a text may follow; if not, it has said why.
func (s *session) ready() bool {
	switch {
	case !s.mail:
		s.outOfOrder(503, "Send MAIL FROM first")
	case len(s.rcpts) > 0:
		return true
	case s.tried: // RFC 5321 section 3.3
		s.outOfOrder(554, "No valid recipients")
	default:
		s.misuse(503, "5.5.1", "Send RCPT TO first")
	}
	return false
}

// outOfOrder answers a command that lacks what should have gone before. A
// client that pipelines (RFC 2920 section 3.1) cannot know that MAIL or RCPT
// was refused: that is no misuse, up to a point.
func (s *session) outOfOrder(code int, text string) {
	if !s.tried {
		s.misuse(code, "5.5.1", text)
		return
	}
	s.w.reply(code, "5.5.1", text)
	if s.early++; s.early > 2*s.srv.cfg.MaxRecipients {
		s.abuse("Too many errors")
	}
}

// envelope is what Intake gets.
func (s *session) envelope() *transport.Envelope {
	env := &transport.Envelope{
		Ret: s.params.Ret, EnvID: s.params.EnvID, Body: s.params.Body, SMTPUTF8: s.params.SMTPUTF8,
		Origin: s.Origin, Helo: s.Helo, ClientName: s.ClientName(s.ctx), TLS: s.TLS,
	}
	if s.From != (mesh.Address{}) {
		env.From = s.From.String()
	}
	if s.Remote.IsValid() {
		env.ClientAddr = s.Remote.String()
	}
	if s.Login != nil {
		env.Login = s.Login.Address
	}
	return env
}

// take hands a text to Intake. Time for the answer runs from the last byte.
func (s *session) take(t *text, body io.Reader) (queued string, err error) {
	ctx, cancel := context.WithCancelCause(s.ctx)
	defer cancel(nil)
	var timer *time.Timer
	t.onEnd = func() {
		timer = time.AfterFunc(s.srv.cfg.AcceptTimeout, func() { cancel(context.DeadlineExceeded) })
	}
	s.inText, s.w.waited = t, 0
	s.w.grow(largeBuf)
	if t.fault != nil { // refused before its first byte
		return "", t.fault
	}
	queued, err = s.srv.deps.Intake.Accept(ctx, s.envelope(), s.rcpts, body)
	if timer != nil {
		timer.Stop()
	}
	switch {
	case t.fault != nil:
		if err == nil {
			s.srv.deps.Logger.Error("intake took a refused text", "session", s.ID, "queued", queued, "err", t.fault.Text)
		}
		return "", t.fault
	case err == nil && t.err != io.EOF:
		s.srv.deps.Logger.Error("intake took a text without its end", "session", s.ID, "queued", queued)
		return "", &transport.Fault{Code: 451, Enhanced: "4.3.0", Text: "Local error, try again later", Cause: t.err}
	}
	return queued, err
}

// unanswerable ends the session without an answer when nobody knows whether the
// message was stored: a refusal could be a lie, an acceptance too.
func (s *session) unanswerable(err error) bool {
	if !silentWhenUncertain || !errors.Is(err, transport.ErrUncertain) {
		return false
	}
	s.srv.deps.Logger.Error("message neither taken nor refused", "session", s.ID, "client", s.Remote.String(), "err", err)
	s.ending = err
	return true
}

// verdict answers a text and closes the transaction.
func (s *session) verdict(t *text, queued string, err error) {
	if s.unanswerable(err) {
		return
	}
	if err != nil {
		s.refuse("message refused", s.From.String(), err)
	} else {
		s.accepted++
		s.junk, s.bad, s.refused, s.early = 0, 0, 0, 0
		s.srv.deps.Logger.Info("message accepted", "session", s.ID, "msg_id", queued, "client", s.Remote.String(),
			"from", clean(s.From.String()), "rcpts", len(s.rcpts), "size", t.size, "tls", s.TLS != "")
		s.w.reply(250, "2.0.0", "Queued as "+publicText(queued, false))
	}
	s.reset()
}

// data takes a text by DATA: RFC 5321 section 4.1.1.4.
func (s *session) data(arg []byte) {
	if len(arg) > 0 {
		s.misuse(501, "5.5.4", "DATA takes no parameter")
		return
	}
	if s.spoilt {
		s.misuse(503, "5.5.1", "The message failed already; send RSET")
		return
	}
	if !s.ready() {
		return
	}
	s.w.reply(354, "", "Send the message, end it with a line that holds only a dot")
	d := dotText{text: text{w: &s.w, limit: s.limit}}
	queued, err := s.take(&d.text, &d)
	end := d.finish(max(s.limit, maxRefused)) // what nobody read, up to the true end
	s.inText = nil
	switch {
	case end == errTail:
		s.refuse("message refused", s.From.String(), err)
		s.ending = errAbuse
		return
	case end != nil: // nobody is there any more
		s.ending = end
		return
	}
	doubtful := d.doubtful()
	s.verdict(&d.text, queued, err)
	if doubtful && s.ending == nil {
		s.ending = errAbuse
	}
}

// bdat takes a text by BDAT: RFC 3030 section 2. Intake reads the whole row of
// chunks; between two of them chunkText comes back here for the next command.
func (s *session) bdat(arg []byte) {
	size, last, ok := parseBDAT(arg)
	if !ok { // how much follows is anybody's guess
		s.w.reply(501, "5.5.4", "Use BDAT size [LAST]; closing")
		s.ending = errAbuse
		return
	}
	if s.spoilt || !s.mail || len(s.rcpts) == 0 {
		// RFC 3030 section 2: the chunk is sent in any case; keep in step.
		if s.skipChunk(size) {
			if s.spoilt {
				s.misuse(503, "5.5.1", "The message failed already; send RSET")
			} else {
				s.ready()
			}
		}
		return
	}
	c := chunkText{text: text{w: &s.w, limit: s.limit}}
	c.more = func() (int64, bool, error) { return s.nextChunk(&c) }
	c.begin(size, last)
	queued, err := s.take(&c.text, &c)
	s.inText = nil
	if c.err != nil && c.err != io.EOF { // abandoned, or the line is gone
		if cut := c.err.(cutError).err; cut != errAborted {
			s.ending = cut
		}
		return
	}
	if err != nil {
		if !s.skipChunk(c.left) {
			return
		}
		// The client may have more chunks on their way: each gets its answer.
		wasLast := c.last
		if s.unanswerable(err) {
			return
		}
		s.verdictSpoilt(wasLast, err)
		return
	}
	s.verdict(&c.text, queued, nil)
}

// verdictSpoilt refuses a chunk. RFC 3030 section 2: after a failed chunk the
// rest fails too, until RSET; after a failed last one nothing is left.
func (s *session) verdictSpoilt(last bool, err error) {
	s.refuse("message refused", s.From.String(), err)
	if last {
		s.reset()
		return
	}
	s.spoilt = true
}

// skipChunk reads a refused chunk away; if it is too long for that it has
// answered and ended the session.
func (s *session) skipChunk(n int64) bool {
	s.cmdDeadline = time.Now().Add(s.srv.cfg.CommandTimeout)
	switch err := skip(&s.w, n); err {
	case nil:
		return true
	case errTail:
		s.w.reply(552, "5.3.4", "Chunk refused and too long to skip; closing")
		s.ending = errAbuse
	default:
		s.ending = err
	}
	return false
}

// nextChunk answers a chunk that is complete and takes commands up to the next
// BDAT. A command that gives the message up is kept for the loop.
func (s *session) nextChunk(c *chunkText) (int64, bool, error) {
	s.w.reply(250, "2.0.0", "Chunk taken")
	s.inText = nil
	waited := s.w.waited
	defer func() { s.inText, s.w.waited = &c.text, waited }() // waiting for commands is not slowness
	for range 4096 {
		v, arg, err := s.readCommand(false)
		if err != nil {
			return 0, false, err
		}
		switch v {
		case verbBDAT:
			size, last, ok := parseBDAT(arg)
			if !ok {
				s.w.reply(501, "5.5.4", "Use BDAT size [LAST]; closing")
				return 0, false, errAbuse
			}
			if size == 0 && !last && !s.idleCommand() {
				return 0, false, errAbuse // empty chunks without end
			}
			s.w.grow(largeBuf)
			return size, last, nil
		case verbRSET, verbQUIT, verbEHLO, verbHELO:
			s.pending, s.pendingArg = v, append([]byte(nil), arg...)
			return 0, false, errAborted
		default:
			s.aside(v, arg)
		}
		if s.ending != nil {
			return 0, false, s.ending
		}
	}
	return 0, false, errAbuse
}
