package mailstore

import (
	"context"
	"encoding/binary"
	"maps"
	"slices"
	"strings"
	"sync"
	"unicode"
	"unicode/utf8"

	"golang.org/x/text/unicode/norm"

	"posthouse/mailstore/log"
	"posthouse/mesh"
)

// Mailbox is one user's mail. Safe for concurrent use.
type Mailbox struct {
	s    *Store
	id   mesh.MailboxID
	slot int // in Store.recent; Store.mu guards it

	ready chan struct{} // closed when load has ended
	err   error         // of load

	// shape is held by whoever changes the set of folders, from the look at it
	// until the record is applied.
	shape chan struct{}

	mu         sync.Mutex
	there      bool
	counter    uint32 // number of the newest folder; UIDVALIDITYs come from it
	base       uint32 // epochs that lay behind it when it was made, beside the store's
	subscribed map[string]struct{}
	folders    map[uint32]*Folder
	names      map[string]*Folder
	reserved   int64           // bytes of messages under way
	under      map[uint64]*act // records under way, by their sequence number
}

// act is what whoever wrote a record wants of its application.
type act struct {
	reserved int64      // bytes that stop being reserved
	folders  [2]*Folder // whose pending count falls; may be nil
	result   *result    // may be nil
	shape    bool       // Mailbox.shape is free again
	over     bool
}

// result is filled in by Apply, for all records of one call.
type result struct {
	gone     bool // the folder was removed before
	changed  []Info
	modified []UID
	removed  []UID
	source   []UID
	dest     []UID
	validity uint32
	made     *target // a folder that is made with some of it reserved
}

func newMailbox(s *Store, id mesh.MailboxID) *Mailbox {
	return &Mailbox{
		s: s, id: id,
		ready:      make(chan struct{}),
		shape:      make(chan struct{}, 1),
		subscribed: map[string]struct{}{},
		folders:    map[uint32]*Folder{},
		names:      map[string]*Folder{},
		under:      map[uint64]*act{},
	}
}

func (mb *Mailbox) load() error {
	v := mb.s.j.View()
	row, ok, err := v.Get(boxKey(mb.id))
	if err != nil || !ok {
		return err
	}
	mb.there = true
	if err := mb.parse(row); err != nil {
		return err
	}
	if mb.s.epoch.Load() == 0 {
		if err := mb.s.loadEpoch(); err != nil {
			return err
		}
	}
	var bad error
	err = v.Scan(folderKey(mb.id, 0)[:18], nil, func(k, row []byte) bool {
		f := &Folder{mb: mb, id: binary.BigEndian.Uint32(k[18:])}
		if bad = f.parse(row); bad != nil {
			return false
		}
		mb.put(f)
		return true
	})
	if err == nil {
		err = bad
	}
	return err
}

func (mb *Mailbox) put(f *Folder) {
	mb.folders[f.id] = f
	mb.names[f.name] = f
}

func (mb *Mailbox) isThere() bool { mb.mu.Lock(); defer mb.mu.Unlock(); return mb.there }

// began notes a record under way; mb.mu is held since before its Append.
func (mb *Mailbox) began(seq uint64, a *act) {
	if len(mb.under) == 0 {
		mb.s.pin(mb)
	}
	mb.under[seq] = a
	mb.reserved += a.reserved
	for _, f := range a.folders {
		if f != nil {
			f.pending++
		}
	}
}

// ended takes the note back when the record is applied; never nil. mb.mu is held.
func (mb *Mailbox) ended(seq uint64) *result {
	a := mb.under[seq]
	if a == nil {
		return &result{}
	}
	mb.forgetAct(seq, a)
	if a.result == nil {
		return &result{}
	}
	return a.result
}

// forgetAct takes back what began did with a; mb.mu is held. The number may be
// another's by now: the log gives the one of an Append that it refused again.
func (mb *Mailbox) forgetAct(seq uint64, a *act) {
	if a.over {
		return
	}
	a.over = true
	if mb.under[seq] == a {
		delete(mb.under, seq)
		if len(mb.under) == 0 {
			mb.s.unpin(mb)
		}
	}
	mb.reserved -= a.reserved
	for _, f := range a.folders {
		if f != nil {
			f.pending--
		}
	}
	if a.shape {
		<-mb.shape
	}
}

// ID returns the mailbox's id.
func (mb *Mailbox) ID() mesh.MailboxID { return mb.id }

// Usage returns messages and bytes of all folders.
func (mb *Mailbox) Usage() (messages, bytes int64) {
	mb.mu.Lock()
	defer mb.mu.Unlock()
	return mb.usage()
}

func (mb *Mailbox) usage() (messages, bytes int64) {
	for _, f := range mb.folders {
		messages += int64(f.messages)
		bytes += f.size
	}
	return messages, bytes
}

