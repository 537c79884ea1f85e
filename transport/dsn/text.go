package dsn

import (
	"fmt"
	"strings"
)

func subject(k Kind) string {
	switch k {
	case Failed:
		return "Your message was not delivered"
	case Delayed:
		return "Your message is delayed"
	case Delivered:
		return "Your message was delivered"
	case Relayed:
		return "Your message was handed on"
	}
	return "Your message was sent to the members of a group"
}

// text writes the part for people: what happened in one sentence, why in the
// other side's words, and what to do next.
func (r *Report) text(p *printer) {
	many := len(r.Recipients) > 1
	whom := "these recipients"
	if !many && len(r.Recipients) == 1 {
		whom = address(r.Recipients[0].Address)
		if !p.global {
			whom = clean(whom, 320, false)
		}
	}
	when := ""
	if !r.Arrived.IsZero() {
		when = " of " + r.Arrived.UTC().Format("2 January 2006, 15:04 UTC")
	}
	switch r.Kind {
	case Failed:
		p.wrap("Your message" + when + " to " + whom + " could not be delivered.")
	case Delayed:
		p.wrap("Your message" + when + " to " + whom + " has not arrived yet. You need not do anything: " +
			"we keep trying" + r.until() + ", and you will hear from us if it cannot be delivered.")
	case Delivered:
		p.wrap("Your message" + when + " to " + whom + " was delivered.")
	case Relayed:
		p.wrap("Your message" + when + " to " + whom + " was handed to the recipient's mail system, " +
			"which does not report any further. You will hear nothing more unless it fails there.")
	default:
		p.wrap("Your message" + when + " to " + whom + " was sent on to the members of that group. " +
			"You will hear nothing more unless it fails there.")
	}
	for i := range r.Recipients {
		x := &r.Recipients[i]
		words := clean(x.Result.Text, 800, p.global)
		if many {
			p.line("")
			p.wrap("  " + clean(address(x.Address), 320, p.global))
		}
		if r.Kind != Failed && r.Kind != Delayed {
			continue
		}
		if !many {
			p.line("")
		}
		if words != "" {
			by := clean(x.Result.By, 255, p.global)
			switch {
			case x.Result.Code != 0 && by != "" && by != r.Reporter:
				words = fmt.Sprintf("%s answered: %03d %s", by, x.Result.Code%1000, words)
			case x.Result.Code != 0:
				words = fmt.Sprintf("The answer was: %03d %s", x.Result.Code%1000, words)
			default:
				words = "The reason: " + words
			}
			p.wrap(words)
		}
		if r.Kind == Failed {
			p.wrap("What you can do: " + advice(status(r.Kind, &x.Result)))
		}
	}
}

func (r *Report) until() string {
	if r.Until.IsZero() {
		return ""
	}
	return " until " + r.Until.UTC().Format("2 January 2006")
}

// advice is the next step, by the subject and detail of the status (RFC 3463).
func advice(status string) string {
	for _, a := range []struct{ prefix, text string }{
		{"5.1.8", "ask your administrator: the other side does not accept your own address."},
		{"5.1.7", "ask your administrator: the other side does not accept your own address."},
		{"5.1.", "check the address for typing mistakes, and send the message again."},
		{"5.2.2", "tell the recipient in another way that the mailbox is full, and send the message again later."},
		{"5.2.3", "send the message again in smaller parts: it is larger than the recipient may receive."},
		{"5.3.4", "send the message again in smaller parts: it is larger than the other side accepts."},
		{"5.2.", "ask the recipient in another way whether the mailbox is still in use."},
		{"5.4.7", "send the message again, or reach the recipient in another way: the other side did not take it in time."},
		{"5.4.6", "show this report to your administrator: the message went round in a circle."},
		{"5.4.", "check the part of the address after the @, and send the message again later."},
		{"5.6.7", "send to an address in plain letters: the other side does not know international addresses."},
		{"5.6.", "send the message again as plain text or in another format."},
		{"5.7.", "ask the recipient in another way to let your mail in, or show this report to your administrator."},
	} {
		if strings.HasPrefix(status, a.prefix) {
			return a.text
		}
	}
	return "send the message again later; if that fails too, show this report to your administrator."
}

// wrap writes a paragraph in lines of at most 76 bytes where it has spaces.
func (p *printer) wrap(s string) {
	for len(s) > 76 {
		i := strings.LastIndexByte(s[:77], ' ')
		if i <= 2 {
			if i = strings.IndexByte(s[2:], ' '); i < 0 {
				break
			}
			i += 2
		}
		p.line(s[:i])
		if s = s[i+1:]; strings.HasPrefix(s, "--") {
			s = " " + s // foreign words must not look like a boundary
		}
	}
	p.line(s)
}
