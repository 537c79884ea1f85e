package deciders

import (
	"bytes"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"

	"posthouse/mailstore"
	"posthouse/mailstore/kv"
	"posthouse/mailstore/log"
	"posthouse/mesh"
	"posthouse/transport"
	"posthouse/transport/queue"
	"posthouse/transport/route"
)

// observer is outside of all nodes. It knows what clients sent and were told,
// what the exchangers of others were offered, and reads the mailboxes.
type observer struct {
	w    *world
	busy map[client]bool

	msgs map[transport.MessageID]*sent
	nums map[int]*sent // by number
	turn map[client]int

	accepted map[copyOf]int                     // by outside hosts
	given    map[copyOf]bool                    // refused for good
	again    map[copyOf]bool                    // may be sent outside, or reported, a second time
	retold   map[copyOf]bool                    // recipients of which a node that was rolled back tells again
	strayed  map[copyOf]bool                    // released, and nobody will hear of it: an old image
	excused  map[string]bool                    // messages and recipients, or mailboxes: what a disk has lost
	floor    map[place]uint32                   // UIDVALIDITY before a rollback
	due      map[place]map[mailstore.UID]string // what must stand there after it
	lost     map[copyOf]int                     // answers that did not arrive, or were forgotten

	moved   map[int]bool                       // users whose home has changed
	gone    map[int]bool                       // users who were deleted
	seen    map[place]map[mailstore.UID]string // what stood under a UID
	was     map[place]mailstore.Status
	mods    map[place]map[mailstore.UID]mailstore.ModSeq
	going   map[place]map[mailstore.UID]bool // expunges that were asked for; true: and answered
	reports map[string]int                   // kind, number, recipient
	papers  map[string]string                // and the report's id
	written map[string]letter                // reports that nodes have made, by their id
}

// client is a sender at a node: it sends one message after the other.
type client struct{ from, node int }

type sent struct {
	num    int
	text   string
	load   *Load // nil: no 250 was read
	client client
	turn   int  // among the client's messages that were taken
	no     bool // refused
	boxes  map[mesh.MailboxID]bool
}

// place is a mailbox at a node.
type place struct {
	node int
	box  mesh.MailboxID
}

func newObserver(w *world) *observer {
	return &observer{w: w, busy: map[client]bool{}, msgs: map[transport.MessageID]*sent{}, nums: map[int]*sent{}, turn: map[client]int{},
		accepted: map[copyOf]int{}, given: map[copyOf]bool{}, lost: map[copyOf]int{}, again: map[copyOf]bool{}, retold: map[copyOf]bool{}, strayed: map[copyOf]bool{}, excused: map[string]bool{}, floor: map[place]uint32{}, due: map[place]map[mailstore.UID]string{}, moved: map[int]bool{}, gone: map[int]bool{},
		seen: map[place]map[mailstore.UID]string{}, was: map[place]mailstore.Status{}, mods: map[place]map[mailstore.UID]mailstore.ModSeq{}, going: map[place]map[mailstore.UID]bool{}, reports: map[string]int{}, papers: map[string]string{}, written: map[string]letter{}}
}

func (o *observer) name(id transport.MessageID) string {
	if s := o.msgs[id]; s != nil {
		return fmt.Sprintf("m%d", s.num)
	}
	return "report-" + id.String()[:6]
}

func (o *observer) label(k copyOf) string { return o.name(k.id) + " to " + k.key }

func (o *observer) made(id transport.MessageID, num int, text string, d route.Decision) {
	s := &sent{num: num, text: text, boxes: map[mesh.MailboxID]bool{}}
	for _, l := range d.Legs {
		for _, r := range l.Rcpts {
			s.boxes[r.Mailbox] = true
		}
	}
	o.msgs[id], o.nums[num] = s, s
}

func (o *observer) refused(id transport.MessageID) {
	if s := o.msgs[id]; s != nil {
		s.no = true
	}
}

// taken notes that the client has read its 250.
func (o *observer) taken(num int, l *Load, c client, id transport.MessageID) {
	s := o.msgs[id]
	o.turn[c]++
	s.load, s.client, s.turn = l, c, o.turn[c]
	o.w.res.Taken++
	o.w.note("client reads 250 for m%d of %d at n%d", num, c.from, c.node)
}

