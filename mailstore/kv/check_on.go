//go:build !mutant_unchecked_tables

package kv

const uncheckedTables = false
