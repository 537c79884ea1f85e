package smtpd

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/netip"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"posthouse/mesh"
	"posthouse/transport"
)

// session is one connection. One goroutine owns it; conn's deadlines, idle and
// cancel are touched from outside.
type session struct {
	Session
	srv    *Server
	w      wire
	ctx    context.Context
	cancel context.CancelCauseFunc
	wg     sync.WaitGroup // the reverse look-up
	slot   slot

	raw net.Conn // as accepted

	idle atomic.Bool // waits for a command, no transaction

	start       time.Time
	cmdDeadline time.Time
	inText      *text // a text is being read: its limits hold

	greeted bool // HELO or EHLO was said
	mail    bool // a transaction is open
	params  MailParams
	rcpts   []Rcpt
	tried   bool // the last MAIL, or a RCPT of it, was refused
	spoilt  bool // a BDAT failed: only RSET and its like help
	limit   int64

	pending    verb // a command that ended a row of BDAT, to be run next
	pendingArg []byte

	bad, junk, refused, early, authFails int
	accepted                             int
	ending                               error // why the loop ends
}

// Reasons for a session's end.
var (
	errQuit     = errors.New("client quit")
	errShutdown = errors.New("server is going down")
	errTooOld   = errors.New("session too long")
	errRefused  = errors.New("connection refused")
	errAbuse    = errors.New("client misbehaved")
)

func (s *Server) newSession(ctx context.Context, conn net.Conn, port Port) *session {
	ss := &session{srv: s, raw: conn, start: time.Now()}
	ss.ctx, ss.cancel = context.WithCancelCause(ctx)
	ss.Port = port
	ss.ID = s.idBase + "-" + strconv.FormatUint(s.idNext.Add(1), 36)
	ss.Remote = remoteAddr(conn)
	ss.Trusted = s.limits.trusted(ss.Remote) || s.deps.Trusts != nil && s.deps.Trusts(ss.Remote)
	ss.w = wire{conn: conn, wtime: s.cfg.WriteTimeout, pool: &s.pool, deadline: ss.deadline, before: ss.beforeRead}
	ss.cmdDeadline = ss.start.Add(s.cfg.CommandTimeout)
	s.mu.Lock()
	s.sessions[ss] = struct{}{}
	s.mu.Unlock()
	return ss
}

func remoteAddr(conn net.Conn) netip.Addr {
	if ra := conn.RemoteAddr(); ra != nil {
		if ap, err := netip.ParseAddrPort(ra.String()); err == nil {
			return ap.Addr().Unmap().WithZone("")
		}
	}
	return netip.Addr{}
}

// wakeIdle ends the wait of a session that has nothing under way. Called by
// Drain after draining was set: a session that is not seen idle here sees
// draining before it waits again.
func (s *session) wakeIdle() {
	if s.idle.Load() {
		s.raw.SetReadDeadline(time.Unix(1, 0))
	}
}

// cut ends the session now, whatever it does.
func (s *session) cut(cause error) {
	s.cancel(cause)
	s.raw.SetDeadline(time.Unix(1, 0))
	s.raw.Close()
}

// deadline is when the next read must end.
func (s *session) deadline() time.Time {
	if s.inText == nil {
		return s.cmdDeadline
	}
	cfg := &s.srv.cfg
	// RFC 5321 section 4.5.3.2.5 asks for patience between blocks; the rate
	// over the whole text bounds what patience costs. Only waiting for the
	// client counts, not waiting for Intake.
	slow := cfg.DataTimeout + time.Duration(s.inText.size/cfg.DataMinRate)*time.Second
	return time.Now().Add(min(cfg.DataTimeout, slow-s.w.waited, cfg.DataTime-s.w.waited))
}

// beforeRead runs between setting the read deadline and reading.
func (s *session) beforeRead() error {
	if s.idle.Load() && s.srv.draining.Load() {
		return errShutdown
	}
	return s.ctx.Err()
}

// run is the whole session.
func (s *session) run() {
	stop := context.AfterFunc(s.ctx, func() {
		s.raw.SetDeadline(time.Unix(1, 0))
	})
	defer func() {
		stop()
		s.raw.Close()
		s.cancel(nil)
		s.wg.Wait() // the look-up ends with the session
	}()
	s.w.buf = s.w.pool.getSmall()
	defer func() { s.w.pool.put(s.w.buf); s.w.buf = nil }()

	err := s.open()
	if err == nil {
		err = s.loop()
	}
	s.slot.release()
	s.close(err)
}

