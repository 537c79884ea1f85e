package smtpout

import (
	"bufio"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
)

// fakeHost is a scripted SMTP server. answers maps the beginning of a command
// ("", the greeting; "." the text) to its answer; the longest match wins.
// "close" closes, "hang" says nothing more. {n} in a key counts: "MAIL{2}" is
// the second MAIL of the connection.
type fakeHost struct {
	ehlo        []string
	answers     map[string]string
	unreachable bool
	badTLS      bool
	limitConns  int

	mu    sync.Mutex
	said  []string // commands
	texts []string // raw, as on the wire, with the end
	conns int
	now   int
}

func (h *fakeHost) answer(cmd string, n int) string {
	best, ans := -1, ""
	for k, v := range h.answers {
		key := k
		if i := strings.Index(k, "{"); i >= 0 {
			var want int
			fmt.Sscanf(k[i:], "{%d}", &want)
			if want != n {
				continue
			}
			key = k[:i]
		}
		if key == "" && cmd != "" || !strings.HasPrefix(cmd, key) {
			continue
		}
		if len(k) > best {
			best, ans = len(k), v
		}
	}
	return ans
}

func (h *fakeHost) serve(c net.Conn) {
	defer c.Close()
	h.mu.Lock()
	h.conns++
	h.now++
	over := h.limitConns > 0 && h.now > h.limitConns
	h.mu.Unlock()
	defer func() { h.mu.Lock(); h.now--; h.mu.Unlock() }()
	r := bufio.NewReader(c)
	counts := map[string]int{}
	say := func(cmd, def string) bool {
		verb, _, _ := strings.Cut(cmd, " ")
		counts[verb]++
		ans := h.answer(cmd, counts[verb])
		switch ans {
		case "":
			ans = def
		case "close":
			return false
		case "hang":
			io.Copy(io.Discard, r)
			return false
		}
		_, err := io.WriteString(c, strings.ReplaceAll(ans, "\n", "\r\n")+"\r\n")
		return err == nil && !strings.HasPrefix(ans, "421")
	}
	if over {
		io.WriteString(c, "421 4.7.0 too many connections\r\n")
		return
	}
	if !say("", "220 fake ESMTP") {
		return
	}
	for {
		line, err := r.ReadString('\n')
		if err != nil {
			return
		}
		line = strings.TrimSuffix(line, "\r\n")
		h.mu.Lock()
		h.said = append(h.said, line)
		h.mu.Unlock()
		verb, _, _ := strings.Cut(line, " ")
		def := "250 ok"
		switch verb {
		case "EHLO":
			def = "250-fake\n"
			for _, e := range h.ehlo {
				if _, isTLS := c.(*tls.Conn); e != "STARTTLS" || !isTLS {
					def += "250-" + e + "\n"
				}
			}
			def += "250 HELP"
		case "QUIT":
			say(line, "221 bye")
			return
		case "DATA":
			def = "354 go"
		case "STARTTLS":
			def = "220 go"
		case "AUTH":
			def = "235 ok"
		}
		if !say(line, def) {
			return
		}
		ans := h.answer(line, counts[verb])
		switch {
		case verb == "DATA" && (ans == "" || strings.HasPrefix(ans, "354")):
			var text strings.Builder
			for !strings.HasSuffix(text.String(), "\r\n.\r\n") && text.String() != ".\r\n" {
				l, err := r.ReadString('\n')
				if err != nil {
					return
				}
				text.WriteString(l)
			}
			h.mu.Lock()
			h.texts = append(h.texts, text.String())
			h.mu.Unlock()
			if !say(".", "250 2.0.0 stored as F1") {
				return
			}
		case verb == "STARTTLS" && (ans == "" || strings.HasPrefix(ans, "220")):
			if h.badTLS {
				r.Peek(1)
				io.WriteString(c, "this is not TLS at all, sorry")
				return
			}
			t := tls.Server(c, serverTLS())
			if t.Handshake() != nil {
				return
			}
			c, r = t, bufio.NewReader(t)
		}
	}
}

func (h *fakeHost) commands() string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return strings.Join(h.said, "\n")
}

func (h *fakeHost) taken() []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return append([]string(nil), h.texts...)
}
