//go:build !mutant_ack_before_sync

package log

const ackBeforeSync = false
