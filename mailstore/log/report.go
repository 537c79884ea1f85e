package log

import "fmt"

// Damage is bytes on disk that are not the ones that were written.
type Damage struct {
	File   string // name in the log's folder
	Offset int64  // bytes from the file's start
	What   string
	// First and Last are the sequences of the records that cannot be read for
	// it, as far as that can be told; Last 0: not known, or none.
	First, Last uint64
}

// String says it in one line.
func (d Damage) String() string {
	s := fmt.Sprintf("%s at %d: %s", d.File, d.Offset, d.What)
	switch {
	case d.Last == 0 || d.Last < d.First:
		return s
	case d.First == d.Last:
		return fmt.Sprintf("%s (record %d)", s, d.First)
	}
	return fmt.Sprintf("%s (records %d to %d)", s, d.First, d.Last)
}

// Cut is an unfinished write that Open took off the end of the log. Nobody had
// been told of it.
type Cut struct {
	File   string
	Offset int64 // where the file ends now
	Bytes  int64 // what was cut
}

// Report is what Open found and did, and what Replay found since.
type Report struct {
	Segments int    // log segments
	Bodies   int    // body segments
	End      uint64 // last sequence found
	Sealed   bool   // the log was closed in order, or is new
	// Mark is the highest position that Mark was told in the log's life: a view
	// that is durable at less has lost something.
	Mark uint64
	// LostEnd says that the log ends before Options.Position or before Mark: it
	// has lost records that were synced.
	LostEnd bool
	// Compacted is the highest mark given to Compact, 0 for none: what the log
	// says of before it is not whole, so a view is not made from it alone.
	Compacted uint64
	Recovered int      // records of an unsealed end, written and synced again
	Cut       []Cut    // unfinished writes taken off
	Damage    []Damage // named, never cut, never skipped in silence
	Leftovers int      // unfinished files removed
	Orphans   int      // bodies removed that no record names
}
