package smtpd

import (
	"bytes"
	"encoding/base64"
	"strings"
	"time"
	"unicode/utf8"

	"posthouse/transport"
)

// auth obeys RFC 4954 with PLAIN (RFC 4616) and LOGIN (widely used, never
// standardised).
func (s *session) auth(arg []byte) {
	switch {
	case s.Port == PortMX || s.srv.deps.Authenticator == nil:
		s.misuse(502, "5.5.1", "There is no log-in on this port; use port 587 or 465")
		return
	case s.TLS == "": // RFC 4954 section 4, RFC 3207 section 4
		s.misuse(530, "5.7.0", "Send STARTTLS first")
		return
	case s.Login != nil: // RFC 4954 section 4: once
		s.misuse(503, "5.5.1", "You are logged in already")
		return
	case !s.ESMTP:
		s.misuse(503, "5.5.1", "Say EHLO first")
		return
	case s.mail:
		s.misuse(503, "5.5.1", "Not in the middle of a message; finish it or send RSET")
		return
	}
	mech, initial, hasInitial := strings.Cut(string(arg), " ")
	initial = strings.TrimLeft(initial, " ")
	if strings.ContainsRune(initial, ' ') {
		s.misuse(501, "5.5.4", "Use AUTH mechanism [initial-response]")
		return
	}
	switch strings.ToUpper(mech) {
	case "PLAIN":
		s.authPlain(initial, hasInitial)
	case "LOGIN":
		s.authLogin(initial, hasInitial)
	case "":
		s.misuse(501, "5.5.4", "Use AUTH mechanism [initial-response]")
	default: // RFC 4954 section 4
		s.misuse(504, "5.5.4", "Mechanism not offered; use PLAIN or LOGIN")
	}
}

func (s *session) authPlain(initial string, has bool) {
	msg, ok := s.response(initial, has, "")
	if !ok {
		return
	}
	// RFC 4616 section 2: [authzid] NUL authcid NUL passwd
	parts := bytes.Split(msg, []byte{0})
	if len(parts) != 3 {
		s.misuse(501, "5.5.2", "Bad PLAIN response")
		return
	}
	authz, user, pass := string(parts[0]), string(parts[1]), string(parts[2])
	if authz != "" && authz != user {
		s.misuse(535, "5.7.8", "Nobody may act for another user")
		return
	}
	s.login(user, pass)
}

func (s *session) authLogin(initial string, has bool) {
	user, ok := s.response(initial, has, "VXNlcm5hbWU6") // "Username:"
	if !ok {
		return
	}
	pass, ok := s.response("", false, "UGFzc3dvcmQ6") // "Password:"
	if !ok {
		return
	}
	s.login(string(user), string(pass))
}

// response returns a client's response, the initial one if there is one, else
// after a challenge that is base64 already.
func (s *session) response(initial string, has bool, challenge string) ([]byte, bool) {
	in := []byte(initial)
	if !has {
		s.w.reply(334, "", challenge)
		s.cmdDeadline = time.Now().Add(s.srv.cfg.CommandTimeout)
		line, err := s.w.readLine(maxAuthLine)
		switch err {
		case nil:
			in = line
		case errLineTooLong: // RFC 4954 section 4
			s.misuse(500, "5.5.6", "Authentication exchange line is too long")
			return nil, false
		case errLineBytes:
			s.misuse(501, "5.5.2", "Bad base64")
			return nil, false
		case errLineEnd, errFlood:
			s.w.reply(500, "5.5.2", "Lines end with CR LF; closing")
			s.ending = errAbuse
			return nil, false
		default:
			s.ending = err
			return nil, false
		}
		if string(in) == "*" { // RFC 4954 section 4: cancelled
			s.misuse(501, "5.7.0", "Authentication cancelled")
			return nil, false
		}
	} else if initial == "=" { // RFC 4954 section 4: an empty initial response
		in = nil
	}
	out := make([]byte, base64.StdEncoding.DecodedLen(len(in)))
	n, err := base64.StdEncoding.Strict().Decode(out, in)
	if err != nil || bytes.ContainsAny(in, "\r\n") {
		s.misuse(501, "5.5.2", "Bad base64") // RFC 4954 section 4
		return nil, false
	}
	return out[:n], true
}

// login checks a password. Wrong ones are answered late, the longer the more
// there were; the right one never waits. The delay runs from the question, so
// that the time of the answer tells nothing about the work behind it.
func (s *session) login(user, pass string) {
	began := time.Now()
	var err error
	var who Login
	log := s.srv.deps.Logger
	switch {
	case user == "" || pass == "" || len(user) > 512 || len(pass) > 4096 || !utf8.ValidString(user) || strings.ContainsRune(user+pass, 0):
		err = &transport.Fault{Code: 535, Enhanced: "5.7.8", Text: "Wrong user or password"}
	default:
		who, err = s.srv.deps.Authenticator.Authenticate(s.ctx, user, pass, s.Remote)
	}
	if err == nil {
		s.srv.deps.Failures.Succeeded(s.Remote, user)
		s.slot.loggedIn()
		s.Login = &who
		s.junk, s.bad = 0, 0
		log.Info("login", "session", s.ID, "client", s.Remote.String(), "login", clean(who.Address))
		s.w.reply(235, "2.7.0", "Welcome")
		return
	}
	f := transport.AsFault(err)
	log.Info("login refused", "session", s.ID, "client", s.Remote.String(), "login", clean(user), "err", clean(f.Error()))
	if f.Code != 535 {
		code, enhanced := f.Code, f.Enhanced
		if f.Temporary() {
			code, enhanced = 454, "4.7.0" // RFC 4954 section 6
		}
		s.fault(&transport.Fault{Code: code, Enhanced: enhanced, Text: f.Text})
		return
	}
	select {
	case <-time.After(time.Until(began.Add(s.srv.deps.Failures.Failed(s.Remote, user, began)))):
	case <-s.srv.down: // nobody's stop waits for who guesses
		s.ending = errShutdown
		return
	case <-s.ctx.Done():
		s.ending = s.ctx.Err()
		return
	}
	s.w.reply(535, "5.7.8", "Wrong user or password")
	if s.authFails++; s.authFails >= s.srv.cfg.MaxAuthFailures {
		s.abuse("Too many failed log-ins")
	}
}