// room reports whether size more bytes fit; mb.mu is held.
func (mb *Mailbox) room(size, quota int64) bool {
	if quota <= 0 {
		return true
	}
	_, used := mb.usage()
	return used+mb.reserved+size <= quota
}

func (mb *Mailbox) quota() int64 {
	if mb.s.opt.Quota == nil {
		return 0
	}
	return mb.s.opt.Quota(mb.id)
}

// Folder opens a folder; ErrNoFolder.
func (mb *Mailbox) Folder(name string) (*Folder, error) {
	name, err := FolderName(name)
	if err != nil {
		return nil, ErrNoFolder
	}
	mb.mu.Lock()
	defer mb.mu.Unlock()
	if f := mb.names[name]; f != nil {
		return f, nil
	}
	return nil, ErrNoFolder
}

// Folders lists all folders, ordered by name with INBOX first. A subscribed
// name without a folder stands in it with NoSelect.
func (mb *Mailbox) Folders() []FolderInfo {
	mb.mu.Lock()
	defer mb.mu.Unlock()
	all := map[string]*FolderInfo{}
	for n, f := range mb.names {
		all[n] = &FolderInfo{Name: n, Use: f.use}
	}
	for n := range mb.subscribed {
		if all[n] == nil {
			all[n] = &FolderInfo{Name: n, NoSelect: true}
		}
		all[n].Subscribed = true
	}
	for n := range mb.names {
		for p := parent(n); p != ""; p = parent(p) {
			if all[p] == nil {
				all[p] = &FolderInfo{Name: p, NoSelect: true}
			}
			all[p].Children = true
		}
	}
	out := make([]FolderInfo, 0, len(all))
	for _, n := range slices.SortedFunc(maps.Keys(all), compareNames) {
		out = append(out, *all[n])
	}
	return out
}

func compareNames(a, b string) int {
	if (a == inbox) != (b == inbox) {
		if a == inbox {
			return -1
		}
		return 1
	}
	return strings.Compare(a, b)
}

func sortedNames(m map[string]struct{}) []string { return slices.Sorted(maps.Keys(m)) }

// parent returns the name one level up, "" for none.
func parent(name string) string {
	if i := strings.LastIndexByte(name, '/'); i > 0 {
		return name[:i]
	}
	return ""
}

// FolderName returns the form in which a folder's name is kept: NFC, "INBOX" in
// capitals also as the first level, without a delimiter at its end (a client
// may give one with CREATE, RFC 9051 section 6.3.4). ErrName: empty levels,
// control characters, wildcards, invalid UTF-8, or too long.
func FolderName(name string) (string, error) {
	if !utf8.ValidString(name) || len(name) > MaxName {
		return "", ErrName
	}
	name = strings.TrimSuffix(norm.NFC.String(name), "/")
	if name == "" || len(name) > MaxName || strings.ContainsAny(name, "*%") {
		return "", ErrName
	}
	for _, r := range name {
		if unicode.IsControl(r) || r == 0x2028 || r == 0x2029 || r == utf8.RuneError {
			return "", ErrName
		}
	}
	levels := strings.Split(name, "/")
	if slices.Contains(levels, "") || len(levels) > 50 {
		return "", ErrName
	}
	if strings.EqualFold(levels[0], inbox) {
		name = inbox + name[len(inbox):]
	}
	return name, nil
}

