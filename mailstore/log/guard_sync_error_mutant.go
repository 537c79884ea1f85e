//go:build mutant_sync_error

package log

const minded = false
