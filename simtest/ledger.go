package simtest

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/emersion/go-imap/v2"

	"posthouse/simtest/record"
)

var errNotUp = errors.New("the node does not run")

// everybody is the group of all users.
const everybody = "all@" + Domain

// Ledger is what the observer knows from the clients' side: every attempt to
// hand a message in, with the answer that the client read.
type Ledger struct {
	w *World

	mu       sync.Mutex
	attempts []*attempt
	next     int
	sizes    map[string]int                 // of the bodies that are not as long as the world's
	arrived  int                            // found by Check: in mailboxes,
	lost     int                            // and nowhere
	faults   []trouble                      // at gateways: what the outside took then may come to it again
	letters  map[string]map[imap.UID]Letter // by office: what was in its INBOX
	whole    map[string]*process            // by office: who showed all of it
	validity map[string]uint32
	uidNext  map[string]imap.UID
	losses   []loss
	renewed  map[string]bool        // offices whose UIDVALIDITY must be another, and a larger one, when it is read next
	shown    map[string][]time.Time // by office: when a reader saw that its INBOX had so many messages
}

// attempt is one message to one recipient, as its client saw it.
type attempt struct {
	subject string
	client  string // one sequence of messages, each sent after the answer to the one before
	from    string
	to      string
	at      string // office
	probe   bool
	answer  int // final; 0: none was read
	when    time.Time
	after   time.Time // when the answer was read
}

// trouble is a time of which a node may have forgotten what it was told.
type trouble struct {
	at       netip.Addr
	from, to time.Time
}

func newLedger(w *World) *Ledger {
	return &Ledger{w: w, sizes: map[string]int{}, letters: map[string]map[imap.UID]Letter{}, whole: map[string]*process{}, validity: map[string]uint32{}, uidNext: map[string]imap.UID{}, renewed: map[string]bool{}, shown: map[string][]time.Time{}}
}

// Mail is mail that a scenario is about to send.
type Mail struct {
	w     *World
	n     int
	at    string
	from  string
	pause time.Duration
	sizes []int  // of their bodies; of those behind it, and for 0, the world's
	probe bool   // the observer's own: not counted as people's mail
	name  string // what its messages are called, once To has begun
}

// Send prepares n messages, one after the other: w.Send(200).From("hq").To("plzen").
func (w *World) Send(n int) *Mail { return &Mail{w: w, n: n, from: "somebody@" + outsideDomain} }

// From says at which office they are handed in, on port 25.
func (m *Mail) From(office string) *Mail { m.at = office; return m }

// By lets the office's user send them, by submission.
func (m *Mail) By(office string) *Mail { m.at, m.from = office, office+"@"+Domain; return m }

// Every pauses between two messages.
func (m *Mail) Every(d time.Duration) *Mail { m.pause = d; return m }

// Sized says how long their bodies are, one after the other.
func (m *Mail) Sized(bytes ...int) *Mail { m.sizes = bytes; return m }

// To sends the messages to these, each an office (its user), "all", or an
// address outside, and returns how many were taken for all of them.
func (m *Mail) To(to ...string) int {
	var rcpts []string
	for _, r := range to {
		switch {
		case r == "all":
			r = everybody
		case !strings.Contains(r, "@"):
			r += "@" + Domain
		}
		rcpts = append(rcpts, r)
	}
	l := m.w.ledger
	l.mu.Lock()
	l.next++
	name := fmt.Sprintf("c%d", l.next)
	m.name = name
	l.mu.Unlock()
	port, user, password := 25, "", ""
	if m.from == m.at+"@"+Domain {
		port, user, password = 587, m.from, "secret"
	}
	var s *client
	defer func() {
		if s != nil {
			s.close()
		}
	}()
	taken := 0
	for i := range m.n {
		if i > 0 && m.pause > 0 {
			time.Sleep(m.pause)
		}
		if s == nil {
			var err error
			if s, err = m.w.smtp(m.at, port, user, password); err != nil {
				time.Sleep(time.Second)
				continue // a message that this client does not send now, it never sends
			}
		}
		subject := fmt.Sprintf("%s-%d", name, i)
		size := m.w.size
		if i < len(m.sizes) && m.sizes[i] > 0 {
			size = m.sizes[i]
		}
		entries := l.enter(m, subject, size, rcpts)
		answers, err := s.send(m.from, rcpts, sizedText(m.from, rcpts[0], subject, size))
		if err != nil {
			s.close()
			s = nil
			answers = nil
		}
		if l.answered(entries, answers) {
			taken++
		}
	}
	return taken
}

