//go:build mutant_seen

package queue

const seenSoon = false
