package mailstore

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"

	"posthouse/mailstore/journal"
	"posthouse/mailstore/kv"
	"posthouse/mailstore/log"
	"posthouse/mailstore/mime"
	"posthouse/mesh"
	"posthouse/transport"
)

// Delivery is one message for one or more mailboxes of this node.
type Delivery struct {
	Envelope transport.Envelope
	// Rcpts are recipients with Mailbox set; each gets at most one copy for
	// each (Envelope.ID, Mailbox), however often it is delivered.
	Rcpts []transport.Recipient
	// Exactly one of the two is set: Source for a message that the log has
	// already (the queue's ACCEPT), Draft for one that comes with this record.
	Source log.Ref
	Draft  *log.Draft
	// Structure is the walk of that body; it is not changed.
	Structure *mime.Structure
	// LegSeq is the queue's leg that ends with this, or 0.
	LegSeq uint64
	// After are earlier deliveries that this one must not overtake: where a full
	// disk keeps one of them out of the log, this one is kept out as well.
	After []*Pending
	// Trace holds header fields of this hop (a Received field), CRLF line ends,
	// that stand above the message's own. May be empty.
	Trace []byte
}

// Deliver puts the message into each recipient's INBOX and returns one result
// a recipient once that is on disk and visible: Delivered (also when it was
// there already: a repeat), Deferred 4.2.2 over quota, Moved when the mailbox
// is not here. All copies come in one log record. Calls for one mailbox give
// UIDs in the order of the calls.
func (s *Store) Deliver(ctx context.Context, d *Delivery) ([]transport.Result, error) {
	p, err := s.StartDelivery(ctx, d)
	if err != nil {
		return nil, err
	}
	return p.Applied(ctx)
}

// Pending is a delivery whose place in the log is fixed and whose results are
// not to be told yet.
type Pending struct {
	s       *Store
	results []transport.Result
	ticket  *journal.Ticket // nil: nothing was written
	repeats []repeat        // of deliveries that are under way themselves
	in      []todo          // those that get a copy
	undo    sync.Once
}

type repeat struct {
	rcpt  int
	claim *claim
}

// StartDelivery is the first half of Deliver: it fixes the delivery's place in
// the log without waiting for the disk, so that a caller who starts deliveries
// one after the other keeps their order and shares one sync between many. It
// waits only while the log takes no more. With an error nothing was written and
// the draft is still the caller's.
func (s *Store) StartDelivery(ctx context.Context, d *Delivery) (*Pending, error) {
	body, err := s.bodyOf(d)
	if err != nil {
		return nil, err
	}
	structure, err := d.Structure.MarshalBinary()
	if err != nil {
		return nil, fmt.Errorf("structure of message %s: %w", d.Envelope.ID, err)
	}
	rec := deliverRecord{
		Version: recordVersion, ID: d.Envelope.ID, LegSeq: d.LegSeq,
		Prefix: append(returnPath(d.Envelope.From), d.Trace...), Time: s.opt.Now().Unix(),
		Structure: structure, Trace: countReceived(d.Trace),
	}
	if d.Draft == nil {
		rec.Source = &d.Source
	}
	switch root := d.Structure.Root; {
	case root == nil:
		rec.Size = compose(body, rec.Prefix, nil).Size()
	case d.Structure.Clean: // nothing to cut, and the walk has the size: the body is not touched
		rec.Size = int64(len(rec.Prefix)) + root.End
	default:
		h, err := readHeader(body, root.Body)
		if err != nil {
			return nil, fmt.Errorf("read header of message %s: %w", d.Envelope.ID, err)
		}
		rec.Cuts = foreignReturnPaths(h, int64(len(h)) == root.Body)
		rec.Size = compose(body, rec.Prefix, rec.Cuts).Size()
	}
	admit := int64(len(rec.Structure)) + 512
	if d.Draft != nil {
		admit += d.Draft.Size()
	}
	if err := s.j.Admit(ctx, admit); err != nil {
		return nil, err
	}

	p := &Pending{s: s, results: make([]transport.Result, len(d.Rcpts))}
	todo, err := s.claimAll(d, p)
	if err != nil {
		return nil, err
	}
	s.reserve(d, &rec, todo, p)
	for _, r := range p.repeats {
		<-r.claim.decided // by its owner, who waits for nobody in between
		if r.claim.ticket == nil && !r.claim.before {
			p.results[r.rcpt] = resultAgain
		}
	}
	return p, nil
}