// offered notes what an outside host said to a recipient.
func (o *observer) offered(n *node, k copyOf, r *transport.Result, env *transport.Envelope) {
	s := o.msgs[k.id]
	switch {
	case s == nil && env.Origin == transport.OriginLocal:
		o.w.violation("I16: a report left for %s", k.key)
		return
	case s == nil:
		o.w.violation("I2: nobody sent what was offered for %s", k.key)
		return
	case s.no:
		o.w.violation("refused message m%d was offered to %s", s.num, k.key)
	case o.given[k] && o.lost[k] == 0:
		o.w.violation("I16: %s was offered again after a refusal for good", o.label(k))
	case o.accepted[k] > 0 && o.lost[k] < o.accepted[k]:
		o.w.violation("I1: %s was sent again though the answer had arrived", o.label(k))
	}
	if from := o.w.byID(env.EntryNode); from != n && from.up {
		if st, err := from.q.Ask(n.id, k.id, []string{k.key}); err == nil && st[0] == transport.Undecided && !o.again[k] {
			o.w.violation("custody: %s offered %s before %s had released it", n.name, o.label(k), from.name)
		}
	}
	switch r.Outcome {
	case transport.Relayed:
		o.accepted[k]++
	case transport.Failed:
		o.given[k] = true
	}
}

// forgot notes answers that a node heard and lost with its power.
func (o *observer) forgot(ks []copyOf) {
	for _, k := range ks {
		o.lost[k]++
	}
}

// moves notes that a user gets another home.
func (o *observer) moves(user int) { o.moved[user] = true }

// tap is an engine beside the others: it sees each record that is applied.
type tap struct{ n *node }

// Apply implements journal.Engine: I5, only the home takes mail for a mailbox.
func (t tap) Apply(rec log.Record, _ *kv.Batch, live bool) error {
	d, err := mailstore.DecodeDelivered(rec.Meta)
	if err != nil || !live {
		return err
	}
	w := t.n.w
	for _, box := range d.Mailboxes {
		if k := (copyOf{d.ID, box.String()}); t.n.astray[k] {
			w.violation("I5: %s took %s although it knew that nobody lives there", t.n.name, w.obs.label(k))
		}
	}
	return nil
}

// Live implements journal.Keeper: a tap needs nothing.
func (tap) Live(func(seq uint64, size int64)) error { return nil }

// Lasting implements journal.Keeper.
func (tap) Lasting(log.Kind) bool { return false }

// look reads the mailboxes of all nodes that are up: I4, and never two copies.
func (o *observer) look() {
	for _, n := range o.w.nodes {
		if !n.runs() {
			continue
		}
		for u := range o.w.people {
			o.read(n, u)
		}
	}
}

// read reads what is new in a mailbox and compares the rest with what it was.
func (o *observer) read(n *node, user int) {
	box := mailboxOf(user)
	if !n.store.Has(box) {
		return
	}
	p := place{n.i, box}
	f, st, list, ok := o.inbox(n, user)
	if !ok {
		return
	}
	o.renewedBox(n, user, st)
	o.changes(n, user, st, list)
	switch was, known := o.was[p]; {
	case st.UIDNext < was.UIDNext:
		o.w.violation("I4: UIDNEXT of u%d at %s fell from %d to %d", user, n.name, was.UIDNext, st.UIDNext)
	case st.HighestModSeq < was.HighestModSeq:
		o.w.violation("I4: HIGHESTMODSEQ of u%d at %s fell from %d to %d", user, n.name, was.HighestModSeq, st.HighestModSeq)
	case known && st.UIDValidity != was.UIDValidity:
		o.w.violation("I4: UIDVALIDITY of u%d at %s was %d and is %d", user, n.name, was.UIDValidity, st.UIDValidity)
	}
	o.was[p] = st
	known := o.seen[p]
	if known == nil {
		known = map[mailstore.UID]string{}
		o.seen[p] = known
	}
	there, missing := 0, 0
	for i, m := range list {
		if i > 0 && m.UID <= list[i-1].UID || m.UID >= st.UIDNext {
			o.w.violation("I4: u%d at %s has a UID %d after %d, UIDNEXT is %d", user, n.name, m.UID, list[max(i, 1)-1].UID, st.UIDNext)
			return
		}
		if o.going[p][m.UID] {
			o.w.violation("I4: expunged UID %d of u%d at %s is there again", m.UID, user, n.name)
			return
		}
		if _, ok := known[m.UID]; ok {
			there++
			continue
		}
		what, ok := o.identify(n, f, m.UID, user)
		if !ok {
			return
		}
		for uid, other := range known {
			if other == what {
				o.w.violation("I1: %s stands twice in the mailbox of u%d at %s: UIDs %d and %d", what, user, n.name, uid, m.UID)
				return
			}
		}
		known[m.UID] = what
		there++
		o.w.hash.string(what)
		o.w.hash.uint(uint64(m.UID))
	}
	o.dueThere(n, user)
	for uid := range o.going[p] {
		if !slices.ContainsFunc(list, func(m mailstore.Info) bool { return m.UID == uid }) {
			missing++
			o.going[p][uid] = true // gone for good, answered or not
		}
	}
	if there+missing != len(known) {
		o.w.violation("I1: %d messages of u%d at %s are gone", len(known)-there-missing, user, n.name)
	}
}

