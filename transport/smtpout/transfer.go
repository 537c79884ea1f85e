package smtpout

import (
	"errors"
	"strconv"
	"strings"
	"time"

	"golang.org/x/net/idna"

	"posthouse/mesh"
	"posthouse/transport"
)

// rcptGroup is how many RCPT go out before their answers are read: more could
// make both sides wait for the other to read.
const rcptGroup = 50

// transfer is one leg on its way over one or more transactions.
type transfer struct {
	leg     *transport.Leg
	content content
	results []transport.Result // Outcome 0: pending
}

func newTransfer(leg *transport.Leg) *transfer {
	return &transfer{leg: leg, results: make([]transport.Result, len(leg.Rcpts))}
}

// scan looks at the text. Content that must not leave fails the leg.
func (t *transfer) scan() {
	var err error
	t.content, err = scan(t.leg.Body)
	if guardLineEnds && errors.Is(err, errBareCRLF) {
		t.rest(transport.Result{Outcome: transport.Failed, Code: 554, Enhanced: "5.6.0", Text: "The message has a CR or LF that is not part of a line end"})
	} else if err != nil && !errors.Is(err, errBareCRLF) {
		t.rest(transport.Result{Outcome: transport.Deferred, Code: 451, Enhanced: "4.3.0", Text: "The stored message cannot be read here"})
	}
}

// done reports whether every recipient has a result.
func (t *transfer) done() bool {
	for i := range t.results {
		if t.results[i].Outcome == 0 {
			return false
		}
	}
	return true
}

// any reports whether some recipient has one.
func (t *transfer) any() bool {
	for i := range t.results {
		if t.results[i].Outcome != 0 {
			return true
		}
	}
	return false
}

// rest gives every pending recipient the same result.
func (t *transfer) rest(r transport.Result) {
	for i := range t.results {
		if t.results[i].Outcome == 0 {
			t.results[i] = r
		}
	}
}

// result makes a result of a host's answer.
func (cn *conn) result(rp reply, asked string) transport.Result {
	f := rp.fault(asked)
	r := f.Result(cn.host)
	if r.Text == "" {
		r.Text = "refused without a reason (" + asked + ")"
	}
	return r
}

// transact sends t's pending recipients in one transaction. When it returns
// nil each of them has a result, or is left for another transaction because
// the host takes only so many at once. An error means that the connection is
// unusable and pending recipients may be tried again.
func (cn *conn) transact(t *transfer) error {
	mail, fail := cn.mailCommand(t)
	if fail != nil {
		t.rest(*fail)
		return nil
	}
	// Who goes along in this transaction, and how.
	var who []int
	var cmds []string
	for i := range t.results {
		if t.results[i].Outcome != 0 {
			continue
		}
		cmd, fail := cn.rcptCommand(&t.leg.Rcpts[i])
		if fail != nil {
			t.results[i] = *fail
			continue
		}
		who, cmds = append(who, i), append(cmds, cmd)
	}
	if len(who) == 0 {
		return nil
	}
	group := 1
	if cn.has("PIPELINING") {
		group = rcptGroup
	}

	out := []byte(mail)
	mailSaid := false
	var ok, late []int // taken; beyond the host's limit
	for len(who) > 0 {
		n := min(group, len(who))
		if group > 1 || mailSaid {
			for _, c := range cmds[:n] {
				out = append(out, c...)
			}
		} else {
			n = 0 // MAIL alone
		}
		if err := cn.write(cn.cfg.CommandTimeout, out); err != nil {
			return err
		}
		out = out[:0]
		var refused *transport.Result
		if !mailSaid {
			mailSaid = true
			rp, err := cn.read(cn.cfg.CommandTimeout)
			if err != nil {
				return err
			}
			if !rp.ok() {
				r := cn.result(rp, "MAIL FROM")
				refused = &r
			}
		}
		for k := range n {
			rp, err := cn.read(cn.cfg.CommandTimeout)
			if err != nil {
				if refused != nil { // its word on MAIL stands
					t.rest(*refused)
				}
				return err
			}
			switch i := who[k]; {
			case refused != nil: // 503, of course
			case rp.ok(): // 250, 251: RFC 5321 section 3.4
				ok = append(ok, i)
			case beyondLimit(rp):
				late = append(late, i)
				t.results[i] = cn.result(rp, "RCPT TO")
				t.results[i].Outcome = transport.Deferred
			default:
				t.results[i] = cn.result(rp, "RCPT TO")
			}
		}
		if refused != nil {
			t.rest(*refused)
			return cn.reset()
		}
		who, cmds = who[n:], cmds[n:]
		if cn.closing { // 421 among the answers
			t.rest(transport.Result{Outcome: transport.Deferred, Code: 421, Enhanced: "4.3.2", Text: "The host closed the session", By: cn.host})
			return nil
		}
	}
	if len(ok) == 0 {
		return cn.reset()
	}
	return cn.data(t, ok, late)
}

