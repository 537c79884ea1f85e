package appliance

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"path/filepath"
	"syscall"

	"posthouse/appliance/admin"
	"posthouse/mailstore"
	"posthouse/mailstore/journal"
	"posthouse/mailstore/kv"
	"posthouse/mailstore/log"
	"posthouse/mesh"
	"posthouse/mesh/election"
	"posthouse/mesh/identity"
	"posthouse/transport"
	"posthouse/transport/queue"
	"posthouse/transport/route"
)

// Verified is what VerifyStore found.
type Verified struct {
	Segments int    `json:"segments"`
	Records  int    `json:"records"`
	Bytes    int64  `json:"bytes"`
	Damage   []Flaw `json:"damage"`
}

// ownFiles are the small files of a data folder, each with its copy.
var ownFiles = []string{"node.json", "ca.pem", "tls.pem"}

// VerifyStore reads a stopped node's files with all their checksums: the
// message log, what the election keeps, the key and the small files. The index
// is not among them: it is checked at each start and made anew from the log.
func VerifyStore(ctx context.Context, data string) (Verified, error) {
	v := Verified{Damage: []Flaw{}}
	dir := filepath.Join(data, "log")
	lock, err := log.Disk{}.Lock(dir)
	if errors.Is(err, syscall.EWOULDBLOCK) {
		return v, &admin.Error{Kind: admin.Unavailable, Code: "store.in-use", Text: "The node of " + data + " is running, and what it writes now looks unfinished.", Next: "Stop it first; its page names what it finds damaged while it runs."}
	}
	if errors.Is(err, fs.ErrNotExist) {
		return v, admin.Errorf(admin.NotFound, "store.none", "%s holds no message store.", data)
	}
	if err != nil {
		return v, fmt.Errorf("verify the store: %w", err)
	}
	defer lock.Close()
	s, err := log.Verify(ctx, log.Disk{}, dir, func(d log.Damage) {
		x := Flaw{filepath.Join("log", d.File), d.Offset, d.What}
		if d.Last != 0 {
			x.What += fmt.Sprintf(" (records %d to %d)", d.First, d.Last)
		}
		v.Damage = append(v.Damage, x)
	})
	if err != nil {
		return v, fmt.Errorf("verify the store: %w", err)
	}
	v.Segments, v.Records, v.Bytes = s.Segments, s.Records, s.Bytes
	found, err := election.VerifyFiles(filepath.Join(data, "election"))
	if err != nil {
		return v, err
	}
	for _, d := range found {
		v.Damage = append(v.Damage, Flaw{filepath.Join("election", d.File), d.Offset, d.What})
	}
	first, second := identity.Check(filepath.Join(data, "node.key"))
	if first != nil && !errors.Is(first, fs.ErrNotExist) {
		v.Damage = append(v.Damage, Flaw{"node.key", 0, first.Error()})
	}
	if second != nil {
		v.Damage = append(v.Damage, Flaw{"node.key" + copySuffix, 0, second.Error()})
	}
	for _, name := range ownFiles {
		_, flaws, _, err := twofold{Files: osFiles{}}.look(filepath.Join(data, name))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return v, fmt.Errorf("verify %s: %w", name, err)
		}
		v.Damage = append(v.Damage, flaws...)
	}
	return v, nil
}

// offline is a stopped node's store, opened for what is done to it as a whole.
type offline struct {
	*journal.Journal
	store *mailstore.Store
}

func openOffline(ctx context.Context, data string) (*offline, error) {
	logger := slog.New(slog.DiscardHandler)
	j, err := journal.Open(ctx, journal.Options{Log: log.Options{Dir: filepath.Join(data, "log")}, View: kv.Options{Dir: filepath.Join(data, "view")}, Logger: logger})
	if errors.Is(err, kv.ErrLocked) {
		return nil, admin.Errorf(admin.Unavailable, "store.in-use", "The node runs; stop it first (systemctl stop posthouse).")
	}
	if err != nil {
		return nil, fmt.Errorf("open the store: %w", err)
	}
	o := &offline{j, mailstore.New(j, mailstore.Options{})}
	queue.New(j, queueDeps(queue.Deps{
		Carrier: func(transport.Destination) transport.Carrier { return nil },
		Route:   func(*transport.Recipient) (transport.Destination, bool) { return transport.Destination{}, false },
		Resolve: func(*transport.Envelope, string) []queue.Leg { return nil },
		Member:  func(mesh.NodeID) bool { return true },
		Host:    func() string { return "" }, Postmaster: func() string { return "" },
		Rand: rand.Reader, Logger: logger,
	}))
	return o, nil
}

func (o *offline) close(err *error) {
	if e := o.Close(); *err == nil {
		*err = e
	}
	o.store.Close()
}

// RebuildStore makes a stopped node's index anew from its message log, and
// returns the number of the last record and what a person should know of it.
func RebuildStore(ctx context.Context, data string, progress func(done, total uint64)) (last uint64, notes []string, err error) {
	o, err := openOffline(ctx, data)
	if err != nil {
		return 0, nil, err
	}
	defer o.close(&err)
	if err := o.Rebuild(ctx, progress); err != nil {
		return 0, nil, fmt.Errorf("rebuild the store: %w", err)
	}
	for _, c := range o.Conditions() {
		notes = append(notes, sentence(c.Text))
	}
	return o.Applied(), notes, nil
}

// CompactStore reclaims all the disk that a stopped node's store can give back.
func CompactStore(ctx context.Context, data string) (t journal.Tidied, err error) {
	o, err := openOffline(ctx, data)
	if err != nil {
		return t, err
	}
	defer o.close(&err)
	if err := o.Start(ctx); err != nil {
		return t, fmt.Errorf("open the store: %w", err)
	}
	if t, err = o.Tidy(ctx, journal.TidyOptions{Force: true}); err != nil {
		return t, fmt.Errorf("compact the store: %w", err)
	}
	return t, nil
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
