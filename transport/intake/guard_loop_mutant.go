//go:build mutant_loop

package intake

const countsHops = false
