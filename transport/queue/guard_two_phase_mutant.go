//go:build mutant_two_phase

package queue

const waitsForRelease = false
