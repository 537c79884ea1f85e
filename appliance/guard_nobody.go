//go:build !mutant_nobody

package appliance

// asksForNobody says that a node which asks homes about their people asks about
// names that nobody has as well. The tag mutant_nobody takes the guard out, and
// the tests must notice.
const asksForNobody = true
