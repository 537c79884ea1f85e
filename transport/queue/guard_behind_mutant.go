//go:build mutant_behind

package queue

const behindIsDeferred = true