// size is how long the body of a message is.
func (l *Ledger) size(subject string) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	if n, ok := l.sizes[subject]; ok {
		return n
	}
	return l.w.size
}

func (l *Ledger) enter(m *Mail, subject string, size int, rcpts []string) (out []*attempt) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if size != l.w.size {
		l.sizes[subject] = size
	}
	for _, r := range rcpts {
		a := &attempt{subject: subject, client: m.name, from: m.from, to: r, at: m.at, probe: m.probe, when: time.Now()}
		l.attempts = append(l.attempts, a)
		out = append(out, a)
	}
	return out
}

func (l *Ledger) answered(entries []*attempt, answers []int) (all bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	all = len(answers) == len(entries)
	for i := range answers {
		entries[i].answer, entries[i].after = answers[i], time.Now()
		all = all && answers[i] == 250
	}
	return all
}

// trouble notes that an office's node may have forgotten what it was told then.
func (l *Ledger) trouble(o *Office, from, to time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.faults = append(l.faults, trouble{o.Addr, from, to})
}

// Look reads the INBOXes that can be read and checks what must hold always: no
// message is there twice, none that was seen is gone, no UID means another one.
func (l *Ledger) Look(offices ...*Office) {
	for _, o := range offices {
		if b, err := l.glance(o); err == nil {
			l.see(o, b)
		}
	}
}

