//go:build !mutant_no_dedupe

package mailstore

// dedupe is the guard against a second copy of a message that comes again.
const dedupe = true
