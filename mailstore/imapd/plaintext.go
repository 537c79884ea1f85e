package imapd

import (
	"bytes"
	"fmt"
	"net"
	"strings"
	"time"
)

const (
	plainCommands = 10 // before STARTTLS nobody needs more
	plainLine     = 1 << 10
	plainTimeout  = 30 * time.Second
)

const plainCapability = "CAPABILITY IMAP4rev1 IMAP4rev2 STARTTLS LOGINDISABLED"

// plaintext speaks with a client on port 143 until STARTTLS, and reports
// whether the handshake may begin. The library never sees these bytes, and
// nothing of them is kept. What a client sent behind STARTTLS without waiting
// ends the connection: it could be somebody else's (ATTACKS.md A3).
func (s *Server) plaintext(c net.Conn) bool {
	say := func(format string, args ...any) bool {
		_, err := fmt.Fprintf(c, format+"\r\n", args...)
		return err == nil
	}
	if c.SetDeadline(time.Now().Add(plainTimeout)) != nil || !say("* OK [%s] Posthouse ready, TLS is required", plainCapability) {
		return false
	}
	buf, n := make([]byte, plainLine), 0
	for range plainCommands {
		var end int
		for {
			if end = bytes.IndexByte(buf[:n], '\n') + 1; end > 0 {
				break
			}
			if n == len(buf) {
				say("* BYE Command too long")
				return false
			}
			m, err := c.Read(buf[n:])
			n += m
			if err != nil && m == 0 {
				return false
			}
		}
		line := string(bytes.TrimRight(buf[:end], "\r\n"))
		n = copy(buf, buf[end:n])
		words := strings.Fields(line)
		if len(words) < 2 || strings.ContainsAny(line, "{\x00\r") || strings.ContainsAny(words[0], `+*()%"\`) {
			say("* BYE Command not understood")
			return false
		}
		tag, verb := words[0], strings.ToUpper(words[1])
		ok := true
		switch {
		case verb == "STARTTLS" && len(words) == 2:
			if n > 0 {
				say("* BYE Nothing may follow STARTTLS before the handshake")
				return false
			}
			return say("%s OK Begin TLS negotiation now", tag) && c.SetDeadline(time.Time{}) == nil
		case verb == "CAPABILITY":
			ok = say("* %s\r\n%s OK CAPABILITY completed", plainCapability, tag)
		case verb == "NOOP":
			ok = say("%s OK NOOP completed", tag)
		case verb == "LOGOUT":
			say("* BYE Logging out\r\n%s OK LOGOUT completed", tag)
			return false
		case verb == "LOGIN" || verb == "AUTHENTICATE":
			// RFC 9051 section 11.1, RFC 5530: the password may be known to others now.
			ok = say("%s NO [PRIVACYREQUIRED] Use STARTTLS first, or port 993", tag)
		default:
			say("%s BAD Use STARTTLS first, or port 993\r\n* BYE Command not allowed without TLS", tag)
			return false
		}
		if !ok {
			return false
		}
	}
	say("* BYE Too many commands without TLS")
	return false
}