// inbox lists the INBOX of a user at a node.
func (o *observer) inbox(n *node, user int) (f *mailstore.Folder, st mailstore.Status, list []mailstore.Info, ok bool) {
	mb, err := n.store.Mailbox(mailboxOf(user))
	if err == nil {
		f, err = mb.Folder("INBOX")
	}
	if err == nil {
		st, list, err = f.List()
	}
	if err != nil {
		o.w.violation("%s: INBOX of u%d: %v", n.name, user, err)
	}
	return f, st, list, err == nil
}

// changes checks modification sequences: of a message they never fall, and what
// is new or has changed since the last look is above all that was then.
func (o *observer) changes(n *node, user int, st mailstore.Status, list []mailstore.Info) {
	p := place{n.i, mailboxOf(user)}
	before, now := o.mods[p], make(map[mailstore.UID]mailstore.ModSeq, len(list))
	o.mods[p] = now
	for _, m := range list {
		now[m.UID] = m.ModSeq
		switch was, known := before[m.UID]; {
		case m.ModSeq > st.HighestModSeq:
			o.w.violation("I4: UID %d of u%d at %s has MODSEQ %d, HIGHESTMODSEQ is %d", m.UID, user, n.name, m.ModSeq, st.HighestModSeq)
		case known && m.ModSeq < was:
			o.w.violation("I4: MODSEQ of UID %d of u%d at %s fell from %d to %d", m.UID, user, n.name, was, m.ModSeq)
		case (!known || m.ModSeq != was) && m.ModSeq <= o.was[p].HighestModSeq:
			o.w.violation("I4: UID %d of u%d at %s is new or changed, with MODSEQ %d; at the last look %d was the highest", m.UID, user, n.name, m.ModSeq, o.was[p].HighestModSeq)
		}
	}
}

// expunge is a reader who removes the older half of what is known.
func (o *observer) expunge(n *node, user int) {
	o.read(n, user)
	p := place{n.i, mailboxOf(user)}
	mb, err := n.store.Mailbox(p.box)
	if err != nil || len(o.w.wrong) > 0 {
		return
	}
	f, err := mb.Folder("INBOX")
	if err != nil {
		return
	}
	uids := slices.DeleteFunc(sorted(o.seen[p]), func(u mailstore.UID) bool { _, gone := o.going[p][u]; return gone })
	uids = uids[:len(uids)/2]
	if len(uids) == 0 {
		return
	}
	if o.going[p] == nil {
		o.going[p] = map[mailstore.UID]bool{}
	}
	for _, u := range uids {
		o.going[p][u] = false
	}
	if _, _, err := f.SetFlags(o.w.ctx, uids, mailstore.FlagsAdd, []mailstore.Flag{mailstore.Deleted}, 0); err != nil {
		return
	}
	gone, err := f.Expunge(o.w.ctx, uids)
	o.w.note("u%d expunges %d of %d at %s: %v", user, len(gone), len(uids), n.name, err)
	if err == nil {
		for _, u := range gone {
			o.going[p][u] = true
		}
	}
}

// identify says what a message is: "m7", or "failed m7 r1@h2.example" for a
// report. The text must be what was sent, with nothing but headers above it.
func (o *observer) identify(n *node, f *mailstore.Folder, uid mailstore.UID, user int) (string, bool) {
	m, err := f.Message(uid)
	if err != nil {
		o.w.violation("%s: message %d of u%d: %v", n.name, uid, user, err)
		return "", false
	}
	text, err := read(m.Body)
	if err != nil {
		o.w.violation("%s: message %d of u%d: %v", n.name, uid, user, err)
		return "", false
	}
	num, ok := field(text, "X-Number: ")
	i, err := strconv.Atoi(num)
	s := o.nums[i]
	if !ok || err != nil || s == nil {
		o.w.violation("I2: nobody sent what stands in the mailbox of u%d at %s:\n%s", user, n.name, text)
		return "", false
	}
	if !bytes.Contains(text, []byte("multipart/report")) {
		if !bytes.HasSuffix(text, []byte(s.text)) {
			o.w.violation("I1: m%d is not what was sent:\n%s", i, text)
			return "", false
		}
		if s.no {
			o.w.violation("refused message m%d was delivered to u%d", i, user)
		}
		return fmt.Sprintf("m%d", i), true
	}
	return o.report(n, s, text, user)
}

