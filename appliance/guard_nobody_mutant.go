//go:build mutant_nobody

package appliance

const asksForNobody = false
