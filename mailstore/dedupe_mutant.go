//go:build mutant_no_dedupe

package mailstore

// dedupe is switched off: the tests must notice.
const dedupe = false
