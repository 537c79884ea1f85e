//go:build !mutant_from

package intake

// checksFrom says that nobody writes in another's name. The tag mutant_from takes the
// guard out, and the tests must notice.
const checksFrom = true
