package imapd

import (
	"slices"

	"github.com/emersion/go-imap/v2"

	"posthouse/mailstore"
)

// span is a run of places in the view, the last one included.
type span struct{ first, last int }

// messages resolves a client's set to places in the view, growing, each once.
// UIDs that are not there are left out; numbers that are not are an error
// (RFC 9051 section 9, seq-number).
func (s *session) messages(set imap.NumSet) ([]int, error) {
	spans, err := s.spans(set)
	if err != nil {
		return nil, err
	}
	n := 0
	for _, sp := range spans {
		n += sp.last - sp.first + 1
	}
	out := make([]int, 0, n)
	for _, sp := range spans {
		for i := sp.first; i <= sp.last; i++ {
			out = append(out, i)
		}
	}
	return out, nil
}

func (s *session) spans(set imap.NumSet) ([]span, error) {
	uids := s.view.uids
	var spans []span
	switch set := set.(type) {
	case imap.SeqSet:
		for _, r := range set {
			first, last := r.Start, r.Stop
			if first == 0 {
				first = uint32(len(uids))
			}
			if last == 0 {
				last = uint32(len(uids))
			}
			if first > last {
				first, last = last, first
			}
			if len(uids) == 0 && (r.Start == 0 || r.Stop == 0) {
				continue // "1:*" of an empty folder, which many clients ask for
			}
			if last > uint32(len(uids)) || first == 0 {
				return nil, bad("No message with that number")
			}
			spans = append(spans, span{int(first) - 1, int(last) - 1})
		}
	case imap.UIDSet:
		if imap.IsSearchRes(set) { // RFC 5182
			for _, uid := range s.saved {
				if i, ok := slices.BinarySearch(uids, uid); ok {
					spans = append(spans, span{i, i})
				}
			}
			break
		}
		if len(uids) == 0 {
			return nil, nil
		}
		newest := uids[len(uids)-1]
		for _, r := range set {
			first, last := mailstore.UID(r.Start), mailstore.UID(r.Stop)
			if first == 0 {
				first = newest
			}
			if last == 0 {
				last = newest
			}
			if first > last {
				first, last = last, first
			}
			i, _ := slices.BinarySearch(uids, first)
			j, ok := slices.BinarySearch(uids, last)
			if ok {
				j++
			}
			if i < j {
				spans = append(spans, span{i, j - 1})
			}
		}
	}
	slices.SortFunc(spans, func(a, b span) int { return a.first - b.first })
	out := spans[:0]
	for _, sp := range spans {
		if n := len(out); n > 0 && sp.first <= out[n-1].last+1 {
			out[n-1].last = max(out[n-1].last, sp.last)
		} else {
			out = append(out, sp)
		}
	}
	return out, nil
}

// uidSet makes a set of growing UIDs.
func uidSet(uids []mailstore.UID) imap.UIDSet {
	set := imap.UIDSet{}
	for _, u := range uids {
		if n := len(set); n > 0 && set[n-1].Stop+1 == imap.UID(u) {
			set[n-1].Stop = imap.UID(u)
		} else {
			set = append(set, imap.UIDRange{Start: imap.UID(u), Stop: imap.UID(u)})
		}
	}
	return set
}