// report checks a delivery report: it goes to the sender, who is somebody of
// ours, and there is one of each kind for each recipient.
func (o *observer) report(n *node, s *sent, text []byte, user int) (string, bool) {
	from, _ := field(text[max(0, bytes.Index(text, []byte("X-Number: "))-200):], "From: <")
	l := readLetter(text)
	what := fmt.Sprintf("%s m%d", l.kind, s.num)
	if from = strings.TrimSuffix(from, ">"); from != address(user) {
		o.w.violation("I16: u%d got a report about mail of <%s>: %s", user, from, what)
		return what, false
	}
	for _, r := range l.rcpts {
		what += " " + r
		key := fmt.Sprintf("%s m%d %s", l.kind, s.num, r)
		if o.papers[key] == l.id && (o.moved[user] || n.renewals > 0) {
			continue // the same one, at a former home or from an image
		}
		o.papers[key] = l.id
		if o.reports[key]++; o.reports[key] > 1 && !o.isTwice(s, r) {
			o.w.violation("I16: %s was reported twice", key)
			return what, false
		}
		if l.kind == "failed" {
			o.w.res.Reports++
		}
	}
	o.w.note("u%d finds at %s: %s", user, n.name, what)
	return what, true
}

// letter is what a report says.
type letter struct {
	id    string // of the report
	kind  string // "failed", …
	num   string // of the message that it is about
	rcpts []string
}

func readLetter(text []byte) (l letter) {
	l.id, _ = field(text, "Message-ID: <")
	l.id, _, _ = strings.Cut(l.id, "@")
	l.kind, _ = field(text, "Action: ")
	l.num, _ = field(text, "X-Number: ")
	for line := range bytes.Lines(text) {
		if r, ok := bytes.CutPrefix(line, []byte("Final-Recipient:")); ok {
			l.rcpts = append(l.rcpts, string(bytes.TrimSpace(r[bytes.IndexByte(r, ';')+1:])))
		}
	}
	return l
}

// wrote notes a report that a node has made.
func (o *observer) wrote(r io.ReaderAt, size int64) {
	text := make([]byte, size)
	if n, err := r.ReadAt(text, 0); int64(n) < size {
		o.w.violation("a report that was made cannot be read: %v", err)
		return
	}
	l := readLetter(text)
	o.written[l.id] = l
}

// field returns what follows the first line that begins so.
func field(text []byte, name string) (string, bool) {
	for line := range bytes.Lines(text) {
		if v, ok := bytes.CutPrefix(line, []byte(name)); ok {
			return string(bytes.TrimSpace(v)), true
		}
	}
	return "", false
}

// final checks each message at quiet: one outcome for each recipient.
func (o *observer) final() {
	if len(o.w.wrong) > 0 {
		return
	}
	o.look()
	held, stuck := o.held(), o.stuck()
	at := map[string][]place{} // "m7 mailbox" -> where
	for _, p := range o.places() {
		for _, what := range o.seen[p] {
			k := what + " " + p.box.String()
			at[k] = append(at[k], p)
		}
	}
	for _, num := range sorted(o.nums) {
		if s := o.nums[num]; s.load != nil {
			o.outcome(s, at, held, stuck)
		}
	}
	o.ordered()
	o.equal()
}

func (o *observer) places() []place {
	ps := make([]place, 0, len(o.seen))
	for p := range o.seen {
		ps = append(ps, p)
	}
	slices.SortFunc(ps, func(a, b place) int {
		if a.node != b.node {
			return a.node - b.node
		}
		return bytes.Compare(a.box[:], b.box[:])
	})
	return ps
}

