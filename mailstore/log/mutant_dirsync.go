//go:build mutant_no_dirsync

package log

// noDirSync leaves new names unsynced: a control for the crash tests, which
// must fail with it.
const noDirSync = true
