//go:build mutant_final

package queue

const givenUpIsFinal = false