// data sends the text for the recipients in ok.
func (cn *conn) data(t *transfer, ok, late []int) error {
	rp, err := cn.do(cn.cfg.DataTimeout, "DATA")
	if err != nil {
		return err
	}
	if rp.code != 354 {
		r := cn.result(rp, "DATA")
		for _, i := range ok {
			t.results[i] = r
		}
		if rp.ok() { // it believes to have a message
			cn.closing = true
			return nil
		}
		return cn.reset()
	}
	start := time.Now()
	write := func(b []byte) error {
		left := cn.cfg.TextTime - time.Since(start) // a host that reads by drips
		return cn.write(min(cn.cfg.BlockTimeout, left), b)
	}
	if err := writeText(write, t.leg.Body, func() { cn.dotSent.Store(true) }); err != nil && !cn.dotSent.Load() {
		var re readError
		if errors.As(err, &re) { // no dot was sent: closing throws it away
			t.rest(transport.Result{Outcome: transport.Deferred, Code: 451, Enhanced: "4.3.0", Text: "The stored message cannot be read here"})
			cn.closing = true
			return nil
		}
		return err
	}
	rp, err = cn.read(cn.cfg.DotTimeout)
	cn.dotSent.Store(false)
	var r transport.Result
	switch {
	case err != nil:
		// RFC 1047: it may have the message or not. Nobody may say "failed"
		// and nobody may forget it: it is tried again.
		r = transport.Result{Outcome: transport.Deferred, Enhanced: "4.4.2", Text: "No answer after the message was sent; it may have arrived", By: cn.host}
		cn.closing = true
	case rp.ok():
		enhanced, text := rp.words()
		r = transport.Result{Outcome: transport.Relayed, Code: rp.code, Enhanced: enhanced, Text: text, By: cn.host, DSN: cn.has("DSN")}
	default:
		r = cn.result(rp, "the message")
	}
	for _, i := range ok {
		t.results[i] = r
	}
	if err == nil && rp.ok() { // RFC 5321 section 4.5.3.1.10: the rest in another transaction
		for _, i := range late {
			t.results[i] = transport.Result{}
		}
	}
	return nil
}

// reset ends a transaction without a text.
func (cn *conn) reset() error {
	if cn.closing {
		return nil
	}
	if rp, err := cn.do(cn.cfg.CommandTimeout, "RSET"); err != nil || !rp.ok() {
		cn.closing = true // its results are known: only the connection is of no use
	}
	return nil
}

// beyondLimit recognises "too many recipients": RFC 5321 section 4.5.3.1.10,
// 452, from old hosts 552.
func beyondLimit(rp reply) bool {
	enhanced, _ := rp.words()
	return (rp.code == 452 || rp.code == 552) && (enhanced == "4.5.3" || enhanced == "5.5.3" || enhanced == "" && rp.code == 452)
}

