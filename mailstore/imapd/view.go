package imapd

import (
	"cmp"
	"slices"
	"sort"
	"strings"

	"github.com/emersion/go-imap/v2"
	"github.com/emersion/go-imap/v2/imapserver"

	"posthouse/mailstore"
)

// view is what one session was told of its selected folder: which messages
// there are and under which numbers. Nothing enters or leaves it but by a
// response to the client, so both always count alike. It follows the folder by
// ModSeq; what may not be told yet waits in it.
type view struct {
	folder   *mailstore.Folder
	readOnly bool
	changed  chan struct{} // something happened; for IDLE
	stop     func()        // ends the watch

	uids []mailstore.UID // number i+1 is uids[i]
	last mailstore.ModSeq

	gone  []mailstore.UID                  // expunged, not told; growing, all in uids
	fresh []mailstore.UID                  // new, not told; growing, all behind uids
	flags map[mailstore.UID]mailstore.Info // changed, not told
	known map[mailstore.UID]mailstore.ModSeq
}

// opened is a view with what SELECT wants to know once.
type opened struct {
	*view
	status      mailstore.Status
	flags       []imap.Flag
	firstUnseen uint32
}

func openView(f *mailstore.Folder, readOnly bool) (opened, error) {
	v := &view{folder: f, readOnly: readOnly, changed: make(chan struct{}, 1), known: map[mailstore.UID]mailstore.ModSeq{}, flags: map[mailstore.UID]mailstore.Info{}}
	v.stop = f.Watch(func() {
		select {
		case v.changed <- struct{}{}:
		default: // one is waiting
		}
	})
	st, infos, err := f.List()
	if err != nil {
		v.stop()
		return opened{}, err
	}
	o := opened{view: v, status: st}
	v.last = st.HighestModSeq
	v.uids = make([]mailstore.UID, len(infos))
	keywords := map[mailstore.Flag]bool{}
	for i := range infos {
		m := &infos[i]
		v.uids[i] = m.UID
		seen := false
		for _, k := range m.Flags {
			if k == mailstore.Seen {
				seen = true
			} else if !strings.HasPrefix(string(k), `\`) {
				keywords[k] = true
			}
		}
		if !seen && o.firstUnseen == 0 {
			o.firstUnseen = uint32(i + 1)
		}
	}
	for _, k := range systemFlags {
		o.flags = append(o.flags, imap.Flag(k))
	}
	for k := range keywords {
		o.flags = append(o.flags, imap.Flag(k))
	}
	slices.Sort(o.flags[len(systemFlags):])
	return o, nil
}

func (v *view) close() { v.stop() }

// number returns the message number of a UID.
func (v *view) number(uid mailstore.UID) (uint32, bool) {
	i, ok := slices.BinarySearch(v.uids, uid)
	return uint32(i + 1), ok
}

// at returns the UIDs at these places.
func (v *view) at(places []int) []mailstore.UID {
	out := make([]mailstore.UID, len(places))
	for i, p := range places {
		out[i] = v.uids[p]
	}
	return out
}

// told notes that the client learns this state of a message from the command
// in hand, or asked not to be told.
func (v *view) told(m *mailstore.Info) {
	if w, ok := v.flags[m.UID]; ok && w.ModSeq <= m.ModSeq {
		delete(v.flags, m.UID)
	}
	v.known[m.UID] = m.ModSeq
}

// pull takes what happened in the folder into the waiting lists.
func (v *view) pull() error {
	if st, err := v.folder.Status(); err != nil || st.HighestModSeq == v.last {
		return err // an idle session does not load the folder
	}
	ch, err := v.folder.ChangesSince(v.last)
	if err != nil {
		return err
	}
	v.last = ch.Status.HighestModSeq
	if ch.Forgotten {
		if err := v.compare(&ch); err != nil {
			return err
		}
	}
	newest := mailstore.UID(0)
	if n := len(v.uids); n > 0 {
		newest = v.uids[n-1]
	}
	added := false
	for _, uid := range ch.Expunged {
		delete(v.flags, uid)
		if uid > newest {
			if i, ok := slices.BinarySearch(v.fresh, uid); ok {
				v.fresh = slices.Delete(v.fresh, i, i+1)
			}
		} else if _, ok := v.number(uid); ok {
			v.gone = append(v.gone, uid)
			added = true
		}
	}
	if added {
		slices.Sort(v.gone)
		v.gone = slices.Compact(v.gone)
	}
	for _, m := range ch.Changed {
		if m.UID > newest {
			if i, ok := slices.BinarySearch(v.fresh, m.UID); !ok {
				v.fresh = slices.Insert(v.fresh, i, m.UID)
			}
		} else if _, ok := v.number(m.UID); ok && v.known[m.UID] != m.ModSeq {
			v.flags[m.UID] = m
		}
	}
	clear(v.known)
	return nil
}

// compare finds out what was expunged when the store has forgotten it.
func (v *view) compare(ch *mailstore.Changes) error {
	_, infos, err := v.folder.List()
	if err != nil {
		return err
	}
	there := func(uid mailstore.UID) bool {
		_, ok := slices.BinarySearchFunc(infos, uid, func(m mailstore.Info, u mailstore.UID) int {
			return cmp.Compare(m.UID, u)
		})
		return ok
	}
	ch.Expunged = nil
	for _, uids := range [...][]mailstore.UID{v.uids, v.fresh} {
		for _, uid := range uids {
			if !there(uid) {
				ch.Expunged = append(ch.Expunged, uid)
			}
		}
	}
	return nil
}

// tell writes what waits: expunges only where the protocol allows them
// (RFC 9051 section 7.5.1), then the new number of messages, then flags.
func (v *view) tell(w *imapserver.UpdateWriter, expunge bool) error {
	if expunge || !expungesLater {
		if err := v.tellExpunged(w.WriteExpunge); err != nil {
			return err
		}
	}
	if len(v.fresh) > 0 {
		v.uids = append(v.uids, v.fresh...)
		v.fresh = nil
		if err := w.WriteNumMessages(uint32(len(v.uids))); err != nil {
			return err
		}
	}
	if len(v.flags) == 0 {
		return nil
	}
	changed := make([]mailstore.Info, 0, len(v.flags))
	for _, m := range v.flags {
		changed = append(changed, m)
	}
	clear(v.flags)
	sort.Slice(changed, func(i, j int) bool { return changed[i].UID < changed[j].UID })
	var buf []imap.Flag
	for i := range changed {
		n, ok := v.number(changed[i].UID)
		if !ok {
			continue
		}
		buf = shownFlags(buf, changed[i].Flags)
		if err := w.WriteMessageFlags(n, imap.UID(changed[i].UID), buf); err != nil {
			return err
		}
	}
	return nil
}

// tellExpunged writes the waiting expunges; each renumbers what comes behind.
func (v *view) tellExpunged(write func(number uint32) error) error {
	if len(v.gone) == 0 {
		return nil
	}
	gone, kept := v.gone, v.uids[:0]
	v.gone = nil
	var err error
	for i, uid := range v.uids {
		if len(gone) == 0 || gone[0] != uid {
			kept = append(kept, uid)
			continue
		}
		gone = gone[1:]
		delete(v.flags, uid)
		if err == nil {
			removed := i - len(kept)
			err = write(uint32(i + 1 - removed))
		}
	}
	v.uids = kept
	return err
}