// outcome is I1 for one message.
func (o *observer) outcome(s *sent, at map[string][]place, held map[string]int, stuck map[string]bool) {
	l := s.load
	users := slices.Clone(l.Users)
	if l.Group {
		for u := range 3 {
			if s.boxes[mailboxOf(u)] || !o.gone[u] { // who is deleted is no member
				users = append(users, u)
			}
		}
	}
	slices.Sort(users)
	quiet := l.From < 0 || l.Notify == transport.NotifyNever // nobody hears of a failure
	unheard := o.w.plan.Short && quiet                       // it may have been given up
	for _, u := range slices.Compact(users) {
		copies := len(at[fmt.Sprintf("m%d %s", s.num, mailboxOf(u))])
		bounced := o.reports[fmt.Sprintf("failed m%d %s", s.num, address(u))]
		aside := held[fmt.Sprintf("m%d %s", s.num, address(u))]
		k := copyOf{o.idOf(s), mailboxOf(u).String()}
		name := fmt.Sprintf("m%d ", s.num)
		excused := o.excused[name+address(u)] || o.excused[name+mailboxOf(u).String()]
		switch total := copies + bounced + aside; {
		case total == 1, total == 0 && excused:
		case copies <= 1 && total > 1 && o.again[k]:
			// Its outcome was forgotten, and came a second time.
		case total == 0 && (unheard || o.gone[u] && quiet || stuck[fmt.Sprintf("m%d %s", s.num, address(u))]):
		case total > 1 && o.moved[u] && total <= 1+o.lost[k]:
			// A copy at a former home whose answer was lost: until mailboxes
			// move with what they remember.
		case copies == 1 && bounced == 1 && aside == 0 && o.gone[u] && o.lost[k] > 0:
			// Its answer was lost, and by the next try nobody lived there.
		default:
			o.w.violation("I1: m%d to u%d: %d copies, %d failure reports, %d held; %d answers were lost", s.num, u, copies, bounced, aside, o.lost[k])
		}
	}
	for _, x := range l.Outside {
		a := outsideAddress(x)
		k := copyOf{o.idOf(s), a}
		bounced := o.reports[fmt.Sprintf("failed m%d %s", s.num, a)]
		aside := held[fmt.Sprintf("m%d %s", s.num, a)]
		n := o.accepted[k]
		excused := o.excused[fmt.Sprintf("m%d %s", s.num, a)]
		switch {
		case n > 1+o.lost[k]:
			o.w.violation("I1: %s was taken %d times outside, %d answers were lost", o.label(k), n, o.lost[k])
		case n > 0 && bounced+aside > 0 && (excused || o.again[k]):
		case n > 0 && bounced == 0 && o.w.mesh.isOut(o.w.nodes[s.client.node]): // a gateway could not ask any more whether it was sent
		case n == 0 && (bounced+aside == 0 && excused || bounced+aside > 1 && o.again[k]):
		case n > 0 && bounced+aside > 0 && o.lost[k] == 0:
			o.w.violation("I1: %s was taken outside and reported as failed", o.label(k))
		case n == 0 && bounced+aside == 0 && (unheard || stuck[fmt.Sprintf("m%d %s", s.num, a)]):
		case n == 0 && bounced+aside != 1 && !quiet:
			o.w.violation("I1: %s: taken by nobody, %d failure reports, %d held", o.label(k), bounced, aside)
		case n == 0 && bounced > 0 && quiet:
			o.w.violation("I16: the failure of %s was reported though nobody wants to hear", o.label(k))
		case n == 0 && quiet && aside == 0 && !o.given[k] && !o.w.plan.Short:
			o.w.violation("I1: %s has vanished", o.label(k))
		}
	}
}

func (o *observer) idOf(s *sent) transport.MessageID {
	for id, x := range o.msgs {
		if x == s {
			return id
		}
	}
	return transport.MessageID{}
}

// held returns what stands in the undeliverable hold: messages, and reports of
// failure in place of what they are about.
func (o *observer) held() map[string]int {
	out := map[string]int{}
	for _, n := range o.w.nodes {
		rows, err := n.q.List()
		if err != nil {
			o.w.violation("%s: %v", n.name, err)
			continue
		}
		for _, d := range rows {
			legs, err := n.q.Legs(o.w.ctx, d.Key, 0, 10000)
			if err != nil {
				o.w.violation("%s: %v", n.name, err)
				continue
			}
			for _, l := range legs {
				for _, r := range l.Recipients {
					if r.State != queue.Aside {
						continue
					}
					report, ok := o.written[l.Message.String()]
					if !ok {
						out[o.name(l.Message)+" "+r.Address]++
					}
					if report.kind == "failed" {
						for _, about := range report.rcpts {
							out["m"+report.num+" "+about]++
						}
					}
				}
			}
		}
	}
	return out
}

// ordered checks that one sender's mail to one mailbox stands in the order of
// its 250s.
func (o *observer) ordered() {
	for _, p := range o.places() {
		last := map[client]*sent{}
		uids := sorted(o.seen[p])
		for _, uid := range uids {
			num, ok := strings.CutPrefix(o.seen[p][uid], "m")
			i, err := strconv.Atoi(num)
			if !ok || err != nil {
				continue
			}
			s := o.nums[i]
			if s.load == nil || len(o.again) > 0 && o.again[copyOf{o.idOf(s), p.box.String()}] {
				continue
			}
			if before := last[s.client]; before != nil && before.turn > s.turn {
				o.w.violation("order: m%d stands behind m%d at n%d, but was sent first by the same client", s.num, before.num, p.node)
			}
			last[s.client] = s
		}
	}
}
