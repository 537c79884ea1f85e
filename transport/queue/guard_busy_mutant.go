//go:build mutant_busy

package queue

const busyHolds = false
