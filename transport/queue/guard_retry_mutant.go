//go:build mutant_retry

package queue

const deferredWaits = false