// open greets.
func (s *session) open() error {
	var why string
	var ok bool
	if s.slot, why, ok = s.srv.limits.enter(s.Remote, s.Port, s.Trusted); !ok {
		if s.Port != PortSubmissions { // a refusal is not worth a handshake
			s.w.reply(421, "4.7.0", why)
		}
		return errRefused
	}
	if s.Port == PortSubmissions {
		cfg := s.tlsConfig()
		if cfg == nil {
			return errors.New("no certificate for implicit TLS")
		}
		if err := s.handshake(cfg); err != nil {
			return err
		}
	}
	if s.srv.deps.Reverse != nil && s.Remote.IsValid() && !s.Remote.IsLoopback() {
		s.reverse = startReverse(s.ctx, &s.wg, s.srv.cfg.ReverseTimeout, s.Remote, s.srv.deps.Reverse)
	}
	if a := s.srv.deps.Access; a != nil {
		if err := a.Connect(s.ctx, &s.Session); err != nil {
			f := transport.AsFault(err)
			code := 421 // RFC 5321 section 3.1: 554 or 421 instead of the greeting
			if !f.Temporary() {
				code = 554
			}
			s.fault(&transport.Fault{Code: code, Enhanced: f.Enhanced, Text: f.Text})
			return errRefused
		}
	}
	if d := s.srv.cfg.GreetingDelay; d > 0 && s.Port == PortMX && !s.Trusted {
		s.cmdDeadline = time.Now().Add(d)
		err := s.w.fill()
		var ne net.Error
		switch {
		case err == nil: // RFC 5321 section 3.1: the client waits for the greeting
			s.w.reply(554, "5.5.0", "You spoke before the greeting")
			return errAbuse
		case !errors.As(err, &ne) || !ne.Timeout() || s.ctx.Err() != nil:
			return err
		}
	}
	s.w.out = append(s.w.out, "220 "...)
	s.w.out = append(s.w.out, s.srv.deps.Hostname()...)
	s.w.out = append(s.w.out, " ESMTP Posthouse\r\n"...)
	return nil
}

// close says goodbye where that makes sense and logs the session.
func (s *session) close(err error) {
	log := s.srv.deps.Logger
	var ne net.Error
	switch {
	case errors.Is(err, transport.ErrUncertain):
		// Whatever came now would be read as the message's answer.
	case s.srv.draining.Load() && (err == errShutdown || errors.As(err, &ne) && ne.Timeout()):
		err = errShutdown
		s.w.reply(421, "4.3.2", "Going down for a moment, try again later")
	case s.ctx.Err() != nil:
		err = context.Cause(s.ctx)
		s.w.reply(421, "4.3.2", "Going down for a moment, try again later")
	case err == errTooOld:
		s.w.reply(421, "4.3.2", "This session has lasted long enough, connect again")
	case errors.As(err, &ne) && ne.Timeout():
		s.w.reply(421, "4.4.2", "Timed out waiting for you") // RFC 5321 section 3.8
	}
	if s.w.werr == nil && len(s.w.out) > 0 {
		// What the client still sends would make the kernel drop our last words
		// with a reset: stop writing, then listen for a moment.
		s.w.wtime = min(s.w.wtime, 5*time.Second)
		s.w.flush()
		if t, ok := s.w.conn.(*tls.Conn); ok && s.w.werr == nil {
			t.CloseWrite() // close_notify: nothing was cut off
		}
		if err != errQuit && s.w.werr == nil {
			s.linger()
		}
	}
	if err == errQuit || err == io.EOF {
		log.Debug("smtp session", s.attrs(nil)...)
		return
	}
	log.Info("smtp session", s.attrs(err)...)
}

func (s *session) attrs(err error) []any {
	a := []any{"session", s.ID, "port", s.Port.String(), "client", s.Remote.String(), "helo", clean(s.Helo),
		"accepted", s.accepted, "duration", time.Since(s.start)}
	if s.Login != nil {
		a = append(a, "login", clean(s.Login.Address))
	}
	if err != nil {
		a = append(a, "err", clean(err.Error()))
	}
	return a
}

// A client that sends a large chunk in the same breath as refused RCPTs learns
// why only if it is listened to for a while.
const (
	lingerTime = 5 * time.Second
	maxLinger  = 32 << 20 // bytes
)

func (s *session) linger() {
	half, ok := s.raw.(interface{ CloseWrite() error })
	if !ok {
		return
	}
	half.CloseWrite()
	s.raw.SetReadDeadline(time.Now().Add(lingerTime))
	b := s.w.pool.getLarge()
	defer s.w.pool.put(b)
	for total := 0; total < maxLinger; {
		n, err := s.raw.Read(b)
		if total += n; err != nil {
			return
		}
	}
}

// loop takes commands until the session ends.
func (s *session) loop() error {
	for s.ending == nil {
		if s.pending != verbUnknown {
			v, arg := s.pending, s.pendingArg
			s.pending, s.pendingArg = verbUnknown, nil
			s.dispatch(v, arg)
			continue
		}
		v, arg, err := s.readCommand(!s.mail)
		if err != nil {
			return err
		}
		s.dispatch(v, arg)
	}
	return s.ending
}