// tickets are the records that p stands on.
func (p *Pending) tickets() (ts []*log.Ticket) {
	if p.ticket != nil {
		ts = append(ts, p.ticket.Log())
	}
	for _, r := range p.repeats {
		if r.claim.ticket != nil {
			ts = append(ts, r.claim.ticket.Log())
		}
	}
	return ts
}

func (s *Store) bodyOf(d *Delivery) (transport.Body, error) {
	switch {
	case d.Envelope.ID.IsZero():
		return nil, errors.New("delivery without a message id")
	case d.Structure == nil:
		return nil, errors.New("delivery without a structure")
	case len(d.Trace) > 0 && (!bytes.HasSuffix(d.Trace, []byte("\r\n")) || bytes.Contains(d.Trace, []byte("\r\n\r\n"))):
		return nil, errors.New("delivery with trace fields that do not end as a line")
	case d.Draft != nil && d.Source.IsZero():
		return d.Draft, nil
	case d.Draft == nil && !d.Source.IsZero():
		return s.j.Body(d.Source), nil
	}
	return nil, errors.New("delivery wants one of draft and source")
}

func countReceived(trace []byte) (n int) {
	for line := range bytes.Lines(trace) {
		if name, _, ok := bytes.Cut(line, []byte(":")); ok && bytes.EqualFold(name, []byte("Received")) {
			n++
		}
	}
	return n
}

// todo is a recipient that may get a copy.
type todo struct {
	rcpt  int
	mb    *Mailbox
	claim *claim
	quota int64
	act   *act
}

// claimAll decides for each recipient whether the mailbox is here and whether
// this message was in it before, and claims the others, ordered by mailbox.
func (s *Store) claimAll(d *Delivery, p *Pending) (list []todo, err error) {
	abandon := func() {
		for _, t := range list {
			s.claims.abandon(t.claim)
		}
	}
	mine := make(map[*Mailbox]*claim, len(d.Rcpts))
	for i := range d.Rcpts {
		id := d.Rcpts[i].Mailbox
		mb, err := s.resident(id)
		if err != nil {
			abandon()
			return nil, err
		}
		if id.IsZero() || !mb.isThere() {
			p.results[i] = s.moved(id)
			continue
		}
		p.results[i] = resultDelivered
		if c := mine[mb]; c != nil { // named twice
			p.repeats = append(p.repeats, repeat{i, c})
			continue
		}
		c, first := s.claims.claim(claimKey{d.Envelope.ID, id})
		if !first {
			p.repeats = append(p.repeats, repeat{i, c})
			continue
		}
		before, err := s.wasDelivered(c.key)
		if err != nil {
			s.claims.abandon(c)
			abandon()
			return nil, err
		}
		if before { // also where it has moved since: the answer was lost
			s.claims.drop(c)
			continue
		}
		if s.elsewhere(id) {
			s.claims.abandon(c)
			p.results[i] = s.moved(id)
			continue
		}
		mine[mb] = c
		list = append(list, todo{rcpt: i, mb: mb, claim: c, quota: mb.quota()})
	}
	slices.SortFunc(list, func(a, b todo) int { return bytes.Compare(a.mb.id[:], b.mb.id[:]) })
	return list, nil
}

var (
	resultDelivered = transport.Result{Outcome: transport.Delivered, Code: 250, Enhanced: "2.1.5", Text: "Delivered"}
	resultFull      = transport.Result{Outcome: transport.Deferred, Code: 452, Enhanced: "4.2.2", Text: "Mailbox full"}
	resultMany      = transport.Result{Outcome: transport.Deferred, Code: 452, Enhanced: "4.5.3", Text: "Too many recipients at once"}
	resultAgain     = transport.Result{Outcome: transport.Deferred, Code: 451, Enhanced: "4.3.0", Text: "Another delivery of this message failed, try again"}
)

// elsewhere reports whether this node knows another home of a mailbox, or that
// it has none: its user was deleted. Who sent it then looks again (MAIL.md,
// Recipients), and reports what nobody takes.
func (s *Store) elsewhere(id mesh.MailboxID) bool {
	if s.opt.Home == nil || !homeOnly {
		return false
	}
	home, _ := s.opt.Home(id)
	return home != s.opt.Self
}

func (s *Store) moved(id mesh.MailboxID) transport.Result {
	r := transport.Result{Outcome: transport.Moved, Code: 451, Enhanced: "4.4.0", Text: "Mailbox is not homed here"}
	if s.opt.Home != nil {
		r.Home, r.Version = s.opt.Home(id)
	}
	return r
}

