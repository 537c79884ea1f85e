//go:build mutant_barrier

package election

const waitsForBarrier = false