// readCommand reads a command; the faults of a line are answered here. idle
// says that no transaction would suffer if the session ended now.
func (s *session) readCommand(idle bool) (verb, []byte, error) {
	for {
		s.w.shrink()
		now := time.Now()
		s.cmdDeadline = now.Add(s.srv.cfg.CommandTimeout)
		if idle {
			s.idle.Store(true)
			if s.srv.draining.Load() {
				return 0, nil, errShutdown
			}
			if now.Sub(s.start) > s.srv.cfg.SessionTime {
				return 0, nil, errTooOld
			}
		}
		most := maxCommandLine
		if s.Login == nil && s.authOffered() {
			most = maxAuthLine // RFC 4954 section 4: the initial response is in the command
		}
		line, err := s.w.readLine(most)
		s.idle.Store(false)
		v, arg := parseLine(line)
		if len(line) > maxCommandLine-2 && v != verbAUTH {
			err = errLineTooLong
		}
		switch err {
		case nil:
			return v, arg, nil
		case errLineTooLong:
			s.misuse(500, "5.5.2", "Line too long") // RFC 5321 section 4.5.3.1.4
		case errLineBytes:
			s.misuse(500, "5.5.2", "Line has a CR or NUL in it")
		case errLineEnd:
			s.w.reply(500, "5.5.2", "Lines end with CR LF, yours ends with LF alone; closing")
			return 0, nil, errAbuse
		case errFlood:
			s.w.reply(500, "5.5.2", "Line too long; closing")
			return 0, nil, errAbuse
		default:
			return 0, nil, err
		}
		if s.ending != nil {
			return 0, nil, s.ending
		}
	}
}

// misuse answers a wrong command and counts it.
func (s *session) misuse(code int, enhanced, text string) {
	s.w.reply(code, enhanced, text)
	if s.bad++; s.bad >= s.srv.cfg.MaxBadCommands {
		s.abuse("Too many errors")
	}
}

// idleCommand counts a command that brings no mail nearer.
func (s *session) idleCommand() bool {
	if s.junk++; s.junk > s.srv.cfg.MaxIdleCommands {
		s.abuse("Too many commands without a message")
		return false
	}
	return true
}

func (s *session) abuse(text string) {
	s.w.reply(421, "4.7.0", text)
	s.ending = errAbuse
}

// fault tells the client what a decider said. The client never sees the cause.
func (s *session) fault(f *transport.Fault) {
	code := f.Code
	if code < 400 || code > 599 {
		code = 451
	}
	s.w.reply(code, enhancedFor(code, f.Enhanced), publicText(f.Text, s.params.SMTPUTF8))
	if code == 421 { // RFC 5321 section 3.8: 421 closes
		s.ending = errShutdown
	}
}

// reset forgets the transaction.
func (s *session) reset() {
	s.mail, s.tried, s.spoilt = false, false, false
	s.params = MailParams{}
	s.From, s.Origin = mesh.Address{}, 0
	if cap(s.rcpts) > 16 {
		s.rcpts = nil
	}
	clear(s.rcpts)
	s.rcpts = s.rcpts[:0]
}

// dispatch runs one command. What it wants to say is queued in w.
func (s *session) dispatch(v verb, arg []byte) {
	switch v {
	case verbHELO, verbEHLO:
		s.helo(v == verbEHLO, arg)
	case verbMAIL:
		s.mailFrom(arg)
	case verbRCPT:
		s.rcptTo(arg)
	case verbDATA:
		s.data(arg)
	case verbBDAT:
		s.bdat(arg)
	case verbSTARTTLS:
		s.startTLS(arg)
	case verbAUTH:
		s.auth(arg)
	case verbQUIT:
		if len(arg) > 0 {
			s.misuse(501, "5.5.4", "QUIT takes no parameter")
			return
		}
		s.w.reply(221, "2.0.0", "Goodbye")
		s.ending = errQuit
	case verbRSET:
		if len(arg) > 0 {
			s.misuse(501, "5.5.4", "RSET takes no parameter")
			return
		}
		if s.idleCommand() {
			s.reset()
			s.w.reply(250, "2.0.0", "Forgotten")
		}
	default:
		s.aside(v, arg)
	}
}

