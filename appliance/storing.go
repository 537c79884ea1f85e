package appliance

import (
	"context"
	"fmt"
	"path/filepath"
	"time"

	"posthouse/appliance/health"
	"posthouse/appliance/metrics"
	"posthouse/mailstore"
	"posthouse/mailstore/journal"
	"posthouse/mailstore/log"
	"posthouse/mesh"
	"posthouse/transport/queue"
	"posthouse/transport/route"
)

// openStore opens log and view, registers the engines that keep things, and
// brings the view up to the log.
func (n *Node) openStore(ctx context.Context) (err error) {
	view := n.env.View
	view.Dir = n.viewDir()
	n.journal, err = journal.Open(ctx, journal.Options{Log: log.Options{Dir: filepath.Join(n.cfg.Data, "log"), FS: n.env.Disk}, View: view, Logger: n.part("store"), Space: n.diskSpace})
	if err != nil {
		return fmt.Errorf("open the store: %w", err)
	}
	n.store = mailstore.New(n.journal, mailstore.Options{Quota: n.quota, Self: n.id, Now: n.now, Fuller: n.notify, Home: func(m mesh.MailboxID) (mesh.NodeID, uint64) {
		home, version, _ := n.state.Home(m)
		return home, version
	}})
	n.queue = queue.New(n.journal, queueDeps(queue.Deps{
		Self: n.id, Carrier: n.carrier, Route: n.dir.next, Full: n.destinationFull, Seen: n.destinationSeen, Resolve: n.dir.resolveReport, Domain: route.ToDomain,
		Member: func(id mesh.NodeID) bool { x, ok := n.state.Node(id); return ok && x.Member() },
		Host:   func() string { return n.cfg.Host }, Postmaster: n.postmaster,
		Finals: func(origin mesh.NodeID) { n.relay.Finals(origin) }, Event: n.mailLog, Rand: n.env.Random, Logger: n.part("queue"),
		Clock: queueClock{n.env.Now, n.began},
	}))
	if err := n.journal.Start(ctx); err != nil {
		n.journal.Close()
		return fmt.Errorf("open the store: %w", err)
	}
	n.showStore()
	return nil
}

// queueClock implements queue.Clock: ages by the monotonic clock, dates by the wall's.
type queueClock struct {
	now   func() time.Time
	began time.Time
}

func (c queueClock) Elapsed() time.Duration {
	if agesByWallClock {
		return c.now().Sub(c.began)
	}
	return time.Since(c.began)
}
func (c queueClock) Now() time.Time { return c.now() }

func (n *Node) closeStore() {
	if err := n.journal.Close(); err != nil {
		n.log.Error("close the store", "err", err)
	}
	n.store.Close()
}

// figures are what the store counts, for the metrics.
func (n *Node) figures() []metrics.Figure {
	if n.ready() != nil {
		return nil // the store may not be open yet
	}
	s, d := n.journal.Stats(), n.journal.Disk()
	return []metrics.Figure{
		{Name: "log_groups_total", Help: "Groups of records written to the message log.", Value: float64(s.Groups)},
		{Name: "log_records_total", Help: "Records synced to the message log.", Value: float64(s.Records)},
		{Name: "log_bytes_total", Help: "Bytes written for them, bodies in files of their own not included.", Value: float64(s.Bytes)},
		{Name: "log_syncs_total", Help: "Syncs of log segments.", Value: float64(s.Syncs)},
		{Name: "log_sync_seconds_total", Help: "Time that these syncs took.", Value: s.SyncTime.Seconds()},
		{Name: "log_sync_max_seconds", Help: "The longest of them since the start.", Gauge: true, Value: s.SyncMax.Seconds()},
		{Name: "log_segments_total", Help: "Log segments begun.", Value: float64(s.Segments)},
		{Name: "log_no_space_total", Help: "Groups refused because the disk was full.", Value: float64(s.NoSpace)},
		{Name: "log_waiting_bytes", Help: "Bytes that wait for the log.", Gauge: true, Value: float64(s.Waiting)},
		{Name: "log_disk_bytes", Help: "Bytes that the message log takes on disk, as housekeeping saw it last.", Gauge: true, Value: float64(d.Bytes)},
		{Name: "log_live_bytes", Help: "Bytes of it that are still needed, estimated.", Gauge: true, Value: float64(d.Live)},
		{Name: "log_open_files", Help: "Segments open for reading.", Gauge: true, Value: float64(s.OpenFiles)},
	}
}

