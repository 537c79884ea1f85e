//go:build mutant_unsure

package joining

const asksFirst = false