// aside runs the commands that change nothing; they may stand between two
// chunks of BDAT.
func (s *session) aside(v verb, arg []byte) {
	switch v {
	case verbNOOP: // RFC 5321 section 4.1.1.9: a parameter is ignored
		if s.idleCommand() {
			s.w.reply(250, "2.0.0", "Here")
		}
	case verbVRFY:
		if len(arg) == 0 {
			s.misuse(501, "5.5.4", "VRFY needs a name")
		} else if s.idleCommand() {
			// RFC 5321 section 7.3: say nothing about who exists.
			s.w.reply(252, "2.5.0", "Cannot verify, but will take the message and try")
		}
	case verbHELP:
		if s.idleCommand() {
			s.w.reply(214, "2.0.0", "See RFC 5321; people in need of help write to postmaster")
		}
	case verbRefused:
		s.misuse(502, "5.5.1", "Command not implemented")
	case verbUnknown:
		s.misuse(500, "5.5.2", "Command not recognized")
	default:
		s.misuse(503, "5.5.1", "Not in the middle of a message; finish it or send RSET")
	}
}

// helo answers HELO and EHLO. RFC 5321 section 4.1.4: a valid one resets.
func (s *session) helo(esmtp bool, arg []byte) {
	if !validHelo(string(arg)) {
		word := "HELO"
		if esmtp {
			word = "EHLO"
		}
		s.misuse(501, "5.5.4", "Say who you are: "+word+" host.example.com")
		return
	}
	if !s.idleCommand() {
		return
	}
	s.reset()
	s.greeted, s.ESMTP, s.Helo = true, esmtp, string(arg)
	name := s.srv.deps.Hostname()
	if !esmtp {
		s.w.reply(250, "", name)
		return
	}
	s.w.replyPart(250, name)
	s.w.replyPart(250, "PIPELINING")
	s.w.replyPart(250, "SIZE "+strconv.FormatInt(s.srv.deps.MaxSize(), 10))
	s.w.replyPart(250, "8BITMIME")
	s.w.replyPart(250, "SMTPUTF8")
	s.w.replyPart(250, "ENHANCEDSTATUSCODES")
	s.w.replyPart(250, "CHUNKING")
	if s.authOffered() {
		s.w.replyPart(250, "AUTH PLAIN LOGIN")
	}
	if s.TLS == "" && s.tlsConfig() != nil {
		s.w.replyPart(250, "STARTTLS")
	}
	s.w.reply(250, "", "DSN")
}

func (s *session) tlsConfig() *tls.Config {
	if s.srv.deps.TLS == nil {
		return nil
	}
	return s.srv.deps.TLS()
}

// startTLS obeys RFC 3207. Nothing that was said in the clear survives it.
func (s *session) startTLS(arg []byte) {
	switch {
	case s.TLS != "":
		s.misuse(503, "5.5.1", "TLS is already active")
		return
	case s.srv.deps.TLS == nil:
		s.misuse(502, "5.5.1", "Command not implemented")
		return
	case len(arg) > 0: // RFC 3207 section 4
		s.misuse(501, "5.5.4", "STARTTLS takes no parameter")
		return
	case s.mail:
		s.misuse(503, "5.5.1", "Not in the middle of a message; finish it or send RSET")
		return
	}
	cfg := s.tlsConfig()
	if cfg == nil {
		s.w.reply(454, "4.7.0", "TLS not available now, try again later")
		return
	}
	// RFC 3207 section 6 and CVE-2021-38371: what came in the same breath was
	// put there by somebody in the middle, or by a client that is broken.
	if guardSTARTTLS && s.w.buffered() > 0 {
		s.w.reply(501, "5.5.4", "Nothing may follow STARTTLS before its answer; closing")
		s.ending = errAbuse
		return
	}
	s.w.reply(220, "2.0.0", "Ready for TLS")
	if err := s.w.flush(); err != nil {
		s.ending = err
		return
	}
	if err := s.handshake(cfg); err != nil {
		s.ending = err
		return
	}
	// RFC 3207 section 4.2: as if the connection had just begun.
	s.reset()
	s.greeted, s.ESMTP, s.Helo = false, false, ""
	s.bad, s.junk = 0, 0
}

func (s *session) handshake(cfg *tls.Config) error {
	t := tls.Server(s.raw, cfg)
	ctx, cancel := context.WithTimeout(s.ctx, s.srv.cfg.HandshakeTimeout)
	defer cancel()
	if err := s.raw.SetDeadline(time.Now().Add(s.srv.cfg.HandshakeTimeout)); err != nil {
		return err
	}
	if err := s.ctx.Err(); err != nil { // the deadline may have undone a cut
		return err
	}
	if err := t.HandshakeContext(ctx); err != nil {
		s.w.werr = err // nobody could read an answer
		return err
	}
	st := t.ConnectionState()
	s.w.conn = t
	if guardSTARTTLS {
		s.w.r, s.w.w = 0, 0
	}
	s.TLS = tlsName(st.Version) + " " + tls.CipherSuiteName(st.CipherSuite)
	return nil
}

func tlsName(v uint16) string {
	switch v {
	case tls.VersionTLS13:
		return "TLS1.3"
	case tls.VersionTLS12:
		return "TLS1.2"
	}
	return tls.VersionName(v)
}
