package appliance

import (
	"context"
	"crypto/rand"
	"fmt"
	"log/slog"
	"path/filepath"

	"posthouse/mailstore"
	"posthouse/mailstore/journal"
	"posthouse/mailstore/kv"
	"posthouse/mailstore/log"
	"posthouse/mesh"
	"posthouse/transport"
	"posthouse/transport/queue"
	"posthouse/transport/route"
)

// Verified is what VerifyStore found.
type Verified struct {
	Segments int      `json:"segments"`
	Records  int      `json:"records"`
	Bytes    int64    `json:"bytes"`
	Damage   []string `json:"damage"` // one line each: file, offset, what
}

// VerifyStore reads a stopped node's message log with all its checksums.
func VerifyStore(ctx context.Context, data string) (Verified, error) {
	v := Verified{Damage: []string{}}
	s, err := log.Verify(ctx, log.Disk{}, filepath.Join(data, "log"), func(d log.Damage) { v.Damage = append(v.Damage, d.String()) })
	if err != nil {
		return v, fmt.Errorf("verify the store: %w", err)
	}
	v.Segments, v.Records, v.Bytes = s.Segments, s.Records, s.Bytes
	return v, nil
}

// RebuildStore makes a stopped node's index anew from its message log, and
// returns the number of the last record.
func RebuildStore(ctx context.Context, data string, progress func(done, total uint64)) (last uint64, err error) {
	logger := slog.New(slog.DiscardHandler)
	j, err := journal.Open(ctx, journal.Options{Log: log.Options{Dir: filepath.Join(data, "log")}, View: kv.Options{Dir: filepath.Join(data, "view")}, Logger: logger})
	if err != nil {
		return 0, fmt.Errorf("open the store: %w", err)
	}
	s := mailstore.New(j, mailstore.Options{})
	defer func() {
		if e := j.Close(); err == nil {
			err = e
		}
		s.Close()
	}()
	queue.New(j, queueDeps(queue.Deps{
		Carrier: func(transport.Destination) transport.Carrier { return nil },
		Route:   func(*transport.Recipient) (transport.Destination, bool) { return transport.Destination{}, false },
		Resolve: func(*transport.Envelope, string) []queue.Leg { return nil },
		Member:  func(mesh.NodeID) bool { return true },
		Host:    func() string { return "" }, Postmaster: func() string { return "" },
		Rand: rand.Reader, Logger: logger,
	}))
	if err := j.Rebuild(ctx, progress); err != nil {
		return 0, fmt.Errorf("rebuild the store: %w", err)
	}
	return j.Applied(), nil
}

// queueDeps fills in what does not depend on the node: how the queue reads what
// the mailstore wrote, and where an outside address goes at a gateway.
func queueDeps(d queue.Deps) queue.Deps {
	d.Domain = route.ToDomain
	d.Decode = func(meta []byte) (queue.Delivered, error) {
		x, err := mailstore.DecodeDelivered(meta)
		return queue.Delivered{ID: x.ID, LegSeq: x.LegSeq, Mailboxes: x.Mailboxes}, err
	}
	return d
}
