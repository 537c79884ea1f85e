package mailstore_test

import (
	"fmt"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"posthouse/mailstore"
	"posthouse/mailstore/journal"
	"posthouse/mailstore/journal/journaltest"
	"posthouse/mailstore/log"
	"posthouse/mailstore/mime"
	"posthouse/mesh"
	"posthouse/transport"
)

// world is a store on a disk that outlives it.
type world struct {
	t    testing.TB
	disk *journaltest.Disk
	opt  mailstore.Options
	j    *journal.Journal
	s    *mailstore.Store
	ids  uint32
}

func newWorld(t testing.TB, opt mailstore.Options) *world {
	w := &world{t: t, disk: journaltest.NewDisk(t), opt: opt}
	w.open()
	return w
}

func (w *world) open() {
	w.t.Helper()
	w.j = w.disk.Open(w.t)
	w.s = mailstore.New(w.j, w.opt)
	if err := w.j.Start(w.t.Context()); err != nil {
		w.t.Fatal(err)
	}
}

// crash opens the store again; rebuild also throws the view away.
func (w *world) crash(rebuild bool) {
	w.t.Helper()
	w.disk.Crash(w.t)
	w.s.Close()
	if rebuild {
		w.disk.DropView(w.t)
	}
	w.open()
}

func boxID(n byte) mesh.MailboxID { return mesh.MailboxID{0: n, 15: 1} }

func (w *world) create(n byte) *mailstore.Mailbox {
	w.t.Helper()
	if err := w.s.Create(w.t.Context(), boxID(n), 0); err != nil {
		w.t.Fatal(err)
	}
	return w.box(n)
}

func (w *world) box(n byte) *mailstore.Mailbox {
	w.t.Helper()
	mb, err := w.s.Mailbox(boxID(n))
	if err != nil {
		w.t.Fatal(err)
	}
	return mb
}

func (w *world) folder(n byte, name string) *mailstore.Folder {
	w.t.Helper()
	f, err := w.box(n).Folder(name)
	if err != nil {
		w.t.Fatal(err)
	}
	return f
}

// structure is the walk of a message with one text part.
func structure(text string) *mime.Structure {
	body := int64(strings.Index(text, "\r\n\r\n") + 4)
	subject := ""
	if _, rest, ok := strings.Cut(text, "Subject: "); ok {
		subject, _, _ = strings.Cut(rest, "\r\n")
	}
	return &mime.Structure{
		Envelope: mime.Envelope{Subject: subject, Date: time.Date(2026, 11, 22, 12, 0, 0, 0, time.FixedZone("", 3600))},
		Root:     &mime.Part{Body: body, End: int64(len(text)), Type: "text", Subtype: "plain", Encoding: "7BIT"},
		Received: strings.Count(text, "Received:"),
	}
}

func (w *world) draft(text string) *log.Draft {
	w.t.Helper()
	d := w.j.NewDraft()
	io.WriteString(d, text)
	if err := d.Seal(w.t.Context()); err != nil {
		w.t.Fatal(err)
	}
	return d
}

func (w *world) delivery(id transport.MessageID, text string, boxes ...byte) *mailstore.Delivery {
	d := &mailstore.Delivery{
		Envelope:  transport.Envelope{ID: id, From: "ada@example.net"},
		Draft:     w.draft(text),
		Structure: structure(text),
	}
	for _, b := range boxes {
		d.Rcpts = append(d.Rcpts, transport.Recipient{Mailbox: boxID(b)})
	}
	return d
}

func (w *world) newID() transport.MessageID {
	w.ids++
	return transport.MessageID{0: 1, 12: byte(w.ids >> 24), 13: byte(w.ids >> 16), 14: byte(w.ids >> 8), 15: byte(w.ids)}
}

func text(subject string) string { return "Subject: " + subject + "\r\n\r\nHello " + subject + "\r\n" }

func (w *world) deliver(subject string, boxes ...byte) []transport.Result {
	w.t.Helper()
	rs, err := w.s.Deliver(w.t.Context(), w.delivery(w.newID(), text(subject), boxes...))
	if err != nil {
		w.t.Fatal(err)
	}
	return rs
}

func outcomes(rs []transport.Result) (s string) {
	for _, r := range rs {
		s += r.Outcome.String() + " "
	}
	return strings.TrimSpace(s)
}

func read(t testing.TB, b transport.Body) string {
	t.Helper()
	r, err := b.Open()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	all, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	return string(all)
}