// storeTexts says for each condition of the store how grave it is and what to do.
var storeTexts = map[string]struct {
	severity health.Severity
	next     string
}{
	journal.CondNoSpace:     {health.Problem, "Make room on the disk; mail is taken again by itself."},
	journal.CondDamaged:     {health.Problem, "Restore the named file from a backup, then: posthouse store rebuild."},
	journal.CondLogLostEnd:  {health.Problem, "Check the disk; clients will download their mail again."},
	journal.CondViewDamaged: {health.Warning, "Check the disk; the index is rebuilt at the next start."},
	journal.CondViewWrong:   {health.Warning, "Stop the node, then: posthouse store rebuild. Until then no disk is reclaimed."},
	journal.CondHistoryLost: {health.Problem, "Restore the whole store from a backup if there is a good one; else: posthouse queue list, and release what is still to be sent."},
	journal.CondViewOld:     {health.Notice, ""},
	journal.CondViewRebuilt: {health.Notice, ""},
	journal.CondStopped:     {health.Problem, "Check the disk; the node starts again by itself."},
}

// showStore puts the store's conditions on the board.
func (n *Node) showStore() {
	now := map[string]bool{}
	for _, c := range n.journal.Conditions() {
		now[c.Name] = true
		t := storeTexts[c.Name]
		if t.severity == 0 {
			t.severity = health.Warning
		}
		n.board.Set(health.Condition{Name: c.Name, Severity: t.severity, Text: sentence(c.Text), Next: t.next, Since: c.Since.UTC()})
	}
	for name := range storeTexts {
		if !now[name] {
			n.board.Clear(name, "")
		}
	}
}

// quota is the limit of a mailbox in bytes; 0 for none.
func (n *Node) quota(m mesh.MailboxID) int64 {
	if u, ok := n.state.UserByMailbox(m); ok && u.Quota > 0 {
		return u.Quota
	}
	return n.state.Settings().Quota
}

// postmaster is the address that reports come from.
func (n *Node) postmaster() string {
	if ds := n.state.LocalDomains(); len(ds) > 0 {
		return "postmaster@" + ds[0].Name
	}
	return "postmaster@" + n.cfg.Host
}

// mailLog writes one line for each thing that happens to a message.
func (n *Node) mailLog(e queue.Event) {
	n.log.Info(e.What, "part", "mail", "msg_id", e.ID.String(), "queue", e.Queue.String(), "dest", e.Dest.String(), "rcpt", e.Recipient,
		"code", e.Result.Code, "text", e.Result.Text, "by", e.Result.By, "waited", e.Waited.Round(time.Millisecond).String())
}

// home makes the mailbox of a user who lives here, if it is not there yet. It
// returns false for a mailbox that lives elsewhere.
func (n *Node) home(ctx context.Context, m mesh.MailboxID) (bool, error) {
	if n.store.Has(m) {
		home, _, known := n.state.Home(m)
		return !known || home == n.id, nil
	}
	home, version, known := n.state.Home(m)
	if !known || home != n.id {
		return false, nil
	}
	return true, n.store.Create(ctx, m, n.epochs(version))
}

// epochs counts the epochs of UIDVALIDITY that may lie behind a mailbox which is
// made now: it had other homes, and those may have been rolled back. Being put
// out in the midst of a rollback may take one that is not counted: room for it.
func (n *Node) epochs(version uint64) uint32 {
	epochs := 4 * (version - 1)
	for _, x := range n.state.Nodes() {
		epochs += x.Incarnation
	}
	return uint32(epochs)
}

// makeMailboxes makes the mailboxes of all users who live here.
func (n *Node) makeMailboxes(ctx context.Context) {
	for _, u := range n.state.Users() {
		if u.Home != n.id || n.store.Has(u.Mailbox) {
			continue
		}
		if _, err := n.home(ctx, u.Mailbox); err != nil {
			if ctx.Err() == nil {
				n.log.Warn("make mailbox", "mailbox", u.Mailbox.String(), "err", err)
			}
			return
		}
	}
}

// homes makes mailboxes whenever the domain state says that somebody lives here.
func (n *Node) homes(ctx context.Context, changed <-chan struct{}) error {
	for {
		n.makeMailboxes(ctx)
		select {
		case <-changed:
		case <-ctx.Done():
			return nil
		}
	}
}