// lockShape waits for the right to change the set of folders.
func (mb *Mailbox) lockShape(ctx context.Context) error {
	select {
	case mb.shape <- struct{}{}:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// reshape lets plan look at the folders and say what to write, writes it, and
// waits until it is applied. plan runs with mb.mu held; seqs are known to it
// only later, so it returns an act for each entry.
func (mb *Mailbox) reshape(ctx context.Context, plan func() ([]log.Entry, []*act, error)) error {
	if err := mb.s.j.Admit(ctx, 4096); err != nil {
		return err
	}
	if err := mb.lockShape(ctx); err != nil {
		return err
	}
	mb.mu.Lock()
	entries, acts, err := plan()
	if err != nil || len(entries) == 0 {
		mb.mu.Unlock()
		<-mb.shape
		return err
	}
	acts[len(acts)-1].shape = true
	return mb.commit(ctx, entries, acts)
}

func (mb *Mailbox) folderEntry(r folderRecord) log.Entry {
	r.Version, r.Mailbox = recordVersion, mb.id
	return log.Entry{Kind: log.KindFolder, Meta: encode(r)}
}

// missing returns the folders to make so that name and its parents exist.
func (mb *Mailbox) missing(name string, use SpecialUse) (nf []newFolder) {
	id := mb.counter
	levels := strings.Split(name, "/")
	for i := range levels {
		n := strings.Join(levels[:i+1], "/")
		if mb.names[n] != nil {
			continue
		}
		id++
		f := newFolder{ID: id, Name: n}
		if n == name {
			f.Use = use
		}
		nf = append(nf, f)
	}
	return nf
}

// CreateFolder makes a folder and the parents it needs (RFC 9051 section 6.3.4).
func (mb *Mailbox) CreateFolder(ctx context.Context, name string, use SpecialUse) error {
	name, err := FolderName(name)
	if err != nil {
		return err
	}
	return mb.reshape(ctx, func() ([]log.Entry, []*act, error) {
		if mb.names[name] != nil {
			return nil, nil, ErrExists
		}
		nf := mb.missing(name, use)
		if len(mb.folders)+len(nf) > MaxFolders {
			return nil, nil, ErrTooMany
		}
		return []log.Entry{mb.folderEntry(folderRecord{Op: opCreate, New: nf})}, []*act{{}}, nil
	})
}

// DeleteFolder removes a folder with its messages; children stay.
func (mb *Mailbox) DeleteFolder(ctx context.Context, name string) error {
	name, err := FolderName(name)
	if err != nil {
		return ErrNoFolder
	}
	if name == inbox {
		return ErrHasInbox
	}
	f, err := mb.Folder(name)
	if err != nil {
		return err
	}
	if err := f.hold(); err != nil {
		return err
	}
	defer f.release()
	return mb.reshape(ctx, func() ([]log.Entry, []*act, error) {
		if mb.names[name] != f {
			return nil, nil, ErrNoFolder
		}
		// Its messages go in records of bounded size first.
		entries, acts := f.expunge(f.uids(), true, nil)
		return append(entries, mb.folderEntry(folderRecord{Op: opDelete, Folder: f.id})), append(acts, &act{}), nil
	})
}

// RenameFolder renames a folder and its children. Of INBOX it moves the
// messages to the new folder and leaves INBOX empty (RFC 9051 section 6.3.6).
// Subscriptions belong to names and stay.
func (mb *Mailbox) RenameFolder(ctx context.Context, from, to string) error {
	from, err := FolderName(from)
	if err != nil {
		return ErrNoFolder
	}
	if to, err = FolderName(to); err != nil {
		return err
	}
	f, err := mb.Folder(from)
	if err != nil && from == inbox {
		return err
	}
	if from == inbox {
		if err := f.hold(); err != nil {
			return err
		}
		defer f.release()
	}
	return mb.reshape(ctx, func() ([]log.Entry, []*act, error) {
		if mb.names[to] != nil {
			return nil, nil, ErrExists
		}
		if from == inbox {
			nf := mb.missing(to, "")
			if len(mb.folders)+len(nf) > MaxFolders {
				return nil, nil, ErrTooMany
			}
			entries := []log.Entry{mb.folderEntry(folderRecord{Op: opCreate, New: nf})}
			acts := []*act{{}}
			dest := &target{id: nf[len(nf)-1].ID, next: 1, mod: 2}
			es, as := f.copy(f.uids(), dest, true, nil)
			acts[0].result = &result{made: dest}
			return append(entries, es...), append(acts, as...), nil
		}
		below := 0
		for n := range mb.names {
			if rest, ok := strings.CutPrefix(n, from+"/"); ok {
				below++
				if len(to)+1+len(rest) > MaxName {
					return nil, nil, ErrName
				}
				if mb.names[to+"/"+rest] != nil {
					return nil, nil, ErrExists
				}
			}
		}
		switch {
		case mb.names[from] == nil && below == 0:
			return nil, nil, ErrNoFolder
		case strings.HasPrefix(to, from+"/"):
			return nil, nil, ErrName
		}
		var nf []newFolder
		if p := parent(to); p != "" {
			nf = mb.missing(p, "")
		}
		if len(mb.folders)+len(nf) > MaxFolders {
			return nil, nil, ErrTooMany
		}
		return []log.Entry{mb.folderEntry(folderRecord{Op: opRename, New: nf, From: from, Name: to})}, []*act{{}}, nil
	})
}

// Subscribe sets or clears the subscription of a name.
func (mb *Mailbox) Subscribe(ctx context.Context, name string, on bool) error {
	name, err := FolderName(name)
	if err != nil {
		return err
	}
	return mb.reshape(ctx, func() ([]log.Entry, []*act, error) {
		if _, is := mb.subscribed[name]; is == on {
			return nil, nil, nil
		}
		op := uint8(opUnsubscribe)
		if on {
			op = opSubscribe
			size := len(name)
			for n := range mb.subscribed {
				size += len(n)
			}
			if size > maxSubscribed {
				return nil, nil, ErrTooMany
			}
		}
		return []log.Entry{mb.folderEntry(folderRecord{Op: op, Name: name})}, []*act{{}}, nil
	})
}
