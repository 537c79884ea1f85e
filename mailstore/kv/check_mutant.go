//go:build mutant_unchecked_tables

package kv

// uncheckedTables lets Badger meet damaged tables: a control for the test of
// flipped bits, which must fail with it.
const uncheckedTables = true
