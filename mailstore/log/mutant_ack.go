//go:build mutant_ack_before_sync

package log

// ackBeforeSync answers tickets before the sync: a control for the crash
// tests, which must fail with it.
const ackBeforeSync = true
