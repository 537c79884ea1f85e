//go:build mutant_from

package intake

const checksFrom = false