// picture is all that a client could see of a mailbox.
func (w *world) picture(n byte) string {
	w.t.Helper()
	var b strings.Builder
	mb := w.box(n)
	for _, fi := range mb.Folders() {
		fmt.Fprintf(&b, "%+v\n", fi)
		if fi.NoSelect {
			continue
		}
		f := w.folder(n, fi.Name)
		st, infos, err := f.List()
		if err != nil {
			w.t.Fatal(err)
		}
		fmt.Fprintf(&b, "  %+v\n", st)
		for _, i := range infos {
			m, err := f.Message(i.UID)
			if err != nil {
				w.t.Fatal(err)
			}
			body := read(w.t, m.Body)
			if int64(len(body)) != i.Size || m.Structure.Root.End != i.Size {
				w.t.Fatalf("%s %d: %d bytes served, size %d, structure ends at %d", fi.Name, i.UID, len(body), i.Size, m.Structure.Root.End)
			}
			fmt.Fprintf(&b, "  %v %q\n", i, body)
		}
		for since := mailstore.ModSeq(0); since <= st.HighestModSeq; since++ {
			c, err := f.ChangesSince(since)
			if err != nil {
				w.t.Fatal(err)
			}
			fmt.Fprintf(&b, "  since %d: %v %v %v\n", since, c.Expunged, c.Changed, c.Forgotten)
		}
	}
	return b.String()
}

// sameAfterReplay checks that nothing that a client could see depends on memory
// or on the view.
func (w *world) sameAfterReplay(boxes ...byte) {
	w.t.Helper()
	before := map[byte]string{}
	for _, n := range boxes {
		before[n] = w.picture(n)
	}
	for _, rebuild := range []bool{false, true} {
		w.crash(rebuild)
		for _, n := range boxes {
			if diff := cmp.Diff(before[n], w.picture(n)); diff != "" {
				w.t.Fatalf("mailbox %d after a crash, rebuilt=%v:\n%s", n, rebuild, diff)
			}
		}
	}
}

func TestAMessageIsDeliveredOnceHoweverOftenItComes(t *testing.T) {
	w := newWorld(t, mailstore.Options{})
	w.create(1)
	w.create(2)
	id := w.newID()
	for range 3 {
		rs, err := w.s.Deliver(t.Context(), w.delivery(id, text("once"), 1, 2, 1, 9))
		if err != nil {
			t.Fatal(err)
		}
		if got := outcomes(rs); got != "delivered delivered delivered moved" {
			t.Fatal(got)
		}
	}
	w.crash(true)
	if _, err := w.s.Deliver(t.Context(), w.delivery(id, text("once"), 2)); err != nil {
		t.Fatal(err)
	}
	for n := byte(1); n <= 2; n++ {
		st, err := w.folder(n, "INBOX").Status()
		if err != nil || st.Messages != 1 || st.UIDNext != 2 || st.Unseen != 1 {
			t.Fatalf("%+v, %v", st, err)
		}
	}
	if is, err := w.s.Delivered(id, boxID(2)); !is || err != nil {
		t.Fatal(is, err)
	}
	w.sameAfterReplay(1, 2)
}

func TestRepeatsThatComeTogetherGiveOneCopy(t *testing.T) {
	w := newWorld(t, mailstore.Options{})
	w.create(1)
	var ps []*mailstore.Pending
	id := w.newID()
	for range 8 {
		p, err := w.s.StartDelivery(t.Context(), w.delivery(id, text("twins"), 1))
		if err != nil {
			t.Fatal(err)
		}
		ps = append(ps, p)
	}
	for _, p := range ps {
		rs, err := p.Applied(t.Context())
		if err != nil || outcomes(rs) != "delivered" {
			t.Fatal(outcomes(rs), err)
		}
	}
	if st, _ := w.folder(1, "INBOX").Status(); st.Messages != 1 {
		t.Fatalf("%d copies", st.Messages)
	}
}