// glance reads an INBOX: all of it from a process that has not shown it yet, of
// which a UID could mean another message, then only what is new.
func (l *Ledger) glance(o *Office) (*Box, error) {
	p := o.process()
	if p == nil {
		return nil, errNotUp
	}
	l.mu.Lock()
	var known map[imap.UID]Letter
	if l.whole[o.Name] == p {
		known = maps.Clone(l.letters[o.Name])
	}
	l.mu.Unlock()
	b, err := l.w.open(o.Name, false, known)
	if err != nil {
		return nil, err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.whole[o.Name] = p
	return b, nil
}

func (l *Ledger) see(o *Office, b *Box) {
	l.mu.Lock()
	defer l.mu.Unlock()
	bad := func(i Invariant, format string, args ...any) {
		l.w.violation(i, "%s's INBOX: "+format, append([]any{o.Name}, args...)...)
	}
	l.w.checked(UIDsStand, 1)
	l.w.checked(OneOutcome, 1)
	v, ok := l.validity[o.Name]
	switch {
	case ok && l.renewed[o.Name] && b.UIDValidity <= v: // RFC 9051 section 2.3.1.1
		bad(UIDsStand, "UIDVALIDITY was %d and is %d, though its UIDs were lost", v, b.UIDValidity)
	case ok && l.renewed[o.Name]:
		l.uidNext[o.Name] = 0
	case ok && v != b.UIDValidity:
		bad(UIDsStand, "UIDVALIDITY was %d and is %d", v, b.UIDValidity)
	}
	l.renewed[o.Name] = false
	l.validity[o.Name] = b.UIDValidity
	if l.letters[o.Name] == nil {
		l.letters[o.Name] = map[imap.UID]Letter{}
	}
	letters := l.letters[o.Name]
	if b.UIDNext < l.uidNext[o.Name] {
		bad(UIDsStand, "UIDNEXT was %d and is %d", l.uidNext[o.Name], b.UIDNext)
	}
	l.uidNext[o.Name] = b.UIDNext
	seen, there := map[string]imap.UID{}, map[imap.UID]bool{}
	last := imap.UID(0)
	for _, x := range b.Letters {
		if x.UID <= last || x.UID >= b.UIDNext {
			bad(UIDsStand, "UID %d after %d, UIDNEXT %d", x.UID, last, b.UIDNext)
		}
		last, there[x.UID] = x.UID, true
		if was, ok := letters[x.UID]; ok && was.Subject != x.Subject {
			bad(UIDsStand, "UID %d was %s and is %s", x.UID, was.Subject, x.Subject)
		}
		letters[x.UID] = Letter{UID: x.UID, Subject: x.Subject}
		if u, ok := seen[x.Subject]; ok && isTest(x.Subject) {
			bad(OneOutcome, "%s is there twice, UIDs %d and %d", x.Subject, u, x.UID)
		}
		seen[x.Subject] = x.UID
	}
	for uid, was := range letters {
		if !there[uid] {
			bad(OneOutcome, "%s (UID %d) was there and is gone", was.Subject, uid)
			delete(letters, uid)
		}
	}
}

// isTest reports whether a subject is one of our clients' (reports are not).
func isTest(subject string) bool {
	var c, i int
	n, err := fmt.Sscanf(subject, "c%d-%d", &c, &i)
	return n == 2 && err == nil
}

// officeOf is the office whose user has this address; nil outside.
func (w *World) officeOf(address string) *Office {
	for _, o := range w.Offices {
		if address == o.Name+"@"+Domain {
			return o
		}
	}
	return nil
}

// Check reads everything at quiet and checks that each accepted message had
// exactly one outcome, each refused one none, and that order was kept.
func (l *Ledger) Check() {
	w := l.w
	boxes := map[string]*Box{}
	for _, o := range w.Offices {
		if o.apart.Load() {
			continue
		}
		b, err := w.Open(o.Name, true)
		if err != nil {
			w.violation(OneOutcome, "%s's INBOX cannot be read: %v", o.Name, err)
			return
		}
		l.see(o, b)
		boxes[o.Name+"@"+Domain] = b
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	count, place := map[delivery]int{}, map[delivery]int{}
	reports := map[delivery]int{} // failures that the sender was told of
	for user, b := range boxes {
		for i, x := range b.Letters {
			if isTest(x.Subject) {
				count[delivery{x.Subject, user}]++
				place[delivery{x.Subject, user}] = i
				if !x.Whole {
					w.violation(OneOutcome, "%s in %s is not as it was sent: %q", x.Subject, user, x.Text[:min(len(x.Text), 2000)])
				}
				continue
			}
			if !strings.Contains(x.Text, "Action: failed") {
				continue
			}
			for _, a := range l.attempts {
				if a.from == user && strings.Contains(x.Text, "Subject: "+a.subject+"\r\n") && strings.Contains(x.Text, "rfc822;"+a.to) {
					reports[delivery{a.subject, a.to}]++
				}
			}
		}
	}
	expected := map[delivery][2]int{} // least and most copies
	for _, a := range l.attempts {
		want := [2]int{0, 0}
		switch {
		case a.answer == 250:
			want = [2]int{1, 1}
		case a.answer == 0:
			want = [2]int{0, 1}
		}
		to := []string{a.to}
		if a.to == everybody {
			to = w.founders
		}
		for _, r := range to {
			least := want[0]
			if l.excused(a, r) {
				least = 0
			}
			x := expected[delivery{a.subject, r}]
			expected[delivery{a.subject, r}] = [2]int{max(x[0], least), max(x[1], want[1])}
		}
	}
	var lost []string
	for d, want := range expected {
		if want[1] > 0 {
			w.checked(OneOutcome, 1)
		} else {
			w.checked(RefusedIsNowhere, 1)
		}
		if o := w.officeOf(d.to); o != nil && o.apart.Load() {
			continue // nobody looks into its mailboxes
		}
		if !strings.HasSuffix(d.to, "@"+Domain) {
			l.checkOutside(d, want, reports[d])
			continue
		}
		l.arrived += min(count[d], 1)
		if n := count[d]; n < want[0] {
			l.lost++
			lost = append(lost, fmt.Sprintf("%s to %s (%s)", d.subject, d.to, l.came(d.subject)))
		} else if n > 0 && want[1] == 0 {
			w.violation(RefusedIsNowhere, "%s to %s was refused and yet is there (%s)", d.subject, d.to, l.came(d.subject))
		} else if n > want[1] {
			w.violation(OneOutcome, "%s to %s: %d copies, %d allowed", d.subject, d.to, n, want[1])
		}
		if n := reports[d]; n > 0 {
			w.violation(OneOutcome, "%s to %s was reported failed %d times", d.subject, d.to, n)
		}
	}
	if len(lost) > 0 {
		slices.Sort(lost)
		w.violation(OneOutcome, "%d accepted messages are lost: %s", len(lost), strings.Join(lost[:min(len(lost), 10)], ", "))
	}
	for d := range count {
		if _, ok := expected[d]; !ok {
			w.violation(RefusedIsNowhere, "nobody sent %s to %s", d.subject, d.to)
		}
	}
	l.keepDeliveries(count, place)
	// Order: a client's messages to one recipient, as it had them accepted.
	last := map[[2]string]*attempt{}
	for _, a := range l.attempts {
		for user := range boxes {
			d := delivery{a.subject, user}
			if a.to != user && a.to != everybody || count[d] == 0 || a.answer != 250 {
				continue
			}
			k := [2]string{a.client, user}
			before := last[k]
			if before == nil {
				last[k] = a
				continue
			}
			w.checked(OrderIsKept, 1)
			if place[d] >= place[delivery{before.subject, user}] {
				last[k] = a
				continue
			}
			since := func(t time.Time) time.Duration { return t.Sub(w.began).Round(time.Millisecond) }
			w.violation(OrderIsKept, "%s (accepted by %s at %v) came to %s before %s (accepted at %v)", a.subject, a.at, since(a.after), user, before.subject, since(before.after))
		}
	}
}

// came says where and when a message was handed in. Called with l.mu held.
func (l *Ledger) came(subject string) string {
	for _, a := range l.attempts {
		if a.subject == subject {
			return fmt.Sprintf("answered with %d at %s, %v", a.answer, a.at, a.after.Sub(l.w.began).Round(time.Millisecond))
		}
	}
	return "by nobody"
}

// keepDeliveries writes down how long each message took that a reader saw come.
// Called with l.mu held.
func (l *Ledger) keepDeliveries(count, place map[delivery]int) {
	for _, a := range l.attempts {
		o := l.w.officeOf(a.to)
		d := delivery{a.subject, a.to}
		if o == nil || a.probe || a.answer != 250 || l.lostSince(o, a.when) || count[d] == 0 || place[d] >= len(l.shown[o.Name]) {
			continue
		}
		l.w.keeper.Seen(a.at, o.Name, a.after, l.shown[o.Name][place[d]])
	}
}

// checkOutside checks one recipient outside; want are the outcomes allowed.
func (l *Ledger) checkOutside(d delivery, want [2]int, reports int) {
	w := l.w
	took := w.Outside.takings(d)
	if strings.HasPrefix(d.to, "refuse") {
		if reports < want[0] || reports > want[1] {
			w.violation(OneOutcome, "%s to %s was refused outside and reported %d times", d.subject, d.to, reports)
		}
		return
	}
	if reports > 0 {
		w.violation(OneOutcome, "%s to %s was reported failed %d times, the outside took it %d times", d.subject, d.to, reports, len(took))
	}
	if len(took) < want[0] {
		l.lost++
		w.violation(OneOutcome, "%s to %s never left (%d times offered)", d.subject, d.to, w.Outside.tries[d])
	}
	if len(took) > 0 && want[1] == 0 {
		w.violation(RefusedIsNowhere, "%s to %s was refused and yet left (%s)", d.subject, d.to, l.came(d.subject))
	}
	for _, t := range took[:max(0, len(took)-1)] {
		if t.answered && !slices.ContainsFunc(l.faults, func(f trouble) bool {
			return f.at == t.from && !t.at.Before(f.from) && !t.at.After(f.to)
		}) {
			w.violation(OneOutcome, "%s to %s left again though the first time was answered", d.subject, d.to)
		}
	}
}

// Counts counts what was sent and what came of it, up to now.
func (l *Ledger) Counts() (m record.Mail) {
	l.mu.Lock()
	defer l.mu.Unlock()
	m.Arrived, m.Lost = l.arrived, l.lost
	for _, a := range l.attempts {
		if a.probe {
			continue
		}
		m.Sent++
		switch {
		case a.answer == 250:
			m.Taken++
			to := l.w.officeOf(a.to)
			switch {
			case to != nil && to.lost.Load() || l.excused(a, a.to):
				m.Excused++
			case to == nil && a.to != everybody:
				m.Outside++
			}
		case a.answer == 0:
			m.Unanswered++
		default:
			m.Refused++
		}
	}
	return m
}