// reserve gives each mailbox its copy and writes the record. The locks of all
// mailboxes are held together, in the order of their ids, so that the order of
// UIDs is that of the log in each of them.
func (s *Store) reserve(d *Delivery, rec *deliverRecord, list []todo, p *Pending) {
	for _, t := range list {
		t.mb.mu.Lock()
	}
	var entries []log.Entry
	for _, t := range list {
		f := t.mb.folders[inboxID]
		switch {
		case len(p.in) >= copiesARecord && d.Draft != nil:
			p.results[t.rcpt] = resultMany
		case !t.mb.room(rec.Size, t.quota):
			p.results[t.rcpt] = resultFull
			if t.mb.isBrimful(t.quota) && s.brim.add(t.mb.id) {
				s.opt.Fuller()
			}
		default:
			uid, err := f.reserveUIDs(1)
			if err != nil {
				p.results[t.rcpt] = resultFull
				break
			}
			rec.Copies = append(rec.Copies, placed{Mailbox: t.mb.id, Folder: inboxID, UID: uid, ModSeq: f.reserveMod()})
			p.in = append(p.in, t)
			continue
		}
		s.claims.abandon(t.claim)
	}
	all := rec.Copies
	for part := range slices.Chunk(all, copiesARecord) {
		rec.Copies = part
		entries = append(entries, log.Entry{Kind: log.KindDeliver, Meta: encode(rec), Body: d.Draft})
	}
	if len(entries) > 0 {
		for _, a := range d.After {
			entries[0].After = append(entries[0].After, a.tickets()...)
		}
		write := s.j.Append
		if d.Draft == nil {
			write = s.j.AppendBehind // it was answered for when it was accepted
		}
		p.ticket = write(entries...)
		for i := range p.in {
			t := &p.in[i]
			t.act = &act{reserved: rec.Size, folders: [2]*Folder{t.mb.folders[inboxID]}}
			t.mb.began(p.ticket.First()+uint64(i/copiesARecord), t.act)
			s.claims.reserved(t.claim, p.ticket)
		}
	}
	for _, t := range list {
		t.mb.mu.Unlock()
	}
	if len(entries) == 0 && d.Draft != nil {
		d.Draft.Discard()
	}
}

// withdraw takes the reservations back of a delivery that is in no log: the
// disk was full. The UIDs are never used.
func (p *Pending) withdraw() {
	for i, t := range p.in {
		t.mb.mu.Lock()
		t.mb.forgetAct(p.ticket.First()+uint64(i/copiesARecord), t.act)
		t.mb.mu.Unlock()
		p.s.claims.withdraw(t.claim)
	}
}

// Deferred returns the places in Rcpts of those that are known to be deferred
// from the start, growing.
func (p *Pending) Deferred() (at []int) {
	for i := range p.results {
		if p.results[i].Outcome == transport.Deferred {
			at = append(at, i)
		}
	}
	return at
}

// Known returns the results as far as they are known from the start: what is
// Delivered in them is not to be told before Synced, the others are final.
func (p *Pending) Known() []transport.Result { return slices.Clone(p.results) }

// Synced waits until the delivery is on disk: the results may be told from then
// on, as a relay does. The messages may be visible a moment later.
func (p *Pending) Synced(ctx context.Context) ([]transport.Result, error) {
	return p.wait(ctx, (*journal.Ticket).Synced)
}

// Applied waits until the delivery is on disk and visible.
func (p *Pending) Applied(ctx context.Context) ([]transport.Result, error) {
	return p.wait(ctx, (*journal.Ticket).Applied)
}

func (p *Pending) wait(ctx context.Context, how func(*journal.Ticket, context.Context) error) ([]transport.Result, error) {
	if p.ticket != nil {
		if err := how(p.ticket, ctx); err != nil {
			p.undo.Do(func() { p.s.unless(ctx, p.ticket, p.withdraw) })
			return nil, err
		}
	}
	results := slices.Clone(p.results)
	for _, r := range p.repeats {
		if r.claim.ticket != nil {
			if err := how(r.claim.ticket, ctx); err != nil {
				return nil, err
			}
		}
	}
	return results, nil
}

// Delivered reports whether that message is or was in that mailbox.
func (s *Store) Delivered(id transport.MessageID, m mesh.MailboxID) (bool, error) {
	k := claimKey{id, m}
	if s.claims.has(k) {
		return true, nil
	}
	_, ok, err := s.j.View().Get(dedupeKey(k))
	return ok, err
}

func (s *Store) wasDelivered(k claimKey) (bool, error) {
	if !dedupe {
		return false, nil
	}
	_, ok, err := s.j.View().Get(dedupeKey(k))
	return ok, err
}