func TestAFormerHomeTakesNoMailAndStillAnswersForWhatItTook(t *testing.T) {
	home := mesh.NodeID(1)
	w := newWorld(t, mailstore.Options{Self: 1, Home: func(mesh.MailboxID) (mesh.NodeID, uint64) { return home, 7 }})
	w.create(1)
	w.create(2)
	id := w.newID()
	if rs, err := w.s.Deliver(t.Context(), w.delivery(id, text("before"), 1)); err != nil || outcomes(rs) != "delivered" {
		t.Fatal(rs, err)
	}
	home = 2
	if rs, err := w.s.Deliver(t.Context(), w.delivery(id, text("before"), 1)); err != nil || outcomes(rs) != "delivered" {
		t.Fatal("a repeat:", rs, err)
	}
	rs := w.deliver("after", 1, 2)
	if outcomes(rs) != "moved moved" || rs[0].Home != 2 || rs[0].Version != 7 {
		t.Fatal(rs)
	}
	if st, _ := w.folder(1, "INBOX").Status(); st.Messages != 1 {
		t.Fatalf("%d messages", st.Messages)
	}
	home = 1
	if rs := w.deliver("back again", 1); outcomes(rs) != "delivered" {
		t.Fatal(rs)
	}
	home = 0 // its user was deleted: nobody would ever read it
	if rs := w.deliver("for nobody", 1); outcomes(rs) != "moved" || rs[0].Home != 0 {
		t.Fatal(rs)
	}
}

func TestTheHomeSetsReturnPathAndDropsForeignOnes(t *testing.T) {
	w := newWorld(t, mailstore.Options{})
	w.create(1)
	in := "Return-Path: <a@evil>\r\nreturn-path : <b@evil>\r\n\t(folded)\r\nReceived: by x\r\nSubject: s\r\nRETURN-PATH:\r\n c\r\n\r\nReturn-Path: <stays>\r\n"
	d := w.delivery(w.newID(), in, 1)
	d.Trace = []byte("Received: from link\r\n\tby home\r\n")
	if _, err := w.s.Deliver(t.Context(), d); err != nil {
		t.Fatal(err)
	}
	m, err := w.folder(1, "inbox").Message(1)
	if err != nil {
		t.Fatal(err)
	}
	want := "Return-Path: <ada@example.net>\r\nReceived: from link\r\n\tby home\r\nReceived: by x\r\nSubject: s\r\n\r\nReturn-Path: <stays>\r\n"
	got := read(t, m.Body)
	if diff := cmp.Diff(want, got); diff != "" {
		t.Fatal(diff)
	}
	if p := m.Structure.Root; got[p.Body:p.End] != "Return-Path: <stays>\r\n" || m.Structure.Received != 2 || m.Info.Size != int64(len(got)) {
		t.Fatalf("%+v", m.Structure.Root)
	}
	r, _ := m.Body.Open()
	defer r.Close()
	for off := range got {
		for n := 1; n < 40; n += 7 {
			p := make([]byte, n)
			k, err := r.ReadAt(p, int64(off))
			if string(p[:k]) != got[off:min(off+n, len(got))] || (err == io.EOF) != (k < n) {
				t.Fatalf("ReadAt %d, %d: %q, %v", off, n, p[:k], err)
			}
		}
	}
	w.sameAfterReplay(1)
}

func TestQuotaDefersNewMailButNeverARepeat(t *testing.T) {
	quota := int64(0)
	w := newWorld(t, mailstore.Options{Quota: func(mesh.MailboxID) int64 { return quota }})
	w.create(1)
	id := w.newID()
	if _, err := w.s.Deliver(t.Context(), w.delivery(id, text("first"), 1)); err != nil {
		t.Fatal(err)
	}
	quota = 100
	rs, err := w.s.Deliver(t.Context(), w.delivery(id, text("first"), 1))
	if err != nil || outcomes(rs) != "delivered" {
		t.Fatal(rs, err)
	}
	second := w.newID()
	if rs, err = w.s.Deliver(t.Context(), w.delivery(second, text("second"), 1)); err != nil || rs[0].Enhanced != "4.2.2" || rs[0].Outcome != transport.Deferred {
		t.Fatal(rs, err)
	}
	f := w.folder(1, "INBOX")
	if _, _, err := f.Append(t.Context(), []mailstore.AppendMessage{{Draft: w.draft(text("x")), Structure: structure(text("x"))}}); err != mailstore.ErrQuota {
		t.Fatal(err)
	}
	if _, err := f.Copy(t.Context(), []mailstore.UID{1}, "Archive"); err != mailstore.ErrQuota {
		t.Fatal(err)
	}
	quota = 0
	if rs, err = w.s.Deliver(t.Context(), w.delivery(second, text("second"), 1)); err != nil || outcomes(rs) != "delivered" {
		t.Fatal(rs, err)
	}
}

