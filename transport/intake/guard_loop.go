//go:build !mutant_loop

package intake

// countsHops says that a message going in circles is refused. The tag mutant_loop takes the
// guard out, and the tests must notice.
const countsHops = true