// claims are the deliveries between the look for an earlier one and the row
// that tells of them, so that two at once never both write.
type claims struct {
	mu      sync.Mutex
	under   map[claimKey]*claim
	applied []claimKey // by the last record: the view may lack the rows
}

type claim struct {
	key     claimKey
	decided chan struct{} // closed once ticket or before are set, or neither
	ticket  *journal.Ticket
	before  bool // it was delivered long ago
}

// claim returns the claim of k and whether it is the caller's own, who then must
// call one of reserved, drop and abandon.
func (c *claims) claim(k claimKey) (cl *claim, mine bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if cl := c.under[k]; cl != nil && dedupe {
		return cl, false
	}
	cl = &claim{key: k, decided: make(chan struct{})}
	c.under[k] = cl
	return cl, true
}

// has reports whether a claim has its place in the log.
func (c *claims) has(k claimKey) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	cl := c.under[k]
	return cl != nil && cl.ticket != nil
}

func (c *claims) reserved(cl *claim, t *journal.Ticket) {
	c.mu.Lock()
	cl.ticket = t
	c.mu.Unlock()
	close(cl.decided)
}

// drop ends a claim on what was delivered before.
func (c *claims) drop(cl *claim) { cl.before = true; c.abandon(cl) }

func (c *claims) abandon(cl *claim) { c.withdraw(cl); close(cl.decided) }

// withdraw forgets a claim: the next delivery of its key is the first again.
func (c *claims) withdraw(cl *claim) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.under[cl.key] == cl {
		delete(c.under, cl.key)
	}
}

// settle forgets the claims of the record before: the view has their rows.
func (c *claims) settle() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, k := range c.applied {
		delete(c.under, k)
	}
	c.applied = c.applied[:0]
}

func (c *claims) apply(k claimKey) { c.mu.Lock(); c.applied = append(c.applied, k); c.mu.Unlock() }

const secondsADay = 24 * 60 * 60

func (s *Store) applyDeliver(rec log.Record, r *deliverRecord, b *batch) error {
	day := uint32(max(r.Time, 0) / secondsADay)
	for _, c := range r.Copies {
		err := s.with(c.Mailbox, b, func(mb *Mailbox, _ *result) error {
			f := mb.folders[c.Folder]
			if f == nil {
				return nil
			}
			m := msg{uid: c.UID, mod: c.ModSeq, created: c.ModSeq, size: r.Size, received: r.Time}
			m.setRef(rec.Ref)
			if r.Source != nil {
				m.source = r.Source.Seq
			}
			f.add(&m, b)
			return nil
		})
		if err != nil {
			return err
		}
		k := claimKey{r.ID, c.Mailbox}
		s.claims.apply(k)
		b.Put(dedupeKey(k), []byte{rowVersion})
		b.Put(dayKey(day, k), []byte{rowVersion})
	}
	s.forgotten = min(s.forgotten, day) // a clock may go back
	return s.purge(s.j.View(), day, b)
}

// purge removes some of the rows that remember deliveries of more than keptDays
// before the day of the record that is being applied: by the records' time, so
// that a replay removes the same ones. A clock that jumps far ahead makes every
// day look old, so those of the last laterDays days that had any always stay.
func (s *Store) purge(v *kv.View, day uint32, b *batch) error {
	if day < keptDays || s.forgotten >= day-keptDays || s.heldBack == day {
		return nil
	}
	oldest, found, err := nextDay(v, 0)
	if err != nil {
		return err
	}
	if !found || oldest >= day-keptDays {
		s.forgotten = day - keptDays
		return nil
	}
	for later, n := oldest, 0; s.overdue != oldest && n < laterDays; n++ {
		if later, found, err = nextDay(v, later+1); err != nil {
			return err
		}
		if !found {
			s.heldBack = day
			return nil
		}
	}
	s.overdue = oldest
	n := 0
	var bad error
	err = v.Scan(dayPrefix, nil, func(k, _ []byte) bool {
		d, key, err := parseDayKey(k)
		if bad = err; err != nil || d != oldest {
			return false
		}
		b.Delete(slices.Clone(k))
		b.Delete(dedupeKey(key))
		n++
		return n < purgeARecord
	})
	return errors.Join(err, bad)
}

// nextDay returns the first day at or after from that deliveries are
// remembered of.
func nextDay(v *kv.View, from uint32) (day uint32, found bool, err error) {
	var bad error
	err = v.Scan(dayPrefix, dayKey(from, claimKey{})[:6], func(k, _ []byte) bool {
		day, _, bad = parseDayKey(k)
		found = bad == nil
		return false
	})
	return day, found, errors.Join(err, bad)
}
