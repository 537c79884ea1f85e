//go:build mutant_entry

package relay

const entriesAreMembers = false
