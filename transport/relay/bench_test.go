package relay

import (
	"context"
	"crypto/rand"
	"net"
	"strings"
	"testing"

	"posthouse/mailstore"
	"posthouse/mailstore/journal"
	"posthouse/mailstore/kv"
	"posthouse/mailstore/log"
	"posthouse/mailstore/mime"
	"posthouse/mesh"
	"posthouse/transport"
)

// benchHome is a mailstore on the real disk. waits: a message starts only when
// the one before it is on disk.
type benchHome struct {
	j     *journal.Journal
	s     *mailstore.Store
	waits bool
}

func (h *benchHome) Start(ctx context.Context, env transport.Envelope, rcpts []transport.Recipient, body *log.Draft, s *mime.Structure, after []Started) (Started, error) {
	d := &mailstore.Delivery{Envelope: env, Rcpts: rcpts, Draft: body, Structure: s}
	for _, a := range after {
		d.After = append(d.After, a.(*mailstore.Pending))
	}
	p, err := h.s.StartDelivery(ctx, d)
	if err == nil && h.waits {
		_, err = p.Synced(ctx)
	}
	return p, err
}

func (h *benchHome) Where(mesh.MailboxID) (mesh.NodeID, uint64, bool) { return 0, 0, false }

// BenchmarkOneMailbox relays 256 messages of 4 KiB to one mailbox.
func BenchmarkOneMailbox(b *testing.B) {
	for _, c := range []struct {
		name  string
		waits bool
	}{{"one by one", true}, {"started in order", false}} {
		b.Run(c.name, func(b *testing.B) {
			j, err := journal.Open(b.Context(), journal.Options{Log: log.Options{Dir: b.TempDir()}, View: kv.Options{Memory: true}})
			if err != nil {
				b.Fatal(err)
			}
			defer j.Close()
			h := &benchHome{j: j, s: mailstore.New(j, mailstore.Options{}), waits: c.waits}
			if err := j.Start(b.Context()); err != nil {
				b.Fatal(err)
			}
			to := user("bob@ours.example")
			if err := h.s.Create(b.Context(), to.Mailbox, 0); err != nil {
				b.Fatal(err)
			}
			deps := Deps{Self: gw1, Name: name, Member: func(mesh.NodeID) bool { return true }, Home: h, NewDraft: j.NewDraft}
			home := New(deps)
			deps.Self = origin
			deps.Dial = func(context.Context, mesh.NodeID, string) (net.Conn, error) {
				near, far := newPipe()
				go home.Serve(context.Background(), origin, far)
				return near, nil
			}
			o := New(deps)
			body := text("Subject: x\r\n\r\n" + strings.Repeat("0123456789abcdef0123456789abcd\r\n", 128))
			const each = 256
			for b.Loop() {
				src := &legs{}
				for i := range uint64(each) {
					l := &transport.Leg{Seq: i, Envelope: transport.Envelope{EntryNode: origin, Origin: transport.OriginSubmission}, Rcpts: []transport.Recipient{to}, Body: body}
					rand.Read(l.Envelope.ID[:])
					src.legs = append(src.legs, l)
				}
				if err := o.Carry(b.Context(), toHome, src); err != nil || len(src.done) != each {
					b.Fatal(err, len(src.done))
				}
			}
			b.ReportMetric(float64(each)*float64(b.N)/b.Elapsed().Seconds(), "msgs/s")
			s := j.Stats()
			b.ReportMetric(float64(s.Records)/float64(s.Syncs), "records/sync")
		})
	}
}