// mailCommand builds MAIL, or says why this host cannot take the message.
func (cn *conn) mailCommand(t *transfer) (string, *transport.Result) {
	env := &t.leg.Envelope
	fail := func(code int, enhanced, text string) (string, *transport.Result) {
		r := (&transport.Fault{Code: code, Enhanced: enhanced, Text: text}).Result(cn.host)
		return "", &r
	}
	size := t.leg.Body.Size()
	if limit := cn.size(); limit > 0 && size > limit {
		return fail(552, "5.3.4", "The message has "+strconv.FormatInt(size, 10)+" bytes, this host takes "+strconv.FormatInt(limit, 10))
	}
	if t.content.eightBit && !cn.has("8BITMIME") { // we do not convert
		return fail(554, "5.6.3", "The message has 8-bit content, which this host does not take")
	}
	from := ""
	utf8 := env.SMTPUTF8 && t.content.headerUTF8
	if env.From != "" {
		a, err := mesh.ParseAddress(env.From)
		if err != nil {
			return fail(553, "5.1.7", "Bad sender address")
		}
		if from, err = cn.path(a); err != nil {
			return fail(553, "5.6.7", "The sender's address needs SMTPUTF8, which this host does not take")
		}
		utf8 = utf8 || !a.IsASCII()
	}
	// RFC 6531 section 3.2. What is needed is decided by the content: many
	// clients ask for SMTPUTF8 always.
	if utf8 && env.SMTPUTF8 && t.content.headerUTF8 && !cn.has("SMTPUTF8") {
		return fail(554, "5.6.7", "The message has UTF-8 in its header, which this host does not take")
	}
	for i := range t.leg.Rcpts {
		utf8 = utf8 || t.results[i].Outcome == 0 && !ascii(t.leg.Rcpts[i].Address)
	}
	if env.RequireTLS && (!cn.verified || !cn.has("REQUIRETLS")) { // RFC 8689 section 4.2.1
		return fail(550, "5.7.30", "The sender requires TLS on every hop, and this host does not promise it")
	}
	var b strings.Builder
	b.WriteString("MAIL FROM:<" + from + ">")
	if cn.has("SIZE") {
		b.WriteString(" SIZE=" + strconv.FormatInt(size, 10))
	}
	if cn.has("8BITMIME") && (t.content.eightBit || env.Body == transport.Body8Bit) {
		b.WriteString(" BODY=8BITMIME")
	}
	if utf8 && cn.has("SMTPUTF8") {
		b.WriteString(" SMTPUTF8")
	}
	if env.RequireTLS {
		b.WriteString(" REQUIRETLS")
	}
	if cn.has("DSN") { // RFC 3461 section 5.2.1: passed on as given
		if env.Ret == "FULL" || env.Ret == "HDRS" {
			b.WriteString(" RET=" + env.Ret)
		}
		if env.EnvID != "" && plainArg(env.EnvID) {
			b.WriteString(" ENVID=" + env.EnvID)
		}
	}
	b.WriteString("\r\n")
	return b.String(), nil
}

// rcptCommand builds RCPT, or says why this host cannot take the recipient.
func (cn *conn) rcptCommand(r *transport.Recipient) (string, *transport.Result) {
	fail := func(code int, enhanced, text string) (string, *transport.Result) {
		r := (&transport.Fault{Code: code, Enhanced: enhanced, Text: text}).Result(cn.host)
		return "", &r
	}
	a, err := mesh.ParseAddress(r.Address)
	if err != nil {
		return fail(553, "5.1.3", "Bad recipient address")
	}
	to, err := cn.path(a)
	if err != nil {
		return fail(553, "5.6.7", "The address needs SMTPUTF8, which this host does not take")
	}
	var b strings.Builder
	b.WriteString("RCPT TO:<" + to + ">")
	if cn.has("DSN") {
		if n := r.Notify; n != 0 {
			b.WriteString(" NOTIFY=" + notify(n))
		}
		if r.ORcpt != "" && plainArg(r.ORcpt) && (ascii(r.ORcpt) || cn.has("SMTPUTF8")) {
			b.WriteString(" ORCPT=" + r.ORcpt)
		}
	}
	b.WriteString("\r\n")
	return b.String(), nil
}

var errNeedsUTF8 = errors.New("address needs SMTPUTF8")

// path writes an address for this host: a UTF-8 domain has an ASCII form that
// means the same, a UTF-8 local part has none.
func (cn *conn) path(a mesh.Address) (string, error) {
	if a.IsASCII() || cn.has("SMTPUTF8") {
		return a.String(), nil
	}
	if !ascii(a.Local) {
		return "", errNeedsUTF8
	}
	d, err := idna.Lookup.ToASCII(a.Domain)
	if err != nil {
		return "", errNeedsUTF8
	}
	return a.Local + "@" + d, nil
}

func notify(n transport.Notify) string {
	if n&transport.NotifyNever != 0 {
		return "NEVER"
	}
	var w []string
	for _, x := range []struct {
		bit  transport.Notify
		word string
	}{{transport.NotifySuccess, "SUCCESS"}, {transport.NotifyFailure, "FAILURE"}, {transport.NotifyDelay, "DELAY"}} {
		if n&x.bit != 0 {
			w = append(w, x.word)
		}
	}
	return strings.Join(w, ",")
}

func ascii(s string) bool {
	for i := 0; i < len(s); i++ {
		if s[i] >= 0x80 {
			return false
		}
	}
	return true
}

// plainArg reports whether s can be a parameter's value and nothing else.
func plainArg(s string) bool {
	for i := 0; i < len(s); i++ {
		if s[i] <= ' ' || s[i] == '=' || s[i] == 127 {
			return false
		}
	}
	return true
}
