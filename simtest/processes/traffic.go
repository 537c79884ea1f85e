package processes

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"posthouse/appliance/demo"
)

// Friend is who gets the mail to the outside.
const Friend = "friend@example.net"

// Traffic is continuous mail from several senders, each with one message after
// the other and the recipients in turn; a sender that meets an error goes to the
// next office. What is answered with 250 counts, what nobody knows may be there.
//
// A subject says from which stream it is and the how manieth: order holds for
// what one sender gave to one office, for each recipient.
type Traffic struct {
	m    *Mesh
	tag  string
	mu   sync.Mutex
	sent map[string]map[string]bool // by recipient: ids; true when answered with 250

	acked, unsure, refused atomic.Int64
}

// NewTraffic returns traffic in which nothing was sent.
func (m *Mesh) NewTraffic() *Traffic {
	return &Traffic{m: m, tag: NewID()[:6], sent: map[string]map[string]bool{}}
}

// Source is who sends: a person, or the outside when the password is "".
type Source struct {
	Name    string // short, unlike any other's
	User    demo.User
	Offices []string // where it sends, the first preferred
	To      []string
	Pause   time.Duration // between two messages
}

func (t *Traffic) note(to, id string, acked bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.sent[to] == nil {
		t.sent[to] = map[string]bool{}
	}
	t.sent[to][id] = acked
}

// Run sends count messages of a source that are answered with 250, or until ctx
// ends.
func (t *Traffic) Run(ctx context.Context, s Source, count int) {
	at, seq := 0, 0
	var session *Sender
	defer func() {
		if session != nil {
			session.Close()
		}
	}()
	for k := 0; k < count && ctx.Err() == nil; {
		office := s.Offices[at%len(s.Offices)]
		err := error(nil)
		if session == nil {
			if s.User.Password == "" {
				session, err = t.m.FromOutside(s.User.Address, office)
			} else {
				session, err = t.m.Submit(s.User, office)
			}
		}
		if err == nil {
			to := s.To[k%len(s.To)]
			id := fmt.Sprintf("%s.%s.%s.%06d", t.tag, s.Name, office, seq)
			seq++
			switch err = session.Send(id, to); {
			case err == nil:
				t.note(to, id, true)
				t.acked.Add(1)
				k++
			case errors.Is(err, ErrUnsure):
				t.note(to, id, false)
				t.unsure.Add(1)
			default:
				t.refused.Add(1)
			}
		}
		pause := s.Pause
		if err != nil {
			if session != nil {
				session.Close()
				session = nil
			}
			at++
			pause = 50 * time.Millisecond
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
		}
	}
}

// Acked is how many messages were answered with 250.
func (t *Traffic) Acked() int { return int(t.acked.Load()) }

// String says what happened so far.
func (t *Traffic) String() string {
	return fmt.Sprintf("%d acknowledged, %d without an answer, %d refused for the time being", t.acked.Load(), t.unsure.Load(), t.refused.Load())
}

// Verdict is what a comparison of the mail that is there with what was sent found.
type Verdict struct {
	Missing, Doubled, Disorder, Foreign []string
}

// Compare looks at one recipient's mail, in the order of arrival.
func (t *Traffic) Compare(to string, there []string) (v Verdict) {
	t.mu.Lock()
	defer t.mu.Unlock()
	seen := map[string]int{}
	last := map[string]int{}
	for _, id := range there {
		if !strings.HasPrefix(id, t.tag+".") {
			continue
		}
		acked, known := t.sent[to][id]
		if !known {
			v.Foreign = append(v.Foreign, id)
			continue
		}
		if seen[id]++; seen[id] > 1 {
			v.Doubled = append(v.Doubled, id)
			continue
		}
		if !acked {
			continue
		}
		i := strings.LastIndexByte(id, '.')
		n, _ := strconv.Atoi(id[i+1:])
		if n < last[id[:i]] {
			v.Disorder = append(v.Disorder, fmt.Sprintf("%s after %06d", id, last[id[:i]]))
		}
		last[id[:i]] = max(last[id[:i]], n)
	}
	for id, acked := range t.sent[to] {
		if acked && seen[id] == 0 {
			v.Missing = append(v.Missing, id)
		}
	}
	return v
}

// Settle waits until everything has arrived, then checks it: nothing missing,
// nothing twice, in order. It returns how long it took. The outside may have a
// message as often as copies says beyond once: a node that dies between the
// foreign host's 250 and its own note of it cannot know (RFC 5321 section 6.1).
func (t *Traffic) Settle(limit time.Duration, copies int) time.Duration {
	t.m.tb.Helper()
	began := time.Now()
	users := t.m.State().Users
	for {
		late := t.check(users, copies)
		if late == "" {
			return time.Since(began)
		}
		if time.Since(began) > limit {
			t.m.tb.Fatalf("not all mail is there after %v: %s", limit, late)
		}
		<-time.After(50 * time.Millisecond)
	}
}

// check reports what is missing still; what is wrong for good fails the test.
func (t *Traffic) check(users []demo.User, copies int) (late string) {
	t.m.tb.Helper()
	for _, u := range users {
		t.mu.Lock()
		n := len(t.sent[u.Address])
		t.mu.Unlock()
		if n == 0 {
			continue
		}
		there, err := t.m.Inbox(u)
		if err != nil {
			return fmt.Sprintf("%s: %v", u.Address, err)
		}
		v := t.Compare(u.Address, there)
		if len(v.Doubled)+len(v.Disorder)+len(v.Foreign) > 0 {
			t.m.tb.Fatalf("%s: twice %v, out of order %v, never sent %v", u.Address, v.Doubled, v.Disorder, v.Foreign)
		}
		if len(v.Missing) > 0 {
			late = fmt.Sprintf("%s %s misses %d, such as %s", late, u.Address, len(v.Missing), v.Missing[0])
		}
	}
	v := t.Compare(Friend, t.m.OutsideMail())
	if len(v.Doubled) > copies || len(v.Foreign) > 0 {
		t.m.tb.Fatalf("the outside has twice %v, never sent %v", v.Doubled, v.Foreign)
	}
	if len(v.Missing) > 0 {
		late = fmt.Sprintf("%s the outside misses %d, such as %s", late, len(v.Missing), v.Missing[0])
	}
	return late
}
