package imapd

import (
	"strings"

	"github.com/emersion/go-imap/v2"

	"posthouse/mailstore"
)

var systemFlags = [...]mailstore.Flag{mailstore.Answered, mailstore.Flagged, mailstore.Deleted, mailstore.Seen, mailstore.Draft}

const maxKeyword = 64 // bytes; `$MDNSent` has 8

// storedFlags turns a client's flags into the store's. `\Recent` cannot be set
// (RFC 3501 section 2.3.2), other unknown system flags neither.
func storedFlags(flags []imap.Flag) ([]mailstore.Flag, error) {
	out := make([]mailstore.Flag, 0, len(flags))
next:
	for _, f := range flags {
		if !strings.HasPrefix(string(f), `\`) {
			if len(f) > maxKeyword {
				return nil, no(imap.ResponseCodeLimit, "Keyword too long")
			}
			out = append(out, mailstore.Flag(f))
			continue
		}
		for _, k := range systemFlags {
			if strings.EqualFold(string(f), string(k)) {
				out = append(out, k)
				continue next
			}
		}
		return nil, bad("This flag cannot be stored")
	}
	return out, nil
}

// shownFlags turns the store's flags into the library's, in buf.
func shownFlags(buf []imap.Flag, flags []mailstore.Flag) []imap.Flag {
	buf = buf[:0]
	for _, f := range flags {
		buf = append(buf, imap.Flag(f))
	}
	return buf
}

func hasFlag(flags []mailstore.Flag, want mailstore.Flag) bool {
	for _, f := range flags {
		if f == want || len(f) == len(want) && strings.EqualFold(string(f), string(want)) {
			return true
		}
	}
	return false
}