func TestFlagsChangeOnlyWhatChanges(t *testing.T) {
	w := newWorld(t, mailstore.Options{})
	w.create(1)
	for i := range 4 {
		w.deliver(fmt.Sprint(i), 1)
	}
	f := w.folder(1, "INBOX")
	set := func(op mailstore.FlagOp, since mailstore.ModSeq, flags []mailstore.Flag, uids ...mailstore.UID) string {
		t.Helper()
		changed, modified, err := f.SetFlags(t.Context(), uids, op, flags, since)
		if err != nil {
			t.Fatal(err)
		}
		s := ""
		for _, i := range changed {
			s += fmt.Sprintf("%d@%d%v ", i.UID, i.ModSeq, i.Flags)
		}
		return s + fmt.Sprint(modified)
	}
	for i, c := range []struct{ got, want string }{
		{set(mailstore.FlagsAdd, 0, []mailstore.Flag{`\seen`, "Later", `\Recent`}, 3, 1, 3, 77), `1@6[\Seen Later] 3@6[\Seen Later] []`},
		{set(mailstore.FlagsAdd, 0, []mailstore.Flag{"LATER"}, 1, 2), `1@6[\Seen Later] 2@7[Later] []`},
		{set(mailstore.FlagsAdd, 0, []mailstore.Flag{"LATER"}, 1, 2), `1@6[\Seen Later] 2@7[Later] []`},
		{set(mailstore.FlagsRemove, 0, []mailstore.Flag{`\Seen`, "unknown"}, 1, 2, 3), `1@8[Later] 2@7[Later] 3@8[Later] []`},
		{set(mailstore.FlagsSet, 7, []mailstore.Flag{`\Deleted`}, 1, 2, 4), `2@9[\Deleted] 4@9[\Deleted] [1]`},
	} {
		if c.got != c.want {
			t.Errorf("step %d: %s, want %s", i, c.got, c.want)
		}
	}
	if st, _ := f.Status(); st.Unseen != 4 || st.Deleted != 2 || st.HighestModSeq != 9 {
		t.Errorf("%+v", st)
	}
	gone, err := f.Expunge(t.Context(), []mailstore.UID{1, 2})
	if err != nil || !cmp.Equal(gone, []mailstore.UID{2}) {
		t.Fatal(gone, err)
	}
	if gone, err = f.Expunge(t.Context(), nil); err != nil || !cmp.Equal(gone, []mailstore.UID{4}) {
		t.Fatal(gone, err)
	}
	if _, err := f.Message(4); err != mailstore.ErrExpunged {
		t.Fatal(err)
	}
	w.sameAfterReplay(1)
}

func TestCopyAndMoveKeepFlagsAndDates(t *testing.T) {
	w := newWorld(t, mailstore.Options{})
	mb := w.create(1)
	for i := range 5 {
		w.deliver(fmt.Sprint(i), 1)
	}
	f := w.folder(1, "INBOX")
	if _, _, err := f.SetFlags(t.Context(), []mailstore.UID{2}, mailstore.FlagsAdd, []mailstore.Flag{mailstore.Seen, "Later"}, 0); err != nil {
		t.Fatal(err)
	}
	if err := mb.CreateFolder(t.Context(), "Work/2026/", ""); err != nil {
		t.Fatal(err)
	}
	c, err := f.Copy(t.Context(), []mailstore.UID{9, 2, 1}, "work/2026")
	if err != mailstore.ErrNoFolder {
		t.Fatal(c, err)
	}
	if c, err = f.Copy(t.Context(), []mailstore.UID{9, 2, 1}, "Work/2026"); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(mailstore.CopyResult{UIDValidity: 8, Source: []mailstore.UID{1, 2}, Dest: []mailstore.UID{1, 2}}, c); diff != "" {
		t.Fatal(diff)
	}
	if c, err = f.Move(t.Context(), []mailstore.UID{2, 5}, "Work/2026"); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(mailstore.CopyResult{UIDValidity: 8, Source: []mailstore.UID{2, 5}, Dest: []mailstore.UID{3, 4}}, c); diff != "" {
		t.Fatal(diff)
	}
	if c, err = f.Move(t.Context(), []mailstore.UID{1}, "INBOX"); err != nil || c.Dest[0] != 6 {
		t.Fatal(c, err)
	}
	if err := mb.RenameFolder(t.Context(), "INBOX", "Old/Mail"); err != nil {
		t.Fatal(err)
	}
	w.deliver("new", 1)
	if st, _ := f.Status(); st.Messages != 1 || st.UIDNext != 8 {
		t.Fatalf("%+v", st)
	}
	if st, _ := w.folder(1, "Old/Mail").Status(); st.Messages != 3 || st.UIDNext != 4 {
		t.Fatalf("%+v", st)
	}
	w.sameAfterReplay(1)
}
