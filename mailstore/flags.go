package mailstore

import (
	"slices"
	"strings"
)

// bits is a message's flags: the low bits are the system flags, the others the
// folder's keywords in the order in which they came up.
type bits uint64

const (
	bitSeen bits = 1 << iota
	bitAnswered
	bitFlagged
	bitDeleted
	bitDraft

	systemBits = 5
	systemMask = 1<<systemBits - 1
)

var systemFlags = [systemBits]Flag{Seen, Answered, Flagged, Deleted, Draft}

// splitFlags sorts flags into system bits and keywords, each keyword once. What
// starts with a backslash and is not stored, `\Recent` for one, is left out.
func splitFlags(flags []Flag) (sys bits, words []string, err error) {
next:
	for _, f := range flags {
		for i, s := range systemFlags {
			if strings.EqualFold(string(s), string(f)) {
				sys |= 1 << i
				continue next
			}
		}
		w := string(f)
		if w == "" || w[0] == '\\' || slices.ContainsFunc(words, func(o string) bool { return strings.EqualFold(o, w) }) {
			continue
		}
		if len(w) > MaxKeyword {
			return 0, nil, ErrTooMany
		}
		words = append(words, w)
	}
	return sys, words, nil
}

// keywordTable names the keyword bits of a folder. Entries are never removed.
type keywordTable []string

func (t keywordTable) find(word string) (bits, bool) {
	for i, w := range t {
		if strings.EqualFold(w, word) {
			return 1 << (systemBits + i), true
		}
	}
	return 0, false
}

// known returns the bits of those words that the table has.
func (t keywordTable) known(words []string) (b bits) {
	for _, w := range words {
		k, _ := t.find(w)
		b |= k
	}
	return b
}

// add returns the bits of the words, with new entries where there is room; a
// keyword without room is dropped.
func (t *keywordTable) add(words []string) (b bits) {
	for _, w := range words {
		k, ok := t.find(w)
		if !ok && len(*t) < MaxKeywords {
			k = 1 << (systemBits + len(*t))
			*t = append(*t, w)
		}
		b |= k
	}
	return b
}

// words returns the keywords of b.
func (t keywordTable) words(b bits) (ws []string) {
	for i, w := range t {
		if b&(1<<(systemBits+i)) != 0 {
			ws = append(ws, w)
		}
	}
	return ws
}

// flags returns b as the API gives it.
func (t keywordTable) flags(b bits) []Flag {
	var fs []Flag
	for i, s := range systemFlags {
		if b&(1<<i) != 0 {
			fs = append(fs, s)
		}
	}
	for _, w := range t.words(b) {
		fs = append(fs, Flag(w))
	}
	return fs
}

// combine returns what op makes of old.
func (op FlagOp) combine(old, arg bits) bits {
	switch op {
	case FlagsSet:
		return arg
	case FlagsAdd:
		return old | arg
	case FlagsRemove:
		return old &^ arg
	}
	return old
}
